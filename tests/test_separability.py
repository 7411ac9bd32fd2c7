"""The separability of the gradient: separable networks are found separable, others and planted faults are not."""

import json

import pytest
import torch
from own_networks import Grouped, PlainNorms, Twice

import empf
from empf import layer
from empf.diagnose import __main__ as diagnose
from empf.diagnose.separability import factors, follow, measure_neuron, measure_separability
from empf.kernels import neuron_cpu
from empf.kernels.neuron import ACTIVATIONS, neuron_step
from empf.neuron import EMPFNeuron, LIFNeuron

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
    return [step for steps in result["neurons"].values() for step in steps]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"neuron": "mem_bn"},
        {"neuron": "mem_bn", "parallel": 0.5, "spike_bits": 2},
        {"seca": 2, "spike_bits": 1},
        {"neuron": "mem_bn", "parallel": 0.5, "spike_bits": 2, "spike_gradient": "clipped"},
    ],
    ids=lambda config: " ".join(map(str, config.values())) or "vanilla",
)
def test_em_pf_is_separable(config):
    model, x, target = network(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result, samples = measure_separability(model, x, target)
    summary, steps = result["summary"], steps_of(result)
    assert set(summary) == SUMMARY and result["verdict"]["separable"]
    on, above = steps[0]["ds_dm"]["shares"][1], steps[0]["above_threshold"]
    if config.get("spike_gradient") == "clipped":
        assert 0 < on < above  # the gradient of the largest spikes is clipped
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
    result = measure_separability(model, x, target)[0]
    assert result["verdict"]["silent"] == ["blocks.2.conv2.neuron"]
    weights = result["gradients"]["blocks.2.conv2.conv.weight"]  # behind it: without spikes, no gradient
    assert weights["mean_of_losses"]["cosine"] is None and weights["random"]["variance"] is None
    with torch.no_grad():
        model.stem.bn.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="blocks.0.conv1.neuron is not finite"):
        measure_separability(model, x, target)


def test_parallel_neurons_leave_nothing_to_cut():
    summary = measure_separability(*network(parallel=1.0))[0]["summary"]
    assert summary["temporal_share"] < 1e-9 and summary["cosine"] > 1 - 1e-9
    assert abs(summary["norm_ratio"] - 1) < 1e-9


def test_lif_is_not_separable():
    result = measure_separability(*network(neuron="lif"))[0]
    summary, verdict = result["summary"], result["verdict"]
    assert not verdict["separable"] and len(verdict["reasons"]) == 2
    assert summary["ds_dm_values"] is None and summary["ds_dm_dependence"] > 0.5 and summary["factor_error"] > 0.5
    assert summary["online_leak"] == 0  # its online mode is one
    assert summary["temporal_share"] > measure_separability(*network())[0]["summary"]["temporal_share"]


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


