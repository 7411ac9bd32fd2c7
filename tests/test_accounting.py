"""The paper's own numbers, and the counts against brute force."""

import pytest
import torch
from torch import nn

import empf
from empf.accounting import spike_additions
from empf.synapse import BinaryConv2d, BinaryLinear


@pytest.mark.parametrize(
    ("weights", "classes", "mb"),
    [("full", 100, 44.84), ("ternary", 100, 3.00), ("binary", 100, 1.61), ("full", 10, 44.66), ("ternary", 10, 2.82)],
)
def test_parameters_of_resnet18(weights, classes, mb):
    counted = empf.account(empf.resnet18(num_classes=classes, weights=weights))
    assert counted["params_mb"] == pytest.approx(mb, abs=0.005)
    assert counted["params_full_mb"] == pytest.approx(44.84 if classes == 100 else 44.66, abs=0.005)


def test_parameters_of_the_vgg_snn():
    counted = empf.account(empf.vgg_snn(weights="ternary"))
    assert counted["params_mb"] == pytest.approx(2.49, abs=0.005)  # DVS-CIFAR10


@pytest.mark.parametrize(("parallel", "nops"), [(0, 6_586_368), (0.5, 4_620_288)])
def test_neuron_operations_of_resnet18(parallel, nops):
    model = empf.resnet18(num_classes=100, T=4, parallel=parallel)
    counted = empf.account(model)
    assert counted["nops"] == nops and counted["neurons"] == 548_864
    assert model.training and model.t == 0


def brute_force(spikes, weight, stride, padding):
    """Every addition of a convolution, one at a time."""
    n, c_in, h, w = spikes.shape
    c_out, _, kh, kw = weight.shape
    additions = 0
    for y in range((h + 2 * padding - kh) // stride + 1):
        for x in range((w + 2 * padding - kw) // stride + 1):
            for i in range(kh):
                for j in range(kw):
                    u, v = y * stride + i - padding, x * stride + j - padding
                    if 0 <= u < h and 0 <= v < w:
                        active = (spikes[:, :, u, v] != 0).double()  # n c_in
                        additions += (active @ (weight[:, :, i, j] != 0).double().T).sum().item()
    return additions


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (3, 1, 0), (5, 2, 2)])
def test_additions_of_a_convolution(kind, kernel, stride, padding):
    torch.manual_seed(0)
    conv = BinaryConv2d(3, 5, kernel, stride, padding, kind=kind)
    spikes = torch.relu(torch.randn(2, 3, 7, 6))
    assert spike_additions(conv, spikes) == brute_force(spikes, conv.effective_weight(), stride, padding)


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_additions_of_a_linear_layer(kind):
    linear = BinaryLinear(6, 4, kind=kind)
    spikes = torch.relu(torch.randn(3, 6))
    want = sum(
        int(spikes[n, i] != 0) * int(linear.effective_weight()[o, i] != 0)
        for n in range(3) for i in range(6) for o in range(4)
    )  # fmt: skip
    assert spike_additions(linear, spikes) == want


@pytest.mark.parametrize(
    "kwargs", [dict(), dict(weights="ternary", spike_bits=4), dict(seca=1), dict(neuron="lif")], ids=str
)
def test_spike_account_of_a_small_network(kwargs):
    torch.manual_seed(0)
    model = empf.resnet18(**{**dict(num_classes=3, image_size=8, width=0.0625, T=3), **kwargs})
    images = torch.randn(4, 3, 8, 8)
    batches = [(images[:3], None), (images[3:], None)]
    counted = empf.spike_account(model, batches)

    model.eval()
    inputs, layers = [], [m for m in model.blocks.modules() if isinstance(m, nn.Conv2d)]
    handles = [layer.register_forward_hook(lambda m, i, o: inputs.append((m, i[0]))) for layer in layers]
    fired = {}
    for name, module in model.named_modules():
        if name.endswith("neuron"):
            handles.append(module.register_forward_hook(lambda m, i, o, n=name: fired.setdefault(n, []).append(o)))
    empf.reset(model)
    model(images)
    for handle in handles:
        handle.remove()
    weights = {layer: layer.effective_weight() for layer in layers}
    sops = sum(brute_force(s, weights[m], m.stride[0], m.padding[0]) for m, s in inputs) / 4
    assert counted["sops"] == sops
    bits = 1 if kwargs.get("neuron") == "lif" else kwargs.get("spike_bits") or 32
    assert counted["energy_mj"] == pytest.approx(sops * 0.9e-9 * bits / 32)
    # stem once for a static image, head in every step, channel attention in every step
    seca = 3 * 5 * sum(2 * c for c in (4, 4, 8, 8, 16, 16, 32, 32)) if kwargs.get("seca") else 0
    macs = 8 * 8 * 4 * 27 + 3 * 32 * 3 + seca
    assert counted["macs"] == macs
    assert counted["energy_full_mj"] == pytest.approx(macs * 4.6e-9)
    assert set(counted["density"]) == set(fired) and len(fired) == 16
    for name, spikes in fired.items():
        assert counted["density"][name] == pytest.approx((torch.cat(spikes, 1) != 0).double().mean().item())


def test_the_hidden_layer_of_resnet19_is_fed_spikes():
    """Means of spikes, so that its products are additions too; the neurons before the pooling are counted."""
    torch.manual_seed(0)
    model = empf.resnet19(num_classes=3, image_size=8, width=0.0625, T=2)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for _ in range(20):  # running statistics with which the neurons fire
            empf.reset(model)
            model(images)
    inputs, spikes = [], []
    model.hidden["linear"].register_forward_hook(lambda m, i, o: inputs.append(i[0]))
    model.hidden["before"].register_forward_hook(lambda m, i, o: spikes.append(o))
    counted = empf.spike_account(model, [(images, None)])
    assert torch.equal(inputs[0], spikes[0].mean((-2, -1))) and (inputs[0] >= 0).all()
    assert counted["macs"] == 8 * 8 * 8 * 27 + 2 * 16 * 3  # stem and head
    assert 0 < counted["density"]["hidden.before"] < 1


def test_errors():
    model = empf.resnet18(num_classes=3, image_size=8, width=0.0625)
    with pytest.raises(ValueError, match="no images"):
        empf.spike_account(model, [])
