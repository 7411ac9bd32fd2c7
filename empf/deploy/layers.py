"""The parts of a packed network: synapses with packed weights, folded norms, neurons with effective parameters.

BN behind a synapse       y = a*g * conv(x, sign) + (b - mean*g)     g = gamma / sqrt(var + eps), a = scale
Mem-BN                    mh = gain*(leak*v + I) + shift             gain = alpha + beta*g, shift = beta*(b - mean*g)
n-bit spikes              uint8 codes between the layers; their sums are exact integers

Each stands in the place of the part it was made of and is called like it, whatever network is around it; made from one
on the meta device, it has the names and shapes of its buffers only, which a file then fills. What passes between them
is not computed before it is read, see lazy.py: so a norm folds itself into the product before it, and on a GPU a
convolution runs together with the T steps of the neurons behind it. On a CPU each layer is one convolution over all
steps: by lookup with binary weights, where the processor can, else with weights that are unpacked once.
arXiv 2410.07547, sec. 4
"""

import copy
import math
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from empf.deploy.filters import Filter, Summands
from empf.deploy.lazy import Product, Spikes, plain
from empf.kernels import backend, native
from empf.kernels.conv_neuron import binary_conv2d_neuron
from empf.kernels.lookup import Lookup
from empf.kernels.neuron import ACTIVATIONS, NeuronParams, neuron_steps, neuron_update
from empf.kernels.neuron_cpu import fire_steps, per_channel, rounded
from empf.kernels.pack import pack as pack_weight
from empf.kernels.pack import weights_per_word
from empf.kernels.steps import empty_like_steps, stack_steps
from empf.layer import Current, StepBatchNorm, plus
from empf.neuron import EMPFNeuron, LIFNeuron, StatefulNeuron, lif_step
from empf.synapse import QuantizedWeight, quantize_weight


class PackedPart(nn.Module):
    """What the packed parts share: what is derived from their buffers is dropped when these move or are loaded."""

    def forget(self) -> None:
        """Drop what was derived from the buffers."""

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    @torch.no_grad()
    def fill(self, **values: Tensor | None) -> None:
        """Copy values into the buffers of these names, where there are both."""
        for name, value in values.items():
            if getattr(self, name) is not None and not value.is_meta:
                getattr(self, name).copy_(value)


