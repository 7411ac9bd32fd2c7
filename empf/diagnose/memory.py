"""What training keeps in memory, in bytes, by learning mode and number of time steps; of any network.

saved              for the backward pass, counted. `random` and `every` hold that of one step, here of the last one,
                   after T - 1 steps that carry the potential: one count, so their rows are the same
saved_plain        the same where nothing is made again in the backward pass (`layer.enabled(False)`)
theory             of `saved`, from the shapes of the configuration alone, see `theory`; None for a network of one's own
potentials         membrane potentials, carried from step to step
parameters, gradients, optimizer (SGD with momentum: one value per parameter); of synapses that flip (`Flips`) bits and
                   scales, the largest gradient, for there is one at a time, and the momenta as they are stored
effective_weights  of binary and ternary synapses; that of one which flips is there before its gradient, in its place
total              the sum of saved, potentials, parameters, gradients, optimizer and effective_weights
allocated          on a GPU: the largest amount allocated in a whole training step, work space included; else None
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from empf import layer
from empf.evaluate import restored
from empf.models import Block, ModelConfig, SpikingNetwork, build
from empf.neuron import EMPFNeuron, StatefulNeuron
from empf.online import LEARNING, online_backward, reset, set_online, time_steps
from empf.training.flip import Flips

STEPS = (1, 2, 4, 8, 16, 32)
PARTS = ("saved", "potentials", "parameters", "gradients", "optimizer", "effective_weights")  # of "total"

# Activations of the size of its current that a neuron and the convolution behind it keep of one step: as plain modules;
# where spikes are made again; the same before the first step, where there is no potential.
KEPT = {
    "vanilla": (3, 1, 0),  # v, s, and s once more, stacked for the convolution | v
    "parallel": (2, 0, 0),
    "mem_bn": (5, 1, 0),  # besides: m, and the result of the batch norm
    "lif": (2, 2, 2),  # m - threshold and s; never made again
}


class Storages(TorchDispatchMode):
    """Notes the storage of every tensor that is made while it is active, without keeping any alive."""

    def __init__(self):
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}  # reference -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self) -> dict[StorageWeakRef, int]:
        return {ref: size for ref, size in self.made.items() if not ref.expired()}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[dict[StorageWeakRef, int]]:
    """Notes the storages of all that the synapses hand out as their effective weight, and their bytes."""
    found: dict[StorageWeakRef, int] = {}

    def noting(hand_out: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def effective_weight() -> Tensor:
            weight = hand_out()
            found[StorageWeakRef(weight.untyped_storage())] = weight.untyped_storage().nbytes()
            return weight

        return effective_weight

    synapses = [m for m in model.modules() if hasattr(m, "effective_weight")]
    own = [m for m in synapses if "effective_weight" in vars(m)]
    before = [m.effective_weight for m in synapses]
    for synapse, hand_out in zip(synapses, before, strict=True):
        synapse.effective_weight = noting(hand_out)
    try:
        yield found
    finally:
        for synapse, hand_out in zip(synapses, before, strict=True):
            if synapse in own:
                synapse.effective_weight = hand_out
            else:
                del synapse.effective_weight  # the method of the class is left


def run(model: nn.Module, x: Tensor, past: int, steps: int) -> Tensor:
    """Logits of `steps` time steps after `past` without gradient; a network of one's own gets x (T, N, ...) in two."""
    if getattr(getattr(model, "module", model), "runs_steps", False):  # also wrapped
        return model(x, steps=steps, past=past)
    if past:
        with torch.no_grad():
            model(x[:past])
    return model(x[past : past + steps])


