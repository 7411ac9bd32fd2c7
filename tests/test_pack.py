"""Packed weights: the canonical order, the derived orders, and what a kernel unpacks from them."""

import copy
import pickle

import pytest
import torch

from empf.kernels.dispatch import tl, triton
from empf.kernels.pack import (
    PackedWeight,
    pack,
    signs,
    unpack,
    weights_per_word,
)
from empf.kernels.products import unpack_words

KINDS = ("binary", "ternary")


def dense(n, k, seed=0):
    """Random weights with a row of 0.0, one of -0.0, one all plus and one all minus."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    for row, value in enumerate((0.0, -0.0, 0.5, -0.5)[: n - 1]):
        w[row] = value
    return w


def expected_signs(w, kind):
    """Written out again, weight by weight."""
    result = torch.zeros(w.shape, dtype=torch.int8)
    for n, row in enumerate(w.double()):
        threshold = 0.7 * row.abs().mean() if kind == "ternary" else -1.0
        for index in torch.cartesian_prod(*[torch.arange(size) for size in row.shape]).view(-1, row.ndim):
            value = row[tuple(index)]
            if abs(value) > threshold:
                result[(n, *index)] = -1 if value < 0 else 1
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (5, 32), (6, 33), (3, 100), (4, 5, 3), (4, 5, 3, 3)])
def test_pack_unpack(kind, shape):
    w = dense(shape[0], torch.Size(shape[1:]).numel()).view(shape)
    packed = pack(w, kind)
    want = expected_signs(w, kind)
    assert packed.bits.dtype == torch.int32
    assert packed.bits.shape == (shape[0], -(-packed.k // weights_per_word(kind)))
    assert torch.equal(signs(packed), want) and signs(packed).dtype == torch.int8
    size = w.flatten(1).abs()
    kept = want.flatten(1) != 0
    scale = size.mean(1) if kind == "binary" else (size * kept).sum(1) / kept.sum(1).clamp(min=1)
    torch.testing.assert_close(packed.scale, scale)
    assert torch.equal(unpack(packed), packed.scale.view(-1, *[1] * (len(shape) - 1)) * want)


def test_canonical_order_is_as_documented():
    w = torch.ones(64, 64) - 2 * torch.eye(64)
    bits = pack(w).bits
    for k in range(64):
        word = torch.zeros(2, dtype=torch.int32)
        word[k // 32] = -(2**31) if k % 32 == 31 else 1 << (k % 32)
        assert torch.equal(bits[k], word)
    w = torch.zeros(3, 20)
    w[0, 17], w[1, 17], w[2, 15] = 1.0, -1.0, -1.0
    assert pack(w, "ternary").bits.tolist() == [[0, 0b01 << 2], [0, 0b11 << 2], [-(2**30), 0]]  # 0b11 << 30


def test_zero_and_minus_zero_are_plus():
    assert signs(pack(torch.tensor([[0.0, -0.0, 1.0, -1.0]]))).tolist() == [[1, 1, 1, -1]]
    assert signs(pack(torch.zeros(1, 3), "ternary")).tolist() == [[0, 0, 0]]


def test_ternary_field_of_minus_zero_is_zero():
    packed = PackedWeight(torch.tensor([[0b10_11_01]], dtype=torch.int32), torch.ones(1), (1, 3), "ternary")
    assert signs(packed).tolist() == [[1, -1, 0]]
    assert packed.operand("quad")[0, 0] == (0b01 << 6) | (0b11 << 14)  # nothing at 22, where it would be -128


@pytest.mark.parametrize("kind", KINDS)
def test_own_scale(kind):
    w, scale = dense(5, 40), torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    packed = pack(w, kind, scale)
    assert torch.equal(unpack(packed), scale[:, None] * signs(packed))
    other = packed.with_scale(2 * scale)
    assert torch.equal(unpack(other), 2 * unpack(packed))
    assert other.operand("pair") is packed.operand("pair")


@triton.jit
def _unpack_tile_kernel(
    words_ptr, out_ptr, stride, dtype: tl.constexpr, TERNARY: tl.constexpr, WORDS: tl.constexpr, RUNTIME: tl.constexpr
):
    r = tl.arange(0, 128)
    words = tl.load(words_ptr + tl.arange(0, WORDS)[:, None] * stride + r[None, :])
    w = unpack_words(words, dtype, TERNARY, stride if RUNTIME else 16)
    K: tl.constexpr = w.shape[1]
    w = w.to(tl.float32) / (64 if dtype == tl.int8 else (2 if TERNARY else 1))
    tl.store(out_ptr + r[:, None] * K + tl.arange(0, K)[None, :], w)


def unpack_in_kernel(words, form, kind, runtime):
    """Every weight of a derived buffer of up to 128 rows, as the kernels see it."""
    k = words.shape[0] * weights_per_word(kind)
    padded = torch.zeros(triton.next_power_of_2(words.shape[0]), 128, dtype=torch.int32, device=words.device)
    padded[: words.shape[0]] = words
    out = torch.full((128, padded.shape[0] * weights_per_word(kind)), float("nan"), device=words.device)
    dtype = tl.int8 if form == "quad" else tl.float16
    _unpack_tile_kernel[(1,)](padded, out, 128, dtype, kind == "ternary", padded.shape[0], runtime)
    return out[:, :k]


@pytest.mark.kernel
@pytest.mark.parametrize("runtime", [True, False])
@pytest.mark.parametrize("form", ["pair", "quad"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_unpacks_every_position(kind, form, runtime, device):
    w = torch.ones(128, 128) - 2 * torch.eye(128)
    if kind == "ternary":
        w *= torch.randint(0, 2, w.shape, generator=torch.Generator().manual_seed(1)) * 2
    packed = pack(w, kind).to(device)
    words = packed.operand(form, block=128)
    assert words.dtype == torch.int32 and words.shape == (128 // weights_per_word(kind), 128)
    assert words.is_contiguous()
    assert torch.equal(unpack_in_kernel(words, form, kind, runtime), signs(packed).float())


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["pair", "quad"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_an_operand(kind, form, device):
    packed = pack(dense(5, 70), kind).to(device)
    words = packed.operand(form, block=96)
    assert words.shape == (96 // weights_per_word(kind), 128)
    assert torch.equal(unpack_in_kernel(words, form, kind, True)[:5, :70], signs(packed).float())


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["pair", "quad"])
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_taps(kind, form, device):
    packed = pack(dense(7, 45).view(7, 5, 3, 3), kind).to(device)
    words = packed.operand(form, block=32, taps=True)
    assert words.shape == (9 * 32 // weights_per_word(kind), 128)
    unpacked = unpack_in_kernel(words, form, kind, True)[:7].view(7, 3, 3, 32)
    assert torch.equal(unpacked[..., :5], signs(packed).permute(0, 2, 3, 1).float())


@pytest.mark.parametrize("kind", KINDS)
def test_row_sums(kind):
    packed = pack(dense(6, 77), kind)
    assert torch.equal(packed.row_sums(), signs(packed).int().sum(1)) and packed.row_sums().dtype == torch.int32


def test_derived_buffers_are_built_once_follow_the_device_and_are_not_saved():
    packed = pack(dense(5, 40))
    first = packed.operand("pair")
    assert packed.operand("pair") is first and packed.operand("quad") is not first
    moved = packed.to("meta")
    assert moved.bits.is_meta and moved.scale.is_meta and moved.device.type == "meta"
    assert {key: buffer.device.type for key, (_, buffer) in moved._derived.items()} == dict.fromkeys(
        packed._derived, "meta"
    )
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert not again._derived and torch.equal(unpack(again), unpack(packed)) and again.kind == packed.kind


@pytest.mark.gpu
def test_no_derived_buffer_inside_a_graph_capture():
    packed = pack(dense(5, 40)).to("cuda")
    built = packed.operand("pair")
    with pytest.raises(RuntimeError, match="run once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert packed.operand("pair") is built
        packed.operand("quad")


def test_a_buffer_is_whole_before_another_stream_may_read_it(monkeypatch):
    """On CUDA it is waited for, once; torch.compile, which traces no streams, sees neither that nor the capture."""
    calls, capturing = [], False
    stream = type("Stream", (), {"synchronize": lambda self: calls.append("waited")})()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: calls.append("asked") or capturing)
    packed = pack(dense(5, 40))
    assert packed.operand("pair") is packed.operand("pair") and calls == ["asked", "waited"]
    capturing = True
    with pytest.raises(RuntimeError, match="run once before"):
        packed.operand("quad")
    assert calls.pop() == "asked"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert packed.operand("quad").shape == (8, 128) and calls == ["asked", "waited"]


def test_packing_keeps_nothing_of_the_weight():
    w = dense(3, 40).requires_grad_()
    packed = pack(w)
    before = unpack(packed)
    with torch.no_grad():
        w.neg_()
    assert torch.equal(unpack(packed), before) and not packed.scale.requires_grad


BITS, SCALE = torch.zeros(4, 2, dtype=torch.int32), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BITS, SCALE, (4, 33), "quinary"), "quinary"),
        ((BITS, SCALE, (4, 33, 2)), r"\(4, 33, 2\)"),
        ((BITS, SCALE, (4, 0)), r"\(4, 0\)"),
        ((BITS, SCALE, (4, 65)), r"int32 \(4, 3\), got torch.int32 \(4, 2\)"),
        ((BITS, SCALE, (4, 33), "ternary"), r"int32 \(4, 3\), got torch.int32 \(4, 2\)"),
        ((BITS.long(), SCALE, (4, 33)), "got torch.int64"),
        ((BITS, SCALE, (5, 33)), r"\(5, 2\)"),
        ((BITS, SCALE[:3], (4, 33)), r"torch.float32 \(4,\), got torch.float32 \(3,\)"),
        ((BITS, SCALE.half(), (4, 33)), "got torch.float16"),
        ((BITS, SCALE.to("meta"), (4, 33)), "bits are on cpu, scale is on meta"),
    ],
)
def test_packed_weight_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedWeight(*arguments)


def test_refusals_of_functions():
    with pytest.raises(ValueError, match="quinary"):
        pack(torch.ones(2, 2), "quinary")
    with pytest.raises(ValueError, match=r"torch.int64 \(2, 2\)"):
        pack(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2, 2, 2, 2, 2\)"):
        pack(torch.ones(2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        pack(torch.ones(0, 2))
    with pytest.raises(ValueError, match=r"\(2,\), got torch.float32 \(3,\)"):
        pack(torch.ones(2, 2), scale=torch.ones(3))
    packed = pack(torch.ones(2, 2))
    with pytest.raises(ValueError, match="octet"):
        packed.operand("octet")
    with pytest.raises(ValueError, match="48"):
        packed.operand("pair", block=48)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        packed.operand("pair", taps=True)
