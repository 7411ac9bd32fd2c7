"""Recordings of every format of which something was altered: refused in one sentence, or finite frames, nothing else.

    python tests/fuzz_recordings.py 20000 [SEED]

A case changes bytes, numbers in a header, counts, arrays, or what the header of an array says.
"""

import re
import sys
import zipfile
from io import BytesIO
from itertools import count
from pathlib import Path
from random import Random

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from event_decoders import random_file
from fuzz_tools import by_hand, refusal, some_bytes
from make_events import aedat2, random_rows
from test_recordings import ROWS, TONIC, aedat3, dat, davis, nmnist

from empf.data.event_frames import FrameSettings, read_frames

T = 2
NUMBERS = [0, -1, 1, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32, 10**9, 2**63, 10**30, 10**400]
HEADERS = [
    "{'descr': '<f8', 'fortran_order': False, 'shape': %s, }", "{'descr': '|u1', 'fortran_order': True, 'shape': %s, }",
    "{'descr': 'O', 'fortran_order': False, 'shape': %s, }", "{'descr': [('x', '<i2')], 'shape': %s}", "%s", "((((%s",
    "{'descr': '<f8', 'fortran_order': False, 'shape': ", "{'descr': 'V0', 'fortran_order': False, 'shape': %s, }",
    "[" * 9000, "{'descr': 'q9', 'fortran_order': 3, 'shape': %s}",
]  # fmt: skip
SHAPES = [
    "(2, 2, 8, 8)",
    "(2, 2, 700000, 700000)",
    "(2, 2, 1, 1000000000)",
    "(4611686018427387904, 9)",
    "(-1, 2)",
    "()",
]
SHAPES += ["(2, 2, 0, 8)", "(2, 2, 0.5, 8)", "3", f"({10**30},)", "(0,)", "None"]
ARRAYS = [
    lambda a: np.full(a.shape, np.nan), lambda a: np.full(a.shape, np.inf), lambda a: a * 1e300, lambda a: a * 1j,
    lambda a: a.astype("U9"), lambda a: a[:0], lambda a: a[1:], lambda a: a - 9, lambda a: a.astype(object),
    lambda a: a[None, :, None], lambda a: a > 3, lambda a: np.array(7), lambda a: a.astype(np.float16),
    lambda a: np.array([(1, 2)] * len(a), "<i2, <i2"), lambda a: a.astype(np.uint64) * 2**40, lambda a: a * 500,
    lambda a: np.full(a.shape, -(2**63)), lambda a: np.zeros(10**6, np.uint8), lambda a: a / 1e6 + 0.25,
    lambda a: a.astype("M8[us]"),
]  # fmt: skip
SIDES = [0, -5, 34, 10**9, 2**62, np.nan, np.inf, 1j, "x", [1, 2], 33.5, True]
names = count()  # a recording is read once: another one has another name


def saved(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


FILES = {
    "n.bin": nmnist(ROWS * 5), "p.dat": dat(ROWS * 5), "a.aedat": aedat2(random_rows(40)), "d.aedat": davis(ROWS * 5),
    "t.aedat": aedat3(ROWS * 3), "f.npy": saved(np.ones((T, 2, 8, 8), np.float32)), "e.npy": saved(TONIC),
    **{f"{kind}.raw": random_file(kind, np.random.default_rng(0), 40) for kind in ("evt2", "evt3")},
}  # fmt: skip
ROW_ARRAYS = dict(zip("xypt", np.array(ROWS * 3).T, strict=True))


def some_archive(r: Random) -> bytes:
    """An .npz of events with arrays that are no events, or whose headers lie."""
    arrays = {name: saved(values) for name, values in ROW_ARRAYS.items()}
    if r.random() < 0.2:
        places = np.stack([ROW_ARRAYS[name] for name in "yxt"], 1)
        arrays = {"pos": saved(places), "neg": saved(places)}
    for _ in range(r.choice((1, 1, 2))):
        name, how = r.choice(list(arrays)), r.random()
        if how < 0.5:
            arrays[name] = saved(r.choice(ARRAYS)(np.load(BytesIO(saved(ROW_ARRAYS.get(name, ROW_ARRAYS["t"]))))))
        elif how < 0.6:
            arrays[r.choice(["height", "width", "\x1b]0;x\x07" + "n" * 5000, "events"])] = arrays.pop(name)
        elif how < 0.8:
            arrays |= {side: saved(np.array(r.choice(SIDES))) for side in ("height", "width")}
        else:
            arrays[name] = some_array_header(arrays[name], r)
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", r.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
        if r.random() < 0.02:  # unpacks to 2 GB
            archive.writestr("bomb.npy", b"")
            archive.filelist[-1].file_size = 2 << 30
    return buffer.getvalue()


def some_array_header(data: bytes, r: Random) -> bytes:
    header = r.choice(HEADERS)
    text = (header % r.choice(SHAPES) if "%s" in header else header).encode() + b"\n"
    version = r.choice((1, 2, 3, 9))
    length = r.choice((len(text), len(text), 0, 2**16 - 1))
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text + data[-99:]


def some_header(data: bytes, r: Random) -> bytes:
    """One of the numbers in the text at the beginning is another one, or four bytes are a number."""
    places = list(re.finditer(rb"\d+", data[:200]))
    if places and r.random() < 0.6:
        start, end = r.choice(places).span()
        return data[:start] + str(r.choice(NUMBERS)).encode() + data[end:]
    at = r.randrange(max(1, len(data) - 4))
    number = r.choice([n for n in NUMBERS if -1 <= n < 2**31])
    return data[:at] + number.to_bytes(4, "little", signed=True) + data[at + 4 :]


def one(r: Random, folder: Path) -> str:
    """What becomes of an altered recording."""
    name, data = r.choice(list(FILES.items()))
    how = r.random()
    if how < 0.35:
        name, data = "e.npz", some_archive(r)
    elif how < 0.55:
        data = some_array_header(data, r) if name.endswith(".npy") else some_header(data, r)
    elif how < 0.65:
        data = some_bytes(some_header(data, r), r, 128)
    else:
        data = some_bytes(data, r, 128)
    path = folder / f"{next(names)}{name}"
    path.write_bytes(data)
    settings = FrameSettings(T, r.choice((8, (4, 6))), r.choice(("count", "time")), resize=r.choice(("area", "8bit")))
    try:
        frames = read_frames(path, settings)
    except ValueError as error:
        return refusal(error, path)
    finally:
        path.unlink()
    assert frames.shape[:2] == (T, 2) and frames.dtype == np.float32 and np.isfinite(frames).all()
    return "frames"


if __name__ == "__main__":
    by_hand(one)
