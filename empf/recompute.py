"""Less memory for the backward pass: spikes and currents are made again there instead of being kept.

What is kept for a spiking convolution are two activations: the potential v before the step and the output y of the
convolution. From them, and from mean and variance of the batch, follow

    I = BN(y) (+ the residual, a sum of the same form)        s = relu(leak * v + I - threshold)

A current carries a `Recipe`; neuron and convolution save, instead of current and spikes, an `Again`. Backward runs
through the same operations as forward, so the spikes are the same bits. This is for calls of one step with gradient in
which v is a constant; anything else keeps its tensors. `enabled(False)` switches all of it off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from empf.fire import (
    charge,
    fire,
    fire_backward,
    folded,
    lane,
    leak_gradient,
    mem_folded,
    move,
    move_statistics,
    normalise,
    stacked,
    statistics,
    step_statistics,
    working_dtype,
)
from empf.kernels.dispatch import use_triton
from empf.kernels.neuron import neuron_update, quantize_spikes
from empf.kernels.norm_neuron import bn_neuron, mem_bn_neuron
from empf.kernels.steps import empty_like_steps, lay_out_like

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
    return _enabled and not torch.compiler.is_compiling() and x[0].numel() > SMALL


def on_kernels(x: Tensor) -> bool:
    return x.dtype != torch.float64 and use_triton(x)


# ---- tensors that are made again


class Again:
    """A tensor that is not kept: `get()` makes it, once until `drop()`."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self.made: Tensor | None = None

    def get(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        return self.made

    def drop(self) -> None:
        self.made = None


class Packed(NamedTuple):
    """Stands in for a saved tensor."""

    swap: "Swap"
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Swap(NamedTuple):
    again: Again
    see: Callable[[Tensor], Tensor] | None  # from what is made to the tensor
    last: bool  # nothing needs what is made after this
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Swaps:
    """Tensors in whose place autograd saves an `Again` inside `with swaps.hooks()`."""

    def __init__(self):
        self.known: dict[int, Swap] = {}  # by address: the hooks must not keep the tensors alive

    def add(self, tensor: Tensor, again: Again, *, see=None, last: bool = False) -> None:
        self.known[tensor.data_ptr()] = Swap(again, see, last, tensor.size(), tensor.stride())

    def pack(self, saved: Tensor) -> Tensor | Packed:
        swap = self.known.get(saved.data_ptr())  # also of a view of some of the pixels
        return saved if swap is None else Packed(swap, saved.size(), saved.stride())

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, unpack)


def unpack(packed: Tensor | Packed) -> Tensor:
    if not isinstance(packed, Packed):
        return packed
    again, see, last, size, stride = packed.swap
    made = again.get()
    if last:
        again.drop()
    made = made if see is None else see(made)
    if made.stride() != stride:  # made from tensors that lie in memory in another way
        made = torch.empty_strided(size, stride, dtype=made.dtype, device=made.device).copy_(made)
    return made.as_strided(packed.size, packed.stride)


class Recipe(NamedTuple):
    """How to make a current of one step: base (1, N, C, ...), or 0, plus the sum of the gain * y + shift.

    Terms (y, gain, shift): y (1, N, C, ...) or an `Again` of it; gain, shift (1, C).
    """

    base: Tensor | None
    terms: tuple[tuple[Tensor | Again, Tensor, Tensor], ...] = ()

    def make(self) -> Tensor:
        """The current (1, N, C, ...), not to be written to."""
        x = self.base
        for y, gain, shift in self.terms:
            y = y.get() if isinstance(y, Again) else y
            x = normalise(y, gain, shift, rest=x, out=None if x is self.base else x)
        return x


def recipe_of(current: Tensor) -> Recipe:
    """The recipe that comes with a current (1, N, C, ...); without one, the current itself."""
    return getattr(current, "recipe", None) or Recipe(current.detach())


# ---- batch normalisation


