"""Convolution with packed weights and T steps of a spiking neuron behind it, in one launch; inference.

    I[t] = scale * conv2d(x[t], sign) + bias + residual[t]      scale and bias may hold a folded batch normalisation
    spikes, v = neuron_update(I, v, leak, threshold, gain, shift, bits, step)

    x                (T, N, C, H, W)       fp32 | fp16 | bf16, or uint8 | int8 codes, value = code * in_step
    words            as in conv.py
    scale, bias      (O,)
    residual         (T, N, O, OH, OW)
    v                (N, O, OH, OW)        None = 0; computed and returned in fp32
    leak, threshold  (T,) or (T, O)
    gain, shift      (T, O)                folded Mem-BN
    spikes           (T, N, O, OH, OW)     dtype of x (fp32 for codes), or uint8 codes       arXiv 2410.07547, sec. 4

A tile holds up to 8 time steps of the same pixels, step after step: weights are unpacked once for all of them, and the
currents never leave registers. Where T is not 1, 2, 4 or 8, steps are taken in groups of the largest of these that
divides it, one group after the other in the same launch, with v in registers in between. Where tiles are too few for
the GPU, the sum over K is split among programs, and the last to finish a tile goes through the time steps.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import tune
from .conv import binary_conv2d_ref
from .conv_tiles import (
    TILES,
    check_conv,
    check_like,
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
from .dispatch import LAUNCHES, OPS, device_facts, tl, transformed, triton, use_triton
from .neuron import check_neuron, neuron_update_ref
from .neuron_kernels import _neuron_step, _spike_codes
from .pack import PackedWeight
from .products import gather, is_last, park, split_buffers
from .steps import _parameter

MAX_STEPS = 8  # time steps in one tile: more would leave each fewer pixels than an instruction needs


def binary_conv2d_neuron_ref(
    x: Tensor,
    packed: PackedWeight,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    bits: int | None = None,
    step: float = 0.25,
    in_step: float | None = None,
    codes: bool = False,
    parallel: bool = False,
    return_current: bool = False,
    return_v: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The definition of `binary_conv2d_neuron` in plain torch: `binary_conv2d_ref`, then `neuron_update_ref`.

    In fp32 throughout (fp64 for an fp64 x); only what is returned is rounded to the dtype of the result.

    >>> half, packed = torch.full((2,), 0.5), pack(torch.ones(1, 1, 1, 1))
    >>> binary_conv2d_neuron_ref(torch.ones(2, 1, 1, 1, 1), packed, None, half, half)[0].flatten()
    tensor([0.5000, 0.7500])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    out_dtype = result_dtype(x, out_dtype)
    folded = x.flatten(0, 1)  # (T N) C H W
    current = binary_conv2d_ref(
        folded, packed, stride=stride, padding=padding, bias=bias, step=in_step, out_dtype=dtype
    ).unflatten(0, x.shape[:2])
    if residual is not None:
        current = current + residual.to(dtype)
    spikes, v = neuron_update_ref(
        current, v, leak, threshold, gain=gain, shift=shift, bits=bits, step=step, codes=codes, parallel=parallel,
        return_v=return_v,
    )  # fmt: skip
    spikes = spikes if codes else spikes.to(out_dtype)
    return (spikes, v, current.to(out_dtype)) if return_current else (spikes, v)


@triton.jit
def split_steps(x, LOG_STEPS: tl.constexpr):
    """(ROWS, steps * PIXELS), step after step, into one (ROWS, PIXELS) for each step: a tuple."""
    parts = (x,)
    for level in tl.static_range(LOG_STEPS):
        halves = ()
        for i in tl.static_range(1 << level):
            pair = tl.reshape(parts[i], (parts[i].shape[0], 2, parts[i].shape[1] // 2))
            first, second = tl.split(tl.permute(pair, (0, 2, 1)))
            halves = halves + (first, second)
        parts = halves
    return parts


@triton.jit
def _fire(
    acc, v, t0, at, offsets, mask, size, rows, OUT, scale_ptr, bias_ptr, sums_ptr, residual_ptr, leak_ptr,
    threshold_ptr, gain_ptr, shift_ptr, spikes_ptr, current_ptr, in_step, step, inv_step,
    X: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, TERNARY: tl.constexpr, LOG_STEPS: tl.constexpr,
    LEAK_C: tl.constexpr, THRESHOLD_C: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """The steps from t0 on whose sums are in acc: stores spikes and current, returns the new v (ROWS, PIXELS)."""
    FOLDED: tl.constexpr = gain_ptr is not None
    channel = rows[:, None]
    currents = split_steps(
        current_tile(acc, scale_ptr, bias_ptr, sums_ptr, in_step, rows, OUT, X, TAPS, C, TERNARY), LOG_STEPS
    )
    leak, gain, shift = 0.0, 0.0, 0.0
    for i in tl.static_range(1 << LOG_STEPS):
        t = t0 + i
        current = currents[i]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + (at + t * size) + offsets, mask=mask, other=0)
            current += tl.trans(residual.to(tl.float32))
        if current_ptr is not None:
            current_out = tl.trans(current).to(current_ptr.dtype.element_ty)
            tl.store(current_ptr + (at + t * size) + offsets, current_out, mask=mask)
        threshold = _parameter(threshold_ptr, t, channel, OUT, THRESHOLD_C)
        if not PARALLEL:
            leak = _parameter(leak_ptr, t, channel, OUT, LEAK_C)
        if FOLDED:
            gain = _parameter(gain_ptr, t, channel, OUT, True)
            shift = _parameter(shift_ptr, t, channel, OUT, True)
        _, mh, s = _neuron_step(current, v, leak, threshold, gain, shift, FOLDED, PARALLEL)
        v = mh - s
        if BITS:
            s = _spike_codes(s, inv_step, BITS)
            if not CODES:
                s = s * step
        tl.store(spikes_ptr + (at + t * size) + offsets, tl.trans(s).to(spikes_ptr.dtype.element_ty), mask=mask)
    return v


@triton.jit
def _binary_conv2d_neuron_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    bias_ptr,
    sums_ptr,
    residual_ptr,
    v_ptr,
    leak_ptr,
    threshold_ptr,
    gain_ptr,
    shift_ptr,
    spikes_ptr,
    v_out_ptr,
    current_ptr,
    partial_ptr,  # tiles, groups of steps, splits, ROWS, COLUMNS or None
    arrived_ptr,  # tiles, zero, or None
    in_step,
    step,
    inv_step,
    OUT,
    N,
    P,
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
    T: tl.constexpr,
    LOG_STEPS: tl.constexpr,
    LEAK_C: tl.constexpr,
    THRESHOLD_C: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    PARALLEL: tl.constexpr,
):
    X: tl.constexpr = x_ptr.dtype.element_ty
    STEPS: tl.constexpr = 1 << LOG_STEPS
    PIXELS: tl.constexpr = COLUMNS // STEPS
    tile = tl.program_id(0)
    tiles = tl.cdiv(OUT, ROWS)
    first = tile % tiles * ROWS
    rows = first + tl.arange(0, ROWS)
    start = tile // tiles * PIXELS
    j = tl.arange(0, COLUMNS)
    image, row, column = output_position(tl.minimum(start + j % PIXELS, P - 1), OH, OW)
    alone = True
    if SPLIT:
        for t0 in range(0, T, STEPS):
            acc = conv_tile(
                x_ptr, words_ptr, (t0 + j // PIXELS) * tl.cast(N, tl.int64) + image, row, column, first, H, W, stride_w,
                C, KH, KW, STRIDE, PADDING, TERNARY, TERMS, SPLIT, ROWS, COLUMNS, BLOCK,
            )  # fmt: skip
            park(acc, partial_ptr, tile * (T // STEPS) + t0 // STEPS)
        alone = is_last(arrived_ptr, tile)
    if alone:
        p = start + tl.arange(0, PIXELS)
        mask = (p < P)[:, None] & (rows < OUT)[None, :]
        # (PIXELS, ROWS): stores run along the channels. int64 where 2^31 may be exceeded, int32 within the tile.
        at = tl.cast(start, tl.int64) * OUT + first
        offsets = (p - start)[:, None] * OUT + (rows - first)[None, :]
        size = tl.cast(P, tl.int64) * OUT  # of one time step
        v = tl.zeros((ROWS, PIXELS), tl.float32)
        if v_ptr is not None:
            v = tl.trans(tl.load(v_ptr + at + offsets, mask=mask, other=0).to(tl.float32))
        for t0 in range(0, T, STEPS):
            if SPLIT:
                acc = gather(partial_ptr, tile * (T // STEPS) + t0 // STEPS, ROWS, COLUMNS)
            else:
                acc = conv_tile(
                    x_ptr, words_ptr, (t0 + j // PIXELS) * tl.cast(N, tl.int64) + image, row, column, first, H, W,
                    stride_w, C, KH, KW, STRIDE, PADDING, TERNARY, TERMS, SPLIT, ROWS, COLUMNS, BLOCK,
                )  # fmt: skip
            v = _fire(
                acc, v, t0, at, offsets, mask, size, rows, OUT, scale_ptr, bias_ptr, sums_ptr, residual_ptr, leak_ptr,
                threshold_ptr, gain_ptr, shift_ptr, spikes_ptr, current_ptr, in_step, step, inv_step,
                X, KH * KW, C, TERNARY, LOG_STEPS, LEAK_C, THRESHOLD_C, BITS, CODES, PARALLEL,
            )  # fmt: skip
        if v_out_ptr is not None:
            tl.store(v_out_ptr + at + offsets, tl.trans(v), mask=mask)


def _launch(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sums: Tensor | None,
    residual: Tensor | None,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    in_step: float,
    shape: Sequence[int],
    ternary: bool,
    stride: int,
    padding: int,
    bits: int,
    step: float,
    codes: bool,
    parallel: bool,
    return_current: bool,
    return_v: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, v, current), the last two empty where they are not wanted; `bits` is 0 for no quantiser."""
    spikes, v_out, current = _outputs(x, shape, stride, padding, codes, return_current, return_v, out_dtype)
    t, n, o, oh, ow = spikes.shape
    p = n * oh * ow
    if p == 0:
        return spikes, v_out, current
    x = _fold(x)
    leak = None if parallel else leak
    parameters = [None if a is None else a.contiguous() for a in (leak, threshold, gain, shift)]
    operands = (
        x, words, scale.contiguous(), None if bias is None else bias.contiguous(), sums,
        None if residual is None else _fold(residual),
        None if v is None or parallel else v.contiguous(memory_format=torch.channels_last), *parameters,
        spikes, v_out if return_v else None, current if return_current else None,
    )  # fmt: skip
    scalars = (in_step, step, 1 / step, o, n, p, *x.shape[2:], oh, ow, words.shape[1])
    of_neuron = neuron_constants(t, leak, threshold, bits, codes, parallel)
    columns, itemsize = p * math.gcd(t, MAX_STEPS), x.element_size()

    def run(plan):
        tiles = count_tiles(plan.tile, o, columns)
        numbers = plan.tile.rows * plan.tile.columns * (t // math.gcd(t, MAX_STEPS))
        buffers = split_buffers(plan.splits, tiles, numbers, x)
        LAUNCHES["binary_conv2d_neuron"] += 1
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors are on
            _binary_conv2d_neuron_kernel[(tiles, plan.splits)](
                *operands, *buffers, *scalars, **constants(itemsize, shape, ternary, stride, padding, plan), **of_neuron
            )

    # v, current and residual of a step are live at once: for more pixels of a step, or groups of steps, a large tile
    # would not leave them enough registers, nor would four loads in flight on sm_89, or four warps of fp32 on sm_120
    tiles = TILES[itemsize]
    if t not in (4, 8) or itemsize == 4:
        tiles = (tiles[-1]._replace(stages=3, warps=8 if itemsize == 4 else 4),)
    tile = pick_tile(itemsize, o, columns) if len(tiles) > 1 else tiles[0]
    processors, _ = device_facts(x.device)
    plan = split_plan(tile, itemsize, shape, columns, processors)
    if tune.enabled():
        bucket = triton.next_power_of_2(columns)
        plans = partial(tile_plans, tiles, itemsize, shape, bucket, processors)
        key = ("binary_conv2d_neuron", x.dtype, t, *shape, ternary, stride, padding, bucket)
        plan = tune.fastest(key, x.device, plans, run, plan)
    run(plan)
    return spikes, v_out, current


_conv2d_neuron_op = torch.library.custom_op(f"{OPS}::binary_conv2d_neuron", _launch, mutates_args=())


@_conv2d_neuron_op.register_fake
def _(
    x, words, scale, bias, sums, residual, v, leak, threshold, gain, shift, in_step, shape, ternary, stride, padding,
    bits, step, codes, parallel, return_current, return_v, out_dtype,
):  # fmt: skip
    return _outputs(x, shape, stride, padding, codes, return_current, return_v, out_dtype)


def _outputs(x, shape, stride, padding, codes, return_current, return_v, out_dtype):
    t, n = x.shape[:2]
    size = shape[0], *output_size(x.shape[3:], shape[2:], stride, padding)

    def empty(images, dtype):
        return torch.empty((images, *size), dtype=dtype, device=x.device, memory_format=torch.channels_last)

    spikes = empty(t * n, torch.uint8 if codes else out_dtype).unflatten(0, (t, n))
    v_out = empty(n, torch.float32) if return_v else x.new_empty(0, dtype=torch.float32)
    current = empty(t * n, out_dtype).unflatten(0, (t, n)) if return_current else x.new_empty(0, dtype=out_dtype)
    return spikes, v_out, current


def neuron_constants(t: int, leak, threshold, bits: int, codes: bool, parallel: bool) -> dict:
    """What the kernel is compiled for beyond the constants of the convolution."""
    return {
        "T": t, "LOG_STEPS": math.gcd(t, MAX_STEPS).bit_length() - 1, "LEAK_C": leak is not None and leak.ndim == 2,
        "THRESHOLD_C": threshold.ndim == 2, "BITS": bits, "CODES": codes, "PARALLEL": parallel,
    }  # fmt: skip


def _fold(x):
    """(T, N, C, H, W) as (T N, C, H, W), channels_last; a view where it lies so already."""
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def binary_conv2d_neuron(
    x: Tensor,
    packed: PackedWeight,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    bits: int | None = None,
    step: float = 0.25,
    in_step: float | None = None,
    codes: bool = False,
    parallel: bool = False,
    return_current: bool = False,
    return_v: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Packed convolution, folded normalisation, residual and T neuron steps in one launch: (spikes, v[, current]).

    I[t] = scale * conv2d(x[t], sign) + bias + residual[t] in fp32, then `neuron_update(I, v, leak, threshold, ...)`;
    see there for gain, shift, bits, step, codes and parallel, and `binary_conv2d` for the convolution and precision.
    x (T, N, C, H, W) may hold codes (uint8, int8) of value code * in_step. `codes=True` returns spikes as the uint8
    codes that the next layer reads; up to 7 bits it reads them faster as `spikes.view(torch.int8)`.
    `return_current=True` also returns I, which a pre-activation block needs as its next residual. Spikes and current
    have the dtype of x (fp32 for codes) unless `out_dtype` names another; v is fp32, but a parallel neuron returns it
    as given, and with `return_v=False` it is not written and None. channels_last x and residual are read as they are,
    other layouts are converted first; what the kernel returns is channels_last.

    Inference only: raises ValueError where autograd would record it, and for shapes, dtypes or devices that do not fit.

    >>> codes, half = torch.full((2, 1, 1, 1, 1), 4, dtype=torch.uint8), torch.full((2,), 0.5)  # T = 2; four are 1.0
    >>> packed = pack(torch.ones(1, 1, 1, 1))
    >>> spikes, v = binary_conv2d_neuron(codes, packed, None, half, half, in_step=0.25, bits=4, codes=True)
    >>> spikes.flatten().tolist(), v.flatten().tolist()
    ([2, 3], [0.5])
    """
    check_conv(x, packed, stride=stride, padding=padding, bias=bias, step=in_step, out_dtype=out_dtype, steps=True)
    output = (*x.shape[:2], packed.shape[0], *output_size(x.shape[3:], packed.shape[2:], stride, padding))
    check_neuron(
        output, x.device, v, leak, threshold, gain=gain, shift=shift, bits=bits, step=step, codes=codes,
        parallel=parallel,
    )  # fmt: skip
    check_like(x, output, residual=residual)
    tensors = (x, packed.scale, bias, residual, v, leak, threshold, gain, shift)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in tensors):
        raise ValueError("binary_conv2d_neuron is for inference and has no gradient: call it under torch.no_grad()")
    if transformed():
        raise NotImplementedError(
            "binary_conv2d_neuron knows neither torch.func nor forward-mode AD: use binary_conv2d and neuron_update"
        )
    step, in_step = float(step), None if in_step is None else float(in_step)
    if not use_triton(x):
        return binary_conv2d_neuron_ref(
            x, packed, v, leak, threshold, stride=stride, padding=padding, bias=bias, residual=residual, gain=gain,
            shift=shift, bits=bits, step=step, in_step=in_step, codes=codes, parallel=parallel,
            return_current=return_current, return_v=return_v, out_dtype=out_dtype,
        )  # fmt: skip
    words, sums = conv_operands(x, packed)
    run = _conv2d_neuron_op if torch.compiler.is_compiling() else _launch  # the operator costs microseconds
    spikes, v_out, current = run(
        x, words, packed.scale, bias, sums, residual, v, leak, threshold, gain, shift,
        1.0 if in_step is None else in_step, packed.shape, packed.kind == "ternary", stride, padding, bits or 0, step,
        codes, parallel, return_current, return_v and not parallel, result_dtype(x, out_dtype),
    )  # fmt: skip
    v_out = None if not return_v else v if parallel else v_out
    return (spikes, v_out, current) if return_current else (spikes, v_out)
