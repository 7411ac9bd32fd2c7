"""Recordings of every format, against files that are written event by event as the formats say."""

import struct
import zipfile

import numpy as np
import pytest
import torch
from event_decoders import DECODERS, counts, random_file
from make_events import HEADER, load_small

from empf.data.aedat import read_events
from empf.data.event_frames import Clip, FrameSettings, event_frames_of_file, read_frames
from empf.data.gesture import GESTURES
from empf.data.load import load_data
from empf.data.recordings import ARRAYS, has_recordings, load_arrays, read_recording

ROWS = [(3, 5, 1, 10), (33, 0, 0, 12), (0, 33, 1, 900), (3, 5, 1, 5_000)]  # column, row, on, microseconds


def found(events) -> list[tuple[int, int, int, int]]:
    return list(
        zip(events.x.tolist(), events.y.tolist(), events.on.astype(int).tolist(), events.t.tolist(), strict=True)
    )


def nmnist(rows) -> bytes:
    return b"".join(bytes([x, y, on << 7 | t >> 16, t >> 8 & 255, t & 255]) for x, y, on, t in rows)


def dat(rows, header: bytes = b"% Data file\n% Width 304\n% Height 240\n") -> bytes:
    return header + b"\x0c\x08" + b"".join(struct.pack("<II", t, x | y << 14 | on << 28) for x, y, on, t in rows)


def aedat3(rows, source: bytes = b"#Source 1: DVS128\r\n", overflows: int = 0) -> bytes:
    """Polarity events in packets of two, between packets of special events, with an invalid event in each."""
    data = b"#!AER-DAT3.1\r\n#Format: RAW\r\n" + source + b"#!END-HEADER\r\n"
    for at in range(0, len(rows), 2):
        events = [struct.pack("<II", 1 | on << 1 | y << 2 | x << 17, t) for x, y, on, t in rows[at : at + 2]]
        events.append(struct.pack("<II", 7 << 17 | 9 << 2, 1))
        data += struct.pack("<hhiiiiii", 0, 1, 8, 4, overflows, 1, 1, 1) + struct.pack("<II", 3, 5)
        data += struct.pack("<hhiiiiii", 1, 1, 8, 4, overflows, len(events), len(events), len(events) - 1)
        data += b"".join(events)
    return data


def davis(rows, chip: bytes = b"# AEChip: eu.seebetter.ini.chips.davis.DAVIS240C\r\n", size=(180, 240)) -> bytes:
    """With a frame sample and an external event between the events."""
    header = HEADER.replace(b"#End", chip + b"#End")
    words = [(size[0] - 1 - y) << 22 | (size[1] - 1 - x) << 12 | on << 11 for x, y, on, _ in rows]
    body = [struct.pack(">II", word, t) for word, (*_, t) in zip(words, rows, strict=True)]
    body[1:1] = [struct.pack(">II", 1 << 31 | 77 << 12, 11), struct.pack(">II", 1 << 10, 11)]
    return header + b"".join(body)


