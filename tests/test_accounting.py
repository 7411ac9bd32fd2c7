"""The paper's own numbers, and the counts against brute force."""

import pytest
import torch
import torch.nn.functional as F
from own_networks import Grouped, PlainNorms, Twice, inputs_of, met
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


@pytest.mark.parametrize(
    ("network", "mb"),
    [
        (dict(num_classes=100), 3.00), (dict(num_classes=100, weights="ternary"), 4.40), (dict(num_classes=10), 2.82),
        (dict(arch="resnet34", num_classes=1000, image_size=224, weights="ternary"), 10.06),
        (dict(arch="vgg_snn", in_channels=2, image_size=48), 2.49),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_as_the_authors_count_them(network, mb):
    """2 bits for a binary weight and 3 for a ternary one, as the sizes in their tables say."""
    with torch.device("meta"):
        model = empf.build(empf.ModelConfig(**network))
    assert empf.account(model)["params_authors_mb"] == pytest.approx(mb, abs=0.005)


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
    "kwargs",
    [
        dict(), dict(weights="ternary", spike_bits=4), dict(seca=1), dict(neuron="lif"), dict(shortcut="current"),
        dict(weights="ternary", granularity="layer"),
    ],
    ids=str,
)  # fmt: skip
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
    if kwargs.get("shortcut") == "current":  # which is multiplied
        inputs = [(m, s) for m, s in inputs if m.kernel_size != (1, 1)]
        assert len(inputs) == 16
    sops = sum(brute_force(s, weights[m], m.stride[0], m.padding[0]) for m, s in inputs) / 4
    assert counted["sops"] == sops
    bits = 1 if kwargs.get("neuron") == "lif" else kwargs.get("spike_bits") or 32
    assert counted["energy_mj"] == pytest.approx(sops * 0.9e-9 * bits / 32)
    # stem once for a static image, head in every step, channel attention in every step
    seca = 3 * 5 * sum(2 * c for c in (4, 4, 8, 8, 16, 16, 32, 32)) if kwargs.get("seca") else 0
    macs = 8 * 8 * 4 * 27 + 3 * 32 * 3 + seca
    macs += 3 * (16 * 8 * 4 + 4 * 16 * 8 + 32 * 16) if kwargs.get("shortcut") else 0
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


def test_a_synapse_that_is_used_twice_counts_twice():
    torch.manual_seed(0)
    model, x = Twice(kind="ternary"), torch.randn(3, 5, 6)
    counted, given = empf.spike_account(model, [(x[:, :2], None), (x[:, 2:], None)]), inputs_of(model, x)
    weight = model.shared.effective_weight()
    assert len(given["shared"]) == 2 and 0 < (weight != 0).float().mean() < 1
    sops = sum(met(spikes.flatten(0, 1), weight) for spikes in given["shared"]) / 5
    assert counted["sops"] == sops > 0
    assert counted["macs"] == 3 * (6 * 8 + 8 * 4)  # the first layer sees no spikes, the last is the readout
    assert counted["energy_mj"] == pytest.approx(sops * 0.9e-9) and counted["not_counted"] == {}
    assert empf.spike_account(nn.Sequential(model), [(x, None)]) == counted  # a wrapper changes no name
    assert list(counted["density"]) == ["neurons.0", "neurons.1", "neurons.2"] and counted["neurons"] == 24
    assert counted["nops"] == 24 * 9
    weights = 8 * (6 * 8 + 8 + 8 * 4 + 4) * 4
    assert counted["params_mb"] * 8e6 == weights + 64 * 2 and counted["params_authors_mb"] * 8e6 == weights + 64 * 3


def test_plain_norms_pooled_and_joined_spikes_of_different_bits():
    torch.manual_seed(0)
    model, x = PlainNorms(), torch.randn(3, 2, 1, 6, 6)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias, 0, 2)
    counted, given = empf.spike_account(model, [(x, None)]), inputs_of(model, x)
    narrow = sum(met(s, model.narrow.effective_weight(), padding=1) for s in given["narrow"]) / 2
    wide = sum(met(s, model.wide.effective_weight(), padding=2) for s in given["wide"]) / 2
    assert len(given["wide"]) == 3 and counted["sops"] == narrow + wide and min(narrow, wide) > 0
    assert counted["energy_mj"] == pytest.approx((narrow + wide) * 0.9e-9)  # both read floating-point spikes
    assert counted["macs"] == 3 * (36 * 4 * 9 + 72 * 4)
    model.last = empf.BinaryLinear(72, 4)  # not a full-precision readout: it is fed with spikes of 1 and of 2 bits
    more, (last,) = (
        empf.spike_account(model, [(x, None)]),
        [sum(met(s, model.last.effective_weight()) for s in given["last"])],
    )
    assert more["sops"] == counted["sops"] + last / 2 and more["macs"] == 3 * 36 * 4 * 9
    assert more["energy_mj"] == pytest.approx((narrow + wide + last / 2 * 2 / 32) * 0.9e-9)


