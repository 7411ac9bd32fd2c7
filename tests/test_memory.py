"""Memory of training: what is counted, what the theory says, and the command that shows both."""

import json
from dataclasses import replace

import pytest
import torch

import empf
from empf import recompute
from empf.diagnose import __main__ as diagnose
from empf.diagnose.training_memory import example, saved, theory, training_memory


@pytest.fixture
def threads():
    """Give back what the command sets for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Activations are made again even where they are as small as in these tests."""
    monkeypatch.setattr(recompute, "SMALL", 0)


@pytest.mark.parametrize(
    "network",
    [
        {}, {"neuron": "lif"}, {"neuron": "mem_bn", "parallel": 0.5}, {"arch": "vgg_snn", "in_channels": 2},
        {"arch": "resnet34"}, {"image_size": 64, "width": 0.0625},
    ],
    ids=str,
)  # fmt: skip
def test_theory_is_what_is_counted(network):
    """The formula knows shapes only, and the count what is alive in memory."""
    config = empf.ModelConfig(**{"width": 0.125, "image_size": 16, **network})
    for T in (1, 3):
        model, x = example(replace(config, T=T), 8, "cpu")
        for through_time in (False, True):
            wanted = theory(model.config, 8, through_time)
            assert saved(model, x, through_time)["bytes"] == pytest.approx(wanted, rel=0.05)


def test_theory_where_activations_are_small(monkeypatch):
    """Those of the later stages are kept as plain modules do."""
    config = empf.ModelConfig(width=0.125, image_size=16, T=2)
    whole = theory(config, 8, False)
    monkeypatch.setattr(recompute, "SMALL", 8 * 8 * 16 * 16 - 1)
    model, x = example(config, 8, "cpu")
    assert whole < saved(model, x, False)["bytes"] == pytest.approx(theory(config, 8, False), rel=0.05)
    assert theory(replace(config, seca=1), 8, False) is None


def test_memory_is_constant_online_and_linear_through_time():
    config = empf.ModelConfig(width=0.125, image_size=16, in_channels=1)
    rows = training_memory(config, 4, steps=(1, 2, 5))
    by = {(row["T"], row["learning"]): row for row in rows}
    for T in (2, 5):
        for learning in ("random", "every"):
            row = by[T, learning]
            assert row["saved"] == by[2, "every"]["saved"] <= 0.5 * row["saved_plain"]
            assert row["theory"] == by[2, "every"]["theory"] and row["saved_plain"] == by[2, "every"]["saved_plain"]
        assert by[T, "stbp"]["saved"] == pytest.approx(T * by[1, "stbp"]["saved"], rel=0.01)
    assert by[1, "every"]["saved"] < 0.6 * by[2, "every"]["saved"]  # no potential before the first step
    row = by[2, "random"]
    parameters = sum(p.numel() for p in empf.build(replace(config, T=2)).parameters())
    assert row["parameters"] == row["gradients"] == row["optimizer"] == 4 * parameters
    assert row["potentials"] == 4 * 4 * empf.account(empf.build(config))["neurons"]
    parts = ("saved", "potentials", "parameters", "gradients", "optimizer", "effective_weights")
    assert all(row["total"] == sum(row[part] for part in parts) for row in rows)
    assert all(row["allocated"] is None for row in rows)


@pytest.mark.gpu
def test_memory_allocated_on_a_gpu():
    rows = training_memory(empf.ModelConfig(width=0.25), 16, "cuda", steps=(1, 4))
    assert all(row["allocated"] > row["total"] - row["gradients"] for row in rows)
    allocated = {(row["T"], row["learning"]): row["allocated"] for row in rows}
    assert allocated[4, "every"] < 1.1 * allocated[1, "every"] and allocated[4, "stbp"] > 1.5 * allocated[1, "stbp"]


def test_memory_command(tmp_path, capsys, threads):
    out = tmp_path / "memory.json"
    size = ["--width", "0.125", "--image-size", "16", "--batch-size", "4", "--T", "2", "1"]
    flags = ["--memory", "--threads", "1", *size, "--json", str(out)]
    diagnose.main([*flags, "--figure", str(tmp_path / "memory.svg")])
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert {"torch", "commit", "date"} <= found["machine"].keys()
    assert [(row["T"], row["learning"]) for row in rows] == [(T, name) for T in (1, 2) for name in empf.online.LEARNING]
    assert all(row["saved"] <= 0.5 * row["saved_plain"] for row in rows if row["learning"] != "stbp")
    assert "<svg" in (tmp_path / "memory.svg").read_text() and "stbp" in capsys.readouterr().out
