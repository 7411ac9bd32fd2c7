"""Training forms of the neuron with batch normalisation: statistics of each step, then normalise, fire and reset.

    bn_neuron       I = weight * (x - mean) / sqrt(var + eps) + bias        over (N, ...) of x[t], then `neuron_update`
    mem_bn_neuron   m = leak * v + I                                        normalised inside the neuron (Mem-BN):
                    mh = alpha * m + beta * (weight * (m - mean) / sqrt(var + eps) + bias)
                    s = relu(mh - threshold);  v = mh - s

    x, I              (T, N, C, ...)   fp32 | fp16 | bf16, contiguous or channels_last
    v                 (N, C, ...)      None = 0; computed and returned in fp32
    leak, threshold   (T,) or (T, C)
    alpha, beta       (T,) or (T, C)
    weight, bias      (C,) in bn_neuron, (T, C) in mem_bn_neuron
    mean, var         (T, C)           of this batch, var biased; fp32                arXiv 2410.07547, sec. 4

For the backward pass only x (or I), v and vectors of T C numbers are kept; the rest is recomputed from them.
"""

import torch
from torch import Tensor

from .dispatch import LAUNCHES, OPS, tl, triton, use_triton
from .neuron import MAX_STEPS, _neuron_step, _spike_codes, check_neuron, neuron_step, neuron_update_ref, quantize_spikes
from .steps import (
    _store_sum,
    _tile,
    channel_blocks,
    empty_like_steps,
    is_channels_last,
    lay_out_like,
    programs,
    stack_steps,
    steps_dense,
    tile_elements,
    tiling,
)


def _against_steps(p: Tensor, x: Tensor) -> Tensor:
    """(T, C), (T, 1) or (C,) so that it broadcasts against x (T, N, C, ...)."""
    return p.view(*([1] if p.dim() == 1 else [len(p), 1]), -1, *[1] * (x.dim() - 3))


