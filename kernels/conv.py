"""Convolution with packed weights: y = scale[o] * conv2d(x, sign)[o] + bias[o], zero padding.

    x        (N, C, H, W)              fp32 | fp16 | bf16, or codes: uint8 (0..255) | int8 (-128..127), code * step
    packed   (O, C, kh, kw)            PackedWeight, binary or ternary: see pack.py
    words    (kh * kw * C' / E, O')    int32, `packed.operand(form, block=32, taps=True)`: E weights each, C padded
    scale    (O,)                      fp32
    bias     (O,)                      fp32 | fp16 | bf16, optional
    y        (N, O, OH, OW)            dtype of x (fp32 for codes) or `out_dtype`           arXiv 2410.07547, sec. 4

Precision and the two types of codes are those of matmul.py. The kernel is an implicit matrix product over (kh, kw, c)
with the unpacked weights as the left operand. It reads x channel by channel, so channels_last is its layout; another
one is converted first, once per call. What the kernel writes is channels_last. See `dense_wins` for what cuDNN does.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import LAUNCHES, OPS, tl, triton, use_triton
from .matmul import CODES, FLOATS, MAX_K_CODES, _unpacked
from .pack import PackedWeight, dot_signs, sign_mask, signs, unpack_words

DENSE_POSITIONS = 2**15  # output positions, see `dense_wins`
CHANNELS = 32  # the channels of each tap are padded to a multiple of this in `words`


def binary_conv2d_ref(
    x: Tensor,
    packed: PackedWeight,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: Tensor | None = None,
    step: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition of `binary_conv2d` in plain torch: the sum in at least fp32, rounded once at the end.

    Codes are summed in fp32 as well, which is exact up to 2^24, so for any codes up to K = 65,000.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.conv2d(x.to(dtype), signs(packed).to(dtype), None, stride, padding)  # N O OH OW
    y = y * (packed.scale if step is None else packed.scale * step)[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return y.to(result_dtype(x, out_dtype))


class Tile(NamedTuple):
    """What one program computes, output channels by (time steps and) pixels; its warps; loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


# By bytes of an element of x, from the largest to the smallest; fp32 keeps parts of x as well, hence one small tile.
TILES = {
    1: (Tile(128, 128, 8, 3), Tile(64, 64, 4, 4)),
    2: (Tile(128, 128, 8, 3), Tile(64, 64, 4, 4)),
    4: (Tile(64, 64, 4, 3),),
}
PROGRAMS = 128  # about one for each multiprocessor of a large GPU: with fewer, smaller tiles are faster


