"""bench/deploy.py: what it measures and compares, on networks small enough to wait for."""

import json
import os
import sys

import pytest
import torch
from deploy_tools import trained

from bench import deploy as bench
from empf.deploy import pack
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
            else {"load_ms": 1.0, "memory_mb": dict.fromkeys(("loaded", "1", "64"), 1)}
        )

    monkeypatch.setattr(bench, "in_fresh_process", one_process)
    result = bench.measure(config, "cpu", torch.get_num_threads(), 3)
    assert [arguments[0] for arguments in asked] == list(bench.CONTENDERS)
    assert (
        result["load_ms"]["packed"] > 0
        and result["memory_mb"]["packed"]["64"] >= result["memory_mb"]["packed"]["1"] > 0
    )
    assert result["file_mb"]["packed"] < result["file_mb"]["model"] / 5
    assert result["relative_difference"] < 1e-4
    for n in ("1", "64"):
        times = result["batch"][n]
        assert set(times["ms"]) == set(bench.CONTENDERS) and times["speed_of_packed_over"]["model"]["median"] > 0
        assert times["images_per_s"]["packed"] == pytest.approx(
            1e3 * int(n) / times["ms"]["packed"]["median"], rel=0.05
        )
    assert {"cpu", "torch", "commit", "date", "threads"} <= set(result["machine"])
    assert "as fast as model.eval()" in bench.report(json.loads(json.dumps(result)))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_difference_is_seen(bits):
    model, x = trained(spike_bits=bits)
    packed = pack(model)
    same = bench.compare(model, packed, x, exact=64)
    assert same["same_class"] == 1 and same["images"] == 64
    packed.body.blocks[4].conv1.synapse.bias += 0.3
    other = bench.compare(model, packed, x, exact=64)
    if bits is None:
        assert same["relative_difference"] < 1e-4 < 1e-2 < other["relative_difference"]
    else:
        assert same["codes_that_differ"] < 1e-3 < other["codes_that_differ"]
        assert same["at_first_by_at_most_steps"] <= 1 <= other["at_first_by_at_most_steps"]