class PackedNeuron(StatefulNeuron, PackedPart):
    """Neuron layer with effective parameters: current (k, N, C, ...) -> spikes; n-bit ones are `Spikes`.

    `spike_step` is None where spikes are floating point; binary LIF spikes are codes of step 1.
    """

    def __init__(self, neuron: EMPFNeuron | LIFNeuron):
        super().__init__(neuron.T)
        self.lif = isinstance(neuron, LIFNeuron)
        self.parallel = not self.lif and neuron.parallel
        self.activation = "relu" if self.lif else neuron.activation
        self.spike_bits = 1 if self.lif else neuron.spike_bits
        self.spike_step = 1.0 if self.lif else None if self.spike_bits is None else neuron.spike_step
        self.keeps = False  # whether somebody else reads the current, which is then written as well
        self.bf16 = False  # whether spikes are put out in bf16
        gain, shift = (None, None) if self.lif else neuron.folded_norm()
        values = dict(leak=None if self.parallel else neuron.leak, threshold=neuron.threshold, gain=gain, shift=shift)
        for name, value in values.items():
            self.register_buffer(name, None if value is None else torch.empty_like(value.detach(), dtype=torch.float32))
        self.per_channel = any(value is not None and value.dim() == 2 for value in values.values())
        self.fill(**values)
        self.forget()

    def __setattr__(self, name: str, value) -> None:
        """torch asks of each attribute whether it is a part of the module; the state is none, and changes often."""
        if name in ("v", "t"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        kind = "lif" if self.lif else "parallel" if self.parallel else "vanilla"
        bits = "" if self.spike_bits is None else f", spike_bits={self.spike_bits}, spike_step={self.spike_step:g}"
        return f"T={self.T}, {kind}, activation={self.activation}{bits}"

    @property
    def fusible(self) -> bool:
        """Whether the kernels know this neuron."""
        return self.activation == "relu" and not self.lif

    def forget(self) -> None:
        self._laid_out: dict[tuple, list] = {}

    def __getstate__(self) -> dict:  # copies make their own
        return {**super().__getstate__(), "_laid_out": {}}

    def parameters_of(self, steps: slice) -> tuple[Tensor | None, ...]:
        """leak, threshold, gain, shift of these steps."""
        found = (self.leak, self.threshold, self.gain, self.shift)
        return tuple(None if p is None else self.of_steps(p, steps) for p in found)

    def laid_out(self, steps: slice, dims: int | None, channels: int = 1) -> list:
        """What `fire_steps` wants of these steps with `dims` axes, or native.fire (None); kept for the next call."""
        if self.T is None:  # all steps have the same
            steps = slice(0, steps.stop - steps.start)
        key = (steps.start, steps.stop, dims, channels)
        if key not in self._laid_out:
            found = self.parameters_of(steps)
            if dims is None:
                self._laid_out[key] = native.table(found, steps.stop - steps.start, channels)
            else:
                rows = zip(*(repeat(None) if p is None else p for p in (*found, None, None)), strict=False)
                self._laid_out[key] = [tuple(None if p is None else per_channel(p, dims) for p in row) for row in rows]
        return self._laid_out[key]

    def forward(self, current: Tensor) -> Tensor:
        if not self.fusible or backend(self.threshold.device) == "torch":
            summands = self.summands(current)
            if summands is None:
                x = plain(current)
                spikes, v = self.plain_steps(x, steps := self.advance(x))
            else:
                spikes, v = self.with_summands(current, summands, steps := self.advance(current))
        else:
            steps = self.advance(current)
            spikes, v = self.on_kernels(current, steps)
        self.v = v if self.stays(steps) else None
        if self.spike_bits is not None:
            return Spikes(spikes, self.spike_step, 2**self.spike_bits - 1)
        return Spikes(spikes, 1.0, math.inf) if self.bf16 and spikes.dtype == torch.bfloat16 else spikes

    def stays(self, steps: slice) -> bool:
        """Whether somebody needs the potential after these steps: after the last one nobody does."""
        return not self.parallel and steps.stop != self.T

    def on_kernels(self, current: Tensor, steps: slice) -> tuple[Tensor, Tensor]:
        leak, threshold, gain, shift = self.parameters_of(steps)
        keywords = {"gain": gain, "shift": shift, "parallel": self.parallel, "return_v": self.stays(steps)}
        if self.spike_bits is not None:
            keywords |= {"bits": self.spike_bits, "step": self.spike_step, "codes": True}
        if isinstance(current, Product) and current.taken_by_neuron:
            return self.with_convolution(current, leak, threshold, keywords)
        return neuron_update(plain(current), self.v, leak, threshold, **keywords)

    def with_convolution(self, product: Product, leak, threshold, keywords: dict) -> tuple[Tensor, Tensor]:
        """The product, what is added to it and the steps of the neuron in one launch."""
        product.check()
        kernel = product.synapse.filter(product.norm)
        x = product.x.unflatten(0, product.lead)
        outputs = binary_conv2d_neuron(
            x, kernel.weight, self.v, leak, threshold, bias=kernel.bias, residual=plain(product.residual),
            in_step=product.step, return_current=self.keeps, **product.synapse.place, **keywords,
        )  # fmt: skip
        if self.keeps:
            product.settle(outputs[2])
        else:
            product.neuron = self
        return outputs[:2]

    def summands(self, current: Tensor) -> Summands | None:
        """What the compiled neuron adds up to the current; None where it finds it added up, or is not there."""
        ready = self.fusible and isinstance(current, Product) and current.taken_by_neuron and native.ready()
        return current.synapse.filter(current.norm).summands(current) if ready else None

    def with_summands(self, product: Product, summands: Summands, steps: slice) -> tuple[Tensor, Tensor | None]:
        """(spikes or codes, v); what is added to the product is added on the way."""
        y, norm, residual = summands
        total, out = None, None
        looked_up = not isinstance(y, Tensor)
        if looked_up:
            out = y.empty(product.lead, self.spike_type)
        if norm is None and residual is None and not looked_up:
            product.settle(y)
        elif self.keeps:
            total = y.empty(product.lead) if looked_up else native.empty_like_current(y, torch.float32)
        else:
            product.neuron = self
        channels = 1 if norm is None else y.shape[2]
        found = self.compiled(y, steps, channels, total=total, out=out, **summands.added())
        if total is not None:
            product.settle(total)
        return found

    @property
    def spike_type(self) -> torch.dtype:
        return torch.uint8 if self.spike_bits is not None else torch.bfloat16 if self.bf16 else torch.float32

    def compiled(
        self, x: Tensor | Lookup, steps: slice, channels: int = 1, out: Tensor | None = None, **added
    ) -> tuple[Tensor, Tensor | None]:
        """(spikes or codes, v) by `native.fire`."""
        return native.fire(
            x, self.v, self.laid_out(steps, None, channels), potential=self.stays(steps), bits=self.spike_bits,
            step=self.spike_step, out=native.empty_like_current(x, self.spike_type) if out is None else out, **added,
        )  # fmt: skip

    def plain_steps(self, x: Tensor, steps: slice) -> tuple[Tensor, Tensor | None]:
        """(spikes or codes, v) of (k, N, C, ...) without kernels."""
        dtype, x = x.dtype, x if x.dtype == torch.float32 else x.float()
        if self.fusible and native.runs(x, self.per_channel):
            spikes, v = self.compiled(x, steps)
            return spikes if self.bf16 or self.spike_bits is not None else spikes.to(dtype), v
        # in an exported graph, writing into slices would become a scatter per step
        if self.fusible and not torch.compiler.is_exporting():
            v, spikes = None if self.parallel else self.v, empty_like_steps(x, torch.float32)
            v = fire_steps(x, v, self.laid_out(steps, x.dim() - 1), spikes, potential=not self.parallel)
        elif self.lif:
            v, spikes = self.v, []
            for i, *own in zip(x, *self.parameters_of(steps)[:2], strict=True):
                s, v = lif_step(i, v, *own)
                spikes.append(s)
            spikes = stack_steps(spikes, x)
        else:
            leak, threshold, gain, shift = self.parameters_of(steps)
            p = NeuronParams(leak, threshold, gain=gain, shift=shift, parallel=self.parallel)
            spikes, v = neuron_steps(x, self.v, p, activation=ACTIVATIONS[self.activation])
            spikes = stack_steps(spikes, x)
        if self.spike_bits is None:
            return spikes.to(dtype), v
        return rounded(spikes, self.spike_bits, self.spike_step), v


class PackedSynapse(PackedPart):
    """Convolution or linear layer with packed weights, called like the layer it stands for; x floats or `Spikes`.

    A convolution also takes (k, N, C, ...) with a time axis.
    """

    takes_steps = True

    def __init__(self, layer: QuantizedWeight):
        super().__init__()
        self.shape, self.kind = tuple(layer.weight.shape), layer.kind
        self.dims = len(self.shape) - 2  # of the positions that the weights slide over; 0: a linear layer
        self.place: dict[str, int] = {}  # keywords of `binary_conv2d`
        if self.dims:
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
            self.groups = layer.groups
            self.place = {"stride": self.stride[0], "padding": self.padding[0]}
        square = self.dims == 2 and all(len(set(pair)) == 1 for pair in (self.stride, self.padding, self.shape[2:]))
        # a convolution that kernels and laid out weights know, also together with a neuron behind it
        self.plane = square and self.groups == 1 and set(self.dilation) == {1}
        n, words = self.shape[0], -(-layer.weight[0].numel() // weights_per_word(self.kind))
        self.register_buffer("bits", torch.empty((n, words), dtype=torch.int32))
        self.register_buffer("scale", torch.empty(n))
        self.register_buffer("bias", None if layer.bias is None else torch.empty(n))
        if not layer.weight.is_meta:
            effective = quantize_weight(layer.weight.detach().float(), layer.kind, layer.granularity)
            self.fill(bits=pack_weight(effective, layer.kind).bits, scale=effective.flatten(1).abs().amax(1))
            self.fill(bias=layer.bias)
        self.forget()

    def forget(self) -> None:
        self._filters: dict[PackedNorm | None, Filter] = {}
        self._sizes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def __getstate__(self) -> dict:  # copies derive their own
        return {**super().__getstate__(), "_filters": {}, "_sizes": {}}

    def extra_repr(self) -> str:
        place = "" if not self.dims else f", stride={self.stride}, padding={self.padding}"
        if self.dims and (self.groups > 1 or set(self.dilation) != {1}):
            place += f", dilation={self.dilation}, groups={self.groups}"
        return f"{'x'.join(map(str, self.shape))}, kind={self.kind}{place}"

    def filter(self, norm: "PackedNorm | None") -> Filter:
        """What is computed with; kept for the next call."""
        if norm not in self._filters or norm is not None and self._filters[norm].norm_version != norm.version:
            self._filters[norm] = Filter(self, norm)
        return self._filters[norm]

    def unpack(self) -> None:
        """Unpack the weights that the calls so far have asked for, as a graph of ordinary operations holds them."""
        for made in self._filters.values():
            made.dense(torch.float32), made.dense(torch.uint8)

    def effective_weight(self) -> Tensor:
        """The dense weight."""
        return self.filter(None).unpacked(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        step, top = None, math.inf
        if isinstance(x, Spikes) and x.unchanged:
            fast = x.top < 128 and backend(x.codes.device) != "torch"  # tensor cores read int8 faster than uint8
            if not x.in_bf16 or self.plane:
                x, step, top = x.codes.view(torch.int8) if fast else x.codes, x.step, x.top
        x = plain(x)
        shape = x.shape
        lead = tuple(shape[: len(shape) - self.dims - 1])
        if not lead or self.dims and len(lead) > 2:
            raise ValueError(f"a packed layer of weights {self.shape} cannot read an input of shape {tuple(shape)}")
        x = x if len(lead) == 1 else x.flatten(0, len(lead) - 1)
        size = x.shape[1:]
        if size not in self._sizes:
            self._sizes[size] = self.output_size(size[1:])
        product = Product(self, x, step, top, lead, self._sizes[size])
        # what torch.compile traces is a graph of tensors
        return plain(product) if torch.compiler.is_dynamo_compiling() else product

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(C, ...) of the output for an input (C, *size)."""
        if not self.dims:
            return self.shape[:1]
        places = zip(size, self.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return self.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in places)


class PackedNorm(PackedPart):
    """Batch norm with its running statistics: gain * x + shift for each channel of (k, N, C, ...) or (N, C, ...)."""

    def __init__(self, norm: StepBatchNorm | _BatchNorm):
        super().__init__()
        self.lead = 2 if isinstance(norm, StepBatchNorm) else 1  # axes before the channels
        self.version = 0
        self.register_buffer("gain", torch.empty_like(norm.running_mean, dtype=torch.float32))
        self.register_buffer("shift", torch.empty_like(norm.running_mean, dtype=torch.float32))
        gain = (norm.running_var.detach().double() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else norm.weight.detach().double() * gain
        bias = 0.0 if norm.bias is None else norm.bias.detach().double()
        self.fill(gain=gain, shift=bias - norm.running_mean.detach().double() * gain)

    def extra_repr(self) -> str:
        return f"{len(self.gain)}"

    def forget(self) -> None:
        self.version += 1

    def current(self, y: Tensor, rest: Tensor | Current | None = None, **training) -> Current:
        """As that of `StepBatchNorm`; nothing is added up before the value is read."""
        rest = None if rest is None else Current.of(rest).value
        if isinstance(y, Product) and y.bare and len(y.lead) == self.lead:
            return Current(y.normalised(self, rest))
        return Current(plus(self(y), rest))

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        if isinstance(x, Product) and x.bare and len(x.lead) == self.lead:
            return x.normalised(self)
        x, like = plain(x), (-1, *[1] * (x.dim() - self.lead - 1))
        image = x.is_cpu and len(like) == 3 and not torch.compiler.is_compiling()
        if image and x.shape[: self.lead].numel() == 1:  # of one, torch does not keep that layout
            x = channels_last(x)
        return torch.addcmul(self.shift.to(x.dtype).view(like), x, self.gain.to(x.dtype).view(like))


def channels_last(x: Tensor) -> Tensor:
    """(..., C, H, W) in the fast layout of all that follows."""
    folded = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    return folded.view(x.shape)


def packed_part(module: nn.Module, name: str) -> PackedPart | None:
    """The packed counterpart of a synapse, norm or neuron; None for anything else, also with a forward of its own.

    Raises ValueError for what a packed convolution cannot do.
    """
    home = type(module).forward.__module__
    if isinstance(module, _BatchNorm):
        known = home.startswith("torch.nn.") and module.running_mean is not None
        return small_part(PackedNorm, module) if known else None
    if not home.startswith("empf."):
        return None
    if isinstance(module, QuantizedWeight):
        if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
            raise ValueError(f"{name} cannot be packed: give its convolution zeros as padding, and their number")
        return PackedSynapse(module)
    if isinstance(module, EMPFNeuron | LIFNeuron):
        return small_part(PackedNeuron, module)
    return small_part(PackedNorm, module) if isinstance(module, StepBatchNorm) else None


def small_part(kind: type[PackedPart], module: nn.Module) -> PackedPart:
    """`kind(module)`. On the meta device torch would load its compiler for the shapes of sums, which takes a second."""
    if not any(tensor.is_meta for tensor in module.state_dict().values()):
        return kind(module)
    numbers = copy.deepcopy(module)._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))
    return kind(numbers).to("meta")


def packed_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which every part that has a packed counterpart is replaced by it, wherever it is held."""
    made = {}
    for name, module in model.named_modules():
        part = packed_part(module, name)
        if part is not None:
            made[id(module)] = part
    return copy.deepcopy(model, made).requires_grad_(False).float().eval()


@torch.no_grad()
def absorb(net: nn.Module) -> None:
    """In the networks of `empf.models`, the scale of a `conv` goes into the `bn` beside it, and need not be stored."""
    for module in net.modules():
        conv, bn = module._modules.get("conv"), module._modules.get("bn")
        if isinstance(conv, PackedSynapse) and isinstance(bn, PackedNorm) and not bn.gain.is_meta:
            bn.gain.mul_(conv.scale)
            conv.scale.fill_(1)