def pick_tile(itemsize: int, rows: int, columns: int) -> Tile:
    """The large tile, unless it wastes half its rows or gives too few programs."""
    large, small = TILES[itemsize][0], TILES[itemsize][-1]
    programs = -(-rows // large.rows) * -(-columns // large.columns)
    return large if programs >= PROGRAMS and rows > small.rows else small


def pick_block(itemsize: int, channels: int) -> int:
    """Channels per loop step: the largest power of two that divides the padded channels, up to 128 bytes of x."""
    padded = channels + -channels % CHANNELS
    return min(128 // itemsize, padded & -padded)


@triton.jit
def conv_tile(
    x_ptr, words_ptr, image, row, column, first, H, W, stride_w,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, TERNARY: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of +-x (ROWS, COLUMNS), fp32 or 64 times in int32, of output channels from `first` on.

    `image` (int64), `row` and `column` (COLUMNS,) say where each column lies in the output (N, OH, OW).
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
    mask = sign_mask(stride_w, w_type)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INTEGER else tl.float32)
    for i in range(0, KH * KW * STEPS):
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
        acc = dot_signs(unpack_words(words, w_type, TERNARY, mask), tile, acc, PARTS)
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
        UNIT: tl.constexpr = 0.5 if TERNARY else 1.0  # an unpacked ternary weight is +-2
        current = acc * (scale * UNIT)[:, None]
    if bias_ptr is not None:
        current += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    return current


@triton.jit
def _binary_conv2d_kernel(
    x_ptr,  # N H W C
    words_ptr,  # kh kw C'/E, O'
    scale_ptr,  # O
    bias_ptr,  # O or None
    sums_ptr,  # O, sums of the signs, or None where x is not uint8
    y_ptr,  # P, O
    step,
    OUT,
    P,  # N OH OW
    H,
    W,
    OH,
    OW,
    stride_w,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TERNARY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # neighbouring programs read the same pixels and other weights: x comes from memory once, then from L2
    tiles = tl.cdiv(OUT, ROWS)
    first = tl.program_id(0) % tiles * ROWS
    start = tl.program_id(0) // tiles * COLUMNS
    p = start + tl.arange(0, COLUMNS)
    image, row, column = output_position(tl.minimum(p, P - 1), OH, OW)
    acc = conv_tile(
        x_ptr, words_ptr, image, row, column, first, H, W, stride_w,
        C, KH, KW, STRIDE, PADDING, TERNARY, PARTS, ROWS, COLUMNS, BLOCK,
    )  # fmt: skip
    rows = first + tl.arange(0, ROWS)
    y = current_tile(acc, scale_ptr, bias_ptr, sums_ptr, step, rows, OUT, x_ptr.dtype.element_ty, KH * KW, C, TERNARY)
    # int64 where 2^31 may be exceeded, int32 within the tile
    y_ptrs = y_ptr + (tl.cast(start, tl.int64) * OUT + first) + (p - start)[:, None] * OUT + (rows - first)[None, :]
    tl.store(y_ptrs, tl.trans(y.to(y_ptr.dtype.element_ty)), mask=(p < P)[:, None] & (rows < OUT)[None, :])


def constants(itemsize: int, shape, ternary: bool, stride: int, padding: int, tile: Tile) -> dict:
    """What a convolution kernel is compiled for."""
    _, c, kh, kw = shape
    return {
        "C": c, "KH": kh, "KW": kw, "STRIDE": stride, "PADDING": padding, "TERNARY": ternary,
        "PARTS": 3 if torch.get_float32_matmul_precision() == "highest" else 2,
        "ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK": pick_block(itemsize, c),
        "num_warps": tile.warps, "num_stages": tile.stages if torch.version.hip is None else 2,
    }  # fmt: skip


def _launch(
    x: Tensor,
    words: Tensor | None,
    dense: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    sums: Tensor | None,
    step: float,
    shape: Sequence[int],
    ternary: bool,
    stride: int,
    padding: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`words` are ordered by taps, for the kernel; `dense` as for a matrix product, for cuDNN and for the gradient."""
    x = x.contiguous(memory_format=torch.channels_last)
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    if words is None:
        weight = _unpacked(dense, scale, shape[0], math.prod(shape[1:]), ternary, x.dtype).view(shape)
        bias = None if bias is None else bias.to(x.dtype)
        y = F.conv2d(x, weight, bias, stride, padding).to(out_dtype)
        return y.contiguous(memory_format=torch.channels_last)
    y = _empty_output(x, words, dense, scale, bias, sums, step, shape, ternary, stride, padding, out_dtype)
    n, o, oh, ow = y.shape
    p = n * oh * ow
    tile = pick_tile(x.element_size(), o, p)
    if p:
        LAUNCHES["binary_conv2d"] += 1
        _binary_conv2d_kernel[(triton.cdiv(o, tile.rows) * triton.cdiv(p, tile.columns),)](
            x, words, scale, bias, sums, y, step, o, p, *x.shape[2:], oh, ow, words.shape[1],
            **constants(x.element_size(), shape, ternary, stride, padding, tile),
        )  # fmt: skip
    return y


_conv2d_op = torch.library.custom_op(f"{OPS}::binary_conv2d", _launch, mutates_args=())


@_conv2d_op.register_fake
def _empty_output(x, words, dense, scale, bias, sums, step, shape, ternary, stride, padding, out_dtype):
    size = x.shape[0], shape[0], *output_size(x.shape[2:], shape[2:], stride, padding)
    return torch.empty(size, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op(f"{OPS}::binary_conv2d_d_x", mutates_args=())
def _d_x_op(
    d_y: Tensor,
    dense: Tensor,
    scale: Tensor,
    size: Sequence[int],
    shape: Sequence[int],
    ternary: bool,
    stride: int,
    padding: int,
) -> Tensor:
    """The transposed convolution with the unpacked weights, which are as dense as d_y: left to cuDNN."""
    weight = _unpacked(dense, None, shape[0], math.prod(shape[1:]), ternary, d_y.dtype).view(shape)
    d_y = (d_y * scale[:, None, None]).to(d_y.dtype)
    d_x = torch.nn.grad.conv2d_input(size, weight, d_y, stride, padding)
    return d_x.contiguous(memory_format=torch.channels_last)


@_d_x_op.register_fake
def _(d_y, dense, scale, size, shape, ternary, stride, padding):
    return torch.empty(size, dtype=d_y.dtype, device=d_y.device, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    x, _, dense, scale, bias, _, _, ctx.shape, ctx.ternary, ctx.stride, ctx.padding, _ = inputs
    ctx.save_for_backward(dense, scale)
    ctx.size, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype


def _backward(ctx, d_y):
    dense, scale = ctx.saved_tensors
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        d_x = _d_x_op(d_y.to(ctx.x_dtype), dense, scale, ctx.size, ctx.shape, ctx.ternary, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[4]:
        d_bias = d_y.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return d_x, None, None, None, d_bias, None, None, None, None, None, None, None


_conv2d_op.register_autograd(_backward, setup_context=_setup_context)


def binary_conv2d(
    x: Tensor,
    packed: PackedWeight,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: Tensor | None = None,
    step: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = scale * conv2d(x, sign) + bias for x (N, C, H, W) and weights (O, C, kh, kw); see the table on top.

    Zero padding, no dilation, no groups; `stride` and `padding` hold for both axes. Codes (uint8, int8) need `step`,
    the value of code 1, and their sum is exact: y = fp32(sum) * (scale * step) + bias. Gradients go to `x` (by a
    transposed convolution with the unpacked weights, through cuDNN in the dtype of x) and to `bias`; `packed` is a
    constant. CUDA tensors take the kernel, others `binary_conv2d_ref`, unless `set_backend` says otherwise. Raises
    ValueError where shapes, types, devices or `step` do not fit.
    """
    check_conv(x, packed, stride=stride, padding=padding, bias=bias, step=step, out_dtype=out_dtype)
    out_dtype = result_dtype(x, out_dtype)
    if not use_triton(x):
        return binary_conv2d_ref(x, packed, stride=stride, padding=padding, bias=bias, step=step, out_dtype=out_dtype)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    left_to_cudnn = dense_wins(x, packed, stride, padding)
    words, sums = (None, None) if left_to_cudnn else conv_operands(x, packed)
    dense = packed.operand("pair") if left_to_cudnn or wants_grad else None
    run = _conv2d_op if wants_grad or torch.compiler.is_compiling() else _launch  # the operator costs microseconds
    return run(
        x, words, dense, packed.scale, bias, sums, step or 1.0, packed.shape, packed.kind == "ternary", stride, padding,
        out_dtype,
    )  # fmt: skip


def conv_operands(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """What the kernels read of `packed` for x of this type: the words, and the sums of the signs for uint8."""
    words = packed.operand("quad" if x.dtype in CODES else "pair", block=CHANNELS, taps=True)
    return words, packed.row_sums() if x.dtype == torch.uint8 else None


def dense_wins(x: Tensor, packed: PackedWeight, stride: int, padding: int) -> bool:
    """Whether to unpack the weights and leave the convolution to cuDNN.

    It wins for floats with a few input channels, of which the kernel pads each tap to 32; and for bf16 with so many
    output positions that tensor cores are the limit of both: then reading fewer bytes of weights gains nothing. Codes
    stay (torch has no dense product of int8 images), fp32 with more channels too, which cuDNN multiplies on slow units
    or rounds to TF32, and fp16, in which scaled weights could underflow.
    """
    if x.dtype in CODES or x.dtype == torch.float16:
        return False
    oh, ow = output_size(x.shape[2:], packed.shape[2:], stride, padding)
    return x.shape[1] <= CHANNELS // 4 or (x.dtype == torch.bfloat16 and x.shape[0] * oh * ow >= DENSE_POSITIONS)


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


def aot_cases() -> list[tuple]:
    """Every tile for ahead-of-time compilation, see bench/aot.py: (name, kernel, types, constexprs, options)."""
    cases = [
        ("bf16 3x3 128x128", "bf16", (128, 256, 3, 3), False, 1, 1, TILES[2][0]),
        ("fp16 1x1 64x64 ternary", "fp16", (64, 256, 1, 1), True, 2, 0, TILES[2][1]),
        ("i8 3x3 128x128", "i8", (128, 256, 3, 3), False, 1, 1, TILES[1][0]),
        ("u8 3x3 64x64 ragged", "u8", (64, 136, 3, 3), False, 2, 1, TILES[1][1]),
        ("fp32 3x3 64x64", "fp32", (64, 256, 3, 3), False, 1, 1, TILES[4][0]),
    ]
    return [(name, _binary_conv2d_kernel, *aot_arguments(*rest)) for name, *rest in cases]


def aot_arguments(x, shape, ternary, stride, padding, tile) -> tuple:
    """(types, constexprs, options) of a case of `aot_cases`."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}.get(x, 1)
    types = {"x_ptr": f"*{x}", "words_ptr": "*i32", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "step": "fp32"}
    types |= {"sums_ptr": "*i32" if x == "u8" else None, "y_ptr": "*bf16" if size == 1 else f"*{x}"}
    types |= dict.fromkeys(("OUT", "P", "H", "W", "OH", "OW", "stride_w"), "i32")
    constexprs = constants(size, shape, ternary, stride, padding, tile)
    warps, stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")

    def options(backend):
        odd = ("P", "H", "W", "OH", "OW")
        return {"num_warps": warps, "num_stages": stages if backend == "cuda" else 2, "odd": odd}

    return types, constexprs, options
