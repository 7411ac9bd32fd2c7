"""Passes of packed networks as flat lists of calls: the same numbers, and never those of another network."""

import copy
import pickle
import threading

import pytest
import torch
from deploy_tools import trained
from torch import nn

import empf
from empf.deploy import plan
from empf.deploy.layers import PackedNeuron, PackedNorm, PackedSynapse
from empf.deploy.lazy import plain
from empf.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
CONFIGS = [{}, {"spike_bits": 4}, {"seca": 2}, {"weights": "ternary"}, {"arch": "vgg_snn", "neuron": "mem_bn"}]


def network(**config) -> empf.PackedModel:
    return empf.pack(trained(**config)[0])


def images(n=1, seed=0, **config):
    x = trained(**config)[1]
    return x[..., 8 * seed : 8 * seed + n, :, :, :]


def call(packed, x, **keywords):
    packed.reset()
    return packed(x, **keywords)


def by_modules(packed, x):
    packed.reset()
    with torch.no_grad():
        found = plain(packed.net(plan.channels_last(x)))
    packed.reset()
    return found


def planned(packed, x=None) -> int:
    """How many plans there are after three calls."""
    for _ in range(3):
        call(packed, images() if x is None else x)
    return sum(past.plan is not None for past in packed._plans.of.values())


@pytest.fixture
def passes(monkeypatch):
    """How often a plan was called."""
    counted, run = [], plan.Plan.__call__
    monkeypatch.setattr(plan.Plan, "__call__", lambda self, x: counted.append(1) or run(self, x))
    return counted


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_the_third_call_has_the_numbers_of_the_modules(config, n, passes):
    packed = network(**config)
    assert planned(packed, images(n, **config)) == 1 and passes
    for seed in range(1, 4):
        x, before = images(n, seed, **config), len(passes)
        found = call(packed, x)
        assert len(passes) == before + 1
        assert torch.equal(found, by_modules(packed, x)) and not torch.equal(found[0], found[-1])


def test_a_large_batch_is_not_noted(monkeypatch):
    packed = network()
    monkeypatch.setattr(plan, "LARGEST", packed.numbers(images(2)))
    assert planned(packed, images(3)) == 0 and not packed._plans.of
    assert planned(packed, images(2)) == 1


def test_batches_take_turns_and_each_has_its_plan(passes):
    packed = network()
    for seed in range(4):
        for n in (1, 2):
            assert torch.equal(call(packed, images(n, seed)), by_modules(packed, images(n, seed)))
    assert len(packed._plans.of) == 2 and len(passes) > 3
    for n in range(1, 9):
        call(packed, images(n))
    assert len(packed._plans.of) == plan.MOST


def scale_of(packed):
    return packed.net.blocks[0].conv1.bn.gain


def load_other(packed):
    state = {name: t * 1.5 if t.is_floating_point() else t for name, t in packed.state_dict().items()}
    packed.load_state_dict(state)


def other_module(packed):
    packed.net.blocks[0].conv1.bn = PackedNorm(nn.BatchNorm2d(8))


def other_forward(packed):
    norm = packed.net.blocks[1].conv2.conv
    forward = norm.forward
    norm.forward = lambda x: plain(forward(x)) * 2


def hook(packed):
    packed.net.head.register_forward_hook(lambda module, args, out: out + 1)


def inner_hook(packed):
    packed.net.blocks[0].conv1.conv.register_forward_pre_hook(lambda module, args: (plain(args[0]) * 2,))


def other_tensor(packed):
    packed.net.blocks[0].conv1.neuron.threshold = packed.net.blocks[0].conv1.neuron.threshold * 2
    packed.net.blocks[0].conv1.neuron.forget()


def other_class(packed):
    packed.net.blocks[0].__class__ = type("Half", (type(packed.net.blocks[0]),), {"extra": 1})


CHANGES = [load_other, other_module, other_forward, hook, inner_hook, other_tensor]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_network_that_is_changed_is_not_the_one_that_was_noted(change):
    packed = network()
    assert planned(packed) == 1
    before = call(packed, images())
    change(packed)
    for _ in range(4):
        found = call(packed, images())
        assert not torch.equal(found, before) and torch.equal(found, by_modules(packed, images()))


def test_a_class_that_is_exchanged_or_changed_is_noticed(monkeypatch, passes):
    packed = network()
    planned(packed)
    count = len(passes)
    other_class(packed)
    call(packed, images())
    assert len(passes) == count
    packed = network()
    planned(packed)
    before, forward = call(packed, images()), PackedSynapse.forward
    monkeypatch.setattr(PackedSynapse, "forward", lambda self, x: plain(forward(self, x)) * 2)
    assert not torch.equal(call(packed, images()), before)


def test_a_global_hook_sees_every_module():
    packed, seen = network(), []
    planned(packed)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        call(packed, images())
    finally:
        handle.remove()
    assert sum(isinstance(module, PackedNeuron) for module in seen) > 10


def test_the_state_after_a_plan_is_that_after_the_modules():
    packed = network()
    planned(packed)
    call(packed, images())
    with pytest.raises(ValueError, match="reset"):
        packed(images())
    first = call(packed, images(), steps=1)
    both = torch.cat([first, packed(images(), steps=2)])
    torch.testing.assert_close(both, call(packed, images()), rtol=1e-5, atol=1e-5)


def test_another_network_around_packed_parts_has_no_plan():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.neuron = empf.BinaryLinear(8, 8), empf.EMPFNeuron(2)

        def forward(self, x):
            return self.neuron(self.layer(x)) * (2 if x.sum() > 0 else 1)

    packed, x = empf.pack(Own()), torch.ones(2, 1, 8)
    for _ in range(4):
        assert not torch.equal(call(packed, x), call(packed, -x))
    assert not packed._plans.of


def test_copies_note_for_themselves():
    packed = network()
    planned(packed)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert not other._plans.of
        load_other(other)
        assert not torch.equal(call(other, images()), call(packed, images()))


def test_modes_and_threads_of_the_caller(passes):
    packed = network()
    planned(packed)
    wanted, found = call(packed, images()), []
    with torch.inference_mode():
        assert torch.equal(call(packed, images()), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            in_bf16 = call(packed, images())
    torch.testing.assert_close(in_bf16, wanted, rtol=0.1, atol=0.1)

    def work(seed):
        for _ in range(5):
            found.append(torch.equal(call(packed, images(1, seed)), by_modules(copy.deepcopy(packed), images(1, seed))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [True] * 15 and torch.equal(call(packed, images()), wanted)


def test_a_call_that_was_not_noted_leaves_no_plan(monkeypatch):
    monkeypatch.setattr(plan.Recorder, "native", lambda self, *args: None)
    packed = network()
    assert planned(packed) == 0
    assert torch.equal(call(packed, images()), by_modules(packed, images()))
