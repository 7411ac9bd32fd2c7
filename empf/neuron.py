"""Spiking neurons with floating-point spikes (EM-PF), and the binary-spike LIF neuron as a baseline.

m[t]  = leak[t] * v[t-1] + I[t]                  charge, v[0] = 0; parallel neuron: m[t] = I[t]
mh[t] = m[t]                                     vanilla
mh[t] = alpha[t] * m[t] + beta[t] * BN_t(m[t])   Mem-BN: one batch norm per time step
s[t]  = act(mh[t] - threshold[t])                floating-point spike, act = ReLU by default
v[t]  = mh[t] - s[t]                             reset
out   = Q(s[t])                                  optional n-bit spikes; v uses the unquantised s

I, s      (k, N, C, ...)   k consecutive time steps
v         (N, C, ...)
leak, threshold, alpha, beta   (T,) or (T, C)    arXiv 2410.07547, sec. 4
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf import recompute
from empf.fire import (
    charge,
    check_count,
    fire,
    folded,
    mem_folded,
    move,
    move_statistics,
    per_channel,
    statistics,
    step_statistics,
    working_dtype,
)
from empf.kernels.neuron import neuron_update, quantize_spikes
from empf.kernels.norm_neuron import bn_neuron, mem_bn_neuron
from empf.kernels.steps import empty_like_steps

ACTIVATIONS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "gelu": F.gelu,
}


def logit(p: float) -> float:
    """The free parameter whose sigmoid is p (`torch.logit` on the meta device would load the compiler)."""
    return math.log(p / (1 - p))


def neuron_step(i: Tensor, v: Tensor | None, leak, threshold, activation=torch.relu, normalize=None):
    """One time step as a pure function: (s, v) from the current and the potential (None: no state, m = I)."""
    m = i if v is None else leak * v + i
    mh = m if normalize is None else normalize(m)
    s = activation(mh - threshold)
    return s, mh - s


class StatefulNeuron(nn.Module):
    """Time and membrane potential of a neuron that is fed k steps at a time.

    `.v` (N, C, ...) or None (= 0) and `.t` (steps done) are plain state: not saved, not synchronised between processes.
    `.online` (default True): the potential is detached between steps, the gradient of a step stays in that step.
    """

    def __init__(self, T: int):
        super().__init__()
        if T < 1:
            raise ValueError(f"T is the number of time steps and must be at least 1, got {T}")
        self.T = T
        self.online = True
        self.reset()

    def reset(self) -> None:
        """Back to time 0: v = 0."""
        self.v: Tensor | None = None
        self.t = 0

    def advance(self, current: Tensor) -> slice:
        """Check the k steps of `current` against time and state; return the slice of per-step parameters, move on."""
        steps = slice(self.t, self.t + current.shape[0])
        if steps.stop > self.T:
            raise ValueError(
                f"time step {steps.stop} asked of a neuron with T = {self.T}: call empf.reset(model) before a new batch"
            )
        if self.v is not None and self.v.shape != current.shape[1:]:
            raise ValueError(
                f"the membrane potential has shape {tuple(self.v.shape)} but the input {tuple(current.shape[1:])}: "
                "call empf.reset(model) before a batch of another size"
            )
        self.t = steps.stop
        return steps

    def takes(self, norm: nn.Module, x: Tensor) -> bool:
        """Can `norm`, through which x still has to go, be left to this neuron?"""
        return False


class EMPFNeuron(StatefulNeuron):
    """Neuron with floating-point spikes: vanilla, Mem-BN or parallel.

    Args:
        T: time steps, each with its own parameters.
        channels: C, needed for `mem_bn` and `per_channel`.
        mem_bn: normalise the membrane potential, one batch norm per time step (statistics, gain and bias each (T, C)).
        parallel: no state, `s[t] = act(I[t] - threshold[t])`; all steps are one tensor operation.
        per_channel: leak, threshold, alpha, beta are (T, C) instead of (T,).
        spike_bits: n-bit spikes `clip(floor(s / step + 1/2), 0, 2^n - 1) * step`, straight-through gradient.
        activation: relu | sigmoid | tanh | softplus | gelu.
        leak, threshold, alpha, beta: initial values. leak and threshold are sigmoids of a free parameter, so they stay
            in (0, 1); alpha and beta are free, and alpha = 1, beta = 0 is exactly the vanilla neuron.

    Forward: current (k, N, C, ...) -> spikes of the same shape; continues from `.v` at time `.t`.
    Raises ValueError past time T or for another batch size without `reset()`.
    Source: arXiv 2410.07547, sec. 4.
    """

    def __init__(
        self,
        T: int,
        channels: int | None = None,
        *,
        mem_bn: bool = False,
        parallel: bool = False,
        per_channel: bool = False,
        spike_bits: int | None = None,
        spike_step: float = 0.25,
        activation: str = "relu",
        leak: float = 0.5,
        threshold: float = 0.5,
        alpha: float = 0.5,
        beta: float = 0.5,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(T)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if spike_bits is not None and not 1 <= spike_bits <= 8:
            raise ValueError(f"spike_bits must be None or 1..8, got {spike_bits}")
        if (mem_bn or per_channel) and channels is None:
            raise ValueError("mem_bn and per_channel need channels")
        if mem_bn and parallel:
            raise ValueError("a parallel neuron has no membrane potential to normalise: mem_bn and parallel exclude")
        for name, value in (("leak", leak), ("threshold", threshold)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        self.parallel, self.mem_bn = parallel, mem_bn
        self.spike_bits, self.spike_step, self.activation = spike_bits, spike_step, activation
        self.eps, self.momentum = eps, momentum
        shape = (T, channels) if per_channel else (T,)
        self.threshold_logit = nn.Parameter(torch.full(shape, logit(threshold)))
        if not parallel:
            self.leak_logit = nn.Parameter(torch.full(shape, logit(leak)))
        if mem_bn:
            self.alpha = nn.Parameter(torch.full(shape, float(alpha)))
            self.beta = nn.Parameter(torch.full(shape, float(beta)))
            self.weight = nn.Parameter(torch.ones(T, channels))
            self.bias = nn.Parameter(torch.zeros(T, channels))
            self.register_buffer("running_mean", torch.zeros(T, channels))
            self.register_buffer("running_var", torch.ones(T, channels))
        self.frozen_norm = False  # True: training uses the running statistics and leaves them alone

    @property
    def leak(self) -> Tensor:
        """Share of the potential kept per step, in (0, 1); zeros for a parallel neuron. (T,) or (T, C)."""
        return torch.zeros_like(self.threshold_logit) if self.parallel else self.leak_logit.sigmoid()

    @property
    def threshold(self) -> Tensor:
        """Firing threshold, in (0, 1). (T,) or (T, C)."""
        return self.threshold_logit.sigmoid()

    def folded_norm(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mem-BN with the running statistics as `mh = gain * m + shift`, each (T, C); (None, None) without Mem-BN."""
        if not self.mem_bn:
            return None, None
        rstd = torch.rsqrt(self.running_var + self.eps)
        return mem_folded(self.alpha, self.beta, self.weight, self.bias, self.running_mean, rstd)

    def takes(self, norm: nn.Module, x: Tensor) -> bool:
        """Can `norm`, through which x still has to go, be left to this neuron?

        Not where a hook is to see the current, nor by a subclass whose own forward may not know `norm`.
        """
        if type(self).forward is not EMPFNeuron.forward:
            return False
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = any(getattr(m, kind) for m in (self, norm) for kind in kinds)
        simple = self.activation == "relu" and not self.mem_bn and norm.training and not norm.frozen_norm
        return simple and not hooked and (recompute.active(x) or recompute.on_kernels(x))

    def forward(self, current: Tensor, norm: nn.Module | None = None) -> Tensor:
        steps = self.advance(current)
        # sliced before the sigmoid: autograd then keeps the values of these steps, not of all T
        leak = None if self.parallel else self.leak_logit[steps].sigmoid()
        threshold = self.threshold_logit[steps].sigmoid()
        if norm is not None:
            check_count(current)
        batch_stats = self.mem_bn and self.training and not self.frozen_norm
        running_stats = self.mem_bn and not batch_stats  # with these, spikes cannot be made again
        one_step = torch.is_grad_enabled() and self.online and len(current) == 1
        if self.activation != "relu":
            spikes, v = self.loop(current, steps, leak, threshold, batch_stats)
        elif one_step and not running_stats and recompute.active(current):
            spikes, v = recompute.spike(current, self, steps.start, leak, threshold, norm)
        elif batch_stats:
            spikes, v = self.mem_bn_steps(current, steps, leak, threshold)
        else:
            spikes, v = self.plain_steps(current, steps, leak, threshold, norm)
        self.v = None if self.parallel else v
        return spikes

    def plain_steps(self, current: Tensor, steps: slice, leak, threshold, norm) -> tuple[Tensor, Tensor | None]:
        """ReLU, and no batch statistics of the potential."""
        options = {"bits": self.spike_bits, "step": self.spike_step}
        fast = not torch.is_grad_enabled() and recompute.active(current) and not recompute.on_kernels(current)
        if norm is not None and recompute.on_kernels(current):
            spikes, v, mean, var = bn_neuron(
                current, self.v, leak, threshold, norm.weight, norm.bias, eps=norm.eps, parallel=self.parallel,
                detach=self.online, **options,
            )  # fmt: skip
            move_statistics(norm, mean, var, current)
            return spikes, v
        gain = shift = None
        if norm is not None and fast:
            gain, shift = folded(norm.weight, norm.bias, *step_statistics(current, norm))
        elif norm is not None:
            current = norm(current)
        if fast and not self.mem_bn:
            return fire(current, self.v, leak, threshold, gain=gain, shift=shift, **options)
        gain, shift = (None if p is None else p[steps] for p in self.folded_norm())
        return neuron_update(
            current, self.state(current), leak, threshold, gain=gain, shift=shift, parallel=self.parallel,
            detach=self.online, **options,
        )  # fmt: skip

    def mem_bn_steps(self, current: Tensor, steps: slice, leak, threshold) -> tuple[Tensor, Tensor]:
        """Mem-BN with ReLU and the statistics of the batch."""
        check_count(current)
        options = {"bits": self.spike_bits, "step": self.spike_step}
        own = [p[steps] for p in (self.alpha, self.beta, self.weight, self.bias)]
        running = list(zip(self.running_mean[steps], self.running_var[steps], strict=True))
        if recompute.on_kernels(current):
            spikes, v, mean, var = mem_bn_neuron(
                current, self.v, leak, threshold, *own, eps=self.eps, detach=self.online, **options
            )
            for running_t, mean_t, var_t in zip(running, mean, var, strict=True):
                move(*running_t, mean_t, var_t, self.momentum, current)
            return spikes, v
        if torch.is_grad_enabled() or not recompute.active(current):
            return self.loop(current, steps, leak, threshold, batch_stats=True)
        spikes, v = empty_like_steps(current, current.dtype), self.v
        for k, running_t in enumerate(running):
            at_k = slice(k, k + 1)
            m = charge(current[k], v, leak[k])
            mean, var = statistics(m, running_t, self.momentum)
            gain, shift = mem_folded(*(p[at_k] for p in own), mean, torch.rsqrt(var + self.eps))
            spikes[k], v = fire(m[None], None, leak[at_k], threshold[at_k], gain=gain, shift=shift, **options)
        return spikes, v

    def state(self, current: Tensor) -> Tensor | None:
        """v; where there is a gradient, v[0] = 0 as a tensor: the leak has one (zero) in the first step too."""
        if self.v is None and not self.parallel and torch.is_grad_enabled():
            return torch.zeros_like(current[0], dtype=working_dtype(current))
        return self.v

    def loop(self, current: Tensor, steps: slice, leak, threshold, batch_stats: bool) -> tuple[Tensor, Tensor]:
        """`neuron_step`, repeated: every activation, and Mem-BN with batch statistics."""
        v, spikes = self.state(current), []
        gain, shift = (None, None) if batch_stats else self.folded_norm()
        act, dims = ACTIVATIONS[self.activation], current.dim() - 1
        dtype = working_dtype(current)  # the potential is never kept in half precision
        for k, t in enumerate(range(steps.start, steps.stop)):
            if batch_stats:
                normalize = self.batch_normalizer(t)
            elif gain is not None:
                g, h = per_channel(gain[t], dims), per_channel(shift[t], dims)
                normalize = lambda m, g=g, h=h: g * m + h  # noqa: E731
            else:
                normalize = None
            if v is not None and self.online:
                v = v.detach()
            leak_t = None if leak is None else per_channel(leak[k], dims)
            theta = per_channel(threshold[k], dims)
            s, v = neuron_step(current[k].to(dtype), None if self.parallel else v, leak_t, theta, act, normalize)
            if self.spike_bits is not None:
                s = quantize_spikes(s, self.spike_bits, self.spike_step)
            spikes.append(s.to(current.dtype))
        return torch.stack(spikes), v.detach() if self.online else v

    def batch_normalizer(self, t: int):
        """The function m -> mh of step t with the statistics of the batch; it updates the running statistics."""

        def normalize(m: Tensor) -> Tensor:
            check_count(m[None])
            normed = F.batch_norm(
                m, self.running_mean[t], self.running_var[t], self.weight[t], self.bias[t],
                training=True, momentum=self.momentum, eps=self.eps,
            )  # fmt: skip
            return per_channel(self.alpha[t], m.dim()) * m + per_channel(self.beta[t], m.dim()) * normed

        return normalize

    def extra_repr(self) -> str:
        kind = "parallel" if self.parallel else "mem_bn" if self.mem_bn else "vanilla"
        bits = "" if self.spike_bits is None else f", spike_bits={self.spike_bits}"
        return f"T={self.T}, {kind}, activation={self.activation}{bits}"


