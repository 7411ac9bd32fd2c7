"""What a dataset is: the properties of each one that can be loaded, and a split that lies in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DataSpec:
    """What a dataset must look like (`channels`, `image_size`, `num_classes`) and how it is prepared for training.

    `mean` and `std` per channel are for pixels scaled to 0..1. `flip`: a mirrored image keeps its class.
    `crop_padding`: pixels a random crop may shift the image by. `streamed`: the images have any size, are cropped to
    `image_size` (see `empf/data/images.py`) and do not fit in memory. `test_splits`: names of the split to test on, the
    first that exists.
    """

    name: str
    hub_id: str | None
    channels: int
    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop_padding: int
    streamed: bool = False
    test_splits: tuple[str, ...] = ("test", "validation", "valid", "val")


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
            streamed=True,
            test_splits=("validation", "valid", "val"),  # the test images of the Hub have no labels
        ),  # fmt: skip
        DataSpec("dvs-cifar10", None, 2, 48, 10, (0.0, 0.0), (1.0, 1.0), True, 5),
    )
}


@dataclass(frozen=True)
class ImageSet:
    """A whole split: `images` uint8 [N, C, H, W] and `labels` int64 [N] on one device, `class_names` by label."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: str | torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names, self.spec)
