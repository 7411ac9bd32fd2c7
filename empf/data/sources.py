"""Where the encoded images and labels of a split lie, and reading them a block at a time.

ParquetFiles   parquet files, local or remote, a row group at a time
ImageFiles     files on disk: a folder for each class, or a CSV file with their names
SavedRows      a data set of Hugging Face `datasets`, in memory or mapped from what `save_to_disk` wrote
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from empf.data.folders import IMAGE_SUFFIXES, UNREAD_SUFFIXES, files_below, subfolders
from empf.data.rows import Row, one_line

if TYPE_CHECKING:  # elsewhere it is imported where it is used: that takes a second
    import datasets

_READ_BYTES = 1 << 20  # of a column at once, so that a row group of a gigabyte does not have to fit in memory
_READ_BYTES_REMOTE = 8 << 20
_BATCH_ROWS = 16  # that are in memory at once as Python objects
SAVED_ROWS = 64  # in a block of a saved data set

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels", "target", "cls", "coarse_label")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "img")


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files, local or at an address of fsspec, that hold images in one column and labels in another.

    `names`: of the classes, where the first file gives them. Another file may have them in another order: `labels_of`
    maps the labels of such a file to those of the first. `groups`: the row groups of all files.
    """

    paths: list[str]
    image: str
    label: str
    names: list[str] | None
    labels_of: dict[int, list[int]]
    groups: np.ndarray

    @classmethod
    def of(cls, paths: list[str], columns: Callable[[list[str], str], tuple[str, str]]) -> "ParquetFiles":
        """`columns(names, file)`: which columns hold image and label.

        Raises ValueError for a damaged file, for one that has other columns or classes than the first, and for a
        column without images; OSError for one that cannot be reached.
        """
        with ThreadPoolExecutor(16) as pool:
            schemas, groups = zip(*pool.map(_contents, paths), strict=True)
        image, label = columns(schemas[0].names, paths[0])
        check_image_column(schemas[0].field(image).type, image)
        names, labels_of = _class_names(schemas[0], label), {}
        for number, (path, schema) in enumerate(zip(paths, schemas, strict=True)):
            if missing := {image, label} - set(schema.names):
                raise ValueError(f"{path} has no column {' and '.join(sorted(missing))}, which other files have")
            own = _class_names(schema, label)
            if own == names:
                continue
            if own is None or names is None or sorted(own) != sorted(names) or len(set(own)) < len(own):
                raise ValueError(f"{path} has other classes than {paths[0]}: use files of one data set")
            labels_of[number] = [names.index(name) for name in own]
        blocks = [(number, *block) for number, file in enumerate(groups) for block in file]
        return cls(paths, image, label, names, labels_of, np.array(blocks, np.int64).reshape(-1, 4))

    def blocks(self) -> np.ndarray:
        return self.groups

    def labels(self) -> list[Any]:
        """Of all rows in their order, without reading the images."""
        found = []
        for number, path in enumerate(self.paths):
            with _damage_named(path), _open_parquet(path) as file:
                stored = file.read([self.label], use_threads=False)[self.label].to_pylist()
            found += [self._mapped(number, label) for label in stored]
        return found

    def _mapped(self, number: int, label: Any) -> Any:
        known = self.labels_of.get(number)
        return label if known is None or label is None or not 0 <= label < len(known) else known[label]

    def read(self, number: int, group: int, first: int, start: int, stop: int) -> Iterator[Row]:
        """Rows `start` to `stop` of a row group that begins at row `first` of its file."""
        path = self.paths[number]
        at, columns = start, [self.image, self.label]  # `at`: the next row to yield
        try:
            with _open_parquet(path) as file:
                end = 0
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    begin, end = end, end + len(batch)
                    part = batch.slice(at - begin, min(end, stop) - at) if at < end else batch[:0]
                    images, labels = (part[name].to_pylist() for name in columns)
                    for image, label in zip(images, labels, strict=True):
                        yield Row(f"row {first + at} of {path}", image, self._mapped(number, label))
                        at += 1
                    if at == stop:
                        return
            problem = "the row group ends before them"
        except _DAMAGE as error:
            if not _is_damage(error):
                raise
            problem = one_line(error)
        where = f"rows {first + at} to {first + stop - 1} of {path}"
        for _ in range(at, stop):
            yield Row(where, problem=problem)


