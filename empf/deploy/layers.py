"""The layers of a packed network: neurons with effective parameters, synapses with packed weights.

BN behind a convolution   y = a*g * conv(x, sign) + (b - mean*g)     g = gamma / sqrt(var + eps), a = scale
Mem-BN                    mh = gain*(leak*v + I) + shift             gain = alpha + beta*g, shift = beta*(b - mean*g)
n-bit spikes              uint8 codes between the layers; their sums are exact integers

Each is made from the layer of a `SpikingNetwork` that it stands for; from one on the meta device only the names and
shapes of its buffers are made, which a file then fills. On a GPU the packed kernels run, a convolution together with
the T steps of the neurons behind it. The CPU has no 1-bit product: there the weights are unpacked once, to int8 for
codes and to fp32 for floats, and each layer is one dense convolution over all steps.   arXiv 2410.07547, sec. 4
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.deploy import cpu_conv
from empf.deploy.cpu_conv import CodeConv, FloatConv
from empf.kernels import backend
from empf.kernels.conv import binary_conv2d
from empf.kernels.conv_neuron import binary_conv2d_neuron
from empf.kernels.matmul import binary_matmul
from empf.kernels.neuron import neuron_update
from empf.kernels.pack import PackedWeight, signs, weights_per_word
from empf.kernels.pack import pack as pack_weight
from empf.kernels.steps import stack_steps
from empf.models import VGGSNN, Block, ResNet, SpikingConv, Stem, StepBatchNorm
from empf.neuron import ACTIVATIONS, LIFNeuron, StatefulNeuron, per_channel
from empf.synapse import QuantizedWeight, quantize_weight


@dataclass
class Span:
    """The time steps of one call, and the membrane potentials of all neuron layers, which the layers replace."""

    steps: slice
    v: list[Tensor | None]
    last: bool  # no step follows: the potentials need not be kept

    def keep(self, slot: int, v: Tensor | None) -> None:
        self.v[slot] = None if self.last else v


class PackedNeuron(nn.Module):
    """Neuron layer with effective parameters: current (k, N, C, ...) -> spikes, or uint8 codes of value code * step.

    `step` is None where spikes are floating point; binary LIF spikes are codes of step 1.
    """

    def __init__(self, neuron: StatefulNeuron, slot: int):
        super().__init__()
        self.slot, self.lif = slot, isinstance(neuron, LIFNeuron)
        self.parallel = not self.lif and neuron.parallel
        self.activation = "relu" if self.lif else neuron.activation
        self.bits = 1 if self.lif else neuron.spike_bits
        self.step = 1.0 if self.lif else None if self.bits is None else neuron.spike_step
        folded = not self.lif and neuron.mem_bn
        threshold = neuron.threshold if self.lif else neuron.threshold_logit
        self.register_buffer("leak", None if self.parallel else torch.empty(threshold.shape))
        self.register_buffer("threshold", torch.empty(threshold.shape))
        self.register_buffer("gain", torch.empty(neuron.weight.shape) if folded else None)
        self.register_buffer("shift", torch.empty(neuron.weight.shape) if folded else None)
        if not threshold.is_meta:
            gain, shift = neuron.folded_norm() if folded else (None, None)
            copy_all(self, leak=neuron.leak, threshold=neuron.threshold, gain=gain, shift=shift)

    @property
    def fusible(self) -> bool:
        """Whether the kernels know this neuron."""
        return self.activation == "relu" and not self.lif

    def arguments(self, span: Span) -> tuple[tuple, dict]:
        """(v, leak, threshold) and the keywords of the kernels."""
        leak, threshold, gain, shift = (
            None if p is None else p[span.steps] for p in (self.leak, self.threshold, self.gain, self.shift)
        )
        code = {} if self.step is None else {"bits": self.bits, "step": self.step, "codes": True}
        return (span.v[self.slot], leak, threshold), {"gain": gain, "shift": shift, "parallel": self.parallel, **code}

    def forward(self, current: Tensor, span: Span) -> Tensor:
        (v, leak, threshold), keywords = self.arguments(span)
        if self.fusible and backend(current.device) != "torch":
            spikes, v = neuron_update(current, v, leak, threshold, **keywords)
        else:
            spikes, v = self.in_turn(current, v, leak, threshold, keywords["gain"], keywords["shift"])
        span.keep(self.slot, v)
        return spikes

    def values(self, spikes: Tensor) -> Tensor:
        """What `forward` returned, as floats."""
        return spikes if self.step is None else spikes * self.step

    def in_turn(self, current: Tensor, v: Tensor | None, leak, threshold, gain, shift) -> tuple[Tensor, Tensor | None]:
        """(spikes, v) step after step in plain torch, for every activation."""
        spikes = []
        for k, i in enumerate(current.float()):  # N C ...
            leak_k, threshold_k, gain_k, shift_k = (
                None if p is None else per_channel(p[k], i.dim()) for p in (leak, threshold, gain, shift)
            )
            m = i if v is None else torch.addcmul(i, v, leak_k)
            mh = m if gain is None else torch.addcmul(shift_k, m, gain_k)
            if self.fusible:
                after = torch.minimum(mh, threshold_k)
                s = mh - after
            elif self.lif:
                s = (mh >= threshold_k).float()
                after = mh - s * threshold_k
            else:
                s = ACTIVATIONS[self.activation](mh - threshold_k)
                after = mh - s
            if self.bits:  # `spike_codes`; the conversion to integers is its floor
                s = s.mul_(1 / self.step).add_(0.5).clamp_(0.0, 2**self.bits - 0.5)
            spikes.append(s.to(torch.uint8 if self.bits else current.dtype))
            v = None if self.parallel else after
        return stack_steps(spikes, current), v


class PackedSynapse(nn.Module):
    """Convolution or linear layer with packed weights and the batch norm behind it: spikes (k, N, ...) -> current."""

    def __init__(self, layer: QuantizedWeight, norm: StepBatchNorm | None = None):
        super().__init__()
        self.shape, self.kind = tuple(layer.weight.shape), layer.kind
        self.conv = {"stride": layer.stride[0], "padding": layer.padding[0]} if len(self.shape) == 4 else None
        n, words = self.shape[0], -(-layer.weight[0].numel() // weights_per_word(self.kind))
        self.register_buffer("bits", torch.empty((n, words), dtype=torch.int32))
        self.register_buffer("scale", torch.empty(n))
        self.register_buffer("bias", torch.empty(n))
        if not layer.weight.is_meta:
            effective = quantize_weight(layer.weight.detach().float(), layer.kind, layer.granularity)
            scale = effective.flatten(1).abs().amax(1).double()
            bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
            if norm is not None:
                gain, shift = fold(norm)
                scale, bias = scale * gain, bias * gain + shift
            copy_all(self, bits=pack_weight(effective, layer.kind).bits, scale=scale, bias=bias)
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from the buffers, because they move or change."""
        self._weight: PackedWeight | None = None
        self._dense: dict[torch.dtype, Tensor] = {}
        self._laid_out: dict[float | None, FloatConv | CodeConv] = {}

    def __getstate__(self) -> dict:  # copies derive their own
        return {**super().__getstate__(), "_weight": None, "_dense": {}, "_laid_out": {}}

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    @property
    def weight(self) -> PackedWeight:
        if self._weight is None:
            self._weight = PackedWeight(self.bits, self.scale, self.shape, self.kind)
        return self._weight

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The dense weights for x of this type: with the scale for floats, the signs alone for codes."""
        weight = signs(self.weight).float()
        if dtype != torch.uint8:
            weight = (weight * self.scale.view(-1, *[1] * (len(self.shape) - 1))).to(dtype)
        return weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`unpacked`, kept for the next call."""
        if dtype not in self._dense:
            self._dense[dtype] = self.unpacked(dtype)
        return self._dense[dtype]

    def laid_out(self, x: Tensor, step: float | None) -> FloatConv | CodeConv:
        """The convolution of x (N, C, H, W) on the CPU, with its weights; kept for the next call."""
        if step not in self._laid_out:
            if step is None:
                made = FloatConv(self.unpacked(x.dtype), **self.conv, x=x)
            else:
                made = CodeConv(signs(self.weight), self.scale, **self.conv, x=x, step=step)
            self._laid_out[step] = made
        return self._laid_out[step]

    def forward(self, x: Tensor, step: float | None = None) -> Tensor:
        folded = x.flatten(0, 1)  # (k N) ...
        if backend(x.device) != "torch":
            run = binary_matmul if self.conv is None else binary_conv2d
            y = run(folded, self.weight, bias=self.bias, step=step, **self.conv or {})
        elif self.conv and x.is_cpu and x.dtype in (torch.float32, torch.uint8) and cpu_conv.available():
            y = self.laid_out(folded, step)(folded, self.bias)
        else:
            product = F.linear if self.conv is None else F.conv2d
            weight = self.dense(x.dtype)
            if step is None:
                y = product(folded, weight, self.bias.to(x.dtype), **self.conv or {})
            else:  # integers below 2^24: exact in fp32
                sums = product(folded.float(), weight, **self.conv or {})
                like = (-1, *[1] * (sums.dim() - 2))
                y = torch.addcmul(self.bias.view(like), sums, (self.scale * step).view(like))
        return y.unflatten(0, x.shape[:2])


