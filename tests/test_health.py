"""Each planted fault raises its own warning and no other; a healthy run raises none."""

import json

import pytest
import torch
import torch.nn.functional as F
from own_networks import PlainNorms
from train_tools import metrics, resume, run_train

import empf
from empf.models import ModelConfig, build
from empf.training.config import TrainConfig
from empf.training.health import Health, main
from empf.training.optimizers import make_optimizer

BATCHES = 12


@pytest.fixture
def learner():
    """`train(plant, **network)`: the report on an epoch of random pictures, `plant(model)` before it."""

    def train(plant=lambda model: None, rate=1.0, lr=0.05, **network) -> tuple[Health, dict]:
        torch.manual_seed(0)
        config = dict(arch="resnet18", num_classes=5, in_channels=1, image_size=8, width=0.0625, T=2)
        model = build(ModelConfig(**{**config, **network})).train()
        x, y = torch.randn(BATCHES, 16, 1, 8, 8), torch.randint(0, 5, (BATCHES, 16))
        plant(model)
        optimizer = make_optimizer(model, TrainConfig(lr=lr))
        health = Health(model, BATCHES)
        for number in range(1, BATCHES + 1):
            with health.watch(number):
                empf.online_backward(model, x[number - 1], y[number - 1], F.cross_entropy, steps=[1 + number % 2])
            optimizer.step()
            optimizer.zero_grad()
        return health, health.report(rate)

    return train


def dead(model):
    with torch.no_grad():
        model.blocks[2].conv1.bn.bias.fill_(-50)


def frozen(model):
    model.blocks[4].conv2.conv.weight.requires_grad = False


def exploding_threshold(model):
    with torch.no_grad():
        model.blocks[1].conv2.neuron.threshold_logit[1] = 8


def exploding_alpha(model):
    with torch.no_grad():
        model.blocks[1].conv2.neuron.alpha[1] = -25


def not_binary(model):
    layer = model.blocks[3].conv1.conv
    layer.effective_weight = lambda: layer.weight


def plain_layer(model):
    model.blocks[3].conv1.conv = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)


def stateful(model):
    neuron = model.blocks[0].conv2.neuron

    def hold(module, inputs, spikes):
        if torch.is_grad_enabled():
            module.v = spikes[-1].detach()

    neuron.register_forward_hook(hold)


def vanishing(model):
    """A layer after which the gradient is all but lost: what is before it in its branch learns nothing."""
    model.blocks[5].conv1.conv.register_full_backward_pre_hook(lambda module, d: (d[0] * 1e-9,))


