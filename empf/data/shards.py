"""Parquet files of images: what is in which file, and reading a row group of encoded images at a time."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen

from empf.data.rows import Row, one_line

_READ_BYTES = 1 << 20  # of a column at once, so that a row group of a gigabyte does not have to fit in memory
_READ_BYTES_REMOTE = 8 << 20
_BATCH_ROWS = 16  # that are in memory at once as Python objects


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
    feature = datasets.Features.from_arrow_schema(schema)[label]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


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
        return pq.ParquetFile(xopen(path, "rb"), buffer_size=_READ_BYTES_REMOTE)
    return pq.ParquetFile(path, buffer_size=_READ_BYTES)
