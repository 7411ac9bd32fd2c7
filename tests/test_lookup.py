"""Convolution by lookup: the sums of a dense one, in any shape and number of threads, and who takes its place."""

import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import empf
from empf.deploy.cpu_conv import FloatConv, LookupConv
from empf.deploy.layers import PackedSynapse
from empf.kernels import lookup, native
from empf.kernels.lookup import TOP, computed, lookup_conv2d, lookup_product, lookup_words
from empf.kernels.pack import pack, signs

needs_lookup = pytest.mark.skipif(not lookup.available(), reason="needs a C++ compiler and AVX512F")
needs_codes = pytest.mark.skipif(not lookup.available(codes=True), reason="needs a C++ compiler and AVX512 VBMI")


def case(m=2, c=8, h=6, w=6, o=16, k=3):
    torch.manual_seed(c + o)
    weight = pack(torch.randn(o, c, k, k))
    return torch.randn(m, c, h, w), weight, torch.randn(o)


def dense(x, weight, bias, stride, padding):
    effective = signs(weight).double() * weight.scale.double().view(-1, 1, 1, 1)
    return F.conv2d(x.double(), effective, bias.double(), stride, padding)


@needs_lookup
@pytest.mark.parametrize("channels", [(1, 1), (3, 40), (5, 19), (8, 16), (33, 7), (36, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (9, 8), (3, 17)], ids=str)
def test_the_sums_are_those_of_a_dense_convolution(channels, size):
    for k, stride, padding in product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2)):
        if min(size) + 2 * padding < k:
            continue
        x, weight, bias = case(2, channels[0], *size, channels[1], k)
        words = lookup_words(weight)
        found = lookup_conv2d(x, words, weight.scale, bias, stride=stride, padding=padding)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), dense(x, weight, bias, stride, padding), rtol=1e-5, atol=2e-5)


@needs_codes
@pytest.mark.parametrize("channels", [(1, 1), (3, 40), (5, 19), (8, 16), (33, 7), (64, 96), (1100, 33)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 8), (3, 17)], ids=str)
def test_the_sums_of_codes_are_exact(channels, size):
    """Also the largest ones, all with one sign: 31 * 1100 * 25 has 20 bits, a table of four 7."""
    for k, stride, padding, largest in product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (False, True)):
        if min(size) + 2 * padding < k:
            continue
        x, weight, bias = case(2, channels[0], *size, channels[1], k)
        if largest:
            sign = torch.ones(weight.shape)
            sign[1:] = -1
            weight = pack(sign)
        codes = torch.full_like(x, TOP) if largest else torch.randint(0, TOP + 1, x.shape)
        codes = codes.to(torch.uint8)
        words = lookup_words(weight, codes=True)
        found = lookup_conv2d(codes, words, weight.scale, bias, stride=stride, padding=padding)
        assert torch.equal(found, rounded_once(codes, weight, bias, stride, padding))


def rounded_once(codes, weight, bias, stride, padding):
    """scale * sums + bias of exact sums, as one fused operation rounds it."""
    sums = F.conv2d(codes.double(), signs(weight).double(), None, stride, padding)
    return (sums * weight.scale.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)).float()


def test_a_weight_is_one_bit():
    weight = case(c=64, o=32)[1]
    words, of_codes = lookup_words(weight), lookup_words(weight, codes=True)
    assert words.dtype == torch.int32 and words.numel() * 32 == 32 * 64 * 9
    assert of_codes.dtype == torch.uint8 and of_codes.numel() * 8 == 32 * 64 * 9


def of_kind(x, codes):
    """x, or codes in its place."""
    return torch.randint(0, 16, x.shape, dtype=torch.uint8) if codes else x


OF_ALL = pytest.mark.parametrize("codes", [False, pytest.param(True, marks=needs_codes)])


@needs_lookup
@OF_ALL
def test_threads_layouts_and_other_images_change_nothing(codes, monkeypatch):
    x, weight, bias = case(3, 20, 9, 9, 48)
    x, words = of_kind(x, codes), lookup_words(weight, codes=codes)

    def run(x, threads=1):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return lookup_conv2d(x, words, weight.scale, bias, padding=1)

    once = run(x)
    assert all(torch.equal(run(x, threads), once) for threads in (2, 3, 64))
    assert torch.equal(run(x.contiguous(memory_format=torch.channels_last)), once)
    assert torch.equal(run(x[1:2]), once[1:2])


