"""What the data sets that have a name look like, and which rows belong to a split that is streamed."""

import numpy as np
import pytest
from make_data import STREAMED, image_folder, random_set, stream_folder

from empf.data.classes import Classes
from empf.data.load import load_data, make_batches
from empf.data.sets import DATASETS, StreamSet
from empf.data.sources import Columns, ImageFiles, ParquetFiles


def test_digits_mean_and_std_are_those_of_the_training_images():
    train, _ = load_data("digits")
    scaled = train.images.double() / 255
    assert train.spec.mean == pytest.approx((scaled.mean().item(),), abs=5e-5)
    assert train.spec.std == pytest.approx((scaled.std().item(),), abs=5e-5)


def test_every_name_says_what_the_data_look_like():
    shapes = {name: (spec.channels, spec.image_size, spec.num_classes) for name, spec in DATASETS.items()}
    assert shapes == {
        "digits": (1, 8, 10),
        "cifar10": (3, 32, 10),
        "cifar100": (3, 32, 100),
        "imagenet200": (3, 64, 200),
        "imagenet1k": (3, 224, 1000),
        "dvs-cifar10": (2, 48, 10),
    }
    for name, spec in DATASETS.items():
        assert spec.name == name and len(spec.mean) == len(spec.std) == spec.channels


def test_a_set_moves_as_a_whole():
    data = random_set(7)
    moved = data.to("meta")
    assert len(moved) == 7 and moved.device.type == moved.labels.device.type == "meta"
    assert moved.class_names == data.class_names and moved.spec is data.spec


def stream_set(folder, **options) -> StreamSet:
    """33 images in groups of 7; image i has the label i."""
    stream_folder(folder, {"train": [20, 13]}, row_group=7)
    source = ParquetFiles.of([str(file) for file in sorted(folder.glob("train*"))], Columns().find)
    return StreamSet(source, source.blocks(), Classes([str(i) for i in range(400)]), STREAMED, **options)


def labels_of(data: StreamSet) -> list[int]:
    return [row.label for number, block in enumerate(data.blocks) for row in data.read(number, 0, int(block[3]))]


@pytest.mark.parametrize("rows", [[0], [6, 7], [3, 5, 19, 20, 32], list(range(0, 33, 2)), list(range(33))])
def test_chosen_rows_are_all_there_is(tmp_path, rows):
    data = stream_set(tmp_path)
    assert labels_of(data) == data.labels().tolist() == list(range(33))
    part = data.chosen(np.array(rows))
    assert len(part) == len(rows) and labels_of(part) == part.labels().tolist() == rows
    again = part.chosen(np.arange(0, len(rows), 2))
    assert labels_of(again) == again.labels().tolist() == rows[::2]
    limited = part.limited(2)
    assert labels_of(limited) == limited.labels().tolist() and set(labels_of(limited)) <= set(rows)
    made = make_batches(part, 4, train=False)
    assert sorted(label for _, labels in made for label in labels.tolist()) == rows


def test_chosen_files(tmp_path):
    source = ImageFiles.of_folder(image_folder(tmp_path, "cifar10", train=23) / "train")
    data = StreamSet(source, source.blocks(), Classes(source.names), STREAMED)
    part = data.chosen(np.array([1, 11, 22]))
    assert labels_of(part) == part.labels().tolist() == [1, 1, 2]
    assert labels_of(part.limited(2)) == [1, 1]
