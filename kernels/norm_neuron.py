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
import torch.nn.functional as F
from torch import Tensor

from .dispatch import LAUNCHES, OPS, use_triton
from .neuron import check_current, check_neuron, neuron_step, neuron_update_ref, quantize_spikes, spike_codes
from .norm_kernels import MAX_STEPS, launch_backward, launch_bn, launch_mem_bn
from .steps import empty_like_steps, is_channels_last, lay_out_like, stack_steps, steps_dense


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


def _stack(x, *parameters):
    """leak, threshold, alpha, beta, weight, bias as one (6, T, C) tensor, fp32 (fp64 for an fp64 x); None as zeros."""
    T, _, C = x.shape[:3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = []
    for p in parameters:
        p = x.new_zeros(1) if p is None else p
        per_step = p.dim() == 1 and p is not parameters[4] and p is not parameters[5]  # weight and bias may be (C,)
        rows.append((p[:, None] if per_step else p).to(dtype).expand(T, C))
    return torch.stack(rows)


def _steps_torch(x, v, p, mem, normalize):
    """The steps in torch, one by one: yields (y, v before, mh), y (N, C, ...) being what is normalised.

    `normalize(t, y, weight, bias)` with weight and bias (C,); p is as from `_stack`.
    """
    like_c = (-1,) + (1,) * (x.dim() - 3)
    for t in range(len(x)):
        leak, threshold, alpha, beta = (q.view(like_c) for q in p[:4, t])
        y = x[t].to(p.dtype)
        if mem and v is not None:
            y = torch.addcmul(y, leak, v)
        mh = normalize(t, y, p[4, t], p[5, t])
        if mem:
            mh = torch.addcmul(beta * mh, alpha, y)
        elif v is not None:
            mh = torch.addcmul(mh, leak, v)
        yield y, v, mh
        v = torch.minimum(mh, threshold)


def _forward_torch(x, v, p, mem, eps, bits, step, stats=None):
    """(spikes, v, mean, var) in plain torch, equal to the definitions up to rounding and faster on a CPU."""
    means, variances, spikes = [], [], []

    def normalize(t, y, weight, bias):
        if stats is not None:
            means.append(stats[0][t])
            variances.append(stats[1][t])
            return F.batch_norm(y, stats[0][t], stats[1][t], weight, bias, eps=eps)
        normed, mean, rstd = torch.native_batch_norm(y, weight, bias, None, None, True, 0.0, eps)
        means.append(mean)
        variances.append((rstd**-2 - eps).clamp(min=0))
        return normed

    like_c = (-1,) + (1,) * (x.dim() - 3)
    for t, (_, _, mh) in enumerate(_steps_torch(x, None if v is None else v.to(p.dtype), p, mem, normalize)):
        threshold = p[1, t].view(like_c)
        s = (mh - threshold).relu_()
        spikes.append((spike_codes(s, bits, step) * step if bits else s).to(x.dtype))
    return stack_steps(spikes, x), torch.minimum(mh, threshold), torch.stack(means), torch.stack(variances)


def _backward_torch(d_spikes, d_v, x, v, p, mean, var, eps, bits, step, mem, detach):
    """Gradients in plain torch: (d_x, d_v, d_p); p and d_p as from `_stack`."""
    over = [d for d in range(x.dim() - 1) if d != 1]
    like_c = (-1,) + (1,) * (x.dim() - 3)
    rstd = torch.rsqrt(var + eps)
    zero = torch.zeros((), dtype=p.dtype, device=x.device)
    d_x, d_p = empty_like_steps(x, x.dtype), torch.zeros_like(p)

    def step_back(t, y, v, mh, d_v):
        leak, threshold, alpha, beta, weight, bias = p[:, t]
        s = mh - threshold.view(like_c)
        d_s = d_spikes[t].to(p.dtype)
        if bits:
            d_s = d_s * (s <= (2**bits - 1) * step)
        d_mh = torch.where(s > 0, d_s, d_v).contiguous(memory_format=layout(y))
        d_in, sum_hat, sum_1 = torch.ops.aten.native_batch_norm_backward(
            d_mh, y, weight, None, None, mean[t], rstd[t], True, eps, [True, True, True]
        )
        d_p[1, t] = -sum_1 if detach else torch.where(s > 0, d_v - d_s, zero).sum(over)
        d_p[4, t], d_p[5, t] = sum_hat, sum_1
        d_m = d_mh
        if mem:
            d_m = d_in = torch.addcmul(d_in * beta.view(like_c), alpha.view(like_c), d_mh)
            d_p[2, t] = sum_hat / rstd[t] + mean[t] * sum_1  # m = hat / rstd + mean
            d_p[3, t] = weight * sum_hat + bias * sum_1
            d_p[4:, t] *= beta
        d_x[t] = d_in
        if v is not None:
            d_p[0, t] = (d_m * v).sum(over)
        return None if detach else leak.view(like_c) * d_m

    def normalize(t, y, weight, bias):
        scale = weight * rstd[t]
        return torch.addcmul((bias - mean[t] * scale).view(like_c), y, scale.view(like_c))

    def layout(y):
        return torch.channels_last if y.dim() == 4 and is_channels_last(y[None]) else torch.contiguous_format

    kept = []
    v = None if v is None else v.to(p.dtype)
    for t, step_t in enumerate(_steps_torch(x, v, p, mem, normalize)):
        if detach:
            step_back(t, *step_t, zero)
        else:
            kept.append((t, *step_t))
    d_v = zero if d_v is None else d_v
    for step_t in reversed(kept):
        d_v = step_back(*step_t, d_v)
    return d_x, d_v, d_p


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
    return _forward(x, v, (leak, threshold, alpha, beta, weight, bias), eps, bits, step, parallel)


def _forward(x, v, parameters, eps, bits, step, parallel, stats=None):
    leak, threshold, alpha, beta, weight, bias = parameters
    p = _stack(x, None if parallel else leak, threshold, alpha, beta, weight, bias)
    v = None if parallel else v
    mem = alpha is not None
    if _on_definition(x):
        spikes, v_out, mean, var = _forward_torch(x, v, p, mem, eps, bits, step, stats)
        return spikes, x.new_empty(0) if parallel else lay_out_like(v_out[None], spikes)[0], mean, var
    x = steps_dense(x)
    v = None if v is None else lay_out_like(v[None], x)[0]
    LAUNCHES[("mem_bn_neuron" if mem else "bn_neuron") + "_again" * (stats is not None)] += 1
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors are on
        spikes, v_out, mean, var = (launch_mem_bn if mem else launch_bn)(x, v, p, eps, bits, step, stats)
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
        d_x, d_v, d_p = _backward_torch(d_spikes, d_v_out, x, v, p, mean, var, eps, bits, step, mem, detach)
        return d_x, lay_out_like(d_v[None], d_x)[0] if carried else x.new_empty(0), d_p
    x = steps_dense(x)
    d_spikes = lay_out_like(d_spikes, x)
    v = None if v is None else lay_out_like(v[None], x)[0]
    d_v_out = None if detach or d_v_out is None else lay_out_like(d_v_out[None], x)[0]
    LAUNCHES["mem_bn_neuron_backward" if mem else "bn_neuron_backward"] += 1
    with torch.cuda.device_of(x):
        d_x, d_v, d_leak, sums = launch_backward(d_spikes, d_v_out, x, v, p, mean, var, eps, bits, step, mem, detach)
    sum_1, sum_hat = sums[:2]
    d_threshold = -sum_1 if detach else sums[2]
    if mem:
        _, _, _, beta, weight, bias = p
        d_alpha = sum_hat * torch.sqrt(var + eps) + mean * sum_1  # m = hat / rstd + mean
        rows = (d_leak, d_threshold, d_alpha, weight * sum_hat + bias * sum_1, beta * sum_hat, beta * sum_1)
    else:
        rows = (d_leak, d_threshold, torch.zeros_like(sum_1), torch.zeros_like(sum_1), sum_hat, sum_1)
    return d_x, x.new_empty(0) if d_v is None else d_v, torch.stack(rows)


@_norm_backward.register_fake
def _norm_backward_fake(d_spikes, d_v_out, x, v, p, mean, var, eps, bits, step, mem, detach):
    carried = v is not None and not detach
    d_v = empty_like_steps(x, mean.dtype, one_step=True) if carried else x.new_empty(0)
    return empty_like_steps(x, x.dtype), d_v, torch.empty_like(p)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.bits, ctx.step, ctx.parallel, ctx.detach = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # v, most of the time without a gradient, would get one of zeros


def _backward(ctx, d_spikes, d_v_out, *_):
    x, v, *parameters, mean, var = ctx.saved_tensors
    mem, detach = parameters[2] is not None, ctx.detach or ctx.parallel
    p = _stack(x, None if ctx.parallel else parameters[0], *parameters[1:])
    d_spikes = empty_like_steps(x, x.dtype).zero_() if d_spikes is None else d_spikes
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
    check_current(x)
    check_neuron(x.shape, x.device, v, leak, threshold, bits=bits, step=step, parallel=parallel)
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
        shared = (p is None or (slot > 3 and p.dim() == 1) for slot, p in enumerate(parameters))  # weight, bias (C,)
        split = [[p] * pieces if same else p.chunk(pieces) for p, same in zip(parameters, shared, strict=True)]
        outs = []
        for x_i, *parameters_i in zip(x.chunk(pieces), *split, strict=True):
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


@torch.no_grad()
def _again(x, v, parameters, eps, bits, step, parallel, stats):
    """`_run` with mean and variance given, (T, C)."""
    T, _, C = x.shape[:3]
    if any(tuple(s.shape) != (T, C) or s.device != x.device for s in stats):
        raise ValueError(
            f"stats must be (mean, var) of shape {(T, C)} on {x.device}, got "
            f"{', '.join(f'{tuple(s.shape)} on {s.device}' for s in stats)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    stats = [s.to(dtype).contiguous() for s in stats]  # kernels take their pointers
    if T > MAX_STEPS and not _on_definition(x):
        raise ValueError(f"stats are for at most {MAX_STEPS} steps at a time, got {T}")
    spikes, v_out, mean, var = _forward(x, v, parameters, float(eps), bits or 0, float(step), parallel, stats)
    return spikes, v if parallel else v_out, mean, var


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
    stats: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Batch normalisation with the statistics of each step, then `neuron_update`: (spikes, v, mean, var).

    `I[t] = weight * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias`, mean and biased variance of each channel over N and
    the positions of x[t]; they are returned, (T, C), for running statistics, and carry no gradient themselves.
    weight, bias: (C,). x, v, leak, threshold and the options: as current, v, ... in `neuron_update`.
    stats: (mean, var) of an earlier call: normalise with them, which spares a pass and gives the same spikes again.
        Then nothing has a gradient.

    Gradients of first order for x, v, leak, threshold, weight and bias, through mean and variance; kept for them are
    x, v and vectors.
    Raises ValueError where shapes, dtypes, devices or options do not fit, or for a single value per channel.
    """
    _check_norm(x, v, leak, threshold, weight, bias, eps, bits, step, parallel, tuple(x.shape[2:3]))
    if stats is not None:
        return _again(x, v, (leak, threshold, None, None, weight, bias), eps, bits, step, parallel, stats)
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
    stats: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neuron whose membrane potential is batch-normalised in each step (Mem-BN): (spikes, v, mean, var).

    `m = leak*v + I; mh = alpha*m + beta*(weight * (m - mean) / sqrt(var + eps) + bias); s = relu(mh - threshold);
    v = mh - s`; mean and biased variance of each channel over N and the positions of m, returned as (T, C).
    alpha, beta: (T,) or (T, C). weight, bias: (T, C). stats as in `bn_neuron`. The rest as in `neuron_update`,
    arXiv 2410.07547, sec. 4.

    Gradients of first order for current, v, leak, threshold, alpha, beta, weight and bias, through mean and variance;
    kept for them are current, v and vectors. With detach=False the backward pass is the torch definition on every
    device. Raises ValueError where shapes, dtypes, devices or options do not fit, or for a single value per channel.
    """
    T, _, C = current.shape[:3] if current.dim() >= 3 else (0, 0, 0)
    _check_norm(
        current, v, leak, threshold, weight, bias, eps, bits, step, False, (T, C), alpha=alpha, beta=beta
    )  # fmt: skip
    if stats is not None:
        return _again(current, v, (leak, threshold, alpha, beta, weight, bias), eps, bits, step, False, stats)
    return _run(current, v, (leak, threshold, alpha, beta, weight, bias), eps, bits, step, False, detach)
