"""A split that is read while it is used: which rows belong to it, and what their labels mean.

A block is what is read at once: a row group of a parquet file, or one image file. The blocks in their stored order make
up the split; `empf/data/streaming.py` shuffles and shares them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from empf.data.classes import Classes
from empf.data.rows import Row, Source
from empf.data.sets import DataSpec

_LIMIT_BLOCKS = 100


@dataclass(frozen=True)
class StreamSet:
    """A split that is read from `source` while it is used, for batches on `device`; `class_names` by label.

    `blocks` int64 [blocks, 4]: file, row group, first row in the file, rows. Where a file is damaged, the source says
    so in place of the lost rows. `kept`: for each block which of its rows belong to the split, where not all do; then
    the fourth column counts these. `split`: which part of the data it is, for people.
    """

    source: Source
    blocks: np.ndarray
    classes: Classes
    spec: DataSpec
    device: torch.device = torch.device("cpu")
    split: str = ""
    kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.blocks[:, 3].sum())

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    def to(self, device: str | torch.device) -> "StreamSet":
        return replace(self, device=torch.device(device))

    def read(self, block: int, start: int, stop: int) -> Iterator[Row]:
        """The rows `start` to `stop` of those of a block that belong to the split."""
        if self.kept is None:
            yield from self.source.read(*self.blocks[block, :3], start, stop)
            return
        rows = self.kept[block][start:stop]
        first, wanted = int(rows[0]), set(rows.tolist())
        for at, row in enumerate(self.source.read(*self.blocks[block, :3], first, int(rows[-1]) + 1), first):
            if at in wanted:
                yield row

    def labels(self) -> np.ndarray:
        """Of all rows, in their order; -1 where the stored value means no class. The images are not read."""
        stored = self.source.labels()
        labels = np.array([-1 if (label := self.classes.label(value)) is None else label for value in stored])
        if self.kept is None and len(self) == len(stored):
            return labels
        whole = self.source.blocks()
        ends = dict(zip(map(tuple, whole[:, :3].tolist()), (whole[:, 3].cumsum() - whole[:, 3]).tolist(), strict=True))
        rows = [ends[tuple(block[:3].tolist())] + self._rows_of(number) for number, block in enumerate(self.blocks)]
        return labels[np.concatenate(rows)]

    def _rows_of(self, block: int) -> np.ndarray:
        count = int(self.blocks[block, 3])
        return np.arange(count) if self.kept is None else self.kept[block][:count]

    def chosen(self, rows: np.ndarray) -> "StreamSet":
        """Only the rows of these numbers, which ascend, counted through the split."""
        ends = self.blocks[:, 3].cumsum()
        of_block = np.searchsorted(ends, rows, "right")
        numbers, begins = np.unique(of_block, return_index=True)
        inside = rows - (ends - self.blocks[:, 3])[of_block]
        kept = [self._rows_of(n)[part] for n, part in zip(numbers, np.split(inside, begins[1:]), strict=True)]
        blocks = self.blocks[numbers]
        blocks[:, 3] = [len(part) for part in kept]
        return replace(self, blocks=blocks, kept=kept)

    def limited(self, limit: int) -> "StreamSet":
        """`limit` images: the first of each of about 100 blocks that are spread evenly over the split.

        Shards are often sorted by class, so the first images of the split would all be of one class. Image files, which
        are listed one of each class in turn, are the first ones.
        """
        if limit >= len(self):
            return self
        if self.blocks[:, 3].max() == 1:
            return replace(self, blocks=self.blocks[:limit], kept=self.kept and self.kept[:limit])
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
        return replace(self, blocks=blocks, kept=None if self.kept is None else [self.kept[at] for at in places])