FAULTS = {
    "dead layer": (dead, {}, "blocks.2.conv2.neuron: only 0 % of its spikes are not zero"),
    "exploding threshold": (
        exploding_threshold, {}, "blocks.1.conv2.neuron: its threshold has run away to 0.9997 (of 0.01 to 0.99)",
    ),
    "exploding alpha": (
        exploding_alpha, {"neuron": "mem_bn", "lr": 0.005}, "blocks.1.conv2.neuron: its alpha has run away to -25",
    ),
    "frozen weights": (frozen, {}, "blocks.4.conv2.conv: none of its 2304 weights has flipped in this epoch"),
    "not binary": (not_binary, {}, "blocks.3.conv1.conv: it is not binary, channel 0 has 72 different weights"),
    "a plain layer": (plain_layer, {}, "blocks.3.conv1.conv: it is not binary"),
    "not ternary": (not_binary, {"weights": "ternary"}, "blocks.3.conv1.conv: it is not ternary, channel 0 has 72"),
    "parallel with state": (
        stateful, {"parallel": 0.5}, "blocks.0.conv2.neuron: it is parallel, but holds a membrane potential of shape",
    ),
    "vanishing gradient": (vanishing, {}, "blocks.5.conv1.conv: its gradient vanishes"),
}  # fmt: skip
STOPPED = "{}: none of its {} weights has flipped"
FOLLOWS = {  # what else these faults bring about
    "dead layer": [
        "blocks.2.conv1.conv: its gradient vanishes, |dW| / |W| is 0", STOPPED.format("blocks.2.conv1.conv", 288),
        "blocks.2.conv2.conv: its gradient vanishes, |dW| / |W| is 0", STOPPED.format("blocks.2.conv2.conv", 576),
    ],
    "vanishing gradient": [STOPPED.format("blocks.5.conv1.conv", 2304)],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(learner, name):
    plant, network, sentence = FAULTS[name]
    warnings = learner(plant, **network)[1]["warnings"]
    expected = sorted([sentence, *FOLLOWS.get(name, [])])
    assert [w[: len(e)] for w, e in zip(sorted(warnings), expected, strict=True)] == expected
    assert all(warning.count(": ") == 2 and "\n" not in warning for warning in warnings)  # layer: what: what to do


@pytest.mark.parametrize(
    "network",
    [
        {}, {"weights": "ternary", "neuron": "mem_bn", "width": 0.125}, {"weights": "full"}, {"neuron": "lif"},
        {"parallel": 1.0, "seca": 2, "spike_bits": 2, "spike_gradient": "clipped"},
        {"parallel": 1.0, "seca": 2, "spike_bits": 4}, {"arch": "resnet19", "activation": "gelu"},
    ],
    ids=str,
)  # fmt: skip
def test_a_healthy_network_raises_none(learner, network):
    assert learner(**network)[1]["warnings"] == []


def test_frozen_weights_are_expected_where_the_rate_is_low(learner):
    """At the end of the cosine nothing flips."""
    assert learner(lr=1e-9, rate=0.01)[1]["warnings"] == []
    assert all("has flipped" in warning for warning in learner(lr=1e-9)[1]["warnings"])
    assert len(learner(lr=1e-9)[1]["warnings"]) == 19


def test_too_dense_is_a_matter_of_relu(learner):
    def open_up(model):
        with torch.no_grad():
            model.blocks[2].conv1.bn.bias.fill_(50)

    warnings = learner(open_up)[1]["warnings"]
    assert [w[:44] for w in warnings] == ["blocks.2.conv2.neuron: 100.0 % of its spikes"]
    assert learner(open_up, activation="softplus")[1]["warnings"] == []


def test_the_values_are_what_they_are_called(learner):
    """Against the definitions, for one batch that is looked at."""
    torch.manual_seed(0)
    model = empf.resnet18(num_classes=5, in_channels=1, image_size=8, width=0.0625, T=2).train()
    before = {n: m.effective_weight().sign() for n, m in model.named_modules() if hasattr(m, "effective_weight")}
    health, spikes = Health(model, 10), []
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 5, (16,))
    model.blocks[1].conv2.neuron.register_forward_hook(lambda module, inputs, out: spikes.append(out.detach()))
    with health.watch(10):
        empf.online_backward(model, x, y, F.cross_entropy, steps=[2])
    conv = model.blocks[1].conv2.conv
    gradient = (conv.weight.grad.norm() / conv.weight.norm()).item()
    with torch.no_grad():
        conv.weight[:, 0] *= -1
    report = health.report(1.0)
    assert len(spikes) == 2  # step 1 without gradient, step 2
    density = sum((s > 0).sum().item() for s in spikes) / sum(s.numel() for s in spikes)
    assert report["density"]["blocks.1.conv2.neuron"] == pytest.approx(density, rel=1e-3)
    assert report["gradient"]["blocks.1.conv2.conv"] == pytest.approx(gradient, rel=1e-3)
    assert set(report["flips"]) == set(before) and report["flips"]["blocks.1.conv2.conv"] == 0.25  # 1 of 4 inputs
    assert sum(report["flips"].values()) == 0.25
    assert report["leak"]["blocks.0.conv1.neuron"] == [0.5, 0.5] and "alpha" not in report
    assert health.report(1.0)["density"] == {} and sum(health.report(1.0)["flips"].values()) == 0


@pytest.mark.parametrize(
    "bits, gradient, remedy",
    [
        (1, "identity", "more --spike-bits than 1 or --spike-gradient clipped"),
        (2, "clipped", "more --spike-bits than 2"),
        (4, "identity", "a lower --lr or more --warmup-epochs"),
        (None, "identity", "a lower --lr or more --warmup-epochs"),
    ],
)  # fmt: skip
def test_the_remedy_for_a_lost_threshold_fits(learner, bits, gradient, remedy):
    warnings = learner(exploding_threshold, spike_bits=bits, spike_gradient=gradient)[1]["warnings"]
    (lost,) = [w for w in warnings if w.startswith("blocks.1.conv2.neuron: its threshold")]
    assert lost.endswith(f": start again with {remedy}")


