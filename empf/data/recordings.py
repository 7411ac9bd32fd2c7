"""Recordings of event cameras in any format, told by the ends of their names.

.aedat  .aedat4   empf/data/aedat.py
.bin              N-MNIST, N-Caltech101: 5 bytes of an event: x, y, polarity (1 bit) and 23 bits of microseconds,
                  big-endian; y = 240 marks 2^13 us that the clock has lost
.dat              Prophesee: lines that begin with "%", 2 bytes (type and size of an event), then 8 bytes: uint32
                  microseconds, uint32 of x (14 bits), y (14), polarity (4), little-endian
.raw              empf/data/prophesee.py
.npy  .npz        arrays named x, y, t, p (see `NAMES`), as tonic and SpikingJelly write them, or one array with
                  these fields; `pos` and `neg` of (row, column, time), as in ES-ImageNet
"""

import math
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np

from empf.data.aedat import Events, read_events, sensor_for, unwrapped
from empf.data.folders import IMAGE_SUFFIXES, files_below
from empf.data.prophesee import read_raw
from empf.terminal import shown

ARRAYS = (".npy", ".npz")
RECORDINGS = (".aedat", ".aedat4", ".bin", ".dat", ".raw")
NAMES = {
    "x": ("x", "xs"),
    "y": ("y", "ys"),
    "t": ("t", "ts", "time", "timestamp", "timestamps"),
    "p": ("p", "pol", "polarity", "ps", "on"),
}
NMNIST_LOST, NMNIST_LOST_TIME = 240, 1 << 13
MOST_UNPACKED = 1 << 30  # bytes of the arrays of an .npz, which may be compressed a thousand times
LATEST = 1 << 50  # microseconds, 35 years
LARGEST_SIDE = 1 << 14  # pixels, of a sensor or of frames


def read_recording(path: Path, orientation: str = "transposed") -> Events:
    """The events of a recording; `orientation` as in `read_events`, for the formats that do not store columns and rows.

    Raises ValueError that names the file if it is damaged, FileNotFoundError if it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recording {path}: check the path")
    return _read(path, orientation, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # a recording that is cut into many is read once
def _read(path: Path, orientation: str, changed: int) -> Events:
    suffix = path.suffix.lower()
    if suffix in (".aedat", ".aedat4"):
        return read_events(path, orientation)
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: copy the recording again")
    if suffix == ".raw":
        t, x, y, on, size = read_raw(data, path)
        return _events(unwrapped(t, 62), x, y, on, path, size)
    return _read_bin(data, path) if suffix == ".bin" else _read_dat(data, path)


def _read_bin(data: bytes, path: Path) -> Events:
    if len(data) % 5:
        raise ValueError(f"{path} ends in the middle of an event: copy the recording again")
    x, y, *rest = np.frombuffer(data, np.uint8).reshape(-1, 5).T.astype(np.int64)
    t = (rest[0] & 127) << 16 | rest[1] << 8 | rest[2]
    lost = y == NMNIST_LOST
    t = t + np.cumsum(lost) * NMNIST_LOST_TIME
    x, y, t, on = x[~lost], y[~lost], t[~lost], rest[0][~lost] >> 7 == 1
    return _events(t, x, y, on, path)


def _read_dat(data: bytes, path: Path) -> Events:
    start, size = 0, None
    while data.startswith(b"%", start):
        end = data.find(b"\n", start)
        if end < 0:
            raise ValueError(f"{path} ends in its header: copy the recording again")
        start = end + 1
    sides = [re.search(rb"% *" + side + rb" (\d{1,18})\b", data[:start], re.I) for side in (b"height", b"width")]
    if all(sides):
        size = tuple(int(side[1]) for side in sides)
    start += 2
    if len(data) < start or (len(data) - start) % 8:
        raise ValueError(f"{path} ends in the middle of an event: copy the recording again")
    t, word = np.frombuffer(data, "<u4", offset=start).reshape(-1, 2).T
    return _events(unwrapped(t), word & 16383, word >> 14 & 16383, word >> 28 & 1 == 1, path, size)


def load_arrays(path: Path) -> np.ndarray | Events:
    """What a .npy or .npz file holds: events, or one array, which may be frames. Raises as `read_recording`."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if (size := sum(m.file_size for m in members)) > MOST_UNPACKED:
                    raise ValueError(f"its arrays would take {size:,} bytes, of {MOST_UNPACKED:,}")
                arrays = {m.filename.removesuffix(".npy"): _array(archive.read(m)) for m in members}
        else:
            arrays = {"": _array(path.read_bytes())}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}: check the path") from error
    except Exception as error:  # the parsers of numpy and zipfile choke on damage in many ways
        raise ValueError(f"cannot read {path} ({shown(error, 100)}): write the file again") from error
    if len(arrays) == 1:
        (array,) = arrays.values()
        if array.dtype.names is None:
            return array
        arrays = {name: array[name] for name in array.dtype.names}
    return of_arrays(arrays, path)


