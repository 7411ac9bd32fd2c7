"""The door to the data: `load_data` reads a data set, `hold_out` keeps a part of it, `make_batches` makes batches.

Images that fit in memory become one uint8 tensor, decoded once (`ImageSet`); of the others (`StreamSet`) only the place
of each image is read. Events become frames (`EventSet`), see `empf/data/events.py`.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from empf.data.batches import Augment, Batches
from empf.data.classes import Classes, is_missing, plain
from empf.data.event_frames import EventSettings
from empf.data.events import EventBatches, EventSet, load_events
from empf.data.find import Place, in_folder, on_hub
from empf.data.images import BROKEN, mismatch, open_image, stored_pixels
from empf.data.own import own_spec
from empf.data.recordings import has_recordings
from empf.data.rows import Row, Source, one_line, read_rows
from empf.data.sets import (
    CHOOSES,
    DATASETS,
    HELD_OUT,
    TEST_SPLITS,
    TRAIN_SPLITS,
    DataSpec,
    ImageSet,
    ImageSettings,
    StreamSet,
    both,
    is_held_out,
)
from empf.data.sources import Columns, ImageFiles
from empf.data.streaming import StreamBatches

IN_MEMORY = 4 << 30  # bytes of pixels of a set of one's own, which is streamed where it has more
COLUMNS = ("image_column", "label_column")
OF_EVENTS = {"by": "frames_by", "split": "split", "orientation": "orientation", "resize": "resize"}  # their flags
LOOKED_UP = (*COLUMNS, "train_split", "test_split", "config")  # names in `ImageSettings`


def load_data(
    name: str,
    path: str | Path | None = None,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    streaming: bool = False,
    images: ImageSettings | None = None,
    events: EventSettings | None = None,
) -> tuple[ImageSet, ImageSet] | tuple[StreamSet, StreamSet] | tuple[EventSet, EventSet]:
    """The training and the test set of a data set, for `make_batches` on `device`.

    `name` is one of `DATASETS`, a folder, or the id of a data set on the Hugging Face Hub (owner/name). Without `path`
    a named set comes from the Hub, the digits from scikit-learn; `path` is a local folder with a copy.

    A folder holds parquet files (`train-*.parquet`, `train/*.parquet`), class folders (`train/<class>/*.png`), tables
    of file names and labels (`train.csv`) or what `save_to_disk` wrote; the test split may also be called validation,
    valid or val. Of a data set of one's own, number and names of the classes, channels and image size are found out,
    mean and standard deviation are those of its training images. Images of several sizes are cropped and resized to
    `images.size`. Where there is no test split, or nothing is divided, a stratified part of the training images is
    kept apart for testing; a test split without labels is passed over. `images` names what differs.

    Images decoded once lie on `device`. ImageNet, images that are resized, what does not fit in memory and all with
    `streaming` are read while they are used, from local files or, with `streaming`, from the Hub. Grey images become
    RGB where the others have colours; all are turned as their EXIF says.

    `limit` keeps so many images of each split; the others are not decoded. Where the classes follow one another, it
    takes one image of each class in turn, so that all classes are seen; where they are mixed, the first images. Of what
    is streamed it takes the first of about 100 row groups.

    `seed` draws what is held out, and the stratified 80/20 split of the digits. It is not the seed of a training run:
    results compare only at the same split, so leave it alone.

    A folder of recordings by class, and dvs-cifar10, whose recordings need a `path`, are read as `events` says, see
    `load_events`.

    Raises ValueError or FileNotFoundError with one sentence that says what is wrong and what to do.
    """
    spec, settings, folder = _known(name, path, images, limit)
    given = [field for field in LOOKED_UP if getattr(settings, field) is not None]
    given += ["streaming"] * streaming
    if _of_events(spec, folder):
        _leave_out(given, f"{folder} holds recordings by class")
        return load_events(folder, events, limit=limit, device=device, seed=seed, spec=_recorded(name, spec))
    for field, flag in OF_EVENTS.items():
        if getattr(events or EventSettings, field) != getattr(EventSettings, field):
            _leave_out([flag], f"{flag} is for events, not for the images of {name}")
    if folder is None and spec is not None and spec.hub_id is None:
        given += ["image_size"] * (settings.size is not None and both(settings.size) != spec.size)
        _leave_out(given, f"the {name} lie in memory as they are")
        return tuple(part.to(device) for part in _digits(spec, limit, seed))
    place = _place(name, spec, folder, settings, streaming)
    train, test = _train(place, spec, settings), _test(place, spec, settings)
    _check_columns(given, [train, *(test or ())[:1]], place)
    origin = f"train of {place.origin}"
    if spec is None:
        classes = Classes.found(train.labels(), origin) if train.names is None else Classes(train.names)
        spec = own_spec(name, train, classes, settings.size, origin)
    else:
        classes = _known_classes(spec, train.names, origin)
        if settings.size is not None and both(settings.size) != spec.size:
            spec = replace(spec, image_size=settings.size, resized=True)
    data = _read(spec, train, classes, "train", origin, limit, streaming)
    if test is None:
        data, tested = hold_out(data, settings.hold_out, seed)
        return data.to(device), replace(tested, split=tested.split + CHOOSES).to(device)
    source, split = test
    where = f"{split} of {place.origin}"
    if name in DATASETS:
        _known_classes(spec, source.names, where)
    tested = _read(spec, source, classes.of(source.names, where), split, where, limit, streaming)
    return data.to(device), tested.to(device)


def load_test(
    name: str,
    path: str | Path | None = None,
    *,
    spec: DataSpec,
    classes: Sequence[str] = (),
    trained_on: tuple[int | None, int | None] = (None, None),
    limit: int | None = None,
    device: str | torch.device = "cpu",
    streaming: bool = False,
    images: ImageSettings | None = None,
    events: EventSettings | None = None,
    columns: dict[str, str] | None = None,
) -> ImageSet | StreamSet | EventSet:
    """What `load_data` gives to test a network on, of these or other data, without reading the others.

    `spec` and `classes` are those of the training: images are prepared as they were then, and labels mean what they
    meant; classes may be missing. `columns`: what differs from `images` in these data, by field. Where nothing is
    divided, everything is tested, unless there are as many images as were `trained_on` (None: any number) with the
    `limit` that is its second number: then these are the data of the training, and what it held out is tested.

    Raises ValueError or FileNotFoundError with one sentence.
    """
    known, settings, folder = _known(name, path, images, limit)
    given, settings = columns or {}, replace(settings, **(columns or {}))
    if _of_events(known, folder):
        _leave_out(given, f"{folder} holds recordings by class")
        count = (None, None) if known is not None else trained_on
        recorded = _recorded(name, known)
        data = load_events(folder, events, limit=limit, device=device, spec=recorded, trained_on=count, test=True)
        if known is not None or not classes:
            return data
        meant = Classes(list(classes)).of(data.class_names, str(folder))
        labels = [meant.label(label) for label in data.labels.tolist()]
        return replace(data, labels=torch.tensor(labels, device=device), class_names=meant.names)
    if folder is None and known is not None and known.hub_id is None:
        _leave_out(given, f"the {name} lie in memory as they are")
        return _digits(known, limit, 0)[1].to(device)
    place = _place(name, known, folder, settings, streaming)
    found = _test(place, known, settings)
    source, split = found or (_train(place, known, settings), "all")
    where = f"{split} of {place.origin}"
    _check_columns(given, [source], place)
    if known is None:
        meant = Classes.known(classes, source.names, source.labels, where)
    else:
        meant = _known_classes(known, source.names, where)
        meant = Classes(list(classes)).of(source.names, where) if set(meant.names) == set(classes) else meant
    count, train_limit, train_name = int(source.blocks()[:, 3].sum()), trained_on[1], settings.train_split or "train"
    whole = trained_on[0] not in (None, min(count, train_limit or count)) and not place.find(train_name)
    if found or whole:
        return _read(spec, source, meant, split if found else where, where, limit, streaming).to(device)
    held = hold_out(_read(spec, source, meant, "train", where, train_limit, streaming), settings.hold_out)[1]
    held = replace(held, split=held.split + CHOOSES)
    return (held if limit is None else held.chosen(np.arange(min(limit, len(held))))).to(device)


def hold_out(
    train: ImageSet | StreamSet | EventSet, share: float, seed: int = 0
) -> tuple[ImageSet | StreamSet | EventSet, ImageSet | StreamSet | EventSet]:
    """Keep a stratified part of a training set apart: what is left to train on, and the part, for choosing or testing.

    Of each class the share is rounded, at least one image is taken and one is left; `seed` draws which. ValueError for
    a share outside 0..1, and for a class with a single image.
    """
    if not 0 < share < 1:
        raise ValueError(f"hold_out is a share and must lie between 0 and 1, got {share}")
    labels = np.asarray(train.labels() if isinstance(train, StreamSet) else train.labels.cpu())
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) < 2 and label >= 0:
            raise ValueError(
                f"class {train.class_names[label]!r} has a single image, of which none can be held out: add images, or "
                "test on a split of its own without --hold-out"
            )
        count = min(max(round(share * len(own)), 1), len(own) - 1)
        held[np.random.default_rng((seed, int(label) + 1)).permutation(own)[:count]] = True
    part = f"{share:.3g} {HELD_OUT} {seed}"
    return train.chosen(np.flatnonzero(~held)), replace(train.chosen(np.flatnonzero(held)), split=part)


def keep_apart(
    train: ImageSet | StreamSet | EventSet, test: ImageSet | StreamSet | EventSet, share: float | None
) -> tuple[ImageSet | StreamSet | EventSet, ImageSet | StreamSet | EventSet | None]:
    """What is left to train on, and a share of the training set that may choose an epoch.

    None without a share, and where `load_data` has held out what is tested on: there is one such part.
    """
    return (train, None) if share is None or is_held_out(test) else hold_out(train, share)


def make_batches(
    data: ImageSet | StreamSet | EventSet, batch_size: int, *, train: bool, **options: int | Augment | None
) -> Batches | StreamBatches | EventBatches:
    """Batches of what `load_data` returns, of the kind that fits it; all kinds are used alike.

    `options`: seed, rank, world, augment and workers, see `empf.data.batches.ImageBatches`.
    """
    kind = StreamBatches if isinstance(data, StreamSet) else EventBatches if isinstance(data, EventSet) else Batches
    return kind(data, batch_size, train=train, **options)


def _known(
    name: str, path: str | Path | None, images: ImageSettings | None, limit: int | None
) -> tuple[DataSpec | None, ImageSettings, Path | None]:
    """What a name and a path stand for: a known data set or None, the settings of images, and the folder, if any."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}: leave it out to use all images")
    spec = DATASETS.get(name)
    folder = Path(path) if path is not None else Path(name) if spec is None and Path(name).is_dir() else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: check the path given with --data")
    if spec is None and folder is None and (not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or Path(name).exists()):
        if "/" in name or Path(name).exists():
            raise FileNotFoundError(f"no folder {name}: check the path given with --dataset")
        raise ValueError(
            f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}, a folder, or OWNER/NAME of the Hub"
        )
    if spec is not None and spec.channels == 2 and folder is None:
        raise ValueError(f"{name} is not on the Hugging Face Hub: pass the folder of its recordings with --data")
    return spec, images or ImageSettings(), folder


