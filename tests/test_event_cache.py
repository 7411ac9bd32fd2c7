"""The cache of frames: what is decoded, by whom, once."""

import multiprocessing
import os
import sys
import time

import pytest
import torch
from filelock import FileLock
from make_events import aedat2, load_small, random_rows, recordings

from empf.data import event_cache
from empf.data.event_frames import event_frames_of_file


def test_what_is_in_the_cache_is_not_decoded_again(tmp_path, monkeypatch):
    folder, cache = recordings(tmp_path / "dvs", classes=2, each=20), tmp_path / "cache"
    decoded = []
    read = event_cache.read_frames
    monkeypatch.setattr(event_cache, "read_frames", lambda file, s: decoded.append(file.path.name) or read(file, s))

    # two damaged files in the second of three shards: both named, the other two shards are kept
    for name in ("cifar10_class0_9.aedat", "cifar10_class1_10.aedat"):
        damaged = folder / name.split("_")[1] / name
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"class0_9\.aedat ends in the middle of an event.*class1_10\.aedat ends in"):
        load_small(folder, cache=cache)
    assert len(decoded) == 40 and len(list(cache.glob("*.npy"))) == 2

    for name in ("cifar10_class0_9.aedat", "cifar10_class1_10.aedat"):
        (folder / name.split("_")[1] / name).write_bytes(whole)
    decoded.clear()
    first = load_small(folder, cache=cache)
    assert len(decoded) == 16

    decoded.clear()
    second = load_small(folder, cache=cache)
    assert not decoded
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(first, second, strict=True))

    # what a killed process leaves, and what a bad disk does to a shard
    shards = sorted(cache.glob("*.npy"))
    (cache / f".{shards[0].name}.123.tmp").write_bytes(b"half")
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    third = load_small(folder, cache=cache)
    assert 0 < len(decoded) <= 16 and not list(cache.glob(".*.tmp"))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(first, third, strict=True))

    # a changed file, then each changed setting
    file = folder / "class0" / "cifar10_class0_0.aedat"
    file.write_bytes(aedat2(random_rows(200, seed=77)))
    os.utime(file, ns=(1, 1))
    decoded.clear()
    changed = load_small(folder, cache=cache)[0]
    assert len(decoded) == 16
    assert torch.equal(changed.frames[0].float(), event_frames_of_file(file, 3, 8))
    for setting in (dict(by="time"), dict(orientation="mirrored"), dict(T=2), dict(size=4), dict(resize="8bit")):
        decoded.clear()
        load_small(folder, cache=cache, limit=1, **setting)
        assert decoded, setting


def test_several_processes_decode_the_same(tmp_path):
    folder = recordings(tmp_path / "dvs", classes=2, each=20)
    alone = load_small(folder, cache=tmp_path / "a")
    together = load_small(folder, cache=tmp_path / "b", workers=2)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == sorted(f.name for f in (tmp_path / "b").iterdir())
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the process to kill is forked")
def test_a_killed_decoding_is_continued(tmp_path, monkeypatch):
    folder, cache = recordings(tmp_path / "dvs", classes=2, each=32), tmp_path / "cache"  # 4 shards
    options, read = {"workers": 2, "cache": cache}, event_cache.read_frames
    with monkeypatch.context() as patch:
        patch.setattr(event_cache, "read_frames", lambda *arguments: time.sleep(0.02) or read(*arguments))
        process = multiprocessing.get_context("fork").Process(target=load_small, args=(folder,), kwargs=options)
        process.start()
        while process.is_alive() and not list(cache.glob("*.npy")):
            time.sleep(0.01)
        process.kill()
        process.join()
    kept = {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")}
    assert 0 < len(kept) < 4
    with FileLock(cache / ".lock", timeout=20):  # the workers of the killed process have noticed
        pass
    continued = load_small(folder, **options)
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    whole = load_small(folder, **{**options, "cache": tmp_path / "other"})
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(continued, whole, strict=True))


@pytest.mark.parametrize("file", [True, False])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, file, monkeypatch):
    folder, cache = recordings(tmp_path / "dvs", classes=2, each=2), tmp_path / "cache"
    if file:
        cache.touch()
    else:

        def denied(path, *arguments, **options):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(type(cache), "mkdir", denied)
    with pytest.raises(OSError, match=r"cannot keep frames in .*cache \(.*\): set EMPF_CACHE to a folder"):
        load_small(folder, cache=cache)
