"""Size, operations and energy of a network, in the conventions of the paper.

params   convolution and linear weights and biases, MB = 10^6 bytes; binary 1 bit, ternary 2 bits, the rest 32
NOPs     neuron operations per image: vanilla neuron T MUL + 2T ADD, parallel neuron T ADD
SOPs     additions caused by non-zero spikes through non-zero weights, counted exactly, per image over T steps
energy   0.9 pJ per SOP of 32 bits, times n/32 with n-bit spikes (those of LIF have 1 bit); 4.6 pJ per MAC of the
         full-precision layers
         (45 nm, Horowitz 2014)                                               arXiv 2410.07547, sec. 5
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.models import SpikingNetwork
from empf.neuron import EMPFNeuron, StatefulNeuron
from empf.online import reset
from empf.synapse import QuantizedWeight

WEIGHT_BITS = {"binary": 1, "ternary": 2}
PJ_PER_SOP, PJ_PER_MAC = 0.9, 4.6


class Probe:
    """Forward hooks on chosen modules of a model in eval mode; model, state and mode are restored on exit."""

    def __init__(self, model: nn.Module, hooks: dict[nn.Module, Callable]):
        self.model, self.hooks = model, hooks

    def __enter__(self) -> "Probe":
        self.training = self.model.training
        self.model.eval()
        self.handles = [module.register_forward_hook(hook) for module, hook in self.hooks.items()]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
        self.model.train(self.training)
        reset(self.model)


@torch.no_grad()
def account(model: SpikingNetwork) -> dict:
    """Size and neuron operations: {"neurons", "nops", "params_full_mb", "params_mb"}. The model's state is reset."""
    full_bits = stored_bits = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d):
            bits = WEIGHT_BITS[module.kind] if isinstance(module, QuantizedWeight) else 32
            bias = 0 if module.bias is None else module.bias.numel()
            full_bits += 32 * (module.weight.numel() + bias)
            stored_bits += bits * module.weight.numel() + 32 * bias

    c = model.config
    counts = []

    def count(neuron, inputs, spikes: Tensor) -> None:
        operations = 1 if isinstance(neuron, EMPFNeuron) and neuron.parallel else 3
        counts.append((spikes[0].numel(), operations * c.T))

    reset(model)
    with Probe(model, {m: count for m in model.modules() if isinstance(m, StatefulNeuron)}):
        weight = next(model.parameters())
        model(torch.zeros(1, c.in_channels, c.image_size, c.image_size, device=weight.device), steps=1)
    return {
        "neurons": sum(n for n, _ in counts),
        "nops": sum(n * operations for n, operations in counts),
        "params_full_mb": full_bits / 8e6,
        "params_mb": stored_bits / 8e6,
    }


def spike_additions(layer: nn.Conv2d | nn.Linear, spikes: Tensor) -> int:
    """Additions of one layer for these inputs: every (non-zero input, non-zero weight) pair that meets, exactly."""
    weight = layer.effective_weight() if isinstance(layer, QuantizedWeight) else layer.weight
    uses = (weight != 0).sum(0, keepdim=True).float()  # 1 C kh kw | 1 C: non-zero weights an input value meets
    active = (spikes != 0).float()
    if isinstance(layer, nn.Linear):
        met = F.linear(active, uses)
    else:
        met = F.conv2d(active, uses, None, layer.stride, layer.padding)
    return int(met.round().double().sum())  # each entry is below 2^24: rounding makes the fp32 product exact


def macs(layer: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates of a dense layer that gave this output."""
    return output.numel() * layer.weight[0].numel()


@torch.no_grad()
def spike_account(model: SpikingNetwork, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """`account(model)` and what depends on the data, means over the images of `batches` of (images, labels).

    Adds "sops", "energy_mj" (of the SOPs), "macs" and "energy_full_mj" (of the full-precision layers, which are the
    stem, the head and the channel attention), and "density": share of non-zero spikes of each neuron layer by name.
    The model's state is reset. Raises ValueError without images.
    """
    totals = {"sops": 0, "macs": 0, "images": 0}
    fired: dict[str, list[int]] = {}
    names = {module: name for name, module in model.named_modules()}
    dense = {model.stem.conv, model.head}

    def at_synapse(layer, inputs, output) -> None:
        if layer in dense or isinstance(layer, nn.Conv1d):
            totals["macs"] += macs(layer, output)
        else:
            totals["sops"] += spike_additions(layer, inputs[0])

    def at_neuron(neuron, inputs, spikes) -> None:
        seen = fired.setdefault(names[neuron], [0, 0])
        seen[0] += int((spikes != 0).sum())
        seen[1] += spikes.numel()

    hooks = {m: at_synapse for m in names if isinstance(m, nn.Conv2d | nn.Linear | nn.Conv1d)}
    hooks |= {m: at_neuron for m in names if isinstance(m, StatefulNeuron)}
    with Probe(model, hooks):
        for images, _ in batches:
            reset(model)
            totals["images"] += model(images).shape[1]
    if totals["images"] == 0:
        raise ValueError("no images to count the spikes of: give at least one batch")
    sops, mac = totals["sops"] / totals["images"], totals["macs"] / totals["images"]
    bits = 1 if model.config.neuron == "lif" else model.config.spike_bits or 32
    return account(model) | {
        "sops": sops,
        "energy_mj": sops * PJ_PER_SOP * bits / 32 * 1e-9,
        "macs": mac,
        "energy_full_mj": mac * PJ_PER_MAC * 1e-9,
        "density": {name: on / seen for name, (on, seen) in fired.items()},
    }
