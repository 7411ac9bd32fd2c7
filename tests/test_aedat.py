"""Reader and frames of event recordings, against files and counts that are made event by event."""

import base64
import builtins
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from event_decoders import aedat4
from make_events import HEADER, aedat2, random_rows

from empf.data.aedat import read_events, unwrapped
from empf.data.event_frames import FrameSettings, count_events, event_frames_of_file


def test_events_of_a_file(tmp_path):
    file = tmp_path / "a.aedat"
    file.write_bytes(aedat2([(5, 7, 0, 10), (5, 7, 1, 2**32 - 1)]))
    events = read_events(file)
    assert (events.x.tolist(), events.y.tolist(), events.on.tolist()) == ([120] * 2, [122] * 2, [True, False])
    assert events.t.tolist() == [10, 2**32 - 1]
    mirrored = read_events(file, "mirrored")
    assert (mirrored.x.tolist(), mirrored.y.tolist()) == ([122] * 2, [7] * 2)


TURN = 2**32


@pytest.mark.parametrize(
    ("stored", "goes_on"),
    [
        ([TURN - 2, TURN - 1, 0, 3], [TURN - 2, TURN - 1, TURN, TURN + 3]),
        ([TURN - 2, 1, TURN - 1, 4, TURN - 1, 5], [TURN - 2, TURN + 1, TURN - 1, TURN + 4, TURN - 1, TURN + 5]),
        ([5, TURN - 1, 5], [5, TURN - 1, TURN + 5]),  # a pause of more than half a turn, then the end of the turn
        ([10, 900_000, 20, 30], [10, 900_000, 900_000, 900_010]),  # reset by the camera
        ([10, 900_000, 20, 500_000, 0], [10, 900_000, 900_000, 1_399_980, 1_399_980]),
        ([100, 5_000, 90, 5_100], [100, 5_000, 90, 5_100]),  # out of order
        ([], []),
        ([7], [7]),
    ],
)
def test_the_clock_goes_on_where_it_begins_again(stored, goes_on):
    assert unwrapped(np.array(stored, np.uint32)).tolist() == goes_on
    assert unwrapped(np.array(stored, np.int64) % 2**23, 23).tolist()[:1] == [t % 2**23 for t in goes_on[:1]]


def test_a_clock_that_is_reset_all_the_time_takes_no_longer():
    """A damaged file: linear in the events, not quadratic."""
    t = np.tile(np.array([10**6, 0], np.uint32), 200_000)
    assert unwrapped(t)[-1] == 200_000 * 10**6


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
        (b"#!AER-DAT3.1\r\n" + bytes(64), r"ends in the middle of a packet: copy"),
        (b"#!AER-DAT1.0\r\n" + bytes(64), r"is AER-DAT1\.0: it must be AER-DAT2\.0 or AER-DAT3\.1, or"),
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
    with pytest.raises(ValueError, match="orientation must be one of transposed, mirrored, upright, got 'up'"):
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


# Six events of 346x260 pixels, written by dv-processing 2.0.4 with LZ4; compressed once more.
DV = (
    "c-oCqO;6iE5S@I8pp=gYP{pB#?H2V!W0OXl9E%iE5vc*SjVK^4R=i19kX>uNwo27Q#fe|gbAJSf9y#{dpV0#cxc1bsaoW_lA}fvc"
    "#(wjjXLskx<7Vs4v#n;gUNvXSD+PdM0BG-Sw;*0+%!@Ds(})0a7!{0*0{mH5c>v1|NywDXrD)Jv)ueWr;If2t84=EqHK+`9Tl6I*"
    "o}=G4sFCDGLQT`nJ4ADw8q*!E6**?74ce1KPcc98r$nE6DBx?w#emwc4(pZ?G5=dE6(4ZnoOGlcoUk3VPiu6fkem2kIqwwLOid`b"
    "8)z@kS%NHNLi_i~L?v6y?<wx-jK($tU&|qJ9qq(lh>Y#36R5UbwC8=!R9dvP*L|BQFm^ON>ljUgr%p4&+vgwI{>YLGP3`CP^(?!L"
    "x`Th}YU}1Cbuv)BJDcCjY|w~09J`BS`3PHv8`|a3y$>;pw6naiaXCPEGxI4Kj%W`7rf_76_(T#Qd>xhKOK|op9-^Ox3anZ1{UOjF"
    "C4?W~3jzA=0m2J#5q_OVcnvj#=Zh8iyqfzvaf$1G<ofg|aediszDT*oPD^pg9IWCH7cqMTD=@bNXSWU5g;`jbDnTv}mpI38zKDOB"
    "*!%{rWBpw"
)


def test_aedat4_of_the_encoder_of_the_cameras(tmp_path):
    """Equal to what was written; longer files in all compressions were compared by hand."""
    pytest.importorskip("aedat", reason="needs aedat")
    (tmp_path / "a.aedat4").write_bytes(zlib.decompress(base64.b85decode(DV)))
    events = read_events(tmp_path / "a.aedat4")
    assert (events.height, events.width) == (260, 346)
    assert events.t.tolist() == [2**33 + 1000 * i for i in range(6)]
    assert events.x.tolist() == [60 * i for i in range(6)] and events.y.tolist() == [250 - 50 * i for i in range(6)]
    assert events.on.tolist() == [True, False] * 3
    decoded = aedat4((tmp_path / "a.aedat4").read_bytes())
    assert decoded == list(zip(*(a.tolist() for a in (events.x, events.y, events.on, events.t)), strict=True))
