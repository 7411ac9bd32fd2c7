"""Frames of recordings, decoded once by all cores and kept on disk.

A shard is the frames of 16 files, [k, T, 2, *size] float16, in one .npy. Its name is a hash of the settings and of
name, size and date of the files, so other settings or changed files never meet old frames. It is written beside its
place and renamed, so it is whole or absent; what an interrupted call has written is not decoded again.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from empf.data.event_frames import Clip, FrameSettings, read_frames
from empf.data.sets import both
from empf.files import write_atomic
from empf.machine import end_with_parent

SHARD = 16
FORMAT = 2  # part of the hash: another number forgets all caches
LARGEST = 65504.0  # of float16


def default_folder() -> Path:
    return Path(os.environ.get("EMPF_CACHE") or Path.home() / ".cache" / "empf") / "events"


class FrameCache:
    """The frames of `files`, recordings or parts of them, which lie under `root`, in the shards of `folder`."""

    def __init__(self, folder: Path, root: Path, files: list[Clip], settings: FrameSettings):
        self.folder, self.settings = folder, settings
        self.shards = [files[at : at + SHARD] for at in range(0, len(files), SHARD)]
        self.paths = [folder / f"{self._key(root, shard)}.npy" for shard in self.shards]

    def _key(self, root: Path, shard: list[Clip]) -> str:
        stats = [
            (str(c.path.relative_to(root)), (s := c.path.stat()).st_size, s.st_mtime_ns, c.start, c.stop) for c in shard
        ]
        frames = {f.name: getattr(self.settings, f.name) for f in fields(FrameSettings)}
        return hashlib.sha256(json.dumps([FORMAT, frames, stats]).encode()).hexdigest()[:24]

    def fill(self, rows: np.ndarray, workers: int | None = None) -> None:
        """Decode what is missing of the files `rows`, by `workers` processes (None: one per core).

        Raises ValueError that names the damaged files, after the others are decoded.
        """
        numbers = np.unique(rows // SHARD).tolist()
        if all(self._shard(n) is not None for n in numbers):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise OSError(
                f"cannot keep frames in {self.folder} ({error.strerror or error}): set EMPF_CACHE to a folder that can "
                "be written"
            ) from error
        with FileLock(self.folder / ".lock"):  # the system frees the lock of a process that dies
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            self._decode([n for n in numbers if self._shard(n) is None], workers)

    def read(self, rows: np.ndarray) -> Tensor:
        """The frames of the files `rows`, which `fill` has been asked for."""
        frames = torch.empty(len(rows), self.settings.T, 2, *both(self.settings.size), dtype=torch.float16)
        for number in np.unique(rows // SHARD):
            shard, places = self._shard(number), np.flatnonzero(rows // SHARD == number)
            if shard is None:
                raise OSError(f"{self.paths[number]} has vanished or is damaged: start again")
            frames[torch.from_numpy(places)] = torch.from_numpy(shard[rows[places] % SHARD])
        return frames

    def _shard(self, number: int) -> np.ndarray | None:
        """A shard, mapped into memory; None where it is not in the cache, or not whole."""
        try:
            shard = np.load(self.paths[number], mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        wanted = (len(self.shards[number]), self.settings.T, 2, *both(self.settings.size))
        return shard if shard.shape == wanted and shard.dtype == np.float16 else None

    def _decode(self, numbers: list[int], workers: int | None) -> None:
        workers = min(workers or _cores(), len(numbers))
        jobs = [(self.shards[n], self.paths[n], self.settings) for n in numbers]
        problems: list[str] = []
        total = sum(len(files) for files, _, _ in jobs)
        with tqdm(total=total, desc="decoding recordings", leave=False, dynamic_ncols=True) as bar:
            if workers < 2:
                for job in jobs:
                    problems += _decode_shard(*job)
                    bar.update(len(job[0]))
            else:
                # forked as the workers of torch's DataLoader are: importing torch would take longer than the decoding
                context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
                with ProcessPoolExecutor(workers, context, _start_worker) as pool:
                    running = {pool.submit(_decode_shard, *job): len(job[0]) for job in jobs}
                    try:
                        for done in as_completed(running):
                            problems += done.result()
                            bar.update(running[done])
                    except BrokenProcessPool as error:
                        raise OSError(
                            "a process that decodes recordings was killed, perhaps for lack of memory: start again"
                        ) from error
                    except BaseException:  # Ctrl-C, a full disk: the rest of the queue would still be decoded
                        pool.shutdown(cancel_futures=True)
                        raise
        if problems:
            more = f"; and {len(problems) - 5} more files" if len(problems) > 5 else ""
            raise ValueError("; ".join(problems[:5]) + more)


def _decode_shard(files: list[Clip], path: Path, settings: FrameSettings) -> list[str]:
    """Write the frames of `files` to `path`; returns what is wrong with them, and then writes nothing."""
    frames, problems = np.empty((len(files), settings.T, 2, *both(settings.size)), np.float16), []
    for row, file in zip(frames, files, strict=True):
        try:
            row[:] = np.minimum(read_frames(file, settings), LARGEST)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        buffer = BytesIO()
        np.save(buffer, frames)
        write_atomic(path, buffer.getvalue())
    return problems


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    end_with_parent()  # else it would wait for work for ever, and hold the lock


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