@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("a.bin", nmnist(ROWS), (34, 34)),
        ("a.dat", dat(ROWS), (240, 304)),
        ("a.dat", dat(ROWS, b"% no size\n"), (34, 34)),
        ("a.aedat", aedat3(ROWS), (128, 128)),
        ("a.aedat", aedat3(ROWS, b""), (34, 34)),
        ("a.aedat", aedat3(ROWS, b"#Source 1: DAVIS346\r\n"), (260, 346)),
        ("a.aedat", davis(ROWS), (180, 240)),
        ("a.aedat", davis(ROWS, b"# HardwareInterface: DAVIS346 blue\r\n", (260, 346)), (260, 346)),
    ],
)
def test_events_of_every_format(tmp_path, name, data, size):
    (tmp_path / name).write_bytes(data)
    events = read_recording(tmp_path / name)
    assert found(events) == ROWS and (events.height, events.width) == size
    (tmp_path / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{name} ends in the middle of"):
        read_recording(tmp_path / name)


@pytest.mark.parametrize("kind", DECODERS)
def test_random_files_are_decoded_as_the_formats_say(tmp_path, kind):
    """Places, polarity, time and counts, against decoders that know nothing of the library."""
    if kind == "aedat4":
        pytest.importorskip("aedat", reason="needs aedat")
    name, decode, size = DECODERS[kind]
    data, file = random_file(kind, np.random.default_rng(0)), tmp_path / name
    file.write_bytes(data)
    events = load_arrays(file) if file.suffix in ARRAYS else read_recording(file, "upright")
    wanted = decode(data)
    assert len(wanted) > 100 and found(events) == wanted and (events.height, events.width) == size
    for by in ("count", "time"):
        frames = event_frames_of_file(file, 4, size, by=by, orientation="upright")
        assert np.array_equal(frames, counts(wanted, 4, by, *size))


def test_clocks_of_the_formats_go_on(tmp_path):
    lost = nmnist([(1, 2, 1, 8_000), (0, 240, 0, 0), (1, 2, 0, 10)])
    (tmp_path / "a.bin").write_bytes(lost)
    assert found(read_recording(tmp_path / "a.bin")) == [(1, 2, 1, 8_000), (1, 2, 0, 8_202)]
    (tmp_path / "a.dat").write_bytes(dat([(1, 2, 1, 2**32 - 5), (1, 2, 0, 10)]))
    assert read_recording(tmp_path / "a.dat").t.tolist() == [2**32 - 5, 2**32 + 10]
    (tmp_path / "a.aedat").write_bytes(aedat3(ROWS, overflows=2))
    assert read_recording(tmp_path / "a.aedat").t.tolist() == [t + 2**32 for *_, t in ROWS]


def test_a_davis_without_events_says_so(tmp_path):
    file = tmp_path / "a.aedat"
    for data in (davis([])[:-16], davis([])):  # a header alone, and a frame sample with an external event
        file.write_bytes(data)
        with pytest.raises(ValueError, match="a.aedat is a recording of a DAVIS and has no events, only"):
            read_events(file)
    file.write_bytes(davis(ROWS, b"# AEChip: DAVIS999\r\n"))
    with pytest.raises(ValueError, match="it is damaged, or of a DAVIS that is not known"):
        read_events(file)


X, Y, ON, TIME = (np.array(values) for values in zip(*ROWS, strict=True))
FIELDS = np.dtype([("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")])
TONIC = np.array([(x, y, t, p) for x, y, p, t in ROWS], FIELDS)
BACKWARDS = np.array([3, 2, 1, 0])


@pytest.mark.parametrize(
    "arrays",
    [
        TONIC,
        dict(events=TONIC),
        dict(t=TIME, x=X, y=Y, p=ON),  # SpikingJelly
        dict(t=TIME.astype(float), x=X.astype(float), y=Y.astype(float), p=2.0 * ON - 1),
        dict(ts=TIME / 1e6 + 0.25, xs=X, ys=Y, polarity=ON.astype(bool)),  # seconds
        dict(t=TIME[BACKWARDS], x=X[BACKWARDS], y=Y[BACKWARDS], p=ON[BACKWARDS]),
        dict(
            pos=np.stack((Y, X, TIME), 1)[ON == 1], neg=np.stack((Y, X, TIME), 1)[ON == 0]
        ),  # ES-ImageNet: row, column, time
    ],
)
def test_events_from_arrays_by_name(tmp_path, arrays):
    file = tmp_path / ("a.npz" if isinstance(arrays, dict) else "a.npy")
    np.savez(file, **arrays) if isinstance(arrays, dict) else np.save(file, arrays)
    expected = torch.zeros(2, 2, 34, 34)
    for number, (x, y, on, _) in enumerate(ROWS):
        expected[number // 2, on, y, x] += 1
    assert torch.equal(event_frames_of_file(file, 2, 34), expected)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        (dict(a=X, b=Y), "holds the arrays a, b: events are arrays x, y, t, p, frames are a single array"),
        (dict(x=X, y=Y, t=TIME[1:], p=ON), "holds 4, 4, 3 and 4 of x, y, t, p"),
        (dict(x=X - 5, y=Y, t=TIME, p=ON), "has events outside of the sensor"),
        (dict(x=X * 100, y=Y, t=TIME, p=ON), "has events at column 3300, row 33, beyond every known sensor"),
        (dict(x=X, y=Y, t=TIME, p=ON, height=4, width=9), "has events at 33, 33, beyond 9x4 pixels"),
        (dict(x=X, y=Y, t=TIME, p=ON, height=10**9, width=9), "says that its sensor has 9x1000000000 pixels: it is"),
        (dict(x=X, y=Y, t=TIME, p=ON, height=np.nan, width=9), "says that its sensor has 9xnan pixels: it is damaged"),
        (dict(x=X * np.nan, y=Y, t=TIME, p=ON), "has events outside of the sensor"),
        (dict(x=X, y=Y, t=TIME * 1e300, p=ON), "has events outside of the sensor, or without a time"),
        (dict(x=X * 1j, y=Y, t=TIME, p=ON), "holds x, y, t or p that are not numbers"),
        (dict(x=X.astype(str), y=Y, t=TIME, p=ON), "holds x, y, t or p that are not numbers"),
        (dict(pos=X, neg=Y[:3]), "holds pos and neg that are no rows, columns and times"),
        ({"\x1b]0;x\x07" + "n" * 999: X, "b": X}, r"holds the arrays \?]0;x\?n+\.\.\.: events are"),
    ],
)
def test_arrays_that_are_no_events(tmp_path, arrays, problem):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a.npz {problem}"):
        event_frames_of_file(tmp_path / "a.npz", 2)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(99)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2, 700000, 700000), }",  # 14 TiB
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 1, 4000000000), }",
        f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**62}, 9), }}",
        "{'descr': 'O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f8', 'shape': ((((((",
        "(" * 9000,
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_headers_of_arrays_that_lie(tmp_path, header, suffix):
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(npy(header))
    if suffix == "npz":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", npy(header))
    with pytest.raises(ValueError, match=rf"cannot read .*a.{suffix} \(.*\): write the file again") as error:
        event_frames_of_file(file, 2)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_an_archive_may_not_unpack_to_all_memory(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10**5), y=np.zeros(10**5))
    monkeypatch.setattr("empf.data.recordings.MOST_UNPACKED", 10**6)
    with pytest.raises(ValueError, match=r"a.npz \(its arrays would take 1,600,\d+ bytes, of 1,000,000\)"):
        event_frames_of_file(tmp_path / "a.npz", 2)


