"""Weights unpacked once, for the dense library: where the launcher of the matrix product, or its tuner, takes it."""

import pytest
import torch
from product_tools import KINDS, exact, integers, weights

from empf.kernels import matmul
from empf.kernels.dense import dense_product_of_codes
from empf.kernels.matmul import FLOATS, binary_matmul

pytestmark = pytest.mark.kernel


def test_many_rows_of_bf16_take_the_dense_library(device, kernels_on, poisoned, monkeypatch):
    """The sums are the library's, so the interpreter can do this one: all it makes in bf16 are powers of two."""
    monkeypatch.setattr(matmul, "DENSE_ROWS", 33)
    x, packed = integers(33, 70, torch.bfloat16, device), weights(67, 70, "ternary", device)
    for bias in (None, integers(1, 67, torch.float32, device)[0]):
        kernels_on.clear()
        y = binary_matmul(x, packed, bias=bias)
        assert kernels_on == {"binary_unpack": 1} and y.dtype == torch.bfloat16
        assert torch.equal(y.cpu(), exact(x, packed, bias, None).bfloat16())
    kernels_on.clear()
    binary_matmul(x[:32], packed)
    assert kernels_on == {"binary_matmul": 1}


def test_bf16_asked_for_more_does_not_take_the_dense_library(device, kernels_on, monkeypatch):
    """It would round the scale to bf16, an error of 2^-9 that no type of the result could undo."""
    monkeypatch.setattr(matmul, "DENSE_ROWS", 1)
    x, packed = integers(33, 70, torch.bfloat16, device), weights(67, 70, "ternary", device)
    packed = packed.with_scale(packed.scale / 3)
    y = binary_matmul(x, packed, out_dtype=torch.float32)
    assert kernels_on == {"binary_matmul": 1}
    torch.testing.assert_close(y.cpu().double(), exact(x, packed, None, None), rtol=1e-6, atol=0)
    for out_dtype in FLOATS:
        plans = matmul._candidates(64, 72, 128, torch.bfloat16, out_dtype, 132, False)
        assert (matmul.Plan(None) in plans) == (out_dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_by_the_dense_library(kind, dtype, device, kernels_on, poisoned):
    """What the tuner may choose: unpacked to int8, exact like the kernel."""
    x, packed = integers(40, 136, dtype, device)[:, 8:], weights(72, 128, kind, device)
    assert matmul.Plan(None) in matmul._candidates(40, 72, 128, dtype, torch.float32, 132, False)
    assert matmul.Plan(None) not in matmul._candidates(16, 72, 128, dtype, torch.float32, 132, False)
    sums = packed.row_sums() if dtype == torch.uint8 else None
    for bias in (None, integers(1, 72, torch.float32, device)[0]):
        y = dense_product_of_codes(
            x, packed.operand("quad"), packed.scale, bias, sums, 0.5, kind == "ternary", torch.float32
        )
        assert torch.equal(y.cpu().double(), exact(x, packed, bias, 0.5))
    assert kernels_on == {"binary_unpack": 2}
