"""What the packed convolutions (conv.py, conv_neuron.py) share: tiles, the sum over (kh, kw, c), checks of arguments.

x        (N, H, W, C)              fp32 | fp16 | bf16 | uint8 | int8: an image in memory is channels_last
words    (kh * kw * C' / E, O')    int32, `packed.operand(form, block=32, taps=True)`: E weights each, C padded
tile     (ROWS, COLUMNS)           sums of output channels by output positions (or time steps and positions)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import LAUNCH, tl, triton
from .pack import PackedWeight
from .products import (
    CODES,
    FLOATS,
    MAX_K_CODES,
    Plan,
    dot_signs,
    fp32_terms,
    occupied,
    split_steps_of_k,
    stages_for_device,
    unpack_words,
)

CHANNELS = 32  # the channels of each tap are padded to a multiple of this in `words`


class Tile(NamedTuple):
    """What one program computes, output channels by (time steps and) pixels; its warps; loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


# By bytes of an element of x, from the largest to the smallest. For 64 channels, 64 x 128 takes 11.4 instructions per
# warp and column where 64 x 64 takes 16.3 (int8, sm_90; bf16 18 and 23): each unpacked weight serves more columns.
# fp32 keeps parts of x as well, hence one small tile.
TILES = {
    1: (Tile(128, 128, 8, 3), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4)),
    2: (Tile(128, 128, 8, 3), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4)),
    4: (Tile(64, 64, 4, 3),),
}
PROGRAMS = 128  # about one for each multiprocessor of a large GPU: with fewer, smaller tiles are faster


def count_tiles(tile: Tile, rows: int, columns: int) -> int:
    """Tiles that cover an output of `rows` channels by `columns` (steps and) positions."""
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)


def pick_tile(itemsize: int, rows: int, columns: int) -> Tile:
    """The largest tile that neither wastes half its rows nor gives too few programs, else the smallest."""
    for tile in TILES[itemsize]:
        if 2 * rows > tile.rows and count_tiles(tile, rows, columns) >= PROGRAMS:
            return tile
    return TILES[itemsize][-1]


def split_plan(tile: Tile, itemsize: int, shape, columns: int, processors: int) -> Plan:
    """`tile` with K split into as many parts as `split_steps_of_k` says, unless the tiles occupy the GPU."""
    tiles = count_tiles(tile, shape[0], columns)
    return Plan(tile) if occupied(tiles, processors) else _split(tile, itemsize, shape, tiles, processors)


def _split(tile, itemsize, shape, tiles, processors):
    _, c, kh, kw = shape
    return Plan(tile, split_steps_of_k(kh * kw * triton.cdiv(c, pick_block(itemsize, c)), tiles, processors))


def tile_plans(tiles, itemsize: int, shape, columns: int, processors: int) -> list[Plan]:
    """What the tuner may try: each of `tiles` whole, and split."""
    counts = [count_tiles(tile, shape[0], columns) for tile in tiles]
    plans = [(Plan(tile), _split(tile, itemsize, shape, n, processors)) for tile, n in zip(tiles, counts, strict=True)]
    return list(dict.fromkeys(plan for both in plans for plan in both))


