"""Channel attention: its formula, its parameters and its gradients."""

import math

import pytest
import torch

from empf.attention import SECA


@pytest.mark.parametrize("bias", [False, True])
def test_formula_of_seca(bias):
    torch.manual_seed(0)
    seca = SECA(5, bias=bias).double()
    current = torch.randn(2, 3, 7, 4, 5, dtype=torch.float64)
    got = seca(current)
    kernel = seca.conv.weight.flatten().tolist()
    for t in range(2):
        for n in range(3):
            mean = [current[t, n, c].sum().item() / 20 for c in range(7)]
            for c in range(7):
                z = sum(kernel[k] * mean[c + k - 2] for k in range(5) if 0 <= c + k - 2 < 7)
                z += seca.conv.bias.item() if bias else 0.0
                gate = 1 / (1 + math.exp(-z))
                assert (got[t, n, c] - gate * current[t, n, c]).abs().max() < 1e-12


def test_seca_has_one_weight_set_of_k_parameters_for_all_steps():
    seca = SECA(5)
    assert sum(p.numel() for p in seca.parameters()) == 5
    current = torch.randn(1, 2, 4, 3, 3).expand(3, -1, -1, -1, -1)
    out = seca(current)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_fewer_channels_than_the_kernel():
    assert SECA(5)(torch.randn(2, 1, 2, 3, 3)).shape == (2, 1, 2, 3, 3)


def test_gradients_reach_kernel_and_input():
    seca = SECA().double()
    current = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: seca(x), (current,))
    rest = torch.randn_like(current, requires_grad=True)
    torch.testing.assert_close(seca(current, rest), seca(current) + rest, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(seca, (current, rest))
    seca(current).sum().backward()
    assert seca.conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("k", [0, 4])
def test_bad_kernel(k):
    with pytest.raises(ValueError, match=f"odd and positive, got {k}"):
        SECA(k)
