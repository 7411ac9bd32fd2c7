"""Streamed sets: who gets which image, the order, what a batch looks like, workers and memory."""

import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from make_data import STREAMED, assert_same, encoded, image_folder, labels_of, stream_files, stream_folder
from PIL import Image
from train_tools import metrics, run_train

import empf
from bench.data import memory_mb, synthetic_imagenet
from empf.data.batches import Augment
from empf.data.images import centre_crop
from empf.data.load import load_data, make_batches
from empf.data.sets import DATASETS
from empf.data.sources import ParquetFiles
from empf.data.streaming import LANES, StreamBatches, _shuffled

TRAIN, TEST = 103, 53  # spread over uneven shards and row groups of 7
CROPS = Augment(crop=True, flip=True)
EVERYTHING = Augment(crop=True, flip=True, cutout=5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


@pytest.fixture(autouse=True)
def spec(monkeypatch):
    monkeypatch.setitem(DATASETS, "streamed", STREAMED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stream_folder(tmp_path_factory.mktemp("set"), {"train": [40, 1, 62], "validation": [20, 33]})


@pytest.fixture
def sets(folder):
    return load_data("streamed", folder)


# ---- sharing and order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once(sets, world, workers):
    train, test = sets
    seen = []
    for rank in range(world):
        made = make_batches(test, 8, train=False, rank=rank, world=world, workers=workers)
        got = list(made)
        assert len(got) == len(made) and all(0 < len(labels) <= 8 for _, labels in got)
        seen += labels_of(got)
    assert sorted(seen) == list(range(TEST))

    left_out = []
    for epoch in range(2):
        seen = []
        for rank in range(world):
            made = make_batches(train, 8, train=True, seed=3, rank=rank, world=world, workers=workers, augment=CROPS)
            made.set_epoch(epoch)
            got = list(made)
            assert len(got) == len(made) == TRAIN // (8 * world)  # the same on every rank
            assert all(len(labels) == 8 for _, labels in got)
            seen += labels_of(got)
        assert len(set(seen)) == len(seen) == TRAIN // (8 * world) * 8 * world
        left_out.append(set(range(TRAIN)) - set(seen))
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("count, world, size", [(1, 1, 4), (2, 3, 4), (17, 2, 1), (16, 1, 1), (40, 3, 2)])
def test_every_image_once_in_odd_cases(tmp_path, count, world, size):
    folder = stream_folder(tmp_path, {"train": [count], "validation": [count]}, row_group=100)
    for part, train in zip(load_data("streamed", folder), (True, False), strict=True):
        if train and count < world * size:
            continue
        ranks = [make_batches(part, size, train=train, rank=rank, world=world) for rank in range(world)]
        seen = [label for made in ranks for label in labels_of(made)]
        assert len(seen) == len(set(seen)) == (count // (size * world) * size * world if train else count)


def test_image_folder_every_image_once(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "streamed", replace(STREAMED, num_classes=10))
    image_folder(tmp_path, "cifar10", train=30, test=21).joinpath("test").rename(tmp_path / "val")
    train, test = load_data("streamed", tmp_path)
    assert sorted(labels_of(make_batches(test, 8, train=False))) == sorted(i % 10 for i in range(21))
    got = list(make_batches(train, 10, train=True, augment=CROPS))
    assert sorted(labels_of(got)) == sorted(list(range(10)) * 3)
    # single files are drawn from the whole set, not from a buffer: the first batch is not one of each class in turn
    assert len(set(labels_of(got[:1]))) < 10


def test_the_order_is_drawn_anew_and_mixes_all_shards(sets):
    train, _ = sets

    def order(seed: int, epoch: int) -> list[int]:
        made = make_batches(train, 8, train=True, seed=seed, augment=CROPS)
        made.set_epoch(epoch)
        return labels_of(made)

    first = order(0, 0)
    assert first == order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert np.mean([a == b for a, b in zip(first, other, strict=True)]) < 0.1
    assert abs(np.corrcoef(np.arange(len(first)), first)[0, 1]) < 0.35
    assert np.mean(np.diff(first) == 1) < 0.15  # neighbours in the files are apart


def test_the_number_of_workers_changes_nothing(sets):
    train, test = sets
    for part, options in ((train, dict(train=True, seed=5, augment=EVERYTHING)), (test, dict(train=False))):
        whole = list(make_batches(part, 4, **options))
        for workers in (1, 2, 3):
            assert_same(list(make_batches(part, 4, workers=workers, **options)), whole)
    assert [StreamBatches(train, 4, train=True, workers=n).workers for n in (0, 1, 3, 7, 8, 15, 99)] == [
        0, 1, 2, 4, 8, 8, 16,
    ]  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_resumed_at_any_batch_is_the_same(sets, train):
    part = sets[0] if train else sets[1]

    def made(workers: int = 0) -> StreamBatches:
        made = make_batches(part, 3, train=train, seed=5, workers=workers, augment=EVERYTHING)
        made.set_epoch(2)
        return made

    whole = list(made())
    assert len(whole) == (34 if train else 18)
    for start in (1, LANES - 1, LANES, LANES + 1, len(whole) - 1, len(whole)):
        assert_same(list(made().iterate(start=start)), whole[start:])
    assert_same(list(made(2).iterate(start=LANES + 1)), whole[LANES + 1 :])


@pytest.mark.parametrize("before, after, size", [(1, 2, 6), (2, 1, 3), (3, 2, 2), (2, 3, 3), (4, 1, 2)])
def test_an_epoch_is_resumed_by_another_number_of_processes(sets, before, after, size):
    """The same joined batches of images, cropped and mixed alike: none is repeated or missed."""

    def made(world: int, batch_size: int, start: int, **options) -> list[tuple[torch.Tensor, ...]]:
        ranks = []
        for rank in range(world):
            part = make_batches(sets[0], batch_size, train=True, seed=5, rank=rank, world=world, augment=EVERYTHING)
            part.set_epoch(2)
            ranks.append(list(part.iterate(start, **options)))
        return [tuple(map(torch.cat, zip(*joined, strict=True))) for joined in zip(*ranks, strict=True)]

    whole = made(before, size, 0)
    assert len(whole) == TRAIN // (before * size)
    assert_same(made(after, before * size // after, 3, begun_by=before), whole[3:])
    if after == 3:
        with pytest.raises(ValueError, match="5 processes cannot share a batch of 6 images"):
            made(after, 2, 3, begun_by=5)


def test_a_resumed_epoch_reads_little_of_what_is_done(tmp_path, monkeypatch):
    folder = stream_folder(tmp_path, {"train": [400], "validation": [1]}, row_group=1)
    (file,) = folder.glob("train*")
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=2)
    train, _ = load_data("streamed", folder)
    read, blocks = ParquetFiles.read, []

    def counted(self, *arguments):
        blocks.append(arguments)
        return read(self, *arguments)

    monkeypatch.setattr(ParquetFiles, "read", counted)
    made = StreamBatches(train, 4, train=True, buffer=2 * LANES)
    whole = list(made)
    assert 200 <= len(blocks) <= 200 + LANES  # a block across the border of two lanes is read twice
    blocks.clear()
    assert_same(list(made.iterate(start=92)), whole[92:])
    assert len(blocks) <= 50  # 32 images are left


@pytest.mark.parametrize("count, most", [(0, 4), (1, 4), (4, 4), (50, 1), (300, 16)])
def test_the_buffer_holds_no_more_than_it_may(count, most):
    order = _shuffled(count, most, np.random.default_rng(0))
    assert sorted(order) == list(range(count))
    held, read = set(), 0
    for at in order:  # as a lane does it: read until the next image is there
        while at not in held:
            held.add(read)
            read += 1
        assert len(held) <= most
        held.remove(at)
    if count == 300:
        assert np.abs(order - np.arange(count)).max() > most  # some wait for long


def test_the_random_numbers_of_the_caller_are_left_alone(sets):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(make_batches(sets[0], 8, train=True, augment=EVERYTHING))
    assert torch.equal(torch.get_rng_state(), before)


# ---- what a batch looks like


def test_test_images_are_the_normalised_centre_crops(tmp_path):
    rng = np.random.default_rng(0)
    stored = [Image.fromarray(rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)) for i in range(5)]
    folder = stream_files(tmp_path, [encoded(image) for image in stored])
    spec = STREAMED
    got = {}
    for images, labels in make_batches(load_data("streamed", folder)[1], 2, train=False):
        got.update(zip(labels.tolist(), images, strict=True))
    assert sorted(got) == list(range(5))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (spec.mean, spec.std))
    for label, image in enumerate(stored):
        expected = (torch.from_numpy(centre_crop(image, 24).copy()).double() / 255 - mean) / std
        torch.testing.assert_close(got[label].double(), expected, rtol=0, atol=1e-5)


def test_training_images_are_cropped_the_same_in_every_batch(tmp_path):
    """An image looks the same whichever rank and batch it is in, and another way in another epoch."""
    rng = np.random.default_rng(0)
    items = [encoded(Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))) for _ in range(24)]
    train, _ = load_data("streamed", stream_files(tmp_path, items))

    def seen(augment: Augment, epoch: int = 0, **options) -> dict[int, torch.Tensor]:
        made = make_batches(train, train=True, seed=1, augment=augment, **options)
        made.set_epoch(epoch)
        return {y: x for images, labels in made for x, y in zip(images, labels.tolist(), strict=True)}

    whole = seen(CROPS, batch_size=6)
    assert len(whole) == 24 and all(image.shape == (3, 24, 24) for image in whole.values())
    for rank in range(2):
        for label, image in seen(CROPS, batch_size=4, rank=rank, world=2).items():
            assert torch.equal(image, whole[label])
    assert not any(torch.equal(image, whole[label]) for label, image in seen(CROPS, 1, batch_size=6).items())
    centred, flipped = seen(Augment(), batch_size=6), seen(Augment(flip=True), batch_size=6)
    mirrored = [torch.equal(flipped[y], centred[y].flip(2)) for y in range(24)]
    assert all(m or torch.equal(flipped[y], centred[y]) for y, m in enumerate(mirrored))
    assert 4 <= sum(mirrored) <= 20


