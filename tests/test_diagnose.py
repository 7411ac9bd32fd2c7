"""The separability of the gradient: separable networks are found separable, others and planted faults are not."""

import json
from dataclasses import replace

import pytest
import torch

import empf
from empf import diagnose, runs
from empf.config import TrainConfig
from empf.neuron import ACTIVATIONS, EMPFNeuron, LIFNeuron, neuron_step
from empf.separability import compare, estimator, factors, follow, measure, measure_neuron
from empf.training_memory import training_memory

SUMMARY = {
    "cosine", "norm_ratio", "sign_agreement", "temporal_share", "random_bias", "random_variance", "ds_dm_values",
    "ds_dm_range", "ds_dm_dependence", "factor_error", "online_leak",
}  # fmt: skip


def network(T=3, **config):
    """A small network with neurons away from their initial values, and a batch, in double precision."""
    torch.manual_seed(0)
    model = empf.resnet18(num_classes=10, in_channels=1, image_size=8, width=0.0625, T=T, **config)
    with torch.no_grad():
        for neuron in (m for m in model.modules() if isinstance(m, EMPFNeuron)):
            for parameter in neuron.parameters():
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model.double().eval(), torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 10


def steps_of(result):
    return [step for layer in result["neurons"].values() for step in layer]


@pytest.mark.parametrize(
    "config",
    [{}, {"neuron": "mem_bn"}, {"neuron": "mem_bn", "parallel": 0.5, "spike_bits": 2}, {"seca": 2, "spike_bits": 1}],
    ids=lambda config: " ".join(map(str, config.values())) or "vanilla",
)
def test_em_pf_is_separable(config):
    model, x, target = network(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result, samples = measure(model, x, target)
    summary, steps = result["summary"], steps_of(result)
    assert set(summary) == SUMMARY and result["verdict"]["separable"]
    on, above = steps[0]["ds_dm"]["shares"][1], steps[0]["above_threshold"]
    if "spike_bits" in config:
        assert 0 < on < above  # the quantiser clips the largest spikes
    else:
        assert on == pytest.approx(above, rel=1e-9)
    assert summary["ds_dm_values"] == [0, 1] and summary["ds_dm_dependence"] == 0
    assert summary["factor_error"] <= 1e-5 and summary["online_leak"] == 0
    assert max(f["measured"] for step in steps for f in step["factors"] if f["lag"] == 2) > 0.01  # something to predict
    assert sum(step["undecided"] for step in steps) == 0
    assert 0.5 < summary["cosine"] < 0.9999 and 0.01 < summary["temporal_share"] < 0.9
    assert summary["random_bias"] < 1e-9 and 0.01 < summary["random_variance"] < 10
    first = result["gradients"]["all weights"]["steps"][0]
    assert first["temporal_share"] < 1e-9 and first["cosine"] > 1 - 1e-9  # nothing lies before the first step
    json.dumps(result, allow_nan=False)
    assert samples.keys() == result["neurons"].keys() == {n for n, m in model.named_modules() if hasattr(m, "online")}
    # the model is as it was
    assert not model.training and all(m.online for m in model.modules() if hasattr(m, "online"))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_silent_layers_are_named():
    model, x, target = network()
    with torch.no_grad():
        model.blocks[2].conv2.neuron.threshold_logit.fill_(100)
        model.blocks[2].conv1.bn.weight.zero_()
    result = measure(model, x, target)[0]
    assert result["verdict"]["silent"] == ["blocks.2.conv2.neuron"]
    weights = result["gradients"]["blocks.2.conv2.conv.weight"]  # behind it: without spikes, no gradient
    assert weights["mean_of_losses"]["cosine"] is None and weights["random"]["variance"] is None
    with torch.no_grad():
        model.stem.bn.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="blocks.0.conv1.neuron is not finite"):
        measure(model, x, target)


def test_parallel_neurons_leave_nothing_to_cut():
    summary = measure(*network(parallel=1.0))[0]["summary"]
    assert summary["temporal_share"] < 1e-9 and summary["cosine"] > 1 - 1e-9
    assert abs(summary["norm_ratio"] - 1) < 1e-9


def test_lif_is_not_separable():
    result = measure(*network(neuron="lif"))[0]
    summary, verdict = result["summary"], result["verdict"]
    assert not verdict["separable"] and len(verdict["reasons"]) == 2
    assert summary["ds_dm_values"] is None and summary["ds_dm_dependence"] > 0.5 and summary["factor_error"] > 0.5
    assert summary["online_leak"] == 0  # its online mode is one
    assert summary["temporal_share"] > measure(*network())[0]["summary"]["temporal_share"]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softplus", "gelu"])
