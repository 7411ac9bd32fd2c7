"""Neurons: golden trajectories, formulas against an independent float64 loop, and the facts about their gradients."""

import math

import pytest
import torch

import empf
from empf.kernels.neuron import ACTIVATIONS
from empf.neuron import EMPFNeuron, LIFNeuron, spikes_of

CURRENT = [1.0, 0.25, 0.5, 2.0]  # of one neuron over four steps


def trajectory(neuron, current=CURRENT):
    """Spikes and potentials, one value per step, of a neuron fed step by step."""
    spikes, potentials = [], []
    for i in current:
        spikes.append(neuron(torch.tensor([[[i]]])).item())  # 1 1 1
        potentials.append(None if neuron.v is None else neuron.v.item())
    return spikes, potentials


# ---- golden trajectories, worked out by hand with leak = threshold = 0.5


def test_golden_vanilla():
    # m = 1, 0.5, 0.75, 2.25: v is cut at 0.5, what exceeds it is the spike
    assert trajectory(EMPFNeuron(4)) == ([0.5, 0.0, 0.25, 1.75], [0.5, 0.5, 0.5, 0.5])


def test_golden_vanilla_below_threshold():
    # m = 0.25, 0.375, -0.8125, 0.09375: no spike, v = m
    neuron = EMPFNeuron(4)
    assert trajectory(neuron, [0.25, 0.25, -1.0, 0.5]) == ([0.0] * 4, [0.25, 0.375, -0.8125, 0.09375])


def test_golden_parallel():
    assert trajectory(EMPFNeuron(4, parallel=True)) == ([0.5, 0.0, 0.0, 1.5], [None] * 4)


def test_golden_quantised():
    # s = 0.625, 0, 0.25, 3.875; codes floor(4 s + 1/2) = 3, 0, 1, 16 -> 3 with 2 bits; v from the unquantised s
    neuron = EMPFNeuron(4, spike_bits=2)
    assert trajectory(neuron, [1.125, 0.25, 0.5, 4.125]) == ([0.75, 0.0, 0.25, 0.75], [0.5, 0.5, 0.5, 0.5])


def test_golden_folded_mem_bn():
    # running mean 0, variance 1 - eps: BN(m) = 2 m + 1, so mh = 0.5 m + 0.25 (2 m + 1) = m + 0.25
    neuron = EMPFNeuron(4, channels=1, mem_bn=True, alpha=0.5, beta=0.25).eval()
    neuron.running_var.fill_(1 - neuron.eps)
    neuron.weight.data.fill_(2.0)
    neuron.bias.data.fill_(1.0)
    # m = 1, 0.5, 0.75, 2.25; mh = 1.25, 0.75, 1, 2.5
    spikes, potentials = trajectory(neuron)
    assert spikes == pytest.approx([0.75, 0.25, 0.5, 2.0], abs=1e-6)
    assert potentials == pytest.approx([0.5, 0.5, 0.5, 0.5], abs=1e-6)


def test_golden_mem_bn_batch_statistics():
    # two images with currents 1 and 3: BN gives -1 and 1 (up to eps); mh = 0.5 m + 0.5 BN(m) = 0 and 2
    neuron = EMPFNeuron(1, channels=1, mem_bn=True)
    spikes = neuron(torch.tensor([[[1.0], [3.0]]]))  # 1 2 1
    assert spikes.flatten().tolist() == pytest.approx([0.0, 1.5], abs=1e-5)
    assert neuron.v.flatten().tolist() == pytest.approx([0.0, 0.5], abs=1e-5)
    assert neuron.running_mean.item() == pytest.approx(0.1 * 2.0)
    assert neuron.running_var.item() == pytest.approx(0.9 + 0.1 * 2.0)  # unbiased variance of (1, 3) is 2


def test_golden_lif():
    # leak 0.5, threshold 1; m = 1, 0.25, 0.625, 2.3125; soft reset subtracts the threshold once
    assert trajectory(LIFNeuron(4)) == ([1.0, 0.0, 0.0, 1.0], [0.0, 0.25, 0.625, 1.3125])


# ---- against an independent loop in float64