@torch.no_grad()
def copy_all(module: nn.Module, **values: Tensor | None) -> None:
    """Copy values into the buffers of these names, where there are both."""
    for name, value in values.items():
        if getattr(module, name) is not None:
            getattr(module, name).copy_(value)


def fold(norm: StepBatchNorm) -> tuple[Tensor, Tensor]:
    """Batch norm with its running statistics as y = gain * x + shift, each (C,) float64."""
    mean, var, weight, bias = (
        p.detach().double() for p in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    gain = weight / (var + norm.eps).sqrt()
    return gain, bias - mean * gain


class PackedLayer(nn.Module):
    """Neuron, 2x2 average pooling of its spikes, synapse and channel attention, as `SpikingConv`."""

    def __init__(self, layer: SpikingConv, slots: Iterator[int]):
        super().__init__()
        self.neuron = PackedNeuron(layer.neuron, next(slots))
        self.pool, self.skip = layer.pool is not None, layer.skip
        self.synapse = PackedSynapse(layer.conv, layer.bn)
        self.register_buffer("seca", None if layer.seca is None else layer.seca.conv.weight.detach().clone())  # 1 1 k

    def integers(self, spikes: Tensor) -> tuple[Tensor, float | None]:
        """What the synapses read of the neuron's output: (spikes or codes, value of code 1 or None)."""
        step = self.neuron.step
        if step is None:
            return (average(spikes) if self.pool else spikes), None
        top = (2**self.neuron.bits - 1) * (4 if self.pool else 1)
        if top > 255:  # the sum of four codes needs more than a byte
            return average(spikes.float() * step), None
        if self.pool:  # the sum of four codes is their average in units of step / 4
            h, w = (size // 2 * 2 for size in spikes.shape[-2:])
            spikes = sum(spikes[..., y:h:2, x:w:2] for y in (0, 1) for x in (0, 1))
            step = step / 4
        if top < 128 and backend(spikes.device) != "torch":
            spikes = spikes.view(torch.int8)  # which tensor cores read faster than uint8
        return spikes, step

    def into(
        self,
        neuron: PackedNeuron | None,
        spikes: Tensor,
        step: float | None,
        span: Span,
        *,
        before: Tensor | None = None,
        residual: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """From what `integers` returned to the output of the next `neuron` (None: there is none): (spikes, current).

        `before`: the current before these spikes, for SECA-II. `residual` is added to the current. Unless `keep`, the
        current may be None.
        """
        if neuron is not None and neuron.fusible and self.seca is None and backend(spikes.device) != "torch":
            args, keywords = neuron.arguments(span)
            outputs = binary_conv2d_neuron(
                spikes, self.synapse.weight, *args, bias=self.synapse.bias, residual=residual, in_step=step,
                return_current=keep, **self.synapse.conv, **keywords,
            )  # fmt: skip
            span.keep(neuron.slot, outputs[1])
            return outputs[0], outputs[2] if keep else None
        current = self.synapse(spikes, step)
        if self.seca is not None:
            current = attend(before + current if self.skip else current, self.seca)
        if residual is not None:
            current += residual
        return None if neuron is None else neuron(current, span), current


def attend(current: Tensor, weight: Tensor) -> Tensor:
    """`SECA`: each channel of (k, N, C, H, W) times its gate in (0, 1)."""
    mean = current.mean((-2, -1), dtype=torch.float32)  # k N C
    gate = F.conv1d(mean.flatten(0, 1).unsqueeze(1), weight, padding=weight.shape[-1] // 2).sigmoid()  # (k N) 1 C
    return current * gate.view(*mean.shape, 1, 1).to(current.dtype)


def average(spikes: Tensor) -> Tensor:
    """2x2 average pooling of (k, N, C, H, W)."""
    return F.avg_pool2d(spikes.flatten(0, 1), 2).unflatten(0, spikes.shape[:2])


class PackedBlock(nn.Module):
    """Residual block, as `Block`."""

    def __init__(self, block: Block, slots: Iterator[int]):
        super().__init__()
        self.conv1, self.conv2 = PackedLayer(block.conv1, slots), PackedLayer(block.conv2, slots)
        self.shortcut = block.shortcut and PackedSynapse(block.shortcut["conv"], block.shortcut["bn"])

    def forward(
        self, following: PackedNeuron | None, keep: bool, spikes: Tensor, current: Tensor, span: Span
    ) -> tuple[Tensor | None, Tensor | None]:
        """From the spikes of this block's first neuron to those of the `following` one: (spikes, current)."""
        spikes, step = self.conv1.integers(spikes)
        residual = current if self.shortcut is None else self.shortcut(spikes, step)
        spikes, middle = self.conv1.into(
            self.conv2.neuron, spikes, step, span, before=current, keep=self.conv1.seca is not None
        )
        return self.conv2.into(
            following, *self.conv2.integers(spikes), span, before=middle, residual=residual, keep=keep
        )


class PackedResNet(nn.Module):
    """What follows the stem of a `ResNet`: current (k, N, C, H, W) -> logits (k, N, classes)."""

    def __init__(self, model: ResNet, slots: Iterator[int]):
        super().__init__()
        self.blocks = nn.ModuleList(PackedBlock(block, slots) for block in model.blocks)
        self.before = model.hidden and PackedNeuron(model.hidden["before"], next(slots))
        self.hidden = model.hidden and PackedSynapse(model.hidden["linear"])
        self.neuron = model.hidden and PackedNeuron(model.hidden["neuron"], next(slots))
        self.head = copy.deepcopy(model.head)

    def forward(self, current: Tensor, span: Span) -> Tensor:
        spikes = self.blocks[0].conv1.neuron(current, span)
        for block, after in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            following = self.before if after is None else after.conv1.neuron
            # the next block needs the current as its shortcut, or for its attention; without a hidden layer, the head
            # needs the last one
            keep = self.before is None if after is None else after.shortcut is None or after.conv1.seca is not None
            spikes, current = block(following, keep, spikes, current, span)
        if self.before is None:
            return self.head(current.mean((-2, -1)).float())
        x = self.before.values(spikes).mean((-2, -1))  # k N C
        return self.head(self.neuron.values(self.neuron(self.hidden(x), span)).float())


class PackedVGG(nn.Module):
    """What follows the stem of a `VGGSNN`: current (k, N, C, H, W) -> logits (k, N, classes)."""

    def __init__(self, model: VGGSNN, slots: Iterator[int]):
        super().__init__()
        self.layers = nn.ModuleList(PackedLayer(layer, slots) for layer in model.layers)
        self.neuron = PackedNeuron(model.neuron, next(slots))
        self.head = copy.deepcopy(model.head)

    def forward(self, current: Tensor, span: Span) -> Tensor:
        spikes = self.layers[0].neuron(current, span)
        for layer, following in zip(
            self.layers, [*(after.neuron for after in self.layers[1:]), self.neuron], strict=True
        ):
            spikes, current = layer.into(
                following, *layer.integers(spikes), span, before=current, keep=layer.seca is not None
            )
        return self.head(average(self.neuron.values(spikes).float()).flatten(2))


class PackedStem(nn.Module):
    """Full-precision convolution with its batch norm folded, and max-pooling: (k, N, C, H, W) -> (k, N, C', H', W')."""

    def __init__(self, stem: Stem):
        super().__init__()
        self.register_buffer("weight", torch.empty(stem.conv.weight.shape))
        self.register_buffer("bias", torch.empty(len(stem.conv.weight)))
        if not stem.conv.weight.is_meta:
            gain, shift = fold(stem.bn)
            copy_all(self, weight=stem.conv.weight * gain[:, None, None, None], bias=shift)
        self.conv = {"stride": stem.conv.stride, "padding": stem.conv.padding}
        self.pool = stem.pool

    def numbers(self, size: int) -> int:
        """Numbers in the output for one image of this side."""
        for stride in (self.conv["stride"][0], 1 if self.pool is None else self.pool.stride):
            size = -(-size // stride)
        return len(self.bias) * size**2

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # the fast layout of all that follows
        y = F.conv2d(y, self.weight.to(x.dtype), self.bias.to(x.dtype), **self.conv)
        return (y if self.pool is None else self.pool(y)).unflatten(0, x.shape[:2])
