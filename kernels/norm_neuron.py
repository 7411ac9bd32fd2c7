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

from .dispatch import LAUNCHES, OPS
from .neuron import NeuronParams, check_current, check_neuron, neuron_steps, number, on_kernels
from .norm_kernels import MAX_STEPS, launch_backward, launch_bn, launch_mem_bn
from .steps import cat_steps, empty_like_steps, lay_out_like, stack_steps, steps_dense


def _against_steps(p: Tensor, x: Tensor) -> Tensor:
    """(T, C), (T, 1) or (C,) so that it broadcasts against x (T, N, C, ...)."""
    return p.view(*([1] if p.dim() == 1 else [len(p), 1]), -1, *[1] * (x.dim() - 3))


def bn_neuron_ref(
    x,
    v,
    leak,
    threshold,
    weight,
    bias,
    *,
    eps=1e-5,
    bits=None,
    step=0.25,
    parallel=False,
    detach=True,
    stats=None,
    clipped=False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Definition of `bn_neuron`, in fp32 (fp64 for an fp64 x).

    >>> half, x = torch.full((2,), 0.5), torch.randn(2, 8, 3)  # T = 2, N = 8, C = 3
    >>> spikes, v, mean, var = bn_neuron_ref(x, None, half, half, torch.ones(3), torch.zeros(3))
    >>> spikes.shape, v.shape, mean.shape
    (torch.Size([2, 8, 3]), torch.Size([8, 3]), torch.Size([2, 3]))
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    mean, var = _moments(y, [d for d in range(1, x.dim()) if d != 2]) if stats is None else stats  # T C
    scale = weight.to(dtype) * torch.rsqrt(var + eps)
    current = (y - _against_steps(mean, x)) * _against_steps(scale, x) + _against_steps(bias.to(dtype), x)
    p = NeuronParams(leak, threshold, bits=bits, step=step, parallel=parallel, detach=detach, clipped=clipped)
    spikes, v = neuron_steps(current, v, p)
    return stack_steps(spikes, x).to(x.dtype), v, mean.detach(), var.detach()


def mem_bn_neuron_ref(
    current,
    v,
    leak,
    threshold,
    alpha,
    beta,
    weight,
    bias,
    *,
    eps=1e-5,
    bits=None,
    step=0.25,
    detach=True,
    stats=None,
    clipped=False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of `mem_bn_neuron`, in fp32 (fp64 for an fp64 current).

    >>> half, x = torch.full((2,), 0.5), torch.randn(2, 8, 3)  # T = 2, N = 8, C = 3
    >>> spikes, v, mean, var = mem_bn_neuron_ref(x, None, half, half, half, half, torch.ones(2, 3), torch.zeros(2, 3))
    >>> spikes.shape, v.shape, mean.shape
    (torch.Size([2, 8, 3]), torch.Size([8, 3]), torch.Size([2, 3]))
    """
    dtype = torch.promote_types(current.dtype, torch.float32)
    over = [d for d in range(current.dim() - 1) if d != 1]
    found = []

    def normalize(t, m):
        alpha_t, beta_t, weight_t, bias_t = (
            p[t].to(dtype).view(-1, *[1] * len(over[1:])) for p in (alpha, beta, weight, bias)
        )
        mean, var = _moments(m, over) if stats is None else (s[t].to(dtype) for s in stats)
        found.append((mean.detach(), var.detach()))
        normed = weight_t * (m - mean.view_as(weight_t)) * torch.rsqrt(var.view_as(weight_t) + eps) + bias_t
        return alpha_t * m + beta_t * normed

    p = NeuronParams(leak, threshold, bits=bits, step=step, detach=detach, clipped=clipped)
    spikes, v = neuron_steps(current, v, p, normalize=normalize)
    means, variances = (torch.stack(values) for values in zip(*found, strict=True))
    return stack_steps(spikes, current), v, means, variances


def _moments(x, over):
    """Mean and biased variance over these dimensions."""
    var, mean = torch.var_mean(x, over, correction=0)
    return mean, var


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
    top: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes, v, mean, var); with alpha and beta Mem-BN, without them the normalisation comes before the neuron."""
    return _forward(x, v, (leak, threshold, alpha, beta, weight, bias), eps, bits, step, parallel)


def _forward(x, v, parameters, eps, bits, step, parallel, stats=None):
    leak, threshold, alpha, beta, weight, bias = parameters
    p = _stack(x, None if parallel else leak, threshold, alpha, beta, weight, bias)
    v = None if parallel else v
    mem = alpha is not None
    x = steps_dense(x)
    v = None if v is None else lay_out_like(v[None], x)[0]
    LAUNCHES[("mem_bn_neuron" if mem else "bn_neuron") + "_again" * (stats is not None)] += 1
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors are on
        spikes, v_out, mean, var = (launch_mem_bn if mem else launch_bn)(x, v, p, eps, bits, step, stats)
    return spikes, x.new_empty(0) if parallel else v_out, mean, var


@_norm_forward.register_fake
def _norm_forward_fake(x, v, leak, threshold, alpha, beta, weight, bias, eps, bits, step, parallel, detach, top):
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
    top: float | None,
    mem: bool,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_v, d_p) with p as from `_stack`."""
    x = steps_dense(x)
    d_spikes = lay_out_like(d_spikes, x)
    v = None if v is None else lay_out_like(v[None], x)[0]
    d_v_out = None if detach or d_v_out is None else lay_out_like(d_v_out[None], x)[0]
    LAUNCHES["mem_bn_neuron_backward" if mem else "bn_neuron_backward"] += 1
    with torch.cuda.device_of(x):
        d_x, d_v, d_leak, sums = launch_backward(d_spikes, d_v_out, x, v, p, mean, var, eps, top, mem, detach)
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
def _norm_backward_fake(d_spikes, d_v_out, x, v, p, mean, var, eps, top, mem, detach):
    carried = v is not None and not detach
    d_v = empty_like_steps(x, mean.dtype, one_step=True) if carried else x.new_empty(0)
    return empty_like_steps(x, x.dtype), d_v, torch.empty_like(p)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.bits, ctx.step, ctx.parallel, ctx.detach, ctx.top = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # v, most of the time without a gradient, would get one of zeros


def _backward(ctx, d_spikes, d_v_out, *_):
    x, v, *parameters, mean, var = ctx.saved_tensors
    mem, detach = parameters[2] is not None, ctx.detach or ctx.parallel
    d_spikes = empty_like_steps(x, x.dtype).zero_() if d_spikes is None else d_spikes
    if mem and not detach:
        return *_through_time(d_spikes, d_v_out, (x, v, *parameters), ctx), *[None] * 6
    p = _stack(x, None if ctx.parallel else parameters[0], *parameters[1:])
    d_x, d_v, d_p = _norm_backward(
        d_spikes, None if detach else d_v_out, x, None if ctx.parallel else v, p, mean, var, ctx.eps, ctx.top, mem,
        detach,
    )  # fmt: skip
    grads = _unstack(d_p, parameters, ctx.parallel)
    grads = [g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad[2:8], strict=True)]
    carried = ctx.needs_input_grad[1] and not detach
    return d_x, d_v.to(v.dtype) if carried else None, *grads, *[None] * 6


def _through_time(d_spikes, d_v_out, tensors, ctx):
    """Through time Mem-BN has a reduction between any two steps: the definition once more, and its gradients."""
    with torch.enable_grad():
        leaves = [None if q is None else q.detach().requires_grad_() for q in tensors]
        options = {"bits": ctx.bits or None, "step": ctx.step, "clipped": ctx.top is not None}
        spikes, v_out, _, _ = mem_bn_neuron_ref(*leaves, eps=ctx.eps, detach=False, **options)
        outputs, d_outputs = ([spikes], [d_spikes]) if d_v_out is None else ([spikes, v_out], [d_spikes, d_v_out])
        found = torch.autograd.grad(outputs, [q for q in leaves if q is not None], d_outputs, allow_unused=True)
    found = iter(found)
    return [None if q is None else next(found) for q in leaves]


_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def _unstack(d_p, parameters, parallel):
    """Gradients in the shapes of leak, threshold, alpha, beta, weight, bias, from one as `_stack` makes it."""
    grads = []
    for slot, q in enumerate(parameters):
        if q is None or (slot == 0 and parallel):
            grads.append(None)
        elif q.dim() == 2:
            grads.append(d_p[slot].to(q.dtype))
        else:
            grads.append(d_p[slot].sum(0 if slot > 3 else 1).to(q.dtype))  # weight and bias (C,), the others (T,)
    return grads


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
    if C < 1 or x.shape[1] * x.shape[3:].numel() < 2:
        raise ValueError(f"batch statistics need a channel and more than one value in each, got {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def norm_neuron(
    x: Tensor, v: Tensor | None, p: NeuronParams, stats: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`bn_neuron`, or `mem_bn_neuron` where `p` has alpha and beta, of arguments that are known to fit.

    The kernels run where they can.
    """
    mem = p.alpha is not None
    if not on_kernels(x) or x.numel() == 0:
        options = {name: getattr(p, name) for name in ("eps", "bits", "step", "detach", "clipped")} | {"stats": stats}
        if mem:
            return mem_bn_neuron_ref(x, v, *p.tensors(), **options)
        return bn_neuron_ref(x, v, p.leak, p.threshold, p.weight, p.bias, parallel=p.parallel, **options)
    if len(x) > MAX_STEPS:
        return _in_pieces(x, v, p, stats)
    if stats is None:
        options = float(p.eps), p.bits or 0, float(p.step), p.parallel, p.detach, p.top
        outputs = _norm_forward(x, v, *p.tensors(), *options)
    else:
        stats = [s.to(torch.float32).contiguous() for s in stats]  # kernels take their pointers
        outputs = _forward(x, v, p.tensors(), float(p.eps), p.bits or 0, float(p.step), p.parallel, stats)
    spikes, v_out, mean, var = outputs
    if p.parallel:
        v_out = v
    elif p.detach:
        v_out = v_out.detach()
    return spikes, v_out, mean.detach(), var.detach()


def _in_pieces(x, v, p, stats):
    """More time steps than a launch holds."""
    pieces = -(-len(x) // MAX_STEPS)
    cut = [
        [q] * pieces if q is None or (i > 3 and q.dim() == 1) else q.chunk(pieces) for i, q in enumerate(p.tensors())
    ]
    cut_stats = [None] * pieces if stats is None else list(zip(*(s.chunk(pieces) for s in stats), strict=True))
    outs = []
    for x_i, stats_i, *tensors in zip(x.chunk(pieces), cut_stats, *cut, strict=True):
        outs.append(norm_neuron(x_i, v, NeuronParams(*tensors, *p[6:]), stats_i))
        v = outs[-1][1]
    spikes, _, mean, var = zip(*outs, strict=True)
    return cat_steps(spikes, x), v, torch.cat(mean), torch.cat(var)


def norm_neuron_backward(
    d_spikes: Tensor, x: Tensor, v: Tensor | None, p: NeuronParams, stats: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of `p.tensors()` by the kernel, v being a constant, for at most MAX_STEPS steps."""
    mem = p.alpha is not None
    stacked = _stack(x, None if p.parallel else p.leak, *p.tensors()[1:])
    v = None if p.parallel else v
    d_x, _, d_p = _norm_backward(d_spikes, None, x, v, stacked, *stats, p.eps, p.top, mem, True)
    return d_x, *_unstack(d_p, p.tensors(), p.parallel)


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
    clipped: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Batch normalisation with the statistics of each step, then `neuron_update`: (spikes, v, mean, var).

    `I[t] = weight * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias`, mean and biased variance of each channel over N and
    the positions of x[t]; they are returned, (T, C), for running statistics, and carry no gradient themselves.
    weight, bias: (C,). x, v, leak, threshold and the options: as current, v, ... in `neuron_update`.
    stats: (mean, var) of an earlier call: normalise with them, which spares a pass and gives the same spikes again.
        Then nothing has a gradient.

    Gradients of first order for x, v, leak, threshold, weight and bias, through mean and variance; the kernels keep x,
    v and vectors for them.
    Raises ValueError where shapes, dtypes, devices or options do not fit, or for a single value per channel.

    >>> half, x = torch.full((2,), 0.5), torch.randn(2, 8, 3)  # T = 2, N = 8, C = 3
    >>> spikes, v, mean, var = bn_neuron(x, None, half, half, torch.ones(3), torch.zeros(3))
    >>> torch.allclose(mean[0], x[0].mean(0), atol=1e-6), var.shape
    (True, torch.Size([2, 3]))
    """
    step = number(step, "step")
    _check_norm(x, v, leak, threshold, weight, bias, eps, bits, step, parallel, tuple(x.shape[2:3]))
    p = NeuronParams(leak, threshold, None, None, weight, bias, None, None, bits, step, parallel, detach, eps, clipped)
    return _with_stats(x, v, p, stats)


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
    clipped: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neuron whose membrane potential is batch-normalised in each step (Mem-BN): (spikes, v, mean, var).

    `m = leak*v + I; mh = alpha*m + beta*(weight * (m - mean) / sqrt(var + eps) + bias); s = relu(mh - threshold);
    v = mh - s`; mean and biased variance of each channel over N and the positions of m, returned as (T, C).
    alpha, beta: (T,) or (T, C). weight, bias: (T, C). stats as in `bn_neuron`. The rest as in `neuron_update`,
    arXiv 2410.07547, sec. 4.

    Gradients of first order for current, v, leak, threshold, alpha, beta, weight and bias, through mean and variance;
    the kernels keep current, v and vectors for them. With detach=False the backward pass is the torch definition on
    every device.
    Raises ValueError where shapes, dtypes, devices or options do not fit, or for a single value per channel.

    >>> half, x = torch.full((2,), 0.5), torch.randn(2, 8, 3)  # T = 2, N = 8, C = 3
    >>> spikes, v, mean, var = mem_bn_neuron(x, None, half, half, half, half, torch.ones(2, 3), torch.zeros(2, 3))
    >>> torch.allclose(mean[0], x[0].mean(0), atol=1e-6), var.shape
    (True, torch.Size([2, 3]))
    """
    step = number(step, "step")
    T, _, C = current.shape[:3] if current.dim() >= 3 else (0, 0, 0)
    _check_norm(
        current, v, leak, threshold, weight, bias, eps, bits, step, False, (T, C), alpha=alpha, beta=beta
    )  # fmt: skip
    p = NeuronParams(leak, threshold, alpha, beta, weight, bias, None, None, bits, step, False, detach, eps, clipped)
    return _with_stats(current, v, p, stats)


def _with_stats(x, v, p, stats):
    if stats is None:
        return norm_neuron(x, v, p)
    shape = (len(x), x.shape[2])
    if any(tuple(s.shape) != shape or s.device != x.device for s in stats):
        raise ValueError(
            f"stats must be (mean, var) of shape {shape} on {x.device}, got "
            f"{', '.join(f'{tuple(s.shape)} on {s.device}' for s in stats)}"
        )
    with torch.no_grad():
        return norm_neuron(x, v, p, stats)
