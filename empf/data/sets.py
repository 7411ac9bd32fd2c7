"""What a dataset is: the properties of each one that can be loaded, and a split that lies in memory."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# names of the splits, of which the first that exists is taken
TRAIN_SPLITS = ("train",)
TEST_SPLITS = ("test", "validation", "valid", "val")


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
