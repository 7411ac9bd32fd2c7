"""Recordings of an event camera on disk, written event by event as the format says, without the reader's help."""

import struct
from pathlib import Path

import numpy as np

from empf.data.event_frames import EventSettings
from empf.data.events import load_events

PLACE = {  # column, row
    "transposed": lambda x, y: (127 - y, 127 - x),
    "mirrored": lambda x, y: (127 - x, y),
    "upright": lambda x, y: (127 - x, 127 - y),
}

HEADER = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n#End Of ASCII Header\r\n"


def load_small(folder, cache=None, *, workers=1, limit=None, seed=0, **settings):
    """`load_events` into three frames of 8x8 pixels, unless `settings` say otherwise."""
    settings = EventSettings(**{"T": 3, "size": 8, **settings})
    return load_events(folder, settings, cache=cache, workers=workers, limit=limit, seed=seed)


def aedat2(rows, header: bytes = HEADER) -> bytes:
    """An AEDAT 2.0 file of (x', y', polarity bit, time) per event, as they stand in the address."""
    body = [struct.pack(">II", x << 1 | y << 8 | bit, t) for x, y, bit, t in rows]
    return header + b"".join(body)


def random_rows(count: int, seed: int = 0, side: int = 128) -> list[tuple[int, int, int, int]]:
    """Uniform in place and polarity, ascending in time with pauses; the pixels come from a corner of `side` pixels."""
    rng = np.random.default_rng(seed)
    x, y, bit = rng.integers(0, side, count), rng.integers(0, side, count), rng.integers(0, 2, count)
    t = 1_000 + np.cumsum(rng.integers(0, 90, count) * rng.integers(0, 2, count))
    return list(zip(x.tolist(), y.tolist(), bit.tolist(), t.tolist(), strict=True))


def recordings(folder: Path, classes: int, each: int, events: int = 200, name: str = "cifar10_{}_{}.aedat") -> Path:
    """`<class>/cifar10_<class>_<0..each-1>.aedat`, all of them different."""
    for label in range(classes):
        kind = f"class{label}"
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            rows = random_rows(events, seed=1000 * label + number)
            (folder / kind / name.format(kind, number)).write_bytes(aedat2(rows))
    return folder


def moving_bars(folder: Path, each: int, *, T: int, seed: int) -> Path:
    """Two classes that no single frame can tell: a bar that moves to the right, and the same played backwards.

    The bar is 16 of 128 columns wide, starts anywhere, moves by as much per frame and comes back on the other side; its
    events have random polarity. 240 events in a frame. Written for the orientation `transposed`.
    """
    rng = np.random.default_rng(seed)
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
    for number in range(each):
        t = np.arange(240 * T)
        column = (rng.uniform(0, 128) + t / 240 * 16 + rng.uniform(0, 16, len(t))).astype(int) % 128
        row, bit = rng.integers(0, 128, len(t)), rng.integers(0, 2, len(t))
        x, y = (127 - row).tolist(), (127 - column).tolist()
        rows = list(zip(x, y, bit.tolist(), t.tolist(), strict=True))
        backwards = [(*row[:3], t) for row, t in zip(reversed(rows), t.tolist(), strict=True)]
        (folder / "right" / f"{number}.aedat").write_bytes(aedat2(rows))
        (folder / "left" / f"{number}.aedat").write_bytes(aedat2(backwards))
    return folder
