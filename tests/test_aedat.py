"""Reader and frames of event recordings, against files and counts that are made event by event."""

import builtins
import struct
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_events import HEADER, aedat2, random_rows

from empf.data.aedat import read_events
from empf.data.event_frames import FrameSettings, count_events, event_frames_of_file, resize_8bit, resize_area

PLACE = {  # column, row
    "transposed": lambda x, y: (127 - y, 127 - x),
    "mirrored": lambda x, y: (127 - x, y),
}


def expected(rows, bins, T, orientation):
    """Counts [T, 2, 128, 128], one event after the other; channel 1 is brighter, which is bit 0."""
    counts = torch.zeros(T, 2, 128, 128)
    for (x, y, bit, _), t in zip(rows, bins, strict=True):
        column, row = PLACE[orientation](x, y)
        counts[t, 1 - bit, row, column] += 1
    return counts


@pytest.mark.parametrize("orientation", PLACE)
def test_frames_of_a_file_are_exact(tmp_path, orientation):
    rows = random_rows(1003, side=9) + [(127, 0, 1, 90_000), (0, 127, 0, 90_000), (127, 0, 1, 90_001)]
    file = tmp_path / "a.aedat"
    file.write_bytes(aedat2(rows))

    by_count = [min(i // (1006 // 4), 3) for i in range(1006)]  # the last bin takes the rest
    frames = event_frames_of_file(file, 4, 128, orientation=orientation)
    assert frames.dtype == torch.float32
    assert torch.equal(frames, expected(rows, by_count, 4, orientation))

    first, last = rows[0][3], rows[-1][3]
    by_time = [(t - first) * 7 // (last - first + 1) for *_, t in rows]
    frames = event_frames_of_file(file, 7, 128, by="time", orientation=orientation)
    assert torch.equal(frames, expected(rows, by_time, 7, orientation))
    assert (frames.sum((1, 2, 3)) == 0).any()  # the pause before the last events: empty bins are zero frames


def test_events_of_a_file(tmp_path):
    file = tmp_path / "a.aedat"
    file.write_bytes(aedat2([(5, 7, 0, 10), (5, 7, 1, 2**32 - 1)]))
    events = read_events(file)
    assert (events.x.tolist(), events.y.tolist(), events.on.tolist()) == ([120] * 2, [122] * 2, [True, False])
    assert events.t.tolist() == [10, 2**32 - 1]
    mirrored = read_events(file, "mirrored")
    assert (mirrored.x.tolist(), mirrored.y.tolist()) == ([122] * 2, [7] * 2)


def test_bins_of_equal_time_divide_the_whole_time(tmp_path):
    file = tmp_path / "a.aedat"
    times = [109, *range(100, 109)]  # not ascending: a clock that was set back
    file.write_bytes(aedat2([(t - 100, 0, 0, t) for t in times]))
    frames = event_frames_of_file(file, 5, 128, by="time", orientation="mirrored")
    assert [f[1, 0, 118:].flip(0).tolist() for f in frames] == [
        [float(t // 2 == i) for t in range(10)] for i in range(5)
    ]


def test_fewer_events_than_bins_come_last(tmp_path):
    file = tmp_path / "a.aedat"
    file.write_bytes(aedat2(random_rows(3)))
    assert event_frames_of_file(file, 4, 128).sum((1, 2, 3)).tolist() == [0, 0, 0, 3]


def test_a_mark_of_the_camera_is_not_a_pixel(tmp_path):
    rows = random_rows(20)
    whole = aedat2(rows)
    mark = struct.pack(">II", 1 << 15 | 77, rows[9][3])
    (tmp_path / "a.aedat").write_bytes(whole)
    (tmp_path / "b.aedat").write_bytes(whole[: len(HEADER) + 80] + mark + whole[len(HEADER) + 80 :])
    assert torch.equal(*(event_frames_of_file(tmp_path / f, 3, 128) for f in ("a.aedat", "b.aedat")))


@pytest.mark.parametrize("by", ["count", "time"])
@pytest.mark.parametrize("header", [HEADER, b""])
def test_a_recording_without_events_is_zero_frames(tmp_path, by, header):
    file = tmp_path / "a.aedat"
    file.write_bytes(header + aedat2([], b""))
    if header:
        assert torch.equal(event_frames_of_file(file, 3, 48, by=by), torch.zeros(3, 2, 48, 48))
    else:  # not even a header: the copy failed
        with pytest.raises(ValueError, match=r"a\.aedat is empty: copy"):
            event_frames_of_file(file, 3, 48, by=by)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (aedat2(random_rows(9))[:-3], r"ends in the middle of an event: copy"),
        (HEADER[:30], r"ends in its header: copy"),
        (HEADER + b"\xff" * 16, r"has addresses beyond 16 bits: it is damaged, or not a recording of a DVS128"),
        (HEADER + aedat2(random_rows(9), b"\x00\x01")[:-2], r"has addresses beyond 16 bits: it"),  # two bytes too late
        (b"#!AER-DAT3.1\r\n" + bytes(64), r"is AER-DAT3\.1: it must be AER-DAT2\.0, or"),
        (b"#!AER-DAT4.0\r\n" + bytes(64), r"is AER-DAT4\.0: .* with a name that ends in \.aedat4"),
    ],
)
def test_a_damaged_recording_is_named(tmp_path, data, problem):
    file = tmp_path / "cifar10_cat_7.aedat"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"cifar10_cat_7\.aedat " + problem):
        event_frames_of_file(file, 4)


def test_missing_file_and_wrong_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recording .*none.aedat"):
        event_frames_of_file(tmp_path / "none.aedat", 4)
    (tmp_path / "a.aedat4").write_bytes(aedat2(random_rows(9)))
    with pytest.raises(ValueError, match=r"a\.aedat4 does not begin like AEDAT 4: copy the recording again, or rename"):
        event_frames_of_file(tmp_path / "a.aedat4", 4)
    with pytest.raises(FileNotFoundError, match="no file .*none.npy"):
        event_frames_of_file(tmp_path / "none.npy", 4)
    with pytest.raises(ValueError, match="a.txt is not a recording: it must end in .aedat"):
        event_frames_of_file(tmp_path / "a.txt", 4)
    with pytest.raises(ValueError, match="by must be one of count, time, got 'events'"):
        FrameSettings(4, by="events")
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        FrameSettings(0)
    with pytest.raises(ValueError, match="orientation must be one of transposed, mirrored, got 'up'"):
        read_events(tmp_path / "none.aedat", "up")


def packets(events: list[np.ndarray]) -> SimpleNamespace:
    """A stand-in for the package that reads AEDAT 4: two packets of events between those of another stream."""

    class Decoder:
        def __init__(self, path: str):
            if "broken" in path:
                raise RuntimeError("failed to fill whole buffer")

        def id_to_stream(self) -> dict:
            return {0: {"type": "events", "width": 40, "height": 30}, 1: {"type": "imus"}}

        def __iter__(self):
            yield {"stream_id": 1, "imus": None}
            yield from ({"stream_id": 0, "events": e} for e in events)

    return SimpleNamespace(Decoder=Decoder)


def test_aedat4(tmp_path, monkeypatch):
    dtype = [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), (("p", "on"), "?")]
    first = np.array([(5, 39, 0, True), (6, 0, 29, False)], dtype)
    second = np.array([(9, 39, 0, True)], dtype)
    monkeypatch.setitem(sys.modules, "aedat", packets([first, second]))
    file = tmp_path / "a.aedat4"
    file.write_bytes(b"#!AER-DAT4.0\r\n")
    counts = count_events(read_events(file), 1)[0]  # 2 H W
    assert counts.shape == (2, 30, 40)
    assert counts.sum() == 3 and counts[1, 0, 39] == 2 and counts[0, 29, 0] == 1

    monkeypatch.setitem(sys.modules, "aedat", packets([]))
    assert len(read_events(file)) == 0
    broken = tmp_path / "broken.aedat4"
    broken.write_bytes(b"#!AER-DAT4.0\r\n")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.aedat4 \(failed to fill whole buffer\): copy"):
        read_events(broken)


def test_aedat4_without_the_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "aedat":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.aedat4").write_bytes(b"#!AER-DAT4.0\r\n")
    with pytest.raises(ValueError, match=r"a\.aedat4 is AEDAT 4, which needs a package: pip install aedat"):
        read_events(tmp_path / "a.aedat4")


def test_area_averaging_of_sparse_counts_is_exact():
    counts = np.random.default_rng(0).poisson(0.05, (3, 2, 128, 128))
    fine = counts.repeat(3, -1).repeat(3, -2)  # 384 = 48 * 8: whole pixels
    blocks = fine.reshape(3, 2, 48, 8, 48, 8).sum((3, 5)) / 64
    resized = resize_area(counts, 48)
    assert resized.dtype == np.float32
    assert (resized == blocks).all()
    assert (resized.astype(np.float16) == blocks).all()  # as the cache keeps them


@pytest.mark.parametrize(("height", "width", "size"), [(7, 5, 3), (5, 5, 5), (3, 4, 7), (4, 9, 1)])
def test_area_averaging_of_any_shape(height, width, size):
    frame = np.random.default_rng(1).integers(0, 50, (height, width))

    def shared(i, j, side):  # of the source pixel j and the pixel i of the result, as a part of the latter
        cell = Fraction(side, size)
        return max(Fraction(0), min((i + 1) * cell, Fraction(j + 1)) - max(i * cell, Fraction(j))) / cell

    exact = [
        [
            sum(
                shared(i, a, height) * shared(j, b, width) * int(frame[a, b])
                for a in range(height)
                for b in range(width)
            )
            for j in range(size)
        ]
        for i in range(size)
    ]
    assert resize_area(frame[None], size)[0].tolist() == np.array(exact, np.float64).astype(np.float32).tolist()


def test_the_8bit_resize_has_the_flaws_it_is_offered_for():
    counts = np.zeros((1, 2, 128, 128), np.int64)
    counts[0, :, :, :] = np.array([3, 1])[:, None, None]
    assert np.allclose(resize_8bit(counts, 48)[0, :, 20, 20], (253 / 255, 1))  # 3 and 1 wrap to 253, 255
    counts[0, 1] = 0
    assert (resize_8bit(counts, 48) == 0).all()  # nothing of the darker polarity is left
    sparse = np.random.default_rng(0).poisson(0.05, (4, 2, 128, 128))
    right, wrong = resize_area(sparse, 48), resize_8bit(sparse, 48)
    assert np.corrcoef(right[:, 0].ravel(), wrong[:, 0].ravel())[0, 1] < 0.5


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_frames_from_arrays(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 9, (4, 2, 6, 8), dtype=np.uint8)
    file = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(file, frames)
    else:
        np.savez(file, frames)
    assert np.array_equal(event_frames_of_file(file, 4, 3), resize_area(frames, 3))
    with pytest.raises(ValueError, match=rf"a\.{suffix} holds uint8 \[4, 2, 6, 8\]: .* \[T = 5, 2, H, W\]"):
        event_frames_of_file(file, 5)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"cannot read .*a\.{suffix} .*: write the file again"):
        event_frames_of_file(file, 4)
