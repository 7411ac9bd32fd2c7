"""Sequences that come with packages or are made from what does: speech, digits by rows, events of moving digits.

speech                    JapaneseVowels: 9 speakers, 29 steps of 12 numbers (`pip install aeon`)
digits by rows            8 steps of 8 pixels
events, digit             digits of 8x8 pixels drift over a sensor of 12x12: 10 frames (2, 12, 12) of OFF and ON events
events, direction         the same, asked for the direction of motion, one of 8
direction, one polarity   the same, but a frame does not tell ON from OFF, so that it alone does not show the direction
digit, then noise         all pixels of a digit in the first of 8 steps, noise in the others
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Split = tuple[Tensor, Tensor]  # x (T, N, ...), labels (N,)
FRAMES, FINE, SENSOR = 10, 8, 12  # steps, moments of a step, pixels of a side
CONTRAST = 0.2  # change of brightness, in 0..1, at which a pixel fires
NOISE = 0.02  # events per pixel, polarity and step that mean nothing


def series(name: str) -> tuple[Split, Split]:
    from examples.sequence import DATASETS  # beside bench/ in a clone, not in an installed package

    return DATASETS[name]()


def recordings(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Events of digits (N, 8, 8) that drift, OFF and ON by time bin: (FRAMES, N, 2, SENSOR, SENSOR); direction (N,).

    Each has one of 8 directions, a way of 2 to 4 pixels and a start from which it stays on the sensor. A pixel fires
    where its brightness is CONTRAST away from what it was at its last event, and at random.
    """
    generator = torch.Generator().manual_seed(seed)
    n, side = images.shape[:2]
    direction = torch.randint(0, 8, (n,), generator=generator)
    angle = direction * math.pi / 4
    way = (2 + 2 * torch.rand(n, 1, generator=generator)) * torch.stack([angle.sin(), angle.cos()], 1)  # y x
    start = torch.rand(n, 2, generator=generator) * (SENSOR - side - way.abs()) + (-way).clamp(min=0)

    def seen(moment: float) -> Tensor:
        """The pictures on the sensor, between pixels linearly."""
        distance = torch.arange(SENSOR)[:, None] - torch.arange(side) - (start + moment * way)[..., None, None]
        rows, columns = (1 - distance.abs()).clamp(min=0).unbind(1)  # N SENSOR side
        return rows @ images @ columns.mT

    frames = torch.poisson(torch.full((FRAMES, n, 2, SENSOR, SENSOR), NOISE), generator=generator)
    before = seen(0)
    for k in range(FRAMES * FINE):
        events = ((seen((k + 1) / (FRAMES * FINE)) - before) / CONTRAST).trunc()
        before += CONTRAST * events
        frames[k // FINE] += torch.stack([-events, events], 1).clamp(min=0)
    return frames, direction


@cache
def moving() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(frames, digit, direction) of the images to train and to test with."""
    parts = series("digits")
    return [(*recordings(x.transpose(0, 1), seed), y) for seed, (x, y) in enumerate(parts)]


def recall() -> tuple[Split, Split]:
    """A digit in the first step, then noise with the mean and spread of its pixels."""
    parts = [(x.transpose(0, 1).flatten(1), y, len(x)) for x, y in series("digits")]  # N 64
    mean, std = parts[0][0].mean(0), parts[0][0].std(0)
    generator = torch.Generator().manual_seed(0)
    noise = [mean + std * torch.randn(T - 1, *x.shape, generator=generator) for x, _, T in parts]
    return tuple((torch.cat([x[None], later]), y) for (x, y, _), later in zip(parts, noise, strict=True))


TASKS: dict[str, Callable[[], tuple[Split, Split]]] = {
    "speech": lambda: series("japanese-vowels"),
    "digits by rows": lambda: series("digits"),
    "events, digit": lambda: tuple((x, digit) for x, _, digit in moving()),
    "events, direction": lambda: tuple((x, direction) for x, direction, _ in moving()),
    "direction, one polarity": lambda: tuple((x.sum(2, keepdim=True), direction) for x, direction, _ in moving()),
    "digit, then noise": recall,
}
