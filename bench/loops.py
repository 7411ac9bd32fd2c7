"""The training loops that bench/train.py compares; their names are explained there."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import empf
from empf import layer
from empf.data.batches import Augment, Batches
from empf.data.sets import DATASETS, ImageSet
from empf.kernels.neuron import neuron_step
from empf.neuron import StatefulNeuron
from empf.synapse import QuantizedWeight
from empf.training.capture import CapturedBackward
from empf.training.config import TrainConfig
from empf.training.optimizers import make_optimizer

AUTHORS = ("authors-order", "authors-loop")
ONE_STEP = ("random", "kept", *AUTHORS)  # those that draw a step
PLAIN = ("kept", *AUTHORS)  # those without what the authors do not have: empf.layer
IMAGES = 2048  # in the synthetic data set
AUGMENT = Augment(crop=True, flip=True, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
LAYOUT_OPS = {"clone", "copy_", "_to_copy", "contiguous"}
HOST_READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    arch: str = "resnet18"
    width: float = 0.5
    T: int = 4
    batch_size: int = 64
    weights: str = "binary"
    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool = False

    def __post_init__(self):
        if self.cuda_graph and torch.device(self.device).type != "cuda":
            raise ValueError("--cuda-graph needs a GPU: give --device cuda")
        if self.cuda_graph and self.compile:
            raise ValueError("choose one of --cuda-graph and --compile")


class Stopwatch:
    """Seconds by name: `lap(name)` adds those since the last lap. It waits for a GPU to be done."""

    def __init__(self, device: str, clock: Callable[[], float]):
        self.wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
        self.clock, self.seconds = clock, Counter()
        self.wait()
        self.last = clock()

    def lap(self, name: str) -> None:
        self.wait()
        now = self.clock()
        self.seconds[name] += now - self.last
        self.last = now


class Loop:
    """A network, its optimizer and data, and an update of it in each of the variants."""

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32):
        self.setting, self.dtype = setting, dtype
        torch.manual_seed(0)
        events = setting.arch == "vgg_snn"
        size = {} if events else {"num_classes": 100}
        make = getattr(empf, setting.arch)
        self.model = make(T=setting.T, width=setting.width, weights=setting.weights, **size).to(setting.device, dtype)
        if setting.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, TrainConfig(lr=0.01))
        self.batches = self.frames() if events else self.images()
        self.net: nn.Module = self.model
        if setting.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph for each number of steps before t*
            self.net = torch.compile(self.model, dynamic=False)
        if setting.bf16:
            self.model.forward = torch.autocast(torch.device(setting.device).type, torch.bfloat16)(self.model.forward)
        self.captured: dict[str, CapturedBackward] = {}

    @cached_property
    def plain(self) -> "Loop":
        """The same, as the authors run it: torch's default layout, and neurons of plain operations."""
        loop = Loop(replace(self.setting, channels_last=False, compile=False, cuda_graph=False), self.dtype)
        for neuron in loop.model.modules():
            if isinstance(neuron, StatefulNeuron):
                write_out(neuron)
        return loop

    def of(self, variant: str) -> "Loop":
        """The loop that runs a variant."""
        return self.plain if variant == "authors-loop" else self

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Random pictures, augmented as train.py does, on the device."""
        spec, n = DATASETS["cifar100"], max(IMAGES, self.setting.batch_size)
        pixels = torch.randint(256, (n, spec.channels, spec.image_size, spec.image_size), dtype=torch.uint8)
        names = [str(c) for c in range(spec.num_classes)]
        images = ImageSet(pixels, torch.randint(spec.num_classes, (n,)), names, spec).to(self.setting.device)
        batches = Batches(images, self.setting.batch_size, train=True, augment=AUGMENT)
        while True:
            for x, target in batches:
                layout = torch.channels_last if self.setting.channels_last else torch.contiguous_format
                yield x.to(self.dtype).contiguous(memory_format=layout), target.to(self.dtype)
            batches.set_epoch(batches.epoch + 1)

    def frames(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch of sparse event frames, again and again."""
        c = self.model.config
        shape = (c.T, self.setting.batch_size, c.in_channels, c.image_size, c.image_size)
        x = torch.poisson(torch.full(shape, 0.1)).to(self.setting.device, self.dtype)
        target = torch.arange(self.setting.batch_size, device=x.device) % c.num_classes
        while True:
            yield x, target

    def steps(self, variant: str) -> range:
        """The t* to time; a single one where none is drawn."""
        return range(1, self.setting.T + 1) if variant in ONE_STEP else range(1, 2)

    def gradients(self, variant: str, t: int, x: Tensor, target: Tensor, lap=lambda name: None) -> Tensor:
        """Add the gradients of one batch to `.grad`; returns the loss. `lap` is called after each part of it."""

        def criterion(logits: Tensor, target: Tensor) -> Tensor:
            loss = F.cross_entropy(logits.to(self.dtype), target)
            lap("forward")
            return loss

        def backward(loss: Tensor) -> None:
            loss.backward()
            lap("backward")

        learning = "random" if variant in ONE_STEP else variant
        with layer.enabled(variant not in PLAIN):
            if variant in AUTHORS:
                return authors_order(self.net, x, target, criterion, t, backward)
            return empf.online_backward(
                self.net, x, target, criterion, learning=learning, steps=[t], backward=backward
            )[0]  # fmt: skip

    def update(self, variant: str, t: int, lap=lambda name: None) -> None:
        x, target = next(self.batches)
        lap("data")
        if self.setting.cuda_graph and variant not in AUTHORS:
            self.replay(variant, t, x, target)
            lap("forward and backward")
        else:
            self.gradients(variant, t, x, target, lap)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.setting.device == "cpu")
        lap("optimizer")

    def replay(self, variant: str, t: int, x: Tensor, target: Tensor) -> None:
        """`gradients` as one CUDA graph per variant and t*."""
        if variant not in self.captured:
            learning = "random" if variant in ONE_STEP else variant
            self.captured[variant] = CapturedBackward(self.model, F.cross_entropy, learning=learning)
        with layer.enabled(variant not in PLAIN):
            self.captured[variant](x, target, steps=[t])


