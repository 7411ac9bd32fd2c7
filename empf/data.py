"""Image datasets that fit in memory, decoded once, and batches augmented whole on the device where they lie.

    images   [N, C, H, W]   uint8     as stored, resident on the device
    labels   [N]            int64
    batch    [B, C, H, W]   float32   (pixel/255 - mean) / std
    targets  [B]            int64, or [B, classes] float32 when labels are smoothed or mixed

`load` reads the Hub or a local folder; `Batches` orders, augments and shares the images among processes.
Mixup: arXiv 1710.09412; CutMix: arXiv 1905.04899; Cutout: arXiv 1708.04552.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class DataSpec:
    """What a dataset must look like (`channels`, `image_size`, `num_classes`) and how it is prepared for training.

    `mean` and `std` per channel are for pixels scaled to 0..1. `flip`: a mirrored image keeps its class.
    `crop_padding`: pixels a random crop may shift the image by.
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


# Mean and std: digits and cifar100 computed over all pixels of their training images, cifar10 the values in common use,
# imagenet200 those of ImageNet-1k.
DATASETS = {
    spec.name: spec
    for spec in (
        DataSpec("digits", None, 1, 8, 10, (0.3054,), (0.3760,), False, 1),
        DataSpec("cifar10", "uoft-cs/cifar10", 3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, 4),
        DataSpec(
            "cifar100", "uoft-cs/cifar100", 3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, 4
        ),
        DataSpec(
            "imagenet200", "zh-plus/tiny-imagenet", 3, 64, 200, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True, 8
        ),
    )
}
_NOT_YET = {
    "imagenet1k": "does not fit in memory and will be streamed in a later version",
    "dvs-cifar10": "holds events, which a later version will read",
}

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("fine_label", "label")
_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # naming them halves the time to decode a small image
# Modes that turn into grey or RGB without loss of what counts; 16-bit and float pictures would be clipped.
_MODES = {1: {"1", "L", "LA"}, 3: {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}}


@dataclass(frozen=True)
class ImageSet:
    """A whole split: `images` uint8 [N, C, H, W] and `labels` int64 [N] on one device, `class_names` by label."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str | torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names, self.spec)


def load(
    name: str,
    path: str | Path | None = None,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of a dataset of `DATASETS`, decoded once and moved to `device`.

    Without `path` the dataset comes from the Hugging Face Hub (the digits from scikit-learn). `path` is a local folder
    with the same columns: parquet files (`train-*.parquet`, `train/*.parquet`), an image folder (`train/<class>/*.png`)
    or what `save_to_disk` wrote. The test split may also be called validation, valid or val. Grey images become RGB
    where the dataset has three channels.

    `limit` keeps the first `limit` images of each split; the others are not decoded. An image folder is listed one
    image of each class in turn, so that its first images are of all classes.

    `seed` draws the stratified 80/20 split of the digits. It is not the seed of a training run: results on the digits
    compare only at the same split, so leave it alone.

    Raises ValueError or FileNotFoundError with one sentence that says what is wrong and what to do.
    """
    if name in _NOT_YET:
        raise ValueError(f"dataset {name} {_NOT_YET[name]}; available now: {', '.join(DATASETS)}")
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}: leave it out to use all images")
    spec = DATASETS[name]
    if path is None and spec.hub_id is None:
        return tuple(split.to(device) for split in _digits(spec, limit, seed))
    origin = str(path or spec.hub_id)
    read = partial(_read_folder, Path(path)) if path is not None else partial(_read_splits, _download(spec), origin)
    train, test = (_decode(spec, read(split, limit), f"{split} of {origin}") for split in _SPLITS)
    if train.class_names != test.class_names:
        raise ValueError(f"train and test of {origin} name their classes differently: use the same classes in both")
    return train.to(device), test.to(device)


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
        raise FileNotFoundError(
            f"cannot get {spec.hub_id} from the Hugging Face Hub ({_one_line(error)}): "
            "check the network, or pass a local copy with --data FOLDER"
        ) from error


