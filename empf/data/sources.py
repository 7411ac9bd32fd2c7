"""Where the encoded images of a split lie, and reading them a block at a time.

    ParquetFiles   empf/data/shards.py
    ImageFiles     files on disk: a folder for each class, or a CSV file with their names
    SavedRows      a data set of Hugging Face `datasets`, in memory or mapped from what `save_to_disk` wrote

All are a `Source`, see `empf/data/rows.py`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv

from empf.data.folders import IMAGE_SUFFIXES, files_below, subfolders
from empf.data.rows import Row, one_line
from empf.data.shards import check_image_column

SAVED_ROWS = 64  # in a block of a saved data set

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels", "target", "cls", "coarse_label")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "img")


@dataclass(frozen=True)
class Columns:
    """The names of the image and the label column, where they are not the usual ones."""

    image: str | None = None
    label: str | None = None

    def find(self, names: list[str], origin: str, images: tuple[str, ...] = IMAGE_COLUMNS) -> tuple[str, str]:
        """Which of the columns of `origin` hold image and label; ValueError where there are none."""
        found = []
        for given, usual in ((self.image, images), (self.label, LABEL_COLUMNS)):
            wanted = (given,) if given is not None else usual
            found.append(next((name for name in wanted if name in names), None))
        if None in found:
            image, label = self.image or " | ".join(images), self.label or " | ".join(LABEL_COLUMNS)
            raise ValueError(
                f"{origin} has the columns {', '.join(names)}: it needs one of {image} for the image and one of "
                f"{label} for the label; name them with --image-column and --label-column"
            )
        return found[0], found[1]


@dataclass(frozen=True)
class ImageFiles:
    """Image files below `folder`; `files` are their paths as bytes, to save memory, `stored` their labels."""

    folder: str
    files: np.ndarray
    stored: np.ndarray
    names: list[str] | None

    @classmethod
    def of_folder(cls, folder: Path) -> "ImageFiles":
        """A folder for each class, one file of each class in turn, so that the first are of all classes."""
        names = [child.name for child in subfolders(folder)]
        of_class = [sorted(os.fsencode(f) for f in files_below(folder / name, IMAGE_SUFFIXES)) for name in names]
        label = np.repeat(np.arange(len(names)), [len(files) for files in of_class])
        turn = np.concatenate([np.arange(len(files)) for files in of_class]) if names else np.arange(0)
        paths = [os.fsencode(name) + b"/" + file for name, files in zip(names, of_class, strict=True) for file in files]
        order = np.lexsort((label, turn))
        return cls(str(folder), np.array(paths, np.bytes_)[order], label[order], names)

    @classmethod
    def of_csv(cls, file: Path, columns: Columns) -> "ImageFiles":
        """A table with the names of the files, relative to its folder, and their labels."""
        try:
            table = pyarrow.csv.read_csv(file)
        except pa.ArrowException as error:
            raise ValueError(f"cannot read {file} ({one_line(error)}): write it as comma-separated values") from error
        image, label = columns.find(table.column_names, str(file), FILE_COLUMNS)
        paths = [os.fsencode(str(name)) for name in table[image].to_pylist()]
        labels = np.empty(len(paths), object)
        labels[:] = table[label].to_pylist()
        return cls(str(file.parent), np.array(paths, np.bytes_), labels, None)

    def blocks(self) -> np.ndarray:
        blocks = np.zeros((len(self.files), 4), np.int64)
        blocks[:, 0], blocks[:, 3] = np.arange(len(self.files)), 1
        return blocks

    def labels(self) -> list[Any]:
        return self.stored.tolist()

    def read(self, number: int, group: int, first: int, start: int, stop: int) -> Iterator[Row]:
        path = os.path.join(self.folder, os.fsdecode(bytes(self.files[number])))
        label = self.stored[number]
        yield Row(path, {"bytes": None, "path": path}, label.item() if isinstance(label, np.generic) else label)


@dataclass(frozen=True)
class SavedRows:
    """The rows of a data set of the library `datasets`; `origin`: how it is called."""

    rows: datasets.Dataset
    image: str
    label: str
    names: list[str] | None
    origin: str

    @classmethod
    def of(cls, rows: datasets.Dataset, columns: Columns, origin: str) -> "SavedRows":
        image, label = columns.find(rows.column_names, origin)
        feature = rows.features[label]
        rows = rows.select_columns([image, label]).with_format("arrow")
        check_image_column(rows.features.arrow_schema.field(image).type, image)
        return cls(rows, image, label, feature.names if isinstance(feature, datasets.ClassLabel) else None, origin)

    def blocks(self) -> np.ndarray:
        first = np.arange(0, len(self.rows), SAVED_ROWS)
        rows = np.minimum(len(self.rows) - first, SAVED_ROWS)
        return np.stack((np.zeros_like(first), np.zeros_like(first), first, rows), axis=1)

    def labels(self) -> list[Any]:
        return self.rows.with_format(None)[self.label][:]

    def read(self, number: int, group: int, first: int, start: int, stop: int) -> Iterator[Row]:
        table = self.rows[first + start : first + stop]
        images, labels = (table[name].to_pylist() for name in (self.image, self.label))
        for at, (image, label) in enumerate(zip(images, labels, strict=True), first + start):
            yield Row(f"image {at} of {self.origin}", image, label)