def _contents(path: str) -> tuple[pa.Schema, list[tuple[int, int, int]]]:
    """The schema of a file, and of each row group with rows: its number, its first row in the file, its rows."""
    with _damage_named(path), _open_parquet(path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        schema = file.schema_arrow
    first = np.cumsum([0, *rows])
    return schema, [(group, int(first[group]), count) for group, count in enumerate(rows) if count]


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    if label not in schema.names:
        return None
    import datasets

    return getattr(datasets.Features.from_arrow_schema(schema)[label], "names", None)


def check_image_column(kind: pa.DataType, column: str) -> None:
    """Raise ValueError unless a column of this type holds images as `datasets` stores them."""
    if not pa.types.is_struct(kind) or {"bytes", "path"} - {field.name for field in kind}:
        raise ValueError(f"column {column} holds {kind}: store the images as datasets.Image")


_DAMAGE = (UnicodeDecodeError, pa.ArrowException, OSError)


def _is_damage(error: Exception) -> bool:
    """Whether the content of a file is wrong, rather than the disk, the network or the rights to read it.

    pyarrow raises OSError for both.
    """
    return type(error) is OSError and error.errno is None or not isinstance(error, OSError)


@contextlib.contextmanager
def _damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        if not _is_damage(error):
            raise
        raise ValueError(f"cannot read {path} ({one_line(error)}): copy the file again") from error


def _open_parquet(path: str) -> pq.ParquetFile:
    """Remote files are read again where the connection breaks."""
    if "://" in path:
        from datasets.utils.file_utils import xopen

        return pq.ParquetFile(xopen(path, "rb"), buffer_size=_READ_BYTES_REMOTE)
    return pq.ParquetFile(path, buffer_size=_READ_BYTES)


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
        """A folder for each class, one file of each class in turn, so that the first are of all classes.

        Raises ValueError for a class without an image, and for pictures of a kind that is not read.
        """
        if unread := files_below(folder, UNREAD_SUFFIXES):
            raise ValueError(
                f"{len(unread)} pictures of {folder} are of a kind that is not read, such as {unread[0]}: convert them "
                "to JPEG or PNG, or take them away"
            )
        names = [child.name for child in subfolders(folder)]
        of_class = [sorted(os.fsencode(f) for f in files_below(folder / name, IMAGE_SUFFIXES)) for name in names]
        empty = [name for name, files in zip(names, of_class, strict=True) if not files]
        if empty and len(empty) < len(names):
            raise ValueError(f"{folder / empty[0]} holds no image, so it is no class: fill it or take it away")
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
        if any(pa.types.is_binary(table[name].type) for name in (image, label)):
            raise ValueError(f"{file} is not UTF-8: save it as UTF-8")
        paths = [os.fsencode(str(name)) for name in table[image].to_pylist()]
        if more := len(paths) - len(set(paths)):
            warnings.warn(f"{file} names files again in {more} rows, which may be trained on and tested", stacklevel=2)
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

    rows: "datasets.Dataset"
    image: str
    label: str
    names: list[str] | None
    origin: str

    @classmethod
    def of(cls, rows: "datasets.Dataset", columns: Columns, origin: str) -> "SavedRows":
        image, label = columns.find(rows.column_names, origin)
        names = getattr(rows.features[label], "names", None)  # of a ClassLabel
        rows = rows.select_columns([image, label]).with_format("arrow")
        check_image_column(rows.features.arrow_schema.field(image).type, image)
        return cls(rows, image, label, names, origin)

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