def _read_folder(path: Path, split: str, limit: int | None) -> _Encoded:
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: check the path given with --data")
    if (path / "dataset_dict.json").is_file():
        try:
            splits = datasets.load_from_disk(path)
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"cannot read {path} ({_one_line(error)}): write it again with save_to_disk") from error
        return _read_splits(splits, str(path), split, limit)
    for alias in _SPLITS[split]:
        for pattern in (f"{alias}.parquet", f"{alias}-*.parquet", f"{alias}/*.parquet", f"*/{alias}-*.parquet"):
            if shards := sorted(path.glob(pattern)):
                return _read_parquet(shards, limit)
        if any(child.is_dir() for child in path.glob(f"{alias}/*")):
            return _read_image_folder(path / alias, limit)
    raise FileNotFoundError(
        f"no {split} split in {path}: expected {split}-*.parquet, {split}/<class>/*.png or the output of save_to_disk"
    )


def _read_splits(splits: datasets.DatasetDict, origin: str, split: str, limit: int | None) -> _Encoded:
    alias = next((alias for alias in _SPLITS[split] if alias in splits), None)
    if alias is None:
        raise ValueError(f"no {split} split in {origin}: it has {', '.join(splits)}")
    dataset = splits[alias]
    image, label = _columns(dataset.column_names, f"{alias} of {origin}")
    table = dataset.select_columns([image, label]).with_format("arrow")[:limit]
    return _from_table(table, image, label, dataset.features)


def _read_parquet(shards: list[Path], limit: int | None) -> _Encoded:
    """Straight from the files: `datasets` would first copy them into its cache."""
    expected = re.search(r"-of-(\d+)", shards[0].name)
    if expected and int(expected[1]) != len(shards):
        raise ValueError(
            f"found {len(shards)} of the {int(expected[1])} files of {shards[0].parent / shards[0].name.split('-')[0]}"
            "-*.parquet: copy the missing ones"
        )
    images, labels, names = [], [], None
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                columns = _columns(file.schema_arrow.names, str(shard))
                features = datasets.Features.from_arrow_schema(file.schema_arrow)
                for batch in file.iter_batches(columns=list(columns)):
                    if limit is not None and len(images) >= limit:
                        break
                    part = _from_table(batch, *columns, features)
                    images, labels, names = images + part.images, labels + part.labels, part.class_names
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ValueError(f"cannot read {shard} ({_one_line(error)}): copy the file again") from error
    return _Encoded(images[:limit], labels[:limit], names)


def _columns(names: list[str], origin: str) -> tuple[str, str]:
    """The names of the image and the label column."""
    found = [next((a for a in aliases if a in names), None) for aliases in (_IMAGE_COLUMNS, _LABEL_COLUMNS)]
    if None in found:
        raise ValueError(
            f"{origin} has the columns {', '.join(names)}: it needs one of {' | '.join(_IMAGE_COLUMNS)} for the image "
            f"and one of {' | '.join(_LABEL_COLUMNS)} for the label"
        )
    return found[0], found[1]


def _from_table(table: pa.Table | pa.RecordBatch, image: str, label: str, features: datasets.Features) -> _Encoded:
    kind = table[image].type
    if not pa.types.is_struct(kind) or {"bytes", "path"} - {field.name for field in kind}:
        raise ValueError(f"column {image} holds {kind}: store the images as datasets.Image")
    names = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
    return _Encoded(table[image].to_pylist(), table[label].to_pylist(), names)


def _read_image_folder(folder: Path, limit: int | None) -> _Encoded:
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir())
    files = []
    for label, name in enumerate(classes):
        images = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
        files += [(turn, label, file) for turn, file in enumerate(images)]
    files = sorted(files)[:limit]
    images = [{"bytes": None, "path": str(file)} for _, _, file in files]
    return _Encoded(images, [label for _, label, _ in files], classes)


def _decode(spec: DataSpec, encoded: _Encoded, origin: str) -> ImageSet:
    """Decode into one array, and check every image and label against `spec`."""
    count = len(encoded.images)
    if count == 0:
        raise ValueError(f"no images in {origin}: check the folder")
    classes = spec.num_classes if encoded.class_names is None else len(encoded.class_names)
    if classes != spec.num_classes:
        raise ValueError(f"{origin} has {classes} classes, but {spec.name} has {spec.num_classes}: check --dataset")
    labels = _check_labels(spec, encoded.labels, origin)
    images = np.empty((count, spec.channels, spec.image_size, spec.image_size), np.uint8)
    for index, image in enumerate(encoded.images):  # threads were slower here: small images hold the interpreter lock
        images[index] = _decode_image(spec, image, f"image {index} of {origin}")
    names = encoded.class_names or [str(label) for label in range(spec.num_classes)]
    return ImageSet(torch.from_numpy(images), labels, names, spec)


