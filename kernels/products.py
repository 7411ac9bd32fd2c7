"""What the packed products (matmul.py, conv.py, conv_neuron.py) share: unpacking, the dot product, the split of K.

The unpacked weight is meant to be the left operand of `tl.dot`: there it stays in registers (Hopper reads the right
operand from shared memory only), and splitting a register into 16-bit or 8-bit lanes, joining and reshaping compile to
nothing.
"""

from typing import NamedTuple

import torch

from .dispatch import INTERPRETED, plain_tensors, tl, triton

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.uint8, torch.int8)
MAX_K_CODES = 2**18 - 1  # 128 * 64 * K stays below 2^31
MAX_SPLITS = 16  # parts of K: what the last program adds up stays small beside the product
AMD_STAGES = 2  # its 64 KiB of shared memory hold no more

_INTERPRETED = tl.constexpr(INTERPRETED)


class Plan(NamedTuple):
    """How a product runs: a tile, and the number of parts that the sum over K is split into; or no tile: the dense
    library."""

    tile: tuple | None
    splits: int = 1


def occupied(programs: int, wanted: int) -> bool:
    """Whether so many programs keep nearly all of `wanted` busy: then neither smaller tiles nor a split of K pay."""
    return 8 * programs >= 7 * wanted


def split_steps_of_k(steps: int, programs: int, processors: int) -> int:
    """Into how many parts K is split where `programs` tiles leave processors idle: up to two programs for each.

    A part has at least two of the `steps` of the loop over K, and no part is without any.
    """
    splits = max(1, min(2 * processors // max(1, programs), steps // 2, MAX_SPLITS))
    return -(-steps // -(-steps // splits))


def split_buffers(splits: int, tiles: int, numbers: int, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """(partial, arrived) for `park` and `is_last`: `numbers` sums for each part of a tile, and counters; or None."""
    if splits == 1:
        return None, None
    kind = torch.int32 if x.dtype in CODES else torch.float32
    partial = torch.empty(tiles * splits * numbers, dtype=kind, device=x.device)
    return partial, Counters.of(tiles, x.device)


class Counters:
    """Counters of arrivals on one device: zero between launches, because the last program of a tile resets its own.

    Launches on one stream never overlap, so they share `PER_STREAM` counters. A launch that a CUDA graph captures gets
    counters of its own for good, as graphs replay on any stream. All are cut from one buffer, made outside of graphs;
    what it cannot serve is cleared by a launch of its own.
    """

    PER_STREAM = 1024  # K is split only where tiles are fewer than multiprocessors
    SIZE = 1 << 20
    _of_device: dict[torch.device, "Counters"] = {}

    def __init__(self, device: torch.device, size: int = SIZE):
        with plain_tensors():
            self.buffer = torch.zeros(size, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # any stream may use them
        self.used = 0
        self.streams: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, tiles: int, device: torch.device) -> torch.Tensor:
        """`tiles` counters for a launch on the current stream."""
        on_cuda = device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        if device not in cls._of_device and not capturing:
            cls._of_device[device] = cls(device)
        if device not in cls._of_device:
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
        return cls._of_device[device].take(tiles, None if capturing else stream)

    def take(self, tiles: int, stream: int | None) -> torch.Tensor:
        """Counters of a stream, or with None such as nobody else gets."""
        if stream not in self.streams or tiles > self.PER_STREAM:
            number = tiles if stream is None else self.PER_STREAM
            if tiles > number or self.used + number > len(self.buffer):
                return torch.zeros(tiles, dtype=torch.int32, device=self.buffer.device)
            fresh = self.buffer[self.used : self.used + number]
            self.used += number
            if stream is None:
                return fresh
            self.streams[stream] = fresh
        return self.streams[stream]


class ProductFn(torch.autograd.Function):
    """y = L(x) + bias for a product L with packed weights, in every mode of autograd and under torch.func.

    `product` has `packed`, `run(x, bias, out_dtype) -> y` and `transposed(d_y, size) -> d_x`, which is made of torch's
    own operations and gets d_y times the scale in the type of x. Rows or images lie along dimension 0 of x and y,
    outputs along dimension 1 of y.
    """

    @staticmethod
    def forward(x, bias, product, out_dtype):
        return product.run(x, bias, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, ctx.product, ctx.out_dtype = inputs
        ctx.version = ctx.product.packed.bits._version
        ctx.x_size, ctx.x_dtype, ctx.y_size = x.shape, x.dtype, output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, d_y):
        if ctx.version != ctx.product.packed.bits._version:
            raise RuntimeError("the packed weights were written to between the forward and the backward pass")
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = ctx.product.transposed(scaled(d_y, ctx.product.packed.scale, ctx.x_dtype), ctx.x_size)
        if ctx.needs_input_grad[1]:
            d_bias = d_of_bias(d_y, ctx.bias_dtype)
        return d_x, d_bias, None, None

    @staticmethod
    def jvp(ctx, x_t, bias_t, *_):
        if ctx.x_dtype in CODES:
            return along_outputs(bias_t, len(ctx.y_size)).to(ctx.out_dtype).expand(ctx.y_size)
        return ProductFn.apply(x_t, bias_t, ctx.product, ctx.out_dtype)

    @staticmethod
    def vmap(info, in_dims, x, bias, product, out_dtype):
        """The mapped dimension joins the rows; a mapped bias is added behind."""
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        mapped_bias = bias is not None and in_dims[1] is not None
        dtype = torch.float32 if mapped_bias else out_dtype
        y = ProductFn.apply(x.flatten(0, 1), None if mapped_bias else bias, product, dtype).unflatten(0, x.shape[:2])
        if mapped_bias:
            bias = bias.movedim(in_dims[1], 0)[:, None]  # batch 1 N
            y = (y + bias.view(*bias.shape, *[1] * (y.dim() - 3))).to(out_dtype)
        return y, 0


def scaled(d_y: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """d_y times the scale of each output, in `dtype`: cast last, for an fp32 d_y alone may be too large for fp16."""
    return (d_y * along_outputs(scale, d_y.dim())).to(dtype)


def along_outputs(p: torch.Tensor, dims: int) -> torch.Tensor:
    """p (N,) against a tensor of `dims` dimensions with the outputs along dimension 1."""
    return p.view(-1, *[1] * (dims - 2))


def d_of_bias(d_y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a bias: summed over all but dimension 1, in fp32."""
    return d_y.sum([0, *range(2, d_y.dim())], dtype=torch.float32).to(dtype)


def fp32_terms() -> int:
    """bf16 terms that fp32 x is split into: two if torch's precision of fp32 products is 'medium', else three."""
    return 2 if torch.get_float32_matmul_precision() == "medium" else 3


def stages_for_device(stages: int) -> int:
    """Loads in flight: what a configuration names, or what fits on AMD."""
    return stages if torch.version.hip is None else AMD_STAGES


@triton.jit
def unpack_words(words, dtype: tl.constexpr, TERNARY: tl.constexpr, n=16):
    """Words (W, R) as loaded from `operand` -> weights (R, W * weights per word), 1, 2 or 64 times their sign.

    dtype tl.int8 reads form 'quad' (64); tl.float16 and tl.bfloat16 read 'pair' (1 binary, 2 ternary). Inside a loop, n
    should be a runtime integer of at least 16, such as the row stride of the words: the mask then is unknown to the
    compiler, which otherwise moves the constant into a register again for each use, a tenth of the loop.
    """
    W: tl.constexpr = words.shape[0]
    R: tl.constexpr = words.shape[1]
    E: tl.constexpr = 16 if TERNARY else 32
    w = tl.trans(words)[:, :, None]  # R W 1
    if dtype == tl.int8:
        if TERNARY:
            mask = tl.where(tl.arange(0, 4) < n, -1061109568, 0)  # 0xC0C0C0C0
            q = (w << (tl.arange(0, 4) * 2)[None, None, :]) & mask[None, None, :]  # four times 0, +-64
        else:
            mask = tl.where(tl.arange(0, 8) < n, -2139062144, 0)  # 0x80808080
            q = ((w << tl.arange(0, 8)[None, None, :]) & mask[None, None, :]) | 0x40404040  # four times +-64
        b0 = q.to(tl.int8)
        b1 = (q >> 8).to(tl.int8)
        b2 = (q >> 16).to(tl.int8)
        b3 = (q >> 24).to(tl.int8)
        lanes = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # the last two axes read b0 b1 b2 b3
    else:
        if TERNARY:
            mask = tl.where(tl.arange(0, 8) < n, -1073692672, 0)  # 0xC000C000
            p = (w << (tl.arange(0, 8) * 2)[None, None, :]) & mask[None, None, :]  # twice 0, +-2.0
        else:
            ONES: tl.constexpr = 0x3C003C00 if dtype == tl.float16 else 0x3F803F80
            mask = tl.where(tl.arange(0, 16) < n, -2147450880, 0)  # 0x80008000
            p = ((w << tl.arange(0, 16)[None, None, :]) & mask[None, None, :]) | ONES  # twice +-1.0
        low = (p & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high = (p >> 16).to(tl.int16).to(dtype, bitcast=True)
        lanes = tl.join(low, high)
    return tl.reshape(lanes, (R, W * E))


@triton.jit
def _dot(w, x, acc):
    """w @ x + acc in fp32. The interpreter multiplies the bit patterns of bf16 operands, so it gets them in fp32."""
    if _INTERPRETED:
        result = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        result = tl.dot(w, x, acc)
    return result


@triton.jit
def _head(x):
    """The first 8 bits of fp32 x, cut off: exact in bf16, and never an infinity where x is none."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _to_bf16(x):
    """fp32 rounded to bf16; in the interpreter, which would truncate, an fp32 number of that value."""
    if _INTERPRETED:
        i = x.to(tl.int32, bitcast=True)
        result = ((i + 0x7FFF + ((i >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.bfloat16)
    return result


@triton.jit
def dot_signs(w, x, acc, TERNARY: tl.constexpr, TERMS: tl.constexpr = 3):
    """acc + w @ x for unpacked w (R, K) and x (K, C): int8 -> int32, 16 bits -> fp32, fp32 x with bf16 w -> fp32.

    w is exact in bf16, so fp32 x is split into TERMS bf16 terms, one product each. They go, the smallest first, into a
    sum of their own: a tensor core truncates where it adds to an accumulator, and over all of K that would amount to
    ten times the error of fp32 addition. An infinity is its own first term, and the others are 0. As a ternary w is
    +-2, fp32 x is halved, lest it overflow; 16-bit x is not, and the caller halves the sum.
    """
    if x.dtype == tl.int8:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    elif x.dtype == tl.float32:
        if TERNARY:
            x = x * 0.5
        high = _head(x)
        block = tl.zeros_like(acc)
        if TERMS == 3:
            rest = tl.where(high == x, 0.0, x - high)
            middle = _head(rest)
            block = _dot(w, _to_bf16(rest - middle), block)
        else:  # rounded, which is a bit more, except next to the largest number
            rounded = _to_bf16(x).to(tl.float32)
            fits = tl.abs(rounded) < (2.0**127 if TERNARY else float("inf"))
            high = tl.where(fits, rounded, high)
            rest = tl.where(high == x, 0.0, x - high)
            middle = tl.where(fits, _to_bf16(rest).to(tl.float32), _head(rest))
        block = _dot(w, _to_bf16(middle), block)
        acc += _dot(w, _to_bf16(high), block)
    else:
        acc = _dot(w, x, acc)
    return acc


@triton.jit
def park(acc, partial_ptr, index):
    """Store the sums of this program's part of K, program_id(1), as set `index` for `gather`."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    part = tl.cast(index, tl.int64) * tl.num_programs(1) + tl.program_id(1)  # the sums of all parts may pass 2^31
    tl.store(partial_ptr + part * (ROWS * COLUMNS) + at, acc)


@triton.jit
def is_last(arrived_ptr, tile):
    """Whether the other programs of this tile have parked their sums: the one that finds so goes on alone.

    It also resets the counter, which nobody else reads before the next launch.
    """
    tl.debug_barrier()  # every thread has stored before one of them says so
    last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == tl.num_programs(1) - 1
    if last:
        tl.store(arrived_ptr + tile, 0)
    return last


@triton.jit
def gather(partial_ptr, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add set `index` of what all programs parked, in the order of the parts, so results do not vary between calls."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    parts_ptr = partial_ptr + tl.cast(index, tl.int64) * tl.num_programs(1) * (ROWS * COLUMNS) + at
    acc = tl.zeros((ROWS, COLUMNS), dtype=partial_ptr.dtype.element_ty)
    for _ in range(tl.num_programs(1)):
        acc += tl.load(parts_ptr, cache_modifier=".cg")  # from L2, which is where the others' parts are
        parts_ptr += ROWS * COLUMNS
    return acc
