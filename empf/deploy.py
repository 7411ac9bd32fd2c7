"""Deployment: a trained network with its normalisation folded and its weights packed, in one file.

`pack(model)` -> PackedModel: the logits of `model.eval()` up to rounding, without the training machinery.
`packed.save(path)`, `load_packed(path)`: the file, see packed_file.py. `unpack(packed)`: back to a model.
"""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from empf import packed_file
from empf.hub import HubPacked, Origin
from empf.kernels.pack import signs
from empf.models import ModelConfig, ResNet, SpikingConv, SpikingNetwork, StepBatchNorm, build
from empf.online import reset
from empf.packed_layers import PackedLayer, PackedNeuron, PackedResNet, PackedStem, PackedSynapse, PackedVGG, Span
from empf.runs import write_atomic


class PackedModel(nn.Module, HubPacked):
    """A network for inference: called like the model, same logits (T, N, classes), same errors.

    `packed(x)`: images (N, C, H, W) or events (T, N, C, H, W), all T steps; `packed(x, steps=k)`: the next k steps;
    `packed.step(frame)`: one frame (N, C, H, W) of a stream -> logits (N, classes) of this step. `packed.reset()` goes
    back to time 0; it is needed before a new batch. Activations have the type of x: on a GPU, bfloat16 x is fastest.

    `config`: the `ModelConfig`; `origin`: data set, class names, normalisation and accuracy, where they are known.
    Make it with `pack` or `load_packed`.
    """

    _check_input = SpikingNetwork._check_input  # the same rules and sentences

    def __init__(self, model: SpikingNetwork, origin: Origin | None = None):
        super().__init__()
        self.config, self.origin = model.config, origin or Origin()
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
        x = self._check_input(x, steps, 0)
        for v in self.v:
            if v is not None and len(v) != x.shape[1]:
                raise ValueError(
                    f"the membrane potential has shape {tuple(v.shape)} but the input "
                    f"{(x.shape[1], *v.shape[1:])}: call empf.reset(model) before a batch of another size"
                )
        stop = self.t + steps
        span = Span(slice(self.t, stop), list(self.v), last=stop == self.config.T)
        logits = self.run(x, span)
        self.t, self.v = stop, span.v
        return logits

    def run(self, x: Tensor, span: Span) -> Tensor:
        """Logits of the steps of `span` without a look at the state of this object; x is (k, N, C, H, W), or k = 1."""
        current = self.stem(x)
        steps = span.steps.stop - span.steps.start
        return self.body(current.expand(steps, *current.shape[1:]), span)

    def step(self, frame: Tensor) -> Tensor:
        """The next step of a stream: frame (N, C, H, W) -> logits (N, classes)."""
        return self(frame, steps=1)[0]

    def packed_weights(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name of the packed bits in the state dict -> (shape of the dense weight, kind)."""
        found = {name: m for name, m in self.named_modules() if isinstance(m, PackedSynapse)}
        return {f"{name}.bits": (m.shape, m.kind) for name, m in found.items()}

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes; see empf/packed_file.py."""
        about = {"model": self.config.to_dict(), "origin": asdict(self.origin)}
        return packed_file.to_bytes(packed_file.encode(self.state_dict(), self.packed_weights()), about)

    def save(self, path: str | Path) -> None:
        """Write the one file, atomically. Raises OSError with one sentence where the disk refuses."""
        write_atomic(Path(path), self.to_bytes())


def pack(model: SpikingNetwork) -> PackedModel:
    """Fold the normalisation, pack the weights: a network that returns the logits of `model.eval()` up to rounding.

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
    return PackedModel(model, Origin.of(model)).to(model.head.weight.device)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def skeleton(config: ModelConfig, origin: Origin | None = None) -> PackedModel:
    """The packed network of a configuration with tensors on the meta device: only names and shapes."""
    with torch.device("meta"):
        return PackedModel(build(config), origin)


def load_packed(path: str | Path, device: str | torch.device = "cpu") -> PackedModel:
    """Read what `PackedModel.save` wrote.

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
    return model.to(device)


def verify(model: SpikingNetwork, packed: PackedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """Compare the logits over batches of (images, labels): {"images", "relative_difference", "same_class"}.

    The difference is the largest of any image and step, relative to its largest logit; `same_class` is a share.
    Raises ValueError if it is above 1e-4; where spikes are rounded, so that rounding at a boundary may flip a code, if
    fewer than 99.9 % of the images (but for one) get the same class.
    """
    difference, same, count = 0.0, 0, 0
    for images, _ in batches:
        logits = []
        for net in (model, packed):
            reset(net)
            with torch.no_grad():
                logits.append(net(images))  # T N classes
            reset(net)
        wanted, found = logits
        error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1)
        difference = max(difference, error.max().item())
        same += int((found.sum(0).argmax(-1) == wanted.sum(0).argmax(-1)).sum())
        count += images.shape[-4]
    rounded = packed.config.spike_bits is not None or packed.config.neuron == "lif"
    if count - same > max(1, 0.001 * count) if rounded else not difference <= 1e-4:
        raise ValueError(
            f"the packed network is not the model: logits differ by {difference:.1e}, {same} of {count} classes agree; "
            "do not use it, and report this"
        )
    return {"images": count, "relative_difference": difference, "same_class": same / count}


def pack_to_file(model: SpikingNetwork, path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """Pack, save, load again and `verify`: what that returns, and "file" and "file_mb". A wrong file does not stay."""
    path = Path(path)
    pack(model).save(path)
    try:
        checked = verify(model, load_packed(path, model.head.weight.device), batches)
    except ValueError:
        path.unlink()
        raise
    return {"file": str(path), "file_mb": path.stat().st_size / 1e6, **checked}


def top_classes(packed: PackedModel, picture: str | Path, k: int = 5) -> list[tuple[str, float]]:
    """The k most probable (class name, probability) of an image file: softmax of the mean logits, highest first.

    The picture is cut to its central square and resized to the input of the network. Raises FileNotFoundError or
    ValueError with one sentence where it cannot be read, or where the network was not trained on images.
    """
    c, origin = packed.config, packed.origin
    if c.in_channels not in (1, 3) or len(origin.mean) != c.in_channels or len(origin.classes) != c.num_classes:
        raise ValueError(
            "the network does not say how images are normalised and what its classes are called: pack it from a run "
            "folder that was trained on images"
        )
    pixels = read_picture(picture, c.in_channels, c.image_size)  # C H W
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (origin.mean, origin.std))
    image = ((pixels / 255 - mean) / std).unsqueeze(0).to(packed.stem.weight.device)
    packed.reset()
    found = packed(image).mean(0).softmax(-1)[0].topk(min(k, c.num_classes))  # classes
    packed.reset()
    return [(origin.classes[i], p) for i, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def read_picture(path: str | Path, channels: int, size: int) -> Tensor:
    """The central square of an image file as uint8 (channels, size, size)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}: check the path")
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read {path} as an image ({' '.join(str(error).split())}): convert it to PNG"
        ) from error
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


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
            synapse(model.hidden["linear"], None, packed.body.hidden)
            neuron(model.hidden["neuron"], packed.body.neuron)
    else:
        for target, source in zip(model.layers, packed.body.layers, strict=True):
            layer(target, source)
        neuron(model.neuron, packed.body.neuron)
    return model.eval()
