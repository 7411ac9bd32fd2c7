"""What a training step keeps in memory, in bytes, by learning mode and number of time steps.

saved              for the backward pass, counted (see `empf.memory`); `random` and `every` hold that of one step, here
                   of the last one, after T - 1 steps that carry the potential
saved_plain        the same where nothing is made again in the backward pass (`empf.recompute` switched off)
theory             of `saved`: `random`, `every`: that of one step, the second (it has a potential before it), whatever
                   T is; `stbp`: T times what plain modules keep of one step
potentials         membrane potentials, carried from step to step
parameters, gradients, optimizer (SGD with momentum: one value per parameter)
effective_weights  of binary and ternary synapses, formed once per weight update
total              the sum of saved, potentials, parameters, gradients, optimizer and effective_weights
allocated          on a GPU: the largest amount allocated in a whole training step, work space included; else None
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from empf import recompute
from empf.memory import saved_for_backward
from empf.models import ModelConfig, SpikingNetwork, build
from empf.online import LEARNING, online_backward, reset, set_online
from empf.synapse import QuantizedWeight

STEPS = (1, 2, 4, 8, 16, 32)


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def example(config: ModelConfig, batch_size: int, device: str) -> tuple[SpikingNetwork, Tensor]:
    """A network in training mode and a batch of images (or event frames, where it has two input channels)."""
    with torch.device(device):
        model = build(config)
        shape = (batch_size, config.in_channels, config.image_size, config.image_size)
        return model.train(), torch.randn(config.T, *shape) if config.arch == "vgg_snn" else torch.randn(shape)


def saved(model: SpikingNetwork, x: Tensor, through_time: bool, plain: bool = False) -> dict[str, int]:
    """`saved_for_backward` of all steps through time, or of the last step online."""
    T = model.config.T
    set_online(model, not through_time)
    try:
        with recompute.enabled(not plain):
            return saved_for_backward(model, x, past=0 if through_time else T - 1, steps=T if through_time else 1)
    finally:
        set_online(model, True)


def largest_allocated(config: ModelConfig, batch_size: int, learning: str, device: str) -> int:
    """Peak of the GPU memory over the second training step (the first one makes the momentum)."""
    before = torch.cuda.memory_allocated(device)
    model, x = example(config, batch_size, device)
    target = torch.zeros(batch_size, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        online_backward(model, x, target, F.cross_entropy, learning=learning, steps=[config.T])
        optimizer.step()
        optimizer.zero_grad()
    reset(model)
    return torch.cuda.max_memory_allocated(device) - before


def training_memory(
    config: ModelConfig, batch_size: int, device: str = "cpu", steps: Iterable[int] = STEPS
) -> list[dict]:
    """A row with the keys of the module's docstring for each of the numbers of time steps and each learning mode.

    Runs on `device`; raises ValueError where its memory does not suffice.
    """
    rows, on_gpu = [], torch.device(device).type == "cuda"
    try:
        one_step = {
            "online": saved(*example(replace(config, T=2), batch_size, device), through_time=False),
            "stbp": saved(*example(replace(config, T=1), batch_size, device), through_time=True, plain=True),
        }
        for T in steps:
            model, x = example(replace(config, T=T), batch_size, device)
            parameters = size(model.parameters())
            fixed = {
                "parameters": parameters, "gradients": parameters, "optimizer": parameters,
                "effective_weights": size(m.weight for m in model.modules() if isinstance(m, QuantizedWeight)),
            }  # fmt: skip
            counts = {
                mode: [saved(model, x, mode == "stbp", plain) for plain in (False, True)] for mode in ("online", "stbp")
            }
            del model, x
            for learning in LEARNING:
                mode = "stbp" if learning == "stbp" else "online"
                count, plain = counts[mode]
                row = {"T": T, "learning": learning, "saved": count["bytes"], "saved_plain": plain["bytes"]}
                row["theory"] = one_step[mode]["bytes"] * (T if mode == "stbp" else 1)
                row |= {"potentials": count["potentials"], **fixed}
                row["total"] = row["saved"] + row["potentials"] + sum(fixed.values())
                wanted = (replace(config, T=T), batch_size, learning, device)
                rows.append(row | {"allocated": largest_allocated(*wanted) if on_gpu else None})
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the memory of {device} does not suffice: lower --batch-size or --width") from error
    return rows