def test_full_precision_weights_of_zero_cost_nothing():
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(3, 4, 2, 9)
    counted = empf.spike_account(model, [(x, None)])
    with torch.no_grad():
        model.circular.weight[:, 0, 0] = 0
    pruned, spikes = empf.spike_account(model, [(x, None)]), inputs_of(model, x)["circular"][0]
    kept, lost = model.circular.weight != 0, model.circular.weight == 0
    spikes = F.pad(spikes, (1, 1), mode="circular")
    assert counted["sops"] - pruned["sops"] == met(spikes, lost, groups=9) / 4 > 0
    assert met(spikes, kept, groups=9) > 0 and counted["macs"] == pruned["macs"] == 3 * (9 * 6 * 6 + 9 * 4)
    full = 4 * (36 + 6 + 9 + 27 + 9 + 36 + 4)
    assert counted["params_mb"] * 1e6 == pytest.approx(full + (9 * 2 * 3 * 2 + 27) / 8)


class Attention(nn.Module):
    """One head of spiking attention: products that no layer takes."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (empf.EMPFNeuron(2) for _ in range(3))

    def forward(self, x):  # T N L C
        return self.q(x) @ (self.k(x).transpose(-2, -1) @ self.v(x))


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.neuron, self.last = Attention(), empf.EMPFNeuron(2), nn.Linear(6, 4)
        self.mix, self.vector = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.heads = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        x = self.neuron(self.attention(x))
        x = F.linear(x, self.mix) + torch.einsum("tnlc,cd->tnld", x, self.mix)
        x = x + (x @ self.vector)[..., None]
        tokens = x[0].transpose(0, 1)  # L N C
        return self.last(x.mean(2) + self.heads(tokens, tokens, tokens)[0].mean(0))


def test_products_that_no_layer_takes_are_named():
    torch.manual_seed(0)
    model, x = Loose(), torch.randn(2, 3, 5, 6)
    counted = empf.spike_account(model, [(x, None)])
    assert counted["macs"] == 2 * 6 * 4 and counted["sops"] == 0
    at = counted["not_counted"]
    assert at["attention: bmm"] == 2 * 2 * 5 * 6 * 6  # T, two products
    mixed = sum(count for name, count in at.items() if ":" not in name)
    assert mixed == 2 * 5 * (6 * 6 + 6 * 6 + 6)
    heads = sum(count for name, count in at.items() if name.startswith("heads"))
    assert heads >= 5 * 6 * 18 + 2 * 5 * 5 * 6  # projections, and both products of the attention
    assert empf.account(model, x)["not_counted"] == at
    sizes = 6 * 6 + 6 + 3 * 36 + 18 + 36 + 6 + 6 * 4 + 4  # mix, vector, heads with their biases, last
    assert abs(counted["params_full_mb"] - 4 * sizes / 1e6) <= 4 * 24e-6 and torch.backends.mha.get_fastpath_enabled()


def test_what_is_fed_by_spikes_is_seen():
    """Shapes, pooling, sums of spikes and products with anything keep them; a number that is added does not."""

    class Fed(nn.Module):
        def __init__(self, between):
            super().__init__()
            self.between, self.conv = between, nn.Conv2d(4, 4, 1)
            self.neurons = nn.ModuleList(empf.EMPFNeuron(2) for _ in range(2))

        def forward(self, x):
            spikes = self.between(self.neurons[0](x), x)  # T N 4 4 4
            return self.neurons[1](self.conv(spikes.flatten(0, 1)).unflatten(0, (2, 3)))

    x = torch.rand(2, 3, 4, 4, 4)
    gate = torch.rand(4, 1, 1)
    keep = [
        lambda s, x: s, lambda s, x: s.transpose(-1, -2), lambda s, x: s + s.flip(-1), lambda s, x: s * gate,
        lambda s, x: s * x, lambda s, x: torch.stack([s, s]).sum(0), lambda s, x: F.pad(s, (1, 1, 1, 1)),
        lambda s, x: torch.cat([s, torch.zeros_like(s)], -1), lambda s, x: torch.stack(list(s)).clone() / 2,
        lambda s, x: F.max_pool2d(s.flatten(0, 1), 2).unflatten(0, (2, 3)), lambda s, x: sum([s, s]),
        lambda s, x: F.adaptive_avg_pool2d(s.flatten(0, 1), 2).unflatten(0, (2, 3)), lambda s, x: torch.relu(s),
        lambda s, x: F.interpolate(s.flatten(0, 1), scale_factor=2).unflatten(0, (2, 3)),
    ]  # fmt: skip
    lose = [
        lambda s, x: s + 1.0, lambda s, x: s + x, lambda s, x: torch.cat([s, x], -1), lambda s, x: s.sigmoid(),
        lambda s, x: x, lambda s, x: x / (s + s), lambda s, x: torch.ones_like(s), lambda s, x: s.clone().copy_(x),
    ]  # fmt: skip
    for function in keep:
        counted = empf.spike_account(Fed(function), [(x, None)])
        assert counted["sops"] > 0 and counted["macs"] == 0
    for function in lose:
        counted = empf.spike_account(Fed(function), [(x, None)])
        assert counted["sops"] == 0 and counted["macs"] > 0


class Packed(nn.Module):
    """A synapse of another kind: only what the docstring of `empf.accounting` asks for."""

    kind, bias, stride, padding, dilation, groups = "ternary", None, 1, 0, 1, 1

    def __init__(self):
        super().__init__()
        self.register_buffer("signs", torch.randint(-1, 2, (5, 4, 1, 1)).float())

    def effective_weight(self):
        return 0.5 * self.signs

    def forward(self, x):
        return F.conv2d(x, self.effective_weight())


def test_any_synapse_with_an_effective_weight_is_counted():
    torch.manual_seed(0)
    layers = [empf.EMPFNeuron(1), nn.Flatten(0, 1), Packed(), nn.Unflatten(0, (1, 3)), empf.EMPFNeuron(1)]
    model, x = nn.Sequential(*layers), torch.rand(1, 3, 4, 2, 2)
    counted = empf.spike_account(model, [(x, None)])
    assert counted["sops"] == met((x[0] - 0.5).relu(), layers[2].signs) / 3 and counted["macs"] == 0
    assert counted["params_mb"] == 20 * 2 / 8e6 and counted["params_authors_mb"] == 20 * 3 / 8e6


def test_modes_state_and_hooks_are_as_before():
    model, x = PlainNorms().train(), torch.randn(3, 2, 1, 6, 6)
    model.norms[0].eval()
    empf.spike_account(model, [(x, None)])
    with pytest.raises(ValueError, match="call empf.reset"):
        empf.account(model, torch.randn(4, 2, 1, 6, 6))
    modes = [m.training for m in model.modules()]
    assert modes.count(False) == 1 and not model.norms[0].training
    assert all(m.v is None and m.t == 0 for m in model.neurons)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors():
    model = empf.resnet18(num_classes=3, image_size=8, width=0.0625)
    with pytest.raises(ValueError, match="no images"):
        empf.spike_account(model, [])
    with pytest.raises(ValueError, match="needs an example input"):
        empf.account(Twice())


@pytest.mark.parametrize(
    "network",
    [
        dict(), dict(weights="ternary", spike_bits=4), dict(neuron="mem_bn", parallel=0.5, seca=2), dict(neuron="lif"),
        dict(arch="resnet19"), dict(weights="ternary", granularity="layer", shortcut="current", seca=1, seca_bias=True),
        dict(arch="vgg_snn", in_channels=2, image_size=16, spike_bits=4),
    ],
    ids=str,
)  # fmt: skip
def test_a_packed_network_counts_as_its_model(network):
    torch.manual_seed(0)
    model = empf.build(empf.ModelConfig(**{**dict(num_classes=3, image_size=8, width=0.0625, T=3), **network}))
    x = torch.randn(3, 4, 2, 16, 16) if model.config.in_channels == 2 else torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for _ in range(10):  # running statistics with which the neurons fire
            empf.reset(model)
            model(x)
    packed = empf.pack(model.eval())
    counted = empf.spike_account(model, [(x, None)])
    assert counted["sops"] > 1000 and empf.spike_account(packed, [(x, None)]) == counted
    assert empf.account(packed) == empf.account(model)
