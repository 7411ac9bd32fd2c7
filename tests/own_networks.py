"""Networks as people write them: this library's neurons, and torch's own layers around them. Time comes first."""

from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
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
    """Convolutions over a sequence: grouped, dilated, strided, depth-wise, with "same" and circular padding."""

    def __init__(self, T: int = 3):
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, padding="same")
        place = dict(stride=2, padding=2, dilation=2, groups=3)
        self.grouped = empf.BinaryConv1d(6, 9, 3, bias=True, kind="ternary", **place)
        self.depthwise = empf.BinaryConv2d(9, 9, (3, 1), padding=(1, 0), groups=9)
        self.circular = nn.Conv1d(9, 9, 3, groups=9, padding=1, padding_mode="circular")
        self.neurons = nn.ModuleList(empf.EMPFNeuron(T) for _ in range(3))
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:  # T N 2 9 -> T N 4
        x = per_step(self.grouped, self.neurons[0](2 * per_step(self.stem, x)))  # T N 9 5
        spikes = self.neurons[1](4 * x)
        tall = per_step(self.depthwise, spikes.unsqueeze(-1)).squeeze(-1)
        return self.last(self.neurons[2](2 * (tall + per_step(self.circular, spikes))).mean(-1))


def example(name: str, T: int) -> ModuleType:
    """A file of examples/ as a module, with another number of steps."""
    spec = spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.T = T
    return module


# name -> (how a network of T steps is made, shape of an input without T and N, the synapses that are fed with spikes)
NETWORKS = {
    "own_network.py": (lambda T: example("own_network", T).Net(4), (1, 8, 8), ["conv"]),
    "sequence.py": (lambda T: example("sequence", T).SpikingMLP(T, 5, 6, "vanilla", 12), (5,), ["hidden"]),
    "transformer.py": (
        lambda T: example("transformer", T).Transformer(8), (8, 8),
        [f"block.{n}.linear" for n in ("query", "key", "value", "project", "mlp.0", "mlp.1")],
    ),
    "synapse used twice": (lambda T: Twice(T, "ternary"), (6,), ["shared"]),
    "plain norms": (PlainNorms, (1, 6, 6), ["narrow", "wide"]),
    "grouped": (Grouped, (2, 9), ["grouped", "depthwise", "circular"]),
}  # fmt: skip


def settled(name: str, samples: int = 6, T: int = 4) -> tuple[nn.Module, Tensor]:
    """(network in training mode whose running statistics fit its input, so that its neurons fire; input [T, N, ...])"""
    torch.manual_seed(0)
    make, shape, _ = NETWORKS[name]
    net, x = make(T), torch.rand(T, samples, *shape)
    with torch.no_grad():
        for _ in range(20):
            empf.reset(net)
            net(x)
    empf.reset(net)
    return net, x


def met(x: Tensor, weight: Tensor, *, stride=1, padding=0, dilation=1, groups=1) -> int:
    """Additions of a convolution over any number of dimensions, each pair of numbers looked at by itself."""
    dims = weight.dim() - 2
    as_tuple = lambda n: n if isinstance(n, tuple) else (n,) * dims  # noqa: E731
    stride, padding, dilation = map(as_tuple, (stride, padding, dilation))
    x, weight = F.pad(x, [p for p in reversed(padding) for _ in range(2)]) != 0, weight != 0
    c_out, c_in, *kernel = weight.shape
    taps = list(product(*map(range, kernel)))
    sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    count = 0
    for at in product(*(range((size - d * (k - 1) - 1) // s + 1) for size, k, s, d in sizes)):
        for tap in taps:
            place = tuple(s * a + d * k for a, k, s, d in zip(at, tap, stride, dilation, strict=True))
            for o, c in product(range(c_out), range(c_in)):
                if weight[(o, c, *tap)]:
                    count += int(x[(slice(None), o // (c_out // groups) * c_in + c, *place)].sum())
    return count


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What each synapse is given, call by call, (N, ...), in eval mode."""
    given, handles = {}, []
    for name, m in model.named_modules():
        if hasattr(m, "weight") and m.weight.dim() > 1:
            see = lambda m, i, o, name=name: given.setdefault(name, []).append(i[0])  # noqa: E731
            handles.append(m.register_forward_hook(see))
    empf.reset(model.eval())
    with torch.no_grad():
        model(x)
    empf.reset(model)
    for handle in handles:
        handle.remove()
    return given