def _check_labels(spec: DataSpec, labels: list[Any], origin: str) -> Tensor:
    for index, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < spec.num_classes:
            raise ValueError(
                f"image {index} of {origin} has the label {label!r}, but {spec.name} has the labels "
                f"0..{spec.num_classes - 1}: check --dataset"
            )
    return torch.tensor(labels, dtype=torch.int64)


def _decode_image(spec: DataSpec, item: dict[str, Any], where: str) -> np.ndarray:
    """The image as uint8 [C, H, W]."""
    encoded, path = (item["bytes"], item["path"]) if item else (None, None)
    if encoded is None and path is None:
        raise ValueError(f"{where} is empty: remove the row")
    if path is not None:
        where += f" ({path})"
    try:
        file = path if encoded is None else io.BytesIO(encoded)
        with Image.open(file, formats=_FORMATS) as image:
            problem = _mismatch(spec, image)  # before the pixels are decoded: a broken header may announce gigabytes
            pixels = None if problem else np.asarray(image.convert("L" if spec.channels == 1 else "RGB"))  # H W (3)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {where} ({_one_line(error)}): replace or remove it") from error
    if problem:
        raise ValueError(f"{where} {problem}")
    return pixels[None] if spec.channels == 1 else pixels.transpose(2, 0, 1)


