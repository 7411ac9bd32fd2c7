"""Small trained networks for the tests of deployment."""

from functools import cache

import torch
import torch.nn.functional as F

import empf
from empf import models
from empf.data.batches import Batches
from empf.data.load import load_data


@cache
def digits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six training batches of 32 digits and one test batch of 64."""
    train, test = load_data("digits", limit=200)
    batches = Batches(train, 32, train=True)
    return [*batches, next(iter(Batches(test, 64, train=False)))]


def frames(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The digits in the input shape of the model; events are the digit in one polarity, shifted in each step."""
    c = model.config
    images = F.interpolate(images, size=c.image_size)
    if c.in_channels == 1:
        return images
    steps = [torch.stack((images.roll(t, -1), -images), 2).squeeze(1) for t in range(c.T)]
    return torch.stack(steps)  # T N 2 H W


@cache
def trained(arch: str = "resnet18", **settings) -> tuple[torch.nn.Module, torch.Tensor]:
    """(network in eval mode, input): a few steps of SGD, so that no parameter or statistic is at its initial value.

    The network is shared by the tests: it must not be written to, and is reset before each use.
    """
    torch.manual_seed(0)
    defaults = dict(num_classes=10, in_channels=1, image_size=8, width=0.125, T=3)
    if arch == "vgg_snn":
        defaults |= dict(in_channels=2, image_size=16)
    model = getattr(empf, arch)(**{**defaults, **settings})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    *batches, (images, _) = digits()
    for x, labels in batches:
        optimizer.zero_grad()
        empf.reset(model)
        F.cross_entropy(model(frames(model, x)).mean(0), labels).backward()
        optimizer.step()
    empf.reset(model)
    return model.eval().requires_grad_(False), frames(model, images)


def shallow(monkeypatch, arch: str = "resnet18", **settings) -> tuple[torch.nn.Module, torch.Tensor]:
    """As `trained`, with two blocks or three layers, where each layer costs the test a second."""
    monkeypatch.setitem(models.RESNETS, "resnet18", ([1, 1], [64, 128], None))
    monkeypatch.setitem(models.RESNETS, "resnet19", ([1, 1], [128, 256], 256))
    monkeypatch.setattr(models, "VGG", [64, 64, "P", 128, "P"])
    return trained.__wrapped__(arch, **settings)  # not kept for other tests


def logits(model: torch.nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    """All steps from time 0."""
    empf.reset(model)
    with torch.no_grad():
        y = model(x, **options)
    empf.reset(model)
    return y
