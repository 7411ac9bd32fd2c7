"""Convolutions on the CPU with weights that were laid out once, not in each call: by oneDNN, or as bits.

    x        (N, C, H, W)    fp32, bf16, or uint8 codes that stand for code * step; channels_last is the fast layout
    weight   (O, C, kh, kw)  of the type of x; int8 signs with `scale` (O,) for codes
    y        (N, O, OH, OW)  channels_last: conv(x, weight) + bias in the type of x; fp32 of codes, then it is
                             scale * step * conv(codes, weight) + bias

Sums of codes are exact int32, those of bf16 are rounded once. torch has no public function for either, so these are the
operators that its compiler emits for frozen networks; `available` says whether they are there and do what they are
meant to do.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from empf.kernels import lookup, native
from empf.kernels.pack import PackedWeight


def available() -> bool:
    """On x86 from AVX2 on, and not while torch traces a graph, which should hold ordinary convolutions."""
    return not torch.compiler.is_compiling() and _right()


@cache
def _right() -> bool:
    """Whether both give the sums of a small convolution: another version of torch may call for other arguments."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    codes = torch.arange(36, dtype=torch.uint8).view(1, 4, 3, 3)
    signs = (torch.arange(72).view(2, 4, 3, 3) % 3 - 1).to(torch.int8)
    x, weight, bias = codes.float(), signs.float(), torch.tensor([1.0, -2.0])
    try:
        floats = FloatConv(weight, 1, 1, x)(x, bias)
        integers = CodeConv(signs, torch.ones(2), 1, 1, codes, 1.0)(codes, bias)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    wanted = F.conv2d(x, weight, bias, 1, 1)
    return torch.equal(floats, wanted) and torch.equal(integers, wanted)


@cache
def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16, and a convolution and a neuron that use them are at hand."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    if not known or not available() or native.library() is None:
        return False
    x, weight = torch.arange(32.0).view(1, 2, 4, 4), torch.tensor([[1.0, -1.0], [1.0, 0.0]]).view(2, 2, 1, 1)
    found = FloatConv(weight.bfloat16(), 1, 0, x.bfloat16())(x.bfloat16(), None)
    return found.dtype == torch.bfloat16 and torch.equal(found.float(), F.conv2d(x, weight))


class FloatConv:
    """Convolution of fp32 or bf16 x; `x`: an input of the size to expect, others are only slower."""

    def __init__(self, weight: Tensor, stride: int, padding: int, x: Tensor):
        self.place = [padding] * 2, [stride] * 2, [1, 1], 1  # dilation, groups
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *self.place, list(x.shape))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise.default(x, self.weight, bias, *self.place, "none", [], "")


class LookupConv:
    """Convolution of fp32 x, or of uint8 codes of value code * step, with binary weights, which stay one bit each."""

    def __init__(self, weight: PackedWeight, stride: int, padding: int, step: float | None):
        self.place = {"stride": stride, "padding": padding}
        self.words = lookup.lookup_words(weight, codes=step is not None)
        self.scale = weight.scale if step is None else weight.scale * step

    def product(self, x: Tensor, bias: Tensor) -> lookup.Lookup:
        return lookup.lookup_product(x, self.words, self.scale, bias, **self.place)

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        return lookup.computed(self.product(x, bias))


class CodeConv:
    """Convolution of uint8 codes of value code * step with int8 signs."""

    def __init__(self, signs: Tensor, scale: Tensor, stride: int, padding: int, x: Tensor, step: float):
        self.place = [stride] * 2, [padding] * 2, [1, 1], 1
        self.step, self.scale, self.zeros = step, scale, torch.zeros(len(scale), dtype=torch.int32)
        self.weight = torch.ops.onednn.qconv_prepack(signs, scale, step, 0, *self.place, list(x.shape))

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            x, self.step, 0, self.weight, self.scale, self.zeros, bias, *self.place, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
