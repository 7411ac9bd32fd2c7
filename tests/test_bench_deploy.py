"""bench/deploy.py: what it measures and compares, on networks small enough to wait for."""

import json
import os
import sys

import pytest
import torch
from deploy_tools import trained

from bench import deploy as bench
from empf.data.load import load_data
from empf.deploy.pack import pack
from empf.models import ModelConfig


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_measurement_of_a_small_network(tmp_path, monkeypatch):
    """Everything but the fresh processes, of which one is started."""
    config = ModelConfig(image_size=8, width=0.0625, T=2)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    fresh, asked = bench.in_fresh_process, []

    def one_process(*arguments):
        asked.append(arguments)
        return (
            fresh(*arguments)
            if len(asked) == 1
            else {"load_ms": 1.0, "first_call_ms": 2.0, "memory_mb": dict.fromkeys(("loaded", "1", "64"), 1)}
        )

    monkeypatch.setattr(bench, "in_fresh_process", one_process)
    names = bench.contenders("cpu", None)
    result = bench.measure(config, "cpu", torch.get_num_threads(), 3)
    assert [arguments[0] for arguments in asked] == list(result["file_mb"]) == list(names)
    assert result["first_call_ms"]["packed"] > result["load_ms"]["packed"]
    for name in (name for name in bench.RUNTIMES if name in names):
        assert result["difference_of"][name] < 1e-4
        assert result["file_mb"][name] < result["file_mb"]["model"] / 2
    assert (
        result["load_ms"]["packed"] > 0
        and result["memory_mb"]["packed"]["64"] >= result["memory_mb"]["packed"]["1"] > 0
    )
    assert result["file_mb"]["packed"] < result["file_mb"]["model"] / 5
    assert result["relative_difference"] < 1e-4
    for n in ("1", "64"):
        times = result["batch"][n]
        assert set(times["ms"]) == set(names) and times["speed_of_packed_over"]["model"]["median"] > 0
        assert times["images_per_s"]["packed"] == pytest.approx(
            1e3 * int(n) / times["ms"]["packed"]["median"], rel=0.05
        )
    assert {"cpu", "torch", "commit", "date", "threads"} <= set(result["machine"])
    assert "as fast as model.eval()" in bench.report(json.loads(json.dumps(result)))


def test_n_bit_spikes_are_exported_for_integers_and_without(tmp_path, monkeypatch):
    def export(packed, path, int8):
        path.write_text(str(int8))

    monkeypatch.setattr(bench, "installed", lambda name: "1.0")
    monkeypatch.setattr(bench.empf, "export_onnx", export)
    for bits, wanted in ((None, ["False", "False"]), (4, ["True", "False", "False"])):
        names = bench.contenders("cpu", bits)
        config = ModelConfig(image_size=8, width=0.0625, T=1, spike_bits=bits)
        paths = bench.prepare(tmp_path / str(bits), config, names)
        assert [paths[name].read_text() for name in bench.RUNTIMES if name in names] == wanted


@pytest.mark.parametrize("bits", [None, 4])
def test_a_difference_is_seen(bits):
    model, x = trained(spike_bits=bits)
    packed = pack(model)
    same = bench.compare(model, packed, x, exact=64)
    assert same["same_class"] == 1 and same["images"] == 64
    packed.net.blocks[4].conv1.bn.shift += 0.3
    packed.to("cpu")
    other = bench.compare(model, packed, x, exact=64)
    row = {"spike_bits": bits}
    assert bench.holds(row | same) and not bench.holds(row | other)
    if bits is None:
        assert same["relative_difference"] < 1e-4 < 1e-2 < other["relative_difference"]
    else:
        flips = {net: found["codes_that_differ"] for net, found in (("same", same), ("other", other))}
        alone = "given_the_codes_of_the_model"
        assert flips["same"][alone] <= flips["same"]["as_they_run"] < 1e-3
        # with the right codes before and behind it, only the layer that was changed is wrong
        assert 0 < flips["other"][alone] < flips["other"]["as_they_run"] / 2


def test_a_stopped_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(bench, "compare", lambda model, packed, images, exact: made.append(model) or {"images": 4})
    monkeypatch.setattr(bench, "train", lambda config, batches: config)
    monkeypatch.setattr(bench, "pack", lambda config: config)
    digits = load_data("digits", limit=64)
    monkeypatch.setattr(bench, "load_data", lambda name, folder: digits)
    file = tmp_path / "equality.json"
    arguments = ("unused", 0.0625, torch.get_num_threads(), 4, file)
    rows = bench.equality(*arguments)["networks"]
    assert len(made) == len(rows) == 36 and len({json.dumps(row) for row in rows}) == 36
    result = json.loads(file.read_text())
    del result["networks"][7:]
    file.write_text(json.dumps(result))
    assert sorted(map(json.dumps, bench.equality(*arguments)["networks"])) == sorted(map(json.dumps, rows))
    assert len(made) == 36 + 29
    bench.equality("unused", 0.03125, *arguments[2:])  # other settings: nothing of the file is used
    assert len(made) == 36 + 29 + 36
