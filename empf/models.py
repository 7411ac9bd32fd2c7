"""Pre-activation spiking ResNet-18, -19, -34 and the VGG-SNN for events.

stem: convolution + BN (full precision), once per batch for a static image
block: I1 = BN(conv(neuron(x)));  I2 = BN(conv(neuron(I1)));  x <- I2 + shortcut
shortcut: x, or where the shape changes BN(conv1x1(neuron(x))), so that low-bit synapses only ever see spikes; with
    `shortcut="current"` BN(conv1x1(x))
head: global average pooling of the current, linear layer (full precision), logits of every step; of ResNet-19 before
    it a neuron, pooling of its spikes, a hidden low-bit layer and its neuron

image (N, C, H, W) or events (T, N, C, H, W)  ->  logits (T, N, classes)      arXiv 2410.07547, sec. 5
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from empf.attention import SECA
from empf.checks import check_input, frames, given
from empf.layer import Current, StepBatchNorm, hooked, over_steps, plus, read_current
from empf.model_config import ModelConfig
from empf.neuron import EMPFNeuron, LIFNeuron, StatefulNeuron, spikes_of, spiking_layer
from empf.synapse import BinaryConv2d, BinaryLinear, FullConv2d

RESNETS = {  # blocks per stage, widths of the stages, hidden layer of the head
    "resnet18": ([2, 2, 2, 2], [64, 128, 256, 512], None),
    "resnet19": ([3, 3, 2], [128, 256, 512], 256),
    "resnet34": ([3, 4, 6, 3], [64, 128, 256, 512], None),
}
VGG = [64, 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P"]
Settings = ParamSpec("Settings")  # the fields of `ModelConfig`, for checkers of types


class Builder:
    """Makes the parts of one network from its configuration and deals out the parallel neurons."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.neurons = 0

    def channels(self, base: int) -> int:
        return max(1, round(base * self.config.width))

    def neuron(self, channels: int) -> nn.Module:
        c, i = self.config, self.neurons
        self.neurons += 1
        if c.neuron == "lif":
            return LIFNeuron(c.T)
        parallel = int((i + 1) * c.parallel) > int(i * c.parallel)  # evenly spread; at 0.5 every second one
        return EMPFNeuron(
            c.T, channels, mem_bn=c.neuron == "mem_bn" and not parallel, parallel=parallel,
            spike_bits=c.spike_bits, spike_gradient=c.spike_gradient, activation=c.activation, threshold=c.threshold,
            per_channel=c.per_channel,
        )  # fmt: skip

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        return self.synapse(FullConv2d, BinaryConv2d)(c_in, c_out, kernel, stride, kernel // 2, bias=False)

    def linear(self, c_in: int, c_out: int) -> nn.Module:
        return self.synapse(nn.Linear, BinaryLinear)(c_in, c_out, bias=False)

    def synapse(self, full: type[nn.Module], low_bit: type[nn.Module]) -> Callable[..., nn.Module]:
        kind = self.config.weights
        granularity = self.config.granularity if kind == "ternary" else "channel"
        return full if kind == "full" else partial(low_bit, kind=kind, granularity=granularity)


class SpikingConv(nn.Module):
    """Neuron, convolution, BN and, if configured, channel attention: current (k, N, C, H, W) -> current.

    `pool`: the spikes are average-pooled 2x2 on their way to the convolution. A tensor gives a tensor, a `Current` a
    `Current`.
    """

    def __init__(self, make: Builder, c_in: int, c_out: int, stride: int = 1, pool: bool = False):
        super().__init__()
        self.neuron = make.neuron(c_in)
        self.pool = nn.AvgPool2d(2) if pool else None
        self.conv = make.conv(c_in, c_out, 3, stride)
        self.bn = StepBatchNorm(c_out)
        self.seca = SECA(bias=make.config.seca_bias) if make.config.seca else None
        # SECA-II: the current before and after the synapse, where both have the same shape
        self.skip = make.config.seca == 2 and c_in == c_out and stride == 1 and not pool

    def forward(self, x: Tensor | Current, rest: Tensor | Current | None = None, shortcut: nn.ModuleDict | None = None):
        """The current that the spikes of x become, plus `rest`; and that of `shortcut`, which reads the same spikes."""
        also = () if shortcut is None else (shortcut["conv"],)
        y, *others = spiking_layer(self.neuron, x, self.conv, *also, pool=self.pool)
        if self.seca is None:
            current = normalised(self.bn, y, rest)
        else:
            current = self.seca(normalised(self.bn, y, x if self.skip else None).value, value_of(rest))
        if shortcut is None:
            return like(x, current)
        return like(x, current), like(x, normalised(shortcut["bn"], others[0]))


def value_of(x: Tensor | Current | None) -> Tensor | None:
    return None if x is None else Current.of(x).value


def like(x: Tensor | Current, current: Tensor | Current) -> Tensor | Current:
    """A tensor where x is one, else a `Current`."""
    return Current.of(current) if isinstance(x, Current) else value_of(current)


def normalised(norm: nn.Module, y: Tensor, rest: Tensor | Current | None = None, **options) -> Current:
    """BN(y) + rest, not added up by a norm of this library, unless somebody watches it."""
    own = isinstance(norm, StepBatchNorm) and type(norm).forward is not StepBatchNorm.forward
    if hasattr(norm, "current") and not own and not hooked(norm):
        return norm.current(y, rest, **options)
    return Current(plus(norm(y), rest))


def passed(module: nn.Module, current: Current, *args) -> Current:
    """A layer or block called with a current; with tensors, where somebody watches it."""
    if not hooked(module):
        return module(current, *args)
    return Current.of(module(current.value, *map(value_of, args)))


class Block(nn.Module):
    """Pre-activation residual block of two spiking convolutions. A tensor gives a tensor, a `Current` a `Current`."""

    def __init__(self, make: Builder, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = SpikingConv(make, c_in, c_out, stride)
        self.conv2 = SpikingConv(make, c_out, c_out)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.ModuleDict({"conv": make.conv(c_in, c_out, 1, stride), "bn": StepBatchNorm(c_out)})
        self.reads_spikes = make.config.shortcut == "spikes"

    def forward(self, x: Tensor | Current) -> Tensor | Current:
        current = rest = Current.of(x)
        if self.shortcut is not None and self.reads_spikes:
            current, rest = self.conv1(current.value if hooked(self.conv1) else current, None, self.shortcut)
        else:
            current = passed(self.conv1, current)
            if self.shortcut is not None:
                rest = normalised(self.shortcut["bn"], read_current(self.shortcut["conv"], rest))
        return like(x, passed(self.conv2, Current.of(current), rest))


class Stem(nn.Module):
    """Full-precision convolution, BN and, for larger images, max-pooling: (k, N, C, H, W) -> (k, N, C', H', W')."""

    def __init__(self, in_channels: int, channels: int, side: int):
        super().__init__()
        size, stride = (7, 2) if side > 96 else (3, 1)
        self.conv = nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)
        self.bn = StepBatchNorm(channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if side > 48 else None

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        return self.current(x, repeat).value

    def current(self, x: Tensor, repeat: int = 1) -> Current:
        """What `forward` returns the value of."""
        y = over_steps(self.conv, x)
        if self.pool is not None:
            return Current(over_steps(self.pool, self.bn(y, repeat)))
        again = None
        if not hooked(self.conv) and not torch.is_autocast_enabled(x.device.type):  # in backward it would not be on
            conv = partial(F.conv2d, weight=self.conv.weight, stride=self.conv.stride, padding=self.conv.padding)
            again = partial(over_steps, conv, x)
        return normalised(self.bn, y, repeat=repeat, again=again)


class SpikingNetwork(nn.Module, ABC):
    """Base of the networks: time, input checks and the two orders of computation.

    Each call goes layer by layer; calls with steps=1 go step by step and give the same numbers.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.input_size = config.size  # (height, width) that it takes now: a ResNet trains on smaller images too
        self.reset()

    __call__: Callable[..., Tensor]
    from_pretrained: ClassVar[Callable[..., "SpikingNetwork"]]  # lent by empf/deploy/hub.py, as the next two
    save_pretrained: ClassVar[Callable[..., None]]
    push_to_hub: ClassVar[Callable[..., str]]
    holds_state = True  # for `empf.reset`
    runs_steps = True  # `online_backward` may name steps and past

    def reset(self) -> None:
        """Back to time 0; `empf.reset(model)` also resets its neurons."""
        self.t, self.unfinished = 0, False

    def __getstate__(self) -> dict:  # as its neurons
        return {**super().__getstate__(), "t": 0}

    def encode(self, x: Tensor, repeat: int) -> Current:
        """Input current of the first neurons (k, N, C, H, W); k = 1 for a static image."""
        return Current(self.stem(x, repeat)) if hooked(self.stem) else self.stem.current(x, repeat)

    @abstractmethod
    def body(self, current: Current) -> Tensor:
        """Logits (k, N, classes) of k steps with this input current."""

    def forward(self, x: Tensor, steps: int | None = None, past: int = 0) -> Tensor:
        """Logits (k, N, classes): `model(x)`: all T steps; `model(x, steps=k)`: the next k, from the present state.

        `model(x, steps=k, past=p)`: p steps without gradient, which only carry the state, then k steps.
        x: images (N, C, H, W), the same in every step, or events (T, N, ...) (or just the frames of the steps to run).
        """
        if self.unfinished and any(m.t != self.t for m in self.modules() if isinstance(m, StatefulNeuron)):
            raise RuntimeError("the last call was interrupted, its neurons differ in time: call empf.reset(model)")
        if type(steps) not in (int, type(None)) or type(past) is not int:
            raise TypeError(f"steps and past must be whole numbers, got {steps!r} and {past!r}")
        steps = self.config.T - self.t - past if steps is None else steps
        check_input(x, self.stem.conv.weight)
        x = frames(x, (self.config.in_channels, *self.input_size), self.config.T, self.t, past, steps)
        self.unfinished = True  # until all neurons are through
        static = len(x) == 1
        if static:
            current = self.encode(x, repeat=past + steps)
        if past:
            image = current.value.detach() if static else None
            with torch.no_grad():
                before = self.encode(x[:past], repeat=1).value if image is None else image
                self.body(Current(before.expand(past, *before.shape[1:])))
        if not static:
            current = self.encode(x[past:], repeat=1)
        elif steps > 1:
            current = Current(current.value.expand(steps, *current.shape[1:]))
        logits = self.body(current)
        self.t, self.unfinished = self.t + past + steps, False
        return logits


class ResNet(SpikingNetwork):
    """Spiking pre-activation ResNet; see the module's docstring and `ModelConfig`."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        depths, widths, hidden = RESNETS[config.arch]
        make = Builder(config)
        c_in = make.channels(64 if hidden is None else widths[0])
        self.stem = Stem(config.in_channels, c_in, max(config.size))
        blocks = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for i in range(depth):
                blocks.append(Block(make, c_in, make.channels(width), stride=2 if stage > 0 and i == 0 else 1))
                c_in = make.channels(width)
        self.blocks = nn.Sequential(*blocks)
        self.hidden = None
        if hidden is not None:
            before, linear = make.neuron(c_in), make.linear(c_in, make.channels(hidden))
            c_in = make.channels(hidden)
            self.hidden = nn.ModuleDict({"before": before, "linear": linear, "neuron": make.neuron(c_in)})
        self.head = nn.Linear(c_in, config.num_classes)

    def body(self, current: Current) -> Tensor:
        for block in self.blocks:
            current = passed(block, current)
        if self.hidden is None:
            return self.head(current.value.mean((-2, -1)))
        spikes = spikes_of(self.hidden["before"], current).mean((-2, -1))  # k N C
        return self.head(self.hidden["neuron"](self.hidden["linear"](spikes)))


class VGGSNN(SpikingNetwork):
    """VGG-SNN for event frames: spiking convolutions with average pooling of the spikes; see `ModelConfig`."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        make = Builder(config)
        c_in, (height, width) = make.channels(VGG[0]), config.size
        self.stem = Stem(config.in_channels, c_in, side=1)  # 3x3, never pooled: the pooling follows the neurons
        layers, pool = [], False
        for item in VGG[1:]:
            if item == "P":
                pool, height, width = True, height // 2, width // 2
                continue
            layers.append(SpikingConv(make, c_in, make.channels(item), pool=pool))
            c_in, pool = make.channels(item), False
        self.layers = nn.Sequential(*layers)
        self.neuron = make.neuron(c_in)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(c_in * height * width, config.num_classes)

    def body(self, current: Current) -> Tensor:
        for layer in self.layers:
            current = passed(layer, current)
        spikes = over_steps(self.pool, spikes_of(self.neuron, current))
        return self.head(rearrange(spikes, "t n c h w -> t n (c h w)"))


def build(config: ModelConfig) -> SpikingNetwork:
    """The network of a configuration, freshly initialised.

    >>> net = empf.build(empf.ModelConfig(arch="vgg_snn", in_channels=2, width=0.125))
    """
    return (VGGSNN if given(config, ModelConfig, "build takes a ModelConfig").arch == "vgg_snn" else ResNet)(config)


def _builder(
    kind: Callable[Concatenate[str, Settings], ModelConfig], arch: str, **defaults
) -> Callable[Settings, SpikingNetwork]:  # fmt: skip
    def make(**config):
        return build(kind.from_dict(defaults | dict(arch=arch, **config)))

    make.__name__ = arch
    make.__doc__ = f"""Build {arch}; keywords: the fields of `ModelConfig`. Logits (T, N, classes).

    >>> net = empf.{arch}(num_classes=100, T=4, weights="binary", width=0.125)
    """
    return make


resnet18, resnet19 = _builder(ModelConfig, "resnet18"), _builder(ModelConfig, "resnet19")
resnet34 = _builder(ModelConfig, "resnet34")
vgg_snn = _builder(ModelConfig, "vgg_snn", in_channels=2, image_size=48, T=10)
