"""Operands of which a packed product is exact, for the tests of the products."""

import pytest
import torch

from empf.kernels.pack import pack, signs

KINDS = ("binary", "ternary")
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter computes bf16 wrongly
INTEGERS = {torch.uint8: (0, 256), torch.int8: (-128, 128)}


def integers(m, k, dtype, device, seed=0):
    low, high = INTEGERS.get(dtype, (-4, 5))
    return torch.randint(low, high, (m, k), generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def weights(n, k, kind, device, seed=1):
    """Weights with rows of 0.0, -0.0, all plus and all minus; the scales are powers of two, so products are exact."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    for row, value in enumerate((0.0, -0.0, 0.5, -0.5)[: n - 1]):
        w[row] = value
    return pack(w, kind, 2.0 ** torch.randint(-3, 4, (n,), generator=generator)).to(device)


def exact(x, packed, bias, step):
    """The product in integers, then the scale: nothing here can round for the inputs above."""
    total = x.cpu().double() @ signs(packed).cpu().double().T
    y = total * packed.scale.cpu().double() * (step or 1.0)
    return y if bias is None else y + bias.cpu().double()