def _mismatch(spec: DataSpec, image: Image.Image) -> str | None:
    side = spec.image_size
    if image.size != (side, side):
        width, height = image.size
        return f"is {width}x{height} pixels, but {spec.name} has {side}x{side}: check --dataset"
    if image.mode not in _MODES[spec.channels]:
        kind = "8-bit grey" if spec.channels == 1 else "8-bit colour"
        return f"has the pixel format {image.mode}, but {spec.name} needs {kind}: convert it"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Augment:
    """What is done to training images, in this order. Everything is off by default.

    `crop`: shift by up to the dataset's `crop_padding` pixels, black beyond the border. `flip`: mirror left to right
    with probability 1/2, where that keeps the class. `cutout`: side in pixels of a square at a uniform centre that is
    set to the mean colour. `mixup`, `cutmix`: alpha of the Beta(alpha, alpha) that draws the share of the image itself;
    the rest comes from the image at the mirrored place of the joined batch; where both are on, each batch gets one of
    them with probability 1/2. `label_smoothing`: share of the target spread evenly over all classes.
    """

    crop: bool = False
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cutout", "mixup", "cutmix", "label_smoothing"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {self.label_smoothing}")

    @property
    def soft_targets(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.label_smoothing > 0


class Batches:
    """Batches of an `ImageSet`, as (images float32 [B, C, H, W] normalised, targets), on the device of the set.

    Training: rank r of `world` gets the r-th part of a joined batch of `batch_size * world` images, so that several
    processes see together what one process with the larger batch sees: the same images in the same order, augmented
    and mixed the same way. Everything drawn is a pure function of (seed, epoch, number of the batch), so
    `set_epoch(e)` and `iterate(start=k)` continue an interrupted epoch exactly. Targets are int64 [B], or float32
    [B, classes] if `augment` mixes images or smooths labels. The rest of the images that does not fill a joined batch
    is left out, or is one more, smaller batch with `drop_last=False`.

    Test: images in their order, not augmented, targets int64 [B]. Each rank gets one contiguous part, every image in
    exactly one of them; the parts differ by at most one image and the last batch may be smaller, so ranks may differ
    by one in their number of batches: reduce over processes after the loop, not inside it.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        augment: Augment | None = None,
        drop_last: bool = True,
    ) -> None:
        if batch_size < 1 or seed < 0 or not 0 <= rank < world:
            raise ValueError(
                f"needs batch_size >= 1, seed >= 0 and 0 <= rank < world, got {batch_size=}, {seed=}, {rank=}, {world=}"
            )
        if train and len(data) < batch_size * world and (drop_last or len(data) < world):
            raise ValueError(
                f"{len(data)} training images do not fill one batch of {batch_size * world}: "
                "use a smaller --batch-size or a larger --limit"
            )
        self.data, self.batch_size, self.train, self.seed = data, batch_size, train, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.augment = augment or Augment()
        self.epoch = 0
        mean, std = (
            torch.tensor(values, device=data.images.device)[:, None, None]  # C 1 1
            for values in (data.spec.mean, data.spec.std)
        )
        self._gain, self._shift = 1 / (255 * std), -mean / std

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this rank; the same on all ranks in training."""
        if not self.train:
            first, last = self._share(len(self.data))
            return -(-(last - first) // self.batch_size)
        full, rest = divmod(len(self.data), self.batch_size * self.world)
        return full + (not self.drop_last and rest >= self.world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from number `start` of the present epoch on."""
        if not self.train:
            first, last = self._share(len(self.data))
            for at in range(first + start * self.batch_size, last, self.batch_size):
                rows = slice(at, min(at + self.batch_size, last))
                yield self._normalise(self.data.images[rows]), self.data.labels[rows]
            return
        joined = self.batch_size * self.world
        order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(len(self.data))
        for number in range(start, len(self)):
            rng = np.random.default_rng((self.seed, self.epoch, number + 1))
            yield self._train_batch(order[number * joined : (number + 1) * joined], rng)

    def _share(self, count: int) -> tuple[int, int]:
        """First and last + 1 of this rank's part of `count` rows."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def _train_batch(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """This rank's part of the joined batch `rows`; the random numbers are drawn for the joined batch."""
        spec, augment, side = self.data.spec, self.augment, self.data.spec.image_size
        shifts = 2 * spec.crop_padding + 1
        # per image: row, crop y, crop x, flip, cutout y, cutout x; all are drawn even if unused, so that switching one
        # of them on leaves the others as they are
        drawn = rng.integers(0, (shifts, shifts, 2, side, side), (len(rows), 5))
        drawn = np.concatenate((rows[:, None], drawn), axis=1)
        first, last = self._share(len(rows))
        images, labels = self._augmented(drawn[first:last])
        targets = self._targets(labels) if augment.soft_targets else labels
        if augment.mixup == 0 and augment.cutmix == 0:
            return images, targets
        if self.world == 1:
            mates, mate_targets = images.flip(0), targets.flip(0)
        else:  # the partners lie on other ranks, where they are augmented the same way
            mates, labels = self._augmented(drawn[::-1][first:last])
            mate_targets = self._targets(labels)
        return self._mixed(images, targets, mates, mate_targets, rng)

    def _augmented(self, drawn: np.ndarray) -> tuple[Tensor, Tensor]:
        """Crop, flip, normalise and cut out the images that `drawn` [B, 6] names; with their labels."""
        spec, augment = self.data.spec, self.augment
        side, padding = spec.image_size, spec.crop_padding
        rows, y, x, flip, *hole = torch.from_numpy(drawn.T.copy()).to(self.data.images.device)
        images = self.data.images[rows]  # B C H W
        if augment.crop:
            windows = F.pad(images, (padding,) * 4).unfold(2, side, 1).unfold(3, side, 1)  # B C 2P+1 2P+1 H W
            images = windows[torch.arange(len(rows), device=rows.device), :, y, x]
        if augment.flip and spec.flip:
            images = torch.where(flip[:, None, None, None] > 0, images.flip(3), images)
        images = self._normalise(images)
        if augment.cutout:
            offset = torch.arange(side, device=rows.device) + augment.cutout // 2
            distance = [offset - centre[:, None] for centre in hole]  # B H, B W
            inside_y, inside_x = ((d >= 0) & (d < augment.cutout) for d in distance)
            images.masked_fill_((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0)
        return images, self.data.labels[rows]

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().mul_(self._gain).add_(self._shift)

    def _targets(self, labels: Tensor) -> Tensor:
        smoothing, classes = self.augment.label_smoothing, self.data.spec.num_classes
        return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes

    def _mixed(
        self, images: Tensor, targets: Tensor, mates: Tensor, mate_targets: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """One share, or one box, for the whole batch."""
        augment, side = self.augment, self.data.spec.image_size
        cutmix = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
        alpha = augment.cutmix if cutmix else augment.mixup
        share = float(rng.beta(alpha, alpha))
        if cutmix:
            half = int(side * (1 - share) ** 0.5) // 2
            centre = rng.integers(0, side, 2)
            (top, left), (bottom, right) = (centre - half).clip(0), (centre + half).clip(max=side)
            images[:, :, top:bottom, left:right] = mates[:, :, top:bottom, left:right]
            share = 1 - int((bottom - top) * (right - left)) / side**2
        else:
            images = torch.lerp(mates, images, share)
        return images, torch.lerp(mate_targets, targets, share)
