"""A spiking layer in training: what it computes, and what it keeps for the backward pass.

A layer is a neuron and the synapses that read its spikes. Between layers goes a `Current`: a value that has not been
added up yet, the sum of what normalised convolutions have put out. `SpikingLayerFn` keeps of a layer two activations,
the potential v before the step and the outputs y that its current is the sum of. From them, and from mean and variance
of the batch, backward makes the rest again, to the same bits:

    I = BN(y) (+ the residual, a sum of the same form)        s = relu(leak * v + I - threshold)

This is for one step with gradient in which v is a constant; anything else keeps its tensors, as does `enabled(False)`.
Here is also the part of a network that works on currents: `StepBatchNorm`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules import module as torch_module

from empf.kernels.dispatch import transformed
from empf.kernels.neuron import NeuronParams, on_kernels
from empf.kernels.neuron_cpu import folded, norm_backward, normalise, stacked, step_statistics, total_of
from empf.kernels.neuron_engine import Running, Stats, Term, neuron_again, neuron_backward, neuron_forward

MAX_TERMS = 4  # a longer sum of currents is kept: making it again would take longer than it is worth
SMALL = 1 << 16  # numbers of a step in an activation; up to here the calls cost more than the passes over memory

_enabled = True


@contextmanager
def enabled(flag: bool) -> Iterator[None]:
    """Inside: are activations made again (True, the default), or kept as plain modules keep them."""
    global _enabled
    before, _enabled = _enabled, flag
    try:
        yield
    finally:
        _enabled = before


def active(x: Tensor) -> bool:
    """Is this done to x (k, N, ...)? Not to a small one: it would cost more time than it is worth."""
    return _enabled and not torch.compiler.is_compiling() and x[0].numel() > SMALL and not transformed()


def refuse_second_order(_: Tensor | None = None) -> None:
    """For backward passes, and a hook: a small activation, which is kept, behaves as one that is made again."""
    if _enabled and torch.is_grad_enabled():
        raise RuntimeError(
            "neurons have gradients of first order only, and create_graph=True asks for more: "
            "run forward and backward within empf.layer.enabled(False)"
        )


def hooked(module: nn.Module) -> bool:
    """Does somebody watch what goes in and out of this module? Then it is called as any module, with tensors."""
    found = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(found) or torch_module._has_any_global_hook()


def over_steps(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer without state to all steps as one folded batch: (k, N, ...) -> (k, N, ...)."""
    if getattr(layer, "takes_steps", False):  # it does that itself
        return layer(x)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def check_count(x: Tensor) -> None:
    """Raise ValueError unless a step of x (k, N, C, ...) has the two values per channel that a variance needs."""
    if x.shape[1:].numel() < 2 * x.shape[2]:
        raise ValueError(
            f"batch norm needs more than one value per channel to train, got a batch of shape {tuple(x.shape[1:])}: "
            "use a larger batch (--batch-size), or larger images"
        )


class Remade:
    """A tensor that is not kept: a call makes it, once until `drop()`."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        return self.made

    def drop(self) -> None:
        self.made = None


# ---- batch normalisation


class StepBatchNorm(nn.Module):
    """Batch norm of (k, N, C, ...) over the batch of one time step: statistics per step while training.

    Gain and bias (C,) and the running statistics are shared by the steps. A static image is encoded once but used in k
    steps: with `repeat` = k the running statistics move by the momentum 1 - (1 - momentum)^k, as k passes would do it.
    Raises ValueError in training where a channel has a single value per step. torch's `update_bn` and
    `convert_sync_batchnorm` pass it over: run batches in training mode, or `empf.training.sync_norm.sync_norms`.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.frozen_norm = False  # True: training uses the running statistics and leaves them alone
        self.batch_norm = F.batch_norm  # what normalises a step in training

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        """(k, N, C, ...) -> the same shape, each step normalised by itself in training."""
        return self.current(x, repeat=repeat).value

    def current(
        self, y: Tensor, rest: "Tensor | Current | None" = None, repeat: int | None = None, again: Callable = None
    ) -> "Current":
        """BN(y) + rest, not added up yet; without `repeat` a neuron may take the norm into its own pass.

        `again`: makes y once more, so that it need not be kept for backward.
        """
        if not self.training or self.frozen_norm:
            stats = (self.running_mean, self.running_var, self.weight, self.bias)
            return Current(plus(over_steps(lambda x: F.batch_norm(x, *stats, eps=self.eps), y), rest))
        check_count(y)
        momentum = 1 - (1 - self.momentum) ** (repeat or 1)
        if self.batch_norm is F.batch_norm and (active(y) or on_kernels(y)):
            rest = None if rest is None else Current.of(rest)
            return Current(y, self, momentum, rest, again, pending=repeat is None and rest is None)
        return Current(plus(self.plain(y, momentum), rest))

    def plain(self, y: Tensor, momentum: float) -> Tensor:
        """In torch's own operations."""
        stats = (self.running_mean, self.running_var, self.weight, self.bias)
        return stacked([self.batch_norm(x, *stats, training=True, momentum=momentum, eps=self.eps) for x in y])


