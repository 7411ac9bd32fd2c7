"""Six networks as people write them: each trains, is counted, packed, loaded elsewhere and exported, all to the same.

The three of examples/, and a synapse that is used twice, torch's own batch norms, grouped convolutions.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from deploy_tools import logits
from own_networks import NETWORKS, Twice, inputs_of, met, settled
from torch import Tensor, nn

import empf
from empf.synapse import quantize_weight

every_network = pytest.mark.parametrize("name", NETWORKS)


# ---- gradients, against neurons, synapses and a loop that are written out here


class ByHand(nn.Module):
    """The neuron of the paper in plain autograd, over one step a call; with the parameters of a neuron of the library.

    v is a constant of the next step, unless `through_time`.
    """

    def __init__(self, neuron: nn.Module):
        super().__init__()
        self.neuron, self.v, self.t, self.through_time = neuron, None, 0, False

    def forward(self, current: Tensor) -> Tensor:
        t = 0 if self.neuron.T is None else self.t
        leak, threshold = self.neuron.leak[t], self.neuron.threshold[t]
        v = torch.zeros_like(current[0]) if self.v is None else self.v
        m = leak * (v if self.through_time else v.detach()) + current[0]
        if isinstance(self.neuron, empf.LIFNeuron):
            x = m - threshold
            s = (x >= 0).to(x) + (passed := x * (1 - x.abs()).clamp(min=0).detach()) - passed.detach()
            self.v = m - threshold * s
        else:
            s = (m - threshold).clamp(min=0)
            self.v = m - s
        bits, self.t = getattr(self.neuron, "spike_bits", None), self.t + 1
        if bits is not None:
            s = (4 * s + 0.5).floor().clamp(max=2**bits - 1).detach() / 4 + (s - s.detach())  # gradient: that of s
        return s[None]


def straight_through(synapse: nn.Module):
    def effective_weight() -> Tensor:
        passed = synapse.weight.clamp(-1, 1)
        return quantize_weight(synapse.weight.detach(), synapse.kind) + passed - passed.detach()

    return effective_weight


def written_out(net: nn.Module) -> tuple[nn.Module, list[ByHand]]:
    """A copy without the neurons and the weights of the library."""
    net, found = copy.deepcopy(net), []
    for module in list(net.modules()):
        if hasattr(module, "kind"):
            module.effective_weight = straight_through(module)
        for name, child in module.named_children():
            if isinstance(child, empf.EMPFNeuron | empf.LIFNeuron):
                found.append(ByHand(child))
                setattr(module, name, found[-1])
    return net, found


def by_hand(net: nn.Module, x: Tensor, target: Tensor, learning: str, steps: list[int] | None) -> dict[str, Tensor]:
    net, neurons = written_out(net)
    for neuron in neurons:
        neuron.through_time = learning == "stbp"
    if learning == "stbp":
        outputs = [sum(net(frame[None])[0] for frame in x) / len(x)]
    else:
        outputs = [net(frame[None])[0] for frame in x]
        outputs = [outputs[t - 1] for t in steps or range(1, len(x) + 1)]
    sum(F.cross_entropy(output, target) / len(outputs) for output in outputs).backward()
    return {name.replace(".neuron.", "."): p.grad for name, p in net.named_parameters() if p.grad is not None}


MODES = [("random", [1]), ("random", [4]), ("random", [1, 3]), ("every", None), ("stbp", None)]


@pytest.mark.parametrize("name", [*NETWORKS, "open end"])
def test_gradients_are_those_of_a_loop_written_by_hand(name):
    net, x = settled(name) if name in NETWORKS else (Twice(None), torch.rand(4, 6, 6))
    net, x, target = net.double().train(), x.double(), torch.arange(6) % 4
    learned = set()
    for learning, steps in MODES:
        wanted = by_hand(net, x, target, learning, steps)
        net.zero_grad()
        empf.online_backward(net, x, target, F.cross_entropy, learning=learning, steps=steps)
        found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        learned |= {n for n, gradient in wanted.items() if gradient.any()}
        for n in found.keys() | wanted.keys():  # a gradient of zero may be None
            a, b = (side.get(n, torch.zeros(())) for side in (found, wanted))
            assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max()), (learning, steps, n)
    assert learned >= {n for n, p in net.named_parameters() if p.dim() > 1}


# ---- counting


def additions(synapse: nn.Module, spikes: Tensor) -> int:
    weight = synapse.effective_weight() if hasattr(synapse, "effective_weight") else synapse.weight
    if weight.dim() == 2:
        return met(spikes.flatten(0, -2), weight)
    padding = synapse.padding
    if synapse.padding_mode == "circular":
        spikes, padding = F.pad(spikes, padding * 2, mode="circular"), 0
    return met(spikes, weight, stride=synapse.stride, padding=padding, dilation=synapse.dilation, groups=synapse.groups)


@every_network
def test_synaptic_operations_are_those_of_brute_force(name):
    net, x = settled(name, samples=2)
    counted, given = empf.spike_account(net, [(x[:, :1], None), (x[:, 1:], None)]), inputs_of(net, x)
    each = {n: sum(additions(net.get_submodule(n), spikes) for spikes in given[n]) for n in NETWORKS[name][2]}
    assert counted["sops"] == sum(each.values()) / 2 and min(each.values()) > 0
    assert empf.spike_account(empf.pack(net), [(x, None)]) == counted


# ---- packed


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and b.std() > 1e-3 and ((a - b).abs().max() / b.abs().max()).item() < 1e-5


CHILD = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from deploy_tools import logits
from own_networks import NETWORKS
import empf
found = {}
for number, (name, (make, *_)) in enumerate(NETWORKS.items()):
    found[name] = logits(empf.load_packed(f"{number}.safetensors", net=make(4)), torch.load(f"{number}.pt"))
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, Tensor]:
    """The logits of each packed network in another process, which has only the files and the classes."""
    folder, tests = tmp_path_factory.mktemp("packed"), Path(__file__).parent
    for number, name in enumerate(NETWORKS):
        net, x = settled(name)
        empf.pack(net).save(folder / f"{number}.safetensors")
        torch.save(x, folder / f"{number}.pt")
    command = [sys.executable, "-c", CHILD, str(tests), str(tests.parent)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "found.pt")


@every_network
def test_packed_logits_are_those_in_eval_mode(name, elsewhere):
    net, x = settled(name)
    packed, wanted = empf.pack(net), logits(net.eval(), x)
    low = (empf.BinaryConv1d, empf.BinaryConv2d, empf.BinaryLinear)
    assert not any(isinstance(m, (*low, empf.EMPFNeuron, empf.LIFNeuron)) for m in packed.modules())
    assert close(logits(packed, x), wanted) and close(torch.stack([packed.step(frame) for frame in x]), wanted)
    assert torch.equal(elsewhere[name], logits(packed, x))


@pytest.mark.filterwarnings("ignore")  # of the exporter, about its own packages
@every_network
def test_onnxruntime_gives_the_same_logits(name, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    net, x = settled(name, T=2)  # the exporter takes long over each operation
    empf.export_onnx(empf.pack(net), tmp_path / "net.onnx", x)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for part in (x, x[:, :1]):  # any number of samples
        assert close(torch.from_numpy(session.run(None, {"x": part.numpy()})[0]), logits(net.eval(), part))