def reference_loop(current, leak, threshold, act, alpha=None, beta=None, norm=None, bits=None, parallel=False):
    """Plain Python over every element of (T, N, C): the specification, letter by letter."""
    T, N, C = current.shape
    out, v = torch.zeros(T, N, C, dtype=torch.float64), [[0.0] * C for _ in range(N)]
    for t in range(T):
        for c in range(C):
            lam, theta = (p[t][c] if p.dim() == 2 else p[t] for p in (leak, threshold))
            m = [current[t, n, c].item() + (0 if parallel else lam.item() * v[n][c]) for n in range(N)]
            mh = m
            if alpha is not None:
                weight, bias, eps = norm
                mean = sum(m) / N
                var = sum((x - mean) ** 2 for x in m) / N
                a, b = (p[t][c] if p.dim() == 2 else p[t] for p in (alpha, beta))
                mh = [
                    a.item() * x
                    + b.item() * (weight[t, c].item() * (x - mean) / math.sqrt(var + eps) + bias[t, c].item())
                    for x in m
                ]
            for n in range(N):
                s = act(mh[n] - theta.item())
                v[n][c] = mh[n] - s
                if bits:
                    s = min(max(math.floor(4 * s + 0.5), 0), 2**bits - 1) / 4
                out[t, n, c] = s
    return out, torch.tensor(v, dtype=torch.float64)


SCALAR = {
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


def randomised(neuron, seed=0):
    """The neuron in float64 with other values for every parameter and step."""
    torch.manual_seed(seed)
    neuron = neuron.double()
    for p in neuron.parameters():
        torch.nn.init.normal_(p)
    return neuron


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["vanilla", "mem_bn", "parallel"])
def test_against_float64_loop(kind, activation, per_channel):
    bits = 3 if activation in ("relu", "tanh") else None
    neuron = randomised(
        EMPFNeuron(
            5, 3, mem_bn=kind == "mem_bn", parallel=kind == "parallel", per_channel=per_channel, spike_bits=bits,
            activation=activation,
        )
    )  # fmt: skip
    current = torch.randn(5, 4, 3, dtype=torch.float64) * 2
    norm = (neuron.weight, neuron.bias, neuron.eps) if kind == "mem_bn" else None
    want, v = reference_loop(
        current, neuron.leak, neuron.threshold, SCALAR[activation],
        *((neuron.alpha, neuron.beta) if norm else (None, None)), norm, bits, kind == "parallel",
    )  # fmt: skip
    got = neuron(current)
    assert (got - want).abs().max() < 1e-12
    if kind == "parallel":
        assert neuron.v is None
    else:
        assert (neuron.v - v).abs().max() < 1e-12


def test_quantised_values_and_straight_through_gradient():
    neuron = EMPFNeuron(1, spike_bits=2)
    s = torch.tensor([-1.0, 0.1, 0.125, 0.3, 0.6, 0.75, 0.76, 5.0])
    current = (s + 0.5).view(1, 1, -1).requires_grad_()
    spikes = neuron(current)
    assert spikes.flatten().tolist() == [0, 0, 0.25, 0.25, 0.5, 0.75, 0.75, 0.75]  # halves round up
    spikes.sum().backward()
    assert current.grad.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1]  # that of s: 0 below the threshold, 1 above


# ---- facts about the gradient


def gradient_of_last_step(neuron, past, current):
    """ds[T]/dI[T] for given earlier currents, element by element (the neurons do not mix)."""
    empf.reset(neuron)
    with torch.no_grad():
        neuron(past)
    current = current.clone().requires_grad_()
    neuron(current).sum().backward()
    return current.grad


def test_step_gradient_is_zero_or_one_and_independent_of_the_potential():
    torch.manual_seed(1)
    neuron = randomised(EMPFNeuron(3), seed=2)
    current = torch.randn(1, 6, 50, dtype=torch.float64)
    past = torch.randn(2, 6, 50, dtype=torch.float64)
    grad = gradient_of_last_step(neuron, past, current)
    assert set(grad.flatten().tolist()) == {0.0, 1.0}
    # shift the carried potential where the neuron stays on its side of the threshold: nothing changes
    with torch.no_grad():
        empf.reset(neuron)
        neuron(past)
        margin = (neuron.leak[2] * neuron.v + current[0] - neuron.threshold[2]).abs() / neuron.leak[2]
    shifted_past = past.clone()
    shifted_past[1] += torch.where(torch.rand(6, 50) < 0.5, -0.9, 0.9) * margin.clamp(max=2)
    assert torch.equal(gradient_of_last_step(neuron, shifted_past, current), grad)