def test_batches_are_cut_out_and_mixed(sets):
    def made(augment: Augment) -> list:
        return list(make_batches(sets[0], 8, train=True, seed=1, augment=augment))

    whole, holes = made(CROPS), []
    for (plain, _), (images, _) in zip(whole, made(replace(CROPS, cutout=6)), strict=True):
        assert torch.equal(images == 0, (images != plain))  # no normalised plain picture is 0
        holes += [tuple(hole.nonzero()[0].tolist()) for hole in (images == 0).all(1)]
    assert len(set(holes)) > 50
    for augment in (replace(CROPS, mixup=0.8), replace(CROPS, cutmix=1.0), replace(CROPS, label_smoothing=0.1)):
        shares = []
        for (plain, labels), (images, targets) in zip(whole, made(augment), strict=True):
            own, other = targets[range(8), labels], targets[range(8), labels.flip(0)]
            assert targets.shape == (8, 400) and torch.allclose(targets.sum(1), torch.ones(8), atol=1e-5)
            # each picture is of one colour, so its mean is a sum with the same shares as the targets
            colours = plain.mean((2, 3))
            if augment.label_smoothing:
                assert torch.equal(images, plain) and torch.allclose(own, torch.tensor(0.9 + 0.1 / 400))
                continue
            expected = own[:, None] * colours + other[:, None] * colours.flip(0)
            torch.testing.assert_close(images.mean((2, 3)), expected, rtol=0, atol=1e-3)
            shares.append(own[0].item())
        assert augment.label_smoothing or max(shares) - min(shares) > 0.3


