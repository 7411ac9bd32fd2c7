"""Synapses of 1 bit (binary) and 1.5 bit (ternary): convolution and linear layer with a latent full-precision weight.

    binary    Wb = a_c * sign(W)                 a_c = mean|W| over the fan-in of output channel c, sign(0) = +1
    ternary   Wt = a_c * sign(W) * [|W| > d_c]   d_c = 0.7 * mean|W|, a_c = mean of |W| over the kept entries

Backward: straight-through, zero where |W| > 1; a_c and d_c are constants for the gradient.    arXiv 2410.07547, sec. 4
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("binary", "ternary")
GRANULARITIES = ("channel", "layer")


def check_kind(kind: str, granularity: str) -> None:
    if kind not in KINDS or granularity not in GRANULARITIES:
        raise ValueError(
            f"kind must be one of {KINDS} and granularity one of {GRANULARITIES}, got {kind}, {granularity}"
        )


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
        (w,) = ctx.saved_tensors
        return d_effective * (w.abs() <= 1), None


class QuantizedWeight:
    """Mixin: `effective_weight()` of `self.weight`, formed once per weight update and kept for the steps of a batch.

    It is formed anew when the weight has been written to (torch's version counter), moved, or after `reset()`, which
    starts every batch: so a write that the counter does not see (through `.data`) is picked up as well.
    """

    kind: str
    granularity: str

    def reset(self) -> None:
        self._formed: tuple | None = None

    def effective_weight(self) -> Tensor:
        w = self.weight
        if torch.compiler.is_compiling():  # a version counter cannot be traced; the compiled graph forms the weight
            effective = quantize_weight(w, self.kind, self.granularity)
        else:
            key = (w._version, w.data_ptr(), w.dtype)
            if self._formed is None or self._formed[0] != key:
                self._formed = (key, quantize_weight(w, self.kind, self.granularity))
            effective = self._formed[1]
        return StraightThrough.apply(w, effective) if torch.is_grad_enabled() and w.requires_grad else effective

    def _check_kind(self, kind: str, granularity: str) -> None:
        check_kind(kind, granularity)
        self.kind, self.granularity = kind, granularity
        self.reset()

    def __getstate__(self):  # copies and pickles form their own effective weight
        return {**self.__dict__, "_formed": None}


def conv2d(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """`F.conv2d` without a bias; on a CPU, a 1x1 convolution with a stride is given only the pixels that it looks at.

    Given all of them, oneDNN (torch 2.13) writes the weight gradient beyond the end of its memory, if fewer than 8
    channels lie in channels_last.
    """
    if x.device.type == "cpu" and weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0):
        x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, None, stride, padding)


def conv2d_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, stride, padding, for_x: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and weight of `conv2d`, each where it is asked for; where autocast ran it, in half precision."""
    seen = x
    if x.device.type == "cpu" and weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0):
        seen, one = x[..., :: stride[0], :: stride[1]], (1, 1)
    else:
        one = stride
    d_seen, d_weight, _ = torch.ops.aten.convolution_backward(
        d_y, seen.to(d_y.dtype), weight.to(d_y.dtype), None, one, padding, (1, 1), False, (0, 0), 1,
        (for_x, for_weight, False),
    )  # fmt: skip
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    if d_seen is None or seen.shape == x.shape:
        return d_seen, d_weight
    d_x = d_seen.new_zeros(x.shape)
    d_x[..., :: stride[0], :: stride[1]] = d_seen
    return d_x, d_weight


class FullConv2d(nn.Conv2d):
    """Convolution (N, C, H, W) -> (N, C_out, H', W') in full precision and without a bias; args as `nn.Conv2d`."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def effective_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.stride, self.padding)


class BinaryConv2d(QuantizedWeight, nn.Conv2d):
    """Convolution (N, C, H, W) -> (N, C_out, H', W') with binary or ternary weights and no bias.

    Args as `nn.Conv2d`; `kind` "binary" | "ternary", `granularity` of the scales "channel" | "layer".
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, *, kind="binary", granularity="channel"
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self._check_kind(kind, granularity)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.effective_weight(), self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class BinaryLinear(QuantizedWeight, nn.Linear):
    """Linear layer (..., C) -> (..., C_out) with binary or ternary weights; `bias` stays full precision."""

    def __init__(self, in_features, out_features, bias=False, *, kind="binary", granularity="channel"):
        super().__init__(in_features, out_features, bias)
        self._check_kind(kind, granularity)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"
