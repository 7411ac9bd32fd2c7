"""bench/events.py: what it measures, on a few small recordings and without the fresh processes."""

import pytest

from bench import events as bench
from empf.data.event_cache import SHARD
from empf.data.event_frames import EventSettings
from empf.data.events import load_events

SETTINGS = EventSettings(bench.T, bench.SIZE)


def test_measurement_of_a_few_recordings(tmp_path, monkeypatch):
    def load(folder, cache, workers):
        return bench.timed(lambda: load_events(folder, SETTINGS, cache=cache, workers=1))

    def kill_half_way(folder, cache, shards, workers):
        load_events(folder, SETTINGS, cache=cache, workers=1, limit=1)
        return len(list(cache.glob("*.npy")))

    monkeypatch.setattr(bench, "load_seconds", load)
    monkeypatch.setattr(bench, "kill_half_way", kill_half_way)
    result = bench.measure(tmp_path, 2 * SHARD, 1003)
    assert result["reader_and_frames_million_events_per_s_and_core"]["median"] > 0
    assert result["second_start_seconds"] < 2
    killed = result["killed"]
    assert killed["shards"] == 2 and killed["shards_kept"] in (1, 2)
    assert killed["kept_shards_decoded_again"] == 0 and killed["equals_uninterrupted"]


def test_nothing_is_timed_if_the_frames_are_wrong(tmp_path, monkeypatch):
    bench.write_recordings(tmp_path, 1, 50)
    (file,) = tmp_path.rglob("*.aedat")
    bench.check(file, 50)
    right = bench.read_frames
    monkeypatch.setattr(bench, "read_frames", lambda *arguments: right(*arguments)[:, :, ::-1])
    with pytest.raises(SystemExit, match="the frames are wrong"):
        bench.check(file, 50)
