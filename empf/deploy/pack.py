"""Deployment: a trained network with its normalisation folded and its weights packed, in one file.

`pack(model)` -> PackedModel: the logits of `model.eval()` up to rounding, without the training machinery.
`packed.save(path)`, `load_packed(path)`: the file, see packed_file.py. `unpack(packed)`: back to a model.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from empf.deploy import file as packed_file
from empf.deploy.layers import PackedLayer, PackedNeuron, PackedResNet, PackedStem, PackedSynapse, PackedVGG, Span
from empf.deploy.origin import Origin, fingerprint
from empf.files import write_atomic
from empf.kernels.pack import signs
from empf.models import ModelConfig, ResNet, SpikingConv, SpikingNetwork, StepBatchNorm, build
from empf.online import reset

AT_ONCE = 2**21  # numbers in the current behind the stem for each thread, of all images and steps that go together


class PackedModel(nn.Module):
    """A network for inference: called like the model, same logits (T, N, classes), same errors.

    `packed(x)`: images (N, C, H, W) or events (T, N, C, H, W), all T steps; `packed(x, steps=k)`: the next k steps;
    `packed.step(frame)`: one frame (N, C, H, W) of a stream -> logits (N, classes) of this step. `packed.reset()` goes
    back to time 0; it is needed before a new batch. x is normalised as `origin` says, or counts of events. Activations
    have the type of x: on a GPU, bfloat16 x is fastest; the logits are float32.
    Raises ValueError for another shape, integers, steps past T, or another batch size without a reset.

    `config`: the `ModelConfig`; `origin`: data set, class names, normalisation and accuracy, where they are known.
    Make it with `pack` or `load_packed`.
    """

    _check_input = SpikingNetwork._check_input  # the same rules and sentences

    def __init__(self, model: SpikingNetwork, origin: Origin | None = None):
        super().__init__()
        self.config, self.origin, self.packed_as = model.config, origin or Origin(), ""
        slots = count()
        self.stem = PackedStem(model.stem)
        self.body = (PackedResNet if isinstance(model, ResNet) else PackedVGG)(model, slots)
        self.neurons = next(slots)
        self.requires_grad_(False).float().eval()
        self.reset()

    def reset(self) -> None:
        """Back to time 0: v = 0."""
        self.t = 0
        self.v: list[Tensor | None] = [None] * self.neurons

    @torch.inference_mode()
    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        steps = self.config.T - self.t if steps is None else steps
        if not x.is_floating_point():  # bytes between the layers are codes of spikes
            raise ValueError(
                f"the input must be normalised floating-point numbers, got {x.dtype}: call x.float() first"
            )
        x = self._check_input(x, steps, 0)
        for v in self.v:
            if v is not None and len(v) != x.shape[1]:
                raise ValueError(
                    f"the membrane potential has shape {tuple(v.shape)} but the input "
                    f"{(x.shape[1], *v.shape[1:])}: call empf.reset(model) before a batch of another size"
                )
        stop, n = self.t + steps, x.shape[1]
        at_once, logits, spans = self.images_at_once(steps, x.device), [], []
        for first in range(0, max(n, 1), at_once):
            part = slice(first, first + at_once)
            v = [None if v is None else v[part] for v in self.v]
            spans.append(Span(slice(self.t, stop), v, last=stop == self.config.T))
            logits.append(self.compute(x[:, part], spans[-1]))
        if len(spans) > 1:  # the images side by side again
            self.v = [None if vs[0] is None else torch.cat(vs) for vs in zip(*(s.v for s in spans), strict=True)]
        else:
            self.v = spans[0].v
        self.t = stop
        return torch.cat(logits, 1)

    def images_at_once(self, steps: int, device: torch.device) -> int:
        """On a CPU a large batch goes through the network in parts, so that each layer finds its input in the cache."""
        if device.type != "cpu":
            return sys.maxsize
        return max(1, AT_ONCE * torch.get_num_threads() // (steps * self.stem.numbers(self.config.image_size)))

    def compute(self, x: Tensor, span: Span) -> Tensor:
        """Logits of the steps of `span` without a look at the state of this object; x is (k, N, C, H, W), or k = 1."""
        current = self.stem(x)
        steps = span.steps.stop - span.steps.start
        return self.body(current.expand(steps, *current.shape[1:]), span)

    def step(self, frame: Tensor) -> Tensor:
        """The next step of a stream: frame (N, C, H, W) -> logits (N, classes) of this step alone.

        The prediction so far is the arg-max of their sum since `reset`. Raises ValueError as a call does, so also
        after T steps.
        """
        return self(frame, steps=1)[0]

    def packed_weights(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name of the packed bits in the state dict -> (shape of the dense weight, kind)."""
        found = {name: m for name, m in self.named_modules() if isinstance(m, PackedSynapse)}
        return {f"{name}.bits": (m.shape, m.kind) for name, m in found.items()}

    def stated_origin(self) -> Origin:
        """What is saved as the origin: without results where the weights were changed since packing or loading."""
        same = self.packed_as == fingerprint(self.state_dict())
        return self.origin if same else self.origin.without_results()

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes; see empf/deploy/file.py."""
        about = {"model": self.config.to_dict(), "origin": asdict(self.stated_origin())}
        return packed_file.to_bytes(packed_file.encode(self.state_dict(), self.packed_weights()), about)

    def save(self, path: str | Path) -> None:
        """Write the one file, atomically; folders that are missing are made, a file of that name is replaced.

        Raises OSError with one sentence where the disk refuses.
        """
        write_atomic(Path(path), self.to_bytes())


def pack(model: SpikingNetwork) -> PackedModel:
    """Fold the normalisation, pack the weights: a network that returns the logits of `model.eval()` up to rounding.

        BN behind a convolution   y = g*a * conv(x, sign) + h       a = scale, g = gamma/sqrt(var + eps), h = b - mean*g
        Mem-BN                    mh = gain*(leak*v + I) + shift    for each step and channel (arXiv 2410.07547, sec. 4)

    The model is left as it is. Class names, normalisation and accuracy come with it if `empf.load` read it from a run
    (its weights are then the moving average, where the run kept one).
    Raises ValueError for full-precision weights, weights that are not finite, or a model that was altered so that its
    configuration no longer describes it.
    """
    if not isinstance(model, SpikingNetwork):
        raise ValueError(f"only networks of empf.models can be packed, got {type(model).__name__}")
    if model.config.weights == "full":
        raise ValueError(
            "the weights are full precision, there is nothing to pack: build the model with weights='binary'"
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: pack a model that was trained without divergence")
    with torch.device("meta"):
        described = build(model.config)
    if repr(model) != repr(described) or shapes(model) != shapes(described):
        raise ValueError("the model was altered and is no longer what its configuration says: it cannot be packed")
    packed = PackedModel(model, Origin.of(model)).to(model.head.weight.device)
    packed.packed_as = fingerprint(packed.state_dict())
    return packed


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def skeleton(config: ModelConfig, origin: Origin | None = None) -> PackedModel:
    """The packed network of a configuration with tensors on the meta device: only names and shapes."""
    with torch.device("meta"):
        return PackedModel(build(config), origin)


def load_packed(path: str | Path, device: str | torch.device = "cpu") -> PackedModel:
    """Read what `PackedModel.save` wrote: a network at time 0 on `device`. The name of the file may end in anything.

    Raises FileNotFoundError, or ValueError with one sentence for a file that is truncated, altered, of a newer version
    or something else altogether. Nothing of a file is used before its checksum was found right.
    """
    about, arrays = packed_file.read(path)
    try:
        model = skeleton(ModelConfig.from_dict(about["model"]), Origin.from_dict(about["origin"]))
        state = packed_file.decode(arrays, model.state_dict(), model.packed_weights())
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a network of this version ({error}): pack it again") from error
    model.load_state_dict(state, assign=True)
    model.packed_as = fingerprint(state)
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
    rounded = packed.config.spike_bits is not None or packed.config.neuron == "lif"
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
        checked = verify(model, load_packed(unchecked, model.head.weight.device), batches)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    return {"file": str(path), "file_mb": path.stat().st_size / 1e6, **checked}


@torch.no_grad()
def unpack(packed: PackedModel) -> SpikingNetwork:
    """A `SpikingNetwork` in eval mode with the logits of `packed`, for everything that looks into a model.

    The folded scales stand in the batch norms, and the latent weights are -1, 0 and 1.
    """
    model = build(packed.config)

    def norm(bn: StepBatchNorm, gain: Tensor | float, shift: Tensor) -> None:
        bn.running_mean.zero_()
        bn.running_var.fill_(1 - bn.eps)
        bn.weight.copy_(torch.as_tensor(gain).expand_as(bn.weight))
        bn.bias.copy_(shift)

    def synapse(layer: nn.Module, bn: StepBatchNorm | None, source: PackedSynapse) -> None:
        sign = signs(source.weight)
        if bn is None:  # its scale is positive, no norm was folded in
            layer.weight.copy_(sign * source.scale[:, None])
        else:
            layer.weight.copy_(sign)
            norm(bn, source.scale, source.bias)

    def neuron(target: nn.Module, source: PackedNeuron) -> None:
        if source.lif:
            return
        target.threshold_logit.copy_(source.threshold.logit())
        if not source.parallel:
            target.leak_logit.copy_(source.leak.logit())
        if source.gain is not None:
            target.alpha.zero_()
            target.beta.fill_(1)
            norm(target, source.gain, source.shift)

    def layer(target: SpikingConv, source: PackedLayer) -> None:
        neuron(target.neuron, source.neuron)
        synapse(target.conv, target.bn, source.synapse)
        if source.seca is not None:
            target.seca.conv.weight.copy_(source.seca)

    model.stem.conv.weight.copy_(packed.stem.weight)
    norm(model.stem.bn, 1.0, packed.stem.bias)
    model.head.load_state_dict(packed.body.head.state_dict())
    if isinstance(model, ResNet):
        for target, source in zip(model.blocks, packed.body.blocks, strict=True):
            layer(target.conv1, source.conv1)
            layer(target.conv2, source.conv2)
            if target.shortcut is not None:
                synapse(target.shortcut["conv"], target.shortcut["bn"], source.shortcut)
        if model.hidden is not None:
            neuron(model.hidden["before"], packed.body.before)
            synapse(model.hidden["linear"], None, packed.body.hidden)
            neuron(model.hidden["neuron"], packed.body.neuron)
    else:
        for target, source in zip(model.layers, packed.body.layers, strict=True):
            layer(target, source)
        neuron(model.neuron, packed.body.neuron)
    return model.eval()