class TriangleSpike(torch.autograd.Function):
    """Heaviside step of x = m - threshold; surrogate gradient `max(0, g - |x|) / g^2` with g = 1."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, d_spike: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return d_spike * (1 - x.abs()).clamp(min=0)


class LIFNeuron(StatefulNeuron):
    """Leaky integrate-and-fire with binary spikes, soft reset and triangle surrogate gradient: the baseline.

        m = leak * v + I      s = [m >= threshold]      v = m - threshold * s

    `leak` and `threshold` are constants, shown as (T,) tensors. With `.online` the potential is detached between steps
    (SLTT), without it the gradient goes through time. It is kept in fp32 at least. Forward and errors as `EMPFNeuron`.
    """

    def __init__(self, T: int, *, leak: float = 0.5, threshold: float = 1.0):
        super().__init__(T)
        self.register_buffer("leak", torch.full((T,), float(leak)), persistent=False)
        self.register_buffer("threshold", torch.full((T,), float(threshold)), persistent=False)

    def forward(self, current: Tensor) -> Tensor:
        steps = self.advance(current)
        v, spikes, dtype = self.v, [], working_dtype(current)
        for k, t in enumerate(range(steps.start, steps.stop)):
            if v is not None and self.online:
                v = v.detach()
            i = current[k].to(dtype)
            m = i if v is None else self.leak[t] * v + i
            s = TriangleSpike.apply(m - self.threshold[t])
            v = m - self.threshold[t] * s
            spikes.append(s.to(current.dtype))
        self.v = v.detach() if self.online else v
        return torch.stack(spikes)
