"""Frames of event recordings, against counts that are made event by event."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from make_events import PLACE, aedat2, random_rows

from empf.data.event_frames import event_frames_of_file, resize_8bit, resize_area


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


def test_bins_of_equal_time_divide_the_whole_time(tmp_path):
    file = tmp_path / "a.aedat"
    times = [109, *range(100, 109)]  # not ascending: a clock that was set back
    file.write_bytes(aedat2([(t - 100, 0, 0, t) for t in times]))
    frames = event_frames_of_file(file, 5, 128, by="time", orientation="mirrored")
    assert [f[1, 0, 118:].flip(0).tolist() for f in frames] == [
        [float(t // 2 == i) for t in range(10)] for i in range(5)
    ]


@pytest.mark.parametrize("begin", [0, 2**32 - 4_321])
def test_bins_of_equal_time_where_the_clock_wraps(tmp_path, begin):
    file = tmp_path / "a.aedat"
    file.write_bytes(aedat2([(3, 4, 0, (begin + 10 * i) % 2**32) for i in range(1000)]))
    assert event_frames_of_file(file, 10, 128, by="time").sum((1, 2, 3)).tolist() == [100] * 10


def test_fewer_events_than_bins_come_last(tmp_path):
    file = tmp_path / "a.aedat"
    file.write_bytes(aedat2(random_rows(3)))
    assert event_frames_of_file(file, 4, 128).sum((1, 2, 3)).tolist() == [0, 0, 0, 3]


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
    assert np.array_equal(event_frames_of_file(file, 4, (3, 4)), resize_area(frames, (3, 4)))
    with pytest.raises(ValueError, match=rf"a\.{suffix} holds uint8 \[4, 2, 6, 8\]: .* \[T = 5, 2, H, W\]"):
        event_frames_of_file(file, 5)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"cannot read .*a\.{suffix} .*: write the file again"):
        event_frames_of_file(file, 4)