def test_online_gradient_needs_nothing_from_another_step():
    neuron = randomised(EMPFNeuron(4))
    current = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(neuron(current)[3].sum(), current)
    assert grad[:3].abs().max() == 0
    assert set(grad[3].flatten().tolist()) == {0.0, 1.0}
    empf.reset(neuron)
    neuron.online = False  # through time the earlier steps do matter, below the threshold, through the leak
    (grad,) = torch.autograd.grad(neuron(current)[3].sum(), current)
    assert grad[2].abs().max() > 0


def test_gradient_through_time_against_autograd_of_the_loop():
    neuron = randomised(EMPFNeuron(4))
    neuron.online = False
    current = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 7, dtype=torch.float64)
    got = torch.autograd.grad((neuron(current) * weight).sum(), [current, *neuron.parameters()])
    v, total = torch.zeros(5, 7, dtype=torch.float64), 0.0
    for t in range(4):
        m = neuron.leak[t] * v + current[t]
        s = torch.relu(m - neuron.threshold[t])
        v = m - s
        total = total + (s * weight[t]).sum()
    want = torch.autograd.grad(total, [current, *neuron.parameters()])
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_mem_bn_with_alpha_1_beta_0_is_vanilla(training):
    torch.manual_seed(0)
    current = torch.randn(4, 6, 3, 5, 5)
    vanilla = EMPFNeuron(4)
    mem_bn = EMPFNeuron(4, 3, mem_bn=True, alpha=1.0, beta=0.0).train(training)
    assert torch.equal(vanilla(current), mem_bn(current))
    assert torch.equal(vanilla.v, mem_bn.v)


def test_folded_mem_bn_equals_unfolded_in_eval():
    neuron = randomised(EMPFNeuron(4, 3, mem_bn=True)).eval()
    neuron.running_mean.normal_()
    neuron.running_var.uniform_(0.5, 2.0)
    current = torch.randn(4, 6, 3, 5, 5, dtype=torch.float64)
    got = neuron(current)
    v, c = torch.zeros(6, 3, 5, 5, dtype=torch.float64), (3, 1, 1)
    for t in range(4):
        m = neuron.leak[t] * v + current[t]
        normed = (m - neuron.running_mean[t].view(c)) / (neuron.running_var[t].view(c) + neuron.eps).sqrt()
        normed = neuron.weight[t].view(c) * normed + neuron.bias[t].view(c)
        mh = neuron.alpha[t] * m + neuron.beta[t] * normed
        assert (got[t] - torch.relu(mh - neuron.threshold[t])).abs().max() < 1e-12
        v = torch.minimum(mh, neuron.threshold[t])


def test_frozen_mem_bn_trains_on_running_statistics():
    neuron = EMPFNeuron(2, 3, mem_bn=True)
    empf.freeze_norm(neuron)
    current = torch.randn(2, 4, 3)
    trained = neuron(current)
    assert neuron.running_mean.abs().max() == 0
    empf.reset(neuron)
    assert torch.equal(trained, neuron.eval()(current))


def test_lif_surrogate_is_a_triangle():
    neuron = LIFNeuron(1)
    current = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0]).view(1, 1, -1).requires_grad_()
    neuron(current).sum().backward()
    assert current.grad.flatten().tolist() == [0, 0, 0.25, 1.0, 0.5, 0, 0]


def test_every_step_parameter_has_a_gradient_in_the_first_step():
    neuron = EMPFNeuron(4, 3, mem_bn=True, per_channel=True)
    neuron(torch.randn(1, 8, 3)).sum().backward()
    assert all(p.grad is not None for p in neuron.parameters())


def test_initial_values():
    neuron = EMPFNeuron(2, 3, mem_bn=True, per_channel=True, leak=0.9, threshold=0.25, alpha=0.75, beta=-0.5)
    for name, value in dict(leak=0.9, threshold=0.25, alpha=0.75, beta=-0.5).items():
        assert getattr(neuron, name).shape == (2, 3)
        assert torch.allclose(getattr(neuron, name), torch.full((2, 3), value))
    assert EMPFNeuron(3).leak.tolist() == EMPFNeuron(3).threshold.tolist() == [0.5] * 3
    assert EMPFNeuron(3, parallel=True).leak.tolist() == [0.0] * 3


# ---- state and errors


