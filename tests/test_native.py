"""The compiled neuron of packed networks: the numbers of torch, and what happens where it cannot be had."""

import os
import shutil
from itertools import product

import pytest
import torch

import empf
from empf.kernels import native
from empf.kernels.neuron import NeuronParams, neuron_steps
from empf.kernels.neuron_cpu import rounded
from empf.kernels.steps import is_channels_last

COMPILER = shutil.which(os.environ.get("CXX") or "c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
X86 = "avx2" in native.processor()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The library is looked for anew, in an empty cache."""
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EMPF_NATIVE", raising=False)
    native.library.cache_clear()
    yield monkeypatch
    native.library.cache_clear()


def case(T, shape, per_channel, gain, parallel, last):
    """(x, parameters) with currents on both sides of the thresholds."""
    torch.manual_seed(0)
    x = torch.randn(T, *shape)
    if last:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    own = (T, shape[1]) if per_channel else (T,)
    leak, threshold = torch.rand(own), torch.rand(own)
    gains = (torch.randn(T, shape[1]), torch.randn(T, shape[1])) if gain else (None, None)
    return x, (None if parallel else leak, threshold, *gains)


def check(x, parameters, parallel, bits, v=None):
    p = NeuronParams(*parameters[:2], gain=parameters[2], shift=parameters[3], parallel=parallel)
    steps, wanted_v = neuron_steps(x, v, p)
    wanted = torch.stack(list(steps))
    with torch.no_grad():
        assert native.runs(x, any(p is not None and p.dim() == 2 for p in parameters))
        laid_out = native.table(parameters, len(x))
        found, found_v = native.fire(
            x, v, laid_out, potential=not parallel, bits=bits, step=0.25, codes=bits is not None
        )
    if bits is None:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    else:
        codes = rounded(wanted.clone(), bits, 0.25)
        assert found.dtype == torch.uint8 and codes.max() == 2**bits - 1
        assert (found.int() - codes.int()).abs().max() <= 1 and (found != codes).float().mean() < 1e-3
    assert is_channels_last(found) == is_channels_last(x)
    if not parallel:
        torch.testing.assert_close(found_v, wanted_v, rtol=1e-6, atol=1e-6)


SHAPES = [(2, 16, 8, 8), (1, 24, 5, 7), (3, 5), (2, 3, 129), (3, 5, 1, 1)]


@needs_compiler
@pytest.mark.parametrize(("shape", "bits"), [*product(SHAPES, (None, 2))], ids=str)
def test_it_is_the_definition(shape, bits):
    for per_channel, gain, parallel in product((False, True), repeat=3):
        last = len(shape) > 2 and (per_channel or gain or shape[0] == 2)
        check(*case(4, shape, per_channel, gain, parallel, last), parallel, bits)


@needs_compiler
def test_it_goes_on_from_a_potential_and_takes_a_current_that_stands_still():
    x, parameters = case(3, (2, 4, 6, 6), True, False, False, last=True)
    check(x, parameters, False, None, v=torch.rand(2, 4, 6, 6))
    check(x[:1].expand(3, *x.shape[1:]), parameters, False, None)


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (1, 24, 5, 7)])
def test_it_adds_up_a_current_of_bf16_and_fp32_and_puts_it_out(shape):
    (x, parameters), (residual, _) = (case(3, shape, False, False, False, last=True) for _ in range(2))
    residual, x = residual.flip(1), x.bfloat16()
    gain, shift = torch.randn(2, 3, shape[1])
    with torch.no_grad():
        total, out = torch.empty_like(residual), torch.empty_like(x)
        _, v = native.fire(
            x, None, native.table(parameters, 3, shape[1]), potential=True, current=native.table((gain, shift), 3),
            more=((residual, None, None),), out=out, total=total,
        )  # fmt: skip
    lanes = (p.view(3, 1, -1, 1, 1) for p in (gain, shift))
    torch.testing.assert_close(total, x.float() * next(lanes) + next(lanes) + residual, rtol=1e-6, atol=1e-6)
    steps, wanted_v = neuron_steps(total, None, NeuronParams(*parameters[:2]))
    torch.testing.assert_close(out, torch.stack(list(steps)).bfloat16(), rtol=1 / 128, atol=1e-6)
    torch.testing.assert_close(v, wanted_v, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        codes, _ = native.fire(x, None, native.table(parameters, 3), potential=False, bits=2, step=0.25, codes=True)
        same, _ = native.fire(
            x.float(), None, native.table(parameters, 3), potential=False, bits=2, step=0.25, codes=True
        )
    assert torch.equal(codes, same) and codes.max() == 3


@needs_compiler
@pytest.mark.parametrize("threads", (1, 2))
def test_a_large_current_in_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check(*case(2, (2, 32, 33, 33), False, True, False, True), False, None)


@needs_compiler
def test_what_is_not_finite_stays_so():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0]).view(1, 1, 4)
    for parallel in (False, True):
        parameters = (None if parallel else torch.rand(1), torch.full((1,), 0.5), None, None)
        found, _ = native.fire(x, None, native.table(parameters, 1), potential=False)
        wanted = torch.tensor([float("nan"), float("inf"), 0, 0.5])
        torch.testing.assert_close(found.flatten(), wanted, equal_nan=True)


@needs_compiler
@pytest.mark.skipif(not X86, reason="flags of x86")
@pytest.mark.parametrize("processor", ("x86-64", "x86-64-v3"))
def test_on_older_processors(fresh, processor):
    flags = [f"-march={processor}" if flag.startswith("-march") else flag for flag in native.FLAGS]
    fresh.setattr(native, "FLAGS", flags)
    assert native.library().lanes() == {"x86-64": 4, "x86-64-v3": 8}[processor]
    for bits in (None, 2):
        check(*case(4, (2, 24, 5, 7), True, True, False, True), False, bits)


def test_it_is_compiled_once(fresh):
    calls = []
    run = native.subprocess.run
    fresh.setattr(native.subprocess, "run", lambda *a, **k: (calls.append(a), run(*a, **k))[1])
    first = native.library()
    native.library.cache_clear()
    assert (first is None) == (COMPILER is None) == (native.library() is None)
    assert len(calls) == (COMPILER is not None)


@needs_compiler
@pytest.mark.parametrize("bits", (None, 4))
def test_a_packed_network_uses_it_for_each_layer(monkeypatch, bits):
    fire, calls = native.fire, []
    monkeypatch.setattr(native, "fire", lambda *a, **k: (calls.append(k["potential"]), fire(*a, **k))[1])
    packed = empf.pack(empf.resnet18(in_channels=1, image_size=8, width=0.25, spike_bits=bits).eval())
    packed(torch.rand(2, 1, 8, 8), steps=3)
    assert calls == [True] * 16  # the potential is carried on
    packed(torch.rand(2, 1, 8, 8))
    assert calls[16:] == [False] * 16


WITHOUT = {
    "asked": {"EMPF_NATIVE": "0"},
    "no compiler": {"CXX": "no-such-compiler"},
    "a compiler that fails": {"CXX": "false"},
    "no room": {"EMPF_CACHE": "/dev/null"},
}


@pytest.mark.parametrize("why", WITHOUT)
def test_without_it_the_numbers_are_the_same(fresh, why):
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    packed = empf.pack(empf.resnet18(in_channels=1, image_size=8, width=0.25).eval())
    wanted = packed(x)
    native.library.cache_clear()
    for name, value in WITHOUT[why].items():
        fresh.setenv(name, value)
    assert native.library() is None
    packed.reset()
    torch.testing.assert_close(packed(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_folder_of_somebody_else_is_not_used(fresh):
    fresh.setattr(native.os, "geteuid", lambda: -1)
    assert native.library() is None


def test_gradients_and_traces_go_their_own_way():
    x = torch.randn(4, 2, 16)
    assert not native.runs(x, False)  # gradients are on
    with torch.no_grad():
        assert native.runs(x, False) == (native.library() is not None)
        assert not native.runs(x.double(), False)
        assert not native.runs(torch.randn(4, 2, 6, 6, 16).movedim(-1, 3), False)  # neither layout
        assert not native.runs(torch.randn(4, 2, 6, 6, 6), True)  # channels are not last
