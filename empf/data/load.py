"""Reading image datasets from the Hub or a local folder.

Sets that fit in memory become one uint8 tensor, decoded once (`ImageSet`); of the others (`StreamSet`) only the place
of each image is read, see `empf/data/shards.py`. Events are read by `empf/data/events.py`.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import HfFileSystem, hf_hub_download
from PIL import Image
from torch import Tensor

from empf.data.batches import Augment, Batches
from empf.data.event_frames import EventSettings
from empf.data.events import EventAugment, EventBatches, EventSet, load_events
from empf.data.images import BROKEN, converted, is_grey, one_line, open_image
from empf.data.sets import DATASETS, DataSpec, ImageSet
from empf.data.shards import ImageFolder, ParquetFiles, StreamSet, read_schema
from empf.data.streaming import StreamBatches

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("fine_label", "label")
_SPLITS = ("train", "test")


def load_data(
    name: str,
    path: str | Path | None = None,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    streaming: bool = False,
    events: EventSettings | None = None,
) -> tuple[ImageSet, ImageSet] | tuple[StreamSet, StreamSet] | tuple[EventSet, EventSet]:
    """The training and the test set of a dataset of `DATASETS`, for `make_batches` on `device`.

    Without `path` the dataset comes from the Hugging Face Hub (the digits from scikit-learn). `path` is a local folder
    with the same columns: parquet files (`train-*.parquet`, `train/*.parquet`), an image folder (`train/<class>/*.png`)
    or, for sets that fit in memory, what `save_to_disk` wrote. The test split may also be called validation, valid or
    val. Grey images become RGB where the dataset has three channels.

    Images are decoded once and lie on `device`, but for imagenet1k, which is read while it is used, from local files or
    from the Hub: with `streaming` over the network all the time, without it after one download of 150 GB.

    `limit` keeps so many images of each split; the others are not decoded. Where the classes follow one another, as in
    an image folder and in Tiny-ImageNet, it takes one image of each class in turn, so that all classes are seen; where
    they are mixed, the first images. Of imagenet1k it takes the first of about 100 row groups.

    `seed` draws the stratified 80/20 split of the digits. It is not the seed of a training run: results on the digits
    compare only at the same split, so leave it alone.

    dvs-cifar10 needs a `path` with recordings; `events` says how they become frames, see `load_events`.

    Raises ValueError or FileNotFoundError with one sentence that says what is wrong and what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}: leave it out to use all images")
    spec = DATASETS[name]
    if streaming and not spec.streamed:
        raise ValueError(f"{name} fits in memory and is not streamed: leave --streaming out")
    if name == "dvs-cifar10":
        if path is None:
            raise ValueError(
                "dvs-cifar10 is not on the Hugging Face Hub: pass the folder of its recordings with --data"
            )
        return load_events(path, events, limit=limit, device=device, seed=seed)
    if path is None and spec.hub_id is None:
        return tuple(part.to(device) for part in _digits(spec, limit, seed))
    origin = str(path or spec.hub_id)
    if spec.streamed:
        find = partial(_find, Path(path)) if path is not None else partial(_find_on_hub, _hub_files(spec), streaming)
        train, test = (_stream(spec, find(spec, part), limit, f"{part} of {origin}") for part in _SPLITS)
    else:
        read = partial(_read_folder, Path(path)) if path is not None else partial(_read_splits, _download(spec), origin)
        train, test = (_decode(spec, read(spec, part, limit), f"{part} of {origin}") for part in _SPLITS)
    if train.class_names != test.class_names:
        raise ValueError(f"train and test of {origin} name their classes differently: use the same classes in both")
    return train.to(device), test.to(device)


def make_batches(
    data: ImageSet | StreamSet | EventSet,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    augment: Augment | None = None,
    workers: int = 0,
) -> Batches | StreamBatches | EventBatches:
    """Batches of what `load_data` returns, of the kind that fits it; all kinds are used alike.

    `workers`: processes that read and decode a set that does not lie in memory. Of `augment`, events take `crop`,
    `flip`, `roll` and `label_smoothing`, images all but `roll`; ValueError where it asks for the others.
    """
    options = dict(train=train, seed=seed, rank=rank, world=world, augment=augment)
    if isinstance(data, ImageSet | StreamSet) and augment is not None and augment.roll:
        raise ValueError("roll is for events, not for images: set it to 0")
    if isinstance(data, ImageSet):
        return Batches(data, batch_size, **options)
    if isinstance(data, StreamSet):
        return StreamBatches(data, batch_size, workers=workers, **options)
    if augment is not None:
        wrong = [name for name in ("cutout", "mixup", "cutmix") if getattr(augment, name)]
        if wrong:
            raise ValueError(f"{' and '.join(wrong)} are for images, not for events: set them to 0")
        crop = data.spec.crop_padding if augment.crop else 0
        kept = dict(flip=augment.flip, roll=augment.roll, label_smoothing=augment.label_smoothing)
        options["augment"] = EventAugment(crop=crop, **kept)
    return EventBatches(data, batch_size, **options)


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


