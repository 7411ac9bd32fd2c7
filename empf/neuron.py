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
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.checks import FLOATS, MOST_STEPS, tensor
from empf.kernels.dispatch import transformed
from empf.kernels.neuron import ACTIVATIONS, SPIKE_GRADIENTS, NeuronParams, neuron_steps, on_kernels, plain_neuron
from empf.kernels.neuron_cpu import mem_folded, move, per_channel, working_dtype
from empf.kernels.neuron_engine import Running, neuron_forward
from empf.kernels.norm_neuron import norm_neuron
from empf.layer import Current, active, check_count, fire_into, hooked, over_steps, refuse_second_order


def logit(p: float) -> float:
    """The free parameter whose sigmoid is p (`torch.logit` on the meta device would load the compiler)."""
    return math.log(p / (1 - p))


class StatefulNeuron(nn.Module):
    """Time and membrane potential of a neuron that is fed k steps at a time.

    `.v` (N, C, ...) or None (= 0) and `.t` (steps done) are plain state: not saved, not copied, not synchronised
    between processes. `.online` (default True): the potential is detached between steps, the gradient of a step stays
    in that step. T: number of time steps, None for streams of open length, whose steps share their parameters.
    """

    __call__: Callable[..., Tensor]
    leak: Tensor
    threshold: Tensor
    holds_state = True  # for `empf.reset`

    def __init__(self, T: int | None):
        super().__init__()
        if T is not None and (type(T) is not int or not 1 <= T <= MOST_STEPS):
            raise ValueError(f"T is the number of time steps, 1 to {MOST_STEPS:,}, or None for an open end; got {T!r}")
        self.T = T
        self.online = True
        self.observer: Callable[[Tensor], None] | None = None  # is handed the spikes of each call
        self.reset()

    def reset(self) -> None:
        """Back to time 0: v = 0."""
        self.v: Tensor | None = None
        self.t = 0

    def __getstate__(self) -> dict:  # a potential belongs to a batch
        return {**super().__getstate__(), "v": None, "t": 0, "observer": None}

    def advance(self, current: Tensor) -> slice:
        """Check the k steps of `current` against time and state; return the slice of per-step parameters, move on."""
        shape = current.shape
        if len(shape) < 3 or not shape[0] or current.layout != torch.strided or current.dtype not in FLOATS:
            raise ValueError(
                f"a neuron takes dense floating-point currents of k time steps, (k, N, C, ...), got {tuple(shape)} of "
                f"{current.dtype}: give a single step as x.unsqueeze(0)"
            )
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a neuron was called within a backward pass, as by torch.utils.checkpoint, and its time has moved on: "
                "leave checkpointing out, the layers of this library make their activations again by themselves"
            )
        steps = slice(self.t, self.t + shape[0])
        if self.T is not None and steps.stop > self.T:
            raise ValueError(
                f"time step {steps.stop} asked of a neuron with T = {self.T}: call empf.reset(model) before a new batch"
            )
        if self.v is not None and self.v.shape != shape[1:]:
            raise ValueError(
                f"the membrane potential has shape {tuple(self.v.shape)} but the input {tuple(shape[1:])}: "
                "call empf.reset(model) before a batch of another size"
            )
        self.t = steps.stop
        return steps

    def of_steps(self, p: Tensor, steps: slice) -> Tensor:
        """The parameter (T,) or (T, C) of these steps; one that all steps share, (1,) or (1, C), is expanded."""
        return p[steps] if self.T is not None else p.expand(steps.stop - steps.start, *p.shape[1:])


