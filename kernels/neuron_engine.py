"""The neuron without autograd, for those who write their own backward pass: it picks the kernels or the CPU engine.

    spikes, v, stats = neuron_forward(x, v, p, running=running)           k steps
    spikes, kept = neuron_again(terms, v, p, stats)                       one step once more, from what its current was
    d_x, *d_tensors = neuron_backward(d_spikes, kept, v, p, stats)        v a constant (online learning)

What is computed is `neuron_steps`, after batch norm of the current where `p` has weight and bias, with batch norm of
the potential where it has alpha and beta as well. `stats` are the (mean, var) of the batch, each (k, C), or None.
"""

import torch
from torch import Tensor

from . import neuron_cpu
from .neuron import NeuronParams, on_kernels, plain_neuron, plain_neuron_backward
from .neuron_cpu import Kept, Running, Stats, Term, move, total_of
from .norm_neuron import norm_neuron, norm_neuron_backward


def neuron_forward(
    x: Tensor, v: Tensor | None, p: NeuronParams, *, running: Running | None = None, stats: Stats | None = None
) -> tuple[Tensor, Tensor | None, Stats | None]:
    """(spikes, v, stats) of k steps x (k, N, C, ...). The statistics of the batch move `running`; or they are given."""
    if not on_kernels(x):
        return neuron_cpu.forward(x, v, p, running, stats)
    with torch.no_grad():
        if p.weight is None:
            return *plain_neuron(x, v, p), None
        spikes, v, *found = norm_neuron(x, v, p, stats)
        if stats is None:
            move(running, found, x)
        return spikes, v, tuple(found)


def neuron_again(
    terms: list[Term], v: Tensor | None, p: NeuronParams, stats: Stats | None
) -> tuple[Tensor, Kept | Tensor]:  # fmt: skip
    """(spikes, what backward wants to have kept) of one step whose x was the sum of `terms`, to the same bits."""
    if not on_kernels(terms[0].y):
        return neuron_cpu.again(terms, v, p, stats)
    x = total_of(terms)
    return neuron_forward(x, v, p, stats=stats)[0], x


def neuron_backward(
    d_spikes: Tensor, kept: Kept | Tensor, v: Tensor | None, p: NeuronParams, stats: Stats | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of `p.tensors()`, of one step."""
    if isinstance(kept, tuple):
        return neuron_cpu.backward(d_spikes, kept, v, p, stats)
    if p.weight is None:
        return plain_neuron_backward(d_spikes, kept, v, p)
    return norm_neuron_backward(d_spikes, kept, v, p, stats)
