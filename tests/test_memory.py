"""Memory of training: what is counted, and what the theory says."""

from dataclasses import replace

import pytest
import torch
from own_networks import Grouped, PlainNorms, Twice
from torch import nn

import empf
from empf import layer
from empf.diagnose.memory import example, network_memory, saved, saved_for_backward, theory, training_memory


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Activations are made again even where they are as small as in these tests."""
    monkeypatch.setattr(layer, "SMALL", 0)


@pytest.mark.parametrize(
    "network",
    [
        {}, {"neuron": "lif"}, {"neuron": "mem_bn", "parallel": 0.5}, {"arch": "vgg_snn", "in_channels": 2},
        {"arch": "resnet34"}, {"image_size": 64, "width": 0.0625}, {"shortcut": "current"},
        {"shortcut": "current", "neuron": "lif"},
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
    config = empf.ModelConfig(width=0.125, image_size=16, T=2, shortcut="current")
    whole = theory(config, 8, False)
    monkeypatch.setattr(layer, "SMALL", 8 * 8 * 16 * 16 - 1)
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


@pytest.mark.parametrize("kind, shape", [(Twice, (6,)), (PlainNorms, (1, 6, 6)), (Grouped, (2, 9))])
def test_networks_of_ones_own(kind, shape):
    """Online constant in T and linear through time; as many bytes as autograd says that it saves."""
    rows = {
        (row["T"], row["learning"]): row for T in (2, 4) for row in network_memory(kind(T), torch.randn(T, 5, *shape))
    }
    for T in (2, 4):
        assert rows[T, "random"] == {**rows[T, "every"], "learning": "random"}
        assert rows[T, "every"]["saved"] == rows[2, "every"]["saved"] <= rows[T, "every"]["saved_plain"]
        assert rows[T, "every"]["theory"] is rows[T, "every"]["allocated"] is None
    assert rows[4, "stbp"]["saved"] > 1.7 * rows[2, "stbp"]["saved"]
    model, x = kind(2), torch.randn(2, 5, *shape)
    assert rows[2, "stbp"]["potentials"] == 4 * 5 * empf.account(model, x)["neurons"]
    binary = [m.weight for m in model.modules() if hasattr(m, "effective_weight")]
    assert rows[2, "stbp"]["effective_weights"] == 4 * sum(w.numel() for w in binary)
    empf.set_online(model, False)
    seen = {}
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.train()(x)
    given |= {logits.untyped_storage().data_ptr(), *(m._formed[1].untyped_storage().data_ptr() for m in low_bit(model))}
    potentials = {
        m.v.untyped_storage().data_ptr() for m in model.modules() if isinstance(m, empf.neuron.StatefulNeuron)
    }
    bytes_saved = sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in given | potentials)
    empf.reset(model)
    assert saved_for_backward(model, x, steps=2)["bytes"] == pytest.approx(bytes_saved, rel=0.02)


def low_bit(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "effective_weight")]
