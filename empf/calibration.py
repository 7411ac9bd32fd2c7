"""Running statistics of Mem-BN, estimated anew where they will be used: in evaluation.

In training a convolution's batch norm uses the statistics of each time step; in evaluation it uses running statistics
that the steps share. What reaches a Mem-BN neuron then has another mean and variance than its running statistics have
seen, by step. A few batches without gradient set that right.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from empf.models import StepBatchNorm
from empf.neuron import EMPFNeuron
from empf.online import reset
from empf.restore import restored


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