class NoisyGradient(torch.autograd.Function):
    """The identity; its gradient is now and then the next larger number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return torch.where(torch.arange(d.shape[-1]) % 3 == 0, d * (1 + 2**-23), d)


class NoisyNeuron(EMPFNeuron):
    def forward(self, current, **more):
        return NoisyGradient.apply(super().forward(current, **more))


def test_only_the_gain_of_mem_bn_is_allowed_to_round():
    current = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (*_, step), _ = measure_neuron(NoisyNeuron(2, 3, mem_bn=True), current)
    assert step["dependence"] == 0 and step["ds_dm"]["values"] == [0, 1]
    (*_, step), _ = measure_neuron(NoisyNeuron(2, 3), current)
    assert step["dependence"] == pytest.approx(2**-23) and len(step["ds_dm"]["values"]) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"neuron": "mem_bn"}], ids=str)
def test_separable_on_a_gpu(config):
    """The kernels form the gain of Mem-BN themselves."""
    model, x, target = network(**config)
    result = measure_separability(model.float().cuda(), x.float().cuda(), target.cuda())[0]
    assert result["verdict"]["separable"] and result["summary"]["ds_dm_values"] == [0, 1]
    assert result["summary"]["ds_dm_dependence"] == 0 and result["summary"]["factor_error"] <= 1e-5


def test_what_is_measured_is_what_trains(monkeypatch):
    """Also where spikes are made again for the backward pass: a fault planted there is found."""
    monkeypatch.setattr(layer, "SMALL", 0)
    model, x, target = network()
    result = measure_separability(model, x, target)[0]
    assert result["verdict"]["separable"] and result["summary"]["factor_error"] <= 1e-5
    right = neuron_cpu.fire_backward

    def depends_on_m(d_spikes, s, *more, **options):
        return right(d_spikes * (1 + s), s, *more, **options)

    monkeypatch.setattr(neuron_cpu, "fire_backward", depends_on_m)
    result = measure_separability(model, x, target)[0]
    assert not result["verdict"]["separable"] and result["summary"]["ds_dm_dependence"] > 0.1
    assert result["summary"]["random_bias"] < 1e-9  # `every` goes the same way


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
            s, self.v = neuron_step(i, v, self.leak[t], self.threshold[t], activation=Triangle.apply)
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
    result = measure_separability(model, x, target)[0]
    assert not result["verdict"]["separable"] and result["summary"]["ds_dm_dependence"] > 0.5
    assert all("blocks.3.conv2.neuron" in reason for reason in result["verdict"]["reasons"])
    others = [step for name, steps in result["neurons"].items() if name != "blocks.3.conv2.neuron" for step in steps]
    assert max(step["dependence"] for step in others) == 0 and max(step["factor_error"] for step in others) <= 1e-5


def test_a_planted_leak_that_is_not_detached_is_found():
    model, x, target = network()
    model.blocks[5].conv1.neuron = LeakingNeuron(3, leak=0.9).double()
    result = measure_separability(model, x, target)[0]
    (reason,) = result["verdict"]["reasons"]
    assert not result["verdict"]["separable"] and "online" in reason and "blocks.5.conv1.neuron" in reason
    assert result["summary"]["online_leak"] == pytest.approx(0.9)
    assert result["summary"]["random_bias"] > 1e-3  # `every` is no longer the expectation of `random`


class OwnNetwork(torch.nn.Module):
    """Written by hand: no configuration; `step_by_step`: how its neurons are called."""

    def __init__(self, neurons, step_by_step):
        super().__init__()
        self.neurons, self.step_by_step = torch.nn.ModuleList(neurons), step_by_step
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in neurons)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, x):  # (T, N, 12) -> (T, N, 5)
        for linear, neuron in zip(self.layers, self.neurons, strict=True):
            current = 2 * linear(x)
            x = torch.cat([neuron(step[None]) for step in current]) if self.step_by_step else neuron(current)
        return self.head(x)


def own(step_by_step=False, kinds=(EMPFNeuron, EMPFNeuron), T=3):
    torch.manual_seed(1)
    model = OwnNetwork([kind(T) for kind in kinds], step_by_step).double()
    return model, torch.randn(T, 20, 12, dtype=torch.float64), torch.arange(20) % 5


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_network_of_ones_own(step_by_step):
    model, x, target = own(step_by_step)
    result, samples = measure_separability(model, x, target)
    summary = result["summary"]
    assert result["verdict"]["separable"] and result["T"] == 3 and not result["mem_bn"]
    assert summary["ds_dm_values"] == [0, 1] and summary["factor_error"] <= 1e-5
    assert 0.5 < summary["cosine"] < 0.9999 and summary["random_bias"] < 1e-9
    assert list(result["neurons"]) == list(samples) == ["neurons.0", "neurons.1"]
    assert "layers.1.weight" in diagnose.separability_table(result)
    # through time, written out
    empf.set_online(model, False)
    sum(torch.nn.functional.cross_entropy(logits, target) for logits in model(x)).backward()
    timed = model.layers[0].weight.grad / 3
    model.zero_grad()
    empf.reset(model)
    empf.set_online(model, True)
    sum(torch.nn.functional.cross_entropy(logits, target) for logits in model(x)).backward()
    online = model.layers[0].weight.grad / 3
    share = result["gradients"]["layers.0.weight"]["mean_of_losses"]["temporal_share"]
    assert share == pytest.approx(((timed - online).norm() / timed.norm()).item(), rel=1e-9)


def test_a_network_of_ones_own_that_is_not_separable():
    verdict = measure_separability(*own(kinds=(EMPFNeuron, LIFNeuron)))[0]["verdict"]
    assert not verdict["separable"] and all("neurons.1" in reason for reason in verdict["reasons"])


def test_what_cannot_be_measured_is_one_sentence():
    model, x, target = own()
    model.neurons[1] = EMPFNeuron(4)
    with pytest.raises(ValueError, match="found T = 3 and T = 4"):
        measure_separability(model, x, target)
    with pytest.raises(ValueError, match="found none"):
        measure_separability(torch.nn.Linear(12, 5), x, target)
    model, x, target = own()
    with pytest.raises(ValueError, match="logits of all T = 3 steps"):
        measure_separability(model, x[:2], target)
    model.head = torch.nn.Flatten(0, 1)
    with pytest.raises(ValueError, match="logits of all T = 3 steps"):
        measure_separability(model, x, target)


@pytest.mark.parametrize("kind, shape", [(Twice, (6,)), (PlainNorms, (1, 6, 6)), (Grouped, (2, 9))])
def test_networks_of_torchs_own_layers(kind, shape):
    """A synapse used twice, torch's batch norm step by step, grouped convolutions over a sequence."""
    torch.manual_seed(0)
    model, x, target = kind().double(), torch.randn(3, 12, *shape).double(), torch.arange(12) % 4
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = measure_separability(model, x, target)[0]
    layers = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)
    }
    layers -= {name for name in layers if "norm" in name}
    assert set(result["gradients"]) == {*layers, "all weights", "all other parameters"}
    assert list(result["neurons"]) == ["neurons.0", "neurons.1", "neurons.2"]
    lif = kind is PlainNorms
    assert result["verdict"]["separable"] != lif and result["summary"]["random_bias"] < 1e-9
    assert all("neurons.2" in reason for reason in result["verdict"]["reasons"] if lif)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
