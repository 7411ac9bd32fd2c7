"""docs/coming-from.md: what is the same to the bit in other libraries, where they are installed."""

import pytest
import torch

import empf


@pytest.mark.parametrize("tau", [2.0, 4.0, 1.25])
def test_lif_of_spikingjelly(tau):
    """Equal spikes; equal potentials and gradients where 1 / tau is a power of two."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="pip install spikingjelly")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    torch.manual_seed(0)
    x = 1.5 * torch.randn(4, 8, 64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)
    node = neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, surrogate_function=triangle, step_mode="m")
    lif = empf.LIFNeuron(4, leak=1 - 1 / tau)
    lif.online = False
    spikes, weight = lif(ours), torch.randn_like(x)
    assert torch.equal(spikes, node(theirs)) and 0.1 < spikes.mean() < 0.9
    (spikes * weight).sum().backward()
    node.reset()
    (node(theirs) * weight).sum().backward()
    close = dict(rtol=0, atol=0) if tau in (2, 4) else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lif.v, node.v, **close)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)


def test_leaky_of_snntorch_below_twice_the_threshold():
    snntorch = pytest.importorskip("snntorch", reason="pip install snntorch")
    torch.manual_seed(0)
    x = (1.5 * torch.randn(4, 8, 64)).clamp(max=1.4)
    lif, leaky = empf.LIFNeuron(4, leak=0.5), snntorch.Leaky(beta=0.5, reset_mechanism="subtract", reset_delay=False)
    spikes, mem = lif(x), leaky.reset_mem()
    for t in range(4):
        s, mem = leaky(x[t], mem)
        assert torch.equal(s, spikes[t])
    assert torch.equal(mem, lif.v) and 0.1 < spikes.mean() < 0.9
