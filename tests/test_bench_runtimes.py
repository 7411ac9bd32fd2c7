"""bench/runtimes.py: cells that are there are not measured again, others are; the table and the picture of all."""

import json

import pytest
import torch

from bench import deploy, runtimes

NAMES = ("packed", "model", "full precision", deploy.ONNX_RUNTIME, deploy.OPENVINO)


def spread(value: float) -> dict:
    return {"median": value, "quartiles": [0.9 * value, 1.1 * value]}


@pytest.fixture
def measured(monkeypatch):
    """What was asked for: networks prepared, (batch, rounds) timed at 1, 3, 2 and 4 ms, and fresh processes."""
    asked = {"prepared": [], "timed": [], "alone": []}

    def prepare(folder, config, names):
        asked["prepared"].append((config.width, config.spike_bits))
        return dict.fromkeys(names, folder / "file")

    def times(nets, device, batch, rounds):
        asked["timed"].append((batch, rounds))
        ms = dict(zip(nets, map(spread, (1.0, 3.0, 2.0, 4.0)), strict=True))
        over = {name: spread(ms[name]["median"]) for name in list(nets)[1:]}
        return {"ms": ms, "speed_of_packed_over": over, "rounds": rounds}

    def alone(name, path, device, threads, batch):
        asked["alone"].append((name, threads))
        return {"load_ms": 1.0, "first_call_ms": float(len(asked["alone"]))}

    monkeypatch.setattr(deploy, "contenders", lambda device, spike_bits: NAMES)
    monkeypatch.setattr(deploy, "size", lambda path: 2_000_000)
    monkeypatch.setattr(deploy, "prepare", prepare)
    monkeypatch.setattr(deploy, "load_contender", lambda name, path, device: name)
    monkeypatch.setattr(deploy, "measure_times", times)
    monkeypatch.setattr(deploy, "in_fresh_process", alone)
    monkeypatch.setattr(runtimes, "differences", lambda nets: dict.fromkeys(NAMES[1:], 1e-6))
    monkeypatch.setattr(runtimes, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(runtimes, "installed", lambda name: "1.0")
    monkeypatch.setattr(runtimes.torch, "set_num_threads", lambda threads: None)
    return asked


def test_what_is_there_is_not_measured_again(measured, tmp_path, capsys):
    flags = ["--widths", "0.125", "--threads", "1", "2", "--json", str(tmp_path / "found.json")]
    flags += ["--files", str(tmp_path / "nets")]
    runtimes.main([*flags, "--batches", "1", "--repeats", "0"])
    assert measured["timed"] == [(1, 40)] * 4 and not measured["alone"]
    assert measured["prepared"] == [(0.125, None), (0.125, 4)]  # once for all numbers of threads, and for good
    for _ in range(2):
        runtimes.main([*flags, "--batches", "1", "16", "--repeats", "3"])
    assert measured["timed"][4:] == [(16, 13)] * 4 and len(measured["prepared"]) == 2
    names = [name for name in NAMES if name != "full precision"]
    assert measured["alone"] == [(name, "2") for name in names] * 6  # in turns, with most threads
    result = json.loads((tmp_path / "found.json").read_text())
    rows = result["rows"]
    assert len(rows) == 8 == len({tuple(row[name] for name in runtimes.CELL) for row in rows})
    over = rows[0]["packed_over"]["ONNX Runtime"]
    assert over == {"median": 0.5, "quartiles": [0.455, 0.556]}  # of a spread of 2
    assert rows[0]["packed_over"]["OpenVINO"]["median"] == 0.25
    assert [row["first_call_ms"]["packed"]["median"] for row in result["first"]] == [17.0, 5.0]  # of 1, 5 and 9
    assert result["first"][0]["file_mb"] == dict.fromkeys(names, 2.0)
    assert (tmp_path / "found.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "0.50 (0.46 to 0.56)" in printed and "0.25 (0.23 to 0.28)" in printed


def test_only_the_spikes_that_were_asked_for(measured, tmp_path):
    flags = ["--widths", "0.125", "--batches", "1", "--threads", "1", "--repeats", "0", "--spikes", "4-bit"]
    runtimes.main([*flags, "--json", str(tmp_path / "found.json")])
    assert measured["prepared"] == [(0.125, 4)] and measured["timed"] == [(1, 40)]


def test_spikes_in_bf16_have_their_own_cells(measured, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runtimes, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(deploy, "InBf16", asked.append)
    monkeypatch.setattr(deploy, "Compiled", lambda path, accurate: asked.append(accurate))
    flags = ["--widths", "0.125", "--batches", "1", "--threads", "1", "--json", str(tmp_path / "found.json")]
    runtimes.main([*flags, "--repeats", "1"])
    assert asked == ["packed", False] and len(measured["timed"]) == 3
    assert measured["prepared"] == [(0.125, None), (0.125, 4)]
    result = json.loads((tmp_path / "found.json").read_text())
    kinds = [[row["spikes"] for row in result[part]] for part in ("rows", "first")]
    assert kinds == [["4-bit", "bf16", "float"], ["4-bit", "float"]]


def test_other_logits_are_not_timed(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "differences", lambda nets: {"OpenVINO": 0.1})
    with pytest.raises(SystemExit, match="nothing was timed: {'OpenVINO': 0.1}"):
        runtimes.main(["--widths", "0.125", "--threads", "1", "--json", str(tmp_path / "found.json")])
    assert not measured["timed"] and not (tmp_path / "found.json").exists()


def test_differences_are_those_to_the_packed_network():
    class Net(torch.nn.Module):
        config = deploy.SimpleNamespace(in_channels=1, image_size=2)

        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x.flatten(1)[None]

    found = runtimes.differences({"packed": Net(1.0), "model": Net(1.0), "OpenVINO": Net(1.25)})
    assert found == {"model": 0.0, "OpenVINO": pytest.approx(0.25)}
