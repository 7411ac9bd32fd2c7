"""Packed weights with the norm behind them folded in, ready to be computed with.

    x (M, ...)   floats, codes with their step (at most `top`), or bf16 with step 1
    y (M, ...)   scale * step * conv(x, sign) + bias

On a CPU binary weights stay bits where sums can be looked up (kernels/lookup.py); others are unpacked once.
Spikes in bf16 meet the signs, which are exact in bf16: the sums are accumulated
in fp32 and rounded to bf16 once; scale and bias are left to the neuron, which adds up in fp32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.deploy import cpu_conv
from empf.deploy.cpu_conv import CodeConv, FloatConv, LookupConv
from empf.deploy.lazy import Product, plain
from empf.kernels import backend, lookup, native
from empf.kernels.conv import binary_conv2d
from empf.kernels.matmul import binary_matmul
from empf.kernels.pack import PackedWeight, signs
from empf.kernels.steps import empty_like_steps

SMALL = 1 << 17  # numbers of an output
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}


class Summands(NamedTuple):
    """A product as what it is the sum of: y, with `norm` gain * y + shift (see native.fire), and the residual."""

    y: Tensor | lookup.Lookup  # (k, N, C, H, W), channels_last; or what the neuron computes, without `norm`
    norm: list[Tensor] | None
    residual: Tensor | None

    def added(self) -> dict:
        """Keywords of native.fire."""
        norm = {} if self.norm is None else {"current": self.norm}
        return norm if self.residual is None else norm | {"more": ((self.residual, None, None),)}


class Filter:
    """A packed synapse with the norm behind it folded in, ready to be computed with: x (M, ...) -> y (M, ...)."""

    def __init__(self, synapse: nn.Module, norm: nn.Module | None):
        self.synapse, self.norm_version = synapse, None if norm is None else norm.version
        scale, bias = synapse.scale, synapse.bias
        if norm is not None:
            gain, shift = norm.gain.double(), norm.shift.double()
            bias = (shift if bias is None else shift + gain * bias).float()
            scale = (gain * scale).float()
        self.bias = torch.zeros_like(scale) if bias is None else bias
        self.scale = scale
        self.weight = PackedWeight(synapse.bits, scale, synapse.shape, synapse.kind)
        self._dense: dict[torch.dtype, Tensor] = {}
        self._laid_out: dict[tuple, FloatConv | CodeConv | LookupConv] = {}
        self._tables: dict[int, list[Tensor]] = {}

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The dense weights for x of this type: with the scale for floats, the signs alone for codes."""
        weight = signs(self.weight).float()
        if dtype != torch.uint8:
            weight = (weight * self.scale.view(-1, *[1] * (weight.dim() - 1))).to(dtype)
        return weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`unpacked`, kept for the next call."""
        if dtype not in self._dense:
            self._dense[dtype] = self.unpacked(dtype)
        return self._dense[dtype]

    def laid_out(self, x: Tensor, step: float | None, top: float) -> FloatConv | CodeConv | LookupConv:
        """The convolution of x (N, C, H, W) on the CPU, with its weights; kept for the next call."""
        looks_up = self.looks_up(x, top)
        key = x.dtype, step, looks_up
        if key not in self._laid_out:
            place = self.synapse.place
            if looks_up:
                made = LookupConv(self.weight, **place, step=step)
            elif step is None:
                made = FloatConv(self.unpacked(x.dtype), **place, x=x)
            elif x.dtype == torch.bfloat16:  # the signs are exact there, the scale is the norm's
                made = FloatConv(signs(self.weight).bfloat16(), **place, x=x)
            else:
                made = CodeConv(signs(self.weight), self.scale, **place, x=x, step=step)
            self._laid_out[key] = made
        return self._laid_out[key]

    def table(self, steps: int) -> list[Tensor]:
        """Scale and bias of these steps, as native.fire takes gain and shift; kept for the next call."""
        if steps not in self._tables:
            rows = [p.expand(steps, -1) for p in (self.scale, self.bias)]
            self._tables[steps] = native.table(rows, steps)
        return self._tables[steps]

    def summands(self, product: Product) -> "Summands | None":
        """What the product is the sum of, computed; None where it must be added up by torch."""
        x, bf16, shape, residual = product.x, product.in_bf16, (*product.lead, *product.rest), product.residual
        if not bf16 and not self.lays_out(x, product.top):
            return None
        product.check()
        residual = plain(residual)
        if residual is not None and (residual.shape != shape or residual.dtype != torch.float32):
            return None
        if residual is not None and not residual[0].is_contiguous(memory_format=torch.channels_last):
            if not bf16:
                return None
            residual = residual.movedim(2, -1).contiguous().movedim(-1, 2)
        kernel = self.laid_out(x, product.step, product.top)
        if isinstance(kernel, LookupConv):
            return Summands(kernel.product(x, self.bias), None, residual)
        y = kernel(x, None if bf16 else self.bias).view(shape)
        return Summands(y, self.table(len(y)) if bf16 else None, residual)

    def added_up(self, product: Product) -> Tensor:
        """The value of a product of spikes in bf16 that a neuron has taken, to the bits."""
        summands = self.summands(product)
        value = empty_like_steps(summands.y, torch.float32)
        return native.fire(summands.y, None, (None,) * 4, potential=False, out=value, **summands.added())[0]

    def lays_out(self, x: Tensor, top: float) -> bool:
        """Whether x is convolved with weights that are laid out."""
        known = self.synapse.plane and x.is_cpu and x.dtype in (torch.float32, torch.uint8)
        return known and (self.looks_up(x, top) or cpu_conv.available())

    def looks_up(self, x: Tensor, top: float) -> bool:
        """Whether sums of x, codes of at most `top` or floats, are looked up: where the table of a pixel serves several
        outputs, or the output is so small that what a call of oneDNN takes besides is more."""
        codes = x.dtype == torch.uint8
        known = top <= lookup.TOP if codes else x.dtype == torch.float32
        if not known or self.synapse.kind != "binary":
            return False
        (o, _, k, _), stride = self.synapse.shape, self.synapse.place["stride"]
        m, _, h, w = x.shape
        uses, size = max(k / stride, 1) ** 2 * -(-o // lookup.LANES), m * h * w // stride**2 * o
        return (uses > 4 or size <= SMALL) and native.ready() and lookup.available(codes=codes)

    def __call__(self, x: Tensor, step: float | None, top: float = math.inf) -> Tensor:
        synapse = self.synapse
        if (synapse.plane or not synapse.dims) and backend(x.device) != "torch":
            run = binary_conv2d if synapse.dims else binary_matmul
            return run(x, self.weight, bias=self.bias, step=step, **synapse.place)
        if self.lays_out(x, top):
            return self.laid_out(x, step, top)(x, self.bias)
        weight = self.dense(x.dtype)
        if step is None:
            return self.product(x, weight, self.bias.to(x.dtype))
        sums = self.product(x.float(), weight)  # integers below 2^24: exact in fp32
        like = (-1, *[1] * synapse.dims)
        return torch.addcmul(self.bias.view(like), sums, (self.scale * step).view(like))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        s = self.synapse
        if not s.dims:
            return F.linear(x, weight, bias)
        return CONVOLUTIONS[s.dims](x, weight, bias, s.stride, s.padding, s.dilation, s.groups)
