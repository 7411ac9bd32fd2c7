"""AEDAT recordings of event cameras, read into arrays.

    AEDAT 2.0   header lines that begin with "#", then big-endian pairs (uint32 address, uint32 time in microseconds);
                address of the 128x128 DVS128: bit 0 polarity (0 = on), bits 1-7 x, bits 8-14 y, bit 15 not a pixel;
                of a DAVIS, which the header names: bit 11 polarity (1 = on), bits 12-21 x, bits 22-30 y, bit 10 an
                external event, bit 31 a frame or motion; both count x from the right and y from the bottom
    AEDAT 3.1   header lines, then packets: 28 bytes (int16 type, int16 source, int32 size of an event, place of its
                time, overflows of the clock, capacity, number, valid ones), then events; one of polarity (type 1) is
                uint32 (bit 0 valid, bit 1 on, bits 2-16 y, bits 17-31 x) and int32 time of 31 bits, little-endian
    AEDAT 4     compressed packets, read by the package `aedat`

The camera is not aware of up and down: two readings of x and y are in use for AEDAT 2.0, see `ORIENTATIONS`.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SENSOR = 128  # pixels along one side of the DVS128

# x and y (columns from the left, rows from the top) of a picture, from the fields of the address. One is the other
# turned by a quarter: left and right of the first are bottom and top of the second.
ORIENTATIONS = {
    "transposed": lambda x, y: (SENSOR - 1 - y, SENSOR - 1 - x),  # most papers on DVS-CIFAR10
    "mirrored": lambda x, y: (SENSOR - 1 - x, y),  # dat2mat.m, which was published with the recordings
    "upright": lambda x, y: (SENSOR - 1 - x, SENSOR - 1 - y),  # as jAER shows it
}
DAVIS = {"240": (180, 240), "346": (260, 346), "640": (480, 640), "128": (128, 128), "208": (192, 208)}  # height, width
SOURCES = {"DVS128": (128, 128)} | {f"DAVIS{name}": size for name, size in DAVIS.items()}  # of AEDAT 3.1


@dataclass(frozen=True)
class Events:
    """E events in the order of the file: `x`, `y` (column, row) and `on` (brighter; else darker), `t` in microseconds.

    `height`, `width`: pixels of the sensor.
    """

    t: np.ndarray  # E int64
    x: np.ndarray  # E uint16
    y: np.ndarray  # E uint16
    on: np.ndarray  # E bool
    height: int = SENSOR
    width: int = SENSOR

    def __len__(self) -> int:
        return len(self.t)


RESET = 10_000  # us; a camera whose time falls by more was reset, one whose time falls by less wrote out of order


def unwrapped(t: np.ndarray, bits: int = 32) -> np.ndarray:
    """Times in the order of the recording from a clock of so many bits, which begins again when it is full: int64.

    Where the clock was reset, time goes on from the event before.
    """
    t, period = t.astype(np.int64), 1 << bits
    steps = np.diff(t)
    jumps = np.flatnonzero((steps < -RESET) | (steps > period // 2))
    shift = np.zeros(len(t), np.int64)
    turns = 0
    for at in jumps.tolist():
        step = int(steps[at])
        if step < -period // 2:
            turns, by = turns + 1, period
        elif step > 0:  # back over the end of a turn, where events are out of order; else a long pause
            turns, by = (turns - 1, -period) if turns else (0, 0)
        else:
            by = -step
        shift[at + 1] = by
    return t + np.cumsum(shift)


def read_events(path: str | Path, orientation: str = "transposed") -> Events:
    """The events of a recording, AEDAT 2.0 of a DVS128 or a DAVIS, AEDAT 3.1 (.aedat) or AEDAT 4 (.aedat4).

    `orientation`, for the DVS128 in AEDAT 2.0 (AEDAT 3.1 and 4 store columns and rows, a DAVIS is read upright):
    `transposed` is x = 127 - y', y = 127 - x' of the fields x', y' of the address; `mirrored` is x = 127 - x', y = y';
    `upright` is x = 127 - x', y = 127 - y'.

    A header of a DVS128 without events gives no events. Raises ValueError that names the file if it is empty, cut
    short, of another format or camera, or has none of the events of a DAVIS; FileNotFoundError if it is missing.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {', '.join(ORIENTATIONS)}, got {orientation!r}")
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no recording {path}: check the path") from error
    if not data:
        raise ValueError(f"{path} is empty: copy the recording again")
    if Path(path).suffix.lower() == ".aedat4":
        if not data.startswith(b"#!AER-DAT4"):
            raise ValueError(f"{path} does not begin like AEDAT 4: copy the recording again, or rename it")
        return _read_aedat4(path)
    if data.startswith(b"#!AER-DAT3"):
        return _read_aedat3(data, path)
    if data.startswith(b"#!AER-DAT") and not data.startswith(b"#!AER-DAT2"):
        found = repr(data[2:12])[2:-1]
        raise ValueError(
            f"{path} is {found}: it must be AER-DAT2.0 or AER-DAT3.1, or AER-DAT4.0 with a name that ends in .aedat4"
        )
    return _read_aedat2(data, path, orientation)


