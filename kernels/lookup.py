"""Convolution with binary weights on a CPU that stay one bit each: sums are looked up, not multiplied.

    x (M, C, H, W) fp32, channels_last     y (M, O, OH, OW) fp32, channels_last: scale * conv(x, sign) + bias

Four channels of a pixel have 16 signed sums. They are computed once, as a vector of 16; the four weights of an output
channel are the number of one of them, so a permutation finds the sums of 16 output channels at once, where a dense
convolution has four multiplications for each. See lookup.cpp; it needs a C++ compiler and AVX512F.
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .pack import PackedWeight, signs

CONVOLUTION = struct.Struct("5P 10l")
POINTERS = range(5)  # of its words
LANES, WORD = 16, 32  # output channels of a vector, weights of a word


def available() -> bool:
    """Whether there is a compiler, and a processor with AVX512F."""
    library = native.library()
    return library is not None and library.looks_up() == 1


def lookup_words(weight: PackedWeight) -> Tensor:
    """The bits of a convolution (O, C, k, k) as `lookup_conv2d` reads them: int32 (O / 16, k, k, C / 32, 16)."""
    o, c, kh, kw = weight.shape
    negative = torch.zeros(-(-o // LANES) * LANES, -(-c // WORD) * WORD, kh, kw, dtype=torch.int32)
    negative[:o, :c] = signs(weight) < 0
    bits = negative.view(-1, LANES, negative.shape[1] // WORD, WORD, kh, kw)
    words = (bits << torch.arange(WORD, dtype=torch.int32).view(WORD, 1, 1)).sum(3, dtype=torch.int32)
    return words.permute(0, 3, 4, 2, 1).contiguous()


class Lookup(NamedTuple):
    """A convolution that is not computed yet: `lookup_conv2d` does, or a neuron together with its steps."""

    operands: tuple[Tensor, Tensor, Tensor, Tensor]  # x channels_last, words, scale, bias
    sizes: tuple[int, ...]  # M, H, W, C, OH, OW, O, k, stride, padding

    @property
    def threads(self) -> int:
        m, _, _, c, oh, ow, o, k = self.sizes[:8]
        return native.threads(m * oh * ow * o * c * k * k // 64)  # 64 products with a weight are one lookup

    def empty(self, lead: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """An output (*lead, O, OH, OW), channels_last; `lead` makes M in all."""
        oh, ow, o = self.sizes[4:7]
        image = oh * ow * o
        outer = [image * math.prod(lead[i + 1 :]) for i in range(len(lead))]
        return torch.empty_strided((*lead, o, oh, ow), (*outer, 1, ow * o, o), dtype=dtype)

    def layer(self, y: Tensor | None) -> tuple[bytes, Sequence[int]]:
        """The structure of lookup.cpp, for `native.call`."""
        return CONVOLUTION.pack(*map(native.at, (*self.operands, y)), *self.sizes), POINTERS


def lookup_product(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0
) -> Lookup:  # fmt: skip
    """What `lookup_conv2d` computes, to be computed later."""
    o, k = len(scale), words.shape[1]
    fits = x.dim() == 4 and words.shape == (-(-o // LANES), k, k, -(-x.shape[1] // WORD), LANES)
    if not (fits and bias.shape == scale.shape and x.dtype == scale.dtype == bias.dtype == torch.float32 and x.is_cpu):
        raise ValueError(
            "x must be fp32 (M, C, H, W) on the CPU, scale and bias fp32 (O,), and words those of C to O channels, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}, {tuple(scale.shape)}, {tuple(bias.shape)} and "
            f"{tuple(words.shape)}"
        )
    m, c, h, w = x.shape
    oh, ow = ((n + 2 * padding - k) // stride + 1 for n in (h, w))
    operands = x.contiguous(memory_format=torch.channels_last), words, scale.contiguous(), bias.contiguous()
    return Lookup(operands, (m, h, w, c, oh, ow, o, k, stride, padding))


def lookup_conv2d(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0
) -> Tensor:  # fmt: skip
    """scale * conv2d(x, sign) + bias, (M, O, OH, OW) channels_last, for words of `lookup_words`.

    x (M, C, H, W), scale and bias (O,): fp32 on the CPU. The result does not depend on the number of threads. Raises
    ValueError for other shapes, types or devices.
    """
    return computed(lookup_product(x, words, scale, bias, stride=stride, padding=padding))


def computed(product: Lookup) -> Tensor:
    """The output."""
    y = product.empty(product.sizes[:1])
    native.call(native.library().lookup, [product.layer(y)], product.threads, product)
    return y