@dataclass(frozen=True)
class _Encoded:
    """Images still compressed, as `{"bytes": ..., "path": ...}` with either of them set."""

    images: list[dict[str, Any]]
    labels: list[Any]
    class_names: list[str] | None


def _download(spec: DataSpec) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(spec.hub_id)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise _no_hub(spec, error) from error


def _hub_files(spec: DataSpec) -> dict[str, list[str]]:
    """The addresses of the parquet files of each split."""
    try:
        files = datasets.load_dataset_builder(spec.hub_id).config.data_files
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise _no_hub(spec, error) from error
    return {split: [str(file) for file in found] for split, found in files.items()}


def _no_hub(spec: DataSpec, error: Exception) -> FileNotFoundError:
    problem = one_line(error)
    if "gated" in problem or "401" in problem or "403" in problem:
        advice = (
            f"accept its terms at https://huggingface.co/datasets/{spec.hub_id}, then log in with `hf auth login` or "
            "set HF_TOKEN to a token with read access"
        )
    else:
        advice = "check the network"
    return FileNotFoundError(
        f"cannot get {spec.hub_id} from the Hugging Face Hub ({problem}): {advice}, or pass a local copy with "
        "--data FOLDER"
    )


def _find_on_hub(files: dict[str, list[str]], streaming: bool, spec: DataSpec, split: str) -> list[str]:
    """The parquet files of a split; downloaded, unless they are streamed."""
    found = files[_alias(spec, split, files, spec.hub_id)]
    if streaming:
        return found
    try:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(_fetch, found))
    except OSError as error:
        raise _no_hub(spec, error) from error


def _fetch(address: str) -> str:
    """The local copy of a file on the Hub, which is downloaded the first time."""
    at = HfFileSystem().resolve_path(address)
    return hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)


def _aliases(spec: DataSpec, split: str) -> tuple[str, ...]:
    return ("train",) if split == "train" else spec.test_splits


def _alias(spec: DataSpec, split: str, splits: Iterable[str], origin: str) -> str:
    alias = next((alias for alias in _aliases(spec, split) if alias in splits), None)
    if alias is None:
        raise ValueError(f"no {_aliases(spec, split)[0]} split in {origin}: it has {', '.join(splits)}")
    return alias


