"""Raw recordings of Prophesee, word by word. Random files of both encodings are in test_recordings.py."""

import struct
from pathlib import Path

import numpy as np
import pytest
from event_decoders import evt3

from empf.data import prophesee
from empf.data.prophesee import read_raw
from empf.data.recordings import read_recording

HIGH, LOW, X, BASE = 8 << 12, 6 << 12, 2 << 12, 3 << 12


def read(words: list[int], header: bytes = b"% evt 3.0\n", kind: str = "H"):
    t, x, y, on, size = read_raw(header + struct.pack(f"<{len(words)}{kind}", *words), Path("a.raw"))
    return list(zip(x.tolist(), y.tolist(), on.astype(int).tolist(), t.tolist(), strict=True)), size


def test_the_higher_part_of_the_time_is_whole():
    """The lower part of 12 bits does not carry into it: after 100 turns it would be 0.4 s ahead."""
    words = [7]
    for turn in range(100):
        words += [HIGH | turn, LOW | 4000, X | 1, LOW | 4090, X | 2 | 1 << 11]
    events, _ = read(words)
    assert events[-2:] == [(1, 7, 0, 99 * 4096 + 4000), (2, 7, 1, 99 * 4096 + 4090)]


@pytest.mark.parametrize("seconds", [16.0, 17.0, 40.0])
def test_the_clock_goes_on_after_24_bits_and_a_pause(seconds):
    """The higher part is sent in pauses too."""
    ticks = int(seconds * 1e6) >> 12
    words = [3, *(HIGH | tick % 4096 for tick in range(0, ticks + 1, 100)), HIGH | ticks % 4096, X | 9, LOW | 5, X | 9]
    assert [t for *_, t in read(words)[0]] == [ticks << 12, (ticks << 12) + 5]
    high = [8 << 28 | 2**28 - 1, 1 << 28 | 63 << 22 | 4 << 11 | 5, 8 << 28 | 1, 2 << 22 | 4 << 11 | 5]
    assert read(high, b"% evt 2.0\n", "I")[0] == [(4, 5, 1, 2**34 - 1), (4, 5, 0, 2**34 + 66)]


def test_vectors_follow_one_another():
    words = [HIGH, LOW | 9, 30, BASE | 1 << 11 | 100, 4 << 12 | 0b100000000001, 5 << 12 | 0xF03, 4 << 12 | 2]
    assert read(words)[0] == [(x, 30, 1, 9) for x in (100, 111, 112, 113, 121)]
    assert read([])[0] == read([HIGH, LOW | 9])[0] == []


@pytest.mark.parametrize(
    "header, size",
    [
        (b"% date 2024\n% evt 3.0\n% format EVT3;height=320;width=320\n% geometry 320x300\n% end\n", (300, 320)),
        (b"% format EVT3;width=640;height=480\n% end\n", (480, 640)),
        (b"% evt 3.0\n", None),
    ],
)
def test_what_the_header_says(header, size):
    """Its end is named: the first word may look like another line."""
    words = [ord("%"), HIGH, LOW | 9, X | 1] if b"% end" in header else [37 * 2, HIGH, LOW | 9, X | 1]
    assert read(words, header) == ([(1, words[0], 0, 9)], size)


@pytest.mark.parametrize(
    "data, problem",
    [
        (b"% evt 3.0\n\x00", "ends in the middle of an event: copy"),
        (b"% evt 2.0\n\x00\x00", "ends in the middle of an event: copy"),
        (b"% evt 3.0", "ends in its header: copy"),
        (b"% format EVT21;height=1\n% end\n", "is EVT 2.1, and what is read is EVT 2.0 and 3.0: convert it"),
        (b"% evt 4.0\n", "is EVT 4.0, and"),
        (bytes(8), "is of no encoding that it names, and what is read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, data, problem):
    (tmp_path / "b.raw").write_bytes(data)
    with pytest.raises(ValueError, match=rf"b.raw {problem}"):
        read_recording(tmp_path / "b.raw")


def test_any_words_are_read_without_a_fault(monkeypatch):
    """As the decoder of the tests reads them, apart from times, of which words at random know nothing."""
    monkeypatch.setattr(prophesee, "PART", 1_000)
    words = np.random.default_rng(0).integers(0, 2**16, 20_000).tolist()
    data = b"% evt 3.0\n" + struct.pack("<20000H", *words)
    wanted = [event[:3] for event in evt3(data)]
    assert len(wanted) > 5_000 and [event[:3] for event in read(words)[0]] == wanted