@needs_lookup
def test_what_is_not_finite_is_so_where_a_dense_convolution_has_it():
    x, weight, bias = case()
    x[0, 1, 2, 3], x[1, 5, 0, 0], x[1, 6, 0, 0] = float("nan"), float("inf"), float("inf")
    found = lookup_conv2d(x, lookup_words(weight), weight.scale, bias, padding=1)
    wanted = dense(x, weight, bias, 1, 1)
    assert torch.equal(found.isfinite(), wanted.isfinite()) and not wanted.isfinite().all()
    assert torch.equal(found.isinf(), wanted.isinf()) and found.isinf().any()


@needs_lookup
def test_what_does_not_fit_is_said():
    x, weight, bias = case()
    words = lookup_words(weight)
    for wrong in (x[0], x.double(), torch.cat([x] * 5, 1), x.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"x must be fp32 \(M, C, H, W\)"):
            lookup_conv2d(wrong, words, weight.scale, bias)
    for place in ({"stride": 0}, {"padding": -1}, {"stride": 1.0}):
        with pytest.raises(ValueError, match="stride must be an int from 1 and padding an int from 0"):
            lookup_conv2d(x, words, weight.scale, bias, **place)
    with pytest.raises(ValueError, match=r"a kernel of \(3, 3\) does not fit into an image of \(6, 2\)"):
        lookup_conv2d(x[..., :2], words, weight.scale, bias)
    with pytest.raises(ValueError, match="words those of C to O channels"):
        lookup_conv2d(x, words.flatten(), weight.scale, bias)
    with pytest.raises(ValueError, match="scale and bias"):
        lookup_conv2d(x, words, weight.scale[0], bias)
    for wrong in (words.long(), words.transpose(1, 2)):
        with pytest.raises(ValueError, match="words must be those of lookup_words"):
            lookup_conv2d(x, wrong, weight.scale, bias)
    for wrong in (pack(torch.randn(3, 2, 3, 3), "ternary"), pack(torch.randn(3, 2)), pack(torch.randn(3, 2, 1, 3))):
        with pytest.raises(ValueError, match=r"weight must be binary \(O, C, k, k\), got"):
            lookup_words(wrong)
    for wrong in (bias[:-1], bias.double()):
        with pytest.raises(ValueError, match="scale and bias"):
            lookup_conv2d(x, words, weight.scale, wrong)


@needs_codes
def test_codes_that_are_too_large_are_said():
    x, weight, bias = case()
    codes = x.clamp(0, 1).to(torch.uint8)
    codes[1, 2, 3, 4] = TOP + 1
    with pytest.raises(ValueError, match="codes must be at most 31, got 32"):
        lookup_conv2d(codes, lookup_words(weight, codes=True), weight.scale, bias)


def test_without_it_the_call_says_so(monkeypatch):
    monkeypatch.setattr(lookup, "available", lambda codes=False: False)
    x, weight, bias = case()
    with pytest.raises(RuntimeError, match="needs a C.. compiler and AVX512"):
        lookup_conv2d(x, lookup_words(weight), weight.scale, bias)


@needs_lookup
@pytest.mark.parametrize("o, size, steps, bits", [(64, 32, 4, None), (19, 9, 3, None), (32, 8, 2, 4), (3, 5, 1, None)])
@pytest.mark.parametrize("threads", [1, 3])
@OF_ALL
def test_a_neuron_takes_the_sums_as_they_come(o, size, steps, bits, threads, codes, monkeypatch):
    x, weight, bias = case(2 * steps, 12, size, size, o)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "ALONE", 0)
    words = lookup_words(weight, codes=codes)
    product = lookup_product(of_kind(x, codes), words, weight.scale / (8 if codes else 1), bias, padding=1)
    current, residual = computed(product).view(steps, 2, o, size, size), product.empty((steps, 2))
    residual.copy_(torch.randn(residual.shape))
    parameters = native.table([torch.rand(steps, o) for _ in range(2)] + [None, None], steps)
    keywords = dict(potential=True, bits=bits, step=0.25, more=((residual, None, None),))
    kind = torch.uint8 if bits else torch.float32
    out, total = product.empty((steps, 2), kind), product.empty((steps, 2))
    with torch.no_grad():
        wanted, wanted_v = native.fire(current, None, parameters, codes=bits is not None, **keywords)
        found, v = native.fire(product, None, parameters, out=out, total=total, **keywords)
    assert torch.equal(found, wanted) and torch.equal(v, wanted_v)
    assert torch.equal(total, current + residual) and found.float().std() > 0


