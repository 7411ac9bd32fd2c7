"""The spiking neuron on a CPU: plain torch with few passes over memory. `neuron_engine.py` is the door to it.

Same arithmetic as `neuron_step`, number by number and in the same order, but piece by piece: all operations on a piece
of the batch run while it is in the cache. Only v is min(mh, threshold) itself, which mh - s is up to rounding. Nothing
here is seen by autograd.

x (k, N, C, ...)      v, one step (N, C, ...)      leak, threshold (k,) or (k, C)      gain, shift (k, C)
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .neuron import NeuronParams, spike_codes
from .steps import empty_like_steps, is_channels_last, lay_out_like

Stats = tuple[Tensor, Tensor]  # mean and biased variance, each (k, C)
Kept = tuple[Tensor, Tensor | None]


class Term(NamedTuple):
    """A part of a current (1, N, C, ...): y itself, or gain * y + shift with gain, shift (1, C)."""

    y: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None


class Running(NamedTuple):
    """Running statistics that a step moves in place: (C,), those of all steps, or (k, C), one for each."""

    mean: Tensor
    var: Tensor
    momentum: float

    def of_step(self, k: int) -> "Running":
        return self if self.mean.dim() == 1 else Running(self.mean[k], self.var[k], self.momentum)


# Numbers of one step in a piece, for each thread; smaller ones would fit the cache better but cost calls.
PIECE = 1 << 18
RUN = 32  # numbers; for shorter runs, torch's loop over them shows


def pieces(*steps: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The tensors (N, C, ...) cut along the batch alike, so that the pieces fit the cache; whole on an accelerator."""
    first = steps[0]
    size = len(first)
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(1, PIECE * torch.get_num_threads() * size // max(1, first.numel()))
    if size >= len(first):
        yield steps
        return
    cut = {}  # a tensor that is given twice is cut once: an operation in place is recognised by that
    for step in steps:
        if id(step) not in cut:
            cut[id(step)] = [None] * -(-len(first) // size) if step is None else step.split(size)
    yield from zip(*(cut[id(step)] for step in steps), strict=True)


def per_channel(p: Tensor, dims: int) -> Tensor:
    """(C,) -> (C, 1, ...) so that it broadcasts against a step (N, C, ...) with `dims` dimensions; () stays."""
    return p.view(-1, *[1] * (dims - 2)) if p.dim() else p


def lane(p: Tensor, step: Tensor) -> Tensor:
    """`per_channel` with runs in memory that are not shorter than RUN."""
    c = len(p) if p.dim() else RUN
    if c < RUN and step.dim() == 4 and step.device.type == "cpu" and is_channels_last(step[None]):
        return p.expand(step.shape[3], c).contiguous().t().unsqueeze(1)  # C 1 W, the channel innermost
    return per_channel(p, step.dim())


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def compiled(x: Tensor, out: Tensor, more: Sequence[tuple], *, per_channel: bool) -> bool:
    """Is there code of `native` for a current x (k, N, C, ...), what is added to it and what comes out?"""
    alike = all(y.dtype == x.dtype and y.shape == x.shape and y[0].stride() == x[0].stride() for y, _, _ in more)
    return alike and out[0].stride() == x[0].stride() and native.runs(x, per_channel)


@torch.no_grad()
def normalise(y: Tensor, gain: Tensor, shift: Tensor, rest: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """gain * y + shift (+ rest), y (k, N, C, ...), gain, shift (k, C); `out` may be `rest`."""
    in_place = out is not None and out is rest
    out = empty_like_steps(y, y.dtype) if out is None else out
    more = () if rest is None else ((rest, None, None),)
    if compiled(y, out, more, per_channel=True) and out.dtype == y.dtype:
        nothing, current = (None,) * 4, native.table((gain, shift), len(y))
        return native.fire(y, None, nothing, potential=False, current=current, more=more, out=out)[0]
    # a type below that of gain and shift is rounded to in a copy: torch's operations would do it number by number
    direct = not in_place and out.dtype == torch.promote_types(y.dtype, gain.dtype)
    for t, step in enumerate(y):
        gain_t, shift_t = lane(gain[t], step), lane(shift[t], step)
        for y_n, rest_n, out_n in pieces(step, None if rest is None else rest[t], out[t]):
            normed = torch.addcmul(shift_t, y_n, gain_t, out=out_n if direct else None)
            if rest is not None:
                normed.add_(rest_n)
            if not direct:
                out_n.copy_(normed)
    return out


@torch.no_grad()
def charge(x: Tensor, v: Tensor | None, leak: Tensor | None) -> Tensor:
    """m = leak * v + x of one step, in fp32 at least; not to be written to."""
    if v is None:
        return x.to(working_dtype(x))
    m = empty_like_steps(x[None], working_dtype(x), one_step=True)
    leak = lane(leak, x)
    for x_n, v_n, m_n in pieces(x, v, m):
        torch.mul(v_n, leak, out=m_n).add_(x_n)
    return m


@torch.no_grad()
def fire(
    x: Tensor,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    bits: int | None = None,
    step: float = 0.25,
    more: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """k steps of a neuron: (spikes, v after the last step).

    gain, shift: the current is gain * x + shift. leak None: a parallel neuron, without v.
    out: where the spikes of one step go. Then v is not computed, and terms (x, gain, shift) may come
    with `more`.
    """
    dtype = working_dtype(x)
    spikes = empty_like_steps(x, x.dtype) if out is None else out
    v, potential = None if leak is None else v, leak is not None and out is None
    own = threshold.dim() == 2 or gain is not None or any(g is not None for _, g, _ in more)
    channels = x.shape[2] if own else 1
    if compiled(x, spikes, more, per_channel=channels > 1):
        tables = native.table((leak, threshold, gain, shift), len(x), channels)
        terms = [(y, *native.table((g, h), 1, channels)) for y, g, h in more]
        return native.fire(
            x, v, (*tables[:2], None, None), potential=potential, current=tables[2:], more=terms, bits=bits, step=step,
            out=spikes,
        )  # fmt: skip

    def lanes(p):
        return repeat(None) if p is None else [lane(q.to(dtype), x[0]) for q in p]

    of_steps = zip(lanes(leak), lanes(threshold), repeat(None), repeat(None), lanes(gain), lanes(shift), strict=False)
    more = [(y[0], lane(g[0], x[0]), lane(h[0], x[0])) for y, g, h in more]
    v = fire_steps(x, v, list(of_steps), spikes, potential=potential, bits=bits, step=step, more=more)
    return spikes, v


def fire_steps(
    x: Tensor, v: Tensor | None, lanes: Sequence[Sequence[Tensor | None]], spikes: Tensor, *, potential: bool,
    bits: int | None = None, step: float = 0.25, more: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
) -> Tensor | None:  # fmt: skip
    """`fire` into `spikes`; v after the last step, if the potential is wanted.

    lanes: of each step leak, threshold, gain and shift of the potential (Mem-BN that is folded), gain and shift of the
    current, each None or of a shape that broadcasts.
    """
    dtype, steps, v_out = working_dtype(x), x.unbind(), None
    whole = torch.compiler.is_compiling() or steps[0].numel() <= PIECE  # then v is made by the first step
    if potential and not whole:
        v_out = torch.empty_like(steps[0], dtype=dtype)
    k, tensors = len(steps), (*steps, *spikes.unbind(), *(y for y, _, _ in more), v, v_out)
    direct = bits is None and spikes.dtype == dtype  # the spikes are written where they are computed
    for *both, v_n, v_out_n in (tensors,) if whole else pieces(*tensors):
        added = list(zip(both[2 * k :], more, strict=True))
        for x_t, spikes_t, (leak_t, threshold_t, gain_m, shift_m, gain_t, shift_t) in zip(
            both[:k], both[k : 2 * k], lanes, strict=True
        ):
            here = spikes_t if direct else None
            i = x_t if gain_t is None else torch.addcmul(shift_t, x_t, gain_t, out=here)
            for y_n, (_, gain_y, shift_y) in added:
                i = torch.add(torch.addcmul(shift_y, y_n, gain_y), i, out=here)
            m = i.to(dtype) if v_n is None else torch.addcmul(i, v_n, leak_t, out=here)
            m = m if gain_m is None else torch.addcmul(shift_m, m, gain_m, out=here)
            if potential:
                v_n = v_out_n = torch.minimum(m, threshold_t, out=v_out_n)
                s = torch.sub(m, v_n, out=here)
            else:
                s = torch.sub(m, threshold_t, out=here).clamp_min_(0)
            if not direct:
                spikes_t.copy_(s if bits is None else spike_codes(s, bits, step) * step)
    return v_n if whole and potential else v_out


def rounded(spikes: Tensor, bits: int, step: float) -> Tensor:
    """`spike_codes` as uint8, of all steps at once; spikes is written to."""
    top = 2**bits - 0.5  # the conversion to integers is the floor
    return spikes.mul_(1 / step).add_(0.5).clamp_(0.0, top).to(torch.uint8)


def stacked(steps: Sequence[Tensor]) -> Tensor:
    """(k, ...) from its steps; of a single one without a copy."""
    return steps[0].unsqueeze(0) if len(steps) == 1 else torch.stack(steps)


@torch.no_grad()
def statistics(x: Tensor, running: Running) -> Stats:
    """Mean and biased variance of each channel of one step (N, C, ...); moves `running`."""
    return torch.ops.aten.batch_norm_update_stats(x, *running)


def step_statistics(x: Tensor, running: Running) -> Stats:
    """Those of each step of (k, N, C, ...), one after the other."""
    found = [statistics(step, running.of_step(k)) for k, step in enumerate(x)]
    mean, var = (stacked(values) for values in zip(*found, strict=True))
    return mean, var


@torch.no_grad()
def move(running: Running, stats: Stats, x: Tensor) -> None:
    """Move running statistics as `F.batch_norm` does, by the (k, C) statistics of x (k, N, C, ...)."""
    count = x[0, :, 0].numel()
    for k, (mean, var) in enumerate(zip(*stats, strict=True)):
        of_mean, of_var, momentum = running.of_step(k)
        of_mean.lerp_(mean, momentum)
        of_var.lerp_(var * (count / (count - 1)), momentum)


def folded(weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Batch norm as gain * y + shift, each (k, C)."""
    gain = weight * rstd
    return gain, bias - mean * gain


def mem_folded(alpha, beta, weight, bias, mean, rstd) -> tuple[Tensor, Tensor]:
    """Mem-BN as gain * m + shift, each (k, C)."""
    alpha, beta = (p if p.dim() == 2 else p.unsqueeze(1) for p in (alpha, beta))
    gain, shift = folded(weight, bias, mean, rstd)
    return alpha + beta * gain, beta * shift


@torch.no_grad()
def fire_backward(
    d_spikes: Tensor,
    s: Tensor,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    top: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_mh, d_leak, d_threshold) of one step (N, C, ...) whose v is a constant; d_leak is that of a vanilla neuron.

    s: the spikes before the quantiser, which is straight-through, above `top` with gradient 0; d_mh is written over
    them. leak, threshold and their gradients: (1,) or (1, C).
    """
    d_spikes, channels = d_spikes.to(s.dtype), threshold.shape[1] if threshold.dim() == 2 else 1
    ready = native.runs(s[None], channels > 1) and d_spikes.stride() == s.stride()
    if ready and (v is None or (v.dtype, v.stride()) == (torch.float32, s.stride())):
        of_threshold, of_leak = native.fire_backward(d_spikes, s, v, channels, top).to(threshold.dtype)[:, None]
        of_threshold, of_leak = (d.view(threshold.shape) for d in (-of_threshold, of_leak))
        return s, None if leak is None else of_leak, of_threshold
    d_mh = s
    d_threshold, d_leak = [], []
    for d_n, s_n, d_mh_n, v_n in pieces(d_spikes, s, d_mh, v):
        above = None if top is None else s_n > top
        torch.ops.aten.threshold_backward.grad_input(d_n, s_n, 0, grad_input=d_mh_n)
        if above is not None:
            d_mh_n.masked_fill_(above, 0)
        d_threshold.append(total(d_mh_n, threshold))
        if v is not None:
            d_leak.append(total_product(d_mh_n, v_n, leak))
    d_threshold = -torch.stack(d_threshold).sum(0)
    if v is not None:
        return d_mh, torch.stack(d_leak).sum(0), d_threshold
    return d_mh, None if leak is None else torch.zeros_like(leak), d_threshold


@torch.no_grad()
def leak_gradient(d_m: Tensor, v: Tensor | None, leak: Tensor) -> Tensor:
    """Sum of d_m * v, one step (N, C, ...), in the shape of leak, (1,) or (1, C)."""
    if v is None:
        return torch.zeros_like(leak)
    return torch.stack([total_product(d_n, v_n, leak) for d_n, v_n in pieces(d_m, v)]).sum(0)


def total(d: Tensor, p: Tensor) -> Tensor:
    """The sum of (N, C, ...) in the shape (1,) or (1, C) of the parameter, in fp32 at least."""
    over = [i for i in range(d.dim()) if i != 1] if p.dim() == 2 else None
    return d.sum(over, dtype=working_dtype(d)).unsqueeze(0)


def total_product(d: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """`total` of d * v; of a single number in one pass, where both lie alike in memory."""
    layout = is_channels_last(d[None])
    if p.dim() == 2 or d.dtype != v.dtype or layout is None or layout != is_channels_last(v[None]):
        return total(d * v, p)
    if layout:
        d, v = d.movedim(1, -1), v.movedim(1, -1)
    return torch.dot(d.reshape(-1), v.reshape(-1)).unsqueeze(0)


def total_of(terms: Sequence[Term]) -> Tensor:
    """The sum (1, N, C, ...) of terms, not to be written to."""
    x = None
    for y, gain, shift in terms:
        x = y if gain is None else normalise(y, gain, shift, rest=x, out=None if x is terms[0].y else x)
    return x


def quantised(raw: Tensor, p: NeuronParams, dtype: torch.dtype) -> Tensor:
    return (raw if p.bits is None else spike_codes(raw, p.bits, p.step) * p.step).to(dtype)


@torch.no_grad()
def forward(x: Tensor, v: Tensor | None, p: NeuronParams, running: Running | None, stats: Stats | None):
    """`neuron_forward` on a CPU."""
    quantiser = {"bits": p.bits, "step": p.step}
    leak, v = (None, None) if p.parallel else (p.leak, v)
    if p.weight is None:
        return *fire(x, v, leak, p.threshold, **quantiser), None
    if p.alpha is None:
        stats = step_statistics(x, running) if stats is None else stats
        gain, shift = folded(p.weight, p.bias, stats[0], torch.rsqrt(stats[1] + p.eps))
        return *fire(x, v, leak, p.threshold, gain=gain, shift=shift, **quantiser), stats
    spikes, found = empty_like_steps(x, x.dtype) if len(x) > 1 else None, []
    for k, x_k in enumerate(x):
        at_k = slice(k, k + 1)
        m = charge(x_k, v, p.leak[k])
        found.append(statistics(m, running.of_step(k)) if stats is None else (stats[0][k], stats[1][k]))
        mean, var = found[-1]
        own = (q[at_k] for q in p.tensors()[2:])
        gain, shift = mem_folded(*own, mean[None], torch.rsqrt(var + p.eps)[None])
        s, v = fire(m[None], None, p.leak[at_k], p.threshold[at_k], gain=gain, shift=shift, **quantiser)
        if spikes is None:
            spikes = s.to(x.dtype)
        else:
            spikes[k] = s[0]
    return spikes, v, tuple(stacked(values) for values in zip(*found, strict=True))


@torch.no_grad()
def again(terms: Sequence[Term], v: Tensor | None, p: NeuronParams, stats: Stats | None) -> tuple[Tensor, Kept]:
    """`neuron_again` on a CPU. Keeps the spikes (n-bit: before they are rounded) and for Mem-BN the current."""
    dtype, of_terms = working_dtype(terms[0].y), terms[0].y.dtype
    leak, v, current = (None, None, None) if p.parallel else (p.leak, v, None)
    if p.alpha is not None:
        current = total_of(terms)
        m = charge(current[0], v, leak[0])[None]
        gain, shift = mem_folded(*p.tensors()[2:], stats[0], torch.rsqrt(stats[1] + p.eps))
        raw, _ = fire(m, None, leak, p.threshold, gain=gain, shift=shift, out=empty_like_steps(m, dtype))
        return quantised(raw, p, of_terms), (raw, current)
    if p.weight is not None:
        gain, shift = folded(p.weight, p.bias, stats[0], torch.rsqrt(stats[1] + p.eps))
        terms = [Term(terms[0].y, gain, shift)]
    elif of_terms != dtype:  # the current had been written in its own type
        terms = [Term(total_of(terms))]
    (x, gain, shift), *more = terms
    dtype = of_terms if p.bits is None else dtype  # rounding leaves what is above 0 there
    raw, _ = fire(x, v, leak, p.threshold, gain=gain, shift=shift, more=more, out=empty_like_steps(x, dtype))
    return quantised(raw, p, of_terms), (raw, terms[0].y if p.weight is not None else None)


@torch.no_grad()
def backward(d_spikes: Tensor, kept: Kept, v: Tensor | None, p: NeuronParams, stats: Stats | None) -> tuple:
    """`neuron_backward` on a CPU."""
    s, x = kept
    dtype = d_spikes.dtype
    d_spikes = lay_out_like(d_spikes, s)
    if p.alpha is not None:
        d_mh, _, d_threshold = fire_backward(d_spikes[0], s[0], None, None, p.threshold, p.top)
        return mem_backward(d_mh[None], x, v, p, stats, d_threshold)
    leak, v = (None, None) if p.parallel else (p.leak, v)
    d_x, d_leak, d_threshold = fire_backward(d_spikes[0], s[0], v, leak, p.threshold, p.top)
    d_x = d_x[None].to(dtype)
    d_weight = d_bias = None
    if p.weight is not None:
        d_x, d_weight, d_bias = norm_backward(d_x, x, p.weight, stats[0], torch.rsqrt(stats[1] + p.eps))
    return d_x, d_leak, d_threshold, None, None, d_weight, d_bias


def mem_backward(
    d_mh: Tensor, x: Tensor, v: Tensor | None, p: NeuronParams, stats: Stats, d_threshold: Tensor
) -> tuple:
    """The gradients before mh = alpha * m + beta * BN(m)."""
    leak, _, alpha, beta, weight, bias = p.tensors()
    mean, rstd = stats[0], torch.rsqrt(stats[1] + p.eps)
    m = charge(x[0], v, leak[0])[None]
    d_m, sum_hat, sum_1 = norm_backward(d_mh, m, weight[0], mean, rstd)
    a, b = (lane(q[0], x[0]) for q in (alpha, beta))
    d_m.mul_(b).addcmul_(d_mh, a)
    d_leak = leak_gradient(d_m[0], v, leak)
    d_alpha = sum_hat / rstd[0] + mean[0] * sum_1  # m = hat / rstd + mean
    d_beta = weight[0] * sum_hat + bias[0] * sum_1
    d_alpha, d_beta = ((d if q.dim() == 2 else d.sum())[None] for d, q in ((d_alpha, alpha), (d_beta, beta)))
    return d_m.to(x.dtype), d_leak, d_threshold, d_alpha, d_beta, (beta[0] * sum_hat)[None], (beta[0] * sum_1)[None]


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
