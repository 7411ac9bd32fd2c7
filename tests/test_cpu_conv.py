"""Convolutions with weights that are laid out once: the sums of ordinary ones, those of codes to the last bit."""

import pytest
import torch
import torch.nn.functional as F

from empf.deploy import cpu_conv
from empf.deploy.cpu_conv import CodeConv, FloatConv

needs_avx = pytest.mark.skipif(not cpu_conv.available(), reason="oneDNN lays out weights on x86 only")


@needs_avx
@pytest.mark.parametrize("shape, kernel, stride, padding", [((5, 3, 7, 9), 3, 1, 1), ((1, 16, 8, 8), 1, 2, 0)])
def test_the_sums_are_those_of_an_ordinary_convolution(shape, kernel, stride, padding):
    torch.manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    signs = torch.randint(-1, 2, (4, shape[1], kernel, kernel), dtype=torch.int8)
    bias = torch.randn(4).round()
    wanted = F.conv2d(codes.double(), signs.double(), None, stride, padding)
    scaled = (wanted * 0.5 + bias.double().view(-1, 1, 1)).float()
    assert torch.equal(CodeConv(signs, torch.full((4,), 2.0), stride, padding, codes, 0.25)(codes, bias), scaled)
    floats = FloatConv(0.5 * signs.float(), stride, padding, codes[:1].float())  # laid out for another batch
    assert torch.equal(floats(codes.float(), bias), scaled)


@needs_avx
def test_a_torch_whose_operators_differ_is_noticed(monkeypatch):
    try:
        for error in (AttributeError("gone"), TypeError("other arguments")):
            cpu_conv._right.cache_clear()
            monkeypatch.setattr(
                cpu_conv.CodeConv, "__call__", lambda self, x, bias, error=error: (_ for _ in ()).throw(error)
            )
            assert not cpu_conv.available()
        cpu_conv._right.cache_clear()
        monkeypatch.setattr(cpu_conv.CodeConv, "__call__", lambda self, x, bias: torch.zeros(1, 2, 3, 3))
        assert not cpu_conv.available()
    finally:
        cpu_conv._right.cache_clear()


@pytest.fixture
def asked_anew():
    cpu_conv.multiplies_bf16.cache_clear()
    yield
    cpu_conv.multiplies_bf16.cache_clear()


@pytest.mark.parametrize("missing", ["instructions", "compiler", "operator", "right sums"])
def test_bf16_needs_instructions_a_compiler_and_an_operator(missing, asked_anew, monkeypatch):
    if missing == "instructions":
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    elif missing == "compiler":
        monkeypatch.setattr(cpu_conv.native, "library", lambda: None)
    elif missing == "operator":
        monkeypatch.setattr(cpu_conv, "available", lambda: False)
    else:
        monkeypatch.setattr(FloatConv, "__call__", lambda self, x, bias: torch.zeros(1, 2, 4, 4, dtype=x.dtype))
    assert not cpu_conv.multiplies_bf16()


def test_under_autocast_the_answers_are_the_same(asked_anew):
    wanted = cpu_conv.available(), cpu_conv.multiplies_bf16()
    for answer in (cpu_conv._right, cpu_conv.multiplies_bf16):
        answer.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert (cpu_conv.available(), cpu_conv.multiplies_bf16()) == wanted


def test_a_graph_that_is_traced_holds_ordinary_convolutions(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not cpu_conv.available()