def test_frames_may_not_take_all_memory(tmp_path):
    with pytest.raises(ValueError, match="10000000 frames of 48x48 pixels are too many: use fewer steps or smaller"):
        FrameSettings(10**7)
    (tmp_path / "a.dat").write_bytes(dat(ROWS, b"% Height 16000\n% Width 16000\n"))
    with pytest.raises(ValueError, match=r"a.dat: 100 frames of 16000x16000 pixels are too many"):
        event_frames_of_file(tmp_path / "a.dat", 100)
    (tmp_path / "b.dat").write_bytes(dat(ROWS, b"% Height 1000000000\n% Width 9\n"))
    with pytest.raises(ValueError, match="b.dat says that its sensor has 9x1000000000 pixels"):
        event_frames_of_file(tmp_path / "b.dat", 1)


def test_frames_beyond_single_precision(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 2, 8, 8), 1e300))
    with pytest.raises(ValueError, match=r"a.npy holds float64 \[2, 2, 8, 8\]: it must hold finite numbers"):
        event_frames_of_file(tmp_path / "a.npy", 2)


def test_polarity_events_of_another_size(tmp_path):
    data = bytearray(aedat3(ROWS))
    at = data.index(struct.pack("<hhii", 1, 1, 8, 4))
    data[at + 4 : at + 8] = struct.pack("<i", 4)
    (tmp_path / "a.aedat").write_bytes(data)
    with pytest.raises(ValueError, match="a.aedat has polarity events of 4 bytes, not 8: it is damaged"):
        read_recording(tmp_path / "a.aedat")