def plus(x: Tensor, rest: "Tensor | Current | None") -> Tensor:
    return x if rest is None else x + Current.of(rest).value


class NormFn(Function):
    """gain * y + shift (+ rest) with the statistics of the batch; y (k, N, C, ...), mean, rstd (k, C)."""

    @staticmethod
    def forward(ctx, y: Tensor, weight, bias, rest: Tensor | None, mean, rstd, again: Remade | None):
        ctx.save_for_backward(None if again else y, weight, mean, rstd)
        ctx.rest, ctx.again = rest is not None, again
        return normalise(y, *folded(weight, bias, mean, rstd), rest)

    @staticmethod
    def backward(ctx, d_current: Tensor):
        refuse_second_order()
        y, weight, mean, rstd = ctx.saved_tensors
        d_y, d_weight, d_bias = norm_backward(d_current, ctx.again() if ctx.again else y, weight, mean, rstd)
        if ctx.again:
            ctx.again.drop()
        return d_y, d_weight, d_bias, d_current if ctx.rest else None, None, None, None


class Current:
    """A current (k, N, C, ...) that has not been added up yet: y, or BN(y) in training (+ the current `rest`).

    `value` is the sum, a node of the graph; `terms` what backward makes it from again. A neuron that can do that takes
    BN(y) in its own pass, and the sum is never formed.
    """

    def __init__(
        self, y: Tensor, norm: StepBatchNorm | None = None, momentum=0.1, rest=None, again=None, pending=False
    ):
        self.y, self.norm, self.momentum, self.rest = y, norm, momentum, rest
        self.again = None if again is None or len(y) > 1 or not torch.is_grad_enabled() else Remade(again)
        self._value, self._pending = y if norm is None else None, pending
        self._stats: Stats | None = None
        self._terms: tuple[Term, ...] | None = None

    @staticmethod
    def of(x: "Tensor | Current") -> "Current":
        return x if isinstance(x, Current) else Current(x)

    @property
    def shape(self) -> torch.Size:
        return self.y.shape

    @property
    def pending(self) -> bool:
        """Is this BN(y) alone, not formed yet, so that a neuron may take it?"""
        return self._pending and self._value is None

    def leave_norm(self, p: NeuronParams) -> NeuronParams:
        """The parameters of a neuron that takes `pending` y, and normalises it itself."""
        self.momentum = self.norm.momentum  # y is used once
        return p._replace(weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps)

    @property
    def running(self) -> Running:
        return Running(self.norm.running_mean, self.norm.running_var, self.momentum)

    def stats(self) -> Stats:
        """Mean and variance of each step of y; the running statistics move when this is first asked for."""
        if self._stats is None:
            self._stats = step_statistics(self.y, self.running)
        return self._stats

    @property
    def value(self) -> Tensor:
        if self._value is None:
            rest = None if self.rest is None else self.rest.value
            if self._stats is None and not active(self.y):
                self._value = plus(self.norm.plain(self.y, self.momentum), rest)
                self.norm, self.rest = None, None
            else:
                mean, var = self.stats()
                rstd = torch.rsqrt(var + self.norm.eps)
                self._value = NormFn.apply(self.y, self.norm.weight, self.norm.bias, rest, mean, rstd, self.again)
        return self._value

    def terms(self) -> tuple[Term, ...]:
        """What the value is the sum of; y may be a `Remade`."""
        if self._terms is None:
            before = () if self.norm is None or self.rest is None else self.rest.terms()
            if self.norm is None or sum(term.gain is not None for term in before) == MAX_TERMS:
                self._terms = (Term(self.value.detach()),)
            else:
                mean, var = self.stats()
                with torch.no_grad():
                    vectors = folded(self.norm.weight, self.norm.bias, mean, torch.rsqrt(var + self.norm.eps))
                self._terms = *before, Term(self.again or self.y.detach(), *vectors)
        return self._terms


# ---- the autograd functions of a layer


def laid_aside(terms: Sequence[Term]) -> tuple[list[Remade | None], list[Tensor | None]]:
    """Terms as what is kept beside the graph, and in it."""
    remade = [y if isinstance(y, Remade) else None for y, _, _ in terms]
    return remade, [None if isinstance(part, Remade) else part for term in terms for part in term]


def taken_up(remade: Sequence[Remade | None], parts: Sequence[Tensor | None]) -> list[Term]:
    """The terms that were `laid_aside`, as tensors."""
    return [Term(y() if y else parts[3 * i], *parts[3 * i + 1 : 3 * i + 3]) for i, y in enumerate(remade)]


