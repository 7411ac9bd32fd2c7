"""Online learning: back-propagation through one time step at a time.

    random   draw t* from 1..T; steps before t* run without gradient and carry v, step t* runs with gradient, the rest
             is not run; loss: the criterion on the logits of t*. With k > 1: k steps, the mean of their losses.
    every    every step, each back-propagated by itself (SLTT)
    stbp     through time: v not detached, loss on the mean logits of all steps

In `random` and `every` v is detached between steps, so memory for back-propagation is that of one step, whatever T.
arXiv 2410.07547, sec. 4 and alg. 1
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from empf.layer import StepBatchNorm
from empf.neuron import EMPFNeuron, StatefulNeuron

LEARNING = ("random", "every", "stbp")


def reset(model: nn.Module) -> None:
    """Start a new batch: v = 0 and t = 0 everywhere. Also works on wrapped models (DDP)."""
    for module in model.modules():
        if callable(getattr(module, "reset", None)):  # networks, also packed ones, neurons, synapses
            module.reset()


def time_steps(model: nn.Module) -> int:
    """T of the neurons; ValueError unless there are neurons of the library, all with the same."""
    found = sorted({m.T for m in model.modules() if isinstance(m, StatefulNeuron)})
    if len(found) != 1:
        raise ValueError(
            "the network needs neurons of this library (EMPFNeuron, LIFNeuron or another StatefulNeuron), all with the "
            f"same number of time steps: found {' and '.join(f'T = {T}' for T in found) or 'none'}"
        )
    return found[0]


def set_online(model: nn.Module, online: bool) -> None:
    """True (the default of a new model): v is detached between steps. False: gradients go through time."""
    for module in model.modules():
        if isinstance(module, StatefulNeuron):
            module.online = online


def freeze_norm(model: nn.Module, frozen: bool = True) -> None:
    """Let training use the running statistics of every batch norm and Mem-BN and leave them as they are."""
    for module in model.modules():
        if isinstance(module, StepBatchNorm | EMPFNeuron):
            module.frozen_norm = frozen


def draw_steps(T: int, k: int, seed: int, iteration: int) -> list[int]:
    """k different time steps of 1..T, ascending, uniform; a pure function of (seed, iteration).

    Every process draws the same steps, and a resumed run those of the uninterrupted one. Raises ValueError unless
    1 <= k <= T.
    """
    if not 1 <= k <= T:
        raise ValueError(f"steps per batch must lie in 1..T = {T}, got {k}")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) % 2**63)
    return sorted((torch.randperm(T, generator=generator)[:k] + 1).tolist())


def online_backward(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    learning: str = "random",
    steps: Sequence[int] | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Reset the model, run one batch and accumulate gradients in its parameters.

    Args:
        model: a `SpikingNetwork`, possibly wrapped for data-parallel training.
        x: images (N, C, H, W) or events (T, N, C, H, W); target: whatever `criterion(logits, target)` takes.
        learning: random | every | stbp.
        steps: for `random` the ascending steps of 1..T to back-propagate, drawn with `draw_steps`; it has no default,
            as every process has to draw the same.
        backward: e.g. `accelerator.backward`.
        no_sync: context in which gradients stay on their process; used for all but the last backward of a batch.

    Returns (loss, logits), detached: the mean of the steps' losses, the logits (N, classes) of the steps, summed.
    Raises ValueError for an unknown mode, and for `random` without steps or with such that are not ascending in 1..T.
    """
    config = (model.module if hasattr(model, "module") else model).config
    if learning not in LEARNING:
        raise ValueError(f"learning must be one of {', '.join(LEARNING)}, got {learning!r}")
    if learning == "random" and steps is None:
        raise ValueError(
            f"learning='random' needs steps: pass steps=empf.draw_steps({config.T}, 1, seed, iteration), "
            "iteration being the number of the batch"
        )
    reset(model)
    if learning == "stbp":
        set_online(model, False)
        try:
            logits = model(x).mean(0)
            loss = criterion(logits, target)
            backward(loss)
        finally:
            set_online(model, True)
        return loss.detach(), logits.detach()

    steps = list(range(1, config.T + 1)) if learning == "every" else list(steps)
    if not steps or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] > config.T:
        raise ValueError(f"steps must be ascending and within 1..T = {config.T}, got {steps}")
    total_loss, total_logits, done = 0.0, 0.0, 0
    for t in steps:
        with nullcontext() if t == steps[-1] else no_sync():
            logits = model(x, steps=1, past=t - done - 1)[0]
            loss = criterion(logits, target) / len(steps)
            backward(loss)
        done = t
        total_loss, total_logits = total_loss + loss.detach(), total_logits + logits.detach()
    return total_loss, total_logits
