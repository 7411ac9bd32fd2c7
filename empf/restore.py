"""Measure on a network, and leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from empf.online import reset

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
