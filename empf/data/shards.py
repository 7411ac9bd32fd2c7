"""Splits that do not fit in memory: what is in which file, and reading a block of encoded images at a time.

A block is what is read at once: a row group of a parquet file, or one file of an image folder. The blocks in their
stored order make up the split; `empf/data/streaming.py` shuffles and shares them.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.utils.file_utils import xopen

from empf.data.folders import files_below, subfolders
from empf.data.images import IMAGE_SUFFIXES, one_line
from empf.data.sets import DataSpec

_READ_BYTES = 1 << 20  # of a column at once, so that a row group of a gigabyte does not have to fit in memory
_READ_BYTES_REMOTE = 8 << 20
_BATCH_ROWS = 16  # that are in memory at once as Python objects
_LIMIT_BLOCKS = 100


class Row(NamedTuple):
    """One stored image: where it lies (to name it), `{"bytes": ..., "path": ...}` and its label; or why it is lost."""

    where: str
    image: dict[str, Any] | None = None
    label: Any = None
    problem: str | None = None


@dataclass(frozen=True)
class StreamSet:
    """A split that is read from `source` while it is used, for batches on `device`; `class_names` by label.

    `blocks` int64 [blocks, 4]: file, row group, first row in the file, rows. The source reads rows `start` to `stop` of
    one with `source.read(*block[:3], start, stop)`; where the file is damaged, it says so in place of the lost rows.
    """

    source: "ParquetFiles | ImageFolder"
    blocks: np.ndarray
    class_names: list[str]
    spec: DataSpec
    device: torch.device

    def __len__(self) -> int:
        return int(self.blocks[:, 3].sum())

    def to(self, device: str | torch.device) -> "StreamSet":
        return replace(self, device=torch.device(device))

    def limited(self, limit: int) -> "StreamSet":
        """`limit` images: the first of each of about 100 blocks that are spread evenly over the split.

        Shards are often sorted by class, so the first images of the split would all be of one class. Image files, which
        are listed one of each class in turn, are the first ones.
        """
        if limit >= len(self):
            return self
        if self.blocks[:, 3].max() == 1:
            return replace(self, blocks=self.blocks[:limit])
        quota = -(-limit // _LIMIT_BLOCKS)
        while (sizes := np.minimum(self.blocks[:, 3], quota)).sum() < limit:
            quota *= 2
        for count in range(-(-limit // quota), len(sizes) + 1):
            places = np.arange(count) * len(sizes) // count
            if sizes[places].sum() >= limit:
                break
        blocks = self.blocks[places]
        ends = np.minimum(sizes[places].cumsum(), limit)
        blocks[:, 3] = np.diff(ends, prepend=0)
        return replace(self, blocks=blocks[blocks[:, 3] > 0])


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files, local or at an address of fsspec, that hold images in one column and labels in another."""

    paths: list[str]
    image: str
    label: str

    def blocks(self) -> np.ndarray:
        """The row groups of all files; raises ValueError for a damaged file, OSError for one that cannot be reached."""
        with ThreadPoolExecutor(16) as pool:
            groups = list(pool.map(self._groups, self.paths))
        return np.array([(number, *block) for number, file in enumerate(groups) for block in file], np.int64)

    def _groups(self, path: str) -> list[tuple[int, int, int]]:
        with _damage_named(path), _open_parquet(path) as file:
            missing = {self.image, self.label} - set(file.schema_arrow.names)
            if missing:
                raise ValueError(f"{path} has no column {' and '.join(sorted(missing))}, which other files have")
            rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        first = np.cumsum([0, *rows])
        return [(group, int(first[group]), count) for group, count in enumerate(rows) if count]

    def labels(self) -> list[Any]:
        """Of all rows in their order, without reading the images."""
        found = []
        for path in self.paths:
            with _damage_named(path), _open_parquet(path) as file:
                found += file.read([self.label], use_threads=False)[self.label].to_pylist()
        return found

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
                        yield Row(f"row {first + at} of {path}", image, label)
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


@dataclass(frozen=True)
class ImageFolder:
    """A folder of image files for each class, in the order of the labels; `files[label]` are bytes, to save memory."""

    folder: str
    classes: list[str]
    files: list[np.ndarray]

    @classmethod
    def of(cls, folder: Path) -> "ImageFolder":
        classes = [child.name for child in subfolders(folder)]
        found = ([os.fsencode(file) for file in files_below(folder / name, IMAGE_SUFFIXES)] for name in classes)
        return cls(str(folder), classes, [np.array(sorted(files), np.bytes_) for files in found])

    def blocks(self) -> np.ndarray:
        """One for each file, one of each class in turn, so that the first are of all classes."""
        label = np.repeat(np.arange(len(self.files)), [len(names) for names in self.files])
        turn = np.concatenate([np.arange(len(names)) for names in self.files]) if self.files else np.arange(0)
        order = np.lexsort((label, turn))
        label, turn = label[order], turn[order]
        return np.stack((label, turn, np.zeros_like(label), np.ones_like(label)), axis=1)

    def read(self, label: int, turn: int, first: int, start: int, stop: int) -> Iterator[Row]:
        path = os.path.join(self.folder, self.classes[label], os.fsdecode(bytes(self.files[label][turn])))
        yield Row(path, {"bytes": None, "path": path}, int(label))


def read_schema(path: str) -> pa.Schema:
    with _damage_named(path), _open_parquet(path) as file:
        return file.schema_arrow


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
