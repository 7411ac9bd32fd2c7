"""What a network is built from, `ModelConfig`, and the check of types that all configurations share."""

import math
from dataclasses import KW_ONLY, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TypeVar, get_args, get_type_hints

from empf.kernels.neuron import ACTIVATIONS, SPIKE_GRADIENTS
from empf.terminal import shown

ARCHS = ("resnet18", "resnet19", "resnet34", "vgg_snn")
WEIGHTS = ("binary", "ternary", "full")
NEURONS = ("empf", "mem_bn", "lif")
SHORTCUTS, GRANULARITIES = ("spikes", "current"), ("channel", "layer")
WIDEST = 64.0
LARGEST = {"num_classes": 10**6, "in_channels": 1024, "image_size": 4096, "T": 4096}
Settings = TypeVar("Settings")  # ModelConfig or TrainConfig
LATER = ("shortcut", "granularity", "seca_bias", "spike_gradient")
NOT_FOR_LIF = ("parallel", "spike_bits", "spike_gradient", "activation", "threshold", "per_channel")


hints = cache(get_type_hints)


def field_types(cls, name: str) -> tuple[type, ...]:
    hint = hints(cls)[name]
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def check_types(config) -> None:
    """Raise a ValueError that names the first field of a dataclass with a value of another type, or not finite.

    A whole number is fine where a fraction is; a bool is no number.
    """
    for f in fields(config):
        value, types = getattr(config, f.name), field_types(type(config), f.name)
        if type(value) not in types and not (type(value) is int and float in types):
            raise ValueError(f"{f.name} must be {' or '.join(t.__name__ for t in types)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{f.name} must be a finite number, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a network.

    Args:
        arch: resnet18 | resnet19 | resnet34 | vgg_snn.
        num_classes, in_channels, image_size: shape of the task, image_size being the side of a square or (height,
            width); the stem follows from the longer side (up to 48: 3x3; up to 96: 3x3 + max-pool; larger: 7x7
            stride 2 + max-pool).
        T: time steps.
        weights: binary | ternary | full.
        neuron: empf | mem_bn | lif (baseline).
        parallel: share of parallel neurons, 0..1; at 0.5 the second neuron of each block is parallel.
        seca: channel attention, 0 (none), 1 (SECA-I) or 2 (SECA-II).
        spike_bits: n-bit spikes, None (floating point) or 1..8.
        spike_gradient: that of n-bit spikes: identity | clipped, which is 0 above the largest code.
        activation: relu | sigmoid | tanh | softplus | gelu.
        threshold: of every neuron before training, within (0, 1); LIF has its own.
        per_channel: leak, threshold, alpha and beta are learned for each channel, not for each layer.
        width: multiplier of all channel counts, up to 64.
        shortcut: what the 1x1 convolution of a ResNet's shortcut reads: spikes (they are additions), or the input
            current of the block (multiplications, as in the full-precision layers).
        granularity: of the scale and threshold of ternary synapses: channel (one for each output channel) | layer.
        seca_bias: the convolution of the channel attention has a bias.

    Raises ValueError for a value of another type or outside its range.
    """

    arch: str = "resnet18"
    _: KW_ONLY
    num_classes: int = 10
    in_channels: int = 3
    image_size: int | tuple = 32
    T: int = 4
    weights: str = "binary"
    neuron: str = "empf"
    parallel: float = 0.0
    seca: int = 0
    spike_bits: int | None = None
    activation: str = "relu"
    threshold: float = 0.5
    per_channel: bool = False
    width: float = 1.0
    shortcut: str = "spikes"
    granularity: str = "channel"
    seca_bias: bool = False
    spike_gradient: str = "identity"

    def __post_init__(self):
        if isinstance(self.image_size, list | tuple):  # JSON has lists; a square has one name
            sides = tuple(self.image_size)
            if len(sides) != 2 or any(type(side) is not int for side in sides):
                raise ValueError(f"image_size must be the side of a square or (height, width), got {self.image_size}")
            object.__setattr__(self, "image_size", sides[0] if sides[0] == sides[1] else sides)
        check_types(self)
        choices = {
            "arch": ARCHS, "weights": WEIGHTS, "neuron": NEURONS, "seca": (0, 1, 2), "activation": tuple(ACTIVATIONS),
            "spike_bits": (None, *range(1, 9)), "spike_gradient": SPIKE_GRADIENTS, "shortcut": SHORTCUTS,
            "granularity": GRANULARITIES,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name, most in LARGEST.items():
            values = getattr(self, name) if isinstance(getattr(self, name), tuple) else (getattr(self, name),)
            if not 1 <= min(values) <= max(values) <= most:
                bound = "at least 1" if min(values) < 1 else f"at most {most:,}"
                raise ValueError(f"{name} must be {bound}, got {getattr(self, name)}")
        if self.arch == "vgg_snn" and min(self.size) < 16:
            raise ValueError(f"vgg_snn pools four times and needs images of at least 16x16, got {self.image_size}")
        if not 0 <= self.parallel <= 1:
            raise ValueError(f"parallel is a share and must lie in 0..1, got {self.parallel}")
        if not 0 < self.width <= WIDEST:
            raise ValueError(f"width must be positive and at most {WIDEST:g}, got {self.width}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {self.threshold}")
        if self.spike_gradient == "clipped" and self.spike_bits is None and self.neuron != "lif":
            raise ValueError("spike_gradient clipped is for n-bit spikes: give spike_bits, or leave it out")
        unfit = [n for n in NOT_FOR_LIF if getattr(self, n) != getattr(type(self), n)]
        if self.neuron == "lif" and unfit:
            raise ValueError(f"the LIF baseline has binary spikes and constants: it takes no {' or '.join(unfit)}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Build from a dict; an unknown key is a ValueError that names it."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model setting {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict:
        """The fields as plain values."""
        return asdict(self)

    def for_checksum(self) -> dict:
        """`to_dict` without what says nothing and older versions did not have: the checksums of their files stay."""
        return {n: v for n, v in self.to_dict().items() if n not in LATER or v != getattr(type(self), n)}


def settings_of(kind: type[Settings], values: dict, run: str | Path) -> Settings:
    """`kind.from_dict(values)`, values being a part of config.json; what does not fit is one sentence."""
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{Path(run) / 'config.json'}: {shown(error)}; use the version that wrote it") from error
