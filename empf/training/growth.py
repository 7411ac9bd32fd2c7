"""Training that begins with small images and few time steps: `--grow 16:1:0.4,24:1:0.4,32:2:0.1`.

Each stage is side:T:share, the side in pixels of the images, the time steps they are trained for, and the share of the
epochs; whole images and all T steps are for the rest. A network that pools before its head, as the ResNets do, learns
from small images most of what it learns from whole ones, at a cost that falls with their area: progressive resizing,
as in arXiv 1707.02921 and 2104.00298. A step costs a pass; where the input stands still, later steps add little.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empf.neuron import StatefulNeuron


class Stage(NamedTuple):
    """Side of the images (None: as they are), time steps, and the share of the epochs after which it ends."""

    side: int | None
    T: int
    end: float


def stages(text: str | None, T: int) -> list[Stage]:
    """The stages that `--grow` names, then that of whole images and T steps. ValueError with one sentence."""
    found, end = [], 0.0
    for part in text.split(",") if text else ():
        try:
            side, steps, share = part.split(":")
            stage = Stage(int(side), int(steps), end := end + float(share))
        except ValueError:
            raise ValueError(f"grow takes stages side:T:share, such as 16:1:0.5,24:2:0.3, got {part!r}") from None
        if not (stage.side >= 1 and 1 <= stage.T <= T and float(share) > 0 and end <= 1):
            raise ValueError(
                f"a stage of grow needs a side of at least 1, time steps within 1..{T} and a share above 0, all of "
                f"them together at most 1, got {part!r}"
            )
        found.append(stage)
    return [*found, Stage(None, T, 1.0)]


def stage_of(text: str | None, T: int, progress: float) -> Stage:
    """The stage at this share of the epochs, 0 to 1."""
    return next((stage for stage in stages(text, T) if progress + 1e-9 < stage.end), Stage(None, T, 1.0))


def shrunk(images: Tensor, side: int | None) -> Tensor:
    """(..., C, H, W), its longer side brought down to `side` pixels by averaging; smaller ones stay as they are."""
    height, width = images.shape[-2:]
    longer = max(height, width)
    if side is None or side >= longer:
        return images
    size = [max(1, round(length * side / longer)) for length in (height, width)]
    return F.interpolate(images.flatten(0, -4), size, mode="area").unflatten(0, images.shape[:-3])


def grown(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches (images, target) as the stage has them; meanwhile the network takes images of that size."""
    try:
        for images, target in batches:
            images = shrunk(images, stage.side)
            model.input_size = tuple(images.shape[-2:])
            yield images, target
    finally:
        model.input_size = model.config.size


@torch.no_grad()
def lend_steps(model: nn.Module, T: int) -> None:
    """Neurons of more than T steps: what has learned in step T is lent to the later ones, which have not."""
    for neuron in model.modules():
        if isinstance(neuron, StatefulNeuron) and neuron.T is not None:
            for p in (*neuron.parameters(recurse=False), *neuron.buffers(recurse=False)):
                if p.dim() and len(p) == neuron.T:
                    p[T:] = p[T - 1]