def _leave_out(given: Iterable[str], why: str) -> None:
    """Raise ValueError where something was given that nothing would heed."""
    if flags := [f"--{name.replace('_', '-')}" for name in given]:
        raise ValueError(f"{why}: leave {' and '.join(flags)} out")


def _check_columns(given: Iterable[str], sources: Sequence[Source], place: Place) -> None:
    if any(isinstance(source, ImageFiles) and source.names is not None for source in sources):
        _leave_out([name for name in given if name in COLUMNS], f"{place.origin} has a folder for each class")


def _of_events(spec: DataSpec | None, folder: Path | None) -> bool:
    return folder is not None and has_recordings(folder) if spec is None else spec.channels == 2


def _recorded(name: str, spec: DataSpec | None) -> DataSpec:
    return spec or replace(DATASETS["dvs-cifar10"], name=name, flip=False)


def _place(name: str, spec: DataSpec | None, folder: Path | None, settings: ImageSettings, streaming: bool) -> Place:
    columns = Columns(settings.image_column, settings.label_column)
    if folder is not None:
        return in_folder(folder, columns, settings.config)
    hub_id, by_file = (name, streaming) if spec is None else (spec.hub_id, streaming or spec.streamed)
    return on_hub(hub_id, columns, settings.config, streaming=streaming, by_file=by_file)