class NormFn(Function):
    """gain * y + shift (+ rest) with the statistics of the batch; y (k, N, C, ...), mean, rstd (k, C)."""

    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, bias: Tensor, rest: Tensor | None, mean: Tensor, rstd: Tensor):
        ctx.save_for_backward(y, weight, mean, rstd)
        ctx.rest = rest is not None
        return normalise(y, *folded(weight, bias, mean, rstd), rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_current: Tensor):
        y, weight, mean, rstd = ctx.saved_tensors
        d_y, d_weight, d_bias = norm_backward(d_current, y, weight, mean, rstd)
        return d_y, d_weight, d_bias, d_current if ctx.rest else None, None, None


def norm_backward(d: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y (k, N, C, ...), weight and bias (C,), through the statistics of each step."""
    d = lay_out_like(d, y)
    steps = [
        torch.ops.aten.native_batch_norm_backward(
            d[t], y[t], weight, None, None, mean[t], rstd[t], True, 0.0, [True, True, True]
        )  # with the inverse deviation given, eps is not used
        for t in range(len(y))
    ]
    d_y, d_weight, d_bias = zip(*steps, strict=True)
    return stacked(d_y), sum(d_weight), sum(d_bias)


def batch_norm(y: Tensor, norm, momentum: float, rest: Tensor | None, again: Callable[[], Tensor] | None) -> Tensor:
    """A `StepBatchNorm` in training, on (k, N, C, ...); the current carries its recipe.

    rest: a current that is added. again: makes y once more, so that it is not kept.
    """
    mean, rstd = step_statistics(y, norm, momentum)
    if len(y) > 1 or not torch.is_grad_enabled():
        return NormFn.apply(y, norm.weight, norm.bias, rest, mean, rstd)
    source = y.detach() if again is None else Again(again)
    with torch.no_grad():
        term = source, *folded(norm.weight, norm.bias, mean, rstd)
    swaps = Swaps()
    if again is not None:
        swaps.add(y, source, last=True)
    with swaps.hooks():
        current = NormFn.apply(y, norm.weight, norm.bias, rest, mean, rstd)
    before = Recipe(None) if rest is None else recipe_of(rest)
    long = len(before.terms) == MAX_TERMS
    current.recipe = Recipe(current.detach()) if long else Recipe(before.base, (*before.terms, term))
    return current


# ---- neurons


class FireFn(Function):
    """One step of a neuron whose current is x, or BN(x) if mean and rstd are given.

    Saves v and its spikes or, in their place, `raw`: the spikes before the quantiser.
    """

    @staticmethod
    def forward(ctx, x, v, leak, threshold, weight, bias, mean, rstd, bits, step, swaps, raw):
        gain, shift = (None, None) if mean is None else folded(weight, bias, mean, rstd)
        spikes, v_out = fire(x, v, leak, threshold, gain=gain, shift=shift, bits=bits, step=step)
        ctx.made_again = raw is not None
        if ctx.made_again:
            swaps.add(spikes, raw, last=True)
        ctx.set_materialize_grads(False)  # of v: there is none
        ctx.top = None if bits is None else (2**bits - 1) * step
        ctx.save_for_backward(spikes, v, leak, threshold, *(() if mean is None else (x, weight, mean, rstd)))
        if v_out is not None:
            ctx.mark_non_differentiable(v_out)
        return spikes, v_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_spikes, _):
        s, v, leak, threshold, *norm = ctx.saved_tensors
        d_spikes = lay_out_like(d_spikes, s)
        d_x, d_leak, d_threshold = fire_backward(
            d_spikes[0], s[0], v, leak, threshold, ctx.top, in_place=ctx.made_again
        )  # fmt: skip
        d_x = d_x[None].to(d_spikes.dtype)
        d_weight = d_bias = None
        if norm:
            d_x, d_weight, d_bias = norm_backward(d_x, *norm)
        return d_x, None, d_leak, d_threshold, d_weight, d_bias, *[None] * 6


class MemFireFn(Function):
    """One step of a Mem-BN neuron, m = leak * v + x, mean and rstd (1, C) being those of m.

    Saves v, the current x and, in the place of its spikes, `raw`: the spikes before the quantiser.
    """

    @staticmethod
    def forward(ctx, x, v, leak, threshold, alpha, beta, weight, bias, m, mean, rstd, bits, step, swaps, raw):
        gain, shift = mem_folded(alpha, beta, weight, bias, mean, rstd)
        spikes, v_out = fire(m, None, leak, threshold, gain=gain, shift=shift, bits=bits, step=step)
        spikes = spikes.to(x.dtype)
        swaps.add(spikes, raw, last=True)
        ctx.set_materialize_grads(False)  # of v: there is none
        ctx.top = None if bits is None else (2**bits - 1) * step
        ctx.save_for_backward(spikes, x, v, leak, threshold, alpha, beta, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(v_out)
        return spikes, v_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_spikes, _):
        s, x, v, leak, threshold, alpha, beta, weight, bias, mean, rstd = ctx.saved_tensors
        d_spikes = lay_out_like(d_spikes, s)
        d_mh, _, d_threshold = fire_backward(d_spikes[0], s[0], None, None, threshold, ctx.top, in_place=True)
        d_mh = d_mh[None]
        m = charge(x[0], v, leak[0])[None]
        d_m, sum_hat, sum_1 = norm_backward(d_mh, m, weight[0], mean, rstd)
        a, b = (lane(p[0], x[0]) for p in (alpha, beta))
        d_m.mul_(b).addcmul_(d_mh, a)
        d_leak = leak_gradient(d_m[0], v, leak)
        d_alpha = sum_hat / rstd[0] + mean[0] * sum_1  # m = hat / rstd + mean
        d_beta = weight[0] * sum_hat + bias[0] * sum_1
        d_alpha, d_beta = ((d if p.dim() == 2 else d.sum())[None] for d, p in ((d_alpha, alpha), (d_beta, beta)))
        d_weight, d_bias = (beta[0] * sum_hat)[None], (beta[0] * sum_1)[None]
        return d_m.to(x.dtype), None, d_leak, d_threshold, d_alpha, d_beta, d_weight, d_bias, *[None] * 7


def spike(x: Tensor, neuron, t: int, leak, threshold, norm=None) -> tuple[Tensor, Tensor | None]:
    """(spikes, v) of one step of an `EMPFNeuron` at time t, x (1, N, C, ...); the spikes know how to be made again.

    norm: a `StepBatchNorm` in training that x still has to go through. Mem-BN uses the statistics of the batch.
    """
    v = None if neuron.v is None else neuron.v.detach()
    options = {"bits": neuron.spike_bits, "step": neuron.spike_step}
    if on_kernels(x):
        return kernel_spike(x, neuron, t, v, leak, threshold, norm, options)
    if neuron.mem_bn:
        return mem_spike(x, neuron, t, v, leak, threshold, options)
    constants = [None if p is None else p.detach() for p in (leak, threshold)]
    swaps, stats, recipe, raw = Swaps(), [None] * 4, recipe_of(x), None
    if norm is not None:
        stats = [norm.weight, norm.bias, *step_statistics(x, norm)]
        recipe = Recipe(None, ((x.detach(), *(p.detach() for p in folded(*stats))),))
    if norm is not None or hasattr(x, "recipe") or x.dtype != working_dtype(x) or neuron.spike_bits is not None:
        raw = Again(lambda: fire_recipe(recipe, v, *constants, rounded=norm is None))
    with swaps.hooks():  # without a raw, the spikes are kept: to keep the current instead would gain nothing
        spikes, v_out = FireFn.apply(x, v, leak, threshold, *stats, *options.values(), swaps, raw)
    if raw is not None:
        spikes.again = raw, quantiser(*options.values(), x.dtype)
    return spikes, v_out


def mem_spike(x: Tensor, neuron, t: int, v, leak, threshold, options: dict) -> tuple[Tensor, Tensor]:
    own = [p[t : t + 1] for p in (neuron.alpha, neuron.beta, neuron.weight, neuron.bias)]
    constants = [p.detach() for p in (leak, threshold, *own)]
    swaps, current = Swaps(), Again(recipe_of(x).make)
    m = charge(x[0], v, leak[0])
    mean, var = statistics(m, (neuron.running_mean[t], neuron.running_var[t]), neuron.momentum)
    stats = mean[None], torch.rsqrt(var + neuron.eps)[None]

    def make() -> Tensor:
        leak, threshold, *own = constants
        m = charge(current.get()[0], v, leak[0])[None]
        gain, shift = mem_folded(*own, *stats)
        return fire(m, None, leak, threshold, gain=gain, shift=shift, out=empty_like_steps(m, m.dtype))[0]

    raw = Again(make)
    swaps.add(x, current, last=True)
    with swaps.hooks():
        spikes, v_out = MemFireFn.apply(
            x, v, leak, threshold, *own, m[None], *stats, *options.values(), swaps, raw
        )  # fmt: skip
    spikes.again = raw, quantiser(*options.values(), x.dtype)
    return spikes, v_out


def kernel_spike(x: Tensor, neuron, t: int, v, leak, threshold, norm, options: dict) -> tuple[Tensor, Tensor | None]:
    """`spike` with the Triton kernels, whose operators keep the current (or what `norm` gets), v and vectors."""
    swaps, current, stats = Swaps(), Again(recipe_of(x).make), None
    if norm is not None:
        function, parameters = bn_neuron, (leak, threshold, norm.weight, norm.bias)
        options |= {"parallel": neuron.parallel, "eps": norm.eps}
        current = Again(x.detach)
    elif neuron.mem_bn:
        own = (p[t : t + 1] for p in (neuron.alpha, neuron.beta, neuron.weight, neuron.bias))
        function, parameters = mem_bn_neuron, (leak, threshold, *own)
        options |= {"eps": neuron.eps}
    else:
        function, parameters = neuron_update, (leak, threshold)
        options |= {"parallel": neuron.parallel}
    swaps.add(x, current, last=True)
    with swaps.hooks():
        spikes, v_out, *stats = function(x, v, *parameters, **options)
    if stats and norm is not None:
        move_statistics(norm, *stats, x)
    elif stats:
        move(neuron.running_mean[t], neuron.running_var[t], *(s[0] for s in stats), neuron.momentum, x)
    options |= {"stats": stats} if stats else {}
    constants = [None if p is None else p.detach() for p in parameters]
    spikes.again = Again(lambda: function(current.get(), v, *constants, **options)[0]), None
    return spikes, v_out


def fire_recipe(recipe: Recipe, v, leak, threshold, *, rounded: bool) -> Tensor:
    """The spikes before the quantiser, in fp32 at least; `rounded`: the current had been written in its own type."""
    terms = [(y.get() if isinstance(y, Again) else y, gain, shift) for y, gain, shift in recipe.terms]
    if recipe.base is not None:
        terms.insert(0, (recipe.base, None, None))
    dtype = working_dtype(terms[0][0])
    if rounded and any(y.dtype != dtype for y, _, _ in terms):
        terms = [(recipe.make(), None, None)]
    (x, gain, shift), *more = terms
    return fire(x, v, leak, threshold, gain=gain, shift=shift, more=more, out=empty_like_steps(x, dtype))[0]


def quantiser(bits: int | None, step: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda raw: (raw if bits is None else quantize_spikes(raw, bits, step)).to(dtype)


# ---- layers behind a neuron


def saving(spikes: Tensor):
    """Context for a layer that is fed `spikes`: if they can be made again, it does not keep them."""
    again, see = getattr(spikes, "again", (None, None))
    if again is None:
        return nullcontext()
    swaps = Swaps()
    swaps.add(spikes, again, see=see)
    return swaps.hooks()
