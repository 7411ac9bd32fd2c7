"""Policies of augmentation, of whole batches on their device; the operations are those of the package `kornia`.

    cifar    AutoAugment, the policy found on CIFAR-10         arXiv 1805.09501
    trivial  TrivialAugment: one operation of any strength     arXiv 2103.10158
    rand     RandAugment: two operations of strength 10 of 30  arXiv 1909.13719
    erasing  a rectangle of 2 % to 33 % of the area is black   arXiv 1708.04896

Groups of `GROUP` images share the operations that are drawn, each image has its own strength.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

POLICIES = ("none", "cifar", "trivial", "rand")
GROUP = 8


def check_policy(name: str, erasing: float) -> None:
    """Raise ValueError for an unknown policy, a share outside 0..1, and where the package is missing."""
    if name not in POLICIES:
        raise ValueError(f"auto_augment must be one of {', '.join(POLICIES)}, got {name!r}")
    if not 0 <= erasing <= 1:
        raise ValueError(f"erasing is a share and must lie between 0 and 1, got {erasing}")
    if name != "none" or erasing:
        _steps(name, erasing)


@cache
def _steps(name: str, erasing: float) -> nn.Module:
    try:
        from kornia.augmentation import RandomErasing
        from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment
    except ImportError as error:
        raise ValueError("auto_augment and erasing need a package: pip install 'empf[augment]'") from error
    made = {"cifar": lambda: AutoAugment("cifar10"), "trivial": TrivialAugment, "rand": lambda: RandAugment(n=2, m=10)}
    steps = [made[name]()] if name != "none" else []
    return nn.Sequential(*steps, *([RandomErasing(p=erasing)] if erasing else []))


def augmented(images: Tensor, name: str, erasing: float, seed: tuple[int, ...]) -> Tensor:
    """Pixels float32 [B, C, H, W] in 0..255 after the policy, in 0..255; a pure function of the images and `seed`.

    The random numbers of the caller are left as they are.
    """
    steps, devices = _steps(name, erasing), [images.device] if images.device.type == "cuda" else []
    grey = images.shape[1] == 1
    images = (images / 255).expand(-1, 3, -1, -1) if grey else images / 255  # colours need three channels
    groups = images.split(GROUP)
    seeds = np.random.default_rng(seed).integers(0, 2**63, len(groups)).tolist()
    done = []
    with torch.random.fork_rng(devices), torch.no_grad():
        for group, drawn in zip(groups, seeds, strict=True):
            torch.manual_seed(drawn)
            done.append(steps(group))
    images = torch.cat(done).clamp(0, 1).mul(255)
    return images.mean(1, keepdim=True) if grey else images
