"""A spiking transformer block with 1-bit synapses, trained online on the digits, and what it costs.

    python examples/transformer.py

Each row of an 8x8 digit is a token. Queries, keys and values are spikes, so attention needs no softmax:

    a = neuron(scale * q @ (k^T @ v))        x <- x + norm(project(a));  x <- x + norm(mlp(neuron(x)))

`spike_account` counts what synapses do. The two products of spikes with spikes have no weights, and are named
under "not_counted" with their multiply-accumulates instead of being left out in silence.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import empf

T, TOKENS = 4, 8


class Synapse(nn.Module):
    """1-bit linear layer, batch norm and neuron: spikes (k, N, tokens, C_in) -> spikes (k, N, tokens, C_out)."""

    def __init__(self, c_in: int, c_out: int, fire: bool = True):
        super().__init__()
        self.linear, self.norm = empf.BinaryLinear(c_in, c_out), Norm(c_out)
        self.neuron = empf.EMPFNeuron(T) if fire else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.norm(self.linear(x)))


class Norm(empf.StepBatchNorm):
    """Batch norm over the last dimension: (k, N, tokens, C), where channels otherwise come after the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class Block(nn.Module):
    """Spiking self-attention and an MLP, both added to the current that flows past: (k, N, tokens, C) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.fire1, self.fire2 = empf.EMPFNeuron(T), empf.EMPFNeuron(T)
        self.query, self.key, self.value = (Synapse(width, width) for _ in range(3))
        self.attend, self.project = empf.EMPFNeuron(T), Synapse(width, width, fire=False)
        self.mlp = nn.Sequential(Synapse(width, 2 * width), Synapse(2 * width, width, fire=False))

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.fire1(x)
        query, key, value = self.query(spikes), self.key(spikes), self.value(spikes)
        mixed = query @ (key.transpose(-1, -2) @ value) / TOKENS
        x = x + self.project(self.attend(mixed))
        return x + self.mlp(self.fire2(x))


class Transformer(nn.Module):
    """x (k, N, tokens, 8) -> logits (k, N, 10)."""

    def __init__(self, width: int):
        super().__init__()
        self.embed, self.norm = nn.Linear(8, width, bias=False), Norm(width)
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS, width))
        self.block = Block(width)
        self.neuron, self.head = empf.EMPFNeuron(T), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        current = self.norm(self.embed(x)) + self.place
        return self.head(self.neuron(self.block(current)).mean(2))


def main(iterations: int = 400, width: int = 64) -> tuple[float, dict]:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels).float().view(-1, TOKENS, 8) / 16, torch.tensor(labels)
    test = torch.arange(len(y)) % 5 == 0
    x_test, y_test, x, y = x[test].expand(T, -1, -1, -1), y[test], x[~test], y[~test]

    net = Transformer(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=iterations)
    for i in range(iterations):
        rows = torch.randperm(len(y))[:64]
        batch = x[rows].expand(T, -1, -1, -1)  # time first: the same image in each step
        empf.online_backward(net, batch, y[rows], F.cross_entropy, steps=empf.draw_steps(T, 1, 0, i))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    empf.reset(net.eval())
    with torch.no_grad():
        accuracy = 100 * (net(x_test).sum(0).argmax(-1) == y_test).float().mean().item()
    cost = empf.spike_account(net, [(x_test, y_test)])  # what empf.account says, and what depends on the data
    print(f"{accuracy:.1f} % of {len(y_test)} test images, T = {T}")
    for name, value in cost.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            print(f"{name:20}{part:30}{number:,.6g}")
    return accuracy, cost


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    main(**vars(parser.parse_args()))