def saved_for_backward(model: nn.Module, x: Tensor, *, past: int = 0, steps: int = 1) -> dict[str, int]:
    """Run `steps` time steps of a reset model, after `past` without gradient, and count what is alive after it.

    Any network: one of this library, or one for which `model(x[:k])` runs the next k steps, x (T, N, ...).
    Returns {"bytes", "tensors"}: size and number of distinct storages that exist only for the backward pass, and
    {"potentials", "effective_weights"}: bytes of the membrane potentials that the neurons hold for the next step, and
    of the synapses' effective weights, which are not among them. Not counted: the input, the logits, parameters,
    buffers. How a tensor is held does not matter, so any implementation is counted the same way. The model is left
    reset, otherwise as it was.
    """
    reset(model)
    with restored(model):
        with effective_weights(model) as effective, Storages() as made:
            logits = run(model, x, past, steps)
        neurons = [m for m in model.modules() if isinstance(m, StatefulNeuron)]
        kept = {StorageWeakRef(t.untyped_storage()) for t in [x, logits, *model.parameters(), *model.buffers()]}
        held = {StorageWeakRef(n.v.untyped_storage()) for n in neurons if n.v is not None}
        alive = made.alive()
    saved = {ref: size for ref, size in alive.items() if ref not in held | kept | effective.keys()}
    return {
        "bytes": sum(saved.values()), "tensors": len(saved),
        "potentials": sum(size for ref, size in alive.items() if ref in held),
        "effective_weights": sum(size for ref, size in effective.items() if ref in alive),
    }  # fmt: skip


def example(config: ModelConfig, batch_size: int, device: str) -> tuple[SpikingNetwork, Tensor]:
    """A network in training mode and a batch of images, or of event frames for `vgg_snn`."""
    with torch.device(device):
        model = build(config)
        shape = (batch_size, config.in_channels, *config.size)
        return model.train(), torch.randn(config.T, *shape) if config.arch == "vgg_snn" else torch.randn(shape)


def theory(config: ModelConfig, batch_size: int, through_time: bool) -> int | None:
    """Bytes that the backward pass needs: what `saved` should count, to 5 % (parameters and statistics are left out).

        online         4 N [ sum over neurons of k |I| + sum over convolutions of |y| + sum over poolings of |p| ]
        through time   T times that

    |I|, |y|, |p|: numbers per image in the current of a neuron, the output of a convolution, the pooled spikes. k: see
    `KEPT`; the second or third number online, the first through time and where N |I| is at most `layer.SMALL`.
    The stem's y counts only if it is small or has several frames, else it is made again; that of a static image once.
    Its max-pooling, where images are large, keeps its input and 8-byte places; online also its output. Pooled spikes
    are kept through time and where they are small.
    Online, a residual sum of more than `layer.MAX_TERMS` currents is kept as well (ResNet-34). The current that a
    shortcut reads is kept where it is small, and through several steps.
    None for SECA and activations other than ReLU.
    """
    if config.seca or config.activation != "relu":
        return None
    model = build(replace(config, T=1)).eval()
    image = torch.zeros(1, config.in_channels, *config.size)
    numbers = lambda one: batch_size * one.numel()  # noqa: E731
    events = config.arch == "vgg_snn"
    T = config.T if through_time else 1
    sizes: list[int] = []
    terms = 1

    def at_neuron(neuron, inputs, spikes) -> None:
        kind = "lif"
        if isinstance(neuron, EMPFNeuron):
            kind = "parallel" if neuron.parallel else "mem_bn" if neuron.mem_bn else "vanilla"
        small = numbers(spikes) <= layer.SMALL
        sizes.append(T * KEPT[kind][0 if through_time or small else 1 if config.T > 1 else 2] * numbers(spikes))

    def at_output(module, inputs, y) -> None:
        sizes.append(T * numbers(y))

    def at_shortcut(module, inputs, y) -> None:
        kept = config.shortcut == "current" and (T > 1 or numbers(inputs[0]) <= layer.SMALL)
        sizes.append(T * kept * numbers(inputs[0]))

    def at_pool(module, inputs, pooled) -> None:
        made_again = not through_time and numbers(inputs[0]) > layer.SMALL and config.neuron != "lif"
        sizes.append(0 if made_again and module is not model.pool else T * numbers(pooled))  # the head reads the last

    def at_stem(module, inputs, y) -> None:
        made_again = model.stem.pool is None and numbers(y) > layer.SMALL and not (events and T > 1)
        sizes.append(0 if made_again else numbers(y) * (T if events else 1))

    def at_stem_pool(module, inputs, y) -> None:
        online = not through_time and numbers(y) > layer.SMALL and config.neuron != "lif"
        sizes.append(numbers(inputs[0]) + (2 + online) * numbers(y))

    def at_block(block, inputs, x) -> None:
        nonlocal terms
        terms = 1 if block.shortcut is not None else terms
        kept = terms == layer.MAX_TERMS
        sizes.append(numbers(x) if kept and not through_time and numbers(x) > layer.SMALL else 0)
        terms = 0 if kept else terms + 1

    for name, module in model.named_modules():
        if name.endswith("shortcut.conv"):
            module.register_forward_hook(at_shortcut)
        if isinstance(module, Block) and config.neuron != "lif":
            module.register_forward_hook(at_block)
        elif isinstance(module, StatefulNeuron):
            module.register_forward_hook(at_neuron)
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(at_stem if module is model.stem.conv else at_output)
        elif isinstance(module, nn.AvgPool2d):
            module.register_forward_hook(at_pool)
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(at_stem_pool)
    with torch.no_grad():
        model(image[None] if events else image)
    return 4 * sum(sizes)


