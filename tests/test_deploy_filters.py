"""Products of packed synapses: with spikes in bf16 near those of fp32, which stay what they are; sums of neurons."""

import pytest
import torch
import torch.nn.functional as F
from deploy_tools import logits, trained
from test_deploy_layers import Convolutional

import empf
from empf.deploy import cpu_conv, pack
from empf.deploy.cpu_conv import FloatConv, multiplies_bf16
from empf.deploy.layers import PackedNeuron

needs_bf16 = pytest.mark.skipif(not multiplies_bf16(), reason="the processor does not multiply bf16, or no compiler")
NETWORKS = {
    "resnet18": dict(width=0.25),
    "mem_bn": dict(neuron="mem_bn", weights="ternary"),
    "per channel": dict(per_channel=True, width=0.2),
    "parallel": dict(parallel=0.5, shortcut="current"),
    "resnet34": dict(arch="resnet34"),
    "vgg_snn": dict(arch="vgg_snn"),
}


def in_bf16(packed: torch.nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return logits(packed, x, **options)


def differences(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each step and image, relative to its largest logit."""
    return (found - wanted).abs().amax(-1) / wanted.abs().amax(-1)


@pytest.fixture
def types(monkeypatch) -> list[torch.dtype]:
    """Those of the inputs of convolutions whose weights are laid out."""
    seen, run = [], FloatConv.__call__
    monkeypatch.setattr(FloatConv, "__call__", lambda self, x, bias: (seen.append(x.dtype), run(self, x, bias))[1])
    return seen


@needs_bf16
@pytest.mark.parametrize("name", NETWORKS)
def test_the_logits_are_near_and_those_of_fp32_stay(name, types):
    model, x = trained(**NETWORKS[name])
    packed = empf.pack(model)
    wanted = logits(packed, x)
    logits(packed, x)  # what the first call kept is not computed twice
    assert torch.bfloat16 not in types
    for _ in range(2):
        types.clear()
        found = in_bf16(packed, x)
    error = differences(found, wanted)
    assert found.dtype == torch.float32 and 0 < error.max() < 0.05 and error.mean() < 0.005
    assert types.count(torch.bfloat16) > len(types) / 2
    assert torch.equal(logits(packed, x), wanted)


@needs_bf16
def test_steps_may_be_asked_one_by_one():
    model, x = trained(**NETWORKS["resnet18"])
    packed = empf.pack(model)
    wanted = in_bf16(packed, x)
    assert torch.equal(in_bf16(packed, x), wanted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([packed(x, steps=1) for _ in range(3)])
    assert differences(found, wanted).max() < 1e-5


@needs_bf16
def test_networks_of_ones_own_read_such_spikes_as_fp32(types):
    torch.manual_seed(0)
    net = Convolutional().eval()
    with torch.no_grad():
        for norm in net.norms:
            norm.running_mean.normal_()
    x = torch.randn(3, 4, 1, 8, 8)
    packed = empf.pack(net)
    assert 0 < differences(in_bf16(packed, x), logits(packed, x)).max() < 0.05
    assert torch.bfloat16 in types
    spikes = packed.net.neurons[0].eval()
    spikes.bf16 = True
    empf.reset(packed)
    with torch.no_grad():
        s = spikes(torch.rand(3, 2, 8, 8, 8))
    assert s.codes.dtype == torch.bfloat16 and s.dtype == torch.float32
    pooled = F.avg_pool2d(s.flatten(0, 1), 2)
    assert pooled.codes.dtype == torch.bfloat16 and pooled.shape == (6, 8, 4, 4)
    assert torch.equal(s + 0, s.codes.float())


def test_without_the_instructions_autocast_changes_nothing(monkeypatch, types):
    monkeypatch.setattr(pack, "multiplies_bf16", lambda: False)
    model, x = trained(**NETWORKS["resnet18"])
    packed = empf.pack(model)
    assert torch.equal(in_bf16(packed, x), logits(packed, x))
    assert torch.bfloat16 not in types


def test_codes_stay_codes():
    model, x = trained(spike_bits=4)
    packed = empf.pack(model)
    assert torch.equal(in_bf16(packed, x), logits(packed, x))


@pytest.mark.skipif(not cpu_conv.available(), reason="oneDNN lays out weights on x86 only")
@pytest.mark.parametrize("bits", (None, 4))
@pytest.mark.parametrize("shortcut", ("spikes", "current"))
def test_a_neuron_adds_up_what_torch_would(bits, shortcut, monkeypatch):
    model, x = trained(spike_bits=bits, shortcut=shortcut)
    packed = empf.pack(model)
    found = [logits(packed, x) for _ in range(2)]
    monkeypatch.setattr(PackedNeuron, "summands", lambda self, current: None)
    assert all(torch.equal(y, logits(packed, x)) for y in found)
