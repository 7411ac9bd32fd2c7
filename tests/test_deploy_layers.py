"""Networks of one's own, packed: whatever is around the parts, the outputs are those of the network in eval mode."""

import pytest
import torch
import torch.nn.functional as F
from deploy_tools import logits
from torch import nn

import empf
from empf.deploy.layers import PackedNeuron, PackedNorm, PackedSynapse
from empf.deploy.lazy import Spikes
from empf.deploy.pack import load_packed, pack
from empf.models import StepBatchNorm


def over_steps(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Convolutional(nn.Module):
    """torch's norms, pooling, concatenation, a residual, a synapse that is used twice, a current that is read twice."""

    def __init__(self, T=3, bits=None, mem_bn=False):
        super().__init__()
        neuron = lambda c: empf.EMPFNeuron(T, c, spike_bits=bits, mem_bn=mem_bn)  # noqa: E731
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.twice = empf.BinaryConv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), StepBatchNorm(8), nn.BatchNorm2d(8, affine=False)])
        self.neurons = nn.ModuleList([neuron(8), neuron(8), neuron(16)])
        self.order = tuple(self.neurons)  # the same modules, held in another place
        self.wide = empf.BinaryConv2d(16, 16, 3, 2, 1, kind="ternary", granularity="layer")
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x):  # k N 1 8 8
        x = over_steps(nn.Sequential(self.first, self.norms[0]), x)
        spikes = self.order[0](x)
        y = over_steps(self.twice, spikes)
        again = self.norms[1](over_steps(self.twice, self.order[1](self.norms[1](y) + x)))
        mean = again.mean((-2, -1), keepdim=True)
        both = torch.cat([again * torch.sigmoid(mean), F.relu(y)], 2)
        spikes = over_steps(nn.AvgPool2d(2), self.order[2](both))
        return self.head(over_steps(self.wide, spikes).flatten(2))


class Sequence(nn.Module):
    """Linear layers with biases on (k, N, C), and attention: a product of spikes with spikes."""

    def __init__(self, T=3, bits=None, mem_bn=False):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.qkv = empf.BinaryLinear(12, 36, bias=True)
        self.norm = StepBatchNorm(36)
        self.neurons = nn.ModuleList(
            [empf.EMPFNeuron(T, spike_bits=bits), empf.EMPFNeuron(T, 36, spike_bits=bits, mem_bn=mem_bn)]
        )
        self.lif = empf.LIFNeuron(T, threshold=0.2)
        self.out = empf.BinaryLinear(12, 10, kind="ternary")

    def forward(self, x):  # k N 1 8 8: each row is a token
        tokens = self.embed(x.squeeze(2))  # k N 8 12
        current = self.qkv(self.neurons[0](tokens)).movedim(-1, 2)  # k N 36 8
        q, k, v = self.neurons[1](self.norm(current)).chunk(3, 2)
        read = v @ (k.transpose(-1, -2) @ q)  # k N 12 8
        return self.out(self.lif(read.mean(-1)))


class Plain(nn.Module):
    """Norms whose channels are the last axis of a linear layer, over folded steps; no neuron at the end."""

    def __init__(self, T=3, bits=None, mem_bn=False):
        super().__init__()
        self.layers = nn.ModuleList([empf.BinaryLinear(64, 20), empf.BinaryLinear(20, 10, bias=True)])
        self.norms = nn.ModuleList([StepBatchNorm(20), nn.BatchNorm1d(10)])
        self.neuron = empf.EMPFNeuron(T, 20, spike_bits=bits, mem_bn=mem_bn, activation="softplus")

    def forward(self, x):
        x = self.norms[0](self.layers[0](x.flatten(2)))
        spikes = self.neuron(x)
        return over_steps(nn.Sequential(self.layers[1], self.norms[1]), spikes)


NETWORKS = (Convolutional, Sequence, Plain)


def settled(kind: type, **settings) -> tuple[nn.Module, torch.Tensor]:
    """(network in eval mode whose statistics fit the input, input [T, N, 1, 8, 8])."""
    torch.manual_seed(0)
    net, x = kind(**settings), torch.rand(3, 6, 1, 8, 8)
    for _ in range(3):
        empf.reset(net)
        net.train()(x)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name:
                p.uniform_(0.3, 1.5)
    empf.reset(net)
    return net.eval(), x


def close(a, b) -> bool:
    assert a.shape == b.shape and b.std() > 1e-3
    return ((a - b).abs().max() / b.abs().max()).item() < 1e-5


