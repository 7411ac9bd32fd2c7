"""What the packed products (matmul.py, conv.py, conv_neuron.py) share: unpacking, the dot product, the split of K.

The unpacked weight is meant to be the left operand of `tl.dot`: there it stays in registers (Hopper reads the right
operand from shared memory only), and splitting a register into 16-bit or 8-bit lanes, joining and reshaping compile to
nothing.
"""

from typing import NamedTuple

import torch

from .dispatch import INTERPRETED, tl, triton

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
    return partial, torch.zeros(tiles, dtype=torch.int32, device=x.device)


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
def _to_bf16(x):
    """fp32 rounded to bf16; in the interpreter, which would truncate, an fp32 number of that value."""
    if _INTERPRETED:
        i = x.to(tl.int32, bitcast=True)
        result = ((i + 0x7FFF + ((i >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.bfloat16)
    return result


@triton.jit
def dot_signs(w, x, acc, TERMS: tl.constexpr = 3):
    """acc + w @ x for unpacked w (R, K) and x (K, C): int8 -> int32, 16 bits -> fp32, fp32 x with bf16 w -> fp32.

    w is exact in bf16, so fp32 x is split into TERMS bf16 terms, one product each. They go, the smallest first, into a
    sum of their own: a tensor core truncates where it adds to an accumulator, and over all of K that would amount to
    ten times the error of fp32 addition.
    """
    if x.dtype == tl.int8:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    elif x.dtype == tl.float32:
        high = _to_bf16(x)
        rest = x - high.to(tl.float32)
        middle = _to_bf16(rest)
        block = tl.zeros_like(acc)
        if TERMS == 3:
            block = _dot(w, _to_bf16(rest - middle.to(tl.float32)), block)
        acc += _dot(w, high, _dot(w, middle, block))
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
    """Whether the other programs of this tile have parked their sums: the one that finds so goes on alone."""
    tl.debug_barrier()  # every thread has stored before one of them says so
    return tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == tl.num_programs(1) - 1


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
