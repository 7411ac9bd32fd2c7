"""Tensors that are not computed yet: any function of torch may read them, and only what knows better does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import empf
from empf.deploy.layers import PackedNorm, PackedSynapse
from empf.deploy.lazy import Lazy, Product, Spikes, plain
from empf.models import StepBatchNorm


@pytest.fixture
def synapse() -> PackedSynapse:
    torch.manual_seed(0)
    return PackedSynapse(empf.BinaryConv2d(3, 4, 3, padding=1)).requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def dense(synapse, x):
    y = F.conv2d(x.flatten(0, 1), synapse.effective_weight(), padding=1)
    return y.unflatten(0, x.shape[:2])


READERS = {
    "mean": lambda y: y.mean((-2, -1)),
    "index": lambda y: y[0, 1:, :2],
    "cat": lambda y: torch.cat([y, y], 2),
    "stack": lambda y: torch.stack((y, y)),
    "relu": F.relu,
    "pool": lambda y: F.avg_pool2d(y.flatten(0, 1), 3),
    "matmul": lambda y: y @ y.transpose(-1, -2),
    "einops": lambda y: rearrange(y, "t n c h w -> n (t c) h w"),
    "norm": lambda y: F.layer_norm(y, (6,)),
    "comparison": lambda y: (y != 0).float(),
    "numbers": lambda y: 2 - y * 3 + y / 2,
    "in place": lambda y: y.add_(1).mul_(y),
    "where": lambda y: torch.where(y > 0, y, torch.zeros(())),
    "out": lambda y: torch.add(y, 1, out=torch.empty(y.shape)),
    "list": lambda y: torch.tensor(y.flatten().tolist()),
    "numpy": lambda y: torch.from_numpy(y.numpy() + 1),
    "views": lambda y: y.flatten(0, 1).view(5, 2, 4, 6, 6).reshape(10, 4, 6, 6).unflatten(0, (2, 5)).squeeze(0) + 1,
    "far views": lambda y: y.flatten(1).view(2, 5, -1).reshape(2, 5, 4, 36).unflatten(-1, (6, 6)),
}


@pytest.mark.parametrize("read", READERS)
def test_a_product_reads_like_the_tensor_that_it_will_be(read, synapse, x):
    found, wanted = READERS[read](synapse(x)), READERS[read](dense(synapse, x))
    assert type(plain(found)) is torch.Tensor and found.shape == wanted.shape
    assert torch.allclose(plain(found), wanted, atol=1e-6)


@pytest.mark.parametrize("read", READERS)
def test_codes_read_like_the_spikes_that_they_stand_for(read, x):
    codes = torch.randint(0, 16, (2, 5, 4, 6, 6), dtype=torch.uint8)
    found, wanted = READERS[read](Spikes(codes.clone(), 0.25, 15)), READERS[read](codes * 0.25)
    assert found.shape == wanted.shape and torch.equal(plain(found), wanted)


def test_what_is_asked_about_it_computes_nothing(synapse, x):
    for lazy in (synapse(x), Spikes(torch.zeros(2, 5, 4, 6, 6, dtype=torch.uint8), 0.25, 15)):
        assert isinstance(lazy, torch.Tensor) and lazy.shape == (2, 5, 4, 6, 6) and lazy.dtype == torch.float32
        assert lazy.dim() == lazy.ndim == 5 and len(lazy) == lazy.size(0) == 2 and lazy.numel() == 1440
        assert lazy.device.type == "cpu" and lazy.is_floating_point() and not lazy.requires_grad
        assert lazy._value is None and "tensor(" in repr(lazy) and lazy._value is not None


def test_sums_and_norms_stay_lazy_and_are_right(synapse, x):
    torch.manual_seed(1)
    bn = StepBatchNorm(4).eval().requires_grad_(False)
    for p in (bn.weight, bn.bias, bn.running_mean):
        p.normal_()
    norm, rest = PackedNorm(bn), torch.randn(2, 5, 4, 6, 6)
    wanted = bn(dense(synapse, x))
    for total in (norm(synapse(x)) + rest, rest + norm(synapse(x)), torch.add(rest, norm(synapse(x)))):
        assert isinstance(total, Product) and total._value is None
        assert torch.allclose(plain(total), wanted + rest, atol=1e-6)
    both = norm(synapse(x)) + synapse(x)
    assert torch.allclose(plain(both + rest), wanted + dense(synapse, x) + rest, atol=1e-6)
    assert torch.allclose(plain(norm(norm(synapse(x)))), bn(wanted), atol=1e-6)
    assert torch.allclose(plain(norm(synapse(x) + rest)), bn(dense(synapse, x) + rest), atol=1e-6)


def test_one_product_may_be_read_with_and_without_its_norm(synapse, x):
    norm = PackedNorm(StepBatchNorm(4).eval().requires_grad_(False))
    norm.shift.fill_(1)
    y = synapse(x)
    z = norm(y)
    y += 1  # does not reach z, which was made before
    assert torch.allclose(plain(y), dense(synapse, x) + 1, atol=1e-6)
    assert torch.allclose(plain(z), dense(synapse, x) * norm.gain[0] + 1, atol=1e-5)


def test_an_operand_that_is_written_to_before_it_is_read_is_an_error(synapse, x):
    y = synapse(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before its output was read: write x = x \\+ y"):
        y.mean()
    rest = torch.ones(2, 5, 4, 6, 6)
    y = synapse(x) + rest
    rest.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.mean()


def test_spikes_that_were_written_to_are_read_as_floats(synapse):
    codes = torch.randint(0, 16, (2, 5, 3, 6, 6), dtype=torch.uint8)
    spikes = Spikes(codes, 0.25, 15)
    assert synapse(spikes).step == 0.25
    spikes.mean()
    assert synapse(spikes).step == 0.25  # reading changes nothing
    spikes *= 0.5
    assert torch.allclose(plain(synapse(spikes)), dense(synapse, codes * 0.125), atol=1e-6)
    spikes = Spikes(codes, 0.25, 15)
    spikes.mul_(0.5)
    y = synapse(spikes)
    assert y.step is None and torch.allclose(plain(y), dense(synapse, codes * 0.125), atol=1e-6)


@pytest.mark.parametrize(
    "arguments", [(2,), (2, 2), ((2, 2),), (3,), (2, 1), (2, 2, 1), (2, 2, 0, True), (2, 2, 0, False, False)], ids=str
)
@pytest.mark.parametrize("top", [15, 255])
def test_averages_of_two_by_two_codes_are_codes(arguments, top):
    codes = torch.randint(0, top + 1, (3, 4, 7, 6), dtype=torch.uint8)
    found = F.avg_pool2d(Spikes(codes, 0.25, top), *arguments)
    assert torch.allclose(plain(found), F.avg_pool2d(codes * 0.25, *arguments), atol=1e-6)
    kept = top == 15 and arguments in [(2,), (2, 2), ((2, 2),), (2, 2, 0, False, False)]
    assert isinstance(found, Spikes) == kept and (not kept or (found.step, found.top) == (0.0625, 60))


def test_lazy_tensors_in_lists_and_dictionaries_become_plain(synapse, x):
    made = plain({"a": [synapse(x)], "b": (synapse(x), 1)})
    assert not any(isinstance(t, Lazy) for t in (made["a"][0], made["b"][0])) and made["b"][1] == 1
    assert type(copy.deepcopy(plain(synapse(x)))) is torch.Tensor
