"""Batches of a split that is read while it is used: worker processes read, shuffle, decode and crop.

An epoch permutes the blocks of the split (row groups, or files) and gives each rank the same number of rows of that
order; a block that lies across a border is read by both sides, each taking its own rows. The rows of a rank are cut
the same way into `LANES` lanes, each shuffled through a buffer. Batch k holds the next rows of lane k mod LANES and is
made by worker k mod workers. So what is in a batch depends on (seed, epoch, rank, k) alone, and how an image is cropped
on (seed, epoch, image): the number of workers changes the speed, nothing else.
"""

import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from empf.data.batches import Augment, ImageBatches
from empf.data.images import BROKEN, centre_crop, mismatch, open_image, random_crop, stored_pixels
from empf.data.rows import Row, one_line
from empf.data.sets import StreamSet
from empf.machine import end_with_parent

LANES = 16
BUFFER = 8192  # about 1 GB of ImageNet
TOO_MANY_BROKEN = 0.01


class StreamBatches(ImageBatches):
    """Batches of a `StreamSet`, as (images float32 [B, C, H, W] normalised, targets), on the device of the set.

    Training: blocks and images in random order; where `augment` asks for `crop`, a random resized crop if the set is
    `resized`, else a shift as in `empf.data.batches.Batches`; flip; cutout, mixup and cutmix on whole batches, with
    partners from the same rank. All ranks have the same number of batches; what is left over differs from epoch to
    epoch. Everything drawn is a pure function of (seed, epoch, rank, number of the batch), so `set_epoch(e)` and
    `iterate(start=k)` continue an interrupted epoch exactly, and without reading the blocks that are done with. Where
    another number of processes had begun the epoch, `iterate(start=k, begun_by=processes)` gives each rank its part of
    their joined batches: it reads for all the ranks that it takes over, and holds the buffers of all, until the end of
    this epoch.

    Test: every image, its centre crop if the set is `resized`, in exactly one batch of one rank. Ranks may differ by
    one in their number of batches: reduce over processes after the loop, not inside it.

    `workers`: processes that read and decode, of which 1, 2, 4, 8 or 16 are used; 0 reads in this process. They are
    not forked from it, so a script that asks for them needs `if __name__ == "__main__":`. `buffer`: encoded images that
    all of them hold together in training; the next one is drawn among those of its lane.

    An image that cannot be decoded is named once in a warning and skipped: in training another image of the batch
    takes its place, in a test it is missing from its batch. ValueError if there are too many of them.
    """

    data: StreamSet

    def __init__(self, data: StreamSet, batch_size: int, *, train: bool, buffer: int = BUFFER, **options) -> None:
        super().__init__(data, batch_size, train=train, **options)
        if self.workers < 0 or buffer < LANES:
            raise ValueError(f"needs workers >= 0 and buffer >= {LANES}, got workers={self.workers}, {buffer=}")
        self.workers = max(n for n in range(LANES + 1) if n <= self.workers and (n == 0 or LANES % n == 0))
        self.buffer = buffer
        self.broken: dict[str, str] = {}  # what was skipped so far, with the reason

    def iterate(self, start: int = 0, begun_by: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        world = begun_by if self.train and begun_by is not None else self.world
        size, rest = divmod(self.batch_size * self.world, world)
        if rest:
            raise ValueError(f"{world} processes cannot share a batch of {self.batch_size * self.world} images")
        begin = self.rank * self.batch_size  # of this rank, in the joined batch
        shares = {}
        for rank in range(begin // size, (begin + self.batch_size - 1) // size + 1):
            first, last = (len(self.data) * r // world for r in (rank, rank + 1))
            shares[rank] = first, first + len(self) * size if self.train else last
        rows = sum(last - first for first, last in shares.values())
        made = _MadeBatches(
            self.data, size, len(self), start, shares, self.train, self.augment, (self.seed, self.epoch),
            self.buffer // LANES,
        )  # fmt: skip
        device, broken = self.data.device, 0
        loader = DataLoader(
            made,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if self.workers else None,
            generator=torch.Generator(),  # leaves the global one as it is
        )
        for number, parts in enumerate(_watched(loader), start):
            broken += sum(map(self._report, parts))
            if broken > max(1, TOO_MANY_BROKEN * rows):
                reason = [reason for part in parts for _, reason in part.broken][-1]
                raise ValueError(
                    f"{broken} of the {rows} images read in this epoch cannot be used, the last one because {reason}: "
                    "repair the data set, or copy it again"
                )
            ready = []
            for rank, part in zip(shares, parts, strict=True):
                if len(part.labels):
                    drawn = (number, rank) if self.train else ()
                    images = self._normalise(part.images.to(device, non_blocking=True), *drawn)
                    labels = part.labels.to(device, non_blocking=True)
                    ready.append(self._prepared(images, labels, rank, number) if self.train else (images, labels))
                elif self.train:
                    raise ValueError(f"no image of a batch can be used: {'; '.join(part.broken[0])}")
            if ready:
                images, targets = ready[0] if len(ready) == 1 else map(torch.cat, zip(*ready, strict=True))
                own = slice(begin % size, begin % size + self.batch_size)
                yield images[own], targets[own]

    def _prepared(self, images: Tensor, labels: Tensor, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """Cut out and mix batch `number` of a rank."""
        augment, (height, width) = self.augment, self.data.spec.size
        rng = np.random.default_rng((self.seed, self.epoch, 2, rank, number))
        holes = rng.integers(0, [[height], [width]], (2, len(images)))
        if augment.cutout:
            self._cut_out(images, *torch.from_numpy(holes).to(images.device))
        targets = self._targets(labels) if augment.soft_targets else labels
        if augment.mixup == 0 and augment.cutmix == 0:
            return images, targets
        return self._mixed(images, targets, images.flip(0), targets.flip(0), rng)

    def _report(self, batch: "_Batch") -> int:
        """Warn of what is broken and was not known so; the number of broken images in the batch."""
        if batch.error is not None:
            raise ValueError(batch.error)
        for where, reason in batch.broken:
            if where not in self.broken:
                warnings.warn(f"skipped {where}: {reason}", stacklevel=3)
            self.broken[where] = reason
        return len(batch.broken)


class _Batch(NamedTuple):
    """What a worker makes of a batch. `broken`: (where, reason); `error`: why there are no more batches."""

    images: Tensor  # B C H W uint8
    labels: Tensor  # B
    broken: list[tuple[str, str]]
    error: str | None = None


@dataclass
class _MadeBatches(IterableDataset):
    """The batches of one epoch, a list of those of some ranks, from number `start` of `count` on; each worker makes its
    part of them.

    `shares`: first and last + 1 of the rows of each of these ranks, in the order of the epoch. `drawn`: seed and epoch.
    `held`: rows of a lane among which the next one is drawn.
    """

    data: StreamSet
    batch_size: int
    count: int
    start: int
    shares: dict[int, tuple[int, int]]
    train: bool
    augment: Augment
    drawn: tuple[int, int]
    held: int

    def __iter__(self) -> Iterator[list[_Batch]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        blocks = np.arange(len(self.data.blocks))
        if self.train:
            blocks = np.random.default_rng((*self.drawn, 0)).permutation(blocks)
        lanes: dict[tuple[int, int], Iterator[tuple[int, Row]]] = {}
        try:
            for number in range(self.start + worker, self.count, workers):
                turn, lane = divmod(number, LANES)
                for rank in self.shares:
                    if (rank, lane) not in lanes:
                        lanes[rank, lane] = self._lane(rank, lane, turn * self.batch_size, blocks)
                yield [
                    self._batch([next(lanes[rank, lane]) for _ in range(self._size(rank, number))])
                    for rank in self.shares
                ]
        except (OSError, ValueError) as error:
            yield [_Batch(torch.empty(0), torch.empty(0), [], one_line(error))]

    def _size(self, rank: int, number: int) -> int:
        first, last = self.shares[rank]
        return min(self.batch_size, last - first - number * self.batch_size)

    def _lane(self, rank: int, lane: int, skip: int, blocks: np.ndarray) -> Iterator[tuple[int, Row]]:
        """(place in the split, row) of a lane of a rank in the order of the epoch, without the first `skip`."""
        sizes = [sum(self._size(rank, n) for n in range(other, self.count, LANES)) for other in range(lane + 1)]
        first, size = self.shares[rank][0] + sum(sizes[:-1]), sizes[-1]
        order = np.arange(size)
        if self.train and self.data.blocks[:, 3].max() > 1:  # else the order of the blocks is that of the images
            order = _shuffled(size, self.held, np.random.default_rng((*self.drawn, 1, rank, lane)))
        order = order[skip:]
        wanted = np.zeros(size, bool)
        wanted[order] = True
        rows = self._rows(first, wanted, blocks)
        held: dict[int, tuple[int, Row]] = {}
        for at in order.tolist():
            while at not in held:
                place, *item = next(rows)
                held[place] = item
            yield held.pop(at)

    def _rows(self, first: int, wanted: np.ndarray, blocks: np.ndarray) -> Iterator[tuple[int, int, Row]]:
        """(place in the lane, place in the split, row) of the wanted rows of a lane that begins at row `first`."""
        sizes = self.data.blocks[:, 3]
        in_split = sizes.cumsum() - sizes  # place of the first row of each block
        begins = sizes[blocks].cumsum() - sizes[blocks] - first  # in the lane
        from_block = np.searchsorted(begins, 0, "right") - 1
        to_block = np.searchsorted(begins, len(wanted))
        for block, begin in zip(blocks[from_block:to_block], begins[from_block:to_block].tolist(), strict=True):
            inside = np.flatnonzero(wanted[max(begin, 0) : begin + int(sizes[block])]) + max(begin, 0)
            if len(inside):
                start, stop = int(inside[0]) - begin, int(inside[-1]) + 1 - begin
                for at, row in enumerate(self.data.read(int(block), start, stop), start):
                    if wanted[begin + at]:
                        yield begin + at, int(in_split[block]) + at, row

    def _batch(self, rows: list[tuple[int, Row]]) -> _Batch:
        spec, classes = self.data.spec, self.data.classes
        images = np.empty((len(rows), spec.channels, *spec.size), np.uint8)
        labels, broken = [], []
        for place, row in rows:
            problem, label = row.problem, None
            if problem is None and (label := classes.label(row.label)) is None:
                problem = f"the label is {row.label!r}, but {spec.name} has {classes.expected()}"
            if problem is None:
                try:
                    with open_image(row.image) as image:
                        images[len(labels)] = self._cropped(image, place)
                except BROKEN as error:
                    problem = one_line(error)
            if problem is None:
                labels.append(label)
            else:
                broken.append((row.where, problem))
        images, labels = torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)
        if broken:
            shown = torch.arange(len(rows) if self.train and len(labels) else len(labels)) % max(len(labels), 1)
            images, labels = images[shown], labels[shown]
        return _Batch(images, labels, broken)

    def _cropped(self, image: Image.Image, place: int) -> np.ndarray:
        spec, rng = self.data.spec, np.random.default_rng((*self.drawn, 3, place))
        flip = self.augment.flip and spec.flip
        if spec.resized:
            if not self.train:
                return centre_crop(image, spec.size, spec.channels)
            return random_crop(image, spec.size, rng, crop=self.augment.crop, flip=flip, channels=spec.channels)
        if problem := mismatch(spec, image):
            raise ValueError(f"it {problem}")
        pixels = stored_pixels(image, spec.channels)
        if self.train:
            mirrored, shifts = rng.random() < 0.5, rng.integers(0, 2 * spec.crop_padding + 1, 2)
            if self.augment.crop:
                padded = np.pad(pixels, ((0, 0), *[(spec.crop_padding,) * 2] * 2))
                (top, left), (height, width) = shifts, spec.size
                pixels = padded[:, top : top + height, left : left + width]
            pixels = pixels[:, :, ::-1] if flip and mirrored else pixels
        return pixels


def _shuffled(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of `count` rows that can be followed while at most `most` of them are held."""
    order, held = np.arange(count), list(range(min(most, count)))
    for at, draw in enumerate(rng.random(count).tolist()):
        place = int(draw * len(held))
        order[at] = held[place]
        if at + most < count:
            held[place] = at + most
        else:
            held[place] = held[-1]
            held.pop()
    return order


def _watched(loader: DataLoader) -> Iterator[list[_Batch]]:
    batches = iter(loader)
    while True:
        try:
            made = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise OSError(
                f"a process that reads data was killed ({one_line(error)}): if memory is short, use less --workers"
            ) from error
        yield made


def _unchanged(made: list[_Batch]) -> list[_Batch]:
    return made


# Ctrl-C and SIGTERM reach the whole group of processes: training finishes its batch and saves, and needs data for that.
_FOR_THE_MAIN_PROCESS = {signal.SIGINT, signal.SIGTERM}


def _start_worker(worker: int) -> None:
    _ignore_signals()
    end_with_parent()  # DataLoader looks at the server that forked this worker, which lives as long as it: for ever
    warnings.simplefilter("ignore")  # Pillow's on odd metadata


def _ignore_signals() -> set[int]:
    """For this thread and the processes that it starts from now on; returns what was ignored before."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return set()
    return signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAIN_PROCESS)


def _context() -> multiprocessing.context.BaseContext:
    """Processes that do not inherit the threads of this one, which torch, CUDA and the progress bar have started."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not by every worker
    resource_tracker.ensure_running()  # else the server starts it, and that unblocks the signals
    before = _ignore_signals()
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
