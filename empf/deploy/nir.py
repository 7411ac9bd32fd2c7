"""Export of networks of LIF neurons to NIR, the representation that other spiking libraries and chips read.

    m[t] = m[t-1] + dt/tau * (-m[t-1] + r * I[t])      leak = 1 - dt/tau, r = tau/dt: the same as leak * m[t-1] + I[t]

Needs the package nir: `pip install 'empf[nir]'`. Batch norms are folded into the synapses before them; binary, ternary
and grouped weights become dense. Several edges into a node are their sum. NIR has no word for a soft reset: each neuron
says it in its metadata, and who reads the graph has to set it. It has no floating-point spikes: its events are binary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from empf.evaluate import restored
from empf.layer import StepBatchNorm
from empf.machine import installed
from empf.models import SpikingNetwork
from empf.neuron import EMPFNeuron, LIFNeuron
from empf.online import reset

SAME = {"_to_copy", "clone", "copy_", "_reshape_copy"}  # views need no entry, they share the memory
PASSED = nn.Flatten | nn.Identity | nn.Dropout
KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.AvgPool2d, LIFNeuron, EMPFNeuron, StepBatchNorm, _BatchNorm)


def to_nir(net: nn.Module, x: Tensor, *, dt: float = 1e-4) -> Any:
    """The `nir.NIRGraph` of a network of LIF neurons, as it is in evaluation.

    x: what the network is called with, (T, N, ...), or (N, C, H, W) for a network of `empf.models`. dt: seconds of a
    time step, for the time constants. Raises ValueError where the package nir is missing, and for what has no node in
    NIR: floating-point spikes, channel attention, max-pooling, a batch norm without a synapse before it.

    >>> net = torch.nn.Sequential(empf.BinaryLinear(4, 3), empf.LIFNeuron(2))
    >>> sorted(empf.to_nir(net, torch.zeros(2, 1, 4)).nodes)
    ['0', '1', 'input', 'output']
    """
    if installed("nir") is None:
        raise ValueError("the export needs nir: pip install 'empf[nir]'")
    builtin = isinstance(net, SpikingNetwork)
    with restored(net), torch.no_grad(), Trace(net.eval(), dt) as trace:
        reset(net)
        x = x if builtin and x.dim() == 4 else x[:1]
        trace.begin(x, x.shape[1:] if builtin and x.dim() == 4 else x.shape[2:])
        y = net(x, steps=1) if builtin else net(x)
        return trace.graph(y)


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight (C_out, C_in, ...) of a convolution that does the same without groups."""
    whole = weight.new_zeros(len(weight), groups * weight.shape[1], *weight.shape[2:])
    for rows, columns, part in zip(whole.chunk(groups), range(groups), weight.chunk(groups), strict=True):
        rows[:, columns * part.shape[1] :][:, : part.shape[1]] = part
    return whole


