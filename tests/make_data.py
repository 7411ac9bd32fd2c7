"""Tiny datasets of random pixels, in memory and on disk in the layouts that `empf.data.load` reads."""

import io
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from empf.data.sets import DATASETS, ImageSet


def pictures(count: int, name: str, *, seed: int = 0) -> tuple[list[Image.Image], list[int]]:
    """Random images in the shape of dataset `name`; image i has the label i mod classes."""
    spec = DATASETS[name]
    shape = (count, spec.image_size, spec.image_size) + ((3,) if spec.channels == 3 else ())
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels], [i % spec.num_classes for i in range(count)]


def to_dataset(
    images: list, labels: list, name: str, *, columns: tuple[str, str] = ("img", "label"), class_label: bool = True
) -> datasets.Dataset:
    """Rows in memory; `images` are PIL images or `{"bytes": ..., "path": ...}`."""
    names = [f"class{i:03}" for i in range(DATASETS[name].num_classes)]
    label = datasets.ClassLabel(names=names) if class_label else datasets.Value("int64")
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: label})
    return datasets.Dataset.from_dict(dict(zip(columns, (images, labels), strict=True)), features=features)


def parquet_folder(folder: Path, name: str, *, train: int = 40, test: int = 20) -> Path:
    """`train-*.parquet` in two files and `test-*.parquet`; seed 0 for the training pixels, 1 for the test pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = to_dataset(*pictures(train, name), name)
    for shard in range(2):
        rows.shard(2, shard, contiguous=True).to_parquet(folder / f"train-{shard:05}-of-00002.parquet")
    to_dataset(*pictures(test, name, seed=1), name).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def image_folder(folder: Path, name: str, *, train: int = 40, test: int = 20) -> Path:
    """`train/<class>/*.png` and `test/<class>/*.png` of the same pixels as `parquet_folder`."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        for index, (image, label) in enumerate(zip(*pictures(count, name, seed=seed), strict=True)):
            file = folder / split / f"class{label:03}" / f"{index:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return folder


def disk_folder(folder: Path, name: str, *, train: int = 40, test: int = 20) -> Path:
    """What `save_to_disk` writes, of the same pixels as `parquet_folder`."""
    splits = {"train": pictures(train, name), "test": pictures(test, name, seed=1)}
    datasets.DatasetDict({split: to_dataset(*rows, name) for split, rows in splits.items()}).save_to_disk(folder)
    return folder


def random_set(count: int, name: str = "cifar10", seed: int = 0) -> ImageSet:
    """In memory; all pixels > 0, so that the black border of a crop can be told from the image."""
    spec = DATASETS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (count, spec.channels, spec.image_size, spec.image_size)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(spec.num_classes, (count,), generator=generator)
    return ImageSet(images, labels, [str(i) for i in range(spec.num_classes)], spec)


def normalised(images: torch.Tensor, name: str = "cifar10") -> torch.Tensor:
    """(pixel/255 - mean) / std of uint8 [..., C, H, W], in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (DATASETS[name].mean, DATASETS[name].std))
    return (images.double() / 255 - mean) / std


def stored(batch: torch.Tensor, name: str = "cifar10") -> torch.Tensor:
    """The uint8 pixels of a normalised batch."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (DATASETS[name].mean, DATASETS[name].std))
    exact = (batch.double() * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().to(torch.uint8)


def assert_same(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for (images, targets), (expected_images, expected_targets) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(targets, expected_targets)


STREAMED = replace(DATASETS["imagenet1k"], name="streamed", image_size=24, num_classes=400)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def plain_picture(label: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Of one colour that tells the label, up to 400."""
    return Image.new("RGB", size, (40 + label % 20 * 10, 40 + label // 20 * 10, 128))


def stream_folder(folder: Path, counts: dict[str, list[int]], *, row_group: int = 7) -> Path:
    """Parquet files of plain pictures, `counts[split]` images in each; image i of a split has the label i."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, shards in counts.items():
        label = 0
        for shard, count in enumerate(shards):
            labels = list(range(label, label := label + count))
            rows = {"image": [encoded(plain_picture(i)) for i in labels], "label": labels}
            file = folder / f"{split}-{shard:05}-of-{len(shards):05}.parquet"
            datasets.Dataset.from_dict(rows, features=features).to_parquet(file, batch_size=row_group)
    return folder


def stream_files(folder: Path, items: list, labels: list | None = None, *, row_group: int = 7) -> Path:
    """A set to be streamed with these images, the same for training and for testing; image i has the label i."""
    labels = list(range(len(items))) if labels is None else labels
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": items, "label": labels}, features=features)
    for split in ("train", "validation"):
        rows.to_parquet(folder / f"{split}.parquet", batch_size=row_group)
    return folder


# ---- images of one's own

CLASSES = ("ant", "bee", "cat")
LAYOUTS = ("folders", "parquet", "saved", "table")
SIZES = {
    "square": [(16, 16)],
    "wide": [(12, 20)],
    "mixed": [(16, 16), (20, 24)],
    "photos": [(64, 64), (96, 80)],
}  # height, width


def picture(label: int, number: int, size: tuple[int, int], grey: bool = False) -> Image.Image:
    shape = size if grey else (*size, 3)
    return Image.fromarray(np.random.default_rng((label, number)).integers(0, 256, shape, dtype=np.uint8))


def items(count: int, sizes: str, grey: bool = False) -> list[tuple[str, Image.Image]]:
    """(class, picture) of `count` pictures of each class, one of each class in turn."""
    pictures = [(n, label, SIZES[sizes][n % len(SIZES[sizes])]) for n in range(count) for label in range(3)]
    return [(CLASSES[label], picture(label, n, size, grey)) for n, label, size in pictures]


def rows_of(pictures: list, labels: str = "names") -> datasets.Dataset:
    names = list(CLASSES)
    stored = {
        "names": ([names.index(name) for name, _ in pictures], datasets.ClassLabel(names=names)),
        "strings": ([name for name, _ in pictures], datasets.Value("string")),
        "floats": ([float(names.index(name)) for name, _ in pictures], datasets.Value("float32")),
    }[labels]
    features = datasets.Features({"image": datasets.Image(), "label": stored[1]})
    rows = {"image": [image for _, image in pictures], "label": stored[0]}
    return datasets.Dataset.from_dict(rows, features=features)


def write(folder: Path, layout: str, splits: dict[str, list], labels: str = "names") -> Path:
    """`splits`: (class, picture) of each; "" is a set that is not divided."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "saved":
        rows = {split: rows_of(pictures, labels) for split, pictures in splits.items()}
        (rows[""] if "" in rows else datasets.DatasetDict(rows)).save_to_disk(folder)
        return folder
    for split, pictures in splits.items():
        if layout == "parquet":
            rows_of(pictures, labels).to_parquet(folder / f"{split or 'all'}.parquet", batch_size=5)
            continue
        lines = ["file_name,label"]
        for number, (name, image) in enumerate(pictures):
            file = (
                folder / split / name / f"{number:04}.png" if layout == "folders" else folder / f"{split}{number}.png"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            lines.append(f"{file.name},{name}")
        if layout == "table":
            (folder / f"{split or 'labels'}.csv").write_text("\n".join(lines) + "\n")
    return folder


def labels_of(made) -> list[int]:
    """The labels of all batches."""
    return torch.cat([labels for _, labels in made] or [torch.empty(0)]).tolist()
