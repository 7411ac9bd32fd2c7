"""Spiking neuron with floating-point spikes, T steps in one launch; forward and recomputing backward.

m = leak[t] * v + I[t]          charge (parallel neuron: m = I[t], no state)
mh = gain[t] * m + shift[t]     folded Mem-BN; without gain and shift mh = m
s = relu(mh - threshold[t])     floating-point spike
v = mh - s                      reset: v = min(mh, threshold)
out[t] = Q(s)                   optional n-bit quantiser; v uses the unquantised s

current I        (T, N, C, ...)   fp32 | fp16 | bf16, contiguous or channels_last
v                (N, C, ...)      None = 0; computed and returned in fp32
leak, threshold  (T,) or (T, C)
gain, shift      (T, C)
out              (T, N, C, ...)   dtype of I, or uint8 codes                      arXiv 2410.07547, sec. 4
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import LAUNCH, LAUNCHES, OPS, transformed, use_triton
from .neuron_kernels import _neuron_backward_kernel, _neuron_forward_kernel
from .steps import (
    cat_steps,
    channel_blocks,
    empty_like_steps,
    lay_out_like,
    programs,
    stack_steps,
    steps_dense,
    tile_elements,
    tiling,
)

ACTIVATIONS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "gelu": F.gelu,
}

SPIKE_GRADIENTS = ("identity", "clipped")  # of n-bit spikes

MAX_STEPS = 10  # steps per launch: they are unrolled and live in registers; longer sequences are cut evenly


def quantize_spikes(s: Tensor, bits: int, step: float = 0.25, clipped: bool = False) -> Tensor:
    """n-bit spikes: `Q(s) = clip(floor(s / step + 1/2), 0, 2^bits - 1) * step` (halves round up).

    The gradient is straight-through: 1, also outside of the codes; `clipped`: 0 below 0 and above the largest code.

    >>> quantize_spikes(torch.tensor([0.1, 0.125, 9.0]), bits=4)
    tensor([0.0000, 0.2500, 3.7500])
    """
    learned = s.nan_to_num()  # an infinite s has the largest code: inf - inf would make it NaN
    if clipped:
        learned = learned.where((s >= 0) & (s <= largest(bits, step)), 0.0)
    return spike_codes(s, bits, step) * step + (learned - learned.detach())  # the bracket is 0, with a gradient


def largest(bits: int, step: float) -> float:
    """The largest n-bit spike."""
    return (2**bits - 1) * step


def spike_codes(s: Tensor, bits: int, step: float = 0.25) -> Tensor:
    """The integers `clip(floor(s / step + 1/2), 0, 2^bits - 1)` of the quantiser, in the dtype of s; no gradient."""
    return (s.detach() * (1 / step) + 0.5).floor().clamp(0, 2**bits - 1)


class NeuronParams(NamedTuple):
    """What k steps of a neuron compute with.

    weight, bias: batch norm with the statistics of each step, of the current (C,) or, with alpha and beta, of the
    potential (k, C). gain, shift: that of the potential as it is folded for inference. detach: v of the step before is
    a constant (online learning). clipped: n-bit spikes above the largest code pass no gradient on.
    """

    leak: Tensor | None  # (k,) or (k, C), as threshold, alpha and beta
    threshold: Tensor
    alpha: Tensor | None = None
    beta: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None  # (k, C)
    shift: Tensor | None = None
    bits: int | None = None
    step: float = 0.25
    parallel: bool = False
    detach: bool = True
    eps: float = 1e-5
    clipped: bool = False

    @property
    def top(self) -> float | None:
        """Spikes above it pass no gradient on; None: all of them do."""
        return largest(self.bits, self.step) if self.bits and self.clipped else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """leak, threshold, alpha, beta, weight, bias: those that learn."""
        return self[:6]


def neuron_step(current, v, leak, threshold, normalize=None, activation=torch.relu) -> tuple[Tensor, Tensor]:
    """One step of a spiking neuron: (s, v) from the current and v (None = 0, or a parallel neuron: nothing to leak).

    `normalize`: the function m -> mh, without it mh = m. Everything broadcasts.
    """
    m = current if v is None else leak * v + current
    mh = m if normalize is None else normalize(m)
    s = activation(mh - threshold)
    return s, mh - s


def neuron_steps(
    current: Tensor | Sequence[Tensor], v: Tensor | None, p: NeuronParams, *, normalize=None, activation=torch.relu,
    codes: bool = False,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """The definition of the neuron: `neuron_step`, repeated, in fp32 (fp64 for an fp64 current); its spikes and last v.

    `current`: (k, N, C, ...), or its steps. `normalize(t, m)`: mh of step t; without it, gain and shift do that. weight
    and bias of `p` are not used.
    """
    out_dtype, dims = current[0].dtype, current[0].dim()
    dtype = torch.promote_types(out_dtype, torch.float32)
    like_c = (-1,) + (1,) * (dims - 2)  # (C,) against (N, C, ...)
    state = None if v is None or p.parallel else v.to(dtype)
    spikes = []
    for t, i in enumerate(current):  # N C ...
        at_t = [None if q is None else q[t].to(dtype) for q in (p.leak, p.threshold, p.gain, p.shift)]
        leak, threshold, gain, shift = (q.view(like_c) if q is not None and q.dim() else q for q in at_t)
        to_mh = None if normalize is None else partial(normalize, t)
        if gain is not None:
            to_mh = lambda m, gain=gain, shift=shift: gain * m + shift  # noqa: E731
        if state is not None and p.detach:
            state = state.detach()
        s, after = neuron_step(i.to(dtype), state, leak, threshold, to_mh, activation)
        state = None if p.parallel else after
        if codes:
            s = spike_codes(s, p.bits, p.step).to(torch.uint8)
        elif p.bits is not None:
            s = quantize_spikes(s, p.bits, p.step, p.clipped)
        spikes.append(s if codes else s.to(out_dtype))
    if p.parallel:
        return spikes, v
    return spikes, state.detach() if p.detach else state


def neuron_update_ref(
    current, v, leak, threshold, *, gain=None, shift=None, bits=None, step=0.25, codes=False, parallel=False,
    detach=True, return_v=True, clipped=False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Definition of `neuron_update`: `neuron_steps`, stacked.

    >>> neuron_update_ref(torch.ones(2, 1, 1), None, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))[0].flatten()
    tensor([0.5000, 0.7500])
    """
    options = {"bits": bits, "step": step, "parallel": parallel, "detach": detach, "clipped": clipped}
    p = NeuronParams(leak, threshold, gain=gain, shift=shift, **options)
    spikes, v = neuron_steps(current, v, p, codes=codes)
    return stack_steps(spikes, current), v if return_v else None


