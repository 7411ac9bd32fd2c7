"""Event datasets: recordings by class, decoded once into a cache of frames, and batches of them.

    frames   [N, T, 2, H, W]   float16   mean counts, resident on the device
    labels   [N]               int64
    batch    [T, B, 2, H, W]   float32   time first

    FOLDER/<class>/*.aedat                                      DVS-CIFAR10: split by name, see `EventSettings`
    FOLDER/train/<class>/*.npy, FOLDER/test/<class>/*.npy       any recordings or frames [T, 2, H, W]

float16 has 11 significant bits: at 48x48 pixels the mean of up to 32 events per pixel is exact (it is a multiple of
1/64), a larger one is off by at most 0.05 %. Bytes would turn the many means below 1/2 into nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from empf.data.aedat import Events
from empf.data.batches import Batches
from empf.data.classes import check_classes
from empf.data.event_cache import FrameCache, default_folder
from empf.data.event_frames import Clip, EventSettings, FrameSettings, frames_of
from empf.data.folders import files_below, subfolder, subfolders
from empf.data.gesture import GESTURES, gesture_files
from empf.data.recordings import ARRAYS, RECORDINGS, load_arrays, of_arrays
from empf.data.sets import DATASETS, TEST_SPLITS, TRAIN_SPLITS, DataSpec, ImageSet, both

DVS_CIFAR10 = DATASETS["dvs-cifar10"]


@dataclass(frozen=True)
class EventSet(ImageSet):
    """A whole split: `images` are frames, float16 [N, T, 2, H, W]; `labels` int64 [N], `class_names` by label.

    `split`: the rule that made it (a name of `SPLITS`, `random` with its seed, or `folders`), for the record.
    `flip_dim`: the dimension along which the scene is mirrored from left to right, -1 or -2.
    """

    flip_dim: int = -1

    @property
    def frames(self) -> Tensor:
        return self.images


@dataclass(frozen=True)
class _Files:
    clips: list[Clip]
    labels: np.ndarray
    class_names: list[str]


def load_events(
    path: str | Path,
    settings: EventSettings | None = None,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    spec: DataSpec = DVS_CIFAR10,
    cache: str | Path | None = None,
    workers: int | None = None,
    test: bool = False,
    trained_on: tuple[int | None, int | None] = (None, None),
) -> tuple[EventSet, EventSet] | EventSet:
    """The training and the test recordings in the folder `path` as frames; decoded by all cores the first time.

    `path` has a folder for each class, with recordings (see `empf/data/recordings.py`) or frames [T, 2, H, W] (.npy,
    .npz) in it or in folders below; they are split by the rule `settings.split` (`seed` draws the random one). Where
    `path` has the folders train and test (or validation, valid, val) with the classes inside, these are the split.

    `spec`: name and flips of the set; the rest is found out. A folder of DVS128-Gesture, which has a table of labels
    (`*_labels.csv`) beside each recording, is cut and divided as its lists (`trials_to_train.txt`) say.

    `limit` keeps the first recordings of each split, one of each class in turn. `workers`: processes that decode, by
    default one per core.

    With `test` it is the test set alone, which may be all there is: where nothing is divided, every recording is for
    testing unless there are as many as were `trained_on` (None: any number) with the limit that is its second number.

    The frames are kept in the folder `cache` (default: events in $EMPF_CACHE or ~/.cache/empf), see
    `empf/data/event_cache.py`: an interrupted call is continued by the next one, several processes on a machine decode
    once, other settings or changed files are decoded anew. The cache can be deleted at any time.

    Raises ValueError or FileNotFoundError with one sentence; damaged files are all named after the rest is decoded.
    """
    settings = settings or EventSettings()
    split = settings.split
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 recording, got {limit}: leave it out to use all")
    path, folder = Path(path), default_folder() if cache is None else Path(cache)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: check the path given with --data")
    parts = [subfolder(path, names) for names in (TRAIN_SPLITS, TEST_SPLITS)]
    if (gestures := gesture_files(path)) is not None:
        clips, labels, is_test = gestures
        files, rule = _Files(clips, labels, list(GESTURES)), "trials"
    elif None not in parts:
        listed = [_list(part) for part in parts]
        if listed[0].class_names != listed[1].class_names:
            raise ValueError(f"{parts[0]} and {parts[1]} have different classes: use the same folders in both")
        clips, labels = listed[0].clips + listed[1].clips, np.concatenate([part.labels for part in listed])
        files, rule = _Files(clips, labels, listed[0].class_names), "folders"
        is_test = np.arange(len(clips)) >= len(listed[0].clips)
    elif test and parts[1] is not None:
        files, rule = _list(parts[1]), "folders"
        is_test = np.ones(len(files.clips), bool)
    else:
        files = _list(path)
        is_test, rule = _is_test(files, split, seed), f"random, seed {seed}" if split == "random" else split
        count, most = len(files.clips), trained_on[1] or len(files.clips)
        if test and trained_on[0] not in (None, min(is_test.sum(), most) + min(count - is_test.sum(), most)):
            is_test[:], rule = True, f"all of {path}"
    if not test and gestures is None:
        check_classes(files.class_names, files.labels.tolist(), str(path))
    if len(kinds := sorted({clip.path.suffix.lower() for clip in files.clips})) > 1:
        raise ValueError(f"{path} has files of several kinds ({', '.join(kinds)}): keep one")
    if not test:
        for flag, why, in_vain in (
            ("split", "is divided already", rule in ("folders", "trials") and split != EventSettings.split),
            ("orientation", "holds no AEDAT 2.0", settings.orientation == "mirrored" and kinds != [".aedat"]),
            ("frames-by", "holds frames", settings.by != EventSettings.by and _holds_frames(files.clips[0].path)),
        ):
            if in_vain:
                raise ValueError(f"{path} {why}: leave --{flag} out")
    rows = [np.flatnonzero(~is_test)[:limit], np.flatnonzero(is_test)[:limit]]
    rows = rows[1:] if test else rows
    if not all(map(len, rows)):
        raise ValueError(f"{path} has too few recordings for the split {rule}: a class needs at least 2")
    frames = FrameCache(folder, path, files.clips, settings)
    frames.fill(np.concatenate(rows), workers)
    height, width = both(settings.size)
    spec = replace(
        spec, image_size=height if height == width else (height, width), num_classes=len(files.class_names),
        crop_padding=round(DVS_CIFAR10.crop_padding * min(height, width) / DVS_CIFAR10.image_size),
    )  # fmt: skip
    flip_dim = -2 if settings.orientation == "mirrored" and kinds == [".aedat"] else -1
    sets = [
        EventSet(frames.read(r), torch.from_numpy(files.labels[r]), files.class_names, spec, rule, flip_dim).to(device)
        for r in rows
    ]
    return sets[0] if test else tuple(sets)


def _list(folder: Path) -> _Files:
    """The files of each class in the order of their numbers; all classes in turn, so that the first are of each."""
    found = []
    classes = [child.name for child in subfolders(folder)]
    for label, name in enumerate(classes):
        files = files_below(folder / name, RECORDINGS + ARRAYS)
        numbers = [(int(n[0]) if (n := re.search(r"\d+$", Path(f).stem)) else -1, f) for f in files]
        found += [(turn, label, folder / name / file) for turn, (_, file) in enumerate(sorted(numbers))]
    if not found:
        raise FileNotFoundError(
            f"no recordings in {folder}: expected <class>/*.aedat (or {', '.join((RECORDINGS + ARRAYS)[1:])})"
        )
    _, labels, paths = zip(*sorted(found), strict=True)
    return _Files([Clip(path) for path in paths], np.array(labels, np.int64), classes)


def _holds_frames(file: Path) -> bool:
    return file.suffix.lower() in ARRAYS and isinstance(load_arrays(file), np.ndarray)


def _is_test(files: _Files, split: str, seed: int) -> np.ndarray:
    """Which files the rule `split` puts in the test set; the same share of every class."""
    test = np.zeros(len(files.clips), bool)
    for label in range(len(files.class_names)):
        own = np.flatnonzero(files.labels == label)  # in the order of their numbers
        train = len(own) * 9 // 10
        if split == "random":
            own = np.random.default_rng((seed, label)).permutation(own)
        test[own[: len(own) - train] if split == "test100" else own[train:]] = True
    return test


class EventBatches(Batches):
    """Batches of an `EventSet`, as (events float32 [T, B, 2, H, W], targets), on the device of the set.

    Order, shares of the processes and restarts are those of `empf.data.batches.Batches`. Targets are int64 [B], or
    float32 [B, classes] where training smooths the labels.
    """

    kind, others = "events", "images"
    not_done = ("mixup", "cutmix", "auto_augment", "erasing")

    def _normalise(self, frames: Tensor, *drawn: int) -> Tensor:
        return frames.transpose(0, 1).float().contiguous()

    def _train_batch(self, rows: np.ndarray, rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the joined batch `rows`; the random numbers are drawn for the joined batch."""
        a, device = self.augment, self.data.device
        # per recording: flip, then (y, x) of roll and crop, as numbers in 0..1: switching one of them on leaves the
        # others as they are
        reach = np.array([a.roll] * 2 + [self.data.spec.crop_padding * a.crop] * 2)
        choices = np.array([2, *(2 * reach + 1)])
        drawn = (rng.random((len(rows), 5)) * choices).astype(np.int64) - (0, *reach)
        # the same for angle, shear, centre of the hole, and each frame
        more = rng.random((len(rows), 4 + self.data.frames.shape[1]))
        first, last = self._share(len(rows))
        more = torch.from_numpy(more[first:last].astype(np.float32)).to(device)
        drawn = np.concatenate((rows[:, None], drawn), axis=1)[first:last]
        rows, flip, *shifts = torch.from_numpy(drawn.T.copy()).to(device)  # B each
        flip = flip * (a.flip and self.data.spec.flip)
        axes = []
        for dim, roll, crop in zip((-2, -1), shifts[:2], shifts[2:], strict=True):
            axes.append(
                _sources(self.data.frames.shape[dim], flip if dim == self.data.flip_dim else 0 * flip, roll, crop)
            )
        (y, y_inside), (x, x_inside) = axes  # B side
        events = self.data.frames[rows[:, None, None], :, :, y[:, :, None], x[:, None, :]]  # B H W T 2
        events = events * (y_inside[:, :, None] & x_inside[:, None, :])[..., None, None]
        events = events.permute(3, 0, 4, 1, 2).float().contiguous()  # T B 2 H W
        if a.rotate or a.shear:
            events = _slanted(events, (2 * more[:, 0] - 1) * a.rotate, (2 * more[:, 1] - 1) * a.shear)
        if a.cutout:
            centres = [(draw * side).long() for draw, side in zip(more[:, 2:4].T, events.shape[-2:], strict=True)]
            by_recording = events.transpose(0, 1).flatten(1, 2)  # B T*2 H W
            self._cut_out(by_recording, *centres)
            events = by_recording.unflatten(1, (-1, 2)).transpose(0, 1).contiguous()
        if a.drop:
            events = events * (a.drop <= more[:, 4:].T)[..., None, None, None]
        labels = self.data.labels[rows]
        return events, self._targets(labels) if a.label_smoothing else labels


