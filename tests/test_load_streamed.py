"""Sets that are read while they are used: what is found where, in folders and on the Hub."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils import file_utils
from make_data import STREAMED, image_folder, stream_folder

from empf.data import find
from empf.data.load import load_data
from empf.data.sets import DATASETS

datasets.disable_progress_bars()


@pytest.fixture
def streamed(monkeypatch):
    """The data set `streamed`: like imagenet1k, but small."""
    monkeypatch.setitem(DATASETS, "streamed", STREAMED)


def test_imagenet_is_tested_on_its_validation_images(tmp_path, streamed):
    assert DATASETS["imagenet1k"].hub_id == "ILSVRC/imagenet-1k"
    assert (DATASETS["imagenet1k"].image_size, DATASETS["imagenet1k"].num_classes) == (224, 1000)
    folder = stream_folder(tmp_path, {"train": [20, 13], "validation": [9], "test": [30]})
    train, test = load_data("streamed", folder)
    assert (len(train), len(test)) == (33, 9)
    assert train.spec is STREAMED and train.class_names == [str(i) for i in range(400)]
    for file in folder.glob("validation-*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no validation split in .*: expected validation-\*\.parquet"):
        load_data("streamed", folder)


def test_streamed_image_folder(tmp_path, streamed, monkeypatch):
    monkeypatch.setitem(DATASETS, "streamed", replace(STREAMED, num_classes=10))
    folder = image_folder(tmp_path, "cifar10", train=23, test=11)
    (folder / "test").rename(folder / "val")
    (folder / "train/class003/more").mkdir()
    (folder / "train/class003/00003.png").rename(folder / "train/class003/more/ünï.JPEG")
    (folder / "train/class003/notes.txt").touch()
    train, _ = load_data("streamed", folder)
    assert len(train) == 23 and train.class_names == [f"class{i:03}" for i in range(10)]
    rows = [next(train.source.read(*block[:3], 0, 1)) for block in train.blocks]
    assert [row.label for row in rows] == [i % 10 for i in range(23)]  # one of each class in turn
    assert {row.where for row in rows} == {str(f) for f in (folder / "train").rglob("*.[pJ]*")}
    assert [row.where for row in rows][:12] == [r.where for r in read_all(load_data("streamed", folder, limit=12)[0])]


def read_all(data) -> list:
    return [row for block in data.blocks for row in data.source.read(*block[:3], 0, block[3])]


@pytest.mark.parametrize("limit", [1, 40, 150, 250, 1000])
def test_limit_of_a_streamed_set_is_spread_over_it(tmp_path, streamed, limit):
    folder = stream_folder(tmp_path, {"train": [130, 120, 51], "validation": [5]}, row_group=2)  # 151 row groups
    train, test = load_data("streamed", folder, limit=limit)
    labels = [row.label for row in read_all(train)]
    assert len(train) == len(labels) == min(limit, 301) and len(test) == min(limit, 5)
    assert labels == sorted(set(labels))
    # no gap is longer than that between the first images of 100 groups, or of as many as there are images
    assert max(np.diff([-1, *labels, 301])) <= 301 / min(limit, 100) + 4


def test_streamed_from_the_hub(tmp_path, streamed, monkeypatch):
    folder = stream_folder(tmp_path, {"train": [20, 13], "validation": [9], "test": [30]})
    asked, fetched = [], []

    def builder(hub_id):
        asked.append(hub_id)
        splits = ("train", "validation", "test")
        files = {split: [f"hf://x/{file.name}" for file in sorted(folder.glob(f"{split}-*"))] for split in splits}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    def fetch(repo, name, *, repo_type, revision):
        fetched.append((repo, name, repo_type, revision))
        return str(folder / name)

    def resolve(address):
        return SimpleNamespace(repo_id="r", path_in_repo=address[7:], repo_type="dataset", revision="main")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(find, "hf_hub_download", fetch)
    monkeypatch.setattr(find, "HfFileSystem", lambda: SimpleNamespace(resolve_path=resolve))
    train, test = load_data("streamed")
    assert asked == ["ILSVRC/imagenet-1k"]
    names = [file.name for file in sorted(folder.glob("*")) if not file.name.startswith("test")]
    assert sorted(fetched) == [("r", name, "dataset", "main") for name in names]  # the test images stay where they are
    assert [row.label for row in read_all(train)] == list(range(33))

    opened = []

    def xopen(address, mode):
        opened.append(address)
        return open(folder / address[7:], mode)

    monkeypatch.setattr(file_utils, "xopen", xopen)
    train, test = load_data("streamed", streaming=True)
    assert len(fetched) == 3 and set(opened) == {f"hf://x/{name}" for name in names}
    assert [row.label for row in read_all(train)] == list(range(33))
    assert [row.label for row in read_all(test)] == list(range(9))


@pytest.mark.parametrize(
    "error, message",
    [
        (datasets.exceptions.DatasetNotFoundError("'x' is a gated dataset"), r"imagenet-1k, then log in .*HF_TOKEN"),
        (ConnectionError("no route"), r"\(no route\): check the network, or pass a local copy with --data FOLDER"),
    ],
)
def test_imagenet_needs_a_token_and_a_network(monkeypatch, error, message):
    def builder(hub_id):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    with pytest.raises(FileNotFoundError, match=rf"cannot get ILSVRC/imagenet-1k .*{message}"):
        load_data("imagenet1k", streaming=True)


def test_damaged_shard_is_named_before_training(tmp_path, streamed):
    folder = stream_folder(tmp_path, {"train": [20, 13], "validation": [9]})
    shard = folder / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"cannot read .*train-00001-of-00002\.parquet \(.*copy the file again"):
        load_data("streamed", folder)
    pq.write_table(pa.table({"picture": [1], "label": [1]}), shard)
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has no column image, which other files have"):
        load_data("streamed", folder)
