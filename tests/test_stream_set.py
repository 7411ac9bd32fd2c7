"""Which rows belong to a split that is streamed."""

import numpy as np
import pytest
from make_data import STREAMED, image_folder, stream_folder

from empf.data.classes import Classes
from empf.data.load import make_batches
from empf.data.sets import StreamSet
from empf.data.sources import Columns, ImageFiles, ParquetFiles


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
