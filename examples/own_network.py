"""A network of your own, from training to a packed file: spiking convolutions with 1-bit synapses on the digits.

    python examples/own_network.py        some seconds; writes own.safetensors and own.png into the working folder

The class below knows nothing of online learning or packing: it holds neurons, synapses and torch's own layers, time
first. What it takes is in `main`, top to bottom.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import empf
from empf.figures import raster

T = 4


class Net(nn.Module):
    """x (k, N, 1, 8, 8) -> logits (k, N, 10) of the next k steps."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(1, width, 3, padding=1, bias=False), empf.StepBatchNorm(width)
        self.neuron1 = empf.EMPFNeuron(T, width)
        self.conv, self.norm2 = empf.BinaryConv2d(width, width, 3, padding=1), empf.StepBatchNorm(width)
        self.neuron2 = empf.EMPFNeuron(T, width)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(16 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron1(self.norm1(per_step(self.stem, x)))
        spikes = self.neuron2(self.norm2(per_step(self.conv, spikes)))  # k N C 8 8
        return self.head(per_step(self.pool, spikes).flatten(2))


def per_step(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of torch, which knows no time, on k steps at once: (k, N, ...) -> (k, N, ...)."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8x8, every fifth for testing."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    """Logits (T, N, 10) of a new batch; a still image is the same in every step."""
    empf.reset(net)
    return net(images.expand(T, *images.shape))


@torch.no_grad()
def watch(net: nn.Module, neuron: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and potentials (T, ...) of one layer for one image, step by step."""
    spikes, potentials = [], []
    handle = neuron.register_forward_hook(lambda module, inputs, output: spikes.append(output[0, 0]))
    empf.reset(net)
    for _ in range(T):
        net(image[None, None])  # k = 1, N = 1
        potentials.append(neuron.v[0])
    handle.remove()
    return torch.stack(spikes), torch.stack(potentials)


def main(epochs: int = 10, width: int = 32, output_dir: str = ".") -> float:
    torch.manual_seed(0)
    train, test = digits()
    net = Net(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batches = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * len(batches))
    for epoch in range(epochs):
        for number, (images, labels) in enumerate(batches):
            steps = empf.draw_steps(T, 1, seed=0, iteration=epoch * len(batches) + number)
            x = images.expand(T, *images.shape)  # time first: the same image in each step
            loss, _ = empf.online_backward(net, x, labels, F.cross_entropy, steps=steps)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}")

    images, labels = test.tensors
    trained = logits_of(net.eval(), images)
    accuracy = 100 * (trained.sum(0).argmax(-1) == labels).float().mean().item()

    file = Path(output_dir) / "own.safetensors"
    empf.pack(net).save(file)
    packed = empf.load_packed(file, net=Net(width))  # the file holds the parts, the class holds the wiring
    difference = (logits_of(packed, images) - trained).abs().max() / trained.abs().max()
    mb = empf.account(net, images[:1].expand(T, 1, 1, 8, 8))
    print(
        f"{accuracy:.1f} % of {len(labels)} test images; packed, the logits differ by {difference:.0e} of the largest"
    )
    print(f"MB of parameters: {mb['params_full_mb']:.3f} in full precision, {mb['params_mb']:.3f} stored")
    raster(*watch(net, net.neuron2, images[0]), file.with_suffix(".png"))
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--output-dir", default=".")
    main(**vars(parser.parse_args()))
