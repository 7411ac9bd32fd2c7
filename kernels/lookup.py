"""Convolution with binary weights on a CPU that stay one bit each: sums are looked up, not multiplied.

    x (M, C, H, W) fp32 or codes in uint8, channels_last
    y (M, O, OH, OW) fp32, channels_last: scale * conv(x, sign) + bias

Four channels of a pixel have 16 signed sums. They are computed once, as a vector of 16; the four weights of an output
channel are the number of one of them, so a permutation finds the sums of 16 output channels at once, where a dense
convolution has four multiplications for each. Sums of codes up to 31 are bytes, so that a permutation does four times
as much, and exact. See lookup.cpp; it needs a C++ compiler and AVX512F, for codes also BW, VBMI and VNNI.
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .pack import PackedWeight, signs

CONVOLUTION = struct.Struct("5P 11l")
POINTERS = range(5)  # of its words
LANES, WORD, GROUP = 16, 32, 4  # output channels of a vector; weights of a word, of a sum
TOP = 31  # the largest code


def available(*, codes: bool = False) -> bool:
    """Whether there is a compiler, and a processor with AVX512F; for codes also with BW, VBMI and VNNI."""
    library = native.library()
    return library is not None and library.looks_up() > codes


def shape_of_words(c: int, k: int, codes: bool) -> tuple[int, ...]:
    """Of the words of 16 output channels."""
    return (k, -(-k * -(-c // GROUP) // 8), 64) if codes else (k, k, -(-c // WORD), LANES)


def lookup_words(weight: PackedWeight, *, codes: bool = False) -> Tensor:
    """The bits of a convolution (O, C, k, k) as `lookup_conv2d` reads them: int32 (O / 16, k, k, C / 32, 16).

    codes: for x in uint8; then they are uint8 (O / 16, k, k * C / 32, 64). Raises ValueError for other weights.
    """
    if weight.kind != "binary" or len(weight.shape) != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be binary (O, C, k, k), got {weight.kind} {tuple(weight.shape)}")
    o, c, k, _ = weight.shape
    together = GROUP if codes else WORD
    negative = F.pad((signs(weight) < 0).view(torch.uint8), (0, 0, 0, 0, 0, -c % together, 0, -o % LANES))
    negative = negative.unflatten(1, (-1, GROUP)) << torch.arange(GROUP, dtype=torch.uint8).view(GROUP, 1, 1)
    sums = negative.sum(2, dtype=torch.uint8)  # which of the 16: (O, C / 4, k, k)
    if not codes:
        words = sums.unflatten(1, (-1, WORD // GROUP)).int() << torch.arange(0, WORD, GROUP).int().view(-1, 1, 1)
        words = words.sum(2, dtype=torch.int32)  # (O, C / 32, k, k)
        return words.unflatten(0, (-1, LANES)).permute(0, 3, 4, 2, 1).contiguous()
    under_a_row = sums.permute(0, 2, 3, 1).flatten(2)  # (O, k, k * C / 4), in the order of their places
    of_block = shape_of_words(c, k, codes)
    under_a_row = F.pad(under_a_row, (0, 8 * of_block[1] - under_a_row.shape[2]))
    low, high = under_a_row.view(-1, LANES, k, of_block[1], 2, 4).unbind(4)
    return (low | high << 4).permute(0, 2, 3, 1, 4).reshape(-1, *of_block)


class Lookup(NamedTuple):
    """A convolution that is not computed yet: `lookup_conv2d` does, or a neuron together with its steps."""

    operands: tuple[Tensor, Tensor, Tensor, Tensor]  # x channels_last, words, scale, bias
    sizes: tuple[int, ...]  # M, H, W, C, OH, OW, O, k, stride, padding, whether x are codes

    @property
    def threads(self) -> int:
        m, _, _, c, oh, ow, o, k = self.sizes[:8]
        return native.threads(m * oh * ow * o * c * k * k // (256 if self.sizes[-1] else 64))  # weights of a lookup

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
    o, k, codes = scale.numel(), words.shape[1] if words.dim() > 1 else 0, x.dtype == torch.uint8
    fits = x.dim() == 4 and words.shape == (-(-o // LANES), *shape_of_words(x.shape[1], k, codes))
    typed = x.dtype in (torch.float32, torch.uint8) and scale.dtype == bias.dtype == torch.float32
    if not (fits and typed and bias.shape == scale.shape and x.is_cpu):
        raise ValueError(
            "x must be fp32 (M, C, H, W) on the CPU, or codes in uint8 and words for them, scale and bias fp32 "
            "(O,), and words those of C to O channels, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}, {tuple(scale.shape)}, {tuple(bias.shape)} and "
            f"{tuple(words.shape)}"
        )
    if words.dtype != (torch.uint8 if codes else torch.int32) or not words.is_contiguous() or not words.is_cpu:
        raise ValueError(f"words must be those of lookup_words for x of {x.dtype}, got {words.dtype}")
    if not isinstance(stride, int) or not isinstance(padding, int) or stride < 1 or padding < 0:
        raise ValueError(f"stride must be an int from 1 and padding an int from 0, got {stride!r} and {padding!r}")
    m, c, h, w = x.shape
    if min(h, w) + 2 * padding < k:
        raise ValueError(f"a kernel of {(k, k)} does not fit into an image of {(h, w)} with padding {padding}")
    oh, ow = ((n + 2 * padding - k) // stride + 1 for n in (h, w))
    operands = x.contiguous(memory_format=torch.channels_last), words, scale.contiguous(), bias.contiguous()
    return Lookup(operands, (m, h, w, c, oh, ow, o, k, stride, padding, int(codes)))


def lookup_conv2d(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0
) -> Tensor:  # fmt: skip
    """scale * conv2d(x, sign) + bias, (M, O, OH, OW) channels_last, for words of `lookup_words`.

    x (M, C, H, W), scale and bias (O,): fp32 on the CPU; x may be uint8 codes of at most 31, for words of them. The
    result does not depend on the number of threads. Raises ValueError for other shapes, types, devices or codes, and
    RuntimeError where `available` says no.
    """
    product, codes = lookup_product(x, words, scale, bias, stride=stride, padding=padding), x.dtype == torch.uint8
    if not available(codes=codes):
        raise RuntimeError("lookup_conv2d needs a C++ compiler and AVX512, see available(): take binary_conv2d")
    if codes and x.numel() and x.max() > TOP:
        raise ValueError(f"codes must be at most {TOP}, got {x.max()}")
    return computed(product)


def computed(product: Lookup) -> Tensor:
    """The output."""
    y = product.empty(product.sizes[:1])
    native.call(native.library().lookup, [product.layer(y)], product.threads, product)
    return y
