"""How fast recordings of an event camera are read and decoded.

    python bench/events.py                              1,000 recordings of 200,000 events, needs 1.8 GB in --folder
    python bench/events.py --recordings 100             fewer

Measures the reader and the frames on one core; decoding with one worker and with one per core; a decoding that is
killed half-way and started again; and a start with everything in the cache. Frames are compared with counts of their
own before anything is timed. Writes bench/results/events-cpu.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

from bench.machine import machine, spread
from empf.data.aedat import read_events
from empf.data.event_cache import SHARD
from empf.data.event_frames import EventSettings, FrameSettings, read_frames
from empf.data.events import load_events
from empf.files import write_result

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
T, SIZE = 10, 48


def write_recordings(folder: Path, count: int, events: int) -> Path:
    """AEDAT 2.0 files whose events are uniform in place, polarity and time."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pairs = np.empty((events, 2), ">u4")
        pairs[:, 0] = rng.integers(0, 1 << 15, events)
        pairs[:, 1] = np.sort(rng.integers(0, 1_300_000, events))
        name = f"class{number % CLASSES}"
        file = folder / name / f"cifar10_{name}_{number // CLASSES}.aedat"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"#!AER-DAT2.0\r\n" + pairs.tobytes())
    return folder


def check(file: Path, events: int) -> None:
    """Compare the frames of a file with counts by another way, event by event."""
    pairs = np.frombuffer(file.read_bytes()[14:], ">u4").reshape(-1, 2)[:, 0].tolist()
    counts = np.zeros((T, 2, 128, 128))
    for number, address in enumerate(pairs):
        bin = min(number // (events // T), T - 1)
        counts[bin, 1 - (address & 1), 127 - (address >> 1 & 127), 127 - (address >> 8 & 127)] += 1
    if not np.array_equal(read_frames(file, FrameSettings(T, 128)), counts):
        raise SystemExit("error: the frames are wrong, nothing was timed")


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def rate(call: Callable[[Path], object], files: list[Path], events: int) -> dict:
    """Million events per second of processor time, file by file."""
    return spread([events / timed(lambda file=file: call(file), time.process_time) / 1e6 for file in files])


def in_fresh_process(folder: Path, cache: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--load", str(folder), str(cache), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def load_seconds(folder: Path, cache: Path, workers: int) -> float:
    """Seconds that `load_events` takes in a fresh process."""
    process = in_fresh_process(folder, cache, workers)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit("error: loading failed")
    return float(out.split()[-1])


def kill_half_way(folder: Path, cache: Path, shards: int, workers: int) -> int:
    """Start decoding, kill the process when half of the shards are there; how many were there in the end."""
    process = in_fresh_process(folder, cache, workers)
    while process.poll() is None and len(list(cache.glob("*.npy"))) < shards // 2:
        time.sleep(0.005)
    process.kill()  # its workers notice
    process.wait()
    return len(list(cache.glob("*.npy")))


def measure(root: Path, recordings: int, events: int) -> dict:
    cores = len(os.sched_getaffinity(0))
    folder, shards = write_recordings(root / "data", recordings, events), -(-recordings // SHARD)
    files = sorted(folder.rglob("*.aedat"))
    check(files[0], events)
    reader = rate(read_events, files[:50], events)
    frames = rate(lambda file: read_frames(file, FrameSettings(T, SIZE)), files[:50], events)

    one = load_seconds(folder, root / "one", 1)
    every = load_seconds(folder, root / "all", cores)
    cached = statistics.median(load_seconds(folder, root / "all", cores) for _ in range(3))

    kept = kill_half_way(folder, root / "killed", shards, cores)
    before = {f: f.stat().st_mtime_ns for f in (root / "killed").glob("*.npy")}
    rest = load_seconds(folder, root / "killed", cores)
    same = all(f.read_bytes() == (root / "one" / f.name).read_bytes() for f in (root / "killed").glob("*.npy"))
    return {
        "machine": machine(),
        "recordings": recordings, "events_per_recording": events, "frames": [T, 2, SIZE, SIZE],
        "reader_million_events_per_s_and_core": reader,
        "reader_and_frames_million_events_per_s_and_core": frames,
        "decode_seconds": {"1": round(one, 2), str(cores): round(every, 2)},
        "speed_of_all_cores_over_one": round(one / every, 2),
        "second_start_seconds": round(cached, 2),
        "killed": {
            "shards": shards, "shards_kept": kept, "seconds_for_the_rest": round(rest, 2),
            "kept_shards_decoded_again": sum(f.stat().st_mtime_ns != t for f, t in before.items()),
            "equals_uninterrupted": same,
        },
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description="Measure reading and decoding of events.", allow_abbrev=False)
    p.add_argument("--recordings", type=int, default=1000)
    p.add_argument("--events", type=int, default=200_000, help="per recording")
    p.add_argument("--folder", type=Path, help="where the temporary files go")
    p.add_argument("--json", type=Path, default=RESULTS / "events-cpu.json", metavar="FILE")
    p.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.load:
        folder, cache, workers = args.load
        print(timed(lambda: load_events(folder, EventSettings(T, SIZE), cache=cache, workers=int(workers))))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        result = measure(Path(root), args.recordings, args.events)
    print(json.dumps(result, indent=1))
    write_result(args.json, json.dumps(result, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
