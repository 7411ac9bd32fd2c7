"""The engine of training on a CPU: its steps against `neuron_step`, its sums against torch's, in every layout."""

import pytest
import torch

from empf.kernels import native
from empf.kernels.neuron import neuron_step, quantize_spikes
from empf.kernels.neuron_cpu import RUN, fire, fire_backward, lane, normalise, per_channel, total, total_product

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


ENGINES = ["torch", pytest.param("compiled", marks=pytest.mark.skipif(native.library() is None, reason="no compiler"))]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Both engines; the compiled one is really called."""
    calls = []
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
        yield request.param
    else:
        for name in ("fire", "fire_backward"):
            run = getattr(native, name)
            monkeypatch.setattr(native, name, lambda *a, run=run, **k: (calls.append(1), run(*a, **k))[1])
        yield request.param
        assert calls or {1, "contiguous"} & {*request.node.callspec.params.values()}  # not of these layouts


def step(channels: int, layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, channels, 5, 4).to(dtype, memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, RUN - 1, RUN])
@pytest.mark.parametrize("state", [True, False])
def test_steps_are_those_of_the_definition(engine, layout, channels, state):
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


def test_spikes_that_are_made_again_are_the_same_bits(engine):
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


def images(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).movedim(-1, 2).to(dtype)  # k N C H W, channels last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 2])
def test_a_sum_of_currents_is_fired_at_once(engine, dtype, bits):
    """Of a current BN(y) + BN(z) + r; r has been added up."""
    torch.manual_seed(0)
    y, z, r = (images(1, 3, 5, 7, 24, dtype=dtype) for _ in range(3))
    gains, shifts = torch.randn(3, 1, 24), torch.randn(3, 1, 24)
    leak, threshold, v = torch.rand(1), torch.rand(1), torch.randn(3, 5, 7, 24).movedim(-1, 1)
    parts = [
        part[0].float() * per_channel(gain[0], 4) + per_channel(shift[0], 4)
        for part, gain, shift in zip((y, z, r), gains, shifts, strict=True)
    ]
    wanted = (leak * v + sum(parts) - threshold).relu()
    wanted = wanted if bits is None else quantize_spikes(wanted, bits, 0.25)
    more = [(z, gains[1], shifts[1]), (r, gains[2], shifts[2])]
    out = torch.empty_like(y)
    spikes, _ = fire(y, v, leak, threshold, gain=gains[0], shift=shifts[0], more=more, bits=bits, out=out)
    assert spikes.dtype == dtype and spikes is out
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(spikes[0].float(), wanted, rtol=2 * rounding, atol=0.25 if bits else 1e-5)
    assert (spikes[0].float() - wanted).abs().gt(2 * rounding * wanted + 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_a_kept_current_is_added_to_norms_of_each_channel(engine, memory_format):
    """The first term has no gain of its own, the second has; parameters are those of the layer."""
    y, z = (torch.randn(3, 24, 5, 7).to(memory_format=LAYOUTS[memory_format])[None] for _ in range(2))
    leak, threshold, gain, shift = torch.rand(1), torch.rand(1), torch.randn(1, 24), torch.randn(1, 24)
    spikes, _ = fire(y, None, leak, threshold, more=[(z, gain, shift)], out=torch.empty_like(y))
    wanted = y[0] + z[0] * per_channel(gain[0], 4) + per_channel(shift[0], 4) - threshold
    torch.testing.assert_close(spikes[0], wanted.relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_norm_is_a_gain_and_a_shift(engine, dtype, in_place):
    y, rest = (images(2, 3, 5, 7, 24, dtype=dtype) for _ in range(2))
    gain, shift = torch.randn(2, 24), torch.randn(2, 24)
    exact = y.double() * gain.double()[:, None, :, None, None] + shift.double()[:, None, :, None, None] + rest.double()
    kept = rest.clone()
    found = normalise(y, gain, shift, rest, out=rest if in_place else None)
    assert found.dtype == dtype and (found is rest) == in_place and torch.equal(rest, kept) != in_place
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    alone = normalise(y, gain, shift)
    torch.testing.assert_close(alone.double(), exact - kept.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [(1,), (1, 24)], ids=["of a layer", "of each channel"])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("top", [None, 0.75])
def test_the_gradient_passes_where_it_fired(engine, dtype, own, state, top):
    torch.manual_seed(0)
    d, s = (images(1, 5, 37, 41, 24, dtype=dtype)[0] for _ in range(2))
    s, leak, threshold = s.relu(), torch.rand(own), torch.rand(own)
    v = torch.randn(5, 37, 41, 24).movedim(-1, 1) if state else None
    wanted = torch.where((s > 0) & (s <= (top or torch.inf)), d, 0)
    of_leak = total(wanted.double() * v.double(), leak) if state else torch.zeros(own)
    of_threshold = -total(wanted.double(), threshold)
    d_m, d_leak, d_threshold = fire_backward(d, s, v, leak, threshold, top)
    assert torch.equal(d_m, wanted) and d_leak.shape == d_threshold.shape == own
    for found, right in ((d_leak, of_leak), (d_threshold, of_threshold)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right.double(), rtol=1e-4, atol=2e-2)


@pytest.mark.skipif(native.library() is None, reason="no compiler")
def test_compiled_sums_are_the_same_with_any_number_of_threads(monkeypatch):
    d, s, v = (torch.randn(5, 37, 41, 24).movedim(-1, 1) for _ in range(3))
    found = []
    for threads in (1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.no_grad():
            found.append(native.fire_backward(d, s.clone(), v, 24, None))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
