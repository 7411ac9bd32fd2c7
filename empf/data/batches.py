"""Batches of images, augmented whole on the device where they lie.

    images   [N, C, H, W]   uint8     as stored, resident on the device
    labels   [N]            int64
    batch    [B, C, H, W]   float32   (pixel/255 - mean) / std
    targets  [B]            int64, or [B, classes] float32 when labels are smoothed or mixed

Mixup: arXiv 1710.09412; CutMix: arXiv 1905.04899; Cutout: arXiv 1708.04552.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from empf.data.auto_augment import augmented, check_policy
from empf.data.sets import ImageSet, StreamSet


@dataclass(frozen=True)
class Augment:
    """What is done to training images and recordings, in this order. Everything is off by default.

    `crop`: shift by up to the dataset's `crop_padding` pixels, black beyond the border. `flip`: mirror left to right
    with probability 1/2, where that keeps the class. `cutout`: side in pixels of a square at a uniform centre that is
    set to the mean colour. `label_smoothing`: share of the target spread evenly over all classes.

    Of images alone: `auto_augment`, `erasing`: see `empf/data/auto_augment.py`. `mixup`, `cutmix`: alpha of the
    Beta(alpha, alpha) that draws the share of the image itself; the rest comes from the image at the mirrored place of
    the joined batch; where both are on, each batch gets one of them with probability 1/2.

    Of events alone, the same in all steps of a recording: `roll`: shift by up to so many pixels in both directions,
    what leaves on one side comes back on the other. `rotate`: turn by up to so many degrees, `shear`: slant by up to
    this share of the side, about the centre. `drop`: probability with which each frame is emptied. Neuromorphic data
    augmentation: arXiv 2203.06145; EventDrop: arXiv 2106.05836.
    """

    crop: bool = False
    flip: bool = False
    roll: int = 0
    rotate: float = 0.0
    shear: float = 0.0
    drop: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    auto_augment: str = "none"
    erasing: float = 0.0

    def __post_init__(self) -> None:
        check_policy(self.auto_augment, self.erasing)
        for name in ("roll", "rotate", "shear", "drop", "cutout", "mixup", "cutmix", "label_smoothing"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("drop", "label_smoothing"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def soft_targets(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.label_smoothing > 0


class ImageBatches(ABC):
    """What all batches have: the seed and the epoch, the share of a rank, and how a batch is prepared.

    `rank` is one of `world` processes. `workers`: processes that read and decode a set that does not lie in memory.
    Raises ValueError where `augment` asks for what is not done to such data.
    """

    kind, others = "images", "events"
    not_done = ("roll", "rotate", "shear", "drop")

    def __init__(
        self,
        data: ImageSet | StreamSet,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        augment: Augment | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or seed < 0 or not 0 <= rank < world:
            raise ValueError(
                f"needs batch_size >= 1, seed >= 0 and 0 <= rank < world, got {batch_size=}, {seed=}, {rank=}, {world=}"
            )
        if train and len(data) < batch_size * world:
            raise ValueError(
                f"{len(data)} training images do not fill one batch of {batch_size * world}: "
                "use a smaller --batch-size or a larger --limit"
            )
        self.data, self.batch_size, self.train, self.seed = data, batch_size, train, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.augment = augment or Augment()
        if wrong := [name for name in self.not_done if getattr(self.augment, name) != getattr(Augment, name)]:
            are, them = ("is", "it") if len(wrong) == 1 else ("are", "them")
            off = "none" if wrong == ["auto_augment"] else "0"
            raise ValueError(f"{' and '.join(wrong)} {are} for {self.others}, not for {self.kind}: set {them} to {off}")
        self.epoch = 0
        mean, std = (
            torch.tensor(values, device=data.device)[:, None, None]  # C 1 1
            for values in (data.spec.mean, data.spec.std)
        )
        self._gain, self._shift = 1 / (255 * std), -mean / std

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this rank; the same on all ranks in training."""
        if not self.train:
            first, last = self._share(len(self.data))
            return -(-(last - first) // self.batch_size)
        return len(self.data) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    @abstractmethod
    def iterate(self, start: int = 0, begun_by: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from number `start` of the present epoch on.

        `begun_by`: processes that began the epoch, where they were not `world`; their joined batches were as large.
        """

    def _share(self, count: int) -> tuple[int, int]:
        """First and last + 1 of this rank's part of `count` rows."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def _normalise(self, images: Tensor, *drawn: int) -> Tensor:
        """Pixels as the network takes them; `drawn`: what draws the policy, for a batch in training."""
        images = images.float()
        if drawn and (self.augment.auto_augment != "none" or self.augment.erasing):
            images = augmented(images, self.augment.auto_augment, self.augment.erasing, (self.seed, self.epoch, *drawn))
        return images.mul_(self._gain).add_(self._shift)

    def _cut_out(self, images: Tensor, y: Tensor, x: Tensor) -> None:
        """A square at the centres `y, x` [B] of each image becomes the mean colour."""
        cutout = self.augment.cutout
        offset = [torch.arange(side, device=images.device) + cutout // 2 for side in images.shape[-2:]]
        distance = [o - centre[:, None] for o, centre in zip(offset, (y, x), strict=True)]  # B H, B W
        inside_y, inside_x = ((d >= 0) & (d < cutout) for d in distance)
        images.masked_fill_((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0)

    def _targets(self, labels: Tensor) -> Tensor:
        smoothing, classes = self.augment.label_smoothing, self.data.spec.num_classes
        return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes

    def _mixed(
        self, images: Tensor, targets: Tensor, mates: Tensor, mate_targets: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """One share, or one box, for the whole batch."""
        augment, size = self.augment, np.array(self.data.spec.size)
        cutmix = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
        alpha = augment.cutmix if cutmix else augment.mixup
        share = float(rng.beta(alpha, alpha))
        if cutmix:
            half = (size * (1 - share) ** 0.5).astype(np.int64) // 2
            centre = rng.integers(0, size)
            (top, left), (bottom, right) = (centre - half).clip(0), (centre + half).clip(max=size)
            images[:, :, top:bottom, left:right] = mates[:, :, top:bottom, left:right]
            share = 1 - int((bottom - top) * (right - left)) / int(size.prod())
        else:
            images = torch.lerp(mates, images, share)
        return images, torch.lerp(mate_targets, targets, share)


class Batches(ImageBatches):
    """Batches of an `ImageSet`, as (images float32 [B, C, H, W] normalised, targets), on the device of the set.

    Training: rank r of `world` gets the r-th part of a joined batch of `batch_size * world` images, so that several
    processes see together what one process with the larger batch sees: the same images in the same order, augmented
    and mixed the same way; only `auto_augment` and `erasing` are drawn by each process. Everything drawn is a pure
    function of (seed, epoch, number of the batch, and the rank for these two), so `set_epoch(e)` and `iterate(start=k)`
    continue an interrupted epoch exactly. Targets are int64 [B], or float32 [B, classes] if `augment` mixes images or
    smooths labels. The rest of the images that does not fill a joined batch is left out.

    Test: images in their order, not augmented, targets int64 [B]. Each rank gets one contiguous part, every image in
    exactly one of them; the parts differ by at most one image and the last batch may be smaller, so ranks may differ
    by one in their number of batches: reduce over processes after the loop, not inside it.
    """

    def iterate(self, start: int = 0, begun_by: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.train:
            first, last = self._share(len(self.data))
            for at in range(first + start * self.batch_size, last, self.batch_size):
                rows = slice(at, min(at + self.batch_size, last))
                yield self._normalise(self.data.images[rows]), self.data.labels[rows]
            return
        joined = self.batch_size * self.world
        order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(len(self.data))
        for number in range(start, len(self)):
            rng = np.random.default_rng((self.seed, self.epoch, number + 1))
            yield self._train_batch(order[number * joined : (number + 1) * joined], rng, number)

    def _train_batch(self, rows: np.ndarray, rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the joined batch `rows`; the random numbers are drawn for the joined batch."""
        spec, augment = self.data.spec, self.augment
        shifts = 2 * spec.crop_padding + 1
        # per image: row, crop y, crop x, flip, cutout y, cutout x; all are drawn even if unused, so that switching one
        # of them on leaves the others as they are
        drawn = rng.integers(0, (shifts, shifts, 2, *spec.size), (len(rows), 5))
        drawn = np.concatenate((rows[:, None], drawn), axis=1)
        first, last = self._share(len(rows))
        images, labels = self._augmented(drawn[first:last], number, self.rank)
        targets = self._targets(labels) if augment.soft_targets else labels
        if augment.mixup == 0 and augment.cutmix == 0:
            return images, targets
        if self.world == 1:
            mates, mate_targets = images.flip(0), targets.flip(0)
        else:  # the partners lie on other ranks, where they are augmented the same way
            mates, labels = self._augmented(drawn[::-1][first:last], number, self.world - 1 - self.rank)
            mate_targets = self._targets(labels)
        return self._mixed(images, targets, mates, mate_targets, rng)

    def _augmented(self, drawn: np.ndarray, number: int, rank: int) -> tuple[Tensor, Tensor]:
        """Crop, flip, normalise and cut out the images that `drawn` [B, 6] names, of a rank; with their labels."""
        spec, augment = self.data.spec, self.augment
        (height, width), padding = spec.size, spec.crop_padding
        rows, y, x, flip, *hole = torch.from_numpy(drawn.T.copy()).to(self.data.images.device)
        images = self.data.images[rows]  # B C H W
        if augment.crop:
            windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # B C 2P+1 2P+1 H W
            images = windows[torch.arange(len(rows), device=rows.device), :, y, x]
        if augment.flip and spec.flip:
            images = torch.where(flip[:, None, None, None] > 0, images.flip(3), images)
        images = self._normalise(images, number, rank)
        if augment.cutout:
            self._cut_out(images, *hole)
        return images, self.data.labels[rows]
