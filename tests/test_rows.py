"""Reading some rows of a source."""

import numpy as np
import pytest
from make_data import stream_folder

from empf.data.rows import one_line, read_rows
from empf.data.sources import Columns, ParquetFiles


@pytest.mark.parametrize("wanted", [[0], [32], [5, 6, 7], [0, 19, 20, 32], list(range(33)), []])
def test_only_the_rows_that_are_wanted_are_read(tmp_path, wanted):
    folder = stream_folder(tmp_path, {"train": [20, 13]}, row_group=7)
    source = ParquetFiles.of([str(f) for f in sorted(folder.glob("train*"))], Columns().find)
    found = list(read_rows(source, source.blocks(), np.array(wanted, np.int64)))
    assert [number for number, _ in found] == [row.label for _, row in found] == wanted


def test_errors_are_one_line():
    assert one_line(ValueError("no\n such  file")) == "no such file" and one_line(KeyError()) == "KeyError"