# ---- processes


def descendants() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def data_workers(made) -> tuple:
    """The running batches after the first, and the worker processes."""
    before = set(descendants())
    running = iter(made)
    next(running)
    # the server that forks the workers, and a tracker of resources, may be new as well and have no work to do
    return running, [p for p in set(descendants()) - before if p.ppid() != os.getpid()]


def test_workers_start_from_a_process_full_of_threads_and_go(sets):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a forked child would wait for these threads for ever
    torch.rand(600, 600) @ torch.rand(600, 600)
    running, workers = data_workers(make_batches(sets[0], 2, train=True, workers=2))
    assert len(workers) == 2
    running.close()  # left early
    psutil.wait_procs(workers, timeout=20)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    torch.set_num_threads(threads)


def test_signals_to_the_group_leave_the_workers_alone(sets):
    """Training catches Ctrl-C and SIGTERM, and finishes its batch: that needs data."""
    made = make_batches(sets[0], 2, train=True, workers=2)
    expected = labels_of(made)
    running, workers = data_workers(made)
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in (*workers, *{worker.parent() for worker in workers}):
            worker.send_signal(number)
    time.sleep(0.2)
    assert labels_of(running) == expected[2:]


def test_a_killed_worker_is_one_error(sets):
    running, workers = data_workers(make_batches(sets[0], 2, train=True, workers=2))
    workers[0].kill()
    with pytest.raises(OSError, match="a process that reads data was killed .*use less --workers"):
        list(running)