def pick_block(itemsize: int, channels: int) -> int:
    """Channels per loop step: the largest power of two that divides the padded channels, up to 128 bytes of x."""
    padded = channels + -channels % CHANNELS
    return min(128 // itemsize, padded & -padded)


@triton.jit
def conv_tile(
    x_ptr, words_ptr, image, row, column, first, H, W, stride_w,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, TERNARY: tl.constexpr, TERMS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of +-x (ROWS, COLUMNS), fp32 or 64 times in int32, of output channels from `first` on.

    `image` (int64), `row` and `column` (COLUMNS,) say where each column lies in the output (N, OH, OW). With SPLIT they
    are those of this program's part of K, program_id(1).
    """
    x_type: tl.constexpr = x_ptr.dtype.element_ty
    INTEGER: tl.constexpr = x_type == tl.uint8 or x_type == tl.int8
    w_type: tl.constexpr = tl.int8 if INTEGER else (tl.bfloat16 if x_type == tl.float32 else x_type)
    WORDS: tl.constexpr = BLOCK // (16 if TERNARY else 32)
    STEPS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    k = tl.arange(0, BLOCK)
    top = row * STRIDE - PADDING
    left = column * STRIDE - PADDING
    # int64: x may hold more than 2^31 elements, (4 * 512, 64, 128, 128) for one
    x_ptrs = x_ptr + (((image * H + top) * W + left) * C)[None, :] + k[:, None]
    words_ptrs = words_ptr + tl.arange(0, WORDS)[:, None] * stride_w + (first + tl.arange(0, ROWS))[None, :]
    if PADDING > 0:  # a bit for each row and column of the kernel that meets the image: no comparisons in the loop
        rows_inside = tl.zeros((COLUMNS,), tl.int32)
        columns_inside = tl.zeros((COLUMNS,), tl.int32)
        for y in tl.static_range(KH):
            rows_inside |= ((top + y >= 0) & (top + y < H)).to(tl.int32) << y
        for x in tl.static_range(KW):
            columns_inside |= ((left + x >= 0) & (left + x < W)).to(tl.int32) << x
    i_first = 0
    i_last = KH * KW * STEPS
    if SPLIT:
        share = tl.cdiv(KH * KW * STEPS, tl.num_programs(1))
        i_first = tl.program_id(1) * share
        i_last = tl.minimum(KH * KW * STEPS, i_first + share)
        words_ptrs += tl.cast(i_first * WORDS, tl.int64) * stride_w
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INTEGER else tl.float32)
    for i in range(i_first, i_last):
        kh = i // STEPS // KW
        kw = i // STEPS % KW
        c = (i % STEPS) * BLOCK
        at = x_ptrs + ((kh * tl.cast(W, tl.int64) + kw) * C + c)
        # code 0 stands for the border and for padded channels: exact, whatever the padded weights are
        if PADDING > 0:
            inside = ((rows_inside >> kh) & (columns_inside >> kw) & 1) != 0
            if C % BLOCK == 0:
                tile = tl.load(at, mask=inside[None, :], other=0)
            else:
                tile = tl.load(at, mask=inside[None, :] & (c + k < C)[:, None], other=0)
        elif C % BLOCK == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(c + k < C)[:, None], other=0)
        if x_type == tl.uint8:
            tile = (tile ^ 128).to(tl.int8, bitcast=True)  # code - 128, which `current_tile` undoes
        words = tl.load(words_ptrs)
        acc = dot_signs(unpack_words(words, w_type, TERNARY, stride_w), tile, acc, TERNARY, TERMS)
        words_ptrs += WORDS * stride_w
    return acc


@triton.jit
def output_position(p, OH, OW):
    """Image, row and column of output position p; the image as int64, because offsets are built on it."""
    image = p // (OH * OW)
    rest = p - image * (OH * OW)
    return image.to(tl.int64), rest // OW, rest % OW


@triton.jit
def current_tile(
    acc, scale_ptr, bias_ptr, sums_ptr, step, rows, OUT,
    x_type: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, TERNARY: tl.constexpr,
):  # fmt: skip
    """scale * (sums of +-x) * step + bias in fp32, from what `conv_tile` returned for x of type x_type."""
    inside = rows < OUT
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0) * tl.cast(step, tl.float32)
    if acc.dtype == tl.int32:
        acc = acc >> 6  # exact: every term is a multiple of 64
        if x_type == tl.uint8:
            # Every term was 128 too small, also where x was padded; there a binary weight is +1 and a ternary one 0.
            PADDED: tl.constexpr = 0 if TERNARY else TAPS * ((C + 31) // 32 * 32 - C)
            acc += 128 * (tl.load(sums_ptr + rows, mask=inside, other=0) + PADDED)[:, None]
        current = acc.to(tl.float32) * scale[:, None]
    else:
        UNIT: tl.constexpr = 0.5 if TERNARY and x_type != tl.float32 else 1.0  # see `dot_signs`
        current = acc * (scale * UNIT)[:, None]
    if bias_ptr is not None:
        current += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    return current


def constants(itemsize: int, shape, ternary: bool, stride: int, padding: int, plan: Plan) -> dict:
    """What a convolution kernel is compiled for, with fewer loads in flight than steps: else it may spill."""
    _, c, kh, kw = shape
    block = pick_block(itemsize, c)
    stages = min(plan.tile.stages, max(2, kh * kw * triton.cdiv(c, block) - 1))
    return {
        "C": c, "KH": kh, "KW": kw, "STRIDE": stride, "PADDING": padding, "TERNARY": ternary, "TERMS": fp32_terms(),
        "SPLIT": plan.splits > 1, "ROWS": plan.tile.rows, "COLUMNS": plan.tile.columns,
        "BLOCK": block, "num_warps": plan.tile.warps, "num_stages": stages_for_device(stages), **LAUNCH,
    }  # fmt: skip


def conv_operands(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """What the kernels read of `packed` for x of this type: the words, and the sums of the signs for uint8."""
    words = packed.operand("quad" if x.dtype in CODES else "pair", block=CHANNELS, taps=True)
    return words, packed.row_sums() if x.dtype == torch.uint8 else None


def output_size(size, kernel, stride: int, padding: int) -> tuple[int, int]:
    """(OH, OW) of an image (H, W) under a kernel (kh, kw)."""
    return tuple((n + 2 * padding - k) // stride + 1 for n, k in zip(size, kernel, strict=True))


def result_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """`out_dtype`, or that of x, or fp32 for codes."""
    if out_dtype is not None:
        return out_dtype
    return x.dtype if x.is_floating_point() else torch.float32


def check_conv(x, packed, *, stride, padding, bias=None, step=None, out_dtype=None, steps=False):
    """Raise ValueError, with the values, unless the arguments of a convolution fit; with `steps` x starts with T."""
    letters = "(T, N, C, H, W)" if steps else "(N, C, H, W)"
    if not isinstance(packed, PackedWeight) or len(packed.shape) != 4:
        got = packed.shape if isinstance(packed, PackedWeight) else type(packed).__name__
        raise ValueError(f"packed must be a PackedWeight of shape (O, C, kh, kw), got {got}")
    if x.dtype not in FLOATS + CODES:
        raise ValueError(f"x must be float32, float16, bfloat16, uint8 or int8, got {x.dtype}")
    if x.ndim != 4 + steps or x.shape[1 + steps] != packed.shape[1]:
        raise ValueError(
            f"x must be {letters} with C = {packed.shape[1]} for weights {packed.shape}, got {tuple(x.shape)}"
        )
    if x.dtype not in CODES and step is not None:
        raise ValueError(f"step is for uint8 and int8 codes, got step={step} with x of {x.dtype}")
    if x.dtype in CODES and (step is None or not 0 < step < float("inf")):
        raise ValueError(f"codes ({x.dtype}) need a finite step > 0, got {step}")
    if not isinstance(stride, int) or not isinstance(padding, int) or stride < 1 or padding < 0:
        raise ValueError(f"stride must be an int from 1 and padding an int from 0, got {stride!r} and {padding!r}")
    oh, ow = output_size(x.shape[-2:], packed.shape[2:], stride, padding)
    if oh < 1 or ow < 1:
        raise ValueError(
            f"a kernel of {packed.shape[2:]} does not fit into an image of {tuple(x.shape[-2:])} with padding {padding}"
        )
    if max(packed.shape[2:]) > 31:
        raise ValueError(f"kernels are at most 31 x 31, got {packed.shape[2:]}")
    if math.prod(x.shape[:-3]) * oh * ow >= 2**31 - 2**8:  # int32 up to the end of the last tile
        raise ValueError(f"x {tuple(x.shape)} has about 2^31 output positions or more: split the batch")
    k = (packed.shape[1] + -packed.shape[1] % CHANNELS) * math.prod(packed.shape[2:])  # as in the kernel, padded
    if x.dtype in CODES and k > MAX_K_CODES:
        raise ValueError(f"the int32 sum of codes holds for up to {MAX_K_CODES} weights, got {k} for {packed.shape}")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    check_like(x, packed.shape[:1], bias=bias, scale=packed.scale)


def check_like(x: Tensor, shape, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor that is not None is floating point, of `shape`, on the device of x."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be floating point {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} is on {tensor.device}")
