"""Accuracy after each time step: the prediction at step t is the arg-max of the sum of the logits of steps 1..t."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from empf.online import reset


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
