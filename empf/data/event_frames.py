"""Event frames: the events of a recording counted per time bin, polarity and pixel.

    events   E                   see `empf.data.aedat.Events`
    counts   [T, 2, H, W]        channel 0: darker, channel 1: brighter
    frames   [T, 2, *size]       float32, mean count per pixel of the area that a pixel of the frame covers

A bin without events is a zero frame.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from empf.data.aedat import ORIENTATIONS, Events
from empf.data.recordings import ARRAYS, LARGEST_SIDE, RECORDINGS, load_arrays, read_recording
from empf.data.sets import both

BINS = ("count", "time")
RESIZES = ("area", "8bit")
MOST_FRAMES = 4096
MOST_NUMBERS = 1 << 28  # in the frames of a recording, before and after they are resized: 2 GB of counts

# "9:1" has three meanings. Of the recordings of a class, in the order of their numbers:
SPLITS = {
    "first900": "the first 9/10 for training (files 0-899 of 1000)",
    "test100": "the first 1/10 for testing (files 0-99 of 1000)",
    "random": "1/10 for testing, drawn with the seed of the split",
}


@dataclass(frozen=True)
class Clip:
    """A recording, or the part of it from `start` to before `stop`, in microseconds of its clock."""

    path: Path
    start: int | None = None
    stop: int | None = None

    def cut(self, events: Events) -> Events:
        if self.start is None:
            return events
        inside = (events.t >= self.start) & (events.t < self.stop)
        parts = {name: getattr(events, name)[inside] for name in ("t", "x", "y", "on")}
        return replace(events, **parts)


@dataclass(frozen=True)
class FrameSettings:
    """How a recording becomes T frames of `size`, a side or (height, width), into which the sensor is fitted.

    by: `count`: bin i has the events i*d..(i+1)*d - 1 with d = E // T, the last one also the rest;
        `time`: T bins of equal length from the first to the last event.
    orientation: how AEDAT 2.0 is read, see `empf.data.aedat.read_events`.
    resize: `area`: exact area averaging. `8bit`: what many published results were obtained with, for comparison only:
        the two polarities as grey and alpha of an 8-bit picture. It stores -count modulo 256, divided by 255, and
        weights the first polarity by the second, so that what has one polarity only is lost.
    """

    T: int
    size: int | tuple[int, int] = 48
    by: str = "count"
    orientation: str = "transposed"
    resize: str = "area"

    def __post_init__(self) -> None:
        for name, least in (("T", self.T), ("size", min(both(self.size)))):
            if least < 1:
                raise ValueError(f"{name} must be at least 1, got {least}")
        frames_fit(self.T, both(self.size))
        for name, allowed in (("by", BINS), ("orientation", tuple(ORIENTATIONS)), ("resize", RESIZES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


def frames_fit(T: int, size: tuple[int, int]) -> None:
    """Raise ValueError where T frames are too many, or too many of this size."""
    if T > MOST_FRAMES or 2 * T * size[0] * size[1] > MOST_NUMBERS:
        raise ValueError(f"{T} frames of {size[0]}x{size[1]} pixels are too many: use fewer steps or smaller frames")


@dataclass(frozen=True)
class EventSettings(FrameSettings):
    """How recordings become frames, and which of them are for testing: `split`, a name of `SPLITS`."""

    T: int = 10
    split: str = "first900"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")


def count_events(events: Events, T: int, by: str = "count") -> np.ndarray:
    """Events per bin, polarity and pixel: [T, 2, H, W] int64. `by` as in `FrameSettings`."""
    H, W = events.height, events.width
    frames_fit(T, (H, W))
    index = events.on * np.int64(H * W)
    index += events.y * np.int64(W)
    index += events.x
    if by == "count":
        each = len(events) // T
        for t in range(1, T):
            index[t * each : None if t == T - 1 else (t + 1) * each] += t * (2 * H * W)
    elif len(events):
        first, last = events.t.min(), events.t.max()
        index += (events.t - first) * T // (last - first + 1) * (2 * H * W)
    return np.bincount(index, minlength=T * 2 * H * W).reshape(T, 2, H, W)


def resize_area(frames: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Mean over the area that each pixel of the result covers: [..., H, W] -> [..., *size] float32.

    Counts are summed exactly (sums below 2^24) and rounded once, at the end.
    """
    rows, columns = (_overlaps(to, side) for to, side in zip(both(size), frames.shape[-2:], strict=True))
    sums = rows @ torch.from_numpy(frames.astype(np.float32)) @ columns.T
    return (sums / (rows[0].sum() * columns[0].sum())).numpy()


