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
from empf.neuron import spiking_layer
from empf.synapse import BinaryConv1d, BinaryConv2d, BinaryLinear, FullConv2d, quantize_weight


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


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_fused_optimizers_are_seen(optimizer):
    """They do not count in the version of a tensor; a network without `reset` in its loop trained frozen weights."""
    torch.manual_seed(0)
    layer = BinaryLinear(8, 4)
    try:
        step = optimizer(layer.parameters(), lr=1.0, fused=True)
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"torch {torch.__version__} has no such fused optimizer on a CPU: {error}")
    x = torch.randn(3, 8)
    before = layer(x)
    before.square().sum().backward()
    step.step()
    after = layer(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, F.linear(x, quantize_weight(layer.weight)))


def test_inference_mode_first_then_training():
    layer = BinaryLinear(3, 2)
    with torch.inference_mode():
        layer(torch.randn(1, 3))
    layer(torch.randn(1, 3)).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        loaded = BinaryLinear(3, 2)
        assert torch.equal(loaded(torch.eye(3)), quantize_weight(loaded.weight).t())


@pytest.mark.parametrize("make", [BinaryLinear, BinaryConv1d, BinaryConv2d])
def test_gradients_per_sample_and_tangents(make):
    torch.manual_seed(0)
    layer = (make(6, 3) if make is BinaryLinear else make(2, 3, 2)).double()
    shape = {"BinaryLinear": (6,), "BinaryConv2d": (2, 3, 3), "BinaryConv1d": (2, 4)}[type(layer).__name__]
    x = torch.randn(4, *shape, dtype=torch.float64)
    weights = {"weight": layer.weight.detach()}

    def loss(weights, one):
        return torch.func.functional_call(layer, weights, (one.unsqueeze(0),)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    for one, gradient in zip(x, found, strict=True):
        layer.weight.grad = None
        layer(one.unsqueeze(0)).square().sum().backward()
        assert torch.allclose(gradient, layer.weight.grad, rtol=1e-12, atol=1e-12) and gradient.any()
    direction = {"weight": torch.randn_like(layer.weight)}
    _, tangent = torch.func.jvp(lambda w: loss(w, x[0]), (weights,), (direction,))
    assert torch.allclose(tangent, (found[0] * direction["weight"]).sum(), rtol=1e-10)


@pytest.mark.parametrize("size", [5, 70])  # also where the layer makes its spikes again
@pytest.mark.parametrize(
    "options",
    [dict(bias=True), dict(groups=2), dict(dilation=2), dict(groups=4, dilation=2, stride=2, bias=True)],
    ids=str,
)
def test_arguments_of_torch(options, size):
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 8, 3, padding=1, dtype=torch.float64, **options)
    neuron = empf.EMPFNeuron(1).double()
    current = torch.randn(1, 4, 4, size, size, dtype=torch.float64)
    (y,) = spiking_layer(neuron, current, conv)
    y.square().sum().backward()
    weight = quantize_weight(conv.weight.detach()).requires_grad_()
    spikes = (current[0] - neuron.threshold).relu()
    wanted = F.conv2d(spikes, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert torch.allclose(y[0], wanted, rtol=1e-12, atol=1e-12)
    (d_weight,) = torch.autograd.grad(wanted.square().sum(), weight)
    assert torch.allclose(conv.weight.grad, d_weight * (conv.weight.abs() <= 1), rtol=1e-9, atol=1e-9)


def test_arguments_that_do_not_fit_are_refused():
    for options in (dict(padding_mode="circular"), dict(padding="same")):
        for kind in (BinaryConv1d, BinaryConv2d):
            with pytest.raises(ValueError, match=r"padded with zeros, and their number .*F\.pad"):
                kind(2, 3, 3, **options)
    assert BinaryConv1d(2, 3, 3, device="meta").weight.is_meta
