"""The data loader alone: images per second, and memory over an epoch.

    python bench/data.py                       a resident set (CIFAR's shape) and a streamed one (ImageNet's shape)
    python bench/data.py --data FOLDER         CIFAR-100 from a folder instead of random pixels
    python bench/data.py --workers 8 --images 20000

The streamed set is synthetic, parquet files of `--images` JPEGs of 500 x 375 pixels and about 110 kB in a temporary
folder: 1 % grey, 1 % CMYK and 0.2 % broken ones. An epoch is run with every number of workers; memory is that of this
process and its workers together (proportional set size: shared pages count once), sampled over the epoch.
Writes bench/results/data-cpu.json.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

from bench.machine import machine
from empf.data.batches import Augment, Batches
from empf.data.load import load_data
from empf.data.sets import DATASETS, ImageSet
from empf.data.streaming import StreamBatches
from empf.files import write_result

RESULTS = Path(__file__).parent / "results"
AUGMENT = Augment(crop=True, flip=True, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
GREY, CMYK, BROKEN = 100, 100, 500  # one image of so many


def synthetic_imagenet(
    folder: Path, images: int, *, size: tuple[int, int] = (500, 375), classes: int = 1000, row_group: int = 100
) -> list[str]:
    """Write `train-*.parquet` and a smaller `validation-*.parquet`; returns where the broken training images are.

    A few pictures of smooth noise are stored many times, each in colour, grey and CMYK. Image i has the label
    i mod `classes`.
    """
    rng, kinds = np.random.default_rng(0), []
    for _ in range(16):
        octaves = [rng.normal(0, 30, (2**n, 2**n, 3)) for n in range(1, 10)]
        layers = [
            np.asarray(Image.fromarray(o[..., c].astype(np.float32)).resize(size)) for o in octaves for c in range(3)
        ]
        noise = np.stack(layers).reshape(len(octaves), 3, *size[::-1]).sum(0).transpose(1, 2, 0)
        picture = Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8))
        kinds.append({mode: _jpeg(picture.convert(mode)) for mode in ("RGB", "L", "CMYK")})
    broken = []
    for split, count in (("train", images), ("validation", max(images // 10, 1))):
        shards = min(8, count)
        bounds = [count * n // shards for n in range(shards + 1)]
        for shard, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            file, rows = folder / f"{split}-{shard:05}-of-{shards:05}.parquet", []
            for i in range(first, last):
                mode = "L" if i % GREY == 50 else "CMYK" if i % CMYK == 75 else "RGB"
                encoded = kinds[i % len(kinds)][mode]
                if split == "train" and i % BROKEN == 10:
                    encoded = encoded[: len(encoded) // 3]
                    broken.append(f"row {i - first} of {file}")
                rows.append({"bytes": encoded, "path": None})
            table = pa.table({"image": rows, "label": [i % classes for i in range(first, last)]})
            pq.write_table(table, file, row_group_size=row_group, compression="none", use_dictionary=False)
    return broken


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def memory_mb() -> float:
    """Of this process and those that it started, shared pages counted once."""
    total = 0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:  # it ended since it was listed
            continue
    return total / 1e6


@contextmanager
def sampled_memory(every: float) -> Iterator[list[float]]:
    samples, done = [memory_mb()], threading.Event()

    def sample() -> None:
        while not done.wait(every):
            samples.append(memory_mb())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def epoch(made: Batches | StreamBatches, every: float = 0.2) -> dict:
    """One epoch. Growth of the memory: the median of the last third of the samples less that of the second third."""
    with sampled_memory(every) as samples:
        began = time.perf_counter()
        for count, (images, _) in enumerate(made, 1):
            if count == 1:  # it waits for processes to start and buffers to fill
                first, warm, before = time.perf_counter(), len(images), samples[0]
                samples.clear()
        seconds = time.perf_counter() - first
        samples.append(memory_mb())
    third = max(len(samples) // 3, 1)
    growth = statistics.median(samples[-third:]) - statistics.median(samples[third : 2 * third] or samples)
    return {
        "images_per_s": round((len(made) * made.batch_size - warm) / seconds, 1),
        "first_batch_s": round(first - began, 2),
        "memory_mb": {"before": round(before), "peak": round(max(samples)), "growth": round(growth, 1)},
    }


def resident(folder: str | None, batch_size: int, images: int = 50_000) -> dict:
    """CIFAR-100, or random images of its shape."""
    if folder is not None:
        data, _ = load_data("cifar100", folder)
    else:
        spec = DATASETS["cifar100"]
        pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
        data = ImageSet(pixels, torch.randint(100, (images,)), [str(n) for n in range(100)], spec)
    return {"images": len(data), **epoch(Batches(data, batch_size, train=True, augment=AUGMENT))}


def streamed(images: int, batch_size: int, workers: list[int], buffer: int) -> dict:
    """An epoch of a synthetic set for each number of workers; checks that the broken images are named, once each."""
    with tempfile.TemporaryDirectory() as folder:
        broken = synthetic_imagenet(Path(folder), images)
        data, test = load_data("imagenet1k", folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        result = {"images": len(data), "kb_per_image": round(size / (len(data) + len(test)) / 1e3), "buffer": buffer}
        for count in workers:
            made = StreamBatches(data, batch_size, train=True, augment=AUGMENT, workers=count, buffer=buffer)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                row = epoch(made)
            named = sum("skipped row" in str(w.message) for w in caught)
            if not (named == len(made.broken) and set(made.broken) <= set(broken)):
                raise SystemExit(f"error: {named} broken images named, {len(made.broken)} found, {len(broken)} written")
            result[f"{count} workers"] = row | {"broken_named_once": named}
            print(f"streamed, {count} workers: {json.dumps(result[f'{count} workers'])}", flush=True)
    return result


def main() -> None:
    p = argparse.ArgumentParser(description="Measure the data loader alone.", allow_abbrev=False)
    p.add_argument("--data", help="local folder of CIFAR-100 (default: random pixels)")
    p.add_argument("--images", type=int, default=5000, help="in the streamed set (default: 5000)")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="for the streamed set; 0 is measured too")
    p.add_argument("--buffer", type=int, default=1024, help="encoded images held for shuffling (default: 1024)")
    p.add_argument("--json", type=Path, default=RESULTS / "data-cpu.json", metavar="FILE")
    args = p.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), "batch_size": args.batch_size}
    result["streamed"] = streamed(args.images, args.batch_size, sorted({0, args.workers}), args.buffer)
    result["resident"] = resident(args.data, args.batch_size)
    print(f"resident: {json.dumps(result['resident'])}", flush=True)
    write_result(args.json, json.dumps(result, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
