"""A pass of a packed network on a CPU as the flat list of its calls, without the Python between them.

One image is computed by a small network in less time than its modules take to find out what to compute. A `Recorder`
notes a pass: operations of torch and calls of native.cpp; a `Plan` makes them again, on the same weights, so that the
numbers are the same to the bits. It stands for the network as long as its `Snapshot` does: no module, tensor or
attribute was exchanged, nobody watches a module, time is 0. Anything else goes through the modules, and so do networks
with modules that are not those of `empf.models`.
"""

import ctypes
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from empf.attention import SECA
from empf.deploy.layers import PackedNeuron, PackedNorm, PackedSynapse, channels_last
from empf.deploy.lazy import plain
from empf.kernels import backend, native
from empf.models import VGGSNN, Block, ResNet, SpikingConv, Stem

KNOWN = (ResNet, VGGSNN, Stem, Block, SpikingConv, SECA, PackedNeuron, PackedNorm, PackedSynapse)
KNOWN += (nn.Sequential, nn.ModuleDict, nn.Conv1d, nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.MaxPool2d)
FORWARD = {kind: kind.forward for kind in KNOWN}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MOST = 4  # plans of a network
LARGEST = 2**20  # numbers in the current behind the stem; what takes longer gains little, and all is kept while noted
DETACH = torch.ops.aten.detach.default
EMPTY = torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default, torch.ops.aten.empty_strided.default
FASTER = {torch.ops.aten.view.default: Tensor.view}  # another way to call the same


