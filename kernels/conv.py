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
Where output tiles are too few for the GPU (a small batch of small maps), the sum over K is split among programs.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tune
from .conv_tiles import (
    CHANNELS,
    TILES,
    check_conv,
    constants,
    conv_operands,
    conv_tile,
    count_tiles,
    current_tile,
    output_position,
    output_size,
    pick_tile,
    result_dtype,
    split_plan,
    tile_plans,
)
from .dense import dense_is_precise, unpack_dense, unpack_op
from .dispatch import LAUNCHES, OPS, device_facts, own_precision, plain_tensors, tl, transformed, triton, use_triton
from .pack import PackedWeight, signs
from .products import CODES, Plan, ProductFn, d_of_bias, gather, is_last, park, scaled, split_buffers

DENSE_POSITIONS = 2**15  # output positions, see `dense_wins`


@own_precision
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
    """The definition of `binary_conv2d` in plain torch: the sum in fp32 or wider, rounded once at the end.

    Codes are summed in fp64, so exactly, whatever algorithm cuDNN takes. Sums of fp32 follow torch's settings of TF32.

    >>> binary_conv2d_ref(torch.ones(1, 1, 2, 2), pack(torch.ones(1, 1, 3, 3)), padding=1).flatten()
    tensor([4., 4., 4., 4.])
    """
    codes = x.dtype in CODES
    wide = torch.float64 if codes else torch.promote_types(x.dtype, torch.float32)
    y = F.conv2d(x.to(wide), signs(packed).to(wide), None, stride, padding)  # N O OH OW
    y = (y.float() if codes else y) * (packed.scale if step is None else packed.scale * step)[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return y.to(result_dtype(x, out_dtype))


@triton.jit
def _store_output(
    acc, start, first, scale_ptr, bias_ptr, sums_ptr, y_ptr, step, OUT, P,
    x_type: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, TERNARY: tl.constexpr,
):  # fmt: skip
    """Scale and bias, then one store of positions from `start` and channels from `first`, channels running fastest."""
    rows = first + tl.arange(0, acc.shape[0])
    p = start + tl.arange(0, acc.shape[1])
    y = current_tile(acc, scale_ptr, bias_ptr, sums_ptr, step, rows, OUT, x_type, TAPS, C, TERNARY)
    # int64 where 2^31 may be exceeded, int32 within the tile
    y_ptrs = y_ptr + (tl.cast(start, tl.int64) * OUT + first) + (p - start)[:, None] * OUT + (rows - first)[None, :]
    tl.store(y_ptrs, tl.trans(y.to(y_ptr.dtype.element_ty)), mask=(p < P)[:, None] & (rows < OUT)[None, :])


@triton.jit
def _binary_conv2d_kernel(
    x_ptr,  # N H W C
    words_ptr,  # kh kw C'/E, O'
    scale_ptr,  # O
    bias_ptr,  # O or None
    sums_ptr,  # O, sums of the signs, or None where x is not uint8
    y_ptr,  # P, O
    partial_ptr,  # tiles, splits, ROWS, COLUMNS or None
    arrived_ptr,  # tiles, zero, or None
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
    TERMS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # neighbouring programs read the same pixels and other weights: x comes from memory once, then from L2
    tile = tl.program_id(0)
    tiles = tl.cdiv(OUT, ROWS)
    first = tile % tiles * ROWS
    start = tile // tiles * COLUMNS
    p = start + tl.arange(0, COLUMNS)
    image, row, column = output_position(tl.minimum(p, P - 1), OH, OW)
    acc = conv_tile(
        x_ptr, words_ptr, image, row, column, first, H, W, stride_w,
        C, KH, KW, STRIDE, PADDING, TERNARY, TERMS, SPLIT, ROWS, COLUMNS, BLOCK,
    )  # fmt: skip
    X: tl.constexpr = x_ptr.dtype.element_ty
    if SPLIT:
        park(acc, partial_ptr, tile)
        if is_last(arrived_ptr, tile):
            acc = gather(partial_ptr, tile, ROWS, COLUMNS)
            _store_output(acc, start, first, scale_ptr, bias_ptr, sums_ptr, y_ptr, step, OUT, P, X, KH * KW, C, TERNARY)
    else:
        _store_output(acc, start, first, scale_ptr, bias_ptr, sums_ptr, y_ptr, step, OUT, P, X, KH * KW, C, TERNARY)


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
    oh, ow = output_size(x.shape[2:], shape[2:], stride, padding)
    o, p, itemsize = shape[0], x.shape[0] * oh * ow, x.element_size()
    run = partial(_run, x, words, dense, scale, bias, sums, step, shape, ternary, stride, padding, out_dtype)
    if words is None:
        return run(Plan(None))
    processors, _ = device_facts(x.device)
    plan = split_plan(pick_tile(itemsize, o, p), itemsize, shape, p, processors)
    if tune.enabled() and p:
        bucket = triton.next_power_of_2(p)
        dense_too = dense is not None and dense_is_precise(x.dtype, out_dtype)

        def plans():
            return tile_plans(TILES[itemsize], itemsize, shape, bucket, processors) + [Plan(None)] * dense_too

        key = ("binary_conv2d", x.dtype, out_dtype, *shape, ternary, stride, padding, bucket, dense_too)
        plan = tune.fastest(key, x.device, plans, run, plan)
    return run(plan)


def _run(x, words, dense, scale, bias, sums, step, shape, ternary, stride, padding, out_dtype, plan):
    """The convolution of channels_last x as `plan` says."""
    if plan.tile is None:
        weight = unpack_dense(dense, scale, shape[0], math.prod(shape[1:]), ternary, x.dtype).view(shape)
        y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)
        return y.contiguous(memory_format=torch.channels_last)
    y = _empty_output(x, words, dense, scale, bias, sums, step, shape, ternary, stride, padding, out_dtype)
    n, o, oh, ow = y.shape
    p = n * oh * ow
    if p:
        tiles = count_tiles(plan.tile, o, p)
        parts, arrived = split_buffers(plan.splits, tiles, plan.tile.rows * plan.tile.columns, x)
        LAUNCHES["binary_conv2d"] += 1
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors are on
            _binary_conv2d_kernel[(tiles, plan.splits)](
                x, words, scale, bias, sums, y, parts, arrived, step, o, p, *x.shape[2:], oh, ow, words.shape[1],
                **constants(x.element_size(), shape, ternary, stride, padding, plan),
            )  # fmt: skip
    return y


_conv2d_op = torch.library.custom_op(f"{OPS}::binary_conv2d", _launch, mutates_args=())


@_conv2d_op.register_fake
def _empty_output(x, words, dense, scale, bias, sums, step, shape, ternary, stride, padding, out_dtype):
    size = x.shape[0], shape[0], *output_size(x.shape[2:], shape[2:], stride, padding)
    return torch.empty(size, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    x, _, dense, scale, bias, _, _, ctx.shape, ctx.ternary, ctx.stride, ctx.padding, _ = inputs
    ctx.save_for_backward(dense, scale)
    ctx.size, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype


def _backward(ctx, d_y):
    dense, scale = ctx.saved_tensors
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        k = math.prod(ctx.shape[1:])
        weight = unpack_op(d_y.detach(), dense, ctx.shape[0], k, ctx.ternary, ctx.x_dtype).view(ctx.shape)
        d_x = _transposed(scaled(d_y, scale, ctx.x_dtype), weight, ctx.size, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[4]:
        d_bias = d_of_bias(d_y, ctx.bias_dtype)
    return d_x, None, None, None, d_bias, None, None, None, None, None, None, None


@own_precision
def _transposed(d_y, weight, size, stride, padding):
    """The transposed convolution with unpacked weights, which are as dense as d_y: left to cuDNN.

    On a CPU (the interpreter) in fp32: some of torch's convolutions there add up in the type of d_y.
    """
    covered = [(n - 1) * stride - 2 * padding + k for n, k in zip(d_y.shape[2:], weight.shape[2:], strict=True)]
    rest = [n - c for n, c in zip(size[2:], covered, strict=True)]  # rows and columns that no kernel reached
    weight = weight.contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(d_y.dtype, torch.float32) if d_y.is_cpu else d_y.dtype
    return F.conv_transpose2d(d_y.to(wide), weight.to(wide), None, stride, padding, rest).to(d_y.dtype)


_conv2d_op.register_autograd(_backward, setup_context=_setup_context)


@own_precision
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
    transposed convolution with the unpacked weights, through cuDNN in the dtype of x and with torch's settings) and to
    `bias`: backward (of first order within torch.compile, else of any), forward and under torch.func; `packed` is a
    constant. Autocast changes nothing: the type of x decides. CUDA tensors take the kernel, others `binary_conv2d_ref`,
    unless `set_backend` says otherwise. Raises ValueError where shapes, types, devices or `step` do not fit.

    >>> binary_conv2d(torch.ones(2, 3, 8, 8), pack(torch.randn(5, 3, 3, 3)), stride=2, padding=1).shape
    torch.Size([2, 5, 4, 4])
    """
    check_conv(x, packed, stride=stride, padding=padding, bias=bias, step=step, out_dtype=out_dtype)
    out_dtype, step = result_dtype(x, out_dtype), None if step is None else float(step)
    if not use_triton(x):
        return binary_conv2d_ref(x, packed, stride=stride, padding=padding, bias=bias, step=step, out_dtype=out_dtype)
    product = _Product(packed, stride, padding, step)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling():
        return _conv2d_op(*product.arguments(x, bias, out_dtype, wants_grad))
    if wants_grad or transformed():
        return ProductFn.apply(x, bias, product, out_dtype)
    return product.run(x, bias, out_dtype)  # without the microseconds that autograd costs


class _Product(NamedTuple):
    """What `ProductFn` differentiates."""

    packed: PackedWeight
    stride: int
    padding: int
    step: float | None

    def arguments(self, x, bias, out_dtype, wants_grad=False):
        """Those of `_launch`; the gradient within torch.compile needs the dense words too."""
        packed, stride, padding, step = self
        precise = dense_is_precise(x.dtype, out_dtype)
        left_to_cudnn = precise and not tune.enabled() and dense_wins(x, packed, stride, padding)
        words, sums = (None, None) if left_to_cudnn else conv_operands(x, packed)
        may_be_dense = left_to_cudnn or wants_grad or (precise and tune.enabled())
        dense = packed.operand("pair") if may_be_dense else None
        return (
            x, words, dense, packed.scale, bias, sums, step or 1.0, packed.shape, packed.kind == "ternary", stride,
            padding, out_dtype,
        )  # fmt: skip

    def run(self, x, bias, out_dtype):
        return _launch(*self.arguments(x, bias, out_dtype))

    def transposed(self, d_y, size):
        packed = self.packed
        with plain_tensors():
            dense = packed.operand("pair")
            weight = unpack_dense(dense, None, packed.n, packed.k, packed.kind == "ternary", d_y.dtype)
        return _transposed(d_y, weight.view(packed.shape), size, self.stride, self.padding)


def dense_wins(x: Tensor, packed: PackedWeight, stride: int, padding: int) -> bool:
    """Whether to unpack the weights and leave a convolution with a bf16 y to cuDNN, unless the tuner decides.

    It wins for bf16 with a few input channels, of which the kernel pads each tap to 32; and with so many output
    positions that tensor cores are the limit of both: then reading fewer bytes of weights gains nothing. Codes stay
    (torch has no dense product of int8 images), fp32 too, which cuDNN multiplies on slow units or rounds to TF32, and
    fp16, in which scaled weights could underflow.
    """
    if x.dtype != torch.bfloat16:
        return False
    oh, ow = output_size(x.shape[2:], packed.shape[2:], stride, padding)
    return x.shape[1] <= CHANNELS // 4 or x.shape[0] * oh * ow >= DENSE_POSITIONS
