"""Encoded images and their labels, as a source of them gives them: `empf/data/shards.py`, `empf/data/sources.py`."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np


class Row(NamedTuple):
    """One stored image: where it lies (to name it), `{"bytes": ..., "path": ...}` and its label; or why it is lost."""

    where: str
    image: dict[str, Any] | None = None
    label: Any = None
    problem: str | None = None


class Source(Protocol):
    """Where the images of a split lie. A block is what is read at once: a row group of a file, or one image file.

    `names`: of the classes, by the number that stands in the data; None where the data name none.
    """

    names: list[str] | None

    def blocks(self) -> np.ndarray:
        """int64 [blocks, 4]: file, row group, first row in the file, rows."""

    def labels(self) -> list[Any]:
        """What stands as the label of each row, see `empf/data/classes.py`; the images are not read."""

    def read(self, number: int, group: int, first: int, start: int, stop: int) -> Iterator[Row]:
        """The rows `start` to `stop` of the block that begins with `number, group, first`; lost ones say why."""


def read_rows(source: Source, blocks: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, Row]]:
    """(number, row) of the rows of these numbers, which ascend, counted through all blocks."""
    ends = blocks[:, 3].cumsum()
    for number in np.unique(np.searchsorted(ends, rows, "right")):
        begin = int(ends[number] - blocks[number, 3])
        inside = rows[(rows >= begin) & (rows < ends[number])]
        start, stop, wanted = int(inside[0]) - begin, int(inside[-1]) + 1 - begin, set(inside.tolist())
        for at, row in enumerate(source.read(*blocks[number, :3], start, stop), begin + start):
            if at in wanted:
                yield at, row


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
