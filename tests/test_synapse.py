"""Synapses: the weights against an independent float64 loop, the straight-through gradient, formed once per update."""

import copy
import ctypes.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import empf
from empf import synapse
from empf.synapse import BinaryConv2d, BinaryLinear, FullConv2d, quantize_weight


def loop_quantize(w, kind):
    """The formulas of the specification, one output channel after the other, in Python floats."""
    out = torch.empty_like(w, dtype=torch.float64)
    for n, row in enumerate(w.double()):
        values = row.flatten().tolist()
        mean = sum(abs(x) for x in values) / len(values)
        if kind == "binary":
            q = [-mean if x < 0 else mean for x in values]
        else:
            kept = [abs(x) for x in values if abs(x) > 0.7 * mean]
            a = sum(kept) / len(kept) if kept else 0.0
            q = [0.0 if abs(x) <= 0.7 * mean else a if x > 0 else -a for x in values]
        out[n] = torch.tensor(q, dtype=torch.float64).view(row.shape)
    return out


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 2, 3, 3), (4, 1, 1, 1)])
def test_formulas(kind, shape):
    torch.manual_seed(0)
    w = torch.randn(shape)
    assert (quantize_weight(w, kind) - loop_quantize(w, kind)).abs().max() < 1e-6


def test_sign_of_zero_is_plus():
    w = torch.tensor([[0.0, -0.0, -1.0, 3.0]])
    assert quantize_weight(w).tolist() == [[1.0, 1.0, -1.0, 1.0]]


def test_ternary_by_hand():
    # mean|W| = 1, threshold 0.7: kept 2 and -1.3, a = 1.65
    w = torch.tensor([[0.7, 2.0, -1.3, 0.0]])
    assert quantize_weight(w, "ternary")[0].tolist() == pytest.approx([0, 1.65, -1.65, 0])


def test_all_zero_row():
    assert quantize_weight(torch.zeros(2, 3), "ternary").abs().max() == 0
    assert quantize_weight(torch.zeros(2, 3), "binary").abs().max() == 0


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_granularity_layer(kind):
    w = torch.randn(4, 6)
    assert torch.allclose(quantize_weight(w, kind, "layer"), quantize_weight(w.view(1, -1), kind).view_as(w))


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_conv_and_linear_use_the_effective_weight(kind):
    torch.manual_seed(0)
    conv, linear = BinaryConv2d(3, 5, 3, 2, 1, kind=kind), BinaryLinear(7, 4, bias=True, kind=kind)
    x, y = torch.randn(2, 3, 9, 7), torch.randn(2, 7)
    assert torch.equal(conv(x), F.conv2d(x, quantize_weight(conv.weight, kind), None, 2, 1))
    assert torch.equal(linear(y), F.linear(y, quantize_weight(linear.weight, kind), linear.bias))


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_straight_through_gradient(kind):
    linear = BinaryLinear(4, 2, kind=kind)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.5, -1.0, 1.001, -3.0], [0.0, 1.0, -1.5, 0.2]]))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    linear(x).backward(torch.tensor([[1.0, 10.0]]))
    assert linear.weight.grad.tolist() == [[1, 2, 0, 0], [10, 20, 0, 40]]  # zero where |W| > 1
    assert torch.allclose(x.grad, torch.tensor([[1.0, 10.0]]) @ quantize_weight(linear.weight, kind))


def test_formed_once_per_update(monkeypatch):
    formed = []
    real = synapse.quantize_weight
    monkeypatch.setattr(synapse, "quantize_weight", lambda *args: formed.append(1) or real(*args))
    layer = BinaryLinear(3, 2)
    formed.clear()
    x = torch.randn(1, 3)
    with torch.no_grad():
        for _ in range(5):
            layer(x)
    layer(x).sum().backward()
    assert len(formed) == 1  # the steps of a batch share it, with and without gradient
    before = layer(x)
    torch.optim.SGD(layer.parameters(), lr=10.0).step()
    after = layer(x)
    assert len(formed) == 2 and not torch.equal(before, after)


def test_writes_behind_autograds_back_are_seen_in_the_next_batch():
    layer = BinaryLinear(3, 2)
    x = torch.randn(1, 3)
    before = layer(x)
    layer.weight.data.neg_()  # torch's version counter does not see this
    empf.reset(layer)
    assert torch.equal(layer(x), -before)


def test_copies_do_not_share_the_formed_weight():
    layer = BinaryLinear(3, 2)
    x = torch.randn(1, 3)
    layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.neg_()
    assert torch.equal(other(x), -layer(x))


def test_moving_to_double_forms_anew():
    layer = BinaryLinear(3, 2)
    layer(torch.randn(1, 3))
    assert layer.double()(torch.randn(1, 3, dtype=torch.float64)).dtype == torch.float64


def test_state_is_the_latent_weight_only():
    layer = BinaryConv2d(2, 3, 1)
    layer(torch.randn(1, 2, 4, 4))
    assert set(layer.state_dict()) == {"weight"}


@pytest.mark.parametrize("kwargs", [dict(kind="quinary"), dict(granularity="image")])
def test_bad_settings(kwargs):
    with pytest.raises(ValueError, match="quinary|image"):
        BinaryLinear(2, 2, **kwargs)


def test_model_weights_are_binary():
    model = empf.resnet18(width=0.0625, num_classes=3, image_size=8)
    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    assert len(layers) == 19  # 16 in the blocks and 3 shortcuts
    for layer in layers:
        for row in layer.effective_weight().flatten(1):
            assert len(row.abs().unique()) == 1


@pytest.mark.parametrize("layer", [BinaryConv2d(3, 5, 1, 2), FullConv2d(3, 5, 1, (2, 3)), BinaryConv2d(3, 5, 3, 2, 1)])
def test_a_strided_convolution_sees_the_same_pixels_however_it_is_computed(layer):
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    layer = layer.double()
    y = layer(x)
    weight = layer.effective_weight() if isinstance(layer, BinaryConv2d) else layer.weight
    wanted = F.conv2d(x, weight, None, layer.stride, layer.padding)
    d_y = torch.randn_like(y)
    for found, by_torch in zip(
        (y, *torch.autograd.grad(y, (x, layer.weight), d_y)),
        (wanted, *torch.autograd.grad(wanted, (x, layer.weight), d_y)),
        strict=True,
    ):
        torch.testing.assert_close(found, by_torch, rtol=1e-12, atol=1e-12)


NARROW = """
import torch, empf
from torch.nn.functional import cross_entropy
torch.set_num_threads(1)
for weights in ("binary", "full"):
    model = empf.resnet18(width=0.0625, num_classes=3, image_size=16, T=2, weights=weights)
    model = model.to(memory_format=torch.channels_last)
    for _ in range(3):
        empf.online_backward(model, torch.randn(2, 3, 16, 16), torch.arange(2), cross_entropy, steps=[2])
        model.zero_grad()
"""


def test_gradients_of_narrow_networks_stay_in_their_memory():
    """The C library looks at the ends of what is freed; those of oneDNN (torch 2.13) do not, see `synapse.conv2d`."""
    checker = ctypes.util.find_library("c_malloc_debug")
    if checker is None:
        pytest.skip("glibc 2.34 or newer has the checking malloc")
    env = {**os.environ, "LD_PRELOAD": checker, "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", NARROW], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