class EMPFNeuron(StatefulNeuron):
    """Neuron with floating-point spikes: vanilla, Mem-BN or parallel.    arXiv 2410.07547, sec. 4

    Args:
        T: time steps, each with its own parameters; None: an open end, all steps share one set.
        channels: C, needed for `mem_bn` and `per_channel`; where it is given, it is checked.
        mem_bn: normalise the membrane potential, one batch norm per time step (statistics, gain and bias each (T, C)).
        parallel: no state, `s[t] = act(I[t] - threshold[t])`; all steps are one tensor operation.
        per_channel: leak, threshold, alpha, beta are (T, C) instead of (T,).
        spike_bits: n-bit spikes `clip(floor(s / step + 1/2), 0, 2^n - 1) * step`.
        spike_gradient: theirs. identity: that of s; clipped: the same, but 0 above the largest code.
        activation: relu | sigmoid | tanh | softplus | gelu.
        leak, threshold, alpha, beta: initial values. leak and threshold are sigmoids of a free parameter, so they stay
            in (0, 1); alpha and beta are free, and alpha = 1, beta = 0 is exactly the vanilla neuron.
    """

    def __init__(
        self, T: int | None, channels: int | None = None, *, mem_bn: bool = False, parallel: bool = False,
        per_channel: bool = False, spike_bits: int | None = None, spike_step: float = 0.25,
        spike_gradient: str = "identity", activation: str = "relu", leak: float = 0.5, threshold: float = 0.5,
        alpha: float = 0.5, beta: float = 0.5, eps: float = 1e-5, momentum: float = 0.1,
    ):  # fmt: skip
        super().__init__(T)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if spike_gradient not in SPIKE_GRADIENTS:
            raise ValueError(f"spike_gradient must be one of {', '.join(SPIKE_GRADIENTS)}, got {spike_gradient!r}")
        if spike_bits not in (None, *range(1, 9)):
            raise ValueError(f"spike_bits must be None or 1..8, got {spike_bits}")
        if spike_gradient == "clipped" and spike_bits is None:
            raise ValueError("spike_gradient clipped is for n-bit spikes: give spike_bits, or leave it out")
        if (mem_bn or per_channel) and channels is None:
            raise ValueError("mem_bn and per_channel need channels")
        if channels is not None and (type(channels) is not int or channels < 1):
            raise ValueError(f"channels must be a whole number of at least 1, got {channels!r}")
        if mem_bn and T is None:
            raise ValueError("mem_bn has a batch norm for each time step: give their number T")
        if mem_bn and parallel:
            raise ValueError("a parallel neuron has no membrane potential to normalise: mem_bn and parallel exclude")
        for name, value in (("leak", leak), ("threshold", threshold)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        self.parallel, self.mem_bn = parallel, mem_bn
        self.spike_bits, self.spike_step, self.spike_gradient = spike_bits, spike_step, spike_gradient
        self.activation = activation
        self.eps, self.momentum = eps, momentum
        self.channels = channels
        shape = (T or 1, channels) if per_channel else (T or 1,)
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
        self.batch_norm = F.batch_norm  # what normalises a step in training

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

    def made_again(self, current: Current) -> bool:
        """Is this a step whose spikes are not kept for the backward pass, but made again there?"""
        one_step = torch.is_grad_enabled() and self.online and current.shape[0] == 1
        # running statistics are left to autograd, those of several processes to their function
        kept = self.mem_bn and not (self.batch_stats and self.batch_norm is F.batch_norm)
        return one_step and self.activation == "relu" and not kept and active(current.y)

    @property
    def batch_stats(self) -> bool:
        """Does Mem-BN use the statistics of the batch?"""
        return self.mem_bn and self.training and not self.frozen_norm

    def forward(self, current: Tensor | Current) -> Tensor:
        """(k, N, C, ...) -> spikes, from `.v` at time `.t` on. ValueError past T, or for another N without a reset."""
        return self.outputs(Current.of(current))[0]

    def outputs(self, current: Current, synapses: Sequence[nn.Module] = (), pool: nn.Module | None = None):
        """[spikes], or where they are `made_again` the outputs of the convolutions that read them (pooled)."""
        c, shape = self.channels, tuple(tensor(current.y).shape)
        if c is not None and shape[2:3] != (c,):
            raise ValueError(f"a neuron with {c} channels takes (k, N, {c}, ...), k time steps first, got {shape}")
        steps = self.advance(current.y)
        # sliced before the sigmoid: autograd then keeps the values of these steps, not of all T
        leak = None if self.parallel else self.of_steps(self.leak_logit, steps).sigmoid()
        p = NeuronParams(
            leak, self.of_steps(self.threshold_logit, steps).sigmoid(),
            bits=self.spike_bits, step=self.spike_step, clipped=self.spike_gradient == "clipped",
            parallel=self.parallel, detach=self.online, eps=self.eps,
        )  # fmt: skip
        running = None
        if self.batch_stats:
            check_count(current)
            alpha, beta, weight, bias = (q[steps] for q in (self.alpha, self.beta, self.weight, self.bias))
            p = p._replace(alpha=alpha, beta=beta, weight=weight, bias=bias)
            running = Running(self.running_mean[steps], self.running_var[steps], self.momentum)
        elif self.mem_bn:
            gain, shift = self.folded_norm()
            p = p._replace(gain=gain[steps], shift=shift[steps])
        if self.made_again(current):
            v = None if self.v is None else self.v.detach()
            self.v, found = fire_into(
                current, v, p, running=running, synapses=synapses, pool=pool, observer=self.observer
            )  # fmt: skip
            return found
        spikes, v = self.kept(current, p, running, steps)
        self.v = None if self.parallel else v
        if spikes.requires_grad and not torch.compiler.is_compiling() and not transformed():
            spikes.register_hook(refuse_second_order)
        if self.observer is not None:
            self.observer(spikes.detach())
        return [spikes]

    def kept(self, current: Current, p: NeuronParams, running: Running | None, steps: slice):
        """(spikes, v) of k steps; what backward needs is left to autograd."""
        own = self.activation == "relu" and (running is None or self.batch_norm is F.batch_norm)
        fast = not torch.is_grad_enabled() and active(current.y) and own and p.gain is None
        if own and running is None and current.pending and (fast or on_kernels(current.y)):
            p = current.leave_norm(p)
            if fast and not on_kernels(current.y):
                return neuron_forward(current.y, self.v, p, stats=current.stats())[:2]
            spikes, v, *stats = norm_neuron(current.y, self.v, p)
            move(current.running, stats, current.y)
            return spikes, v
        x = current.value
        if fast and not on_kernels(x):
            return neuron_forward(x, self.v, p, running=running)[:2]
        if own and running is not None and on_kernels(x):
            spikes, v, *stats = norm_neuron(x, self.v, p)
            move(running, stats, x)
            return spikes, v
        if own and running is None:
            return plain_neuron(x, self.state(x), p)
        normalize = None if running is None else partial(self.normalize, steps.start)
        cut = [x[k] for k in range(len(x))]
        spikes, v = neuron_steps(cut, self.state(x), p, normalize=normalize, activation=ACTIVATIONS[self.activation])
        return torch.stack(spikes), v

    def state(self, x: Tensor) -> Tensor | None:
        """v; where there is a gradient, v[0] = 0 as a tensor: the leak has one (zero) in the first step too."""
        if self.v is None and not self.parallel and torch.is_grad_enabled():
            return torch.zeros_like(x[0], dtype=working_dtype(x))
        return self.v

    def normalize(self, start: int, k: int, m: Tensor) -> Tensor:
        """m -> mh of step start + k with the statistics of the batch; it moves the running statistics."""
        t = start + k
        check_count(m[None])
        normed = self.batch_norm(
            m, self.running_mean[t], self.running_var[t], self.weight[t], self.bias[t],
            training=True, momentum=self.momentum, eps=self.eps,
        )  # fmt: skip
        return per_channel(self.alpha[t], m.dim()) * m + per_channel(self.beta[t], m.dim()) * normed

    def extra_repr(self) -> str:
        """What `print(neuron)` says."""
        kind = "parallel" if self.parallel else "mem_bn" if self.mem_bn else "vanilla"
        bits = "" if self.spike_bits is None else f", spike_bits={self.spike_bits}"
        return f"T={self.T}, {kind}, activation={self.activation}{bits}"


class TriangleSpike(torch.autograd.Function):
    """Heaviside step of x = m - threshold; surrogate gradient `max(0, g - |x|) / g^2` with g = 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_spike: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return d_spike * (1 - x.abs()).clamp(min=0)


def lif_step(i: Tensor, v: Tensor | None, leak, threshold) -> tuple[Tensor, Tensor]:
    """One step of the LIF neuron as a pure function: (s, v) from the current and the potential (None = 0)."""
    m = i if v is None else leak * v + i
    s = TriangleSpike.apply(m - threshold)
    return s, m - threshold * s


class LIFNeuron(StatefulNeuron):
    """Leaky integrate-and-fire with binary spikes, soft reset and triangle surrogate gradient: the baseline.

        m = leak * v + I      s = [m >= threshold]      v = m - threshold * s

    `leak` and `threshold` are constants, shown as (T,) tensors. With `.online` the potential is detached between steps
    (SLTT), without it the gradient goes through time. It is kept in fp32 at least.
    """

    def __init__(self, T: int | None, *, leak: float = 0.5, threshold: float = 1.0):
        super().__init__(T)
        self.register_buffer("leak", torch.full((T or 1,), float(leak)), persistent=False)
        self.register_buffer("threshold", torch.full((T or 1,), float(threshold)), persistent=False)

    def forward(self, current: Tensor | Current) -> Tensor:
        """As `EMPFNeuron.forward`."""
        current = current.value if isinstance(current, Current) else tensor(current)
        steps = self.advance(current)
        v, spikes, dtype = self.v, [], working_dtype(current)
        leak, threshold = self.of_steps(self.leak, steps), self.of_steps(self.threshold, steps)
        for k in range(len(current)):
            if v is not None and self.online:
                v = v.detach()
            s, v = lif_step(current[k].to(dtype), v, leak[k], threshold[k])
            spikes.append(s.to(current.dtype))
        self.v = v.detach() if self.online else v
        spikes = torch.stack(spikes)
        if self.observer is not None:
            self.observer(spikes.detach())
        return spikes


def unchanged(neuron: nn.Module) -> bool:
    """Is this neuron one of ours, with no forward of its own?"""
    return type(neuron).forward is EMPFNeuron.forward and "forward" not in vars(neuron)


def spikes_of(neuron: nn.Module, current: Tensor | Current) -> Tensor:
    """The spikes (k, N, C, ...) of a neuron; one that somebody watches, or of another class, is given a tensor."""
    current = Current.of(current)
    return neuron(current if unchanged(neuron) and not hooked(neuron) else current.value)


def spiking_layer(
    neuron: nn.Module, current: Tensor | Current, *synapses: nn.Module, pool: nn.Module | None = None
) -> list[Tensor]:  # fmt: skip
    """y (k, N, C, ...) of each synapse that reads the spikes of `neuron`, pooled by `pool`.

    What each module would give if it were called by itself; convolutions of this library and the neuron are one
    operation where that saves memory, see `empf.layer`, unless somebody watches one of them with a hook.
    """
    current = Current.of(current)
    known = unchanged(neuron) and all(getattr(s, "made_again", False) for s in synapses)
    watched = known and any(hooked(m) for m in (neuron, *synapses, pool) if m is not None)
    if known and not watched and neuron.made_again(current):
        return neuron.outputs(current, synapses, pool)
    spikes = spikes_of(neuron, current)
    if pool is not None:
        spikes = over_steps(pool, spikes)
    return [over_steps(synapse, spikes) for synapse in synapses]
