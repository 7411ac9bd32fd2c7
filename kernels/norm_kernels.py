"""Triton kernels of norm_neuron.py and their launchers.

statistics, finish      mean and variance of x[t] for all steps at once: one read of x
bn fire                 normalise, fire, reset, for all steps at once: one read of x, one write of the spikes
mem step                Mem-BN: fire step t - 1 and charge step t in one pass, with the statistics of step t
backward                two passes (sums, then gradients) that recompute everything from the input

p (6, T, C)             leak, threshold, alpha, beta, weight, bias in fp32; partial (slots, programs, T, C) sums
"""

import torch

from .dispatch import LAUNCH, tl, triton
from .neuron_kernels import _neuron_step, _spike_codes
from .steps import (
    _store_sum,
    _tile,
    channel_blocks,
    empty_like_steps,
    programs,
    tile_elements,
    tiling,
)

FINISH = (128, 16)  # rows of partial sums, and channels, that a program of the finish reads at a time
MAX_STEPS = 5  # steps per launch, as in neuron.py, but here each step needs twice the registers


@triton.jit
def _row(p_ptr, slot, t, channel, C, T: tl.constexpr):
    """p[slot, t] of p (slots, T, C) at the tile's channels."""
    return tl.load(p_ptr + (slot * T + t) * C + channel, mask=channel < C, other=0)


@triton.jit
def _add_number(n, mean, m2, x, mask):
    """One more number for the count, mean and sum of squared distances of each lane (Welford)."""
    n += tl.where(mask, 1.0, 0.0)
    d = x - mean
    mean += tl.where(mask, d / tl.maximum(n, 1.0), 0.0)
    m2 += tl.where(mask, d * (x - mean), 0.0)
    return n, mean, m2


@triton.jit
def _add_lanes(n, mean, m2, axis: tl.constexpr):
    """Count, mean and sum of squared distances of all lanes along `axis` together (Chan et al.)."""
    total = tl.sum(n, axis=axis)
    share = n / tl.expand_dims(tl.maximum(total, 1.0), axis)
    middle = tl.sum(share * mean, axis=axis)
    d = mean - tl.expand_dims(middle, axis)
    rest = tl.sum(share * d, axis=axis)  # what rounding left, where means are large
    return total, middle + rest, tl.sum(m2 + n * d * d, axis=axis) - total * rest * rest


@triton.jit
def _store_lanes(ptr, n, mean, m2, t, C, T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, LAST: tl.constexpr):
    """Merge the tile over positions into this program's row of partial statistics (3, programs, T, C)."""
    n, mean, m2 = _add_lanes(n, mean, m2, 0 if LAST else 1)
    channel = tl.program_id(1) * (Y if LAST else X) + tl.arange(0, Y if LAST else X)
    size = tl.num_programs(0) * T * C
    at = ptr + (tl.program_id(0) * T + t) * C + channel
    tl.store(at, n, mask=channel < C)
    tl.store(at + size, mean, mask=channel < C)
    tl.store(at + 2 * size, m2, mask=channel < C)


