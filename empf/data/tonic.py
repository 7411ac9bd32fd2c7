"""Data sets of the package `tonic`, and whatever is used like them, as frames."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from empf.data.aedat import Events
from empf.data.event_frames import FrameSettings, frames_of
from empf.data.events import DVS_CIFAR10, EventSet
from empf.data.recordings import of_arrays
from empf.data.sets import both


def from_tonic(
    dataset: Sequence[tuple[Any, int]],
    *,
    T: int = 10,
    size: int | tuple[int, int] = 48,
    by: str = "count",
    device: str | torch.device = "cpu",
) -> EventSet:
    """All recordings of a `tonic` data set as frames: one split, for `make_batches` and `hold_out`.

    `dataset[i]` is (events, label): a structured array with x, y, t and p, or frames [T, 2, H, W] where the data set
    makes them itself (`tonic.transforms.ToFrame(n_time_bins=T, ...)`). The sensor is `dataset.sensor_size`, which is
    width, height and polarities; the classes are `dataset.classes` where there are any. `T, size, by` as in
    `empf.data.event_frames.FrameSettings`. Recordings are not mirrored in training: that may change the class.

    Raises ValueError that names the recording which does not fit.
    """
    settings = FrameSettings(T, size, by)
    if not len(dataset):
        raise ValueError(f"{type(dataset).__name__} has no recordings: download it first")
    sensor = getattr(dataset, "sensor_size", None)
    frames = torch.empty(len(dataset), T, 2, *both(size), dtype=torch.float16)
    labels = []
    for number in range(len(dataset)):
        recording, label = dataset[number]
        where = f"recording {number} of {type(dataset).__name__}"
        made = frames_of(_found(np.asarray(recording), sensor, T, where), settings)
        frames[number] = torch.from_numpy(np.minimum(made, torch.finfo(torch.float16).max))
        if not isinstance(label, int | np.integer) or label < 0:
            raise ValueError(f"{where} has the label {label!r}: it must be the number of a class")
        labels.append(int(label))
    names = [str(name) for name in getattr(dataset, "classes", ())]
    names = names if len(names) > max(labels) else [str(label) for label in range(max(labels) + 1)]
    spec = replace(
        DVS_CIFAR10, name=type(dataset).__name__, image_size=size, num_classes=len(names), flip=False,
        crop_padding=round(DVS_CIFAR10.crop_padding * min(both(size)) / DVS_CIFAR10.image_size),
    )  # fmt: skip
    return EventSet(frames, torch.tensor(labels), names, spec, "tonic").to(device)


def _found(recording: np.ndarray, sensor: Sequence[int] | None, T: int, where: str) -> Events | np.ndarray:
    if recording.dtype.names is None:
        if recording.ndim != 4 or recording.shape[:2] != (T, 2):
            raise ValueError(f"{where} is an array {list(recording.shape)}: it must be events or frames [{T}, 2, H, W]")
        return recording
    arrays = {name: recording[name] for name in recording.dtype.names}
    if sensor is not None:
        arrays |= {"width": np.array(sensor[0]), "height": np.array(sensor[1])}
    return of_arrays(arrays, where)
