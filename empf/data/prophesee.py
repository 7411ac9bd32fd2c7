"""Raw recordings of Prophesee's cameras, read into arrays: lines of text, then words whose highest 4 bits are the kind.

    EVT 2.0   32 bits. 0, 1: an event, darker or brighter: 6 bits of time, 11 of x, 11 of y. 8: 28 higher bits of time
    EVT 3.0   16 bits, what does not change is left out. 0: 11 bits of y. 2: an event: brighter, 11 bits of x. 3:
              brighter and the first column of vectors. 4, 5: which of the next 12 or 8 columns have an event. 6, 8: 12
              lower and 12 higher bits of time; a new higher part begins with lower bits of 0

All little-endian, times in microseconds; triggers and whatever else there is are passed over.
https://docs.prophesee.ai/stable/data/encoding_formats
"""

import re
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[int, int] | None]
PART = 1 << 20  # words whose columns are looked through at once
COUNT = np.array([number.bit_count() for number in range(1 << 12)])
GEOMETRY = (rb"geometry (\d{1,5})x(\d{1,5})", rb"width=(\d{1,5});height=(\d{1,5})")


def read_raw(data: bytes, path: Path) -> Arrays:
    """Times, columns, rows and polarities of the events of a file, and (height, width) where it says so.

    Raises ValueError that names the file where it is cut short, or of another encoding.
    """
    start = 0
    while data.startswith(b"%", start):
        end = data.find(b"\n", start)
        if end < 0:
            raise ValueError(f"{path} ends in its header: copy the recording again")
        line, start = data[start:end], end + 1
        if line.strip() == b"% end":
            break
    header = data[:start].lower()
    found = re.search(rb"evt ?(\d)\.?(\d?)", header)
    encoding = found and (found[1] + b"." + (found[2] or b"0")).decode()
    if encoding not in ("2.0", "3.0"):
        what = f"EVT {encoding}" if encoding else "of no encoding that it names"
        raise ValueError(f"{path} is {what}, and what is read is EVT 2.0 and 3.0: convert it, or export it as .dat")
    size = next((m for g in GEOMETRY if (m := re.search(g, header))), None)
    width = {"2.0": 4, "3.0": 2}[encoding]
    if (len(data) - start) % width:
        raise ValueError(f"{path} ends in the middle of an event: copy the recording again")
    words = np.frombuffer(data, f"<u{width}", offset=start)
    events = _evt2(words) if width == 4 else _evt3(words)
    return *events, (int(size[2]), int(size[1])) if size else None


def _evt2(words: np.ndarray) -> tuple[np.ndarray, ...]:
    kind = words >> 28
    at, high = np.flatnonzero(kind < 2), kind == 8
    event = words[at]
    t = (_last(at, high, _turned(words[high] & 0xFFFFFFF, 28)) << 6) + (event >> 22 & 63)
    return t, event >> 11 & 2047, event & 2047, event >> 28 == 1


def _evt3(words: np.ndarray) -> tuple[np.ndarray, ...]:
    kind, value = words >> 12, (words & 4095).astype(np.int32)
    y, base, low, high = (kind == k for k in (0, 3, 6, 8))
    at = np.flatnonzero((kind == 2) | (kind == 4) | (kind == 5))
    single, now = kind[at] == 2, value[at]
    # x: of a vector, the first column and the columns of the vectors since
    passed = np.cumsum(12 * (kind == 4) + 8 * (kind == 5), dtype=np.int64)
    wide = np.where(kind[at] == 4, 12, 8)
    x = np.where(single, now & 2047, _last(at, base, (value[base] & 2047) - passed[base]) + passed[at] - wide)
    on = np.where(single, now, _last(at, base, value[base])) >> 11 == 1
    # t: the higher part, and the lower one where it came after
    new = np.zeros(len(words), bool)
    new[np.flatnonzero(high)[np.diff(value[high], prepend=-1) != 0]] = True
    after = _last(at, low, np.flatnonzero(low)) > _last(at, new, np.flatnonzero(new))
    t = (_last(at, high, _turned(value[high], 12)) << 12) + np.where(after, _last(at, low, value[low]), 0)
    columns = np.where(single, 1, np.where(kind[at] == 5, now & 255, now))
    row = np.repeat(np.arange(len(at)), COUNT[columns])
    offset, vectors = np.zeros(len(row), np.int64), columns[~single]
    parts = [vectors[first : first + PART, None] for first in range(0, len(vectors), PART)]
    offset[~single[row]] = np.concatenate([np.nonzero(part >> np.arange(12) & 1)[1] for part in parts] or [[]])
    return t[row], x[row] + offset, _last(at, y, value[y] & 2047)[row], on[row]


def _turned(high: np.ndarray, bits: int) -> np.ndarray:
    """A counter of so many bits, which begins again when it is full: int64."""
    high = high.astype(np.int64)
    return high + (np.cumsum(np.diff(high, prepend=high[:1]) < -(1 << bits - 1)) << bits)


def _last(at: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """At each of the words `at`, the value of the last of `places` (bool, of all words) before it; 0 where none is."""
    return np.concatenate(([0], values))[np.cumsum(places, dtype=np.int32)[at]]
