"""Synapses of 1 bit (binary) and 1.5 bit (ternary): convolution and linear layer with a latent full-precision weight.

    binary    Wb = a_c * sign(W)                 a_c = mean|W| over the fan-in of output channel c, sign(0) = +1
    ternary   Wt = a_c * sign(W) * [|W| > d_c]   d_c = 0.7 * mean|W|, a_c = mean of |W| over the kept entries

Backward: straight-through, zero where |W| > 1; a_c and d_c are constants for the gradient.    arXiv 2410.07547, sec. 4
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from empf.checks import check_conv, explained
from empf.kernels.convolution import conv2d, conv2d_backward
from empf.kernels.dispatch import transformed

KINDS, GRANULARITIES = ("binary", "ternary"), ("channel", "layer")


def check_kind(kind: str, granularity: str) -> None:
    if kind not in KINDS or granularity not in GRANULARITIES:
        raise ValueError(f"kind must be one of {KINDS}, granularity one of {GRANULARITIES}, got {kind}, {granularity}")


@torch.no_grad()
def quantize_weight(w: Tensor, kind: str = "binary", granularity: str = "channel") -> Tensor:
    """The effective weight of a latent weight (N, ...): Wb or Wt of the module's docstring, same shape and dtype.

    `granularity` "layer" takes the means over the whole tensor instead of over each output channel.
    Raises ValueError for an unknown kind or granularity.
    """
    check_kind(kind, granularity)
    over = tuple(range(granularity == "channel", w.dim()))  # one scale per output channel, or one
    magnitude = w.abs()
    if kind == "binary":
        return torch.copysign(magnitude.mean(over, keepdim=True), w + 0.0)  # -0.0 + 0.0 is +0.0
    kept = magnitude > 0.7 * magnitude.mean(over, keepdim=True)
    scale = (magnitude * kept).sum(over, keepdim=True) / kept.sum(over, keepdim=True).clamp(min=1)
    return w.sign() * kept * scale


class StraightThrough(torch.autograd.Function):
    """Stands the effective weight in for the latent one; the gradient passes where |W| <= 1."""

    @staticmethod
    def forward(ctx, w: Tensor, effective: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return effective.view_as(effective)

    @staticmethod
    def backward(ctx, d_effective: Tensor):
        return d_effective * (ctx.saved_tensors[0].abs() <= 1), None


_updates = 0  # of any optimizer, fused ones included, which write to weights behind the back of the version counter


def _count_update(*_) -> None:
    global _updates
    _updates += 1


register_optimizer_step_post_hook(_count_update)


class QuantizedWeight:
    """Mixin: `effective_weight()` of `self.weight`, formed once per weight update and kept for the steps of a batch.

    It is formed anew when an optimizer has made a step, the weight has been written to (torch's version counter) or
    moved, and after `reset()`, which starts every batch: so a write that nothing sees (through `.data`) is picked up.
    """

    __call__: Callable[..., Tensor]
    weight: Tensor
    kind: str
    granularity: str
    holds_state = True  # for `empf.reset`

    def __init__(self, *args, bias: bool = False, kind: str = "binary", granularity: str = "channel", **options):
        super().__init__(*args, bias=bias, **options)
        self.quantize_as(kind, granularity)

    def reset(self) -> None:
        """Form the effective weight anew when it is needed next."""
        self._formed: tuple | None = None

    def effective_weight(self) -> Tensor:
        """What is computed with: `quantize_weight(weight)`, whose gradient passes to the weight where |W| <= 1."""
        w = self.weight
        if torch.compiler.is_compiling() or transformed() or w.is_inference():  # without a counter that can be read
            effective = quantize_weight(w.detach(), self.kind, self.granularity)
        else:
            key = (_updates, w._version, w.data_ptr(), w.dtype)
            if self._formed is None or self._formed[0] != key:
                with torch.inference_mode(False):  # it may be used with gradient later
                    self._formed = (key, quantize_weight(w, self.kind, self.granularity))
            effective = self._formed[1]
        if transformed():  # in operations that every transform of torch knows; the sum rounds
            passing = w * (w.abs() <= 1)
            return passing + (effective - passing).detach()
        return StraightThrough.apply(w, effective) if torch.is_grad_enabled() and w.requires_grad else effective

    def quantize_as(self, kind: str, granularity: str) -> None:
        """Be binary or ternary from now on, with the same latent weight. ValueError for what is neither."""
        check_kind(kind, granularity)
        self.kind, self.granularity = kind, granularity
        self.reset()

    def __getstate__(self):  # copies and pickles form their own effective weight
        return {**self.__dict__, "_formed": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class FullConv2d(nn.Conv2d):
    """`nn.Conv2d` in full precision, with `effective_weight()` and without a bias unless it is asked for.

    Raises ValueError for another padding than zeros and their number, and for numbers of another shape.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, *args, bias: bool = False, **options):
        super().__init__(*args, bias=bias, **options)
        check_conv(self)

    def effective_weight(self) -> Tensor:
        return self.weight

    def place(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def learned(self) -> Tensor:
        """What the gradient is of, and `run` and its backward pass are given; here the effective weight."""
        return self.effective_weight()

    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv2d(x, w, bias, *self.place())

    def run_backward(self, d_y: Tensor, x: Tensor, w: Tensor, *needed: bool) -> tuple[Tensor | None, Tensor | None]:
        return conv2d_backward(d_y, x, w, *self.place(), *needed)

    @explained
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H', W')."""
        return self.run(x, self.effective_weight(), self.bias)

    @property
    def made_again(self) -> bool:
        """Can `SpikingLayerFn` and `ReadFn` run it?"""
        return type(self).forward is FullConv2d.forward and "forward" not in vars(self) and self.bias is None


class BinaryConv2d(QuantizedWeight, FullConv2d):
    """Convolution (N, C, H, W) -> (N, C_out, H', W') with binary or ternary weights.

    Arguments as `nn.Conv2d`, but for the bias, which is off by default and full precision; padding is with zeros.
    `kind` "binary" | "ternary", `granularity` of the scales "channel" | "layer". Raises ValueError for others.
    """


class BinaryConv1d(QuantizedWeight, nn.Conv1d):
    """Convolution (N, C, L) -> (N, C_out, L') with binary or ternary weights; arguments as `BinaryConv2d`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        check_conv(self)

    @explained
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, C_out, L')."""
        return F.conv1d(x, self.effective_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class BinaryLinear(QuantizedWeight, nn.Linear):
    """Linear layer (..., C) -> (..., C_out) with binary or ternary weights; a bias, off by default, is full precision.

    Arguments as `nn.Linear`, `kind` and `granularity` as `BinaryConv2d`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options):
        super().__init__(in_features, out_features, bias=bias, **options)

    @explained
    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C_out)."""
        return F.linear(x, self.effective_weight(), self.bias)