def test_a_smooth_activation_depends_on_the_potential(activation):
    neuron = EMPFNeuron(3, activation=activation)
    steps, _ = measure_neuron(neuron, torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert all(step["dependence"] > 0.1 and step["ds_dm"]["values"] is None for step in steps)
    assert steps[-1]["factor_error"] > 0.01
    curve = steps[0]["ds_dm"]["curve"]
    x = torch.tensor(curve["x"]).requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)
    near = [(found, wanted) for found, wanted in zip(curve["mean"], slope.tolist(), strict=True) if found is not None]
    assert len(near) > 30 and all(abs(found - wanted) < 0.06 for found, wanted in near)


def test_factors_of_a_trajectory_by_hand():
    """leak = threshold = 1/2; neurons: never fires before step 3 | fires in step 1, too | is silent in step 3."""
    current = torch.tensor([[0.2, 1.0, 0.2], [0.2, 0.2, 1.0], [1.0, 1.0, 0.1]]).view(3, 1, 3)  # T N C
    neuron = EMPFNeuron(3)
    expected = [
        [[0, 1, 0]],
        [[0, 0, 0.5], [0, 0, 1]],
        [[0.25, 0, 0], [0.5, 0.5, 0], [1, 1, 0]],
    ]
    path = follow(neuron, current)
    for t, row in enumerate(factors(neuron, current, online=False)):
        assert [f[0].tolist() for f in row] == expected[t]
        assert [f[0].tolist() for f in path.predicted(t)] == expected[t]
    for one_by_one in (False, True):
        for t, row in enumerate(factors(neuron, current, online=True, one_by_one=one_by_one)):
            assert [f[0].tolist() for f in row] == [*([[0, 0, 0]] * t), expected[t][t]]


def test_neurons_at_their_threshold_are_set_apart():
    """Rounding decides on which side they are: they do not make a step function look like a curve."""
    current = torch.tensor([0.5, 0.5 + 1e-7, 0.7, 0.3]).view(1, 1, 4)
    (step,), _ = measure_neuron(EMPFNeuron(1), current)
    assert step["undecided"] == 2 and step["ds_dm"]["shares"] == [0.5, 0.5] and step["dependence"] == 0
    (step,), _ = measure_neuron(EMPFNeuron(1), current[..., :1])
    assert step["undecided"] == 1 and step["ds_dm"]["values"] == [0]


def test_mem_bn_is_measured_with_the_statistics_of_the_batch():
    torch.manual_seed(0)
    neuron, current = EMPFNeuron(2, 3, mem_bn=True, beta=0.8), torch.randn(2, 8, 3, 4, 4)
    trained = neuron(current)
    path = follow(neuron, current)
    for t in range(2):
        torch.testing.assert_close(path.x[t].relu(), trained[t])
        assert path.gain[t].shape == (3, 1, 1) and path.gain[t].std() > 0.01


class Triangle(torch.autograd.Function):
    """ReLU with a gradient that depends on the distance to the threshold."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, d_s):
        return d_s * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


class SurrogateNeuron(LIFNeuron):
    """Spikes of EM-PF, gradient of LIF."""

    def forward(self, current):
        steps, spikes = self.advance(current), []
        for i, t in zip(current, range(steps.start, steps.stop), strict=True):
            v = torch.zeros_like(i) if self.v is None else self.v.detach() if self.online else self.v
            s, self.v = neuron_step(i, v, self.leak[t], self.threshold[t], Triangle.apply)
            spikes.append(s)
        return torch.stack(spikes)


class LeakingNeuron(EMPFNeuron):
    """Forgets to detach the potential in the online mode."""

    def forward(self, current, **more):
        online, self.online = self.online, False
        try:
            return super().forward(current, **more)
        finally:
            self.online = online


def test_a_planted_surrogate_is_found():
    model, x, target = network()
    model.blocks[3].conv2.neuron = SurrogateNeuron(3, threshold=0.5).double()
    result = measure(model, x, target)[0]
    assert not result["verdict"]["separable"] and result["summary"]["ds_dm_dependence"] > 0.5
    assert all("blocks.3.conv2.neuron" in reason for reason in result["verdict"]["reasons"])
    others = [step for name, steps in result["neurons"].items() if name != "blocks.3.conv2.neuron" for step in steps]
    assert max(step["dependence"] for step in others) == 0 and max(step["factor_error"] for step in others) <= 1e-5


def test_a_planted_leak_that_is_not_detached_is_found():
    model, x, target = network()
    model.blocks[5].conv1.neuron = LeakingNeuron(3, leak=0.9).double()
    result = measure(model, x, target)[0]
    (reason,) = result["verdict"]["reasons"]
    assert not result["verdict"]["separable"] and "online" in reason and "blocks.5.conv1.neuron" in reason
    assert result["summary"]["online_leak"] == pytest.approx(0.9)
    assert result["summary"]["random_bias"] > 1e-3  # `every` is no longer the expectation of `random`


def test_agreement_and_estimator_by_hand():
    row = compare([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])])
    assert row == pytest.approx(
        {"cosine": 0.5**0.5, "norm_ratio": 0.5**0.5, "sign_agreement": 0.5, "temporal_share": 0.5**0.5}
    )
    assert set(compare([torch.zeros(2)], [torch.ones(2)]).values()) == {None}
    steps = [[torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 0.0])]]
    assert estimator(steps, [torch.tensor([2.0, 0.0])]) == {"bias": 0, "variance": 0.25}
    assert estimator(steps, [torch.tensor([4.0, 0.0])]) == {"bias": 0.5, "variance": 0.25}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it, of a network that never learned."""
    folder = tmp_path_factory.mktemp("run")
    train = TrainConfig(dataset="digits", width=0.0625, T=2, limit=64, seed=3)
    model = empf.build(train.model())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "has_matplotlib", lambda: False)
        runs.save_results(folder, model, [], "")
    runs.save_config(folder, train.model(), train.to_dict(), [str(d) for d in range(10)], (0.3,), (0.4,))
    return folder


