"""bench/runtimes.py: cells that are there are not measured again, others are; the table and the picture of all."""

import json

import pytest

from bench import deploy, runtimes


def spread(value: float) -> dict:
    return {"median": value, "quartiles": [0.9 * value, 1.1 * value]}


@pytest.fixture
def measured(monkeypatch):
    """(width, spikes, threads, batches) of each measurement that is asked for, which takes 1, 3 and 2 ms."""
    asked = []
    monkeypatch.setattr(deploy, "prepare", lambda folder, config, names: dict.fromkeys(names))
    monkeypatch.setattr(deploy, "load_contender", lambda name, path, device: name)

    def times(nets, device, batch, rounds):
        asked.append((batch, rounds))
        ms = dict(zip(nets, map(spread, (1.0, 3.0, 2.0)), strict=True))
        over = {name: spread(ms[name]["median"]) for name in list(nets)[1:]}
        return {"ms": ms, "speed_of_packed_over": over, "rounds": rounds}

    monkeypatch.setattr(deploy, "measure_times", times)
    monkeypatch.setattr(runtimes, "installed", lambda name: "1.0")
    monkeypatch.setattr(runtimes.torch, "set_num_threads", lambda threads: None)
    return asked


def test_what_is_there_is_not_measured_again(measured, tmp_path, capsys):
    flags = ["--widths", "0.125", "--threads", "1", "2", "--json", str(tmp_path / "found.json")]
    runtimes.main([*flags, "--batches", "1"])
    assert measured == [(1, 40)] * 4
    runtimes.main([*flags, "--batches", "1", "16"])
    assert measured[4:] == [(16, 13)] * 4
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == 8 == len({tuple(row[name] for name in runtimes.CELL) for row in rows})
    over = rows[0]["packed_over"]["ONNX Runtime"]
    assert over == {"median": 0.5, "quartiles": [0.455, 0.556]}  # of a spread of 2
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert "0.50 (0.46 to 0.56)" in capsys.readouterr().out