def test_the_sensor_is_fitted_into_the_frame(tmp_path):
    """A sensor of 240x180 keeps its aspect: 48 wide and 36 high, in the middle."""
    rows = [(x, y, 1, n) for n, (x, y) in enumerate((x, y) for x in range(0, 240, 5) for y in range(0, 180, 5))]
    (tmp_path / "a.aedat").write_bytes(davis(rows))
    frame = read_frames(tmp_path / "a.aedat", FrameSettings(1, 48))[0]
    assert frame.shape == (2, 48, 48) and (frame[1, 6:42] == np.float32(1 / 25)).all()
    assert frame.sum() == pytest.approx(36 * 48 / 25)
    wide = read_frames(tmp_path / "a.aedat", FrameSettings(1, (36, 48)))[0]
    assert (wide[1] == np.float32(1 / 25)).all() and wide.shape == (2, 36, 48)


def test_own_recordings_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    for name in ("one", "two"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(10):
            shifted = [(x, y, on, t + number) for x, y, on, t in ROWS]
            (tmp_path / "own" / name / f"{number}.bin").write_bytes(nmnist(shifted[: 3 + (name == "two")]))
    train, test = load_data(str(tmp_path / "own"))
    assert (len(train), len(test)) == (18, 2) and train.class_names == ["one", "two"]
    assert not train.spec.flip and train.spec.name == str(tmp_path / "own")  # mirrored digits are others
    (tmp_path / "own" / "one" / "thumbnail.png").touch()
    assert has_recordings(tmp_path / "own")


def gestures(folder, users: int = 2):
    """`users` recordings of 3 gestures each, of which the last user is for testing."""
    (folder / "DvsGesture").mkdir(parents=True)
    for user in range(users):
        rows = [(label, user, 1, 1000 * label + n) for label in (1, 2, 11) for n in range(label)]
        (folder / "DvsGesture" / f"user{user}_led.aedat").write_bytes(aedat3(rows))
        table = ["class,startTime_usec,endTime_usec"] + [f"{c},{1000 * c},{1000 * c + 500}" for c in (1, 2, 11)]
        (folder / "DvsGesture" / f"user{user}_led_labels.csv").write_text("\n".join(table) + "\n")
    names = [f"user{user}_led.aedat" for user in range(users)]
    (folder / "DvsGesture" / "trials_to_train.txt").write_text("\n".join(names[:-1]) + "\n")
    (folder / "DvsGesture" / "trials_to_test.txt").write_text(names[-1] + "\n")
    return folder


def test_dvs128_gesture_is_cut_and_divided_as_its_tables_say(tmp_path):
    train, test = load_small(gestures(tmp_path / "set"), tmp_path / "cache", T=1, size=128)
    for user, part in enumerate((train, test)):
        assert part.split == "trials" and part.class_names == list(GESTURES) and part.labels.tolist() == [0, 1, 10]
        for frames, label in zip(part.frames, (1, 2, 11), strict=True):
            assert frames.sum() == frames[0, 1, user, label] == label
    (tmp_path / "set" / "DvsGesture" / "user0_led.aedat").unlink()
    with pytest.raises(FileNotFoundError, match="no recording .*user0_led.aedat, which user0_led_labels.csv cuts"):
        load_small(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "set" / "DvsGesture" / "trials_to_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no trials_to_test.txt in"):
        load_small(tmp_path / "set", tmp_path / "cache")


def test_a_part_of_a_recording(tmp_path):
    (tmp_path / "a.bin").write_bytes(nmnist(ROWS))
    assert read_frames(Clip(tmp_path / "a.bin", 12, 5_000), FrameSettings(1, 34)).sum() == 2
