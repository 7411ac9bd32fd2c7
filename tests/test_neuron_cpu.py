"""The engine of training on a CPU: its steps against `neuron_step`, its sums against torch's, in every layout."""

import pytest
import torch

from empf.kernels.neuron import neuron_step
from empf.kernels.neuron_cpu import RUN, fire, lane, per_channel, total, total_product

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def step(channels: int, layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, channels, 5, 4).to(dtype, memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, RUN - 1, RUN])
@pytest.mark.parametrize("state", [True, False])
def test_steps_are_those_of_the_definition(layout, channels, state):
    torch.manual_seed(channels)
    x = torch.stack([step(channels, layout).movedim(1, -1) for _ in range(2)]).movedim(-1, 2)
    v = step(channels, layout) if state else None
    leak, threshold, gain, shift = torch.rand(2), torch.rand(2), torch.randn(2, channels), torch.randn(2, channels)
    spikes, v_out = fire(x, v, leak, threshold, gain=gain, shift=shift)
    v = torch.zeros_like(x[0]) if v is None else v
    for t in range(2):
        current = x[t] * per_channel(gain[t], 4) + per_channel(shift[t], 4)
        m = leak[t] * v + current
        s, v = neuron_step(current, v, leak[t], threshold[t])
        torch.testing.assert_close(spikes[t], s, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v, torch.minimum(m, threshold[t]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(v_out, v, rtol=1e-6, atol=1e-6)
    assert spikes.count_nonzero() > 0


def test_spikes_that_are_made_again_are_the_same_bits():
    x, v = step(8, "channels_last")[None], step(8, "channels_last")
    leak, threshold, gain, shift = torch.rand(1), torch.rand(1), torch.randn(1, 8), torch.randn(1, 8)
    spikes, _ = fire(x, v, leak, threshold, gain=gain, shift=shift)
    again, none = fire(x, v, leak, threshold, gain=gain, shift=shift, out=torch.empty_like(spikes))
    assert torch.equal(spikes, again) and none is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, RUN - 1, RUN])
def test_lanes_are_the_parameter_of_each_channel(layout, channels):
    p, x = torch.randn(channels), step(channels, layout)
    assert torch.equal(x * lane(p, x), x * per_channel(p, 4))


@pytest.mark.parametrize("d_layout", LAYOUTS)
@pytest.mark.parametrize("v_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (1, 6)])
def test_sums_of_products(d_layout, v_layout, dtype, shape):
    d, v, p = step(6, d_layout, dtype), step(6, v_layout), torch.empty(shape)
    wanted = total(d.double() * v.double(), p)
    found = total_product(d, v, p)
    assert found.shape == shape
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    cut = d[:, :, ::2], v[:, :, ::2]  # neither contiguous nor channels_last
    torch.testing.assert_close(
        total_product(*cut, p).double(), total(cut[0].double() * cut[1].double(), p), rtol=1e-5, atol=1e-5
    )