@triton.jit
def _statistics_kernel(
    x_ptr, partial_ptr, A, C, B, tiles, stride_t,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared distances of what each program sees, for `_finish_kernel`.

    No sum of squares is ever taken about anything but the mean of its own numbers: so neither large means nor outliers
    cost digits.
    """
    t = tl.program_id(2)
    x_ptr += t * tl.cast(stride_t, tl.int64)
    n, mean, m2 = (tl.zeros((X, Y), tl.float32), tl.zeros((X, Y), tl.float32), tl.zeros((X, Y), tl.float32))
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets, mask, channel = _tile(i, A, C, B, X, Y, CHANNELS_LAST)
        n, mean, m2 = _add_number(n, mean, m2, tl.load(x_ptr + offsets, mask=mask, other=0).to(tl.float32), mask)
    _store_lanes(partial_ptr, n, mean, m2, t, C, T, X, Y, CHANNELS_LAST)


@triton.jit
def _finish_kernel(
    partial_ptr, mean_ptr, var_ptr, rows, count, C, T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial statistics (3, rows, T, C) -> mean and variance (T, C), ROWS rows at a time."""
    t = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    size = rows * T * C
    n, mean, m2 = (
        tl.zeros((ROWS, BLOCK), tl.float32),
        tl.zeros((ROWS, BLOCK), tl.float32),
        tl.zeros((ROWS, BLOCK), tl.float32),
    )
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & mask[None, :]
        at = partial_ptr + (row * T + t) * C + channel[None, :]
        more = tl.load(at, mask=inside, other=0)
        d = tl.load(at + size, mask=inside, other=0) - mean
        both = n + more
        share = more / tl.maximum(both, 1.0)
        mean += tl.where(more > 0, d * share, 0.0)
        m2 += tl.load(at + 2 * size, mask=inside, other=0) + tl.where(more > 0, d * d * n * share, 0.0)
        n = both
    n, mean_of_all, m2_of_all = _add_lanes(n, mean, m2, 0)
    tl.store(mean_ptr + t * C + channel, mean_of_all, mask=mask)
    tl.store(
        var_ptr + t * C + channel, tl.maximum(m2_of_all, 0.0, propagate_nan=tl.PropagateNan.ALL) / count, mask=mask
    )


@triton.jit
def _bn_fire_kernel(
    x_ptr, v_ptr, p_ptr, mean_ptr, var_ptr, spikes_ptr, v_out_ptr, A, C, B, stride_t, eps, inv_step, step,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    offsets, mask, channel = _tile(tl.program_id(0), A, C, B, X, Y, CHANNELS_LAST)
    size = tl.cast(A, tl.int64) * C * B
    xs = ()
    for t in tl.static_range(T):
        xs = xs + (tl.load(x_ptr + t * tl.cast(stride_t, tl.int64) + offsets, mask=mask, other=0),)
    v = tl.zeros((X, Y), tl.float32)
    if v_ptr is not None:
        v = tl.load(v_ptr + offsets, mask=mask, other=0).to(tl.float32)
    for t in tl.static_range(T):
        rstd = tl.rsqrt(_row(var_ptr, 0, t, channel, C, T) + eps)
        current = (xs[t].to(tl.float32) - _row(mean_ptr, 0, t, channel, C, T)) * rstd
        current = current * _row(p_ptr, 4, t, channel, C, T) + _row(p_ptr, 5, t, channel, C, T)
        leak, threshold = _row(p_ptr, 0, t, channel, C, T), _row(p_ptr, 1, t, channel, C, T)
        m, mh, s = _neuron_step(current, v, leak, threshold, 0.0, 0.0, False, False)
        v = mh - s
        if BITS:
            s = _spike_codes(s, inv_step, BITS) * step
        tl.store(spikes_ptr + t * size + offsets, s.to(spikes_ptr.dtype.element_ty), mask=mask)
    tl.store(v_out_ptr + offsets, v, mask=mask)


@triton.jit
def _mem_fire(m, p_ptr, mean_ptr, var_ptr, t, channel, C, eps, T: tl.constexpr):
    """(v, s) of step t from m."""
    rstd = tl.rsqrt(_row(var_ptr, 0, t, channel, C, T) + eps)
    normed = (m - _row(mean_ptr, 0, t, channel, C, T)) * rstd
    normed = normed * _row(p_ptr, 4, t, channel, C, T) + _row(p_ptr, 5, t, channel, C, T)
    mh = _row(p_ptr, 2, t, channel, C, T) * m + _row(p_ptr, 3, t, channel, C, T) * normed
    s = tl.maximum(mh - _row(p_ptr, 1, t, channel, C, T), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mh - s, s


@triton.jit(do_not_specialize=["t"])
def _mem_step_kernel(
    current_ptr, v_ptr, m_ptr, p_ptr, mean_ptr, var_ptr, spikes_ptr, v_out_ptr, m_out_ptr, partial_ptr,
    A, C, B, tiles, t, eps, inv_step, step,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Fires step t - 1 from m (unless m is None), then charges step t (unless m_out is None) and sums its statistics.

    One pass serves both, because m[t] needs only the same element of v[t - 1]: each step reads m and I once.
    """
    n, mean, m2 = (tl.zeros((X, Y), tl.float32), tl.zeros((X, Y), tl.float32), tl.zeros((X, Y), tl.float32))
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets, mask, channel = _tile(i, A, C, B, X, Y, CHANNELS_LAST)
        v = tl.zeros((X, Y), tl.float32)
        if m_ptr is not None:  # all loads first: behind a store the compiler could not move them up
            m = tl.load(m_ptr + offsets, mask=mask, other=0)
        elif v_ptr is not None:
            v = tl.load(v_ptr + offsets, mask=mask, other=0).to(tl.float32)
        if m_out_ptr is not None:
            current = tl.load(current_ptr + offsets, mask=mask, other=0).to(tl.float32)
        if m_ptr is not None:
            v, s = _mem_fire(m, p_ptr, mean_ptr, var_ptr, t - 1, channel, C, eps, T)
            if BITS:
                s = _spike_codes(s, inv_step, BITS) * step
            tl.store(spikes_ptr + offsets, s.to(spikes_ptr.dtype.element_ty), mask=mask)
        if m_out_ptr is not None:
            m = _row(p_ptr, 0, t, channel, C, T) * v + current
            tl.store(m_out_ptr + offsets, m, mask=mask)
            n, mean, m2 = _add_number(n, mean, m2, m, mask)
        else:
            tl.store(v_out_ptr + offsets, v, mask=mask)
    if m_out_ptr is not None:
        _store_lanes(partial_ptr, n, mean, m2, 0, C, 1, X, Y, CHANNELS_LAST)


@triton.jit
def _norm_backward_kernel(
    d_spikes_ptr, d_v_out_ptr, x_ptr, v_ptr, p_ptr, mean_ptr, var_ptr, means_ptr, d_x_ptr, d_v_ptr, partial_ptr,
    A, C, B, tiles, stride_t, stride_dt, eps, top,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    MEM: tl.constexpr, DETACH: tl.constexpr, APPLY: tl.constexpr,
):  # fmt: skip
    """Two passes over the input and the gradient of the spikes, all else recomputed.

    APPLY False: sums of d_mh, d_mh * normalised input (and of d_threshold where it is not the negative of the first).
    APPLY True: with their means over the batch, d_x, and the sums of d_leak.
    top: spikes above it pass no gradient on, or None.
    """
    size = tl.cast(A, tl.int64) * C * B
    P: tl.constexpr = 1 if APPLY else (2 if DETACH else 3)
    sums = ()
    for k in tl.static_range(P * T):  # noqa: B007
        sums = sums + (tl.zeros((X, Y), tl.float32),)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets, mask, channel = _tile(i, A, C, B, X, Y, CHANNELS_LAST)
        xs = ()
        d_spikes = ()
        for t in tl.static_range(T):
            x = tl.load(x_ptr + t * tl.cast(stride_t, tl.int64) + offsets, mask=mask, other=0)
            d_s = tl.load(d_spikes_ptr + t * tl.cast(stride_dt, tl.int64) + offsets, mask=mask, other=0)
            xs = xs + (x,)
            d_spikes = d_spikes + (d_s,)
        v_start = tl.zeros((X, Y), tl.float32)
        if v_ptr is not None:
            v_start = tl.load(v_ptr + offsets, mask=mask, other=0).to(tl.float32)
        v = v_start
        mhs = ()
        for t in tl.static_range(T):
            leak, weight, bias = (
                _row(p_ptr, 0, t, channel, C, T), _row(p_ptr, 4, t, channel, C, T), _row(p_ptr, 5, t, channel, C, T)
            )  # fmt: skip
            y = xs[t].to(tl.float32)
            if MEM:
                y = leak * v + y
            rstd = tl.rsqrt(_row(var_ptr, 0, t, channel, C, T) + eps)
            normed = (y - _row(mean_ptr, 0, t, channel, C, T)) * rstd * weight + bias
            mh = leak * v + normed
            if MEM:
                mh = _row(p_ptr, 2, t, channel, C, T) * y + _row(p_ptr, 3, t, channel, C, T) * normed
            mhs = mhs + (mh,)
            v = mh - tl.maximum(mh - _row(p_ptr, 1, t, channel, C, T), 0.0)
        d_v = tl.zeros((X, Y), tl.float32)
        if d_v_out_ptr is not None:
            d_v = tl.load(d_v_out_ptr + offsets, mask=mask, other=0)
        new = ()
        for t in tl.static_range(T - 1, -1, -1):
            leak = _row(p_ptr, 0, t, channel, C, T)
            s = mhs[t] - _row(p_ptr, 1, t, channel, C, T)
            d_s = d_spikes[t].to(tl.float32)
            if top is not None:
                d_s = tl.where(s <= top, d_s, 0.0)
            d_mh = tl.where(s > 0, d_s, d_v)
            v = v_start
            if t > 0:
                v = mhs[t - 1] - tl.maximum(mhs[t - 1] - _row(p_ptr, 1, t - 1, channel, C, T), 0.0)
            y = xs[t].to(tl.float32)
            if MEM:
                y = leak * v + y
            rstd = tl.rsqrt(_row(var_ptr, 0, t, channel, C, T) + eps)
            hat = (y - _row(mean_ptr, 0, t, channel, C, T)) * rstd
            d_m = d_mh
            if APPLY:
                inner = d_mh - _row(means_ptr, 0, t, channel, C, T) - hat * _row(means_ptr, 1, t, channel, C, T)
                d_x = _row(p_ptr, 4, t, channel, C, T) * rstd * inner
                if MEM:
                    d_x = _row(p_ptr, 2, t, channel, C, T) * d_mh + _row(p_ptr, 3, t, channel, C, T) * d_x
                    d_m = d_x
                new = (tl.where(mask, d_m * v, 0.0),) + new
                tl.store(d_x_ptr + t * size + offsets, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
            elif DETACH:
                new = (d_mh, d_mh * hat) + new
            else:
                new = (d_mh, d_mh * hat, tl.where(s > 0, d_v - d_s, 0.0)) + new
            if not DETACH:
                d_v = d_m * leak
        if APPLY and d_v_ptr is not None:
            tl.store(d_v_ptr + offsets, d_v, mask=mask)
        added = ()
        for k in tl.static_range(P * T):
            added = added + (sums[k] + new[k],)
        sums = added
    for t in tl.static_range(T):
        for slot in tl.static_range(P):
            _store_sum(partial_ptr, slot, t, sums[P * t + slot], C, T, X, Y, CHANNELS_LAST)


def _finish(partial, count, mean, var):
    """Mean and variance of each step and channel from the partial statistics, on the device."""
    _, rows, T, C = partial.shape
    _finish_kernel[(triton.cdiv(C, FINISH[1]), T)](
        partial, mean, var, rows, float(count), C, T=T, ROWS=FINISH[0], BLOCK=FINISH[1], **LAUNCH
    )  # fmt: skip


def _tiles(x, sums):
    view, tile, tiles = tiling(x, True, min(4 * 128, tile_elements(x, sums)))  # each element brings six parameters
    blocks = channel_blocks(view, tile)
    return view, tile, tiles, blocks, programs(tiles, blocks, x.device)


def _statistics_tiles(x):
    """The same without parameters, all steps side by side."""
    view, tile, tiles = tiling(x, True, tile_elements(x[:1], 2))
    blocks = channel_blocks(view, tile)
    return view, tile, tiles, blocks, programs(tiles, blocks * len(x), x.device)


def launch_statistics(x):
    T, _, C = x.shape[:3]
    view, tile, tiles, blocks, rows = _statistics_tiles(x)
    mean, var = (x.new_empty((T, C), dtype=torch.float32) for _ in range(2))
    partial = x.new_empty((3, rows, T, C), dtype=torch.float32)
    _statistics_kernel[(rows, blocks, T)](x, partial, *view, tiles, x.stride(0), T=T, **tile, **LAUNCH)
    _finish(partial, x[0, :, 0].numel(), mean, var)
    return mean, var


def launch_bn(x, v, p, eps, bits, step, stats=None):
    """(spikes, v, mean, var); with `stats`, (mean, var), without a pass for them."""
    T = len(x)
    mean, var = launch_statistics(x) if stats is None else stats
    spikes = empty_like_steps(x, x.dtype)
    v_out = empty_like_steps(x, torch.float32, one_step=True)
    view, tile, tiles, blocks, _ = _tiles(x, 1)
    _bn_fire_kernel[(tiles, blocks)](
        x, v, p, mean, var, spikes, v_out, *view, x.stride(0), eps, 1 / step, step, T=T, **tile, BITS=bits, **LAUNCH
    )  # fmt: skip
    return spikes, v_out, mean, var


def launch_mem_bn(current, v, p, eps, bits, step, stats=None):
    """(spikes, v, mean, var); with `stats`, (mean, var) instead of those of m."""
    T, _, C = current.shape[:3]
    view, tile, tiles, blocks, rows = _tiles(current[:1], 24)  # m, v and their sums in fp32, all parameters twice
    mean, var = stats or (current.new_empty((T, C), dtype=torch.float32) for _ in range(2))
    partial = current.new_empty((3, rows, 1, C), dtype=torch.float32)
    spikes = empty_like_steps(current, current.dtype)
    v_out, m, m_next = (empty_like_steps(current, torch.float32, one_step=True) for _ in range(3))
    for t in range(T + 1):
        _mem_step_kernel[(rows, blocks)](
            current[t] if t < T else None, v, m if t else None, p, mean, var, spikes[t - 1] if t else None,
            None if t < T else v_out, m_next if t < T else None, partial, *view, tiles, t, eps, 1 / step, step,
            T=T, **tile, BITS=bits, **LAUNCH,
        )  # fmt: skip
        if t < T and stats is None:
            _finish(partial, current[t, :, 0].numel(), mean[t], var[t])
        m, m_next = m_next, m
    return spikes, v_out, mean, var


def launch_backward(d_spikes, d_v_out, x, v, p, mean, var, eps, top, mem, detach):
    """(d_x, d_v or None, d_leak (T, C), sums (2 or 3, T, C)), the sums as described in the kernel."""
    T, _, C = x.shape[:3]
    d_x = empty_like_steps(x, x.dtype)
    d_v = None if v is None or detach else empty_like_steps(x, torch.float32, one_step=True)
    means, result = None, []
    for apply, slots in ((False, 2 if detach else 3), (True, 1)):
        view, tile, tiles, blocks, rows = _tiles(x, 4)
        partial = x.new_empty((slots, rows, T, C), dtype=torch.float32)
        _norm_backward_kernel[(rows, blocks)](
            d_spikes, d_v_out, x, v, p, mean, var, means, d_x if apply else None, d_v if apply else None, partial,
            *view, tiles, x.stride(0), d_spikes.stride(0), eps, top, T=T, **tile, MEM=mem, DETACH=detach, APPLY=apply,
            enable_fp_fusion=True,  # nothing is rounded to codes here, and without it registers spill
        )  # fmt: skip
        result.append(partial.sum(1))
        means = result[0][:2] / x[0, :, 0].numel()
    return d_x, d_v, result[1][0], result[0]
