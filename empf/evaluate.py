"""Evaluation: accuracy after each time step, statistics of Mem-BN where they will be used, a network left as it was.

The prediction at step t is the arg-max of the sum of the logits of steps 1..t.

In training a convolution's batch norm uses the statistics of each time step; in evaluation it uses running statistics
that the steps share. What reaches a Mem-BN neuron then has another mean and variance than its running statistics have
seen, by step. A few batches without gradient set that right: `calibrate`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.checks import network
from empf.neuron import EMPFNeuron
from empf.online import reset, time_steps

TOP = 5  # predictions that are near enough for top-5
CONFUSIONS = 10
MODES = ("training", "online", "frozen_norm", "momentum")


@contextmanager
def restored(model: nn.Module, *, values: bool = True) -> Iterator[None]:
    """Afterwards the modes of all modules are as before, each its own, and the state is reset.

    `values`: so are buffers and gradients.
    """
    buffers = [(b, b.clone()) for b in model.buffers()] if values else []
    gradients = [(p, p.grad) for p in model.parameters()] if values else []
    modes = [(m, {name: vars(m)[name] for name in MODES if name in vars(m)}) for m in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, before in modes:
            vars(module).update(before)
        reset(model)


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace the running statistics of every Mem-BN that is not frozen by their means over the batches `images`.

    Everything else is in eval mode meanwhile: other batch norms, torch's own as well, use their running statistics and
    keep them. A model without Mem-BN is left as it is, and `images` is not read. Each batch is what the model is called
    with: (N, C, H, W) or (T, N, ...).

    >>> net = empf.resnet18(in_channels=1, image_size=8, width=0.125, neuron="mem_bn")
    >>> empf.calibrate(net, (torch.rand(4, 1, 8, 8) for _ in range(2)))
    """
    neurons = [m for m in network(model).modules() if isinstance(m, EMPFNeuron) and m.mem_bn and not m.frozen_norm]
    if not neurons:
        return
    with restored(model, values=False):
        model.eval()
        for number, batch in enumerate(images, 1):
            for neuron in neurons:
                neuron.training, neuron.frozen_norm, neuron.momentum = True, False, 1 / number
            reset(model)
            model(batch)


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits float32 (T, N, classes), labels) of each batch (x, labels), in eval mode and from a state that was reset.

    Any network: `model(x)` are the logits.
    """
    with restored(model, values=False):
        model.eval()
        for x, labels in batches:
            reset(model)
            yield model(x).float(), labels


def scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sums over batches of (x, labels), in eval mode: correct predictions after each step and, last, the loss.

    (T + 1,) float64. The loss is the mean over the steps of the cross-entropy of their logits, which `random` has on
    average. Any network: `model(x)` are the logits (T, N, classes).
    """
    T = model.config.T if hasattr(model, "config") else time_steps(model)
    sums = torch.zeros(T + 1, dtype=torch.float64)
    for logits, labels in answers(model, batches):
        right = (logits.cumsum(0).argmax(-1) == labels).sum(1)  # T
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(T), reduction="sum") / T
        sums = sums.to(logits.device) + torch.cat([right.double(), loss.double()[None]])
    return sums


def correct_per_step(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Correct predictions after each step, (T,) int64, over batches of (x, labels): see `scores`."""
    return scores(model, batches)[:-1].long()


class Mirrored(nn.Module):
    """A network whose logits of an image are the mean of those of the image and of its mirror image (N, C, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(T, N, classes); the network ends at time T as after one call."""
        first = self.model(x.flip(-1))
        reset(self.model)
        return (first + self.model(x)) / 2


def predictions(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N,), the prediction after each step (T, N), and after the last one whether it is among the first five."""
    found = []
    for logits, labels in answers(model, batches):
        sums = logits.cumsum(0)
        near = (sums[-1].topk(min(TOP, sums.shape[-1])).indices == labels[:, None]).any(1)
        found.append((labels, sums.argmax(-1), near))
    labels, predicted, near = zip(*found, strict=True)
    return torch.cat(labels), torch.cat(predicted, 1), torch.cat(near)


def by_class(labels: Tensor, predicted: Tensor, names: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """What was right of each class, and the ten pairs of classes that were most often confused.

    Of a class: `class`, `images`, `accuracy` in % (None without images); of a pair: `class`, `taken_for`, `images`, and
    their `share` of the class in %.
    """
    size, right = len(names), labels == predicted
    images = torch.bincount(labels, minlength=size).tolist()
    correct = torch.bincount(labels[right], minlength=size).tolist()
    classes = [
        {"class": name, "images": n, "accuracy": 100 * c / n if n else None}
        for name, n, c in zip(names, images, correct, strict=True)
    ]
    pairs, counts = (labels * size + predicted)[~right].unique(return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:CONFUSIONS]
    confused = [
        {"class": names[label], "taken_for": names[other], "images": n, "share": 100 * n / images[label]}
        for (label, other), n in zip(
            (divmod(p, size) for p in pairs[most].tolist()), counts[most].tolist(), strict=True
        )
    ]
    return classes, confused
