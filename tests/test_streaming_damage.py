"""Streamed sets whose images, files or labels are damaged."""

import os
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_data import STREAMED, encoded, labels_of, plain_picture, stream_files, stream_folder
from PIL import Image

from empf.data.batches import Augment
from empf.data.load import load_data, make_batches
from empf.data.sets import DATASETS


@pytest.fixture(autouse=True)
def spec(monkeypatch):
    monkeypatch.setitem(DATASETS, "streamed", STREAMED)


def damaged_set(folder, count: int = 400, broken: tuple[int, ...] = (5, 17, 300)):
    items = [encoded(plain_picture(i).convert("L" if i % 50 == 1 else "RGB")) for i in range(count)]
    items[2] = encoded(plain_picture(2).convert("CMYK"), "JPEG")
    items[3] = encoded(plain_picture(3).quantize())
    items[4] = encoded(Image.fromarray(np.full((30, 40), 40000, np.uint16)))
    for at in broken:
        items[at] = {"bytes": items[at]["bytes"][:-30], "path": None}
    return stream_files(folder, items)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_once_and_replaced(tmp_path, workers):
    train, test = load_data("streamed", damaged_set(tmp_path))
    made = make_batches(train, 50, train=True, workers=workers, augment=Augment(crop=True, flip=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        epochs = []
        for epoch in range(2):
            made.set_epoch(epoch)
            epochs.append(list(made))
    ours = [str(w.message) for w in caught if "skipped" in str(w.message)]
    assert len(ours) == 3
    for at in (5, 17, 300):
        (message,) = [m for m in ours if m.startswith(f"skipped row {at} of {tmp_path / 'train.parquet'}: ")]
        assert "\n" not in message and not message.endswith(": ")
    for got in epochs:
        assert [len(labels) for _, labels in got] == [50] * 8
        assert set(labels_of(got)) == set(range(400)) - {5, 17, 300}  # the other images of the batch fill in
    tests = make_batches(test, 64, train=False, workers=workers)
    with pytest.warns(UserWarning, match="skipped row (5|17|300) of .*validation.parquet"):
        seen = labels_of(tests)
    assert sorted(seen) == sorted(set(range(400)) - {5, 17, 300})
    assert set(tests.broken) == {f"row {at} of {tmp_path / 'validation.parquet'}" for at in (5, 17, 300)}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_are_one_error(tmp_path, workers):
    train, _ = load_data("streamed", damaged_set(tmp_path, broken=tuple(range(0, 400, 20))))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"\d of the 400 images .* cannot be used, .*copy it"),
    ):
        list(make_batches(train, 20, train=True, workers=workers))


def test_labels_out_of_range_are_one_error(tmp_path):
    items = [encoded(plain_picture(i)) for i in range(8)]
    train, test = load_data("streamed", stream_files(tmp_path, items, [-1] * 8))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"the label is -1, but streamed has .* 0\.\.399"):
        list(make_batches(train, 8, train=True))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="cannot be used"):
        list(make_batches(test, 8, train=False))


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    folder = damaged_set(tmp_path, broken=())
    file = folder / "validation.parquet"
    group = pq.ParquetFile(file).metadata.row_group(20)
    begin = min(group.column(n).data_page_offset for n in range(group.num_columns))
    content = bytearray(file.read_bytes())
    content[begin : begin + 30] = os.urandom(30)
    file.write_bytes(content)
    _, test = load_data("streamed", folder)
    made = make_batches(test, 1000, train=False)
    with (
        pytest.warns(UserWarning, match=r"skipped rows 14\d to 146 of .*validation.parquet") as caught,
        pytest.raises(ValueError, match="7 of the 400 images"),  # more than 1 %
    ):
        list(made)
    assert len([w for w in caught if "skipped" in str(w.message)]) == 1


def test_a_file_that_vanishes_is_one_error(tmp_path):
    folder = stream_folder(tmp_path, {"train": [40], "validation": [8]})
    train, _ = load_data("streamed", folder)
    (folder / "train-00000-of-00001.parquet").unlink()
    for workers in (0, 1):
        with pytest.raises(ValueError, match="train-00000-of-00001.parquet") as caught:
            list(make_batches(train, 8, train=True, workers=workers))
        assert "\n" not in str(caught.value)
