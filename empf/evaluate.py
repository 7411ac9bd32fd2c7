"""Evaluation: accuracy after each time step, the statistics of Mem-BN where they will be used, a network left as it was.

The prediction at step t is the arg-max of the sum of the logits of steps 1..t.

In training a convolution's batch norm uses the statistics of each time step; in evaluation it uses running statistics
that the steps share. What reaches a Mem-BN neuron then has another mean and variance than its running statistics have
seen, by step. A few batches without gradient set that right: `calibrate`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from empf.models import StepBatchNorm
from empf.neuron import EMPFNeuron
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


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace the running statistics of every Mem-BN by their means over the batches `images`.

    The batch norms of the convolutions use their running statistics meanwhile, and keep them. A model without Mem-BN is
    left as it is, and `images` is not read. Each batch is what the model is called with: (N, C, H, W) or (T, N, ...).
    """
    neurons = [m for m in model.modules() if isinstance(m, EMPFNeuron) and m.mem_bn]
    if not neurons:
        return
    with restored(model, values=False):
        model.train()
        for module in model.modules():
            if isinstance(module, StepBatchNorm):
                module.frozen_norm = True
        for number, batch in enumerate(images, 1):
            for neuron in neurons:
                neuron.momentum = 1 / number
            reset(model)
            model(batch)


@torch.no_grad()
def correct_per_step(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Correct predictions after each step, (T,) int64, over batches of (images, labels), in eval mode."""
    was_training = model.training
    model.eval()
    correct = torch.zeros(model.config.T, dtype=torch.int64)
    for images, labels in batches:
        reset(model)
        predictions = model(images).float().cumsum(0).argmax(-1)  # T N
        correct = correct.to(predictions.device) + (predictions == labels).sum(1)
    reset(model)
    model.train(was_training)
    return correct