def test_command_lists_all_warnings(tmp_path, capsys):
    records = [{"epoch": 1, "health": {"warnings": ["a: b: c", "d: e: f"]}}, {"epoch": 2}, {"epoch": 3}]
    records[2]["health"] = {"warnings": ["g: h: i"]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == ["epoch 1: a: b: c", "epoch 1: d: e: f", "epoch 3: g: h: i"]
    (tmp_path / "metrics.jsonl").write_text("")
    main([str(tmp_path)])
    assert capsys.readouterr().out == "no warnings\n"
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"ep')
    for argv, message in (([], "one run folder"), ([str(tmp_path / "x")], "no metrics"), ([str(tmp_path)], "line 2")):
        with pytest.raises(SystemExit, match=message):
            main(argv)


@pytest.mark.parametrize("batches, numbers", [(3, {3}), (22, {20}), (50, {20, 40}), (100, {25, 50, 75, 100}), (9, {9})])
def test_looks_at_a_few_batches(batches, numbers):
    model = empf.resnet18(num_classes=5, in_channels=1, image_size=8, width=0.0625, T=2)
    assert Health(model, batches).looked_at == numbers


def test_a_batch_that_is_not_looked_at_runs_as_ever():
    model = empf.resnet18(num_classes=5, in_channels=1, image_size=8, width=0.0625, T=2)
    health = Health(model, 22)
    for number in (19, 20, 21):
        with health.watch(number):
            assert all((m.observer is not None) == (number == 20) for m in health.neurons.values())
    assert all(m.observer is None for m in health.neurons.values())


def test_a_healthy_run_of_digits_raises_none(tmp_path, capsys):
    run_train("--epochs", "3", "--limit", "640", "--lr", "0.05", "--output-dir", tmp_path / "run")
    for record in metrics(tmp_path / "run"):
        assert record["health"]["warnings"] == []
        assert len(record["health"]["density"]) == 16 and min(record["health"]["density"].values()) > 0
    assert "warning" not in capsys.readouterr().out


def test_leaves_the_training_alone(tmp_path):
    run_train("--output-dir", tmp_path / "with")
    run_train("--output-dir", tmp_path / "without", "--no-health")
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "health" not in metrics(tmp_path / "without")[0]


def test_a_warning_is_printed_once_per_epoch_and_survives_a_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("empf.training.health.SPARSE", 0.999)
    monkeypatch.setattr("empf.training.health.DENSE", 2.0)
    run_train("--output-dir", tmp_path / "whole")
    run_train("--output-dir", tmp_path / "parts", "--max-steps", "4")
    printed = capsys.readouterr().out
    resume(tmp_path / "parts")
    health = [record["health"] for record in metrics(tmp_path / "whole")]
    assert len(health[0]["warnings"]) >= 16
    assert printed.count("warning: blocks.0.conv1.neuron: only ") == 3  # 2 epochs, and 1
    more = len(health[0]["warnings"]) - 5
    assert (
        printed.count("warning: ") == 3 * 6 and f"warning: {more} more: python -m empf.training.health RUN" in printed
    )
    assert [record["health"] for record in metrics(tmp_path / "parts")] == health


def test_may_be_switched_on_and_off_between_calls(tmp_path):
    run_train("--output-dir", tmp_path / "run", "--no-health", "--max-steps", "1")
    resume(tmp_path / "run", "--health", "--max-steps", "3")
    resume(tmp_path / "run", "--no-health")
    records = metrics(tmp_path / "run")
    assert records[0]["health"]["warnings"] == [] and "health" not in records[1]
    assert (tmp_path / "run" / "state" / "state.pt").exists()


def test_a_network_of_ones_own():
    """No configuration; what a synapse has to be it says itself."""
    torch.manual_seed(0)
    model, x = PlainNorms(), torch.randn(3, 8, 1, 6, 6)
    health = Health(model, 1)
    with torch.no_grad():
        model.neurons[0].threshold_logit[1] = 8
        model.neurons[1].spike_bits = 1
    with health.watch(1):
        empf.reset(model)
        F.cross_entropy(model(x).sum(0), torch.arange(8) % 4).backward()
    with torch.no_grad():
        model.wide.weight.neg_()
    report = health.report(1.0)
    assert set(report["density"]) == {"neurons.0", "neurons.1", "neurons.2"}
    assert set(report["gradient"]) == {"stem", "narrow", "wide", "last"}
    assert report["flips"].keys() == {"narrow", "wide"} and report["flips"]["narrow"] == 0 < report["flips"]["wide"] < 1
    warnings = [w.split(": ")[:2] for w in report["warnings"]]
    assert ["neurons.0", "its threshold has run away to 0.9997 (of 0.01 to 0.99)"] in warnings
    assert any("more --spike-bits than 1" in w for w in report["warnings"])
    model.narrow.effective_weight = lambda: model.narrow.weight
    assert any(w.startswith("narrow: it is not binary") for w in health.report(1.0)["warnings"])
