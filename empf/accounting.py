"""Size, operations and energy of any network of this library's neurons, in the conventions of the paper.

params   convolution and linear weights and biases, MB = 10^6 bytes; binary 1 bit, ternary 2 bits, the rest 32.
         The authors count 2 and 3 bits instead: `params_authors_mb` is what their tables show
NOPs     neuron operations per image: vanilla neuron T MUL + 2T ADD, parallel neuron T ADD
SOPs     additions caused by non-zero spikes through non-zero weights, counted exactly, per image over T steps
energy   0.9 pJ per SOP of 32 bits, times n/32 with n-bit spikes (those of LIF have 1 bit); 4.6 pJ per MAC of the
         full-precision layers
         (45 nm, Horowitz 2014)                                               arXiv 2410.07547, sec. 5

What a layer is fed with is found by watching a network run. Spikes are what comes out of a neuron, and what pooling,
reshaping, concatenation, sums of spikes or multiplication by something make of them. A full-precision layer is one that
is fed with something else, whatever its weights (a shortcut that reads currents), or a readout: full-precision weights
behind which there is no neuron and no synapse.

A synapse is a convolution or linear layer of torch, or a module with `effective_weight()` (C_out, C_in / groups, ...),
`kind` "binary" | "ternary", `bias`, and for a convolution `stride, padding, dilation, groups`. Spikes of a packed
network that are still integers are a tensor with `codes`. Products of matrices
outside of them (attention, `F.linear`) are not counted, but named with their MACs under "not_counted".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from empf.checks import network
from empf.neuron import LIFNeuron, StatefulNeuron
from empf.online import reset

WEIGHT_BITS = {"binary": 1, "ternary": 2}
AUTHORS_BITS = {"binary": 2, "ternary": 3}
PJ_PER_SOP, PJ_PER_MAC = 0.9, 4.6
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight

# Operations whose result is zero where the spikes they are given are, if spikes are all that they are given (or zeros);
# views need no entry, they share the memory
KEEP_SPIKES = {
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_reshape_copy", "_to_copy", "adaptive_avg_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "add", "add_", "amax", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "cat", "clone", "constant_pad_nd", "copy_", "flip", "gather", "im2col", "index", "index_select", "max",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "maximum", "mean", "minimum", "reflection_pad1d",
    "reflection_pad2d", "relu", "relu_", "repeat", "replication_pad1d", "replication_pad2d", "roll", "stack", "sub",
    "sum", "upsample_nearest1d", "upsample_nearest2d",
}  # fmt: skip
SCALE_SPIKES = {"mul", "mul_", "div", "div_"}  # the same, if their first argument is spikes, or one of a product
ZEROS = {"empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like"}


def is_synapse(module: nn.Module) -> bool:
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    return isinstance(module, kinds) or hasattr(module, "effective_weight")


def effective(synapse: nn.Module) -> Tensor:
    return synapse.effective_weight() if hasattr(synapse, "effective_weight") else synapse.weight


def spike_bits(neuron: nn.Module) -> int:
    """Bits of a spike of this neuron: 1 of LIF, 32 of floating-point spikes."""
    return 1 if isinstance(neuron, LIFNeuron) else getattr(neuron, "spike_bits", None) or 32


def codes(tensor):
    """The integers of spikes that are kept as such, else the same."""
    return getattr(tensor, "codes", tensor)


def memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def apply(synapse: nn.Module, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The product of a synapse with other numbers in its place, without the bias."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    if x.dim() > weight.dim():  # with a time axis
        x = x.flatten(0, x.dim() - weight.dim())
    padding = synapse.padding
    if getattr(synapse, "padding_mode", "zeros") != "zeros":
        x, padding = F.pad(x, synapse._reversed_padding_repeated_twice, mode=synapse.padding_mode), 0
    return CONVOLUTIONS[weight.dim()](x, weight, None, synapse.stride, padding, synapse.dilation, groups)


def spike_additions(synapse: nn.Module, spikes: Tensor) -> int:
    """Additions of one layer for these inputs: every (non-zero input, non-zero weight) pair that meets, exactly."""
    used = (effective(synapse) != 0).float()  # C_out C_in/groups ...
    groups = getattr(synapse, "groups", 1)
    uses = used.unflatten(0, (groups, -1)).sum(1)  # groups C_in/groups ...: non-zero weights an input value meets
    met = apply(synapse, (spikes != 0).float(), uses, groups)
    return int(met.round().double().sum())  # each entry is below 2^24: rounding makes the fp32 product exact


def macs(synapse: nn.Module, y) -> int:
    """Multiply-accumulates of a dense layer that gave y."""
    return math.prod(y.shape) * effective(synapse)[0].numel()


def product_macs(name: str, args: tuple, out) -> int | None:
    """Multiply-accumulates of an operation of torch; None where it multiplies no matrices."""
    if name in ("mm", "bmm", "mv", "dot"):
        return out.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return out.numel() * args[1].shape[-1]
    if name == "addbmm":
        return args[1].numel() * args[2].shape[-1]
    if name in ("convolution", "_convolution"):
        x, weight, transposed = args[0], args[1], args[6]
        return (x if transposed else out).numel() * weight[0].numel()
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[:3]  # ... L E | ... S E | ... S V
        return query[..., 0].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])
    return None


@dataclass
class Seen:
    """What is known of a tensor's memory: the bits of the spikes in it (None: other numbers; 0: nothing but zeros), and
    of which synapses it is made, those after the last neuron or synapse, one binary digit each."""

    spikes: int | None = None
    synapses: int = 0


@dataclass
class Layer:
    """What a synapse did."""

    sops: int = 0
    bit_sops: int = 0  # each times the bits of its spikes
    macs_on_spikes: int = 0
    macs: int = 0
    last: bool = True


class Watch(TorchDispatchMode):
    """Look at a network while it runs, without gradient, in eval mode: see the module's docstring.

    `sizes` (neurons per image, time steps) and `fired` ([non-zero spikes, spikes]) of each neuron, `layers` of each
    synapse, and `loose`: MACs of the products of matrices outside of them, `loose_weights`: parameters in these.
    `counting`: spikes are counted, not only sizes. Afterwards state and modes of the network are as they were.
    """

    def __init__(self, net: nn.Module, counting: bool):
        super().__init__()
        self.net, self.counting = net, counting
        inner = network(net)
        while len(only := list(inner.children())) == 1 and list(only[0].children()):  # a wrapper has no name in it
            inner = only[0]
        self.names = dict.fromkeys(net.modules(), "") | {module: name for name, module in inner.named_modules()}
        self.synapses = {m: 1 << k for k, m in enumerate(filter(is_synapse, self.names))}
        self.layers = {m: Layer() for m in self.synapses}
        self.sizes: dict[nn.Module, tuple[int, int]] = {}
        self.fired: dict[str, list[int]] = {}
        self.loose: dict[str, int] = {}
        self.weights = {memory(p): p for p in net.parameters()}
        self.loose_weights: dict[int, Tensor] = {}
        self.seen: dict[StorageWeakRef, Seen] = {}
        self.running: list[nn.Module] = []
        self.watching = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler first, which takes 2 s

    def __enter__(self) -> "Watch":
        self.modes = [(m, m.training) for m in self.names]
        self.net.eval()
        self.fast_attention = torch.backends.mha.get_fastpath_enabled()  # one operation that says nothing
        torch.backends.mha.set_fastpath_enabled(False)
        self.handles = [m.register_forward_pre_hook(self.enter, with_kwargs=True) for m in self.names]
        self.handles += [m.register_forward_hook(self.leave, with_kwargs=True) for m in self.names]
        reset(self.net)
        self.gradient = torch.no_grad()
        self.gradient.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.gradient.__exit__(*error)
        for handle in self.handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(self.fast_attention)
        for module, training in self.modes:
            module.training = training
        reset(self.net)

    def look(self, tensor) -> Seen:
        return isinstance(tensor, Tensor) and self.seen.get(memory(tensor)) or Seen()

    def mark(self, tensor, spikes: int | None, synapses: int) -> None:
        if isinstance(tensor, Tensor):
            self.seen[memory(tensor)] = Seen(spikes, synapses)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        self.running.pop()
        x = codes(next(iter([*args, *kwargs.values()]), None))
        neuron = isinstance(module, StatefulNeuron)
        if neuron or module in self.synapses and not any(m in self.synapses for m in self.running):
            for synapse, digit in self.synapses.items():
                self.layers[synapse].last &= not self.look(x).synapses & digit
            self.watching = False  # not what is counted here
            self.at_neuron(module, codes(output)) if neuron else self.at_synapse(module, x, output)
            self.watching = True

    def at_neuron(self, neuron: nn.Module, spikes: Tensor) -> None:
        self.sizes[neuron] = spikes[0, 0].numel(), neuron.T or neuron.t  # of open length: what was run
        self.mark(spikes, spike_bits(neuron), 0)
        if self.counting:
            fired = self.fired.setdefault(self.names[neuron], [0, 0])
            fired[0] += int((spikes != 0).sum())
            fired[1] += spikes.numel()

    def at_synapse(self, synapse: nn.Module, x, y) -> None:
        source, layer = self.look(x), self.layers[synapse]
        self.mark(y, None, self.synapses[synapse])
        layer.last &= isinstance(y, Tensor)  # else a product that a neuron will take
        if not self.counting:
            return
        if not source.spikes:
            layer.macs += macs(synapse, y)
            return
        if not hasattr(synapse, "kind"):  # it may turn out to be a readout
            layer.macs_on_spikes += macs(synapse, y)
        sops = spike_additions(synapse, x)
        layer.sops, layer.bit_sops = layer.sops + sops, layer.bit_sops + sops * source.spikes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if not self.watching:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.follow(name, func._schema.is_mutable, args, given, out)
        if (count := product_macs(name, args, out)) is not None:
            self.at_product(name, count, given)
        return out

    def follow(self, name: str, changes: bool, args: tuple, given: list[Tensor], out) -> None:
        """Note of the results of an operation what they are; `changes`: it writes into what it is given."""
        sources = {memory(t) for t in given}
        values = [self.look(t) for t in given if t.is_floating_point() or t.dtype in (torch.uint8, torch.int8)]
        spikes = None
        if name in ZEROS:
            spikes = 0
        elif name in SCALE_SPIKES:
            first = values[:1] if name.startswith("div") else values
            spikes = max((v.spikes for v in first if v.spikes), default=None)
        elif name in KEEP_SPIKES and values and all(v.spikes is not None for v in values):
            shifted = name in ("add", "add_", "sub") and any(isinstance(a, int | float) and a for a in args[1:2])
            spikes = None if shifted else max(v.spikes for v in values)
        synapses = 0
        for value in values:
            synapses |= value.synapses
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (changes or memory(tensor) not in sources):
                self.mark(tensor, spikes, synapses)

    def at_product(self, name: str, count: int, given: list[Tensor]) -> None:
        """A product of matrices: one that no synapse takes is named."""
        if any(m in self.synapses or isinstance(m, StatefulNeuron) for m in self.running):
            return
        at = f"{self.names[self.running[-1]]}: {name}".removeprefix(": ") if self.running else name
        self.loose[at] = self.loose.get(at, 0) + count
        for tensor in given:
            if (weight := self.weights.get(memory(tensor))) is not None:
                self.loose_weights[id(weight)] = weight


def sizes(watch: Watch) -> dict:
    """The result of `account`, from a network that has run."""
    full = stored = authors = 0
    for weight in watch.loose_weights.values():
        full, stored, authors = (bits + 32 * weight.numel() for bits in (full, stored, authors))
    counted = set(watch.loose_weights)
    for synapse in watch.synapses:
        kind = getattr(synapse, "kind", None)
        weight = getattr(synapse, "weight", None)
        key = id(weight if isinstance(weight, nn.Parameter) else synapse)
        if key in counted:  # two layers share it
            continue
        counted.add(key)
        bias = 32 * synapse.bias.numel() if synapse.bias is not None else 0
        weights = effective(synapse).numel()
        full += 32 * weights + bias
        stored += WEIGHT_BITS.get(kind, 32) * weights + bias
        authors += AUTHORS_BITS.get(kind, 32) * weights + bias
    return {
        "neurons": sum(count for count, _ in watch.sizes.values()),
        "nops": sum(n * T * (1 if getattr(m, "parallel", False) else 3) for m, (n, T) in watch.sizes.items()),
        "params_full_mb": full / 8e6,
        "params_mb": stored / 8e6,
        "params_authors_mb": authors / 8e6,
    }


def example_of(net: nn.Module, x: Tensor | None) -> tuple[Tensor, dict]:
    """(input, keywords) of a call that runs every layer; a network with a configuration needs no example."""
    if x is not None:
        return x, {}
    config = getattr(net, "config", None)
    if not hasattr(config, "image_size"):
        raise ValueError("account needs an example input for a network of your own: account(net, x), x (T, N, ...)")
    like = next((t for t in [*net.parameters(), *net.buffers()] if t.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, config.in_channels, *config.size, device=like.device)
    return image.to(like.dtype), {"steps": 1}


def account(net: nn.Module, x: Tensor | None = None) -> dict:
    """Size and neuron operations of any network built from neurons of this library.

    Args:
        net: networks of this library, and any module for which `net(x)` runs the time steps of its neurons.
        x: an example input, (T, N, ...); networks of this library need none.

    Returns "neurons", "nops" (per image), "params_full_mb", "params_mb" (bits that are stored), "params_authors_mb" and
    "not_counted": MACs per image of products of matrices outside of the synapses, by module and operation; for what is
    counted see the docstring of `empf.accounting`. The state is reset. Raises ValueError where an example is missing.

    >>> net = empf.resnet18(num_classes=10, in_channels=1, image_size=8, width=0.125)
    >>> empf.account(net)["neurons"]
    4288
    """
    example, keywords = example_of(net, x)
    with Watch(net, counting=False) as watch:
        images = net(example, **keywords).shape[1]
    return sizes(watch) | {"not_counted": {name: count / images for name, count in watch.loose.items()}}


def spike_account(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """What `account` returns and what depends on the data, means over the images of `batches` of (x, labels).

    x: what the network is called with, images (N, ...) for the networks of this library, else (T, N, ...).
    Adds "sops", "energy_mj" (of the SOPs), "macs" and "energy_full_mj" (of the full-precision layers: in the networks
    of this library the stem, the head, the channel attention and shortcuts that read currents), and "density": share of
    non-zero spikes of each layer of neurons by name. The state is reset. Raises ValueError without images.

    >>> net = empf.resnet18(num_classes=10, in_channels=1, image_size=8, width=0.125)
    >>> cost = empf.spike_account(net, [(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))])
    >>> sorted(cost["density"])[0]  # the share of neurons that fire, by layer
    'blocks.0.conv1.neuron'
    """
    images = 0
    with Watch(net, counting=True) as watch:
        for x, _ in batches:
            reset(net)
            images += net(x).shape[1]
        if images == 0:
            raise ValueError("no images to count the spikes of: give at least one batch")
        counted = sizes(watch)
    totals = Layer()
    for synapse, layer in watch.layers.items():
        readout = layer.last and not hasattr(synapse, "kind")
        totals.macs += layer.macs + readout * layer.macs_on_spikes
        totals.sops += (not readout) * layer.sops
        totals.bit_sops += (not readout) * layer.bit_sops
    sops, mac = totals.sops / images, totals.macs / images
    bits = totals.bit_sops / max(1, totals.sops)
    return counted | {
        "sops": sops,
        "energy_mj": sops * PJ_PER_SOP * bits / 32 * 1e-9,
        "macs": mac,
        "energy_full_mj": mac * PJ_PER_MAC * 1e-9,
        "density": {name: on / seen for name, (on, seen) in watch.fired.items()},
        "not_counted": {name: count / images for name, count in watch.loose.items()},
    }
