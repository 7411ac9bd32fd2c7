"""Batch norms in a network of time steps: frozen, applied to each step by itself, and watched for mixing steps."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from empf.checks import network
from empf.layer import StepBatchNorm
from empf.neuron import EMPFNeuron


def freeze_norm(model: nn.Module, frozen: bool = True) -> None:
    """Let training use the running statistics of every batch norm and Mem-BN and leave them as they are.

    Torch's own batch norms know no such mode: they are named by a warning.

    >>> empf.freeze_norm(empf.StepBatchNorm(8))
    """
    foreign = []
    for name, module in network(model).named_modules():
        if isinstance(module, StepBatchNorm | EMPFNeuron):
            module.frozen_norm = frozen
        elif isinstance(module, _BatchNorm):
            foreign.append(name)
    if foreign:
        warnings.warn(
            f"freeze_norm leaves torch's own batch norms alone ({', '.join(foreign)}): call their eval() after each "
            "model.train(), or use empf.StepBatchNorm",
            stacklevel=2,
        )


class PerStep(nn.Module):
    """A module applied to each time step by itself, (k, N, ...) -> (k, N, ...): torch's own batch norms need it.

    Called with folded steps, (k N, ...), a batch norm in training would take one mean of all of them.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(k, N, ...) -> (k, N, ...)."""
        return torch.stack([self.module(step) for step in x])


@contextmanager
def mixing_watched(model: nn.Module, k: int, n: int) -> Iterator[None]:
    """Warn where a batch norm of torch is fed k > 1 steps of n at once in training: its statistics would mix them."""

    def look(module, inputs) -> None:
        if module.training and len(inputs[0]) == k * n:
            warnings.warn(
                f"{type(module).__name__} is fed {k} time steps at once, and its statistics mix them: wrap it as "
                "empf.PerStep(norm), which takes (k, N, ...), or use empf.StepBatchNorm",
                stacklevel=2,
            )

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)] if k > 1 else []
    handles = [m.register_forward_pre_hook(look) for m in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