class ReadFn(Function):
    """One step of a convolution that reads a current x instead of spikes: y. Backward adds x up again."""

    @staticmethod
    def forward(ctx, terms: tuple[Term, ...], synapse: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        ctx.remade, parts = laid_aside(terms)
        ctx.save_for_backward(w, *parts)
        ctx.synapse = synapse
        return synapse.run(x[0], w)[None]

    @staticmethod
    def backward(ctx, d_y: Tensor):
        refuse_second_order()
        w, *parts = ctx.saved_tensors
        x = total_of(taken_up(ctx.remade, parts))
        d_x, d_w = ctx.synapse.run_backward(d_y[0], x[0], w, *ctx.needs_input_grad[2:])
        return None, None, None if d_x is None else d_x[None], d_w


def read_current(synapse: nn.Module, current: Current) -> Tensor:
    """y (k, N, C, ...) of a synapse that reads the current itself, which is not kept for that where it is large."""
    known = getattr(synapse, "made_again", False) and not hooked(synapse)
    if known and len(current.y) == 1 and torch.is_grad_enabled() and active(current.y):
        return ReadFn.apply(current.terms(), synapse, current.value, synapse.learned())
    return over_steps(synapse, current.value)


@dataclass
class Layer:
    """What `SpikingLayerFn` is called with besides tensors that learn."""

    terms: tuple[Term, ...]
    v: Tensor | None
    running: Running | None
    stats: Stats | None
    options: dict  # of `NeuronParams`
    pool: nn.Module | None
    synapses: Sequence[nn.Module]
    observer: Callable[[Tensor], None] | None


class SpikingLayerFn(Function):
    """One step of a neuron and of the convolutions that read its spikes: (v, y of each), or (v, spikes) without any.

    x: the current, or with weight and bias but no alpha and beta what batch norm makes it of.
    """

    @staticmethod
    def forward(ctx, layer: Layer, x, leak, threshold, alpha, beta, weight, bias, *learned):
        p = NeuronParams(leak, threshold, alpha, beta, weight, bias, **layer.options)
        spikes, v_out, stats = neuron_forward(x, layer.v, p, running=layer.running, stats=layer.stats)
        layer.stats = stats
        if layer.observer is not None:
            layer.observer(spikes)
        ctx.remade, parts = laid_aside(layer.terms)
        ctx.save_for_backward(layer.v, *(stats or (None, None)), *p.tensors(), *parts, *learned)
        ctx.options, ctx.pool, ctx.synapses = layer.options, layer.pool, layer.synapses
        ctx.set_materialize_grads(False)
        if v_out is not None:
            ctx.mark_non_differentiable(v_out)
        if not learned:
            return v_out, spikes
        read = spikes[0] if layer.pool is None else layer.pool(spikes[0])
        return v_out, *(s.run(read, w)[None] for s, w in zip(layer.synapses, learned, strict=True))

    @staticmethod
    def backward(ctx, _, *d_outputs):
        refuse_second_order()
        v, mean, var, *rest = ctx.saved_tensors
        p, stats = NeuronParams(*rest[:6], **ctx.options), None if mean is None else (mean, var)
        count = len(ctx.remade)
        parts, learned = rest[6 : 6 + 3 * count], rest[6 + 3 * count :]
        spikes, kept = neuron_again(taken_up(ctx.remade, parts), v, p, stats)
        needed = ctx.needs_input_grad
        d_learned = [None] * len(learned)
        if not learned:
            (d_spikes,) = d_outputs
        else:
            read = spikes[0] if ctx.pool is None else ctx.pool(spikes[0])
            d_read = None
            for i, (d_y, s, w) in enumerate(zip(d_outputs, ctx.synapses, learned, strict=True)):
                if d_y is None:
                    continue
                d_one, d_learned[i] = s.run_backward(d_y[0], read, w, any(needed[1:8]), needed[8 + i])
                d_read = d_one if d_read is None or d_one is None else d_read + d_one
            d_spikes = None if d_read is None else unpooled(ctx.pool, spikes[0], d_read)[None]
        if d_spikes is None or not any(needed[1:8]):
            return None, *[None] * 7, *d_learned
        return None, *neuron_backward(d_spikes, kept, v, p, stats), *d_learned


def unpooled(pool: nn.Module | None, x: Tensor, d: Tensor) -> Tensor:
    """The gradient of x, d being that of pool(x)."""
    if pool is None:
        return d
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(pool(x), x, d)[0]


def fire_into(
    current: Current, v: Tensor | None, p: NeuronParams, *, running: Running | None,
    synapses: Sequence[nn.Module] = (), pool: nn.Module | None = None,
    observer: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """One step with gradient: (v, [y of each synapse]), or (v, [spikes]) without any. `p` may hold Mem-BN."""
    if p.alpha is None and current.pending:
        x, p, running = current.y, current.leave_norm(p), current.running
        stats, terms = None if on_kernels(x) else current.stats(), (Term(x.detach()),)
    else:
        x, stats, terms = current.value, None, current.terms()
    options = {name: getattr(p, name) for name in ("bits", "step", "parallel", "detach", "eps", "clipped")}
    layer = Layer(terms, v, running, stats, options, pool, synapses, observer)
    v, *outputs = SpikingLayerFn.apply(layer, x, *p.tensors(), *(s.learned() for s in synapses))
    if current.pending:
        current._stats = layer.stats  # whoever asks for the value after all gets that of the same statistics
    return v, outputs
