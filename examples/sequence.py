"""What the state of a spiking neuron is worth: one MLP with 1-bit synapses reads time series step by step, online.

    python examples/sequence.py                                  digits, row by row: 8 steps of 8 numbers
    python examples/sequence.py --dataset japanese-vowels        speech, up to 29 steps of 12 numbers: pip install aeon

Vanilla neurons remember in their membrane potential, parallel ones see each step by itself, LIF is the baseline with
binary spikes. Tested by the logits of the last step, where all has been read, and by the sum of those of all steps.
"""

import argparse
import statistics
import sys
from json import dumps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import empf
from empf.machine import machine

NEURONS = {  # the leak of vanilla is learned, that of LIF stays
    "vanilla": lambda T: empf.EMPFNeuron(T, leak=0.8),
    "parallel": lambda T: empf.EMPFNeuron(T, parallel=True),
    "lif": lambda T: empf.LIFNeuron(T, leak=0.8),
}
Split = tuple[Tensor, Tensor]  # x (T, N, features), labels (N,)


class SpikingMLP(nn.Module):
    """x (k, N, features) -> logits (k, N, classes): two hidden layers, the synapses between them are 1 bit each."""

    def __init__(self, T: int, features: int, classes: int, neuron: str, width: int):
        super().__init__()
        self.embed, self.norm1 = nn.Linear(features, width, bias=False), empf.StepBatchNorm(width)
        self.hidden, self.norm2 = empf.BinaryLinear(width, width), empf.StepBatchNorm(width)
        self.neuron1, self.neuron2 = NEURONS[neuron](T), NEURONS[neuron](T)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron1(self.norm1(self.embed(x)))
        return self.head(self.neuron2(self.norm2(self.hidden(spikes))))


def digits() -> tuple[Split, Split]:
    """Each row of an image is a step; every fifth image is for testing."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8).transpose(0, 1) / 16  # T N features
    y, test = torch.tensor(labels), torch.arange(len(labels)) % 5 == 0
    return (x[:, ~test], y[~test]), (x[:, test], y[test])


def japanese_vowels() -> tuple[Split, Split]:
    """Nine speakers say two vowels; an utterance is repeated, so that it fills all steps and ends with the last."""
    from aeon.datasets import load_japanese_vowels  # pip install aeon

    train, test = load_japanese_vowels("train"), load_japanese_vowels("test")
    frames = np.concatenate(train[0], axis=1)  # features, all frames
    mean, std = frames.mean(1, keepdims=True), frames.std(1, keepdims=True)
    T = max(u.shape[1] for u in [*train[0], *test[0]])

    def split(utterances: list, speakers: np.ndarray) -> Split:
        filled = np.stack([np.pad((u - mean) / std, ((0, 0), (T - u.shape[1], 0)), "wrap") for u in utterances])
        return torch.tensor(filled).float().permute(2, 0, 1), torch.tensor(speakers.astype(int) - 1)

    return split(*train), split(*test)


DATASETS = {"digits": digits, "japanese-vowels": japanese_vowels}


def run(train: Split, test: Split, neuron: str, seed: int, epochs: int, width: int) -> dict[str, float]:
    """Train from one seed; % of the test set that is right at the last step and in the sum of all."""
    torch.manual_seed(seed)
    (x, y), T = train, len(train[0])
    net = SpikingMLP(T, x.shape[2], int(y.max()) + 1, neuron, width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10 * epochs)
    for iteration in range(10 * epochs):
        rows = torch.randperm(len(y))[: len(y) // 10]
        steps = empf.draw_steps(T, 1, seed, iteration)
        empf.online_backward(net, x[:, rows], y[rows], F.cross_entropy, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    empf.reset(net.eval())
    logits = net(test[0]).detach()  # T N classes
    right = torch.stack([logits[-1], logits.sum(0)]).argmax(-1) == test[1]
    return dict(zip(("last", "sum"), (100 * right.double().mean(1)).tolist(), strict=True))


def main(dataset: str = "digits", epochs: int = 20, width: int = 128, seeds: int = 3, json: str | None = None) -> dict:
    train, test = DATASETS[dataset]()
    T, samples, features = train[0].shape
    print(f"{dataset}: {samples} series to train and {test[0].shape[1]} to test, {T} steps of {features} numbers")
    print(f"{'neuron':10}{'% right at the last step':>28}{'in the sum of all steps':>28}")
    result = {}
    for neuron in NEURONS:
        runs = [run(train, test, neuron, seed, epochs, width) for seed in range(seeds)]
        result[neuron] = {name: [r[name] for r in runs] for name in runs[0]}
        cells = [f"{statistics.mean(v):.1f} +- {statistics.pstdev(v):.1f}" for v in result[neuron].values()]
        print(f"{neuron:10}{cells[0]:>28}{cells[1]:>28}", flush=True)
    if json is not None:
        about = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "steps": T, "test": test[0].shape[1]}
        Path(json).write_text(dumps({**about, "accuracy": result}, indent=1) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    for flag, default in (("--epochs", 20), ("--width", 128), ("--seeds", 3)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--json", metavar="FILE", help="write the numbers of every seed")
    main(**vars(parser.parse_args()))