@pytest.mark.parametrize("make", [lambda: EMPFNeuron(4), lambda: EMPFNeuron(4, 3, mem_bn=True), lambda: LIFNeuron(4)])
def test_sequence_equals_steps(make):
    torch.manual_seed(3)
    current = torch.randn(4, 6, 3, 2, 2)
    for grad in (False, True):
        together, single = make(), make()
        with torch.set_grad_enabled(grad):
            spikes, single_spikes = together(current), torch.cat([single(current[t : t + 1]) for t in range(4)])
        bound = 1e-6 if grad and getattr(single, "mem_bn", False) else 0  # its batch norm differs in rounding there
        assert (spikes - single_spikes).abs().max() <= bound
        assert (together.v - single.v).abs().max() <= bound


@pytest.mark.parametrize(
    "make",
    [lambda: EMPFNeuron(2), lambda: EMPFNeuron(2, 3, mem_bn=True), lambda: EMPFNeuron(2, activation="tanh"),
     lambda: LIFNeuron(2)],
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_the_potential_stays_in_fp32_under_half_precision(make, grad):
    torch.manual_seed(0)
    neuron, wide = make(), make()
    current = torch.randn(2, 6, 3).bfloat16()
    with torch.set_grad_enabled(grad):
        for i in current.split(1):
            assert neuron(i).dtype == torch.bfloat16
            assert neuron.v.dtype == torch.float32
            wide(i.float())
    torch.testing.assert_close(neuron.v, wide.v, rtol=0, atol=1e-6)


class Noisy(EMPFNeuron):
    """As a user would write it."""

    def forward(self, current):
        return super().forward(current + 0.25)


def test_a_subclass_with_its_own_forward_is_fed_currents():
    """Where the activations are large, a neuron of the library does the batch norm itself."""
    torch.manual_seed(0)
    model = empf.resnet18(width=0.125, T=2)
    for module in model.modules():
        if isinstance(module, EMPFNeuron):
            module.__class__ = Noisy
    y = torch.randn(1, 16, 8, 32, 32)
    norm = model.blocks[0].conv1.bn.train()
    assert (spikes_of(Noisy(2), norm.current(y)) - EMPFNeuron(2)(norm.current(y).value + 0.25)).abs().max() < 1e-6
    loss, _ = empf.online_backward(
        model, torch.randn(16, 3, 32, 32), torch.arange(16) % 10, torch.nn.functional.cross_entropy, steps=[2]
    )
    assert loss.isfinite()


def test_batch_statistics_of_a_single_value_are_refused():
    with pytest.raises(ValueError, match=r"more than one value per channel .*\(1, 3\): use a larger batch"):
        EMPFNeuron(2, 3, mem_bn=True)(torch.randn(1, 1, 3))
    EMPFNeuron(2, 3, mem_bn=True).eval()(torch.randn(1, 1, 3))


def test_state_is_not_saved():
    neuron = EMPFNeuron(2)
    neuron(torch.ones(1, 1, 3))
    assert set(neuron.state_dict()) == {"leak_logit", "threshold_logit"}


@pytest.mark.parametrize("neuron", [EMPFNeuron(2), LIFNeuron(2), EMPFNeuron(2, parallel=True)])
def test_going_past_T_says_reset(neuron):
    neuron(torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match=r"step 3 .* T = 2.*empf\.reset\(model\)"):
        neuron(torch.ones(1, 1, 3))
    empf.reset(neuron)
    neuron(torch.ones(1, 1, 3))


@pytest.mark.parametrize("neuron", [EMPFNeuron(2), LIFNeuron(2)])
def test_another_batch_size_says_reset(neuron):
    neuron(torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(5, 3\).*empf\.reset\(model\)"):
        neuron(torch.ones(1, 5, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(T=0), "1 to 1,000,000, or None for an open end; got 0"),
        (dict(T=2, activation="elu"), "activation must be one of .* got 'elu'"),
        (dict(T=2, spike_bits=9), "1..8, got 9"),
        (dict(T=2, mem_bn=True), "need channels"),
        (dict(T=2, channels=3, mem_bn=True, parallel=True), "exclude"),
        (dict(T=2, leak=1.0), r"leak must lie in \(0, 1\), got 1.0"),
        (dict(T=2, threshold=0.0), r"threshold must lie in \(0, 1\), got 0.0"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EMPFNeuron(**kwargs)
