"""What a training step keeps in memory, in bytes, by learning mode and number of time steps.

saved              for the backward pass, counted (see `empf.diagnose.memory`). `random` and `every` hold that of one step, here
                   of the last one, after T - 1 steps that carry the potential: one count, so their rows are the same
saved_plain        the same where nothing is made again in the backward pass (`empf.recompute` switched off)
theory             of `saved`, from the shapes of the configuration alone, see `theory`
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
from torch import Tensor, nn

from empf import recompute
from empf.diagnose.memory import saved_for_backward
from empf.models import Block, ModelConfig, SpikingNetwork, build
from empf.neuron import EMPFNeuron, StatefulNeuron
from empf.online import LEARNING, online_backward, reset, set_online
from empf.synapse import QuantizedWeight

STEPS = (1, 2, 4, 8, 16, 32)

# Activations of the size of its current that a neuron and the convolution behind it keep of one step: as plain modules;
# where spikes are made again; the same before the first step, where there is no potential.
KEPT = {
    "vanilla": (3, 1, 0),  # v, s, and s once more, stacked for the convolution | v
    "parallel": (2, 0, 0),
    "mem_bn": (5, 1, 0),  # besides: m, and the result of the batch norm
    "lif": (2, 2, 2),  # m - threshold and s; never made again
}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def example(config: ModelConfig, batch_size: int, device: str) -> tuple[SpikingNetwork, Tensor]:
    """A network in training mode and a batch of images, or of event frames for `vgg_snn`."""
    with torch.device(device):
        model = build(config)
        shape = (batch_size, config.in_channels, config.image_size, config.image_size)
        return model.train(), torch.randn(config.T, *shape) if config.arch == "vgg_snn" else torch.randn(shape)


def theory(config: ModelConfig, batch_size: int, through_time: bool) -> int | None:
    """Bytes that the backward pass needs: what `saved` should count, to 5 % (parameters and statistics are left out).

        online         4 N [ sum over neurons of k |I| + sum over convolutions of |y| + sum over poolings of |p| ]
        through time   T times that

    |I|, |y|, |p|: numbers per image in the current of a neuron, the output of a convolution, the pooled spikes. k: see
    `KEPT`; the second or third number online, the first through time and where N |I| is at most `recompute.SMALL`.
    The stem's y counts only if it is small or has several frames, else it is made again; that of a static image once.
    Its max-pooling, where images are large, keeps its input and 8-byte places; online also its output, and the first
    neuron then keeps its spikes (not with Mem-BN or n bits).
    Online, a residual sum of more than `recompute.MAX_TERMS` currents is kept as well (ResNet-34).
    None for SECA and activations other than ReLU.
    """
    if config.seca or config.activation != "relu":
        return None
    model = build(replace(config, T=1)).eval()
    image = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
    numbers = lambda one: batch_size * one.numel()  # noqa: E731
    events = config.arch == "vgg_snn"
    T = config.T if through_time else 1
    sizes: list[int] = []
    terms = 1

    def at_neuron(neuron, inputs, spikes) -> None:
        kind = "lif"
        if isinstance(neuron, EMPFNeuron):
            kind = "parallel" if neuron.parallel else "mem_bn" if neuron.mem_bn else "vanilla"
        small = numbers(spikes) <= recompute.SMALL
        sizes.append(T * KEPT[kind][0 if through_time or small else 1 if config.T > 1 else 2] * numbers(spikes))

    def at_output(layer, inputs, y) -> None:
        sizes.append(T * numbers(y))

    def at_stem(layer, inputs, y) -> None:
        made_again = model.stem.pool is None and numbers(y) > recompute.SMALL and not (events and T > 1)
        sizes.append(0 if made_again else numbers(y) * (T if events else 1))

    def at_stem_pool(layer, inputs, y) -> None:
        online = not through_time and numbers(y) > recompute.SMALL and config.neuron != "lif"
        own_spikes = online and config.neuron == "empf" and config.spike_bits is None
        sizes.append(numbers(inputs[0]) + (2 + online + own_spikes) * numbers(y))

    def at_block(block, inputs, x) -> None:
        nonlocal terms
        terms = 1 if block.shortcut is not None else terms
        kept = terms == recompute.MAX_TERMS
        sizes.append(numbers(x) if kept and not through_time and numbers(x) > recompute.SMALL else 0)
        terms = 0 if kept else terms + 1

    for module in model.modules():
        if isinstance(module, Block) and config.neuron != "lif":
            module.register_forward_hook(at_block)
        elif isinstance(module, StatefulNeuron):
            module.register_forward_hook(at_neuron)
        elif isinstance(module, nn.Conv2d | nn.AvgPool2d):
            module.register_forward_hook(at_stem if module is model.stem.conv else at_output)
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(at_stem_pool)
    with torch.no_grad():
        model(image[None] if events else image)
    return 4 * sum(sizes)


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
                row["theory"] = theory(replace(config, T=T), batch_size, mode == "stbp")
                row |= {"potentials": count["potentials"], **fixed}
                row["total"] = row["saved"] + row["potentials"] + sum(fixed.values())
                wanted = (replace(config, T=T), batch_size, learning, device)
                rows.append(row | {"allocated": largest_allocated(*wanted) if on_gpu else None})
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the memory of {device} does not suffice: lower --batch-size or --width") from error
    return rows
