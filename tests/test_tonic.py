"""Data sets of tonic, and whatever is used like them."""

import numpy as np
import pytest
import torch

import empf.data
from empf.data import from_tonic
from empf.data.load import hold_out, make_batches

FIELDS = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])


class Recordings(list):
    """(events, label) as tonic gives them, of a sensor of 12x8 pixels."""

    sensor_size = (12, 8, 2)
    classes = ("left", "right", "up")


def recordings(count: int = 12, events: int = 50) -> Recordings:
    rng = np.random.default_rng(0)
    made = Recordings()
    for number in range(count):
        array = np.empty(events, FIELDS)
        array["x"], array["y"], array["p"] = (rng.integers(0, most, events) for most in (12, 8, 2))
        array["t"] = np.sort(rng.integers(0, 9_000, events))
        made.append((array, number % 3))
    return made


@pytest.mark.parametrize("by", ["count", "time"])
def test_frames_are_the_counts_of_the_events(by):
    data = recordings()
    found = from_tonic(data, T=5, size=(8, 12), by=by)
    assert found.class_names == ["left", "right", "up"] and found.labels.tolist() == [0, 1, 2] * 4
    assert found.spec.size == (8, 12) and not found.spec.flip
    for frames, (events, _) in zip(found.frames, data, strict=True):
        expected = torch.zeros(5, 2, 8, 12)
        first, last = events["t"][0], events["t"][-1]
        for number, (x, y, t, p) in enumerate(events.tolist()):
            expected[number // 10 if by == "count" else (t - first) * 5 // (last - first + 1), p, y, x] += 1
        assert torch.equal(frames.float(), expected)
    train, test = hold_out(found, 0.25)
    assert (len(train), len(test)) == (9, 3)
    ((events, labels), *_) = make_batches(train, 4, train=True)
    assert events.shape == (5, 4, 2, 8, 12) and labels.shape == (4,)
    assert empf.data.from_tonic is from_tonic


def test_frames_that_the_data_set_makes_itself():
    tonic = pytest.importorskip("tonic")
    data = recordings()
    transform = tonic.transforms.ToFrame(sensor_size=data.sensor_size, n_time_bins=4)
    frames = Recordings((transform(events), label) for events, label in data)
    made = from_tonic(frames, T=4, size=(8, 12))
    assert torch.equal(made.frames.float(), torch.from_numpy(np.stack([f for f, _ in frames])).float())


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (
            (np.zeros((3, 2, 8, 12)), 0),
            r"recording 0 of Recordings is an array \[3, 2, 8, 12\]: it must be",
        ),
        ((np.zeros(3, [("x", int), ("y", int)]), 0), "recording 0 of Recordings holds the arrays x, y, width, height"),
        (
            (np.zeros(3, FIELDS), "left"),
            "recording 0 of Recordings has the label 'left': it must be",
        ),
        ((np.array([(12, 0, 0, 1)], FIELDS), 0), "recording 0 of Recordings has events at 12, 0, beyond 12x8 pixels"),
    ],
)
def test_what_does_not_fit_is_named(item, problem):
    with pytest.raises(ValueError, match=problem):
        from_tonic(Recordings([item]), T=2)
    with pytest.raises(ValueError, match="Recordings has no recordings: download it first"):
        from_tonic(Recordings())
