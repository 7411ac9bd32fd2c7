"""Deployment: a trained network with its normalisation folded and its weights packed, in one file.

`pack(net)` -> PackedModel: the outputs of `net.eval()` up to rounding, without the training machinery.
`packed.save(path)`, `load_packed(path)`: the file, see file.py.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from empf.checks import check_device, check_input, network
from empf.deploy import file as packed_file
from empf.deploy.cpu_conv import multiplies_bf16
from empf.deploy.layers import PackedNeuron, PackedPart, PackedSynapse, absorb, packed_copy
from empf.deploy.lazy import plain
from empf.deploy.origin import Origin
from empf.deploy.plan import Plans
from empf.files import fingerprint, write_atomic
from empf.models import ModelConfig, SpikingNetwork, build
from empf.online import reset
from empf.synapse import QuantizedWeight
from empf.terminal import shown

AT_ONCE = 2**21  # numbers in the current behind the stem for each thread, of all images and steps that go together
ALONE = 2**24  # additions in a layer, of all images and steps; up to here one thread computes them
MOST_AT_ONCE = 2**28  # the same of one image: a file must not ask for all memory as soon as its network is called


class PackedModel(nn.Module):
    """A network for inference: called like the network it was packed from, same outputs, same errors.

    The membrane potentials are state: each thread has its own, and the calls of several threads take turns.

    `net`: the copy with packed parts; `config`: its `ModelConfig`, None of other networks; `origin`: data set, class
    names, normalisation and accuracy, where they are known. Make it with `pack` or `load_packed`.
    """

    __call__: Callable[..., Tensor]
    from_pretrained: ClassVar[Callable[..., "PackedModel"]]  # lent by hub.py, as the next two
    save_pretrained: ClassVar[Callable[..., None]]
    push_to_hub: ClassVar[Callable[..., str]]
    holds_state = resets_parts = True  # for `empf.reset`

    def __init__(self, net: nn.Module, config: ModelConfig | None = None, origin: Origin | None = None):
        super().__init__()
        self.net, self.config, self.origin, self.packed_as = net.eval(), config, origin or Origin(), ""
        self.single = True  # all numbers are float32
        self._take_turns()
        self.reset()

    def _take_turns(self) -> None:
        self._lock, self._thread, self._plans = threading.RLock(), threading.local(), Plans()
        self._last = vars(self._thread)  # what belongs to the thread that was here last

    def __getstate__(self) -> dict:  # copies start at time 0, and have their own turns
        own = ("_lock", "_thread", "_last", "_plans", "_stateful")
        return {n: v for n, v in super().__getstate__().items() if n not in own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._take_turns()

    def _apply(self, fn, recurse=True):
        self._plans = Plans()
        super()._apply(fn, recurse)
        numbers = [*self.parameters(), *self.buffers()]
        self.single = all(t.dtype == torch.float32 for t in numbers if t.is_floating_point())
        return self

    def reset(self) -> None:
        """Back to time 0: v = 0, for this thread."""
        with nullcontext() if torch.compiler.is_compiling() else self.turn():
            for module in self.stateful():
                module.reset()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside: this thread alone, with the state that it left."""
        with self._lock:
            here = vars(self._thread)
            if here is not self._last:
                self._last["states"], self._last = self.states(), here
                if "states" in here:
                    self.restore(here["states"])
                else:
                    self.reset()
            yield

    def stateful(self) -> list[nn.Module]:
        """The parts that hold a state."""
        if "_stateful" not in self.__dict__:
            self.__dict__["_stateful"] = [m for m in self.net.modules() if getattr(m, "holds_state", False) is True]
        return self.__dict__["_stateful"]

    @torch.inference_mode(False)  # where tensors have the counters that tell of changes in place
    @torch.no_grad()
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """`packed(x)`, of a network of `empf.models`: images (N, C, H, W) or events (T, N, C, H, W), all T steps.

        `packed(x, steps=k)`: the next k steps. `packed.reset()` comes before a new batch. x is normalised as `origin`
        says, or counts of events. Activations have the type of x: on a GPU, bfloat16 x is fastest; the logits are
        float32. On a CPU, `torch.autocast("cpu", torch.bfloat16)` makes spikes and what neurons read of their products
        bfloat16, where the processor multiplies that; all else stays float32. Raises ValueError for another shape,
        steps past T, or another batch size without a reset, TypeError for integers.
        """
        if torch.compiler.is_compiling():
            return self._run(x, *args, **kwargs)
        with self.turn(), self.spikes_in_bf16(x):
            return self._run(x, *args, **kwargs)

    @contextmanager
    def spikes_in_bf16(self, x: Tensor) -> Iterator[None]:
        """Inside: as the autocast of the CPU asks for x of float32, which is off inside."""
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if kind != torch.bfloat16 or not isinstance(x, Tensor) or not x.is_cpu or x.dtype != torch.float32:
            yield
            return
        neurons = [vars(m) for m in self.stateful() if isinstance(m, PackedNeuron)] if multiplies_bf16() else []
        try:
            for neuron in neurons:
                neuron["bf16"] = True
            with torch.autocast("cpu", enabled=False):
                yield
        finally:
            for neuron in neurons:
                neuron["bf16"] = False

    def _run(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.single:
            raise TypeError(
                "a packed network computes in float32 or, where x is bfloat16 or float16, with activations of that "
                "type: call packed.float(), and convert x instead"
            )
        known = isinstance(self.net, SpikingNetwork)
        if known:
            check_input(x)
        if not known or x.dim() not in (4, 5):  # the network says what is wrong
            return plain(self.net(x, *args, **kwargs))
        half = x.dtype in (torch.bfloat16, torch.float16)
        before = self.states()
        try:
            with torch.autocast(x.device.type, x.dtype) if half else nullcontext(), self.few_threads(x):
                logits = self.in_parts(x, before, *args, **kwargs)
        except (TypeError, ValueError):  # a call that is refused changes nothing
            self.restore(before)
            raise
        return logits.float() if half else logits

    def in_parts(self, x: Tensor, before: list[dict], steps: int | None = None) -> Tensor:
        """On a CPU a large batch goes through the network in parts, so that each layer finds its input in the cache."""
        batch, net = x.dim() - 4, self.net
        at_once = self.images_at_once(steps if isinstance(steps, int) else net.config.T, x.device)
        held = [v for s in before if (v := s.get("v")) is not None]
        if x.shape[batch] <= at_once or any(len(v) != x.shape[batch] for v in held):
            return self._plans(self, x, steps)
        logits, after = [], []
        for i, part in enumerate(x.split(at_once, batch)):
            self.restore([with_v(s, lambda v, i=i: v[i * at_once :][:at_once]) for s in before])
            logits.append(self._plans(self, part, steps))
            after.append(self.states())
        beside = lambda parts: with_v(parts[0], lambda _: torch.cat([part["v"] for part in parts]))  # noqa: E731
        self.restore([beside(parts) for parts in zip(*after, strict=True)])
        return torch.cat(logits, 1)

    @contextmanager
    def few_threads(self, x: Tensor) -> Iterator[None]:
        """Inside, one thread computes what is so little that waiting for others would take longer.

        torch's setting is that of the process: it is left alone where other threads could meet it.
        """
        # additions of an ordinary layer: all stages have about the same
        threads, work = torch.get_num_threads(), 9 * self.net.stem.conv.out_channels * self.numbers(x)
        if work > ALONE or threads == 1 or x.device.type != "cpu" or threading.active_count() > 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def states(self) -> list[dict]:
        """What changes in a call, of every part that holds a state."""
        return [{n: at[n] for n in ("t", "v", "unfinished") if n in at} for at in map(vars, self.stateful())]

    def restore(self, states: list[dict]) -> None:
        """Put what `states` returned where it was."""
        for module, state in zip(self.stateful(), states, strict=True):
            vars(module).update(state)

    def numbers(self, x: Tensor) -> int:
        """Numbers in the current behind the stem, of all images and steps."""
        return x.shape[-4] * self.net.config.T * numbers_of_a_step(self.net)

    def images_at_once(self, steps: int, device: torch.device) -> int:
        """So many that a layer finds its input in the cache of a CPU."""
        if device.type != "cpu" or torch.compiler.is_compiling():
            return sys.maxsize
        return max(1, AT_ONCE * torch.get_num_threads() // (max(1, steps) * numbers_of_a_step(self.net)))

    def step(self, frame: Tensor) -> Tensor:
        """The next step of a stream: frame (N, C, H, W) -> logits (N, classes) of this step alone.

        The prediction so far is the arg-max of their sum since `reset`. Raises ValueError as a call does, so also
        after T steps.
        """
        return self(frame, steps=1)[0] if isinstance(self.net, SpikingNetwork) else self(frame.unsqueeze(0))[0]

    def packed_weights(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name of the packed bits in the state dict of `net` -> (shape of the dense weight, kind)."""
        found = {name: m for name, m in self.net.named_modules() if isinstance(m, PackedSynapse)}
        return {f"{name}.bits": (m.shape, m.kind) for name, m in found.items()}

    def stated_origin(self) -> Origin:
        """What is saved as the origin: without results where the weights were changed since packing or loading."""
        return self.origin if self.packed_as == self.fingerprint() else self.origin.without_results()

    def description(self) -> dict:
        """What has to be known besides the tensors: the configuration, or the class and its parts."""
        if self.config is not None:
            return {"model": self.config.to_dict()}
        return {"network": type(self.net).__name__, "parts": parts(self.net)}

    def fingerprint(self) -> str:
        """A checksum of what is computed, which says whether two packed networks are the same."""
        stored = {n: t.float() if t.is_floating_point() else t for n, t in self.net.state_dict().items()}
        about = self.description() if self.config is None else {"model": self.config.for_checksum()}
        return fingerprint(stored, json.dumps(about, sort_keys=True))

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes; see empf/deploy/file.py."""
        about = {**self.description(), "origin": asdict(self.stated_origin()), "fingerprint": self.fingerprint()}
        return packed_file.to_bytes(packed_file.encode(self.net.state_dict(), self.packed_weights()), about)

    def save(self, path: str | Path) -> None:
        """Write the one file, atomically; folders that are missing are made, a file of that name is replaced.

        Raises OSError with one sentence where the disk refuses.
        """
        write_atomic(Path(path), self.to_bytes())


def with_v(state: dict, change: Callable[[Tensor], Tensor]) -> dict:
    """The same state with another potential, where there is one."""
    return state if state.get("v") is None else {**state, "v": change(state["v"])}


def numbers_of_a_step(net: SpikingNetwork) -> int:
    """Numbers in the current behind the stem, of one image and step."""
    height, width = net.config.size
    for stride in (net.stem.conv.stride[0], 1 if net.stem.pool is None else net.stem.pool.stride):
        height, width = -(-height // stride), -(-width // stride)
    return net.stem.conv.out_channels * height * width


def parts(net: nn.Module) -> dict[str, str]:
    """What each packed part is and the shapes of all that has a state, by name."""
    found = {}
    for name, module in net.named_modules():
        own = {**module._parameters, **module._buffers}
        sizes = [f"{n}{list(t.shape)}" for n, t in own.items() if t is not None]
        if sizes:
            found[name] = " ".join([repr(module) if isinstance(module, PackedPart) else "", *sizes]).strip()
    return found


def misfit(about: dict, net: nn.Module, config: ModelConfig | None) -> str | None:
    """What of the file that `about` describes is not in `net`, or otherwise; None if it fits."""
    if "model" in about:
        same = config == ModelConfig.from_dict(about["model"])
        return None if same else f"holds a {about['model']['arch']}: call load_packed(path) without net"
    here, there = parts(net), about["parts"]
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            missing = "it is not in the file" if name not in there else f"the file has {there[name]}"
            mine = "it is not in net" if name not in here else f"net has {here[name]}"
            return f"does not fit net: of {name or 'the network itself'} {missing}, and {mine}"
    return None


def pack(net: nn.Module) -> PackedModel:
    """Fold the normalisation, pack the weights: a network that returns what `net.eval()` does, up to rounding.

        BN behind a synapse   y = g*a * conv(x, sign) + h       a = scale, g = gamma/sqrt(var + eps), h = b - mean*g
        Mem-BN                mh = gain*(leak*v + I) + shift    for each step and channel (arXiv 2410.07547, sec. 4)

    Any `nn.Module`: each binary or ternary synapse, each batch norm and each neuron in it is replaced by its packed
    counterpart, everything else is copied. The network is left as it is. Class names, normalisation and accuracy come
    with it if `empf.load` read it from a run (its weights are then the moving average, where the run kept one).
    Raises ValueError where no weight is binary or ternary, or a number is not finite.

    >>> packed = empf.pack(torch.nn.Sequential(empf.BinaryLinear(64, 10), empf.EMPFNeuron(4)))
    >>> packed(torch.randn(4, 8, 64)).shape
    torch.Size([4, 8, 10])
    """
    if not any(isinstance(m, QuantizedWeight) for m in network(net).modules()):
        raise ValueError(
            "the weights are full precision, there is nothing to pack: build the network with binary or ternary "
            "synapses, such as empf.resnet18(weights='binary') or empf.BinaryConv2d"
        )
    for name, tensor in net.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: pack a network that was trained without divergence")
    made = packed_copy(net)
    packed = PackedModel(made, described(made), Origin.of(net))
    if packed.config is not None:
        absorb(made)
    packed.packed_as = packed.fingerprint()
    return packed


def described(net: nn.Module) -> ModelConfig | None:
    """The configuration from which a packed network can be built again; None where there is none."""
    if not isinstance(net, SpikingNetwork):
        return None
    classes = net.head.out_features if isinstance(net.head, nn.Linear) else net.config.num_classes
    config = replace(net.config, num_classes=classes)
    same = skeleton(config).net
    return config if repr(same) == repr(net) and shapes(same) == shapes(net) else None


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def skeleton(config: ModelConfig, origin: Origin | None = None) -> PackedModel:
    """The packed network of a configuration with tensors on the meta device: only names and shapes."""
    with torch.device("meta"):
        return PackedModel(packed_copy(build(config)), config, origin)


def load_packed(
    path: str | Path, device: str | torch.device = "cpu", *, net: nn.Module | None = None
) -> PackedModel:  # fmt: skip
    """Read what `PackedModel.save` wrote: a network at time 0 on `device`. The name of the file may end in anything.

    `net`: for a network that is not one of `empf.models`, one of its class, not packed: the file holds the parts, the
    class holds the wiring. It is left as it is.
    Raises FileNotFoundError, or ValueError with one sentence for a file that is truncated, altered, of another version
    or something else altogether, or does not fit `net`. Nothing of a file is used before its checksum was found right.

    >>> empf.pack(empf.resnet18(in_channels=1, image_size=8, width=0.125)).save("net.safetensors")
    >>> packed = empf.load_packed("net.safetensors")
    """
    check_device(device)
    about, arrays = packed_file.read(path)
    try:
        origin, wrong = Origin.from_dict(about["origin"]), None
        if net is not None:
            made = packed_copy(network(net))
            model = PackedModel(made, described(made), origin)
            wrong = misfit(about, made, model.config)
        elif "model" in about:
            model = skeleton(ModelConfig.from_dict(about["model"]), origin)
            work = model.config.T * numbers_of_a_step(model.net)
            if work > MOST_AT_ONCE:
                wrong = f"asks for currents of {work:,} numbers for one image, of {MOST_AT_ONCE:,}: it is refused"
        else:
            wrong = f"holds a network of your own: call load_packed(path, net={about['network']}(...))"
        if wrong is None:
            state = packed_file.decode(arrays, model.net.state_dict(), model.packed_weights())
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a network of this version ({shown(error, 200)}): pack it again"
        ) from error
    if wrong is not None:
        raise ValueError(f"{path} {shown(wrong)}")
    model.net.load_state_dict(state, assign=True)
    model.packed_as = model.fingerprint()
    if model.packed_as != about.get("fingerprint"):
        raise ValueError(f"{path} does not hold the network that was saved as it, but an altered one: pack it again")
    return model.to(device)


def verify(model: SpikingNetwork, packed: PackedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """Compare the logits over batches of (images, labels): {"images", "relative_difference", "same_class"}.

    The difference is the largest of any image and step, relative to its largest logit; `same_class` is a share.
    Raises ValueError if it is above 1e-4; where spikes are rounded, so that rounding at a boundary may flip a code, if
    fewer than 99.9 % of the images (but for one) get the same class; and if there are no images.
    """
    differences, same, count = [0.0], 0, 0
    for images, _ in batches:
        logits = []
        for net in (model, packed):
            reset(net)
            # the tensor cores would round the inputs of ordinary fp32 convolutions to 10 bits
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                logits.append(net(images))  # T N classes
            reset(net)
        wanted, found = logits
        error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1)
        differences.append(error.max().item())
        same += int((found.sum(0).argmax(-1) == wanted.sum(0).argmax(-1)).sum())
        count += images.shape[-4]
    if not count:
        raise ValueError("there are no images to compare the logits on: give at least one batch")
    difference = torch.tensor(differences).max().item()  # unlike Python's, it does not lose a NaN
    rounded = any(isinstance(m, PackedNeuron) and m.spike_bits is not None for m in packed.modules())
    if count - same > max(1, 0.001 * count) if rounded else not difference <= 1e-4:
        raise ValueError(
            f"the packed network is not the model: logits differ by {difference:.1e}, {same} of {count} classes agree; "
            "do not use it, and report this"
        )
    return {"images": count, "relative_difference": difference, "same_class": same / count}


def pack_to_file(model: SpikingNetwork, path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """Pack, save, load again and `verify`: what that returns, and "file" and "file_mb". A wrong file is not kept.

    Raises ValueError as `pack` and `verify`, and where `path` exists and is not a packed network.
    """
    path = Path(path)
    if path.is_dir() or path.exists() and not packed_file.is_packed(path):
        raise ValueError(f"{path} exists and is not a packed network: choose another name for the packed file")
    unchecked = path.with_name(f"{path.name}.unchecked")
    pack(model).save(unchecked)
    try:
        checked = verify(model, load_packed(unchecked, next(model.parameters()).device), batches)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    return {"file": str(path), "file_mb": path.stat().st_size / 1e6, **checked}