def _read_aedat2(data: bytes, path: str | Path, orientation: str) -> Events:
    start = _header(data, path)
    if (len(data) - start) % 8:
        raise ValueError(f"{path} ends in the middle of an event: copy the recording again")
    pairs = np.frombuffer(data, ">u4", offset=start).reshape(-1, 2)  # E 2
    address, t = pairs[:, 0].astype(np.uint32), unwrapped(pairs[:, 1])
    chip = re.search(rb"davis_?(\d{3})|davis", data[:start].lower())
    if chip is not None:
        return _davis(address, t, DAVIS.get((chip[1] or b"240").decode()), path)
    used = np.bitwise_or.reduce(address) if len(address) else np.uint32(0)
    if used >> 16:
        raise ValueError(f"{path} has addresses beyond 16 bits: it is damaged, or not a recording of a DVS128")
    if used >> 15:  # marks of the camera, such as synchronisation
        pixel = address < 1 << 15
        address, t = address[pixel], t[pixel]
    address = address.astype(np.uint16)
    x, y = ORIENTATIONS[orientation](address >> 1 & 127, address >> 8)
    return Events(t, x, y, address & 1 == 0)


def _header(data: bytes, path: str | Path) -> int:
    """Where the header ends. No address of a DVS128 begins with "#": its first byte is 0."""
    start = 0
    while data.startswith(b"#", start):
        end = data.find(b"\n", start)
        if end < 0:
            raise ValueError(f"{path} ends in its header: copy the recording again")
        line, start = data[start:end], end + 1
        if line.startswith((b"#!END-HEADER", b"#End Of ASCII Header")):
            break
    return start


def _davis(address: np.ndarray, t: np.ndarray, size: tuple[int, int] | None, path: str | Path) -> Events:
    pixel = (address >> 31 == 0) & (address >> 10 & 1 == 0)
    address, t = address[pixel], t[pixel]
    if not len(address):
        raise ValueError(
            f"{path} is a recording of a DAVIS and has no events, only frames or motion if anything: record it with "
            "events (DVS) switched on"
        )
    x, y = (address >> 12 & 1023).astype(np.uint16), (address >> 22 & 511).astype(np.uint16)
    if size is None or x.max() >= size[1] or y.max() >= size[0]:
        raise ValueError(f"{path} has events at {x.max()}, {y.max()}: it is damaged, or of a DAVIS that is not known")
    height, width = size
    return Events(t, width - 1 - x, height - 1 - y, address >> 11 & 1 == 1, height, width)


def _read_aedat3(data: bytes, path: str | Path) -> Events:
    at, found = _header(data, path), []
    source = re.search(rb"#Source \d+: *(\w+)", data[:at])
    while at < len(data):
        if len(data) - at < 28:
            raise ValueError(f"{path} ends in the middle of a packet: copy the recording again")
        kind, _, size, _, overflows, _, number, _ = struct.unpack_from("<hhiiiiii", data, at)
        at += 28
        if size < 1 or number < 0 or at + size * number > len(data):
            raise ValueError(f"{path} ends in the middle of a packet: copy the recording again")
        if kind == 1:
            if size != 8:
                raise ValueError(f"{path} has polarity events of {size} bytes, not 8: it is damaged")
            events = np.frombuffer(data, "<u4", 2 * number, at).reshape(-1, 2)
            events = events[events[:, 0] & 1 == 1]
            found.append((events[:, 0], events[:, 1].astype(np.int64) + (overflows << 31)))
        at += size * number
    word, t = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (np.empty(0, np.uint32),) * 2
    x, y = (word >> 17).astype(np.uint16), (word >> 2 & 32767).astype(np.uint16)
    known = SOURCES.get(source[1].decode().upper()) if source else None
    height, width = known or sensor_for(x, y, path)
    if len(x) and (x.max() >= width or y.max() >= height):
        raise ValueError(f"{path} has events at {x.max()}, {y.max()}, beyond {width}x{height} pixels: it is damaged")
    return Events(unwrapped(t), x, y, word >> 1 & 1 == 1, height, width)


SENSORS = ((34, 34), (128, 128), (180, 240), (240, 304), (260, 346), (480, 640), (720, 1280))  # height, width


def sensor_for(x: np.ndarray, y: np.ndarray, path: str | Path) -> tuple[int, int]:
    """Height and width of the smallest usual sensor that has all these pixels, for formats that do not say."""
    columns, rows = (int(places.max()) + 1 if len(places) else 1 for places in (x, y))
    for height, width in SENSORS:
        if rows <= height and columns <= width:
            return height, width
    raise ValueError(f"{path} has events at column {columns - 1}, row {rows - 1}, beyond every known sensor: crop them")


def _read_aedat4(path: str | Path) -> Events:
    try:
        import aedat
    except ImportError as error:
        raise ValueError(f"{path} is AEDAT 4, which needs a package: pip install aedat") from error
    try:
        decoder = aedat.Decoder(str(path))
        streams = {id: s for id, s in decoder.id_to_stream().items() if s["type"] == "events"}
        packets = [p["events"] for p in decoder if p["stream_id"] in streams]
    except RuntimeError as error:  # what the decoder raises for every damage
        raise ValueError(f"cannot read {path} ({error}): copy the recording again") from error
    if len(streams) != 1:
        raise ValueError(f"{path} has {len(streams)} streams of events: it must have one")
    (stream,) = streams.values()
    fields = [np.concatenate([p[name] for p in packets]) if packets else np.empty(0) for name in ("t", "x", "y", "on")]
    dtypes = (np.int64, np.uint16, np.uint16, bool)
    arrays = [field.astype(dtype) for field, dtype in zip(fields, dtypes, strict=True)]
    return Events(*arrays, height=stream["height"], width=stream["width"])
