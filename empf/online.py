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

from empf.checks import compared, network, whole
from empf.neuron import StatefulNeuron
from empf.norms import mixing_watched

LEARNING = ("random", "every", "stbp")


def reset(model: nn.Module) -> None:
    """Start a new batch: v = 0 and t = 0 everywhere. Also works on wrapped models (DDP).

    Calls `reset()` of what this library owns; a module of your own joins in with the attribute `holds_state = True`.

    >>> empf.reset(empf.resnet18())
    """
    left, seen = [network(model)], set()
    while left:  # as `model.modules()`, which takes a tenth of a small network's time on one image
        module = left.pop()
        if module is not None and module not in seen:
            seen.add(module)
            left += () if getattr(type(module), "resets_parts", False) else module._modules.values()
            if vars(module).get("holds_state", getattr(type(module), "holds_state", False)) is True:
                module.reset()


def time_steps(model: nn.Module) -> int | None:
    """T of the neurons, None for an open end; ValueError unless there are neurons of the library that agree in it.

    >>> empf.time_steps(empf.EMPFNeuron(4))
    4
    """
    found = sorted({m.T for m in network(model).modules() if isinstance(m, StatefulNeuron)}, key=str)
    if len(found) != 1:
        listed = " and ".join(f"T = {T}" for T in found) or "none"
        raise ValueError(f"the network needs neurons of this library, all of the same T: found {listed}")
    return found[0]


def set_online(model: nn.Module, online: bool) -> None:
    """True (the default of a new model): v is detached between steps. False: gradients go through time.

    >>> empf.set_online(empf.LIFNeuron(4), False)
    """
    for neuron in (m for m in network(model).modules() if isinstance(m, StatefulNeuron)):
        neuron.online = online


def draw_steps(T: int, k: int, seed: int, iteration: int) -> list[int]:
    """k different time steps of 1..T, ascending, uniform; a pure function of (seed, iteration).

    Every process draws the same, and so does a resumed run. Raises ValueError unless 1 <= k <= T.

    >>> empf.draw_steps(4, 2, seed=0, iteration=0)
    [1, 2]
    """
    T, k, seed, iteration = whole("T, k, seed and iteration", (T, k, seed, iteration))
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
        model: a `SpikingNetwork`, or any network of this library's neurons, time first: net(x [k, N, ...]) gives
            [k, N, ...] for any number k of steps. Possibly wrapped for data-parallel training.
        x: of a `SpikingNetwork` images (N, C, H, W) or events (T, N, C, H, W); of another [T, N, ...], for instance
            `x.expand(T, ...)`. target: whatever `criterion(logits, target)` takes.
        learning: random | every | stbp.
        steps: for `random` the ascending steps of 1..T to back-propagate, drawn with `draw_steps`; it has no default,
            as every process has to draw the same.
        backward: e.g. `accelerator.backward`.
        no_sync: context in which gradients stay on their process; used for all but the last backward of a batch.

    Returns (loss, logits), detached: the mean of the steps' losses, the logits (N, classes) of the steps, summed.
    Raises ValueError for an unknown mode, for `random` without ascending steps in 1..T, and for an x without T steps.

    >>> net, x = torch.nn.Sequential(empf.BinaryLinear(8, 3), empf.EMPFNeuron(4)), torch.randn(4, 16, 8)
    >>> loss, _ = empf.online_backward(net, x, torch.arange(16) % 3, torch.nn.functional.cross_entropy, steps=[2])
    """
    network = model.module if hasattr(model, "module") else model
    own = not getattr(network, "runs_steps", False)
    T = time_steps(network)
    T = len(x) if T is None else T
    if learning not in LEARNING:
        raise ValueError(f"learning must be one of {', '.join(LEARNING)}, got {learning!r}")
    if own and (x.dim() < 2 or len(x) != T):
        raise ValueError(f"x must have its {T} time steps first, [T, N, ...], got {tuple(x.shape)}: x.expand({T}, ...)")
    if learning == "random" and steps is None:
        raise ValueError(f"learning='random' needs steps: pass steps=empf.draw_steps({T}, 1, seed, number of batch)")
    reset(model)
    if learning == "stbp":
        set_online(model, False)
        try:
            with mixing_watched(network, T, x.shape[1]) if own else nullcontext():
                logits = model(x).mean(0)
            loss = compared(criterion, logits, target)
            backward(loss)
        finally:
            set_online(model, True)
            for module in network.modules():
                if isinstance(module, StatefulNeuron) and module.v is not None:
                    module.v = module.v.detach()  # it held the whole graph
        return loss.detach(), logits.detach()

    steps = list(range(1, T + 1)) if learning == "every" else whole("steps", steps)
    if not steps or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] > T:
        raise ValueError(f"steps must be ascending and within 1..T = {T}, got {steps}")
    total_loss, total_logits, done = 0.0, 0.0, 0
    for t in steps:
        with nullcontext() if t == steps[-1] else no_sync():
            if own:
                if t - 1 > done:
                    with torch.no_grad(), mixing_watched(network, t - 1 - done, x.shape[1]):
                        model(x[done : t - 1])
                logits = model(x[t - 1 : t])[0]
            else:
                logits = model(x, steps=1, past=t - done - 1)[0]
            loss = compared(criterion, logits, target) / len(steps)
            backward(loss)
        done = t
        total_loss, total_logits = total_loss + loss.detach(), total_logits + logits.detach()
    return total_loss, total_logits