def _train(place: Place, spec: DataSpec | None, settings: ImageSettings) -> Source:
    """What to train on: the split of the name, or what is not divided."""
    named = settings.train_split
    found = place.find(named or TRAIN_SPLITS[0])
    train = found() if found else place.whole() if spec is None and named is None else None
    if train is None:
        raise place.missing(named or TRAIN_SPLITS[0])
    _check_not_empty(train, f"train of {place.origin}")
    return train


def _test(place: Place, spec: DataSpec | None, settings: ImageSettings) -> tuple[Source, str] | None:
    """What to test on, and its name; None where there is nothing."""
    names = TEST_SPLITS if spec is None else spec.test_splits
    names = names if settings.test_split is None else (settings.test_split,)
    tests = [(name, found) for name in names if name != settings.train_split and (found := place.find(name))]
    for at, (name, found) in enumerate(tests):
        test = found()
        _check_not_empty(test, f"{name} of {place.origin}")
        unlabelled = (spec is None or len(tests) > 1) and all(is_missing(plain(label)) for label in test.labels())
        if not unlabelled:
            return test, name
        if settings.test_split is not None:
            raise ValueError(f"{name} of {place.origin} has no labels: name another split with --test-split")
        instead = tests[at + 1][0] if at + 1 < len(tests) else "images that are held out of the training set"
        warnings.warn(
            f"{name} of {place.origin} has no labels: testing on {instead}; --test-split decides", stacklevel=3
        )
    if spec is not None or settings.test_split is not None:
        raise place.missing(names[0])
    return None