@pytest.fixture(autouse=True)
def threads():
    """Give back what the command sets for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_command_on_a_run(run, tmp_path, capsys, monkeypatch):
    out = [tmp_path / f"{name}.json" for name in ("first", "again", "untrained")]
    flags = [str(run), "--batch-size", "16", "--json"]
    diagnose.main([*flags, str(out[0])])
    text = capsys.readouterr().out
    assert "separable" in text and "{0, 1}" in text and "blocks.7.conv2.conv.weight" in text
    assert (run / "separability.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(runs, "has_matplotlib", lambda: False)
    diagnose.main([*flags, str(out[1])])
    diagnose.main([*flags, str(out[2]), "--untrained", "--split", "test"])
    assert not (run / "separability-untrained.png").exists()
    assert out[0].read_text() == out[1].read_text()
    first, _, untrained = (json.loads(path.read_text()) for path in out)
    assert first["verdict"]["separable"] and first["images"] == 16 and set(first["summary"]) == SUMMARY
    assert untrained["untrained"] and untrained["summary"]["cosine"] != first["summary"]["cosine"]
    torch.manual_seed(3)  # as train.py does before it builds the network
    expected = empf.build(empf.ModelConfig.from_dict(runs.read_config(run)["model"]))
    assert torch.equal(diagnose.load_model(run, True, "cpu").head.weight, expected.head.weight)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        diagnose.main([str(run), "--figure", str(tmp_path / "f.png")])


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "either a run folder"),
        (["RUN", "--memory"], "either a run folder"),
        (["RUN", "--batch-size", "1"], "at least 2"),
        (["RUN", "--batch-size", "65"], "64 training images do not fill"),
        (["nowhere"], "not a run folder"),
        (["--memory", "--width", "-1"], "width must be positive"),
        (["--memory", "--T", "0"], "from 1 on"),
        (["--memory", "--figure", "memory.bmp2"], "end with .png"),
    ],
)
def test_bad_flags_are_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=message):
        diagnose.main([str(run) if flag == "RUN" else flag for flag in flags])


def test_memory_is_constant_online_and_linear_through_time():
    config = empf.ModelConfig(width=0.0625, image_size=8, in_channels=1)
    rows = training_memory(config, 4, steps=(1, 2, 5))
    by = {(row["T"], row["learning"]): row for row in rows}
    for T in (2, 5):
        for learning in ("random", "every"):
            row = by[T, learning]
            assert row["saved"] == row["theory"] == by[2, "every"]["saved"]
            assert row["saved_plain"] == by[2, "every"]["saved_plain"]
        assert by[T, "stbp"]["theory"] == T * by[1, "stbp"]["saved_plain"]
        assert by[T, "stbp"]["saved"] == pytest.approx(by[T, "stbp"]["theory"], rel=0.05)
    assert by[1, "every"]["saved"] <= by[1, "every"]["theory"]  # no potential before the first step
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


def test_memory_command(tmp_path, capsys):
    out = tmp_path / "memory.json"
    flags = [
        "--memory",
        "--width",
        "0.0625",
        "--image-size",
        "8",
        "--batch-size",
        "2",
        "--T",
        "2",
        "1",
        "--json",
        str(out),
    ]
    diagnose.main([*flags, "--figure", str(tmp_path / "memory.svg")])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["T"], row["learning"]) for row in rows] == [(T, name) for T in (1, 2) for name in empf.online.LEARNING]
    assert "<svg" in (tmp_path / "memory.svg").read_text() and "stbp" in capsys.readouterr().out