def write_out(neuron: StatefulNeuron) -> None:
    """Let a neuron compute its steps by the operations of its definition, none of them fused or done by a kernel."""

    def forward(current: Tensor) -> Tensor:
        steps, spikes = neuron.advance(current), []
        v = torch.zeros((), dtype=current.dtype, device=current.device) if neuron.v is None else neuron.v
        for t, current_t in zip(range(steps.start, steps.stop), current, strict=True):
            s, v = neuron_step(current_t, v.detach(), neuron.leak[t], neuron.threshold[t])
            spikes.append(s)
        neuron.v = v.detach()
        return spikes[0].unsqueeze(0) if len(spikes) == 1 else torch.stack(spikes)

    neuron.forward = forward


def authors_order(model: nn.Module, x: Tensor, target: Tensor, criterion, t: int, backward=Tensor.backward) -> Tensor:
    """One random step as the authors compute it: each step by itself through the whole network, synapses included.

    Frames of events are handed over one by one. Returns the loss of step t.
    """
    empf.reset(model)
    synapses = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    for step in range(1, t + 1):
        for synapse in synapses:
            synapse.reset()  # forgets the effective weight
        with torch.set_grad_enabled(step == t):
            logits = model(x if x.dim() == 4 else x[step - 1 : step], steps=1)[0]
    loss = criterion(logits, target)
    backward(loss)
    return loss.detach()


class Watch(TorchDispatchMode):
    """Notes changes of memory layout around convolutions, and reads of device values by the host.

    conversions: copies of an activation between memory formats, and convolutions that get an activation or a gradient
    in another format than channels_last (some of the pixels of one in that format are not another format).
    weights: the same of tensors that are shaped like a weight of the model.
    reads: operations that make the host wait for the device.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.shapes = {p.shape for p in model.parameters()}
        self.conversions, self.weights, self.reads = Counter(), Counter(), Counter()

    def note(self, name: str, x: Tensor) -> None:
        (self.weights if x.shape in self.shapes else self.conversions)[f"{name} {tuple(x.shape)}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in HOST_READS:
            self.reads[name] += 1
        elif name in LAYOUT_OPS:
            source = args[1] if name == "copy_" else args[0]
            if formats(source) and formats(out) and not formats(source) & formats(out):
                self.note(name, out)
        elif name in ("convolution", "convolution_backward"):
            for x in args[: 2 if name == "convolution" else 3]:
                if x.dim() == 4 and x.stride(1) != 1 and "channels_last" not in formats(x):
                    self.note(name, x)
        return out


def formats(x: Tensor) -> set[str]:
    """The memory formats of an activation (..., C, H, W) of more than one pixel; empty for anything else."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() not in (4, 5):
        return set()
    x = x.flatten(0, 1) if x.dim() == 5 and (x.stride(0) == x.shape[1] * x.stride(1) or len(x) == 1) else x
    if x.dim() == 5:
        return set()
    names = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return {name for name, layout in names.items() if x.is_contiguous(memory_format=layout)}