def _digits(spec: DataSpec, limit: int | None, seed: int) -> tuple[ImageSet, ImageSet]:
    """The 1,797 digits of scikit-learn, 80/20 within each class; values 0..16 become round(v * 255 / 16)."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'empf[demo]'") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # [N, 1, 8, 8]
    labels = digits.target.astype(np.int64)
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    names = [str(name) for name in digits.target_names]
    train, test = (
        ImageSet(torch.from_numpy(images[r[:limit]]), torch.from_numpy(labels[r[:limit]]), names, spec) for r in rows
    )
    return train, test


def _check_not_empty(source: Source, origin: str) -> None:
    if len(source.blocks()) == 0:
        raise ValueError(f"no images in {origin}: check the folder")


def _known_classes(spec: DataSpec, names: list[str] | None, origin: str) -> Classes:
    if names is None:
        return Classes([str(label) for label in range(spec.num_classes)])
    if len(names) != spec.num_classes:
        raise ValueError(f"{origin} has {len(names)} classes, but {spec.name} has {spec.num_classes}: check --dataset")
    return Classes(names)


def _read(
    spec: DataSpec, source: Source, classes: Classes, split: str, origin: str, limit: int | None, streaming: bool
) -> ImageSet | StreamSet:
    """A split, in memory or to be read while it is used."""
    many = source.blocks()[:, 3].sum() * spec.channels * np.prod(spec.size) > IN_MEMORY
    if streaming or spec.streamed or spec.resized or many and spec.name not in DATASETS:
        data = StreamSet(source, source.blocks(), classes, spec, split=split)
        return data if limit is None else data.limited(limit)
    return _decoded(spec, source, classes, limit, split, origin)


def _decoded(spec: DataSpec, source: Source, classes: Classes, limit: int | None, split: str, origin: str) -> ImageSet:
    """Decode into one array, and check every image and label against `spec`."""
    blocks = source.blocks()
    order = np.arange(blocks[:, 3].sum()) if limit is None else np.array(_limited(source.labels(), limit))
    images, labels = np.empty((len(order), spec.channels, *spec.size), np.uint8), np.empty(len(order), np.int64)
    places = np.argsort(order)
    rows = read_rows(source, blocks, order[places])
    for place, (_, row) in zip(places.tolist(), rows, strict=True):
        if row.problem is not None:
            raise ValueError(f"cannot read {row.where} ({row.problem}): copy the file again")
        where = f"image {place} of {origin}"
        if (label := classes.label(row.label)) is None:
            raise ValueError(
                f"{where} has the label {row.label!r}, but {spec.name} has {classes.expected()}: check --dataset"
            )
        labels[place], images[place] = label, _pixels(spec, row, where)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes.names, spec, split)


def _limited(labels: list[Any], limit: int) -> list[int]:
    """The first `limit` rows; of rows that are sorted by class, the first ones of each class in turn."""
    runs = [label for at, label in enumerate(labels) if at == 0 or label != labels[at - 1]]
    if len(runs) > len(set(runs)):
        return list(range(min(limit, len(labels))))
    turns: dict[Any, int] = dict.fromkeys(runs, 0)
    order = []
    for at, label in enumerate(labels):
        order.append((turns[label], at))
        turns[label] += 1
    return [at for _, at in sorted(order)[:limit]]


def _pixels(spec: DataSpec, row: Row, where: str) -> np.ndarray:
    """The image of a row as uint8 [C, H, W]."""
    if row.image is not None and row.image["path"] is not None:
        where += f" ({row.image['path']})"
    try:
        with open_image(row.image) as image:
            problem = mismatch(spec, image)  # before the pixels are decoded: a broken header may announce gigabytes
            pixels = None if problem else stored_pixels(image, spec.channels)
    except BROKEN as error:
        raise ValueError(f"cannot decode {where} ({one_line(error)}): replace or remove it") from error
    if problem:
        raise ValueError(f"{where} {problem}")
    return pixels
