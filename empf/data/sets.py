"""What a dataset is: the properties of each one that can be loaded, and a split, in memory or read while it is used."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from empf.data.classes import Classes
from empf.data.rows import Row, Source

_LIMIT_BLOCKS = 100
# names of the splits, of which the first that exists is taken
TRAIN_SPLITS = ("train",)
TEST_SPLITS = ("test", "validation", "valid", "val")
HELD_OUT = "of the training data, held out with seed"  # in the name of such a part
CHOOSES = ", also used to choose the epoch"  # after it, where it is what is tested on: its accuracy is optimistic


def both(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of `size`, which is the side of a square or both already."""
    return (size, size) if isinstance(size, int) else size


def parsed(size: str) -> int | tuple[int, int]:
    """The size that `--image-size` names: the side of a square, or HEIGHTxWIDTH."""
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"image_size must be the side of a square or HEIGHTxWIDTH, such as 64 or 64x96, got {size!r}")
    return int(sides[0]) if len(set(map(int, sides))) == 1 else (int(sides[0]), int(sides[1]))


def named(size: int | tuple[int, int]) -> str:
    """As it is written for people and for `--image-size`: 64x96, height first."""
    return "x".join(map(str, both(size)))


@dataclass(frozen=True)
class DataSpec:
    """What a dataset must look like (`channels`, `image_size`, `num_classes`) and how it is prepared for training.

    `mean` and `std` per channel are for pixels scaled to 0..1. `flip`: a mirrored image keeps its class.
    `image_size`: side of square images, or (height, width). `crop_padding`: pixels a random crop may shift an image by.
    `resized`: the images have any size and are cropped and resized to `image_size` (see `empf/data/images.py`).
    `streamed`: they do not fit in memory. `test_splits`: names of the split to test on, the first that exists.
    """

    name: str
    hub_id: str | None
    channels: int
    image_size: int | tuple[int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop_padding: int
    resized: bool = False
    streamed: bool = False
    test_splits: tuple[str, ...] = TEST_SPLITS

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return both(self.image_size)


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Mean and std: digits and cifar100 computed over all pixels of their training images, the others the values in common
# use. Events are counts and not normalised: the batch norm of the stem does that.
DATASETS = {
    spec.name: spec
    for spec in (
        DataSpec("digits", None, 1, 8, 10, (0.3054,), (0.3760,), False, 1),
        DataSpec("cifar10", "uoft-cs/cifar10", 3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, 4),
        DataSpec(
            "cifar100", "uoft-cs/cifar100", 3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, 4
        ),
        DataSpec("imagenet200", "zh-plus/tiny-imagenet", 3, 64, 200, *_IMAGENET, True, 8),
        DataSpec(
            "imagenet1k",
            "ILSVRC/imagenet-1k",
            3,
            224,
            1000,
            *_IMAGENET,
            True,
            0,
            resized=True,
            streamed=True,
            test_splits=("validation", "valid", "val"),  # the test images of the Hub have no labels
        ),  # fmt: skip
        DataSpec("dvs-cifar10", None, 2, 48, 10, (0.0, 0.0), (1.0, 1.0), True, 5),
    )
}


@dataclass(frozen=True)
class ImageSettings:
    """How images of one's own are found and what they become, where that is not to be found out.

    `size`: side, or (height, width); images of other sizes are cropped and resized to it. `image_column`,
    `label_column`: of a table. `train_split`, `test_split`: names of the splits. `config`: of several configurations of
    a data set, which lie in folders of that name. `hold_out`: share of the training images to test on where there are
    no test images.
    """

    size: int | tuple[int, int] | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    config: str | None = None
    hold_out: float = 0.1

    def __post_init__(self) -> None:
        if self.size is not None and min(both(self.size)) < 1:
            raise ValueError(f"the size of images must be at least 1, got {named(self.size)}")
        if not 0 < self.hold_out < 1:
            raise ValueError(f"hold_out is a share and must lie between 0 and 1, got {self.hold_out}")


@dataclass(frozen=True)
class ImageSet:
    """A whole split: `images` uint8 [N, C, H, W] and `labels` int64 [N] on one device, `class_names` by label.

    `split`: which part of the data it is, for people.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    spec: DataSpec
    split: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def chosen(self, rows: np.ndarray) -> "ImageSet":
        """Only the images of these numbers."""
        rows = torch.from_numpy(rows).to(self.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: str | torch.device) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class StreamSet:
    """A split that is read from `source` while it is used, for batches on `device`; `class_names` by label.

    `blocks` int64 [blocks, 4]: file, row group, first row in the file, rows; in this order they make up the split.
    Where a file is damaged, the source says so in place of the lost rows. `kept`: for each block which of its rows
    belong to the split, where not all do; then the fourth column counts these. `split`: which part of the data it is.
    """

    source: Source
    blocks: np.ndarray
    classes: Classes
    spec: DataSpec
    device: torch.device = torch.device("cpu")
    split: str = ""
    kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.blocks[:, 3].sum())

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    def to(self, device: str | torch.device) -> "StreamSet":
        return replace(self, device=torch.device(device))

    def read(self, block: int, start: int, stop: int) -> Iterator[Row]:
        """The rows `start` to `stop` of those of a block that belong to the split."""
        if self.kept is None:
            yield from self.source.read(*self.blocks[block, :3], start, stop)
            return
        rows = self.kept[block][start:stop]
        first, wanted = int(rows[0]), set(rows.tolist())
        for at, row in enumerate(self.source.read(*self.blocks[block, :3], first, int(rows[-1]) + 1), first):
            if at in wanted:
                yield row

    def labels(self) -> np.ndarray:
        """Of all rows, in their order; -1 where the stored value means no class. The images are not read."""
        stored = self.source.labels()
        labels = np.array([-1 if (label := self.classes.label(value)) is None else label for value in stored])
        if self.kept is None and len(self) == len(stored):
            return labels
        whole = self.source.blocks()
        ends = dict(zip(map(tuple, whole[:, :3].tolist()), (whole[:, 3].cumsum() - whole[:, 3]).tolist(), strict=True))
        rows = [ends[tuple(block[:3].tolist())] + self._rows_of(number) for number, block in enumerate(self.blocks)]
        return labels[np.concatenate(rows)]

    def _rows_of(self, block: int) -> np.ndarray:
        count = int(self.blocks[block, 3])
        return np.arange(count) if self.kept is None else self.kept[block][:count]

    def chosen(self, rows: np.ndarray) -> "StreamSet":
        """Only the rows of these numbers, which ascend, counted through the split."""
        ends = self.blocks[:, 3].cumsum()
        of_block = np.searchsorted(ends, rows, "right")
        numbers, begins = np.unique(of_block, return_index=True)
        inside = rows - (ends - self.blocks[:, 3])[of_block]
        kept = [self._rows_of(n)[part] for n, part in zip(numbers, np.split(inside, begins[1:]), strict=True)]
        blocks = self.blocks[numbers]
        blocks[:, 3] = [len(part) for part in kept]
        return replace(self, blocks=blocks, kept=kept)

    def limited(self, limit: int) -> "StreamSet":
        """`limit` images: the first of each of about 100 blocks that are spread evenly over the split.

        Shards are often sorted by class, so the first images of the split would all be of one class. Image files, which
        are listed one of each class in turn, are the first ones.
        """
        if limit >= len(self):
            return self
        if self.blocks[:, 3].max() == 1:
            return replace(self, blocks=self.blocks[:limit], kept=self.kept and self.kept[:limit])
        quota = -(-limit // _LIMIT_BLOCKS)
        while (sizes := np.minimum(self.blocks[:, 3], quota)).sum() < limit:
            quota *= 2
        for count in range(-(-limit // quota), len(sizes) + 1):
            places = np.arange(count) * len(sizes) // count
            if sizes[places].sum() >= limit:
                break
        blocks = self.blocks[places]
        ends = np.minimum(sizes[places].cumsum(), limit)
        blocks[:, 3] = np.diff(ends, prepend=0)
        return replace(self, blocks=blocks, kept=None if self.kept is None else [self.kept[at] for at in places])


def is_held_out(data: ImageSet | StreamSet) -> bool:
    """Is it a part of the training data?"""
    return HELD_OUT in data.split