def _array(data: bytes) -> np.ndarray:
    """What np.load makes of an .npy file, but never larger than the file."""
    stream = BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, columns_first, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects of Python")
    array = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return array.reshape(shape, order="F" if columns_first else "C")


def of_arrays(arrays: Mapping[str, np.ndarray], path: Path | str) -> Events:
    """Events from arrays by name, in the order of their time; ValueError that says which names are known."""
    if {"pos", "neg"} <= arrays.keys():
        places = [np.asarray(arrays[name]) for name in ("neg", "pos")]
        if any(part.size % 3 or part.dtype.kind not in "biuf" for part in places):
            raise ValueError(f"{path} holds pos and neg that are no rows, columns and times: write the file again")
        y, x, t = np.concatenate([part.reshape(-1, 3) for part in places]).T
        p = np.repeat((0, 1), [part.size // 3 for part in places])
    else:
        found = {key: next((name for name in names if name in arrays), None) for key, names in NAMES.items()}
        if None in found.values():
            raise ValueError(
                f"{path} holds the arrays {shown(', '.join(arrays), 100)}: events are arrays x, y, t, p, frames are a "
                "single array"
            )
        x, y, t, p = (np.asarray(arrays[found[key]]).ravel() for key in "xytp")
    if not len(x) == len(y) == len(t) == len(p):
        raise ValueError(f"{path} holds {len(x)}, {len(y)}, {len(t)} and {len(p)} of x, y, t, p: write the file again")
    if any(values.dtype.kind not in "biuf" for values in (x, y, t, p)):
        raise ValueError(f"{path} holds x, y, t or p that are not numbers: write the file again")
    with np.errstate(invalid="ignore", over="ignore"):
        if t.dtype.kind == "f" and (t % 1).any():  # seconds
            t = np.rint(t * 1e6)
    bounds = ((x, 0, LARGEST_SIDE), (y, 0, LARGEST_SIDE), (t, -LATEST, LATEST))
    if not all(((least <= values) & (values < most)).all() for values, least, most in bounds):
        raise ValueError(f"{path} has events outside of the sensor, or without a time: write the file again")
    t = t.astype(np.int64)
    order = np.argsort(t, kind="stable")
    sides = [np.asarray(arrays.get(name)) for name in ("height", "width")]
    known = all(side.size == 1 and side.dtype.kind in "iuf" for side in sides)
    return _events(t[order], x[order], y[order], p[order] > 0, path, tuple(s.item() for s in sides) if known else None)


def _events(t, x, y, on, path: Path | str, size: tuple[int, int] | None = None) -> Events:
    height, width = size or sensor_for(x, y, path)
    if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
        raise ValueError(f"{path} says that its sensor has {width}x{height} pixels: it is damaged")
    height, width = int(height), int(width)
    if len(x) and (x.max() >= width or y.max() >= height):
        raise ValueError(f"{path} has events at {x.max()}, {y.max()}, beyond {width}x{height} pixels: it is damaged")
    return Events(t.astype(np.int64), x.astype(np.uint16), y.astype(np.uint16), np.asarray(on, bool), height, width)


def has_recordings(folder: Path) -> bool:
    """Whether a folder holds recordings of events, rather than images, of which there may be some beside them."""
    count = len(files_below(folder, RECORDINGS + ARRAYS))
    return count > 0 and count > len(files_below(folder, IMAGE_SUFFIXES))