def chosen(conv, x, top=math.inf):
    with torch.no_grad():
        kernel = PackedSynapse(conv).filter(None)
        place = 0.25 if x.dtype == torch.uint8 else None, top
        return type(kernel.laid_out(x, *place)) if kernel.lays_out(x, top) else None


@needs_lookup
def test_it_is_taken_where_a_table_serves_several_outputs_or_a_layer_is_small(monkeypatch):
    x = torch.rand(33, 32, 8, 8)
    conv = empf.BinaryConv2d(32, 16, 3, padding=1)
    assert chosen(conv, x) is LookupConv
    assert chosen(empf.BinaryConv2d(32, 64, 1), x) is not LookupConv
    assert chosen(empf.BinaryConv2d(32, 64, 1), x[:32]) is LookupConv
    assert chosen(empf.BinaryConv2d(32, 64, 1, stride=2), x) is LookupConv
    assert chosen(empf.BinaryConv2d(32, 80, 1), x) is LookupConv
    assert chosen(empf.BinaryConv2d(32, 16, 3, padding=1, kind="ternary"), x) is not LookupConv
    assert chosen(conv, x.double()) is None
    codes = torch.randint(0, 16, x.shape, dtype=torch.uint8)
    assert (chosen(conv, codes, 31) is LookupConv) == lookup.available(codes=True)
    assert chosen(conv, codes, 32) is not LookupConv  # four of them are more than a byte
    assert chosen(empf.BinaryConv2d(32, 64, 1), codes, 15) is not LookupConv
    monkeypatch.setattr(lookup, "available", lambda codes=False: False)
    assert chosen(conv, x) in (FloatConv, None)


@needs_lookup
@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=needs_codes), pytest.param(5, marks=needs_codes)])
def test_a_packed_network_has_the_same_logits_without_it(bits, monkeypatch):
    torch.manual_seed(0)
    config = empf.ModelConfig(width=0.25, num_classes=10, image_size=16, spike_bits=bits)
    packed, x = empf.pack(empf.build(config).eval()), torch.randn(3, 3, 16, 16)
    called = []
    product = lookup.lookup_product
    monkeypatch.setattr(lookup, "lookup_product", lambda *args, **kw: called.append(1) or product(*args, **kw))
    found = packed(x)
    assert len(called) > 10
    empf.reset(packed)
    monkeypatch.setattr(lookup, "available", lambda codes=False: False)
    torch.testing.assert_close(found, packed(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [None, 0, 1, 2])
def test_there_is_none_without(known, monkeypatch):
    """Without a compiler, or instructions for floats, or for codes."""

    class Library:
        @staticmethod
        def looks_up():
            return known

    monkeypatch.setattr(native, "library", lambda: None if known is None else Library)
    assert lookup.available() == (known in (1, 2)) and lookup.available(codes=True) == (known == 2)


OUT_OF_MEMORY = """
import resource, sys, torch
from empf.kernels.lookup import lookup_conv2d, lookup_words
from empf.kernels.pack import pack
weight = pack(torch.randn(1, 4, 3, 3))
x = torch.zeros(1, 1, 1 << 21, 4).permute(0, 3, 1, 2)  # 32 MB; the tables of three rows are 400
words = lookup_words(weight)
lookup_conv2d(x[..., :9], words, weight.scale, torch.zeros(1), padding=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
try:
    lookup_conv2d(x, words, weight.scale, torch.zeros(1), padding=1)
except MemoryError as error:
    sys.exit(str(error))
"""


@needs_lookup
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_that_runs_out_is_an_error():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 1 and "no memory is left for a layer: give it fewer or smaller images" in done.stderr
