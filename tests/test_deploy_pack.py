"""Packed networks: the logits of the model, streams, errors, and what stands in their tensors."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from deploy_tools import logits, shallow, trained
from torch import nn

import empf
from empf.deploy import cpu_conv
from empf.deploy import pack as deploy
from empf.deploy.layers import PackedNeuron, PackedSynapse
from empf.deploy.lazy import Spikes
from empf.deploy.pack import load_packed, pack, verify
from empf.kernels import backend, set_backend
from empf.kernels.pack import signs
from empf.neuron import StatefulNeuron

NEURONS = {"vanilla": {}, "mem_bn": {"neuron": "mem_bn"}, "half parallel": {"parallel": 0.5}}
EVERY = [NEURONS[n] | {"weights": w, "seca": s} for n, w, s in product(NEURONS, ("binary", "ternary"), (0, 1, 2))]
OTHERS = [
    dict(arch="resnet19", parallel=0.5), dict(arch="resnet34", weights="ternary"), dict(arch="resnet18", image_size=64),
    dict(arch="resnet18", width=0.1), dict(arch="vgg_snn"), dict(arch="vgg_snn", neuron="mem_bn", seca=2),
    dict(activation="sigmoid"), dict(activation="tanh", neuron="mem_bn"), dict(activation="softplus", parallel=0.5),
    dict(activation="gelu", neuron="mem_bn", per_channel=True), dict(per_channel=True, weights="ternary"),
    dict(shortcut="current"),
    dict(shortcut="current", weights="ternary", granularity="layer", seca=2, seca_bias=True, neuron="mem_bn"),
]  # fmt: skip
ROUNDED = [
    dict(), dict(neuron="mem_bn", seca=1), dict(parallel=0.5, weights="ternary"), dict(arch="vgg_snn"),
    dict(arch="vgg_snn", spike_bits=7), dict(arch="resnet19"), dict(shortcut="current"), dict(activation="sigmoid"),
    dict(neuron="lif", spike_bits=None), dict(arch="vgg_snn", neuron="lif", spike_bits=None),
]  # fmt: skip


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("settings", EVERY + OTHERS, ids=str)
def test_packed_logits_equal_those_of_the_model(settings, tmp_path):
    model, x = trained(**settings)
    wanted = logits(model, x)
    pack(model).save(tmp_path / "net.safetensors")
    packed = load_packed(tmp_path / "net.safetensors")
    assert wanted.std() > 1e-3
    assert relative(logits(packed, x), wanted) < 2e-5


@pytest.mark.parametrize("settings", ROUNDED, ids=str)
def test_rounded_spikes_are_integers_and_differ_at_boundaries_only(settings):
    model, x = trained(**{"spike_bits": 4, **settings})
    packed = pack(model)
    seen = {"model": [], "packed": []}
    handles = [
        m.register_forward_hook(lambda module, inputs, y, where=where: seen[where].append(y))
        for where, net, kind in (("model", model, StatefulNeuron), ("packed", packed, PackedNeuron))
        for m in net.modules()
        if isinstance(m, kind)
    ]
    wanted, found = logits(model, x), logits(packed, x)
    for handle in handles:
        handle.remove()
    step = 1.0 if model.config.neuron == "lif" else 0.25
    seen["packed"] = [spikes.codes for spikes in seen["packed"]]
    assert all(codes.dtype == torch.uint8 for codes in seen["packed"])
    assert max(codes.max() for codes in seen["packed"]) > (0 if step == 1 else 2)
    equal, flips, count = torch.ones(wanted.shape[1], dtype=torch.bool), 0, 0
    for a, b in zip(*seen.values(), strict=True):  # T N ...
        off = ((a / step).long() - b).abs().transpose(0, 1).flatten(1)[equal]  # images that no flip has changed so far
        assert off.max() <= 1
        flips, count = flips + int((off > 0).sum()), count + off.numel()
        equal[equal.clone()] = off.amax(1) == 0
    assert flips <= 1e-4 * count and equal.sum() > 50
    assert relative(found[:, equal], wanted[:, equal]) < 2e-5


@pytest.mark.parametrize("laid_out", [True, False])
def test_sums_of_codes_are_exact(laid_out, monkeypatch):
    """With scale 1 and bias 0 the result is the sum itself, up to the largest code."""
    if not laid_out:
        monkeypatch.setattr(cpu_conv, "available", lambda: False)
    elif not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("oneDNN lays out weights on x86 only")
    assert cpu_conv.available() == laid_out
    model, _ = trained(spike_bits=8, weights="ternary")
    synapse = pack(model).net.blocks[7].conv2.conv
    synapse.scale.fill_(4)
    codes = torch.randint(0, 256, (2, 3, 64, 5, 5), dtype=torch.uint8)
    sums = nn.functional.conv2d(codes.flatten(0, 1).double(), signs(synapse.filter(None).weight).double(), padding=1)
    found = synapse(Spikes(codes, 0.25, 255))
    assert sums.abs().max() > 1000 and torch.equal(found.flatten(0, 1).double(), sums)
    assert bool(synapse.filter(None)._laid_out) == laid_out


@pytest.mark.parametrize("settings", [dict(neuron="mem_bn"), dict(spike_bits=4, parallel=0.5)], ids=str)
def test_a_large_batch_goes_through_in_parts(settings, monkeypatch):
    """Also where the potentials of the parts are kept for the next call, and in ordinary convolutions."""
    model, x = trained(**settings)
    packed = pack(model)
    wanted = logits(packed, x)
    monkeypatch.setattr(deploy, "AT_ONCE", 3 * 8 * 64 * 25 // torch.get_num_threads())  # T C HW, 25 of the 64 images
    assert packed.images_at_once(3, torch.device("cpu")) == 25
    assert relative(logits(packed, x), wanted) < 1e-6
    assert relative(torch.stack([packed.step(x) for _ in range(3)]), wanted) < 1e-6
    packed.reset()
    assert logits(packed, x[:0]).shape == (3, 0, 10)
    monkeypatch.setattr(cpu_conv, "available", lambda: False)
    packed.to("cpu")  # forgets what it has laid out
    assert relative(logits(packed, x), wanted) < 1e-6


@pytest.mark.kernel
@pytest.mark.parametrize(
    "settings",
    [
        dict(neuron="mem_bn", per_channel=True), dict(parallel=0.5, spike_bits=4, weights="ternary"), dict(seca=2),
        dict(arch="vgg_snn"), dict(arch="resnet19", spike_bits=8), dict(shortcut="current"),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernels_give_the_same_logits(settings, kernels_on, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the stem
    set_backend("off")  # training on the interpreter would take long
    model, x = shallow(monkeypatch, **settings, width=0.0625, T=2)
    x = x[..., :2, :, :, :]
    packed = pack(model).to(device)
    set_backend("on")
    assert backend(device) == ("triton" if device == "cuda" else "triton-interpreter")
    found = logits(packed, x.to(device)).cpu()
    launched = {name for name, count in kernels_on.items() if count} - {"binary_unpack"}
    wanted = {"binary_conv2d", "neuron_update"}
    if not settings.get("seca"):  # a convolution and the neurons behind it are one launch; shortcuts have no neurons
        wanted |= {"binary_conv2d_neuron"}
    if model.config.arch == "vgg_snn":
        wanted -= {"binary_conv2d"}
    if model.config.arch == "resnet19":  # the hidden layer of its head
        wanted |= {"binary_matmul"}
    assert launched == wanted
    set_backend("off")
    assert relative(found, logits(packed.cpu(), x)) < 2e-5


@pytest.mark.gpu
def test_half_precision_on_a_gpu():
    model, x = trained()
    wanted = logits(model, x)
    found = logits(pack(model).cuda(), x.cuda().bfloat16()).float().cpu()
    assert relative(found, wanted) < 0.05


@pytest.mark.parametrize("settings", [dict(neuron="mem_bn", seca=1), dict(spike_bits=4), dict(neuron="lif")], ids=str)
def test_frame_by_frame_equals_the_sequence(settings):
    model, x = trained(**settings)
    packed = pack(model)
    events = torch.stack([x * scale for scale in (1.0, 0.5, -1.0)])  # T N C H W
    wanted = logits(packed, events)
    assert relative(torch.stack([packed.step(frame) for frame in events]), wanted) < 1e-6
    packed.reset()
    assert relative(torch.cat([packed(events[:2], steps=2), packed(events[2:], steps=1)]), wanted) < 1e-6
    assert relative(logits(packed, x.expand(3, *x.shape)), logits(packed, x)) < 1e-6


def same_error(model, packed, call):
    messages = []
    for net in (model, packed):
        with pytest.raises(ValueError) as error:
            call(net)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    return messages[0]


def test_misuse_is_refused_with_the_words_of_the_model():
    model, x = trained()
    model, packed = copy.deepcopy(model), pack(model)
    assert "(N, 1, 8, 8)" in same_error(model, packed, lambda net: net(x[..., :4]))
    assert "2 frames" in same_error(model, packed, lambda net: net(x.expand(2, *x.shape)))
    for net in (model, packed):
        net(x, steps=1)
    assert "empf.reset(model)" in same_error(model, packed, lambda net: net(x[:5]))
    for net in (model, packed):
        empf.reset(net)
        net(x)
    assert "T = 3" in same_error(model, packed, lambda net: net(x, steps=1))
    assert "steps asked" in same_error(model, packed, lambda net: net(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pixels_that_were_not_normalised_are_refused(dtype):
    """They would be taken for codes of spikes, also by the weights that are kept for the next call."""
    model, x = trained()
    packed = pack(model)
    with pytest.raises(TypeError, match=f"floating-point numbers, normalised, got {dtype}"):
        packed((100 * x).to(dtype))
    assert relative(logits(packed, x), logits(model, x)) < 2e-5


def test_a_failed_call_changes_nothing():
    model, x = trained()
    packed = pack(model)
    wanted = logits(packed, x)
    first = packed(x, steps=1)
    with pytest.raises(ValueError):
        packed(x[:5])
    assert torch.equal(torch.cat([first, packed(x)]), wanted)


def test_every_thread_has_a_state_of_its_own():
    """Streams of two threads in turn, batches of different size, a reset and a refused call of one between those of the
    other; then both at once."""
    model, x = trained(neuron="mem_bn")
    packed, parts = pack(model), (x[:5], x[5:12])
    wanted = [logits(packed, part) for part in parts]
    packed.step(x)  # of this thread
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        found = ([], [])
        for t in range(3):
            for pool, part, steps in zip((first, second), parts, found, strict=True):
                steps.append(pool.submit(packed.step, part).result())
            if t == 0:
                second.submit(empf.reset, packed).result()
                found[1][:] = [second.submit(packed.step, parts[1]).result()]
            with pytest.raises(ValueError):
                first.submit(packed, x[:2]).result()
        for steps, want in zip(found, wanted, strict=True):
            assert relative(torch.stack(steps), want) < 1e-6
        both = [
            pool.submit(logits, packed, part) for pool, part in zip((first, second), parts, strict=True) for _ in "abc"
        ]
        for number, result in enumerate(both):
            assert relative(result.result(), wanted[number // 3]) < 1e-6
    assert relative(torch.cat([packed(x)]), logits(packed, x)[1:]) < 1e-6
    assert copy.deepcopy(packed)(x).shape == pickle.loads(pickle.dumps(packed))(x).shape == (3, 64, 10)


def test_little_work_is_done_by_one_thread(monkeypatch):
    """And torch's setting is as before, also where the call fails; another thread's setting is never touched."""
    model, x = trained()
    packed, calls = pack(model), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    work = 9 * packed.net.stem.conv.out_channels * packed.numbers(x)
    for most, others, expected in ((work, 1, [1, 2]), (work - 1, 1, []), (work, 2, [])):
        monkeypatch.setattr(deploy, "ALONE", most)
        monkeypatch.setattr(deploy.threading, "active_count", lambda others=others: others)
        packed.reset()
        packed(x)
        assert calls == expected
        calls.clear()
    monkeypatch.setattr(deploy, "ALONE", work)
    monkeypatch.setattr(deploy.threading, "active_count", lambda: 1)
    with pytest.raises(ValueError, match="T = "):
        packed(x)  # no reset
    assert calls == [1, 2]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="full precision, there is nothing to pack"):
        pack(empf.resnet18(weights="full", width=0.0625))
    with pytest.raises(ValueError, match="full precision, there is nothing to pack"):
        pack(nn.Linear(2, 2))
    model = empf.resnet18(width=0.0625)
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="head.bias is not finite"):
        pack(model)


def test_packing_leaves_the_model_alone_and_shares_no_memory_with_it():
    model, x = trained(seca=1, neuron="mem_bn")
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    packed = pack(model)
    wanted = logits(packed, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for p in model.state_dict().values():
            p.add_(1)
    assert torch.equal(logits(packed, x), wanted)


def test_signs_and_sizes():
    """One bit per weight in memory, signs those of the latent weights, and no dense copy in the state."""
    model, _ = trained(weights="ternary")
    packed = pack(model)
    state = packed.net.state_dict()
    for name, (shape, kind) in packed.packed_weights().items():
        assert state[name].dtype == torch.int32 and kind == "ternary"
        assert state[name].shape == (shape[0], -(-int(np.prod(shape[1:])) // 16))
    synapses = [m for m in packed.modules() if isinstance(m, PackedSynapse)]
    layers = [m for m in model.modules() if isinstance(m, empf.BinaryConv2d)]
    assert len(synapses) == len(layers) == 19
    for synapse, layer in zip(synapses, layers, strict=True):
        assert torch.equal(synapse.effective_weight(), layer.effective_weight().sign())  # the scale is in the norm


def test_what_was_derived_is_dropped_when_the_weights_change_or_move():
    model, x = trained()
    packed = pack(model)
    wanted = logits(packed, x)
    synapse = packed.net.blocks[0].conv1.conv
    assert synapse._filters and not copy.deepcopy(synapse)._filters
    assert not packed.to("cpu").net.blocks[0].conv1.conv._filters
    assert torch.equal(logits(packed, x), wanted)
    other, _ = trained(seca=0, neuron="empf", weights="binary")
    packed.load_state_dict({name: p + 1 if "bits" in name else p for name, p in pack(other).state_dict().items()})
    assert not synapse._filters and not torch.equal(logits(packed, x), wanted)


@pytest.mark.parametrize("settings", [dict(), dict(spike_bits=4)], ids=str)
def test_verify_sees_a_wrong_network(settings):
    model, x = trained(**settings)
    packed = pack(model)
    found = verify(model, packed, [(x, None), (x[:5], None)])
    assert found["images"] == 69 and found["same_class"] == 1
    packed.net.blocks[3].conv1.conv.bits.neg_()
    packed.to("cpu")
    with pytest.raises(ValueError, match="of 69 classes agree; do not use it"):
        verify(model, packed, [(x, None), (x[:5], None)])


def test_verify_sees_a_network_that_gives_no_numbers():
    model, x = trained()
    packed = pack(model)
    packed.net.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="logits differ by nan"):
        verify(model, packed, [(x, None), (x[:5], None)])


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_a_network_of_other_numbers_says_what_to_do(convert):
    model, x = trained()
    packed = pack(model)
    with pytest.raises(TypeError, match="call packed.float\\(\\), and convert x instead"):
        convert(packed)(x)
    assert relative(logits(packed.float(), x), logits(model, x)) < 0.1  # what was rounded stays so
    assert relative(logits(pack(model), x.bfloat16()), logits(model, x)) < 0.1