def _find(path: Path, spec: DataSpec, split: str) -> list[str] | Path:
    """The parquet files of a split, or its image folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: check the path given with --data")
    for alias in _aliases(spec, split):
        for pattern in (f"{alias}.parquet", f"{alias}-*.parquet", f"{alias}/*.parquet", f"*/{alias}-*.parquet"):
            if shards := sorted(path.glob(pattern)):
                expected = re.search(r"-of-(\d+)", shards[0].name)
                if expected and int(expected[1]) != len(shards):
                    raise ValueError(
                        f"found {len(shards)} of the {int(expected[1])} files of "
                        f"{shards[0].parent / shards[0].name.split('-')[0]}-*.parquet: copy the missing ones"
                    )
                return [str(shard) for shard in shards]
        if any(child.is_dir() for child in path.glob(f"{alias}/*")):
            return path / alias
    name = _aliases(spec, split)[0]
    saved = "" if spec.streamed else " or the output of save_to_disk"
    raise FileNotFoundError(f"no {name} split in {path}: expected {name}-*.parquet, {name}/<class>/*.png{saved}")


def _stream(spec: DataSpec, found: list[str] | Path, limit: int | None, origin: str) -> StreamSet:
    if isinstance(found, Path):
        source = ImageFolder.of(found)
        names = source.classes
    else:
        source, names = _parquet(found)
    data = StreamSet(source, source.blocks(), _checked_names(spec, names, origin), spec, torch.device("cpu"))
    if len(data) == 0:
        raise ValueError(f"no images in {origin}: check the folder")
    return data if limit is None else data.limited(limit)


def _read_folder(path: Path, spec: DataSpec, split: str, limit: int | None) -> _Encoded:
    if (path / "dataset_dict.json").is_file():
        try:
            splits = datasets.load_from_disk(path)
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"cannot read {path} ({one_line(error)}): write it again with save_to_disk") from error
        return _read_splits(splits, str(path), spec, split, limit)
    found = _find(path, spec, split)
    return _read_image_folder(found, limit) if isinstance(found, Path) else _read_parquet(found, limit)


def _read_splits(splits: datasets.DatasetDict, origin: str, spec: DataSpec, split: str, limit: int | None) -> _Encoded:
    alias = _alias(spec, split, splits, origin)
    dataset = splits[alias]
    image, label = _columns(dataset.column_names, f"{alias} of {origin}")
    dataset = dataset.select_columns([image, label]).with_format("arrow")
    if limit is not None:
        dataset = dataset.select(_limited(dataset.with_format(None)[label][:], limit))
    return _from_table(dataset[:], image, label, dataset.features)


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


def _read_parquet(paths: list[str], limit: int | None) -> _Encoded:
    """Straight from the files: `datasets` would first copy them into its cache."""
    source, names = _parquet(paths)
    blocks = source.blocks()
    ends = blocks[:, 3].cumsum()
    rows = list(range(ends[-1])) if limit is None else _limited(source.labels(), limit)
    wanted = np.zeros(ends[-1], bool)
    wanted[rows] = True
    found = {}
    for block, end in zip(blocks, ends, strict=True):
        begin = int(end - block[3])
        inside = np.flatnonzero(wanted[begin:end])
        if len(inside):
            start, stop = int(inside[0]), int(inside[-1]) + 1
            for at, row in enumerate(source.read(*block[:3], start, stop), begin + start):
                if row.problem is not None:
                    raise ValueError(f"cannot read {row.where} ({row.problem}): copy the file again")
                found[at] = row
    return _Encoded([found[at].image for at in rows], [found[at].label for at in rows], names)


def _parquet(paths: list[str]) -> tuple[ParquetFiles, list[str] | None]:
    """Files with the columns of the first one, and the names of the classes."""
    schema = read_schema(paths[0])
    image, label = _columns(schema.names, paths[0])
    _check_image_column(schema.field(image).type, image)
    return ParquetFiles(paths, image, label), _class_names(datasets.Features.from_arrow_schema(schema), label)


def _check_image_column(kind: pa.DataType, column: str) -> None:
    if not pa.types.is_struct(kind) or {"bytes", "path"} - {field.name for field in kind}:
        raise ValueError(f"column {column} holds {kind}: store the images as datasets.Image")


def _class_names(features: datasets.Features, label: str) -> list[str] | None:
    return features[label].names if isinstance(features[label], datasets.ClassLabel) else None


def _checked_names(spec: DataSpec, names: list[str] | None, origin: str) -> list[str]:
    if names is None:
        return [str(label) for label in range(spec.num_classes)]
    if len(names) != spec.num_classes:
        raise ValueError(f"{origin} has {len(names)} classes, but {spec.name} has {spec.num_classes}: check --dataset")
    return names


def _read_image_folder(folder: Path, limit: int | None) -> _Encoded:
    source = ImageFolder.of(folder)
    rows = [row for block in source.blocks()[:limit] for row in source.read(*block[:3], 0, 1)]
    return _Encoded([row.image for row in rows], [row.label for row in rows], source.classes)


def _from_table(table: pa.Table, image: str, label: str, features: datasets.Features) -> _Encoded:
    _check_image_column(table[image].type, image)
    return _Encoded(table[image].to_pylist(), table[label].to_pylist(), _class_names(features, label))


def _columns(names: list[str], origin: str) -> tuple[str, str]:
    """The names of the image and the label column."""
    found = [next((a for a in aliases if a in names), None) for aliases in (_IMAGE_COLUMNS, _LABEL_COLUMNS)]
    if None in found:
        raise ValueError(
            f"{origin} has the columns {', '.join(names)}: it needs one of {' | '.join(_IMAGE_COLUMNS)} for the image "
            f"and one of {' | '.join(_LABEL_COLUMNS)} for the label"
        )
    return found[0], found[1]


def _decode(spec: DataSpec, encoded: _Encoded, origin: str) -> ImageSet:
    """Decode into one array, and check every image and label against `spec`."""
    count = len(encoded.images)
    if count == 0:
        raise ValueError(f"no images in {origin}: check the folder")
    names = _checked_names(spec, encoded.class_names, origin)
    labels = _check_labels(spec, encoded.labels, origin)
    images = np.empty((count, spec.channels, spec.image_size, spec.image_size), np.uint8)
    for index, image in enumerate(encoded.images):  # threads were slower here: small images hold the interpreter lock
        images[index] = _decode_image(spec, image, f"image {index} of {origin}")
    return ImageSet(torch.from_numpy(images), labels, names, spec)


def _check_labels(spec: DataSpec, labels: list[Any], origin: str) -> Tensor:
    for index, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < spec.num_classes:
            raise ValueError(
                f"image {index} of {origin} has the label {label!r}, but {spec.name} has the labels "
                f"0..{spec.num_classes - 1}: check --dataset"
            )
    return torch.tensor(labels, dtype=torch.int64)


def _decode_image(spec: DataSpec, item: dict[str, Any] | None, where: str) -> np.ndarray:
    """The image as uint8 [C, H, W]."""
    if item is not None and item["path"] is not None:
        where += f" ({item['path']})"
    try:
        with open_image(item) as image:
            problem = _mismatch(spec, image)  # before the pixels are decoded: a broken header may announce gigabytes
            pixels = None if problem else np.asarray(converted(image, spec.channels))  # H W (3)
    except BROKEN as error:
        raise ValueError(f"cannot decode {where} ({one_line(error)}): replace or remove it") from error
    if problem:
        raise ValueError(f"{where} {problem}")
    return pixels[None] if spec.channels == 1 else pixels.transpose(2, 0, 1)


def _mismatch(spec: DataSpec, image: Image.Image) -> str | None:
    side = spec.image_size
    if image.size != (side, side):
        width, height = image.size
        return f"is {width}x{height} pixels, but {spec.name} has {side}x{side}: check --dataset"
    if spec.channels == 1 and not is_grey(image):
        return f"has the pixel format {image.mode}, but {spec.name} needs 8-bit grey: convert it"
    return None