def fitted(frames: np.ndarray, size: int | tuple[int, int], resize: Callable = resize_area) -> np.ndarray:
    """Resized into `size` with the aspect of the sensor, in the middle, and nothing around: [..., *size] float32."""
    (height, width), (rows, columns) = both(size), frames.shape[-2:]
    scale = min(height / rows, width / columns)
    inner = max(round(rows * scale), 1), max(round(columns * scale), 1)
    small = resize(frames, inner)
    if inner == (height, width):
        return small
    whole = np.zeros((*frames.shape[:-2], height, width), np.float32)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    whole[..., top : top + inner[0], left : left + inner[1]] = small
    return whole


@lru_cache
def _overlaps(size: int, side: int) -> Tensor:
    """Length that pixel i of the result has in common with pixel j, in a unit that makes it whole: [size, side]."""
    common = math.gcd(size, side)
    wide, narrow = side // common, size // common  # a pixel of the result, a pixel of the source
    i, j = torch.arange(size)[:, None], torch.arange(side)
    overlap = torch.minimum((i + 1) * wide, (j + 1) * narrow) - torch.maximum(i * wide, j * narrow)
    return overlap.clamp(min=0).float()


def resize_8bit(frames: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """The resize that is common in the literature, with its flaws: see `FrameSettings`."""
    pictures = (frames * 255).astype(np.int64).astype(np.uint8).transpose(0, 2, 3, 1)  # T H W 2, wraps around
    small = [
        Image.frombytes("LA", p.shape[1::-1], p.tobytes()).resize(both(size)[::-1], Image.Resampling.BILINEAR)
        for p in pictures
    ]
    return np.stack([np.asarray(p) for p in small]).transpose(0, 3, 1, 2) / np.float32(255)


def read_frames(clip: "str | Path | Clip", settings: FrameSettings) -> np.ndarray:
    """Frames of a recording or a part of one, or frames [T, 2, H, W] as .npy or .npz: float32 [T, 2, *size].

    Raises ValueError that names the file if it is damaged or does not fit the settings.
    """
    clip = clip if isinstance(clip, Clip) else Clip(Path(clip))
    path, suffix = clip.path, clip.path.suffix.lower()
    if suffix in ARRAYS:
        found = load_arrays(path)
    elif suffix in RECORDINGS:
        found = read_recording(path, settings.orientation)
    else:
        raise ValueError(f"{path} is not a recording: it must end in {', '.join(RECORDINGS + ARRAYS)}")
    found = clip.cut(found) if isinstance(found, Events) else _checked(found, settings.T, path)
    try:
        return frames_of(found, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def frames_of(found: Events | np.ndarray, settings: FrameSettings) -> np.ndarray:
    """Frames of events, or of frames [T, 2, H, W] of another size: float32 [T, 2, *size]."""
    frames = count_events(found, settings.T, settings.by) if isinstance(found, Events) else found
    return fitted(frames, settings.size, resize_area if settings.resize == "area" else resize_8bit)


def _checked(array: np.ndarray, T: int, path: Path) -> np.ndarray:
    sides = array.shape[2:]
    if array.ndim != 4 or array.shape[:2] != (T, 2) or array.dtype.kind not in "uif" or not min(sides) or (
        max(sides) > LARGEST_SIDE or not np.abs(array).max() < np.finfo(np.float32).max
    ):  # fmt: skip
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)}: it must hold finite numbers [T = {T}, 2, H, W], or "
            "events as arrays x, y, t, p"
        )
    return array


def event_frames_of_file(
    path: str | Path,
    T: int,
    size: int | tuple[int, int] = 48,
    *,
    by: str = "count",
    orientation: str = "transposed",
    resize: str = "area",
) -> Tensor:
    """The frames of one recording or frames, in any format: float32 [T, 2, *size].

    `by`, `orientation` and `resize` as in `FrameSettings`. Raises ValueError or FileNotFoundError that names the file.
    """
    return torch.from_numpy(read_frames(path, FrameSettings(T, size, by, orientation, resize)))
