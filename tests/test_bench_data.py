"""bench/data.py: the synthetic set is what it says, and what is measured of it."""

import io
import json
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench import data as bench


def test_synthetic_set(tmp_path):
    broken = bench.synthetic_imagenet(tmp_path, 1100, size=(32, 24))
    files = sorted(tmp_path.glob("train-*"))
    tables = [pq.read_table(file).to_pylist() for file in files]
    where = [f"row {row} of {file}" for file, table in zip(files, tables, strict=True) for row in range(len(table))]
    rows = [row for table in tables for row in table]
    assert [row["label"] for row in rows] == [i % 1000 for i in range(1100)]
    assert sum(pq.ParquetFile(file).metadata.num_rows for file in tmp_path.glob("validation-*")) == 110
    modes, damaged = [], []
    for row, place in zip(rows, where, strict=True):
        try:
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                image.load()
                modes.append(image.mode)
        except OSError:
            damaged.append(place)
    assert damaged == broken and len(broken) == 3  # 0.2 %
    assert (modes.count("L"), modes.count("CMYK")) == (11, 11)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_measurement_of_a_small_set():
    got = bench.streamed(520, 64, [0], 64)
    assert got["images"] == 520 and 90 < got["kb_per_image"] < 130
    row = got["0 workers"]
    assert row["broken_named_once"] in (1, 2)  # the rest that fills no batch may hold one
    assert row["images_per_s"] > 1 and row["first_batch_s"] > 0
    assert row["memory_mb"]["before"] > 50 and row["memory_mb"]["peak"] < 10_000
    got = bench.resident(None, 64, images=640)
    assert got["images"] == 640 and got["images_per_s"] > 10


def test_result_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "streamed", lambda *arguments: {"asked": list(arguments)})
    monkeypatch.setattr(bench, "resident", lambda *arguments: {"asked": list(arguments)})
    file = tmp_path / "data.json"
    monkeypatch.setattr(sys, "argv", ["data.py", "--images", "9", "--workers", "3", "--json", str(file)])
    bench.main()
    result = json.loads(file.read_text())
    assert result["streamed"]["asked"] == [9, 64, [0, 3], 1024] and result["resident"]["asked"] == [None, 64]
    assert "cpu" in result["machine"]