UNTIL_KILLED = """
import sys, psutil
from empf.data.load import make_batches
from empf.data.load import load_data
made = iter(make_batches(load_data("imagenet1k", sys.argv[1])[0], 2, train=True, workers=2))
next(made)
print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
sys.stdin.read()
"""


def test_workers_go_with_a_process_that_is_killed(folder):
    """They would hold their buffers for ever."""
    command = [sys.executable, "-c", UNTIL_KILLED, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        children = [psutil.Process(int(number)) for number in training.stdout.readline().split()]
        training.kill()
    assert len(children) == 4  # two workers, the server that forked them, the tracker of resources
    psutil.wait_procs(children, timeout=20)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children)


def epoch_in_a_process_of_its_own(folder: Path) -> tuple[list[float], list[str]]:
    """One epoch of train.py in batches of 50; memory (MB) before each update, and what was warned of."""
    DATASETS["imagenet1k"] = replace(DATASETS["imagenet1k"], image_size=64)
    StreamBatches.__init__.__kwdefaults__["buffer"] = 256
    backward, samples = empf.online_backward, []

    def sampled(*arguments, **options):
        samples.append(memory_mb())
        return backward(*arguments, **options)

    empf.online_backward = sampled
    flags = ["--workers", "1", "--arch", "resnet18", "--T", "1", "--epochs", "1", "--batch-size", "50"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_train(
            "--dataset", "imagenet1k", *flags, "--limit", "5000", "--data", folder, "--output-dir", folder / "run"
        )
    return samples, [str(w.message) for w in caught]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from /proc")
def test_an_epoch_of_5000_images_needs_no_more_memory_at_its_end(tmp_path, monkeypatch):
    """Of train.py and its worker. Five batches are 12 MB as they are trained, 3 MB of pixels, 2 MB of files.

    A leak grows all the time. An allocator takes its pieces at first, and another now and then: hence the median of the
    second half, a new process, and an allocator that returns what is freed.
    """
    for name, value in (("ARENA_MAX", 1), ("MMAP_THRESHOLD_", 1 << 16), ("TRIM_THRESHOLD_", 1 << 16)):
        monkeypatch.setenv(f"MALLOC_{name}", str(value))
    broken = synthetic_imagenet(tmp_path, 5000, size=(160, 120))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        samples, warned = pool.submit(epoch_in_a_process_of_its_own, tmp_path).result()
    assert len(samples) == 100 and len(metrics(tmp_path / "run")) == 1
    windows = np.median(np.reshape(samples[50:], (10, 5)), axis=1)
    assert np.median(np.diff(windows)) < 1, windows
    named = [message.split(":")[0] for message in warned if "skipped" in message]
    assert sorted(named) == sorted(f"skipped {where}" for where in broken) and len(broken) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_gpu_equal_those_on_the_cpu(folder, workers):
    options = dict(train=True, seed=5, augment=EVERYTHING)
    expected = make_batches(load_data("streamed", folder)[0], 8, **options)
    got = make_batches(load_data("streamed", folder, device="cuda")[0], 8, workers=workers, **options)
    for (images, targets), (expected_images, expected_targets) in zip(got, expected, strict=True):
        assert images.is_cuda and targets.is_cuda
        torch.testing.assert_close(images.cpu(), expected_images, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.cpu(), expected_targets, rtol=0, atol=1e-6)