def _slanted(events: Tensor, degrees: Tensor, shear: Tensor) -> Tensor:
    """Turned and slanted about the centre, empty beyond the border; events [T, B, 2, H, W], degrees and shear [B]."""
    T, B, _, H, W = events.shape
    sine, cosine, zero = degrees.deg2rad().sin(), degrees.deg2rad().cos(), torch.zeros_like(shear)
    # in units of half a side: turning keeps the aspect of pixels
    x = torch.stack((cosine + shear * sine, (shear * cosine - sine) * H / W, zero), 1)
    y = torch.stack((sine * W / H, cosine, zero), 1)
    stacked = events.transpose(0, 1).reshape(B, T * 2, H, W)
    grid = F.affine_grid(torch.stack((x, y), 1), stacked.shape, align_corners=False)
    turned = F.grid_sample(stacked, grid, align_corners=False)
    return turned.reshape(B, T, 2, H, W).transpose(0, 1).contiguous()


def _sources(side: int, flip: Tensor, roll: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis: where each pixel of B augmented recordings comes from, and whether that is inside; [B, side]."""
    place = torch.arange(side, device=flip.device) - crop[:, None]
    inside = (place >= 0) & (place < side)
    place = (place - roll[:, None]) % side
    return torch.where(flip[:, None] > 0, side - 1 - place, place), inside


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

    >>> event = np.dtype([("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "i1")])
    >>> recording = np.array([(1, 2, 10, 1), (3, 0, 20, 0)], event)
    >>> empf.data.from_tonic([(recording, 0), (recording, 1)], T=2, size=4).frames.shape
    torch.Size([2, 2, 2, 4, 4])
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
