"""How (T, N, C, ...) activations lie in memory, and how element-by-element kernels cut them into tiles.

Each step x[t] (N, C, ...) may be contiguous or channels_last; consecutive steps may lie any stride apart. Kernels see
one step as (A, C, B) numbers, A and B being what lies outside and inside the channel in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import device_facts, tl, triton

BLOCKS = 65_535  # programs along axis 1 of a grid
PROGRAMS = 16  # per multiprocessor, of a kernel that sums over its tiles: fewer would wait for memory


def is_channels_last(x: Tensor) -> bool | None:
    """How each `x[t]` (N, C, ...) lies in memory: True channels last, False contiguous, None neither."""
    step = x[0]
    if step.is_contiguous():
        return False
    if step.dim() == 4:
        return step.is_contiguous(memory_format=torch.channels_last) or None
    return step.movedim(1, -1).is_contiguous() or None


def steps_dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it unless each step is contiguous or channels_last (time may have any stride)."""
    return x.contiguous() if is_channels_last(x) is None else x


def empty_like_steps(x: Tensor, dtype: torch.dtype, one_step: bool = False) -> Tensor:
    """A fresh (T, N, C, ...) tensor, or (N, C, ...), whose steps have the layout of the steps of x."""
    shape = x.shape[1:] if one_step else x.shape
    c = 1 if one_step else 2
    if is_channels_last(x):
        return x.new_empty(shape[:c] + shape[c + 1 :] + shape[c : c + 1], dtype=dtype).movedim(-1, c)
    return x.new_empty(shape, dtype=dtype)


def lay_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y with steps laid out like those of x; copied only where they are not. Both (T, N, C, ...)."""
    wanted = is_channels_last(x)
    if wanted == is_channels_last(y):
        return y
    return y.movedim(2, -1).contiguous().movedim(-1, 2) if wanted else y.contiguous()


def stack_steps(steps: list[Tensor], x: Tensor) -> Tensor:
    """(T, N, C, ...) from its steps, laid out like those of x (contiguous where x is neither)."""
    if is_channels_last(x):
        return torch.stack([s.movedim(1, -1) for s in steps]).movedim(-1, 2)
    return torch.stack(steps)


def cat_steps(pieces: Sequence[Tensor], x: Tensor) -> Tensor:
    """(T, N, C, ...) from consecutive pieces of it, its steps laid out like those of x."""
    if is_channels_last(x):
        return torch.cat([p.movedim(2, -1) for p in pieces]).movedim(-1, 2)
    return torch.cat(pieces)


def tile_elements(x: Tensor, sums: int) -> int:
    """Elements of one step for a program of 4 warps that holds T steps of x, a gradient and `sums` sums per step."""
    words = len(x) * (2 * x.element_size() // 4 + 1 + sums)  # registers for each element of a thread
    per_thread = max(1, 96 // words)  # about 96 in all leaves room for enough warps
    widest = 16 // x.element_size()  # one load of 16 bytes
    return 128 * min(widest, 1 << (per_thread.bit_length() - 1))


def tiling(x: Tensor, per_channel: bool, elements: int) -> tuple[tuple[int, int, int], dict, int]:
    """((A, C, B), tile constants, tiles per channel block) for `_tile`: `elements` of one step for each program.

    Without per-channel parameters a step is one run of numbers: A = C = 1, whatever its layout.
    """
    n, c = x.shape[1:3]
    positions = x[0, 0, 0].numel()
    if not per_channel:
        view, last = (1, 1, n * c * positions), False
    elif is_channels_last(x) or positions == 1:
        view, last = (n * positions, c, 1), True
    else:
        view, last = (n, c, positions), False
    least = triton.next_power_of_2(triton.cdiv(view[1], BLOCKS))  # channels of a tile
    if least > elements:
        raise ValueError(f"parameters per channel are for up to {BLOCKS * elements} channels here, got {view[1]}")
    if last:
        tile_y = max(least, min(triton.next_power_of_2(c), 128, elements))
        tile_x = elements // tile_y
        tiles = triton.cdiv(view[0], tile_x)
    else:
        tile_y = min(triton.next_power_of_2(view[2]), elements // least)
        tile_x = min(elements // tile_y, triton.next_power_of_2(view[1]))
        tiles = view[0] * triton.cdiv(view[2], tile_y)
    return view, {"X": tile_x, "Y": tile_y, "CHANNELS_LAST": last}, tiles


def channel_blocks(view: tuple[int, int, int], tile: dict) -> int:
    """Programs along axis 1 of the grid."""
    return triton.cdiv(view[1], tile["Y"] if tile["CHANNELS_LAST"] else tile["X"])


def programs(tiles: int, blocks: int, device: torch.device) -> int:
    """Programs along axis 0, of `blocks` on the other axes, for a kernel that sums over its tiles."""
    return min(tiles, triton.cdiv(PROGRAMS * device_facts(device)[0], blocks))


@triton.jit
def _tile(i, A, C, B, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Tile i of a step seen as (A, C, B), channels of block program_id(1): offsets, mask (X, Y) and channel numbers.

    channels_last: B = 1 and A = N H W; X counts positions, Y channels. Else B = H W; X counts channels, Y positions.
    Offsets are int64: a step may hold more than 2^31 elements.
    """
    x = tl.arange(0, X)[:, None]
    y = tl.arange(0, Y)[None, :]
    if CHANNELS_LAST:
        a = tl.cast(i, tl.int64) * X + x
        channel = tl.program_id(1) * Y + y
        offsets = a * C + channel
        mask = (a < A) & (channel < C)
    else:
        blocks = (B - 1) // Y + 1  # tl.cdiv would wrap near 2^31
        b = tl.cast(i % blocks, tl.int64) * Y + y
        channel = tl.program_id(1) * X + x
        offsets = (tl.cast(i // blocks, tl.int64) * C + channel) * B + b
        mask = (channel < C) & (b < B)
    return offsets, mask, channel


@triton.jit
def _parameter(ptr, t, channel, C, PER_CHANNEL: tl.constexpr):
    """Parameter of step t in fp32: (T, C) at the tile's channels, or (T,) as a scalar."""
    p = tl.load(ptr + t * C + channel, mask=channel < C, other=0) if PER_CHANNEL else tl.load(ptr + t)
    return p.to(tl.float32)


@triton.jit
def _store_sum(ptr, slot, t, acc, C, T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Sum the tile over positions into this program's row of partial sums (slots, programs, T, C)."""
    if CHANNELS_LAST:
        total = tl.sum(acc, axis=0)
        channel = tl.program_id(1) * Y + tl.arange(0, Y)
    else:
        total = tl.sum(acc, axis=1)
        channel = tl.program_id(1) * X + tl.arange(0, X)
    row = (slot * tl.num_programs(0) + tl.program_id(0)) * T + t
    tl.store(ptr + row * C + channel, total, mask=channel < C)