@pytest.mark.parametrize("mem_bn", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_outputs_are_those_of_the_network(kind, mem_bn, tmp_path):
    net, x = settled(kind, mem_bn=mem_bn)
    wanted = logits(net, x)
    packed = pack(net)
    assert type(logits(packed, x)) is torch.Tensor and close(logits(packed, x), wanted)
    assert close(torch.stack([packed.step(frame) for frame in x]), wanted)  # and its state goes on
    with pytest.raises(ValueError, match="empf.reset"):
        packed(x)
    packed.save(tmp_path / "own.safetensors")
    again = load_packed(tmp_path / "own.safetensors", net=kind(mem_bn=mem_bn))
    assert torch.equal(logits(again, x), logits(packed, x)) and again.to_bytes() == packed.to_bytes()
    assert not any(isinstance(m, empf.BinaryConv2d | empf.BinaryLinear | nn.BatchNorm2d) for m in packed.modules())


@pytest.mark.parametrize("kind", NETWORKS)
def test_codes_go_between_the_layers_and_floats_to_everybody_else(kind):
    net, x = settled(kind, bits=4)
    packed = pack(net)
    seen, read = [], []
    for module in packed.modules():
        if isinstance(module, PackedNeuron):
            module.register_forward_hook(lambda module, args, spikes: seen.append(spikes.codes.clone()))
        if isinstance(module, PackedSynapse):
            module.register_forward_hook(lambda module, args, y: read.append(args[0]))
    wanted, found = logits(net, x), logits(packed, x)
    same = (found - wanted).abs().amax((0, 2)) < 1e-4 * wanted.abs().max()  # images without a flip at a boundary
    assert same.sum() >= len(same) - 2 and all(codes.dtype == torch.uint8 and codes.max() > 0 for codes in seen)
    assert any(isinstance(x, Spikes) for x in read)


def test_one_module_in_two_places_stays_one():
    net, x = settled(Convolutional)
    packed = pack(net).net
    assert packed.order == tuple(packed.neurons) and all(isinstance(m, PackedNeuron) for m in packed.order)
    assert len({id(m) for m in packed.modules() if isinstance(m, PackedSynapse)}) == 2


def test_a_class_with_a_forward_of_its_own_is_left_alone():
    class Doubled(empf.EMPFNeuron):
        def forward(self, current):
            return 2 * super().forward(current)

    net, x = settled(Convolutional)
    net.neurons[0].__class__ = Doubled
    packed = pack(net)
    assert type(packed.net.neurons[0]) is Doubled and close(logits(packed, x), logits(net, x))


def test_a_norm_folds_into_the_product_before_it():
    net, x = settled(Convolutional)
    packed = pack(net)
    calls = []
    for module in packed.modules():
        if isinstance(module, PackedNorm):
            module.register_forward_hook(lambda module, args, y: calls.append(type(y).__name__))
    logits(packed, x)
    assert calls == ["Tensor", "Product", "Product"]  # the first stands behind a full-precision convolution
    assert set(packed.net.twice._filters) == {None, packed.net.norms[1]}  # its output is read without the norm as well


def test_a_filter_follows_its_norm():
    net, x = settled(Plain)
    packed = pack(net)
    before = logits(packed, x)
    norm = packed.net.norms[0]
    norm.load_state_dict({"gain": 2 * norm.gain, "shift": norm.shift})
    assert not torch.equal(logits(packed, x), before)


def misfits():
    class Other(Convolutional):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

    narrow = Convolutional()
    narrow.head = nn.Linear(64, 5)
    strided = Convolutional()
    strided.twice.stride = (2, 2)
    return [
        (Convolutional(T=4), "of neurons.0 the file has .*T=3.*, and net has .*T=4"),
        (Convolutional(bits=4), "of neurons.0 the file has .*net has .*spike_bits=4"),
        (Other(), "of more it is not in the file, and net has weight"),
        (narrow, r"of head the file has weight\[10, 64\] .*, and net has weight\[5, 64\]"),
        (strided, r"of twice the file has .*stride=\(1, 1\)"),
        (Sequence(), "of embed it is not in the file"),
        (empf.resnet18(width=0.0625), "of blocks.0.conv1.bn it is not in the file"),
    ]


@pytest.mark.parametrize("net, words", misfits())
def test_a_class_that_does_not_fit_the_file_is_refused_with_the_names(net, words, tmp_path):
    pack(settled(Convolutional)[0]).save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=f"own.safetensors does not fit net: {words}"):
        load_packed(tmp_path / "own.safetensors", net=net)


def test_the_class_is_asked_for_by_name(tmp_path):
    pack(settled(Convolutional)[0]).save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"holds a network of your own: call load_packed\(path, net=Convolutional"):
        load_packed(tmp_path / "own.safetensors")
    pack(empf.resnet18(width=0.0625)).save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"holds a resnet18: call load_packed\(path\) without net"):
        load_packed(tmp_path / "net.safetensors", net=Convolutional())


@pytest.mark.parametrize("how", ["classes", "head", "frozen", "full shortcut"])
def test_networks_that_were_altered_pack_too(how, tmp_path):
    torch.manual_seed(0)
    make = lambda: altered(how, empf.resnet18(num_classes=10, in_channels=1, image_size=8, width=0.125, T=3))  # noqa: E731
    net, x = make(), torch.randn(8, 1, 8, 8)
    for _ in range(3):
        empf.reset(net)
        net.train()(x)
    wanted = logits(net.eval(), x)
    packed = pack(net)
    assert close(logits(packed, x), wanted)
    packed.save(tmp_path / "net.safetensors")
    alone = how in ("classes", "frozen")  # the configuration still says what it is
    again = load_packed(tmp_path / "net.safetensors", net=None if alone else make())
    assert torch.equal(logits(again, x), logits(packed, x))
    assert (packed.config is not None) == alone
    if how == "classes":
        assert again.config.num_classes == 5


def altered(how: str, net: nn.Module) -> nn.Module:
    if how == "classes":
        net.head = nn.Linear(net.head.in_features, 5)
    elif how == "head":
        net.head = nn.Sequential(nn.Dropout(), nn.Linear(net.head.in_features, 7))
    elif how == "frozen":
        net.blocks.requires_grad_(False)
        empf.freeze_norm(net)
    else:
        conv = net.blocks[2].shortcut["conv"]
        net.blocks[2].shortcut["conv"] = nn.Conv2d(conv.in_channels, conv.out_channels, 1, 2, bias=False)
    return net
