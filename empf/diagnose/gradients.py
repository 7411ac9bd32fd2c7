"""The gradients of a network compared: online (v detached) against through time, and each random step against all.

online      with the same loss and the same batch. The batch statistics of a step are the same in both and both
            differentiate through them: they differ in time only.
random      the gradient of each t* = 1..T by itself: bias of their mean against `every`, and variance over t*.

arXiv 2410.07547, sec. 4
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.models import SpikingNetwork
from empf.online import online_backward, reset, set_online

Gradients = dict[str, Tensor]


def take_gradients(model: nn.Module) -> Gradients:
    """The accumulated gradients, cleared from the model; zeros where there is none."""
    taken = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return taken


def through_time(model: nn.Module, x: Tensor, target: Tensor) -> Iterator[Gradients]:
    """The gradient through time of the loss of each step's logits, t = 1..T."""
    set_online(model, False)
    reset(model)
    for logits in model(x):
        F.cross_entropy(logits, target).backward(retain_graph=True)
        yield take_gradients(model)
    set_online(model, True)
    reset(model)


def online_mean_logits(model: nn.Module, x: Tensor, target: Tensor) -> Gradients:
    """The online gradient of the loss that `stbp` has, the one of the mean logits."""
    reset(model)
    F.cross_entropy(model(x).mean(0), target).backward()
    reset(model)
    return take_gradients(model)


def mean_of(gradients: list[Gradients]) -> Gradients:
    return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def compare(a: list[Tensor], b: list[Tensor]) -> dict[str, float | None]:
    """a (online) against b (through time): None where a gradient is zero."""
    aa, bb = dot(a, a), dot(b, b)
    if not (aa > 0 and bb > 0):
        return dict.fromkeys(("cosine", "norm_ratio", "sign_agreement", "temporal_share"))
    difference = [x - y for x, y in zip(a, b, strict=True)]
    used = sum(int(((x != 0) | (y != 0)).sum()) for x, y in zip(a, b, strict=True))
    agree = sum(int(((x.sign() == y.sign()) & (x != 0)).sum()) for x, y in zip(a, b, strict=True))
    return {
        "cosine": dot(a, b) / (aa * bb) ** 0.5,
        "norm_ratio": (aa / bb) ** 0.5,
        "sign_agreement": agree / used,
        "temporal_share": (dot(difference, difference) / bb) ** 0.5,
    }


def estimator(steps: list[list[Tensor]], every: list[Tensor]) -> dict[str, float | None]:
    """The gradient of a random t*, enumerated: |mean - every| / |every| and the mean of |g - mean|^2 / |mean|^2."""
    mean = [torch.stack(tensors).double().mean(0) for tensors in zip(*steps, strict=True)]
    norm, target = dot(mean, mean), dot(every, every)
    if not (norm > 0 and target > 0):
        return dict.fromkeys(("bias", "variance"))
    away = [dot(d, d) for g in steps if (d := [x - y for x, y in zip(g, mean, strict=True)])]
    off = [x - y for x, y in zip(mean, every, strict=True)]
    return {"bias": (dot(off, off) / target) ** 0.5, "variance": sum(away) / len(away) / norm}


def own_backward(model: nn.Module, x: Tensor, target: Tensor, *, learning: str, steps: list[int] | None = None) -> None:
    """What `online_backward` computes, for a network that can only run all steps at once."""
    reset(model)
    set_online(model, learning != "stbp")
    logits = model(x)
    picked = [logits.mean(0)] if learning == "stbp" else [logits[t - 1] for t in steps or range(1, len(logits) + 1)]
    torch.stack([F.cross_entropy(step, target) for step in picked]).mean().backward()
    set_online(model, True)
    reset(model)


def compare_gradients(model: nn.Module, x: Tensor, target: Tensor, T: int) -> dict[str, dict]:
    """The "gradients" of `measure_separability`: for all weights, all other parameters, and the weights of each layer,

    mean_of_losses  `every` against through time; loss: mean over the steps of the loss of each step's logits
    steps           the same for the loss of each step alone, which is what `random` back-propagates
    loss_of_mean    online against through time (`stbp`); loss of the mean logits
    between_losses  both through time: the first loss against the second
    random          see `estimator`
    """
    # kept graphs: a potential that is not detached then shows as a wrong gradient, not as an error of autograd
    library = partial(
        online_backward, model, x, target, F.cross_entropy, backward=partial(Tensor.backward, retain_graph=True)
    )
    back: Callable = library if isinstance(model, SpikingNetwork) else partial(own_backward, model, x, target)

    def learn(learning: str, steps: list[int] | None = None) -> Gradients:
        back(learning=learning, steps=steps)
        return take_gradients(model)

    drawn, every, stbp = [learn("random", [t]) for t in range(1, T + 1)], learn("every"), learn("stbp")
    timed, mean_logits = list(through_time(model, x, target)), online_mean_logits(model, x, target)
    timed_mean = mean_of(timed)
    kinds = nn.Conv1d | nn.Conv2d | nn.Linear
    layers = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)]
    layers = [name for name in layers if name in every]  # a weight that two layers share has one name
    groups = {"all weights": layers, "all other parameters": [n for n in every if n not in set(layers)]}
    rows = {}
    for group, names in (groups | {name: [name] for name in layers}).items():
        part = lambda gradients, names=names: [gradients[n] for n in names]  # noqa: E731
        rows[group] = {
            "mean_of_losses": compare(part(every), part(timed_mean)),
            "steps": [compare(part(a), part(b)) for a, b in zip(drawn, timed, strict=True)],
            "loss_of_mean": compare(part(mean_logits), part(stbp)),
            "between_losses": compare(part(timed_mean), part(stbp)),
            "random": estimator([part(g) for g in drawn], part(every)),
        }
    return rows
