"""Networks as people write them: this library's neurons, and torch's own layers around them. Time comes first."""

import torch
from torch import Tensor, nn

import empf


def per_step(layer: nn.Module, x: Tensor) -> Tensor:
    """(T, N, ...) through a layer that knows (N, ...) only, all steps at once."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Twice(nn.Module):
    """One synapse used two times, by two neurons."""

    def __init__(self, T: int = 3, kind: str = "binary"):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.shared = empf.BinaryLinear(8, 8, kind=kind)
        self.neurons = nn.ModuleList(empf.EMPFNeuron(T) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # T N 6 -> T N 4
        x = self.shared(self.neurons[0](2 * self.first(x)))
        return self.last(self.neurons[2](self.shared(self.neurons[1](4 * x)) + x))


class PlainNorms(nn.Module):
    """Convolutions with torch's batch norm, pooling and concatenation, step by step."""

    def __init__(self, T: int = 3):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.narrow, self.wide = empf.BinaryConv2d(4, 4, 3, 1, 1), empf.BinaryConv2d(4, 4, 5, 1, 2, kind="ternary")
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.neurons = nn.ModuleList([empf.EMPFNeuron(T), empf.EMPFNeuron(T, spike_bits=2), empf.LIFNeuron(T)])
        self.pool, self.last = nn.AvgPool2d(2), nn.Linear(8 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:  # T N 1 6 6 -> T N 4
        return torch.stack([self.step(image) for image in x])

    def step(self, x: Tensor) -> Tensor:
        fire = lambda neuron, current: neuron(current[None])[0]  # noqa: E731
        spikes = fire(self.neurons[0], 2 * self.norm(self.stem(x)))
        narrow = fire(self.neurons[1], self.norms[0](self.narrow(spikes)))
        wide = fire(
            self.neurons[2], self.norms[1](self.wide(self.pool(spikes).repeat_interleave(2, 2).repeat(1, 1, 1, 2)))
        )
        both = torch.cat([narrow, wide], 1)  # N 8 6 6
        return self.last(self.pool(both).flatten(1))


class Grouped(nn.Module):
    """Convolutions over a sequence: grouped, dilated, strided, with "same" and circular padding."""

    def __init__(self, T: int = 3):
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, padding="same")
        self.grouped = nn.Conv1d(6, 9, 3, groups=3, dilation=2, stride=2, padding=2, bias=False)
        self.circular = nn.Conv1d(9, 9, 3, groups=9, padding=1, padding_mode="circular")
        self.neurons = nn.ModuleList(empf.EMPFNeuron(T) for _ in range(3))
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:  # T N 2 9 -> T N 4
        x = per_step(self.grouped, self.neurons[0](2 * per_step(self.stem, x)))
        x = per_step(self.circular, self.neurons[1](2 * x))
        return self.last(self.neurons[2](2 * x).mean(-1))
