"""The flip kernel: against numbers written out, and against its definition to the bit."""

import pytest
import torch

from empf.kernels import flip
from empf.kernels.flip import BLOCK, bits_of, flip_update, flip_update_ref, signs_of
from empf.kernels.pack import pack

NEVER = torch.tensor(float("inf"))


def new_state(n, momentum, device="cpu"):
    """Bits, and a momentum of zeros with its scale."""
    bits = bits_of(torch.randn(n, device=device) < 0)
    if momentum == torch.bfloat16:
        return bits, torch.zeros(n, dtype=momentum, device=device), None
    return bits, torch.zeros(n, dtype=momentum, device=device), torch.zeros(-(-n // BLOCK), device=device)


def test_numbers_written_out():
    """w = +1 -1 +1 -1; m pushes against the first (flips), for the second, against the last two too little, or just."""
    bits, momentum = bits_of(torch.tensor([False, True, False, True])), torch.zeros(4, dtype=torch.bfloat16)
    assert bits.tolist() == [0b1010]
    tau = torch.tensor(0.5)
    squares = flip_update(torch.tensor([4.0, 4.0, 1.0, -2.0]), bits, momentum, None, tau, rate=0.25, keep=0.75)
    assert squares.item() == 37.0
    assert signs_of(bits, 4).tolist() == [-1, -1, 1, -1]  # 0.5 is not above 0.5
    assert momentum.tolist() == [0.0, 1.0, 0.25, -0.5]
    flip_update(torch.tensor([4.0, 0.0, 0.0, -1.0]), bits, momentum, None, tau, rate=0.25, keep=0.75)
    assert signs_of(bits, 4).tolist() == [-1, -1, 1, 1]
    assert momentum.tolist() == [1.0, 0.75, 0.1875, 0.0]


def test_codes_written_out():
    bits, momentum, scale = bits_of(torch.zeros(3)), torch.zeros(3, dtype=torch.int8), torch.zeros(1)
    flip_update(torch.tensor([-2.0, 1.0, 0.5]), bits, momentum, scale, NEVER, rate=0.5, keep=0.5)
    assert momentum.tolist() == [-127, 64, 32] and scale.tolist() == pytest.approx([1 / 127])
    assert bits.tolist() == [0]


@pytest.mark.kernel
@pytest.mark.parametrize("n", [1, 31, 33, 1023, 1024, 1025, 4130])
@pytest.mark.parametrize("momentum", [torch.int8, torch.bfloat16], ids=str)
def test_kernel_and_definition_agree_to_the_bit(n, momentum, device, kernels_on, poisoned):
    """Several updates, the last one of a gradient with a NaN; float16 and bfloat16 gradients in between."""
    torch.manual_seed(n)
    bits, m, scale = new_state(n, momentum, device)
    tau = torch.tensor(0.05, device=device)
    for dtype, keep in ((torch.float32, 0.9), (torch.float32, 1.0), (torch.float16, 0.9), (torch.float32, 0.9)):
        grad = torch.randn(n, device=device).to(dtype)
        grad[n // 2] = float("nan") if keep == 0.9 and dtype == torch.float32 and m.any() else 3.0
        *wanted, squares = flip_update_ref(grad, bits, m, scale, tau, keep, 0.1)
        kernels_on.clear()
        total = flip_update(grad, bits, m, scale, tau, rate=0.1, keep=keep)
        assert kernels_on == {"flip_update": 1}
        for found, expected in zip((bits, m, scale), wanted, strict=True):
            assert found is None or found.equal(expected) or torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        torch.testing.assert_close(total, squares.sum(), rtol=1e-5, atol=0, equal_nan=True)
    assert n == 1 or wanted[0].count_nonzero() > 0


@pytest.mark.kernel
def test_a_gradient_that_is_not_finite_flips_no_other_block(device, kernels_on):
    bits, m, scale = new_state(2 * BLOCK, torch.int8, device)
    grad = torch.zeros(2 * BLOCK, device=device)
    grad[3] = float("nan")
    before = bits.clone()
    assert flip_update(grad, bits, m, scale, torch.tensor(0.0, device=device), rate=0.1, keep=0.9).isnan()
    assert bits.equal(before) and scale[0].isnan() and scale[1] == 0 and not m.any()


@pytest.mark.parametrize("momentum", [torch.int8, torch.bfloat16], ids=str)
def test_parts_of_the_definition_are_the_whole(momentum, monkeypatch):
    """A CPU updates some weights at a time."""
    n = 3 * BLOCK + 7
    torch.manual_seed(0)
    state = new_state(n, momentum)
    other = [None if t is None else t.clone() for t in state]
    grad, tau = torch.randn(n), torch.tensor(0.2)
    whole = flip_update(grad, *state, tau, rate=0.3, keep=0.7)
    monkeypatch.setattr(flip, "AT_ONCE", BLOCK)
    assert flip_update(grad, *other, tau, rate=0.3, keep=0.7).equal(whole)
    assert all(a is None or a.equal(b) for a, b in zip(state, other, strict=True))


@pytest.mark.parametrize(("momentum", "most"), [(torch.int8, 0.06), (torch.bfloat16, 0.06)], ids=str)
def test_a_momentum_of_few_bits_follows_one_of_many(momentum, most):
    """400 updates of c = 0.01: what each rounds away does not add up. Errors as a share of the momentum's rms."""
    torch.manual_seed(0)
    (bits, m, scale), exact = new_state(8 * BLOCK, momentum), torch.zeros(8 * BLOCK, dtype=torch.float64)
    drift = 0.1 * torch.randn(8 * BLOCK)
    for _ in range(400):
        grad = torch.randn(8 * BLOCK) + drift
        flip_update(grad, bits, m, scale, NEVER, rate=0.01, keep=0.99)
        exact = 0.99 * exact + 0.01 * grad
    found = m.double() if scale is None else m.double() * scale.double().repeat_interleave(BLOCK)
    rms = exact.square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() < most * rms
    assert (found - exact).mean().abs() < 0.002 * rms


def test_bits_and_signs():
    """The order is that of packed weights; minus zero is plus, and bits past the end are 0."""
    w = torch.randn(3, 64)
    assert bits_of(w < 0).equal(pack(w).bits.flatten())
    some = torch.randn(45)
    assert signs_of(bits_of(some < 0), 45).equal(torch.where(some < 0, -1.0, 1.0))
    assert bits_of(torch.ones(33, dtype=torch.bool)).tolist() == [-1, 1]
    assert signs_of(torch.tensor([-1, 1], dtype=torch.int32), 33, torch.float64).tolist() == [-1.0] * 33


def test_what_does_not_fit_is_named():
    good = dict(
        grad=torch.zeros(40), bits=torch.zeros(2, dtype=torch.int32), momentum=torch.zeros(40, dtype=torch.int8),
        scale=torch.zeros(1), tau=torch.zeros(()),
    )  # fmt: skip
    flip_update(**good, rate=0.1, keep=0.9)
    bad = {
        "bits": torch.zeros(1, dtype=torch.int32), "momentum": torch.zeros(40), "scale": torch.zeros(2),
        "tau": torch.zeros((), dtype=torch.float64), "grad": torch.zeros(80)[::2],
    }  # fmt: skip
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"{name}.* must be contiguous"):
            flip_update(**{**good, name: tensor}, rate=0.1, keep=0.9)
    with pytest.raises(ValueError, match="momentum of 40 weights must be contiguous torch.bfloat16"):
        flip_update(**{**good, "scale": None}, rate=0.1, keep=0.9)