class Snapshot:
    """All that the modules of a network hold, their classes too; and the plan that is right as long as they do."""

    def __init__(self, net: nn.Module):
        self.modules = modules = list(net.modules())
        self.types = list(map(type, modules))
        kinds = {kind for own in self.types for kind in own.__mro__[:-1]}
        self.known = all(FORWARD.get(type(m)) is type(m).forward and "forward" not in vars(m) for m in modules)
        self.net, self.plan, self.after = net, None, []  # after: the state that its pass leaves
        self.hooks = [getattr(module, name) for module in modules for name in HOOKS]
        self.held = [*map(vars, modules), *map(vars, kinds)]
        self.before = [dict(held) for held in self.held]
        self.parts = [d.values() for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self.kept = list(chain.from_iterable(self.parts))  # so that nothing new gets their ids
        self.ids = list(map(id, self.kept))

    def holds(self, net: nn.Module) -> bool:
        """Whether all is the same, and nobody watches."""
        if (
            net is not self.net
            or list(map(type, self.modules)) != self.types
            or any(self.hooks)
            or torch_module._has_any_global_hook()
        ):
            return False
        try:
            return list(map(id, chain.from_iterable(self.parts))) == self.ids and self.held == self.before
        except (RuntimeError, TypeError, ValueError):  # another tensor as an attribute cannot be compared
            return False


class Call(NamedTuple):
    function: Callable
    args: Sequence
    kwargs: dict
    read: dict[int, int]  # which argument is the value of which place
    made: int | None  # the place of what is returned
    always: bool = False  # also if nobody reads what is returned


class Native:
    """A call of the compiled library with the addresses of other tensors."""

    def __init__(self, function: Callable, layers: list[ctypes.Array], threads: int, kept: object):
        self.function, self.layers, self.threads, self.kept = function, layers, threads, kept
        self.words: list[tuple[ctypes.Array, int]] = []  # where the addresses go

    def __call__(self, *tensors: Tensor) -> None:
        for (layer, word), tensor in zip(self.words, tensors, strict=True):
            layer[word] = tensor.data_ptr()
        self.function(*self.layers, self.threads)


class Recorder(TorchDispatchMode):
    """Notes what is called inside; `right` becomes False where that cannot be called again."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.values: list[Tensor] = []  # all are kept: no two have the same address or id
        self.places: dict[int, int] = {}  # id of a value -> its place
        self.addresses: dict[int, int] = {}  # where a value begins -> the place of the first that does
        self.calls: list[Call] = []
        self.right = True
        self.note(x)

    def note(self, value: Tensor) -> int:
        """The place of a value."""
        if id(value) not in self.places:
            self.places[id(value)] = len(self.values)
            self.addresses.setdefault(value.data_ptr(), len(self.values))
            self.values.append(value)
        return self.places[id(value)]

    def dispatched(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if isinstance(made, torch.dtype | int):  # a question about types
            return made
        read = {i: self.places[id(a)] for i, a in enumerate(args) if id(a) in self.places}
        others = [a for i, a in enumerate(args) if i not in read and isinstance(a, Tensor)]
        inner = [*kwargs.values(), *chain.from_iterable(a for a in args if isinstance(a, list | tuple))]
        self.right &= all(type(a) in (Tensor, nn.Parameter) for a in others)
        self.right &= type(made) is Tensor and not any(isinstance(a, Tensor) for a in inner)
        if not self.right:
            return made
        if func is DETACH and read:  # the same numbers
            self.places[id(made)] = read[0]
            self.values.append(made)
        elif func in EMPTY:
            size = made.shape, made.stride()
            self.calls.append(Call(torch.empty_strided, size, {"dtype": made.dtype}, {}, self.note(made)))
        else:
            rest = [None if i in read else a for i, a in enumerate(args)]
            function, always = FASTER.get(func, func), func._schema.is_mutable
            self.calls.append(Call(function, rest, kwargs, read, self.note(made), always))
        return made

    def native(self, function: Callable, layers: Sequence[tuple], threads: int, kept: object) -> None:
        """What `native.watch` is told."""
        copies = [(ctypes.c_size_t * (len(layer) // 8)).from_buffer_copy(layer) for layer, _ in layers]
        again, read = Native(function, copies, threads, kept), {}
        for layer, (_, pointers) in zip(copies, layers, strict=True):
            for word in pointers:
                if layer[word] in self.addresses:
                    read[len(again.words)] = self.addresses[layer[word]]
                    again.words.append((layer, word))
        self.calls.append(Call(again, [None] * len(read), {}, read, None, True))


Recorder.__torch_dispatch__ = Recorder.dispatched  # set here, as torch would load its compiler for one in the class


class Plan:
    """What was recorded, as far as the result depends on it. Called with an x of the same shape and layout."""

    def __init__(self, recorded: Recorder, result: Tensor):
        self.size, self.result = len(recorded.values), recorded.places[id(result)]
        self.calls, needed = [], {self.result}
        for function, args, kwargs, read, made, always in reversed(recorded.calls):
            if always or made in needed:
                last = [place for place in set(read.values()) if place not in needed]  # read here for the last time
                needed.update(last)
                made = self.size if made is None else made
                self.calls.append((function, list(args), kwargs, list(read.items()), made, last))
        self.calls.reverse()

    def __call__(self, x: Tensor) -> Tensor:
        values = [x] + [None] * self.size
        for function, args, kwargs, read, made, last in self.calls:
            args = args[:]
            for i, place in read:
                args[i] = values[place]
            values[made] = function(*args, **kwargs)
            for place in last:
                values[place] = None
        return values[self.result]


class Plans:
    """The passes of a packed network of `empf.models`: by a plan where there is one, else through its modules."""

    def __init__(self):
        self.of: dict[tuple, Snapshot] = {}

    def __call__(self, model, x: Tensor, steps: int | None) -> Tensor:
        """`model.net(x, steps)` from the present state on. The second of two passes that are alike makes a plan."""
        x = channels_last(x)
        key = kind(model, x, steps)
        if key is None:
            return plain(model.net(x, steps))
        past = self.of.pop(key, None)
        if past is None or not past.holds(model.net):
            past, logits = Snapshot(model.net), plain(model.net(x, steps))
        elif past.plan is not None:
            logits = past.plan(x)
            model.restore(past.after)
        elif past.known:
            logits = record(past, model, x, steps)
        else:
            logits = plain(model.net(x, steps))
        self.of[key] = past
        if len(self.of) > MOST:
            del self.of[next(iter(self.of))]
        return logits


def kind(model, x: Tensor, steps: int | None) -> tuple | None:
    """What a plan depends on besides the network; None where there can be none."""
    if not native.ready() or backend("cpu") != "torch" or torch.is_autocast_enabled("cpu"):
        return None
    if model.numbers(x) > LARGEST:
        return None
    of_its_type = type(x) is Tensor and type(steps) in (int, type(None))
    if not of_its_type or not x.is_cpu or x.dtype != torch.float32 or not x.numel():
        return None
    if any(getattr(torch._C, f"_len_torch_{kind}_stack", lambda: 1)() for kind in ("dispatch", "function")):
        return None
    states = list(map(vars, model.stateful()))
    if any(state["t"] or state.get("v") is not None for state in states):
        return None
    return x.shape, x.stride(), steps, torch.get_num_threads(), *(state.get("bf16") for state in states)


def record(past: Snapshot, model, x: Tensor, steps: int | None) -> Tensor:
    """A pass through the modules, and its plan in `past` if that gives the numbers of another pass too."""
    before, recorder = model.states(), Recorder(x)
    native.watch.tell = recorder.native
    try:
        with recorder:
            logits = plain(model.net(x, steps))
    finally:
        del native.watch.tell
    past.after = model.states()
    other = channels_last(torch.linspace(-1, 1, x.numel()).view(x.shape))
    past.known = recorder.right and other.stride() == x.stride()
    past.known &= all(state.get("v") is None for state in past.after)
    if past.known:
        plan = Plan(recorder, logits)
        found = plan(other)  # before the modules: where a call was not noted, memory holds what was computed of x
        model.restore(before)
        past.known = torch.equal(found, plain(model.net(other, steps)))
        past.plan = plan if past.known else None
        model.restore(past.after)
    return logits
