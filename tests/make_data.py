"""Tiny datasets of random pixels on disk, in the layouts that `empf.data.load` reads."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from empf.data import DATASETS


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