def bn_neuron_ref(
    x, v, leak, threshold, weight, bias, *, eps=1e-5, bits=None, step=0.25, parallel=False, detach=True
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Definition of `bn_neuron`, in fp32 (fp64 for an fp64 x)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    var, mean = torch.var_mean(y, [d for d in range(1, x.dim()) if d != 2], correction=0)  # T C
    scale = weight.to(dtype) * torch.rsqrt(var + eps)
    current = (y - _against_steps(mean, x)) * _against_steps(scale, x) + _against_steps(bias.to(dtype), x)
    spikes, v = neuron_update_ref(
        current, v, leak, threshold, bits=bits, step=step, parallel=parallel, detach=detach
    )  # fmt: skip
    return spikes.to(x.dtype), v, mean.detach(), var.detach()


def mem_bn_neuron_ref(
    current, v, leak, threshold, alpha, beta, weight, bias, *, eps=1e-5, bits=None, step=0.25, detach=True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of `mem_bn_neuron`, in fp32 (fp64 for an fp64 current)."""
    dtype = torch.promote_types(current.dtype, torch.float32)
    over = [d for d in range(current.dim() - 1) if d != 1]
    v = None if v is None else v.to(dtype)
    spikes, means, variances = [], [], []
    for t, i in enumerate(current.to(dtype)):  # N C ...
        at_t = (p[t].to(dtype).view(-1, *[1] * len(over[1:])) for p in (leak, threshold, alpha, beta, weight, bias))
        leak_t, threshold_t, alpha_t, beta_t, weight_t, bias_t = at_t
        m = i if v is None else leak_t * (v.detach() if detach else v) + i
        var, mean = torch.var_mean(m, over, correction=0, keepdim=True)
        normed = weight_t * (m - mean) * torch.rsqrt(var + eps) + bias_t
        s, v = neuron_step(alpha_t * m + beta_t * normed, None, None, threshold_t)
        spikes.append((s if bits is None else quantize_spikes(s, bits, step)).to(current.dtype))
        means.append(mean.detach().flatten())
        variances.append(var.detach().flatten())
    return stack_steps(spikes, current), v.detach() if detach else v, torch.stack(means), torch.stack(variances)


def _stack(T, C, *parameters):
    """leak, threshold, alpha, beta, weight, bias as one (6, T, C) tensor, in fp32 at least; None as zeros."""
    dtype = torch.promote_types(parameters[1].dtype, torch.float32)
    rows = []
    for p in parameters:
        p = parameters[1].new_zeros(1) if p is None else p
        per_step = p.dim() == 1 and p is not parameters[4] and p is not parameters[5]  # weight and bias may be (C,)
        rows.append((p[:, None] if per_step else p).to(dtype).expand(T, C))
    return torch.stack(rows)


def _backward_ref(d_spikes, d_v, x, v, p, mean, var, eps, bits, step, mem, detach):
    """Gradients of both forms in plain torch: (d_x, d_v, d_p); p and d_p (6, T, C), see `_stack`."""
    dtype = p.dtype
    over = [d for d in range(x.dim() - 1) if d != 1]
    count = x[0, :, 0].numel()
    rows = [_against_steps(q, x) for q in (*p, mean, torch.rsqrt(var + eps))]  # T 1 C ...
    zero = torch.zeros((), dtype=dtype, device=x.device)
    v = zero if v is None else v.to(dtype)
    steps = []
    d_x = empty_like_steps(x, x.dtype)
    d_p = torch.zeros_like(p)

    def recompute(t, v):
        leak, threshold, alpha, beta, weight, bias, mu, rstd = (q[t] for q in rows)
        m = x[t].to(dtype)
        if mem:
            m = leak * v + m
        hat = (m - mu) * rstd
        normed = weight * hat + bias
        return hat, (alpha * m + beta * normed if mem else leak * v + normed), m

    def step_back(t, v, hat, mh, m, d_v):
        leak, threshold, alpha, beta, weight, bias, _, rstd = (q[t] for q in rows)
        s = mh - threshold
        d_s = d_spikes[t].to(dtype)
        if bits:
            d_s = d_s * (s <= (2**bits - 1) * step)
        d_mh = torch.where(s > 0, d_s, d_v)
        d_normed = beta * d_mh if mem else d_mh
        sum_1, sum_hat = d_normed.sum(over), (d_normed * hat).sum(over)
        inner = d_normed - (sum_1 / count).view(rstd.shape) - hat * (sum_hat / count).view(rstd.shape)
        d_in = weight * rstd * inner
        d_m = alpha * d_mh + d_in if mem else d_mh
        d_x[t] = d_m if mem else d_in
        d_p[0, t] = (d_m * v).expand(d_m.shape).sum(over)
        d_p[1, t] = torch.where(s > 0, d_v - d_s, zero).sum(over)
        if mem:
            d_p[2, t] = (d_mh * m).sum(over)
            d_p[3, t] = (d_mh * (weight * hat + bias)).sum(over)
        d_p[4, t], d_p[5, t] = sum_hat, sum_1
        return leak * d_m

    for t in range(len(x)):
        hat, mh, m = recompute(t, v)
        if detach:
            step_back(t, v, hat, mh, m, zero)
        else:
            steps.append((t, v, hat, mh, m))
        v = mh - (mh - rows[1][t]).relu()
    d_v = zero if d_v is None else d_v
    for kept in reversed(steps):
        d_v = step_back(*kept, d_v)
    return d_x, d_v, d_p


@triton.jit
def _row(p_ptr, slot, t, channel, C, T: tl.constexpr):
    """p[slot, t] of p (slots, T, C) at the tile's channels."""
    return tl.load(p_ptr + (slot * T + t) * C + channel, mask=channel < C, other=0)


@triton.jit
def _statistics_kernel(
    x_ptr, partial_ptr, A, C, B, tiles, stride_t,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Sums of d and d^2, d = x - the channel's first number: with that, large means cost no digits."""
    t = tl.program_id(2)
    x_ptr += t * tl.cast(stride_t, tl.int64)
    sum_1 = tl.zeros((X, Y), tl.float32)
    sum_2 = tl.zeros((X, Y), tl.float32)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets, mask, channel = _tile(i, A, C, B, X, Y, CHANNELS_LAST)
        first = tl.load(x_ptr + channel * tl.cast(B, tl.int64), mask=channel < C, other=0).to(tl.float32)
        d = tl.where(mask, tl.load(x_ptr + offsets, mask=mask, other=0).to(tl.float32) - first, 0.0)
        sum_1 += d
        sum_2 += d * d
    _store_sum(partial_ptr, 0, t, sum_1, C, T, X, Y, CHANNELS_LAST)
    _store_sum(partial_ptr, 1, t, sum_2, C, T, X, Y, CHANNELS_LAST)


@triton.jit
def _finish_kernel(
    partial_ptr, x_ptr, mean_ptr, var_ptr, rows, count, C, B, stride_t, T: tl.constexpr, BLOCK: tl.constexpr
):
    """Partial sums (2, rows, T, C) -> mean and variance (T, C)."""
    t = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    first = tl.load(x_ptr + t * tl.cast(stride_t, tl.int64) + channel * tl.cast(B, tl.int64), mask=mask, other=0)
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_2 = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        sum_1 += tl.load(partial_ptr + (row * T + t) * C + channel, mask=mask, other=0)
        sum_2 += tl.load(partial_ptr + ((rows + row) * T + t) * C + channel, mask=mask, other=0)
    d = sum_1 / count
    tl.store(mean_ptr + t * C + channel, first.to(tl.float32) + d, mask=mask)
    tl.store(var_ptr + t * C + channel, tl.maximum(sum_2 / count - d * d, 0.0), mask=mask)


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
    s = tl.maximum(mh - _row(p_ptr, 1, t, channel, C, T), 0.0)
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
    sum_1 = tl.zeros((X, Y), tl.float32)
    sum_2 = tl.zeros((X, Y), tl.float32)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offsets, mask, channel = _tile(i, A, C, B, X, Y, CHANNELS_LAST)
        origin = channel * tl.cast(B, tl.int64)  # the channel's first number, subtracted as in `_statistics_kernel`
        inside = channel < C
        v = tl.zeros((X, Y), tl.float32)
        v_origin = tl.zeros(channel.shape, tl.float32)
        if m_ptr is not None:
            m = tl.load(m_ptr + offsets, mask=mask, other=0)
            v, s = _mem_fire(m, p_ptr, mean_ptr, var_ptr, t - 1, channel, C, eps, T)
            if BITS:
                s = _spike_codes(s, inv_step, BITS) * step
            tl.store(spikes_ptr + offsets, s.to(spikes_ptr.dtype.element_ty), mask=mask)
            if m_out_ptr is not None:
                m_origin = tl.load(m_ptr + origin, mask=inside, other=0)
                v_origin, _ = _mem_fire(m_origin, p_ptr, mean_ptr, var_ptr, t - 1, channel, C, eps, T)
        elif v_ptr is not None:
            v = tl.load(v_ptr + offsets, mask=mask, other=0).to(tl.float32)
            v_origin = tl.load(v_ptr + origin, mask=inside, other=0).to(tl.float32)
        if m_out_ptr is not None:
            leak = _row(p_ptr, 0, t, channel, C, T)
            m = leak * v + tl.load(current_ptr + offsets, mask=mask, other=0).to(tl.float32)
            first = leak * v_origin + tl.load(current_ptr + origin, mask=inside, other=0).to(tl.float32)
            tl.store(m_out_ptr + offsets, m, mask=mask)
            d = tl.where(mask, m - first, 0.0)
            sum_1 += d
            sum_2 += d * d
        else:
            tl.store(v_out_ptr + offsets, v, mask=mask)
    if m_out_ptr is not None:
        _store_sum(partial_ptr, 0, 0, sum_1, C, 1, X, Y, CHANNELS_LAST)
        _store_sum(partial_ptr, 1, 0, sum_2, C, 1, X, Y, CHANNELS_LAST)


@triton.jit
def _norm_backward_kernel(
    d_spikes_ptr, d_v_out_ptr, x_ptr, v_ptr, p_ptr, mean_ptr, var_ptr, means_ptr, d_x_ptr, d_v_ptr, partial_ptr,
    A, C, B, tiles, stride_t, stride_dt, eps, s_max,
    T: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr,
    MEM: tl.constexpr, DETACH: tl.constexpr, APPLY: tl.constexpr,
):  # fmt: skip
    """Two passes over the input and the gradient of the spikes, all else recomputed.

    APPLY False: sums of d_mh, d_mh * normalised input (and of d_threshold where it is not the negative of the first).
    APPLY True: with their means over the batch, d_x, and the sums of d_leak.
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
            mh = (y - _row(mean_ptr, 0, t, channel, C, T)) * rstd * weight + bias
            if MEM:
                mh = _row(p_ptr, 2, t, channel, C, T) * y + _row(p_ptr, 3, t, channel, C, T) * mh
            else:
                mh = leak * v + mh
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
            if BITS:
                d_s = tl.where(s <= s_max, d_s, 0.0)
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


def _finish(partial, x, stride_t, mean, var):
    """Mean and variance of each step and channel from the partial sums, on the device."""
    _, rows, T, C = partial.shape
    count = x[0, :, 0].numel()
    origin = 1 if is_channels_last(x) else x[0, 0, 0].numel()
    _finish_kernel[(triton.cdiv(C, 128), T)](
        partial, x, mean, var, rows, float(count), C, origin, stride_t, T=T, BLOCK=128
    )  # fmt: skip


def _tiles(x, sums):
    view, tile, tiles = tiling(x, True, tile_elements(x, sums))
    blocks = channel_blocks(view, tile)
    return view, tile, tiles, blocks, programs(tiles, blocks, x.device)


def _bn_launch(x, v, p, eps, bits, step):
    T, _, C = x.shape[:3]
    view, tile, tiles, blocks, rows = _tiles(x[:1], 2)
    mean, var = x.new_empty((2, T, C), dtype=torch.float32)
    partial = x.new_empty((2, rows, T, C), dtype=torch.float32)
    _statistics_kernel[(rows, blocks, T)](x, partial, *view, tiles, x.stride(0), T=T, **tile)
    _finish(partial, x, x.stride(0), mean, var)
    spikes = empty_like_steps(x, x.dtype)
    v_out = empty_like_steps(x, torch.float32, one_step=True)
    view, tile, tiles, blocks, _ = _tiles(x, 1)
    _bn_fire_kernel[(tiles, blocks)](
        x, v, p, mean, var, spikes, v_out, *view, x.stride(0), eps, 1 / step, step, T=T, **tile, BITS=bits
    )  # fmt: skip
    return spikes, v_out, mean, var


def _mem_launch(current, v, p, eps, bits, step):
    T, _, C = current.shape[:3]
    view, tile, tiles, blocks, rows = _tiles(current[:1], 4)
    mean, var = current.new_empty((2, T, C), dtype=torch.float32)
    partial = current.new_empty((2, rows, 1, C), dtype=torch.float32)
    spikes = empty_like_steps(current, current.dtype)
    v_out, m, m_next = (empty_like_steps(current, torch.float32, one_step=True) for _ in range(3))
    for t in range(T + 1):
        _mem_step_kernel[(rows, blocks)](
            current[t] if t < T else None, v, m if t else None, p, mean, var, spikes[t - 1] if t else None,
            None if t < T else v_out, m_next if t < T else None, partial, *view, tiles, t, eps, 1 / step, step,
            T=T, **tile, BITS=bits,
        )  # fmt: skip
        if t < T:
            _finish(partial, m_next[None], 0, mean[t], var[t])
        m, m_next = m_next, m
    return spikes, v_out, mean, var


@torch.library.custom_op(f"{OPS}::norm_neuron", mutates_args=())
def _norm_forward(
    x: Tensor,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    bits: int,
    step: float,
    parallel: bool,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes, v, mean, var); with alpha and beta Mem-BN, without them the normalisation comes before the neuron."""
    if _on_definition(x):
        options = {"eps": eps, "bits": bits or None, "step": step}
        if alpha is None:
            out = bn_neuron_ref(x, v, leak, threshold, weight, bias, **options, parallel=parallel)
        else:
            out = mem_bn_neuron_ref(x, v, leak, threshold, alpha, beta, weight, bias, **options)
        spikes, v_out, mean, var = out
        return spikes, x.new_empty(0) if parallel else lay_out_like(v_out[None], spikes)[0], mean, var
    x = steps_dense(x)
    v = None if v is None or parallel else lay_out_like(v[None], x)[0]
    p = _stack(*x.shape[:3:2], None if parallel else leak, threshold, alpha, beta, weight, bias)
    LAUNCHES["bn_neuron" if alpha is None else "mem_bn_neuron"] += 1
    spikes, v_out, mean, var = (_bn_launch if alpha is None else _mem_launch)(x, v, p, eps, bits, step)
    return spikes, x.new_empty(0) if parallel else v_out, mean, var


def _on_definition(x):
    return not use_triton(x) or x.dtype == torch.float64


@_norm_forward.register_fake
def _norm_forward_fake(x, v, leak, threshold, alpha, beta, weight, bias, eps, bits, step, parallel, detach):
    dtype = torch.promote_types(x.dtype, torch.float32)
    v_out = x.new_empty(0) if parallel else empty_like_steps(x, dtype, one_step=True)
    mean, var = (x.new_empty((len(x), x.shape[2]), dtype=dtype) for _ in range(2))
    return empty_like_steps(x, x.dtype), v_out, mean, var


@torch.library.custom_op(f"{OPS}::norm_neuron_backward", mutates_args=())
def _norm_backward(
    d_spikes: Tensor,
    d_v_out: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    p: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    bits: int,
    step: float,
    mem: bool,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_v, d_p) with p as from `_stack`."""
    carried = v is not None and not detach
    if _on_definition(x) or (mem and not detach):  # through time, Mem-BN has a reduction between any two steps
        d_x, d_v, d_p = _backward_ref(d_spikes, d_v_out, x, v, p, mean, var, eps, bits, step, mem, detach)
        return d_x, lay_out_like(d_v[None], d_x)[0] if carried else x.new_empty(0), d_p
    x = steps_dense(x)
    d_spikes = lay_out_like(d_spikes, x)
    v = None if v is None else lay_out_like(v[None], x)[0]
    d_v_out = None if detach or d_v_out is None else lay_out_like(d_v_out[None], x)[0]
    d_x = empty_like_steps(x, x.dtype)
    d_v = empty_like_steps(x, torch.float32, one_step=True) if carried else None
    T, _, C = x.shape[:3]
    count = x[0, :, 0].numel()
    name = "mem_bn_neuron_backward" if mem else "bn_neuron_backward"
    means = None
    for apply, slots in ((False, 2 if detach else 3), (True, 1)):
        view, tile, tiles, blocks, rows = _tiles(x, slots)
        partial = x.new_empty((slots, rows, T, C), dtype=torch.float32)
        LAUNCHES[name] += 1
        _norm_backward_kernel[(rows, blocks)](
            d_spikes, d_v_out, x, v, p, mean, var, means, d_x if apply else None, d_v if apply else None, partial,
            *view, tiles, x.stride(0), d_spikes.stride(0), eps, (2**bits - 1) * step,
            T=T, **tile, BITS=bits, MEM=mem, DETACH=detach, APPLY=apply,
        )  # fmt: skip
        if apply:
            d_leak = partial.sum(1)[0]
        else:
            sums = partial.sum(1)  # slots T C
            means = sums[:2] / count
    sum_1, sum_hat = sums[:2]
    d_threshold = -sum_1 if detach else sums[2]
    if not mem:
        nothing = torch.zeros_like(sum_1)
        return d_x, _or_empty(d_v, x), torch.stack((d_leak, d_threshold, nothing, nothing, sum_hat, sum_1))
    _, _, _, beta, weight, bias = p
    d_alpha = sum_hat * torch.sqrt(var + eps) + mean * sum_1  # m = hat / rstd + mean
    d_beta = weight * sum_hat + bias * sum_1
    return d_x, _or_empty(d_v, x), torch.stack((d_leak, d_threshold, d_alpha, d_beta, beta * sum_hat, beta * sum_1))


def _or_empty(d_v, x):
    return x.new_empty(0) if d_v is None else d_v


@_norm_backward.register_fake
def _norm_backward_fake(d_spikes, d_v_out, x, v, p, mean, var, eps, bits, step, mem, detach):
    carried = v is not None and not detach
    d_v = empty_like_steps(x, mean.dtype, one_step=True) if carried else x.new_empty(0)
    return empty_like_steps(x, x.dtype), d_v, torch.empty_like(p)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.bits, ctx.step, ctx.parallel, ctx.detach = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx, d_spikes, d_v_out, *_):
    x, v, *parameters, mean, var = ctx.saved_tensors
    mem, detach = parameters[2] is not None, ctx.detach or ctx.parallel
    p = _stack(*x.shape[:3:2], None if ctx.parallel else parameters[0], *parameters[1:])
    d_x, d_v, d_p = _norm_backward(
        d_spikes, None if detach else d_v_out, x, None if ctx.parallel else v, p, mean, var,
        ctx.eps, ctx.bits, ctx.step, mem, detach,
    )  # fmt: skip
    grads = []
    for slot, (q, wanted) in enumerate(zip(parameters, ctx.needs_input_grad[2:8], strict=True)):
        if not wanted or (slot == 0 and ctx.parallel):
            grads.append(None)
        elif q.dim() == 2:
            grads.append(d_p[slot].to(q.dtype))
        else:
            grads.append(d_p[slot].sum(0 if slot > 3 else 1).to(q.dtype))  # weight and bias (C,), the others (T,)
    carried = ctx.needs_input_grad[1] and not detach
    return d_x, d_v.to(v.dtype) if carried else None, *grads, None, None, None, None, None


_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def _check_norm(x, v, leak, threshold, weight, bias, eps, bits, step, parallel, norm_shape, **others):
    check_neuron(x, v, leak, threshold, bits=bits, step=step, parallel=parallel)
    T, _, C = x.shape[:3]
    shapes = dict.fromkeys(("weight", "bias"), (norm_shape,)) | dict.fromkeys(others, ((T,), (T, C)))
    for name, p in {"weight": weight, "bias": bias, **others}.items():
        if tuple(p.shape) not in shapes[name] or not p.is_floating_point() or p.device != x.device:
            raise ValueError(
                f"{name} must be floating-point of shape {' or '.join(map(str, shapes[name]))} on {x.device}, "
                f"got {tuple(p.shape)} {p.dtype} on {p.device}"
            )
    if x[0, :, 0].numel() < 2:
        raise ValueError(f"batch statistics need more than one value per channel, got {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _run(x, v, parameters, eps, bits, step, parallel, detach):
    """The operator, in several pieces where there are more time steps than a launch holds."""
    if len(x) > MAX_STEPS and not _on_definition(x):
        pieces = -(-len(x) // MAX_STEPS)
        split = ([p] * pieces if p is None or p.shape[:1] != x.shape[:1] else p.chunk(pieces) for p in (x, *parameters))
        outs = []
        for x_i, *parameters_i in zip(*split, strict=True):
            outs.append(_run(x_i, v, parameters_i, eps, bits, step, parallel, detach))
            v = outs[-1][1]
        spikes, _, mean, var = (torch.cat(out) for out in zip(*((o[0], o[0][:0], *o[2:]) for o in outs), strict=True))
        return spikes, v, mean, var
    spikes, v_out, mean, var = _norm_forward(
        x, v, *parameters, float(eps), bits or 0, float(step), parallel, detach
    )  # fmt: skip
    if parallel:
        v_out = v
    elif detach:
        v_out = v_out.detach()
    return spikes, v_out, mean.detach(), var.detach()


def bn_neuron(
    x: Tensor,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    bits: int | None = None,
    step: float = 0.25,
    parallel: bool = False,
    detach: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Batch normalisation with the statistics of each step, then `neuron_update`: (spikes, v, mean, var).

    `I[t] = weight * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias`, mean and biased variance of each channel over N and
    the positions of x[t]; they are returned, (T, C), for running statistics, and carry no gradient themselves.
    weight, bias: (C,). x, v, leak, threshold and the options: as current, v, ... in `neuron_update`.

    Gradients for x, v, leak, threshold, weight and bias, through mean and variance; kept for them are x, v and vectors.
    Raises ValueError where shapes, dtypes, devices or options do not fit, or for a single value per channel.
    """
    _check_norm(x, v, leak, threshold, weight, bias, eps, bits, step, parallel, tuple(x.shape[2:3]))
    return _run(x, v, (leak, threshold, None, None, weight, bias), eps, bits, step, parallel, detach)


def mem_bn_neuron(
    current: Tensor,
    v: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    bits: int | None = None,
    step: float = 0.25,
    detach: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neuron whose membrane potential is batch-normalised in each step (Mem-BN): (spikes, v, mean, var).

    `m = leak*v + I; mh = alpha*m + beta*(weight * (m - mean) / sqrt(var + eps) + bias); s = relu(mh - threshold);
    v = mh - s`; mean and biased variance of each channel over N and the positions of m, returned as (T, C).
    alpha, beta: (T,) or (T, C). weight, bias: (T, C). The rest as in `neuron_update`, arXiv 2410.07547, sec. 4.

    Gradients for current, v, leak, threshold, alpha, beta, weight and bias, through mean and variance; kept for them
    are current, v and vectors. With detach=False the backward pass is the torch definition on every device.
    Raises ValueError where shapes, dtypes, devices or options do not fit, or for a single value per channel.
    """
    T, _, C = current.shape[:3] if current.dim() >= 3 else (0, 0, 0)
    _check_norm(
        current, v, leak, threshold, weight, bias, eps, bits, step, False, (T, C), alpha=alpha, beta=beta
    )  # fmt: skip
    return _run(current, v, (leak, threshold, alpha, beta, weight, bias), eps, bits, step, False, detach)
