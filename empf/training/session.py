"""The parts of the training loop in train.py: optimizer and schedule, when it stops, what it counts."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from empf.accounting import account
from empf.data.batches import Batches
from empf.models import SpikingNetwork
from empf.synapse import FullConv2d, QuantizedWeight
from empf.training.config import TrainConfig
from empf.training.optimizers import Muon

SHOWN = 5  # warnings per epoch


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on convolutions and linear layers only. With --optimizer muon, hidden
    synapses get orthogonal updates at the same learning rate.

    On a GPU torch updates all weights at once, if each gradient lies in memory as its weight does. Those of 1x1
    convolutions need not; so there `.grad` is made here, and `zero_grad(set_to_none=False)` keeps it.
    """
    for p in model.parameters():
        if p.device.type != "cpu":
            p.grad = torch.zeros_like(p)
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    hidden = {m.weight for m in model.modules() if isinstance(m, QuantizedWeight | FullConv2d)}
    orthogonal = hidden if config.optimizer == "muon" else set()
    groups = [
        {"params": [p for p in model.parameters() if p in decayed - orthogonal], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    if not orthogonal:
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    groups.append(
        {
            "params": [p for p in model.parameters() if p in orthogonal], "weight_decay": config.weight_decay,
            "momentum": 0.0, "nesterov": False, "orthogonal_momentum": 0.95,
            "limit": math.inf if config.weights == "full" else 1.0,
        }
    )  # fmt: skip
    return Muon(groups, lr=config.lr, momentum=0.9, nesterov=True)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up from 0.01 lr, then cosine to 0; progress in epochs."""
    if progress < config.warmup_epochs:
        return config.lr * (0.01 + 0.99 * progress / config.warmup_epochs)
    rest = (progress - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


class Stop:
    """Asked for by Ctrl-C, SIGTERM or --max-steps: finish the update, save, leave. A second Ctrl-C ends at once.

    The system ends it then: a process that waits for another one would not come to a handler of Python. Not so with
    SIGTERM, which a launcher passes on to processes that a scheduler has sent it to already.
    """

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def without_effect(config: TrainConfig, processes: int, in_memory: bool) -> list[str]:
    """A line for each flag that was given in vain, for people; the data lie `in_memory`, or are read while training."""
    alone = "does nothing in a single process, start several with accelerate launch --num_processes N"
    found = {
        f"--sync-bn {alone}": config.sync_bn and processes == 1,
        f"--grad-compression {alone}": config.grad_compression != "none" and processes == 1,
        f"--workers does nothing, {config.dataset} lies in memory": config.workers > 0 and in_memory,
    }
    return [f"note: {line}" for line, holds in found.items() if holds]


class Meter:
    """[loss, correct predictions, images] of an epoch, summed on the device until they are read.

    `total` sums a tensor over all processes. `sums`: what a resumed epoch starts with, for one of the processes.
    """

    def __init__(self, total: Callable[[Tensor], Tensor], sums: list[float]):
        self.total = total
        self.sums = torch.tensor(sums, dtype=torch.float64)
        self.unread: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        hard = target if target.dim() == 1 else target.argmax(1)
        correct = (logits.argmax(1) == hard).sum()
        self.unread.append(torch.stack([loss * len(hard), correct, torch.full_like(loss, len(hard))]))

    def read(self, stop: bool) -> tuple[list[float], bool]:
        """The sums so far and whether to stop, of all processes; each has to call it at the same batch.

        `.losses` are those of the batches since the last call, of this process.
        """
        seen = torch.stack(self.unread).cpu().double()
        self.unread.clear()
        self.losses = (seen[:, 0] / seen[:, 2]).tolist()
        self.sums += seen.sum(0)
        *sums, stops = self.total(torch.tensor([*self.sums, stop], dtype=torch.float64)).tolist()
        return sums, stops > 0


def average_norms(model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Give every process the mean of the running statistics, so that all evaluate one and the same network."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean(buffer))


def group(number: int, accumulate: int, batches: int) -> tuple[int, bool]:
    """Size of the group of batches with one update that batch `number` (from 1) is in; whether it is the last of it."""
    first = (number - 1) // accumulate * accumulate
    size = min(accumulate, batches - first)
    return size, number == first + size


def divergence(batches: Batches, number: int, losses: list[float], run: Path) -> ValueError:
    """What to say when a loss is not finite: `losses` are those of the batches up to `number`."""
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
    number += bad + 1 - len(losses)
    images, target = next(batches.iterate(start=number - 1))
    where = f"epoch {batches.epoch + 1}, batch {number}"
    good = f"the last good checkpoint is in {run}"
    if not (images.isfinite().all() and target.isfinite().all()):
        return ValueError(f"the data of {where} hold numbers that are not finite: repair them; {good}")
    return ValueError(f"training diverged, the loss is not finite in {where}: lower --lr; {good}")


def snapshot(parts: dict[str, Any], run: Path) -> dict:
    """The state dicts of all parts of the training, for `restore`; ValueError unless the model's are finite."""
    state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
    if not all(tensor.isfinite().all() for tensor in state["model"].values()):
        raise ValueError(f"training diverged, a weight is not finite: lower --lr; the last good checkpoint is in {run}")
    return state


def restore(parts: dict[str, Any], state: dict) -> None:
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state.get(name))


def headline(model: SpikingNetwork) -> str:
    """What is trained, for people."""
    config, size = model.config, account(model)
    return (
        f"{config.arch}, {config.weights} weights, T = {config.T}: {size['params_mb']:.2f} MB "
        f"({size['params_full_mb']:.2f} MB full)"
    )


def scalars(record: dict) -> dict[str, float]:
    """One line of metrics.jsonl for a tracker."""
    single = {name: value for name, value in record.items() if isinstance(value, float)}
    return single | {f"accuracy_t{t}": accuracy for t, accuracy in enumerate(record["accuracy"], 1)}


def epoch_line(record: dict) -> str:
    """One line of metrics.jsonl for people."""
    per_step = " ".join(f"{a:.2f}" for a in record["accuracy"])
    return (
        f"epoch {record['epoch']:3d}  loss {record['loss']:.4f}  train {record['train_accuracy']:.2f} %  "
        f"test after each step {per_step} %  {record['images_per_s']:.0f} images/s  {record['seconds']:.1f} s"
    )


def warning_lines(record: dict) -> list[str]:
    """The first few warnings of an epoch, for people; one fault brings about many."""
    warnings = record.get("health", {}).get("warnings", [])
    lines = [f"warning: {warning}" for warning in warnings[:SHOWN]]
    more = len(warnings) - len(lines)
    return lines + [f"warning: {more} more: python -m empf.health RUN"] if more else lines
