"""Activations made again for the backward pass: same gradients, half the memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import empf
from empf import layer
from empf.diagnose.memory import Storages, saved_for_backward
from empf.kernels import dispatch, neuron_cpu
from empf.models import Block, Builder, ModelConfig
from empf.neuron import EMPFNeuron

KINDS = [
    dict(),
    dict(neuron="mem_bn"),
    dict(parallel=0.5),
    dict(spike_bits=4),
    dict(spike_bits=2, spike_gradient="clipped"),
    dict(neuron="mem_bn", parallel=0.5, spike_bits=2, weights="ternary"),
    dict(seca=2, weights="ternary"),
    dict(activation="softplus"),
    dict(neuron="lif"),
    dict(arch="resnet34"),  # sums of more than four currents
    dict(arch="resnet19"),
    dict(arch="vgg_snn", in_channels=2, image_size=16),
    dict(shortcut="current", weights="ternary", granularity="layer"),
    dict(shortcut="current", neuron="lif"),
]


@pytest.fixture(autouse=True)
def small_too(monkeypatch):
    """Small activations, for the sake of short tests, are made again as well."""
    monkeypatch.setattr(layer, "SMALL", 0)


def network(dtype=torch.float32, layout=torch.channels_last, **kind):
    torch.manual_seed(0)
    settings = dict(num_classes=5, in_channels=1, image_size=8, width=0.0625) | kind
    return empf.build(ModelConfig(**settings)).to(dtype=dtype, memory_format=layout)


def images(model, events=False):
    c = model.config
    shape = (6, c.in_channels, c.image_size, c.image_size)
    x = torch.randn((c.T, *shape) if events else shape, generator=torch.Generator().manual_seed(1))
    return x.to(model.head.weight.dtype) + 0.5


def step(model, x, *, made_again, steps=1, past=2):
    """(logits, gradients, buffers) of two batches."""
    target = torch.arange(6) % 5
    with layer.enabled(made_again):
        for _ in range(2):
            empf.reset(model)
            logits = model(x, steps=steps, past=past)
            F.cross_entropy(logits.mean(0), target).backward()
    return logits, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def assert_same(got, want, bound):
    """Largest error relative to the largest number, tensor by tensor; sums that cancel count by their terms."""
    (logits, gradients, buffers), (w_logits, w_gradients, w_buffers) = got, want
    assert (logits - w_logits).abs().max() <= bound * w_logits.abs().max()
    typical = torch.stack([g.abs().max() for g in w_gradients.values() if g is not None]).median()
    assert typical > 1e-4
    for name, w in w_gradients.items():
        if w is None:
            assert gradients[name] is None, name
        else:
            assert (gradients[name] - w).abs().max() <= bound * (w.abs().max() + typical), name
    for name, w in w_buffers.items():
        assert (buffers[name] - w).abs().max() <= bound * (1 + w.abs().max()), name


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients(kind, past):
    layout = torch.channels_last if past else torch.contiguous_format
    results = []
    for made_again in (True, False):
        model = network(torch.float64, layout, **kind)
        results.append(step(model, images(model), made_again=made_again, past=past))
    assert_same(*results, 1e-10)


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_gradients_in_single_precision(kind):
    """As near to those in double precision as plain modules come: what differs is rounding."""

    def gradient(made_again, dtype):
        model = network(dtype, **kind)
        _, gradients, _ = step(model, images(model), made_again=made_again)
        return torch.cat([g.double().flatten() for g in gradients.values()])

    exact = gradient(False, torch.float64)
    error, plain_error = ((gradient(f, torch.float32) - exact).norm() / exact.norm() for f in (True, False))
    assert error < 2e-5 and error < 2 * plain_error


def test_layouts_that_differ_from_layer_to_layer():
    results = []
    for made_again in (True, False):
        model = network(torch.float64, in_channels=3)
        for conv in (model.stem.conv, model.blocks[1].conv2.conv, model.blocks[2].shortcut["conv"]):
            conv.register_forward_hook(lambda m, x, y: y.contiguous())
        results.append(step(model, images(model), made_again=made_again))
    assert_same(*results, 1e-10)


def test_a_shortcut_that_reads_the_current():
    """A block in training against its formulas, in torch's own operations: output and gradients."""
    torch.manual_seed(0)
    block = Block(Builder(ModelConfig(shortcut="current", weights="full", T=1)), 4, 8, stride=2).double()
    for norm in (block.conv1.bn, block.conv2.bn, block.shortcut["bn"]):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(1, 6, 4, 8, 8, dtype=torch.float64, requires_grad=True)

    def bn(norm, i):
        return F.batch_norm(i, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)

    i1 = bn(block.conv1.bn, F.conv2d(F.relu(x[0] - 0.5), block.conv1.conv.weight, None, 2, 1))
    i2 = bn(block.conv2.bn, F.conv2d(F.relu(i1 - 0.5), block.conv2.conv.weight, None, 1, 1))
    wanted = i2 + bn(block.shortcut["bn"], F.conv2d(x[0], block.shortcut["conv"].weight, None, 2))
    parameters = [x, *(p for name, p in block.named_parameters() if "neuron" not in name)]
    want = torch.autograd.grad(wanted.square().mul(torch.arange(8.0).view(8, 1, 1)).sum(), parameters)
    got = block(x)
    found = torch.autograd.grad(got[0].square().mul(torch.arange(8.0).view(8, 1, 1)).sum(), parameters)
    for a, b in zip((got[0], *found), (wanted, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_events():
    results = []
    for made_again in (True, False):
        model = network(torch.float64, arch="vgg_snn", in_channels=2, image_size=16)
        results.append(step(model, images(model, events=True), made_again=made_again))
    assert_same(*results, 1e-10)


def test_frames_of_the_past_are_not_kept():
    model = network(arch="vgg_snn", in_channels=2, image_size=16)
    one, three = (saved_for_backward(model, images(model, events=True)[: past + 1], past=past) for past in (1, 3))
    assert one == three


@pytest.mark.parametrize("learning", ["every", "stbp"])
@pytest.mark.parametrize("kind", [dict(), dict(neuron="mem_bn", parallel=0.5)], ids=str)
def test_other_ways_of_learning(learning, kind):
    results = []
    for made_again in (True, False):
        model = network(torch.float64, **kind)
        with layer.enabled(made_again):
            _, logits = empf.online_backward(
                model, images(model), torch.arange(6) % 5, F.cross_entropy, learning=learning
            )
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((logits, gradients, dict(model.named_buffers())))
    assert_same(*results, 1e-10)


@pytest.mark.parametrize("kind", [*KINDS[:5], dict(arch="resnet34")], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_spikes_made_again_are_the_same_bits(kind, layout, monkeypatch):
    monkeypatch.setattr("empf.kernels.neuron_cpu.PIECE", 500)  # many pieces
    model = network(torch.float32, layout, **kind)
    neurons = [m for m in model.modules() if isinstance(m, EMPFNeuron)]
    seen, made = [], []
    again = layer.neuron_again

    def noted(*args):
        made.append(again(*args)[0].clone())
        return again(*args)

    monkeypatch.setattr(layer, "neuron_again", noted)
    model(images(model), steps=2)
    for neuron in neurons:
        neuron.observer = seen.append
    model(images(model), steps=1)[0].square().sum().backward()
    assert len(seen) == len(made) == len(neurons)
    for spikes, once_more in zip(seen, reversed(made), strict=True):
        assert torch.equal(once_more, spikes) and once_more.stride() == spikes.stride() and spikes.any()


@pytest.mark.parametrize("kind", [dict(), dict(neuron="mem_bn"), dict(spike_bits=4), dict(parallel=0.5)], ids=str)
def test_half_the_memory(kind):
    model = network(image_size=32, in_channels=3, **kind)
    x = images(model)
    found = {}
    for made_again in (True, False):
        with layer.enabled(made_again):
            found[made_again] = saved_for_backward(model, x, past=2)
    assert found[True]["bytes"] <= 0.5 * found[False]["bytes"]
    assert found[True]["potentials"] == found[False]["potentials"]


def test_memory_is_counted():
    """Of the first block, plain, by hand: v, s, s stacked and y of each convolution; of the rest, nothing changes."""
    model = network()
    model.blocks, model.head = model.blocks[:1], torch.nn.Linear(4, 5)
    size = 6 * 4 * 8 * 8 * 4  # bytes of an activation; the input of the stem's norm is one more
    with layer.enabled(False):
        plain = saved_for_backward(model, images(model), past=1)
    again = saved_for_backward(model, images(model), past=1)
    assert 9 * size <= plain["bytes"] < 9.5 * size and 4 * size <= again["bytes"] < 4.5 * size
    assert plain["potentials"] == again["potentials"] == 2 * size


def test_backward_twice():
    model = network(torch.float64)
    x = images(model)
    loss = model(x, steps=1)[0].square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.allclose(p.grad, 2 * g, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_backward_frees_the_memory(kind):
    model = network(**kind)
    x = images(model)
    with Storages() as made:
        loss = model(x, steps=1, past=1)[0].square().sum()
    own = {StorageWeakRef(t.untyped_storage()) for t in [*model.parameters(), *model.buffers()]}
    before = len(made.alive().keys() - own)
    loss.backward()
    empf.reset(model)
    assert before > 50 and len(made.alive().keys() - own) <= 2  # the loss, the logits


def test_hooks_see_the_current():
    """Where someone watches a neuron, its input is the current, not what the batch norm is still to be fed."""
    seen = []
    for made_again in (True, False):
        model = network(torch.float64)
        model.blocks[1].conv2.neuron.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
        with layer.enabled(made_again):
            model(images(model), steps=1)
    assert torch.allclose(*seen, rtol=1e-12, atol=1e-12)


def test_part_of_the_gradient():
    """Of the input alone, or of one layer alone: convolutions and neurons need not both be asked."""
    wanted = []
    for made_again in (True, False):
        model = network(torch.float64)
        x = images(model).requires_grad_()
        with layer.enabled(made_again):
            loss = model(x, steps=1)[0].square().sum()
            one = torch.autograd.grad(loss, model.blocks[3].conv1.conv.weight, retain_graph=True)
            two = torch.autograd.grad(loss, [x, model.blocks[5].conv2.neuron.threshold_logit])
        wanted.append([*one, *two])
    for a, b in zip(*wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_mixed_precision():
    gradients, saved = {}, {}
    for kind in ("again", "plain", "exact"):
        model = network(width=0.125, image_size=16)
        x = images(model)
        with layer.enabled(kind == "again"), torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
            saved[kind] = saved_for_backward(model, x)["bytes"]
            loss = F.cross_entropy(model(x, steps=1, past=1)[0], torch.arange(6) % 5)
        loss.backward()
        gradients[kind] = torch.cat([p.grad.flatten() for p in model.parameters()])
    error, plain_error = ((gradients[k] - gradients["exact"]).norm() for k in ("again", "plain"))
    assert error < 1.2 * plain_error < 0.5 * gradients["exact"].norm()
    assert saved["again"] < 0.6 * saved["plain"]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", [dict(), dict(mem_bn=True), dict(parallel=True), dict(spike_bits=2)], ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 5)])
def test_neuron_alone(kind, per_channel, shape):
    """Every parameter of every kind, with parameters per step or per channel, at the second of two steps."""
    results = []
    for made_again in (True, False):
        torch.manual_seed(0)
        neuron = EMPFNeuron(2, 3, per_channel=per_channel, **kind).double()
        for p in neuron.parameters():
            torch.nn.init.normal_(p)
        past, x = torch.randn(2, 1, *shape, dtype=torch.float64) + 0.5
        x.requires_grad_()
        with layer.enabled(made_again):
            with torch.no_grad():
                neuron(past)
            spikes = neuron(x)
            gradients = torch.autograd.grad((spikes.sin() * spikes).sum(), [x, *neuron.parameters()])
        results.append([spikes, *gradients, *([] if neuron.v is None else [neuron.v])])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and want.any()
        assert (got - want).abs().max() <= 1e-12 * (1 + want.abs().max())


def test_enabled_goes_back():
    x = torch.zeros(1, 2)
    with layer.enabled(False):
        with layer.enabled(True):
            assert layer.active(x)
        assert not layer.active(x)
    assert layer.active(x)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "kind",
    [dict(), dict(neuron="mem_bn"), dict(parallel=0.5, spike_bits=4), dict(neuron="mem_bn", shortcut="current")],
    ids=str,
)
def test_on_kernels(kind, kernels_on, device):
    """Two residual blocks with the Triton kernels against plain torch: currents, gradients, statistics, launches."""
    results = []
    for mode in ("on", "off"):
        dispatch.set_backend(mode)
        torch.manual_seed(0)
        make = Builder(ModelConfig(T=2, width=0.0625, **kind))
        blocks = torch.nn.Sequential(Block(make, 4, 8, 2), Block(make, 8, 8, 1)).to(device)
        x = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        with layer.enabled(mode == "on"):
            with torch.no_grad():
                blocks(x[:1].detach())
            out = blocks(x[1:])
            out.square().sum().backward()
        gradients = {n: p.grad for n, p in blocks.named_parameters()} | {"x": x.grad}
        results.append((out, gradients, dict(blocks.named_buffers())))
        if mode == "on":
            launches = dict(kernels_on)
    assert_same(*results, 3e-5)
    first = "mem_bn_neuron" if kind.get("neuron") else "neuron_update"
    second = "mem_bn_neuron" if kind.get("neuron") else "bn_neuron"
    for name in (first, second, f"{second}_again", f"{first}_backward", f"{second}_backward"):
        assert launches[name] > 0, launches


@pytest.mark.kernel
@pytest.mark.parametrize("mem_bn", [False, True])
@pytest.mark.parametrize("engine", ["definition", "cpu", "kernels"])
@pytest.mark.parametrize("gradient", ["identity", "clipped"])
def test_gradient_of_a_spike_above_the_largest_code(engine, mem_bn, gradient, kernels_on, device, monkeypatch):
    """The quantiser passes gradients on unchanged, the threshold alone stops them; clipped, the largest code too."""
    calls, backward = [], neuron_cpu.backward
    monkeypatch.setattr(neuron_cpu, "backward", lambda *args: calls.append(args) or backward(*args))
    dispatch.set_backend("on" if engine == "kernels" else "off")
    options = {"mem_bn": mem_bn, "alpha": 1.0, "beta": 0.0}  # mh = m, with Mem-BN too
    neuron = EMPFNeuron(1, 2, **options, spike_bits=1, spike_gradient=gradient).to(device)
    current = torch.tensor([0.25, 0.53125, 0.625, 0.75, 1.0, 9.0], device=device)  # s = mh - 1/2, codes 0 and 1/4
    current = current.view(1, 3, 2).requires_grad_()
    with layer.enabled(engine != "definition"):
        spikes = neuron(current)
    assert spikes.flatten().tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]
    spikes.sum().backward()
    kept = [0, 1, 1, 1, 0, 0] if gradient == "clipped" else [0, 1, 1, 1, 1, 1]
    assert current.grad.flatten().tolist() == kept
    assert neuron.threshold_logit.grad.tolist() == [-sum(kept) / 4]  # the slope of the sigmoid at 0 is 1/4
    assert (len(calls) == 1, len(kernels_on) > 0) == (engine == "cpu", engine == "kernels")


@pytest.mark.kernel
def test_kernels_with_gradient_through_time(kernels_on, device):
    results = []
    for mode in ("on", "off"):
        dispatch.set_backend(mode)
        torch.manual_seed(0)
        make = Builder(ModelConfig(T=2, width=0.0625))
        block = Block(make, 4, 4, 1).to(device)
        empf.set_online(block, False)
        x = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        out = block(x)
        out.square().sum().backward()
        gradients = {n: p.grad for n, p in block.named_parameters()} | {"x": x.grad}
        results.append((out, gradients, dict(block.named_buffers())))
    assert_same(*results, 3e-5)
    assert kernels_on["bn_neuron"] == 1 and kernels_on["neuron_update"] == 1


def test_small_activations_are_kept(monkeypatch):
    monkeypatch.undo()
    model = network()
    with layer.enabled(False):
        kept = saved_for_backward(model, images(model))
    assert saved_for_backward(model, images(model)) == kept
