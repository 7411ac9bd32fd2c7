"""Neurons of others' networks: shapes, streams without an end, copies, transforms of torch."""

import pickle

import pytest
import torch

import empf
from empf.neuron import EMPFNeuron, LIFNeuron


def test_copies_and_files_leave_the_potential_out():
    model = empf.resnet18(width=0.0625, image_size=8, T=2).eval()
    model(torch.randn(4, 3, 8, 8), steps=1)
    other = pickle.loads(pickle.dumps(model))
    assert other.t == 0 and all(m.v is None and m.t == 0 for m in other.modules() if isinstance(m, EMPFNeuron))
    assert len(pickle.dumps(model)) < 1.05 * len(pickle.dumps(other))


def test_steps_of_an_open_end_share_their_parameters():
    torch.manual_seed(0)
    shared, stepwise = EMPFNeuron(None, 3, per_channel=True), EMPFNeuron(7, 3, per_channel=True)
    with torch.no_grad():
        shared.leak_logit.normal_()
        stepwise.leak_logit.copy_(shared.leak_logit.expand(7, 3))
    x = torch.randn(7, 2, 3) + 0.5
    assert torch.equal(torch.cat([shared(x[:4]), shared(x[4:])]), stepwise(x))
    assert shared.leak_logit.shape == (1, 3) and shared.threshold.shape == (1, 3)
    lif = LIFNeuron(None)
    assert lif(torch.ones(40, 1, 2)).shape == (40, 1, 2)
    with pytest.raises(ValueError, match="batch norm for each time step: give their number T"):
        EMPFNeuron(None, 3, mem_bn=True)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 7), (2, 5, 3, 4, 4)])
def test_any_number_of_positions(shape):
    neuron = EMPFNeuron(2, 3)
    x = torch.randn(shape)
    spikes = neuron(x)
    v = torch.zeros(shape[1:])
    for t in range(2):
        mh = 0.5 * v + x[t]
        assert torch.allclose(spikes[t], (mh - 0.5).relu(), atol=1e-6)
        v = mh.clamp(max=0.5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5, 3), r"k time steps first, got \(5, 3\)"),
        (torch.zeros(1, 5, 3, dtype=torch.uint8), "floating-point currents"),
        (torch.zeros(1, 5, 3, dtype=torch.complex64), "floating-point currents"),
        (torch.randn(1, 5, 3).to(torch.float8_e4m3fn), "floating-point currents"),
        (torch.randn(1, 5, 3).to_sparse(), "dense floating-point currents"),
        (torch.randn(0, 5, 3), r"currents of k time steps, \(k, N, C, \.\.\.\), got \(0, 5, 3\)"),
        (
            torch.randn(5, 3, 8, 8),
            r"neuron with 3 channels takes \(k, N, 3, \.\.\.\), k time steps first, got \(5, 3, 8, 8\)",
        ),
    ],
)
def test_a_batch_without_time_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        EMPFNeuron(5, 3)(x)


@pytest.mark.parametrize("T", [2.5, True, 0, -1, 10**30])
def test_a_number_of_steps_that_is_none(T):
    with pytest.raises(ValueError, match="T is the number of time steps"):
        EMPFNeuron(T)
    with pytest.raises(ValueError, match="channels must be a whole number"):
        EMPFNeuron(2, -3)
    with pytest.raises(ValueError, match="spike_bits must be None or 1..8, got 2.5"):
        EMPFNeuron(2, 3, spike_bits=2.5)
    with pytest.raises(ValueError, match="clipped is for n-bit spikes"):
        EMPFNeuron(2, 3, spike_gradient="clipped")
    with pytest.raises(ValueError, match="spike_gradient must be one of identity, clipped, got None"):
        EMPFNeuron(2, 3, spike_bits=2, spike_gradient=None)
    for neuron in (EMPFNeuron(2, 3), LIFNeuron(2)):
        with pytest.raises(TypeError, match="a layer takes a tensor of currents, time first, got NoneType"):
            neuron(None)


def test_neurons_under_transforms_of_torch():
    """Gradients per sample, and tangents, of large activations too: they are left to the definition."""
    torch.manual_seed(0)
    neuron = EMPFNeuron(1).double()
    x = torch.randn(3, 1, 1, 4, 140, 140, dtype=torch.float64)

    def loss(x):
        empf.reset(neuron)
        return neuron(x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    empf.reset(neuron)
    y = x[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(neuron(y).square().sum(), y)
    assert torch.allclose(found[0], wanted)
    _, tangent = torch.func.jvp(loss, (x[0],), (torch.ones_like(x[0]),))
    assert torch.allclose(tangent, wanted.sum())
