"""A model of data-parallel training: the work of an update, counted, and the links between GPUs.

See bench/scaling.py for what is counted and what is assumed.
"""

import statistics
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import empf
from empf import layer
from empf.models import ModelConfig, StepBatchNorm, build

BUCKETS = (2**20, 25 * 2**20)  # bytes of the first and of the other buckets of DDP
READ_EVERY, SCALARS = 20, 32  # train.py: updates between two looks at the loss; bytes of one
POWERSGD_RANK = 4


@dataclass(frozen=True)
class Links:
    """A cluster: FLOP/s of a GPU, GB/s of a GPU's link within and between nodes, GPUs per node, seconds per hop."""

    flops: float = 1e14
    node: float = 400.0
    network: float = 50.0
    per_node: int = 8
    latency: float = 5e-6

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Work:
    """One update of one process: operations, and the gradients in the order in which they are complete.

    gradients: bytes, and operations of the backward pass done by then. norms: channels of each batch norm.
    """

    forward: float
    backward: float
    gradients: list[tuple[int, float]]
    powersgd_bytes: int
    norms: list[int]
    T: int

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.gradients)

    @property
    def norm_bytes(self) -> float:
        """With synchronised batch norms: the stem once, the others at each of the (T + 1) / 2 steps; once backward."""
        stem, *others = self.norms
        return 8 * (2 * stem + sum(others) * ((self.T + 1) / 2 + 1))

    @property
    def norm_calls(self) -> float:
        return 2 + (len(self.norms) - 1) * ((self.T + 1) / 2 + 1)


def count(config: ModelConfig, batch_size: int) -> Work:
    """Count one update, mean over t*, on the meta device."""
    with torch.device("meta"):
        model = build(config).train()
        frames = (config.T,) if config.arch == "vgg_snn" else ()
        x = torch.randn(*frames, batch_size, config.in_channels, config.image_size, config.image_size)
        target = torch.zeros(batch_size, dtype=torch.int64)
    totals, before, done = [], 0, []
    with FlopCounterMode(display=False) as counter:

        def backward(loss):
            nonlocal before
            before = counter.get_total_flops()
            loss.backward()

        def complete(p):
            done.append((p.numel() * p.element_size(), counter.get_total_flops() - before))

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(complete)
        for t in range(1, config.T + 1):
            start = counter.get_total_flops()
            done.clear()
            with layer.enabled(False):  # what is made again in the backward pass is no work for the arithmetic
                empf.online_backward(model, x, target, F.cross_entropy, steps=[t], backward=backward)
            after = counter.get_total_flops() - before
            totals.append(before - start)
    return Work(
        forward=statistics.mean(totals), backward=after, gradients=list(done), powersgd_bytes=powersgd_bytes(model),
        norms=[m.weight.numel() for m in model.modules() if isinstance(m, StepBatchNorm)], T=config.T,
    )  # fmt: skip


def powersgd_bytes(model: nn.Module, rank: int = POWERSGD_RANK) -> int:
    """Bytes after PowerSGD: two low-rank factors of each matrix where they have less than half of its numbers."""
    numbers = 0
    for p in model.parameters():
        n, m = len(p), p.numel() // len(p)
        r = min(n, m, rank)
        numbers += (n + m) * r if p.dim() > 1 and (n + m) * r * 2 < n * m else p.numel()
    return 4 * numbers


def ring(size: float, p: int, gb_per_s: float, latency: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: each link carries 2 (p - 1) / p of them."""
    return 2 * (p - 1) / p * size / (gb_per_s * 1e9) + 2 * (p - 1) * latency


def tree(size: float, p: int, gb_per_s: float, latency: float) -> float:
    """Seconds of a pipelined tree all-reduce: up and down."""
    return 2 * size / (gb_per_s * 1e9) + 2 * (p - 1).bit_length() * latency


def all_reduce(size: float, p: int, links: Links) -> float:
    """Seconds of an all-reduce over p GPUs: within the nodes, then of each GPU's share between them."""
    inside = min(p, links.per_node)
    nodes = -(-p // links.per_node)
    seconds = 0.0
    for members, share, speed in ((inside, size, links.node), (nodes, size / inside, links.network)):
        if members > 1:
            seconds += min(f(share, members, speed, links.latency) for f in (ring, tree))
    return seconds


def buckets(gradients: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The gradients as DDP sends them: bytes of each bucket, and operations after which it is complete."""
    result, size = [], 0
    for n, (nbytes, ready) in enumerate(gradients, 1):
        size += nbytes
        if size >= BUCKETS[min(len(result), 1)] or n == len(gradients):
            result.append((size, ready))
            size = 0
    return result


def predict(
    work: Work, p: int, links: Links, *, overlap: bool = True, compress: float = 1.0, sync_bn: bool = False
) -> dict[str, float]:
    """Seconds of an update on p GPUs and what of it is computation; `compress`: share of the gradients' bytes sent."""
    computing = (work.forward + work.backward) / links.flops
    sent, exchanging = 0.0, 0.0
    for size, ready in buckets(work.gradients):
        seconds = all_reduce(size * compress, p, links)
        start = max(sent, (ready if overlap else work.backward) / links.flops)
        sent, exchanging = start + seconds, exchanging + seconds
    waiting = max(0.0, sent - work.backward / links.flops) if p > 1 else 0.0
    scalars = all_reduce(SCALARS, p, links) / READ_EVERY
    norms = work.norm_calls * all_reduce(work.norm_bytes / work.norm_calls, p, links) if sync_bn else 0.0
    return {
        "computing": computing, "exchanging": exchanging, "waiting": waiting + scalars + norms,
        "efficiency": computing / (computing + waiting + scalars + norms),
    }  # fmt: skip


def slowest_network(work: Work, p: int, links: Links) -> float:
    """GB/s between nodes below which exchanging the gradients over p GPUs takes longer than computing them."""
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        found = predict(work, p, replace(links, network=middle))
        low, high = (middle, high) if found["exchanging"] > found["computing"] else (low, middle)
    return high
