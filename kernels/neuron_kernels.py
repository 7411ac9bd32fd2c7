"""Triton kernels of neuron.py, and one step of the neuron on registers, which the other neuron kernels use too."""

from .dispatch import tl, triton
from .steps import _parameter, _store_sum, _tile


@triton.jit
def _neuron_step(current, v, leak, threshold, gain, shift, FOLDED: tl.constexpr, PARALLEL: tl.constexpr):
    """`neuron_step` on registers; returns (m, mh, s), the new v being mh - s."""
    m = current
    if not PARALLEL:
        m = leak * v + current
    mh = m
    if FOLDED:
        mh = gain * m + shift
    return m, mh, tl.maximum(mh - threshold, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _spike_codes(s, inv_step, BITS: tl.constexpr):
    """`spike_codes` on registers, for s >= 0."""
    return tl.minimum(tl.floor(s * inv_step + 0.5), (1 << BITS) - 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _neuron_forward_kernel(
    current_ptr, v_ptr, leak_ptr, threshold_ptr, gain_ptr, shift_ptr, spikes_ptr, v_out_ptr,
    A, C, B, stride_t, inv_step, step,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    LEAK_C: tl.constexpr, THRESHOLD_C: tl.constexpr, PARALLEL: tl.constexpr,
    BITS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    offsets, mask, channel = _tile(tl.program_id(0), A, C, B, X, Y, CHANNELS_LAST)
    FOLDED: tl.constexpr = gain_ptr is not None
    size = tl.cast(A, tl.int64) * C * B
    currents = ()  # all loads first: behind a store the compiler could not move them up
    for t in tl.static_range(T):
        currents = currents + (tl.load(current_ptr + t * tl.cast(stride_t, tl.int64) + offsets, mask=mask, other=0),)
    v = tl.zeros((X, Y), tl.float32)
    if v_ptr is not None:
        v = tl.load(v_ptr + offsets, mask=mask, other=0).to(tl.float32)
    leak, gain, shift = 0.0, 0.0, 0.0
    for t in tl.static_range(T):
        threshold = _parameter(threshold_ptr, t, channel, C, THRESHOLD_C)
        if not PARALLEL:
            leak = _parameter(leak_ptr, t, channel, C, LEAK_C)
        if FOLDED:
            gain = _parameter(gain_ptr, t, channel, C, True)
            shift = _parameter(shift_ptr, t, channel, C, True)
        m, mh, s = _neuron_step(currents[t].to(tl.float32), v, leak, threshold, gain, shift, FOLDED, PARALLEL)
        v = mh - s
        if BITS:
            s = _spike_codes(s, inv_step, BITS)
            if not CODES:
                s = s * step
        tl.store(spikes_ptr + t * size + offsets, s.to(spikes_ptr.dtype.element_ty), mask=mask)
    if v_out_ptr is not None:
        tl.store(v_out_ptr + offsets, v, mask=mask)


@triton.jit
def _neuron_backward_kernel(
    current_ptr, d_spikes_ptr, v_ptr, d_v_out_ptr, leak_ptr, threshold_ptr, gain_ptr, shift_ptr,
    d_current_ptr, d_v_ptr, partial_ptr,
    A, C, B, tiles, stride_t, stride_dt, top,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    LEAK_C: tl.constexpr, THRESHOLD_C: tl.constexpr, PARALLEL: tl.constexpr,
    DETACH: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Reads current and d_spikes once, recomputes m, mh, v in registers, writes d_current once.

    The quantiser is straight-through: what it does to the spikes is not needed here. top: above it their gradient is
    0, or None.
    """
    FOLDED: tl.constexpr = gain_ptr is not None
    size = tl.cast(A, tl.int64) * C * B
    P: tl.constexpr = 4 if gain_ptr is not None else 2  # per step: leak, threshold, gain, shift
    sums = ()  # over this program's tiles; they are reduced over positions only once, at the end
    if PARAMETERS:
        for k in tl.static_range(P * T):  # noqa: B007
            sums = sums + (tl.zeros((X, Y), tl.float32),)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets, mask, channel = _tile(i, A, C, B, X, Y, CHANNELS_LAST)
        currents = ()
        d_spikes = ()
        for t in tl.static_range(T):
            current = tl.load(current_ptr + t * tl.cast(stride_t, tl.int64) + offsets, mask=mask, other=0)
            d_s = tl.load(d_spikes_ptr + t * tl.cast(stride_dt, tl.int64) + offsets, mask=mask, other=0)
            currents = currents + (current,)
            d_spikes = d_spikes + (d_s,)
        v_start = tl.zeros((X, Y), tl.float32)
        if v_ptr is not None:
            v_start = tl.load(v_ptr + offsets, mask=mask, other=0).to(tl.float32)
        v = v_start
        leak, gain, shift = 0.0, 0.0, 0.0
        mhs = ()
        for t in tl.static_range(T):
            threshold = _parameter(threshold_ptr, t, channel, C, THRESHOLD_C)
            if not PARALLEL:
                leak = _parameter(leak_ptr, t, channel, C, LEAK_C)
            if FOLDED:
                gain = _parameter(gain_ptr, t, channel, C, True)
                shift = _parameter(shift_ptr, t, channel, C, True)
            _, mh, s = _neuron_step(currents[t].to(tl.float32), v, leak, threshold, gain, shift, FOLDED, PARALLEL)
            mhs = mhs + (mh,)
            v = mh - s
        d_v = tl.zeros((X, Y), tl.float32)
        if d_v_out_ptr is not None:
            d_v = tl.load(d_v_out_ptr + offsets, mask=mask, other=0)
        new = ()  # what masked elements add is 0, because their d_spikes and d_v are
        for t in tl.static_range(T - 1, -1, -1):
            threshold = _parameter(threshold_ptr, t, channel, C, THRESHOLD_C)
            if not PARALLEL:
                leak = _parameter(leak_ptr, t, channel, C, LEAK_C)
            on = mhs[t] > threshold
            d_s = d_spikes[t].to(tl.float32)
            if top is not None:
                d_s = tl.where(mhs[t] - threshold <= top, d_s, 0.0)
            d_mh = tl.where(on, d_s, d_v)
            d_m = d_mh
            if FOLDED:
                d_m = d_mh * _parameter(gain_ptr, t, channel, C, True)
            if PARAMETERS:
                v = v_start
                if t > 0:  # recomputed from mh: fewer registers than keeping it
                    v = mhs[t - 1] - tl.maximum(
                        mhs[t - 1] - _parameter(threshold_ptr, t - 1, channel, C, THRESHOLD_C), 0.0
                    )
                d_threshold = tl.where(on, d_v - d_s, 0.0)
                if FOLDED:
                    m = currents[t].to(tl.float32)
                    if not PARALLEL:
                        m += leak * v
                    new = (d_m * v, d_threshold, d_mh * m, d_mh) + new
                else:
                    new = (d_m * v, d_threshold) + new
            if not DETACH:
                d_v = d_m * leak
            tl.store(d_current_ptr + t * size + offsets, d_m.to(d_current_ptr.dtype.element_ty), mask=mask)
        if v_ptr is not None and not DETACH:
            tl.store(d_v_ptr + offsets, d_v, mask=mask)
        if PARAMETERS:
            added = ()
            for k in tl.static_range(P * T):
                added = added + (sums[k] + new[k],)
            sums = added
    if PARAMETERS:
        for t in tl.static_range(T):
            for slot in tl.static_range(P):
                _store_sum(partial_ptr, slot, t, sums[P * t + slot], C, T, X, Y, CHANNELS_LAST)