class Trace(TorchDispatchMode):
    """Watches one step of a network: which node each tensor comes from, told by the memory it lies in."""

    def __init__(self, net: nn.Module, dt: float):
        super().__init__()
        import nir

        self.nir, self.dt = nir, dt
        self.nodes: dict[str, Any] = {}
        self.shapes: dict[str, tuple] = {}  # of one sample
        self.edges: list[tuple[str, str]] = []
        self.found: dict[int, tuple[Tensor, tuple[str, ...] | str]] = {}  # sources, or why there are none
        self.handles = [
            m.register_forward_hook(lambda m, args, y, name=name: self.called(name, m, args[0], y))
            for name, m in net.named_modules() if not any(m.children()) and not isinstance(m, PASSED)
        ]  # fmt: skip

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def begin(self, x: Tensor, shape: tuple) -> None:
        self.nodes["input"] = self.nir.Input({"input": torch.tensor(shape).numpy()})
        self.shapes["input"] = tuple(shape)
        self.mark(x, ("input",))

    def mark(self, x: Tensor, sources: tuple[str, ...] | str) -> None:
        self.found[x.untyped_storage()._cdata] = (x, sources)

    def sources(self, x: Tensor) -> tuple[str, ...] | str | None:
        return self.found.get(x.untyped_storage()._cdata, (x, None))[1]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        y = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[1]
        if not isinstance(y, Tensor):
            return y
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(y.untyped_storage()._cdata == t.untyped_storage()._cdata for t in inputs) and name != "add_":
            return y
        before = [self.sources(t) for t in inputs]
        if name == "mean" and isinstance(before[0], tuple) and list(args[1]) in ([-2, -1], [3, 4]):
            y = self.pooled(args[0], y, before[0])
        elif name in ("add", "add_") and all(isinstance(s, tuple) for s in before):
            self.mark(y, sum(before, ()))
        elif name in SAME or (name in ("stack", "cat") and len(before) == 1):
            self.mark(y, before[-1] or name)
        else:
            self.mark(y, name)
        return y

    def pooled(self, x: Tensor, y: Tensor, sources: tuple[str, ...]) -> Tensor:
        """The mean of an image, as average pooling."""
        name, size = f"mean_{len(self.nodes)}", torch.tensor(x.shape[-2:]).numpy()
        self.add(name, self.nir.AvgPool2d(size, size, 0 * size), sources, (x.shape[-3], 1, 1))
        self.mark(y, (name,))
        return y

    def add(self, name: str, node: Any, sources: tuple[str, ...], shape: tuple) -> None:
        self.nodes[name], self.shapes[name] = node, tuple(shape)
        self.edges += [(source, name) for source in sources]

    def flat(self, sources: tuple[str, ...]) -> tuple[str, ...]:
        """The same as vectors."""
        found = []
        for source in sources:
            name, shape = source, self.shapes[source]
            if len(shape) > 1:
                name = f"{source}_flat"
                if name not in self.nodes:
                    kind = {"input": torch.tensor(shape).numpy()}
                    self.add(name, self.nir.Flatten(kind, 0, -1), (source,), (torch.Size(shape).numel(),))
            found.append(name)
        return tuple(found)

    def called(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """A module has made y of x."""
        nir, sources = self.nir, self.sources(x)
        if isinstance(module, EMPFNeuron):
            raise ValueError(
                f"{name} emits floating-point spikes, and the events of NIR are binary: use empf.LIFNeuron, or export "
                "the packed network with empf.export_onnx"
            )
        if not isinstance(module, KNOWN):
            raise ValueError(f"{name} is a {type(module).__name__}, for which NIR has no node: leave it out")
        if not isinstance(sources, tuple):
            raise ValueError(f"{name} is fed with the result of {sources or 'something'}, for which NIR has no node")
        if isinstance(module, StepBatchNorm | _BatchNorm):
            self.fold(name, module, sources)
            return self.mark(y, sources)
        numbers = lambda t: t.detach().cpu().numpy()  # noqa: E731
        if isinstance(module, LIFNeuron):
            node, shape = self.neuron(name, module, y.shape[2:]), y.shape[2:]
        elif isinstance(module, nn.AvgPool2d):
            pair = lambda v: torch.tensor([v, v] if isinstance(v, int) else v).numpy()  # noqa: E731
            node, shape = nir.AvgPool2d(*map(pair, (module.kernel_size, module.stride, module.padding))), y.shape[-3:]
        else:
            weight = module.effective_weight() if hasattr(module, "effective_weight") else module.weight
            bias = torch.zeros(len(weight)) if module.bias is None else module.bias
            if isinstance(module, nn.Linear):
                node, shape, sources = nir.Affine(numbers(weight), numbers(bias)), y.shape[-1:], self.flat(sources)
            else:
                one, dims = isinstance(module, nn.Conv1d), weight.dim() - 2
                place = (module.stride, module.padding, module.dilation)
                place = [p[0] if one else p for p in place]
                size = x.shape[-1] if one else tuple(x.shape[-2:])
                kind = nir.Conv1d if one else nir.Conv2d
                node = kind(size, numbers(ungrouped(weight, module.groups)), *place, 1, numbers(bias))
                shape = y.shape[-1 - dims :]
        self.add(name, node, sources, shape)
        self.mark(y, (name,))

    def fold(self, name: str, norm: nn.Module, sources: tuple[str, ...]) -> None:
        """Take a batch norm into the synapse before it."""
        node = self.nodes[sources[0]]
        if len(sources) > 1 or not hasattr(node, "bias") or any(source == sources[0] for source, _ in self.edges):
            raise ValueError(f"{name} does not follow a synapse of its own, and NIR has no node for a batch norm")
        gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - gain * norm.running_mean
        node.weight = node.weight * gain.view(-1, *[1] * (node.weight.ndim - 1)).numpy()
        node.bias = node.bias * gain.numpy() + shift.numpy()

    def neuron(self, name: str, lif: LIFNeuron, shape: tuple) -> Any:
        leak, threshold = float(lif.leak[0]), float(lif.threshold[0])
        if not (0 <= leak < 1 and (lif.leak == leak).all() and (lif.threshold == threshold).all()):
            raise ValueError(
                f"{name} needs a leak of 0 to below 1 and a threshold, the same in all steps, got {lif.leak}"
            )
        full = lambda value: torch.full(tuple(shape), value, dtype=torch.float64).numpy()  # noqa: E731
        tau = 1 / (1 - leak)
        metadata = {"reset": "subtract"}
        return self.nir.LIF(full(tau * self.dt), full(tau), full(0.0), full(threshold), full(0.0), metadata=metadata)

    def graph(self, y: Tensor) -> Any:
        sources = self.sources(y)
        if not isinstance(sources, tuple):
            raise ValueError(f"the network returns the result of {sources or 'something'}, for which NIR has no node")
        self.add("output", self.nir.Output({"output": torch.tensor(self.shapes[sources[0]]).numpy()}), sources, ())
        nodes = {name.replace(".", "_"): node for name, node in self.nodes.items()}
        return self.nir.NIRGraph(nodes, [tuple(n.replace(".", "_") for n in edge) for edge in self.edges])
