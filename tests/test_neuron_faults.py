"""The neuron functions where they were at fault: long sequences, numbers of any library, transforms of torch."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vmap

from empf.kernels import bn_neuron, mem_bn_neuron, neuron_update
from empf.kernels.neuron import neuron_update_ref

pytestmark = pytest.mark.kernel


def steps(t, last=True, c=3, device="cpu"):
    x = torch.randn(t, 2, c, 4, 5, generator=torch.Generator().manual_seed(t)).to(device)
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x


def parameters(form, t, c=3, device="cpu"):
    half = torch.full((t,), 0.5, device=device)
    if form == "neuron":
        return half, half
    if form == "bn":
        return half, half, torch.ones(c, device=device), torch.zeros(c, device=device)
    return (half, half, half, half, torch.ones(t, c, device=device), torch.zeros(t, c, device=device))


FUNCTIONS = {"neuron": neuron_update, "bn": bn_neuron, "mem_bn": mem_bn_neuron}


@pytest.mark.parametrize("t", [6, 11, 23])
@pytest.mark.parametrize("form", FUNCTIONS)
def test_long_sequences_keep_the_layout(form, t, device, kernels_on):
    """More steps than one launch holds: spikes still lie as the current does."""
    x = steps(t, device=device)
    spikes, v, *_ = FUNCTIONS[form](x, None, *parameters(form, t, device=device))
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in spikes)
    assert v.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step", [torch.tensor(0.25).numpy()[()], torch.tensor(0.25)], ids=["numpy", "tensor"])
def test_step_may_be_any_number(step, device, kernels_on):
    x = steps(2, device=device)
    got = neuron_update(x, None, *parameters("neuron", 2, device=device), bits=4, step=step)[0]
    want = neuron_update(x, None, *parameters("neuron", 2, device=device), bits=4, step=0.25)[0]
    assert torch.equal(got, want) and kernels_on["neuron_update"] == 2


@pytest.mark.parametrize("form", FUNCTIONS)
def test_no_channels(form, device, kernels_on):
    """C = 0: an empty result, or one sentence."""
    x = steps(2, c=0, device=device)
    try:
        spikes, *_ = FUNCTIONS[form](x, None, *parameters(form, 2, 0, device=device))
    except ValueError as problem:
        assert "channel" in str(problem)
    else:
        assert spikes.shape == x.shape


@pytest.mark.parametrize("form", FUNCTIONS)
def test_forward_mode_is_right_or_refused(form, device, kernels_on):
    """A tangent is never dropped without a word; the definition in float64 says what it would be."""
    x, x_t = steps(2, device=device), steps(3, device=device)[:2]
    p = parameters(form, 2, device=device)

    def run(x):
        return FUNCTIONS[form](x, None, *(q.to(x.dtype) for q in p))[0]

    try:
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(run(forward_ad.make_dual(x, x_t))).tangent
    except NotImplementedError:
        return
    assert got is not None
    want = jvp(run, (x.double(),), (x_t.double(),))[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
@pytest.mark.parametrize("form", FUNCTIONS)
def test_transforms_are_right_or_refused(form, transform, device, kernels_on):
    x = torch.stack([steps(2, False, device=device), steps(3, False, device=device)[:2]])
    p = parameters(form, 2, device=device)

    def run(x):
        return FUNCTIONS[form](x, None, *(q.to(x.dtype) for q in p))[0]

    try:
        got = vmap(run)(x) if transform == "vmap" else grad(lambda x: run(x).square().sum())(x[0])
    except NotImplementedError:
        return
    wide = x.double()
    want = torch.stack([run(i) for i in wide]) if transform == "vmap" else None
    if want is None:
        leaf = wide[0].clone().requires_grad_()
        (want,) = torch.autograd.grad(run(leaf).square().sum(), leaf)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_codes_at_ties_with_a_step_that_rounds(kernels_on):
    """Kernel and definition round in the same order; launches pass `enable_fp_fusion` (dispatch.LAUNCH)."""
    x = torch.randint(0, 64, (4, 2, 64, 32, 32), device="cuda").float() * 0.05
    half = torch.full((4,), 0.5, device="cuda")
    got = neuron_update(x, None, half, half, bits=4, step=0.1, codes=True)[0]
    assert torch.equal(got, neuron_update_ref(x, None, half, half, bits=4, step=0.1, codes=True)[0])