def _flags(current, leak, threshold, parallel):
    """What both kernels are specialised for."""
    return {
        "T": len(current),
        "LEAK_C": leak is not None and leak.dim() == 2,
        "THRESHOLD_C": threshold.dim() == 2,
        "PARALLEL": parallel,
    }


def _per_channel(leak, threshold, gain):
    return gain is not None or threshold.dim() == 2 or (leak is not None and leak.dim() == 2)


def _launch_forward(
    current: Tensor, v: Tensor | None, leak: Tensor | None, threshold: Tensor, gain: Tensor | None,
    shift: Tensor | None, bits: int, step: float, codes: bool, parallel: bool, detach: bool, return_v: bool,
    top: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(spikes, v), v empty where it is not wanted."""
    current = steps_dense(current)
    spikes, v_out = _neuron_forward_fake(
        current, v, leak, threshold, gain, shift, bits, step, codes, parallel, detach, return_v, top
    )
    v = None if v is None or parallel else lay_out_like(v[None], current)
    view, tile, tiles = tiling(current, _per_channel(leak, threshold, gain), tile_elements(current, 1))
    LAUNCHES["neuron_update"] += 1
    with torch.cuda.device_of(current):  # Triton launches on the current device, whatever the tensors are on
        _neuron_forward_kernel[(tiles, channel_blocks(view, tile))](
            current, v, leak, threshold, gain, shift, spikes, v_out if return_v else None,
            *view, current.stride(0), 1 / step, step,
            **tile, **_flags(current, leak, threshold, parallel), BITS=bits, CODES=codes, **LAUNCH,
        )  # fmt: skip
    return spikes, v_out


_neuron_forward = torch.library.custom_op(f"{OPS}::neuron_update", _launch_forward, mutates_args=())


@_neuron_forward.register_fake
def _neuron_forward_fake(current, v, leak, threshold, gain, shift, bits, step, codes, parallel, detach, return_v, top):
    spikes = empty_like_steps(current, torch.uint8 if codes else current.dtype)
    v_out = empty_like_steps(current, torch.float32, one_step=True) if return_v else current.new_empty(0)
    return spikes, v_out


@torch.library.custom_op(f"{OPS}::neuron_update_backward", mutates_args=())
def _neuron_backward(
    d_spikes: Tensor, d_v_out: Tensor | None, current: Tensor, v: Tensor | None, leak: Tensor | None,
    threshold: Tensor, gain: Tensor | None, shift: Tensor | None, top: float | None, parallel: bool, detach: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_current, d_v, d_parameters): the last one (2 or 4, T, C), or (2, T, 1) where no parameter is per channel."""
    current = steps_dense(current)
    d_current, d_v, d_parameters = _neuron_backward_fake(
        d_spikes, d_v_out, current, v, leak, threshold, gain, shift, top, parallel, detach, parameters
    )
    d_spikes = lay_out_like(d_spikes, current)
    detach = detach or parallel
    d_v_out = None if detach or d_v_out is None else lay_out_like(d_v_out[None], current)
    v = None if v is None or parallel else lay_out_like(v[None], current)
    elements = tile_elements(current, len(d_parameters) if parameters else 1)
    view, tile, tiles = tiling(current, _per_channel(leak, threshold, gain), elements)
    blocks = channel_blocks(view, tile)
    rows = programs(tiles, blocks, current.device)
    partial = (
        current.new_empty((len(d_parameters), rows, len(current), view[1]), dtype=torch.float32) if parameters else None
    )
    LAUNCHES["neuron_update_backward"] += 1
    with torch.cuda.device_of(current):
        _neuron_backward_kernel[(rows, blocks)](
            current, d_spikes, v, d_v_out, leak, threshold, gain, shift, d_current, d_v, partial,
            *view, tiles, current.stride(0), d_spikes.stride(0), top,
            **tile, **_flags(current, leak, threshold, parallel), DETACH=detach, PARAMETERS=parameters, **LAUNCH,
        )  # fmt: skip
    return d_current, d_v, partial.sum(1) if parameters else d_parameters


@_neuron_backward.register_fake
def _neuron_backward_fake(
    d_spikes, d_v_out, current, v, leak, threshold, gain, shift, top, parallel, detach, parameters
):
    d_current = empty_like_steps(current, current.dtype)
    carried = v is not None and not detach and not parallel
    d_v = empty_like_steps(current, torch.float32, one_step=True) if carried else current.new_empty(0)
    if not parameters:
        return d_current, d_v, current.new_empty(0, dtype=torch.float32)
    slots, c = (2 if gain is None else 4), (current.shape[2] if _per_channel(leak, threshold, gain) else 1)
    return d_current, d_v, current.new_empty((slots, len(current), c), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    current, v, leak, threshold, gain, shift, *_, ctx.parallel, ctx.detach, _, ctx.top = inputs
    ctx.save_for_backward(current, v, leak, threshold, gain, shift)
    ctx.set_materialize_grads(False)  # v, most of the time without a gradient, would get one of zeros


def _backward(ctx, d_spikes, d_v_out):
    current, v, *parameters = ctx.saved_tensors
    d_spikes = empty_like_steps(current, current.dtype).zero_() if d_spikes is None else d_spikes
    needed = ctx.needs_input_grad[2:6]
    d_current, d_v, d_parameters = _neuron_backward(
        d_spikes, None if ctx.detach or ctx.parallel else d_v_out, current, v, *parameters, ctx.top, ctx.parallel,
        ctx.detach, any(needed),
    )  # fmt: skip
    grads = [None] * 4
    for slot, (p, wanted) in enumerate(zip(parameters, needed, strict=True)):
        if p is not None and wanted:
            d_p = d_parameters[slot]  # T C
            grads[slot] = (d_p if p.dim() == 2 else d_p.sum(1)).to(p.dtype)
    carried = ctx.needs_input_grad[1] and not ctx.detach and not ctx.parallel
    return d_current, d_v.to(v.dtype) if carried else None, *grads, *[None] * 7


_neuron_forward.register_autograd(_backward, setup_context=_setup_context)


def on_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take x; in fp64, and under transforms of torch, all is left to the definitions."""
    return x.dtype != torch.float64 and use_triton(x) and not transformed()


def number(value, name: str) -> float:
    """A Python float of a number of any library; ValueError for something else."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error


def check_current(current: Tensor):
    """Raise ValueError unless it is floating point, (T, N, C, ...)."""
    if current.dim() < 3 or not current.is_floating_point():
        raise ValueError(
            f"current must be floating-point of shape (T, N, C, ...), got {tuple(current.shape)} {current.dtype}"
        )


def check_neuron(
    shape, device, v, leak, threshold, *, gain=None, shift=None, bits=None, step=0.25, codes=False, parallel=False
):
    """Raise ValueError unless the arguments fit a current of this shape, (T, N, C, ...), on `device`."""
    T, _, C = shape[:3]
    if T < 1:
        raise ValueError(f"at least one time step is needed (T >= 1), got {tuple(shape)}")
    if v is not None and (v.shape != shape[1:] or not v.is_floating_point()):
        raise ValueError(
            f"v must be floating-point of shape {tuple(shape[1:])}, one step of current, got {tuple(v.shape)} {v.dtype}"
        )
    if (gain is None) != (shift is None):
        raise ValueError(f"gain and shift go together, got gain={gain is not None}, shift={shift is not None}")
    if leak is None and not parallel:
        raise ValueError("leak may be None only for a parallel neuron")
    for name, p, shapes in (
        ("leak", leak, ((T,), (T, C))),
        ("threshold", threshold, ((T,), (T, C))),
        ("gain", gain, ((T, C),)),
        ("shift", shift, ((T, C),)),
    ):
        if p is not None and (tuple(p.shape) not in shapes or not p.is_floating_point()):
            raise ValueError(
                f"{name} must be floating-point of shape {' or '.join(map(str, shapes))}, "
                f"got {tuple(p.shape)} {p.dtype}"
            )
    for name, p in (("v", v), ("leak", leak), ("threshold", threshold), ("gain", gain), ("shift", shift)):
        if p is not None and p.device != device:
            raise ValueError(f"{name} is on {p.device}, current on {device}")
    if bits is not None and not 1 <= bits <= 8:
        raise ValueError(f"bits must be None or 1..8, got {bits}")
    if codes and bits is None:
        raise ValueError("codes=True needs bits")
    if not 0 < step < float("inf"):
        raise ValueError(f"step must be positive and finite, got {step}")


def neuron_update(
    current: Tensor,
    v: Tensor | None,
    leak: Tensor | None,
    threshold: Tensor,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    bits: int | None = None,
    step: float = 0.25,
    codes: bool = False,
    parallel: bool = False,
    detach: bool = True,
    return_v: bool = True,
    clipped: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """T steps of a spiking neuron with floating-point spikes: (spikes, v after the last step).

    Per step: `m = leak*v + I; mh = gain*m + shift; s = relu(mh - threshold); v = mh - s`; out = Q(s) if `bits` is given
    (see `quantize_spikes`). arXiv 2410.07547, sec. 4.

    current: (T, N, C, ...). Steps that are contiguous or channels_last are read in place, and the spikes have their
        layout; any other layout is copied once. Computed in fp32; an fp64 current always runs on the definition.
    v: (N, C, ...) before the first step, or None for 0. The v returned is fp32.
    leak, threshold: (T,) or (T, C). gain, shift: (T, C) or both None.
    codes: return the uint8 integers Q(s) / step instead of spikes; they carry no gradient.
    parallel: m = I: no state, leak is not used and v is returned as it was given.
    detach: v of the step before is a constant in each step (online learning), and so is the v returned. With False the
        gradient flows through time, also into v.
    return_v: with False v is not written, which saves 4 bytes per position, and None is returned for it.
    clipped: with `bits`, spikes above the largest code pass no gradient on; without it, they do (`quantize_spikes`).

    Gradients of first order for current, v, leak, threshold, gain and shift; the kernel recomputes what it needs from
    current and v. More than 10 steps take several launches of at most 10. Raises ValueError where shapes, dtypes,
    devices or options do not fit.

    >>> leak = threshold = torch.tensor([0.5, 0.5])
    >>> spikes, v = neuron_update(torch.ones(2, 1, 1), None, leak, threshold)  # m: 1, then 0.5 * 0.5 + 1
    >>> spikes.flatten().tolist(), v.tolist()
    ([0.5, 0.75], [[0.5]])
    """
    check_current(current)
    step = number(step, "step")
    check_neuron(
        current.shape, current.device, v, leak, threshold, gain=gain, shift=shift, bits=bits, step=step, codes=codes,
        parallel=parallel,
    )  # fmt: skip
    p = NeuronParams(
        leak, threshold, gain=gain, shift=shift, bits=bits, step=step, parallel=parallel, detach=detach, clipped=clipped
    )
    return plain_neuron(current, v, p, codes, return_v)


def plain_neuron(
    current: Tensor, v: Tensor | None, p: NeuronParams, codes: bool = False, return_v: bool = True
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`neuron_update` of arguments that are known to fit."""
    if not on_kernels(current) or current.numel() == 0:
        spikes, v = neuron_steps(current, v, p, codes=codes)
        return stack_steps(spikes, current), v if return_v else None
    if len(current) > MAX_STEPS:
        return _in_pieces(current, v, p, codes, return_v)
    contiguous = [None if q is None else q.contiguous() for q in (p.leak, p.threshold, p.gain, p.shift)]
    leak, threshold, gain, shift = contiguous
    leak = None if p.parallel else leak
    tensors = [q.detach() if q is not None and codes else q for q in (current, v, leak, threshold, gain, shift)]
    wants_grad = torch.is_grad_enabled() and any(q is not None and q.requires_grad for q in tensors)
    run = _neuron_forward if wants_grad or torch.compiler.is_compiling() else _launch_forward  # the operator costs time
    of_v = p.parallel, p.detach, return_v and not p.parallel
    spikes, v_out = run(*tensors, p.bits or 0, float(p.step), codes, *of_v, p.top)
    if p.parallel or not return_v:
        return spikes, v if return_v else None
    return spikes, v_out.detach() if p.detach else v_out


def _in_pieces(current, v, p, codes, return_v):
    """More time steps than a launch holds."""
    pieces = -(-len(current) // MAX_STEPS)
    tensors = (current, p.leak, p.threshold, p.gain, p.shift)
    spikes = []
    for i, leak, threshold, gain, shift in zip(
        *([None] * pieces if q is None else q.chunk(pieces) for q in tensors), strict=True
    ):
        p_of_piece = p._replace(leak=leak, threshold=threshold, gain=gain, shift=shift)
        s, v = plain_neuron(i, v, p_of_piece, codes, return_v or len(spikes) < pieces - 1)
        spikes.append(s)
    return cat_steps(spikes, current), v


def plain_neuron_backward(d_spikes: Tensor, current: Tensor, v: Tensor | None, p: NeuronParams) -> tuple:
    """Gradients of the current and of `p.tensors()` by the kernel, v being a constant; no gain and shift."""
    leak, threshold = None if p.parallel else p.leak.contiguous(), p.threshold.contiguous()
    d_current, _, d_p = _neuron_backward(
        d_spikes, None, current, v, leak, threshold, None, None, p.top, p.parallel, True, True
    )
    d_leak, d_threshold = (
        None if q is None else (d if q.dim() == 2 else d.sum(1)).to(q.dtype)
        for q, d in zip((leak, threshold), d_p, strict=True)
    )
    return d_current, d_leak, d_threshold, None, None, None, None