def saved(model: nn.Module, x: Tensor, through_time: bool, plain: bool = False) -> dict[str, int]:
    """`saved_for_backward` of all steps through time, or of the last step online."""
    T = time_steps(model)
    set_online(model, not through_time)
    try:
        with layer.enabled(not plain):
            return saved_for_backward(model, x, past=0 if through_time else T - 1, steps=T if through_time else 1)
    finally:
        set_online(model, True)


def network_memory(model: nn.Module, x: Tensor, flips: Flips | None = None) -> list[dict]:
    """A row with the keys of the module's docstring for each learning mode of a network, as `saved_for_backward`.

    flips: what learns its synapses, where they have no latent weights; the rest by SGD, as all do without.
    """
    rest = size(p for p in model.parameters() if flips is None or p not in flips)
    held = dict.fromkeys(("parameters", "gradients", "optimizer"), rest)
    for part, more in {} if flips is None else flips.memory().items():
        held[part] += more
    counts = {mode: [saved(model, x, mode == "stbp", plain) for plain in (False, True)] for mode in ("online", "stbp")}
    rows = []
    for learning in LEARNING:
        count, plain = counts["stbp" if learning == "stbp" else "online"]
        row = {
            "T": time_steps(model), "learning": learning, "saved": count["bytes"], "saved_plain": plain["bytes"],
            "theory": None, "potentials": count["potentials"], **held,
            "effective_weights": count["effective_weights"], "allocated": None,
        }  # fmt: skip
        rows.append(row | {"total": sum(row[part] for part in PARTS)})
    return rows


def largest_allocated(config: ModelConfig, batch_size: int, learning: str, device: str, flip: bool) -> int:
    """Peak of the GPU memory over the second training step (the first one makes the momentum)."""
    before = torch.cuda.memory_allocated(device)
    model, x = example(config, batch_size, device)
    target = torch.zeros(batch_size, dtype=torch.int64, device=device)
    flips = Flips(model, lr=0.01) if flip else ()
    rest = [p for p in model.parameters() if p not in flips]
    optimizer = torch.optim.SGD(rest, lr=0.01, momentum=0.9, nesterov=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        online_backward(model, x, target, F.cross_entropy, learning=learning, steps=[config.T])
        optimizer.step()
        optimizer.zero_grad()
    reset(model)
    return torch.cuda.max_memory_allocated(device) - before


def training_memory(
    config: ModelConfig, batch_size: int, device: str = "cpu", steps: Iterable[int] = STEPS, flip: bool = False
) -> list[dict]:
    """The rows of `network_memory` for the network of a configuration, for each of the numbers of time steps.

    flip: its synapses have no latent weights. Runs on `device`; raises ValueError where its memory does not suffice, or
    where there is no binary synapse to flip.
    """
    rows, on_gpu = [], torch.device(device).type == "cuda"
    try:
        for T in steps:
            at_T = replace(config, T=T)
            model, x = example(at_T, batch_size, device)
            for row in network_memory(model, x, Flips(model, lr=0.01) if flip else None):
                row["theory"] = theory(at_T, batch_size, row["learning"] == "stbp")
                if on_gpu:
                    row["allocated"] = largest_allocated(at_T, batch_size, row["learning"], device, flip)
                rows.append(row)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the memory of {device} does not suffice: lower --batch-size or --width") from error
    return rows
