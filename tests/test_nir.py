"""NIR: the graph that was written and read again gives the spikes and outputs of the network."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import empf

nir = pytest.importorskip("nir", reason="pip install nir")
T = 4


def run(graph, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a NIR graph without circles makes of x (T, N, ...), by its equations: output and output of each node."""
    tensor = lambda a: torch.from_numpy(np.asarray(a)).double()  # noqa: E731
    v = {name: 0.0 for name in graph.nodes}
    steps = []
    for frame in x:
        out = {"input": frame}
        while len(out) < len(graph.nodes):
            for name, node in graph.nodes.items():
                before = [a for a, b in graph.edges if b == name]
                if name in out or not all(a in out for a in before):
                    continue
                i = sum(out[a] for a in before)
                if isinstance(node, nir.Affine):
                    i = F.linear(i, tensor(node.weight), tensor(node.bias))
                elif isinstance(node, nir.Conv2d):
                    place = [tuple(int(k) for k in p) for p in (node.stride, node.padding, node.dilation)]
                    i = F.conv2d(i, tensor(node.weight), tensor(node.bias), *place, int(node.groups))
                elif isinstance(node, nir.AvgPool2d):
                    i = F.avg_pool2d(
                        i, *(tuple(int(k) for k in p) for p in (node.kernel_size, node.stride, node.padding))
                    )
                elif isinstance(node, nir.Flatten):
                    i = i.flatten(1)
                elif isinstance(node, nir.LIF):
                    m = v[name] + 1e-4 / tensor(node.tau) * (tensor(node.v_leak) - v[name] + tensor(node.r) * i)
                    i = (m >= tensor(node.v_threshold) - 1e-12).double()
                    assert node.metadata["reset"] == "subtract"
                    v[name] = m - tensor(node.v_threshold) * i
                else:
                    assert isinstance(node, nir.Output)
                out[name] = i
        steps.append(out)
    return torch.stack([s["output"] for s in steps]), {n: torch.stack([s[n] for s in steps]) for n in graph.nodes}


class Convolutional(nn.Module):
    """With a branch, a sum, pooling and torch's own norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), empf.PerStep(nn.BatchNorm2d(8))
        self.neuron1, self.neuron2 = empf.LIFNeuron(T, leak=0.75), empf.LIFNeuron(T)
        self.conv, self.norm2 = empf.BinaryConv2d(8, 8, 3, padding=1, groups=2), empf.StepBatchNorm(8)
        self.side, self.pool, self.head = empf.BinaryConv2d(8, 8, 1, kind="ternary"), nn.AvgPool2d(2), nn.Linear(32, 3)

    def forward(self, x):
        fold = lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # noqa: E731
        current = self.norm(fold(self.stem, x))
        spikes = self.neuron1(current)
        spikes = self.neuron2(self.norm2(fold(self.conv, spikes)) + fold(self.side, spikes) + current)
        return self.head(fold(self.pool, spikes).flatten(2))


def settled(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """Norms with statistics of their own, in double precision."""
    net.double().train()
    for module in net.modules():
        if isinstance(module, empf.StepBatchNorm):
            nn.init.constant_(module.weight, 2.0)
    for _ in range(3):
        empf.reset(net)
        net(x)
    return net.eval()


NETS = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), empf.StepBatchNorm(16), empf.LIFNeuron(T),
            empf.BinaryLinear(16, 16), empf.StepBatchNorm(16), empf.LIFNeuron(T, leak=0.8), nn.Linear(16, 3),
        ),
        (6,),
    ),
    "convolutional": (Convolutional, (2, 4, 4)),
    "resnet18": (lambda: empf.resnet18(neuron="lif", in_channels=1, image_size=8, width=0.0625), (1, 8, 8)),
    "current": (
        lambda: empf.resnet18(neuron="lif", in_channels=1, image_size=8, width=0.0625, shortcut="current"), (1, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_the_graph_that_was_read_again_fires_the_same_spikes(name, tmp_path):
    torch.manual_seed(0)
    make, shape = NETS[name]
    x = 2 * torch.randn(T, 5, *shape, dtype=torch.float64)
    net = settled(make(), x)
    nir.write(tmp_path / "net.nir", empf.to_nir(net, x))
    graph = nir.read(tmp_path / "net.nir")
    spikes = {}
    for layer, module in net.named_modules():
        if isinstance(module, empf.LIFNeuron):
            module.observer = lambda s, layer=layer: spikes.setdefault(layer.replace(".", "_"), s)
    empf.reset(net)
    wanted = net(x)
    got, nodes = run(graph, x)
    assert len(spikes) >= 2 and sum(0.01 < s.mean() < 0.99 for s in spikes.values()) > len(spikes) / 2
    for layer, s in spikes.items():
        assert torch.equal(nodes[layer], s.double()), layer
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_the_network_is_left_as_it_was():
    net = NETS["linear"][0]().train()
    x = torch.randn(T, 5, 6)
    net(x)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    empf.to_nir(net, x)
    assert net.training and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    "part, sentence",
    [
        (empf.EMPFNeuron(T), "0 emits floating-point spikes, and the events of NIR are binary: use empf.LIFNeuron, or"),
        (nn.MaxPool1d(2), "0 is a MaxPool1d, for which NIR has no node"),
        (empf.StepBatchNorm(6), "0 does not follow a synapse of its own"),
    ],
)
def test_what_nir_has_no_node_for_is_one_sentence(part, sentence):
    with pytest.raises(ValueError, match=sentence):
        empf.to_nir(nn.Sequential(part, nn.Linear(6, 2)), torch.randn(T, 5, 6))


def test_a_product_between_layers_is_named():
    class Net(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x) * 2)

    with pytest.raises(ValueError, match="1 is fed with the result of mul, for which NIR has no node"):
        empf.to_nir(Net(nn.Linear(6, 6), empf.LIFNeuron(T)), torch.randn(T, 5, 6))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys.modules["empf.deploy.nir"], "installed", lambda name: None)
    with pytest.raises(ValueError, match=r"the export needs nir: pip install 'empf\[nir\]'"):
        empf.to_nir(NETS["linear"][0](), torch.randn(T, 5, 6))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("reader", ["snntorch", "spikingjelly"])
def test_another_library_reads_it_and_fires_the_same_spikes(reader, name):
    """In float32, as theirs; where they are installed: CI has neither."""
    pytest.importorskip(reader, reason=f"pip install {reader}")
    pytest.importorskip("nirtorch", reason="pip install nirtorch")
    read = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "nir_elsewhere.py"))[f"in_{reader}"]
    torch.manual_seed(0)
    make, shape = NETS[name]
    x = 2 * torch.randn(T, 5, *shape)
    net = settled(make(), x.double()).float()
    other = read(empf.to_nir(net, x)).float()
    ours, theirs = {}, {}
    for layer, module in net.named_modules():
        if isinstance(module, empf.LIFNeuron):
            layer = layer.replace(".", "_")
            module.observer = lambda s, layer=layer: ours.setdefault(layer, s)
            take = lambda module, x, y, layer=layer: theirs.setdefault(layer, []).append(y)  # noqa: E731
            other.get_submodule(layer).register_forward_hook(take)
    empf.reset(net)
    state, outputs = None, []
    wanted = net(x)
    for frame in x:
        y, state = other(frame, state)
        outputs.append(y)
    assert len(ours) >= 2
    for layer, s in ours.items():
        steps = [y[0] if isinstance(y, tuple) else y for y in theirs[layer]]
        assert torch.equal(torch.stack(steps), s), layer
    torch.testing.assert_close(torch.stack(outputs), wanted, rtol=1e-5, atol=1e-5)
