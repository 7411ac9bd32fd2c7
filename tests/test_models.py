"""Networks: shapes, stems, the two orders of computation, state and errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import empf
from empf.models import ModelConfig, StepBatchNorm
from empf.neuron import EMPFNeuron, LIFNeuron

KINDS = [
    dict(),
    dict(neuron="mem_bn"),
    dict(parallel=0.5),
    dict(neuron="lif"),
    dict(seca=1),
    dict(seca=2, weights="ternary"),
    dict(spike_bits=4, weights="full"),
    dict(activation="softplus"),
    dict(shortcut="current"),
]


def small(**kwargs):
    """A network whose running statistics fit random images, so that its neurons fire in eval mode too."""
    torch.manual_seed(0)
    model = empf.resnet18(**{**dict(num_classes=5, in_channels=1, image_size=8, width=0.0625), **kwargs})
    with torch.no_grad():
        for _ in range(20):
            empf.reset(model)
            model(torch.randn(6, 1, 8, 8))
    empf.reset(model)
    return model


def test_the_test_network_fires():
    densities = empf.spike_account(small(), [(torch.randn(6, 1, 8, 8), None)])["density"]
    assert min(densities.values()) > 0.02


def neurons(model):
    return [m for m in model.modules() if isinstance(m, EMPFNeuron | LIFNeuron)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layer_by_layer_equals_step_by_step(kind):
    """Outputs, gradients and running statistics; in double precision, so that only rounding is left."""
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    weight = torch.randn(4, 6, 5, dtype=torch.float64)
    results = []
    for order in ("layers", "steps"):
        model = small(**kind).double()
        logits = model(x) if order == "layers" else torch.cat([model(x, steps=1) for _ in range(4)])
        (logits * weight).sum().backward()
        results.append((logits, [p.grad for p in model.parameters()], list(model.buffers())))
    for a, b in zip(*results, strict=True):
        for u, v in zip(a, b, strict=True):
            assert (u - v).abs().max() <= 1e-9 * (1 + v.abs().max())


@pytest.mark.parametrize("order", [[4], [1, 1, 1, 1], [3, 1], [1, 2, 1]])
def test_past_is_a_call_without_gradient(order):
    x = torch.randn(6, 1, 8, 8)
    model, other = small().eval(), small().eval()
    want = model(x)
    got = [other(x, steps=k) for k in order]
    assert torch.allclose(torch.cat(got), want, atol=1e-5)
    empf.reset(other)
    last = other(x, steps=1, past=3)
    assert torch.allclose(last[0], want[3], atol=1e-5)
    assert other.t == 4


def test_past_moves_the_running_statistics_like_steps():
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    model, other = small().double(), small().double()
    model(x, steps=1, past=2)
    with torch.no_grad():
        other(x, steps=2)
    other(x, steps=1)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_the_stem_of_a_static_image_runs_once():
    calls = []
    model = small()
    model.stem.conv.register_forward_hook(lambda m, i, o: calls.append(o.shape))
    model(torch.randn(6, 1, 8, 8), steps=1, past=3)
    assert calls == [(6, 4, 8, 8)]


def test_static_image_equals_repeated_frames():
    x = torch.randn(3, 1, 8, 8)
    model = small().eval()
    static = model(x)
    empf.reset(model)
    assert torch.allclose(model(x.expand(4, *x.shape)), static, atol=1e-5)


def test_events_whole_or_frame_by_frame():
    torch.manual_seed(0)
    x = torch.rand(3, 2, 2, 16, 16)
    model = empf.vgg_snn(num_classes=4, T=3, image_size=16, width=0.0625).eval()
    want = model(x)
    for frames in ([x[t : t + 1] for t in range(3)], [x] * 3):  # only the frame, or all frames: step t picks its own
        empf.reset(model)
        assert torch.allclose(torch.cat([model(f, steps=1) for f in frames]), want, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "size", "channels", "stem"),
    [("resnet18", 8, 1, 8), ("resnet18", 32, 3, 32), ("resnet34", 64, 3, 32), ("resnet19", 32, 3, 32),
     ("resnet18", 224, 3, 56), ("vgg_snn", 48, 2, 48)],
)  # fmt: skip
def test_architectures(arch, size, channels, stem):
    model = empf.build(
        ModelConfig(arch=arch, image_size=size, in_channels=channels, width=0.0625, T=2, num_classes=7)
    ).eval()
    shapes = []
    model.stem.register_forward_hook(lambda m, i, o: shapes.append(o.shape[-2:]))
    assert model(torch.rand(2, channels, size, size)).shape == (2, 2, 7)
    assert shapes == [(stem, stem)]


@pytest.mark.parametrize(
    ("arch", "convolutions", "count"),
    [("resnet18", 20, 16), ("resnet34", 36, 32), ("resnet19", 19, 18), ("vgg_snn", 8, 8)],
)
def test_depth(arch, convolutions, count):
    model = empf.build(ModelConfig(arch=arch, width=0.0625, in_channels=2, image_size=48))
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (len(found), len(neurons(model))) == (convolutions, count)


def test_resnet19_has_a_hidden_layer_of_256():
    assert empf.resnet19().hidden["linear"].weight.shape == (256, 512)


@pytest.mark.parametrize(("share", "want"), [(0, "." * 16), (0.5, ".P" * 8), (1, "P" * 16), (0.25, "...P" * 4)])
def test_parallel_share(share, want):
    found = "".join("P" if n.parallel else "." for n in neurons(small(parallel=share)))
    assert found == want


def test_first_convolution_and_last_layer_stay_full_precision():
    model = small()
    assert type(model.stem.conv) is nn.Conv2d and type(model.head) is nn.Linear


@pytest.mark.parametrize(
    ("weights", "granularity"), [("ternary", "layer"), ("ternary", "channel"), ("binary", "layer")]
)
def test_granularity_of_the_scales(weights, granularity):
    """Ternary weights have one size and threshold per layer where that is asked; binary ones one per channel."""
    model = empf.resnet19(weights=weights, granularity=granularity, width=0.0625, image_size=8)
    layers = [m for m in model.modules() if hasattr(m, "effective_weight")]
    assert len(layers) == 19
    for synapse in layers:
        size, latent = synapse.effective_weight().flatten(1), synapse.weight.detach().abs().flatten(1)
        kept = size != 0
        one = weights == "ternary" and granularity == "layer"
        over = (0, 1) if one else 1
        d = 0.7 * latent.mean(over, keepdim=True) if weights == "ternary" else torch.zeros(())
        assert torch.equal(kept, latent > d)
        scale = (latent * kept).sum(over, keepdim=True) / kept.sum(over, keepdim=True)
        torch.testing.assert_close(size.abs(), scale * kept)
        assert len(size[kept].abs().unique()) == (1 if one else len(size))


def test_parallel_neurons_of_mem_bn_networks_have_no_mem_bn():
    found = neurons(small(neuron="mem_bn", parallel=0.5))
    assert [n.mem_bn for n in found] == [True, False] * 8


@pytest.mark.parametrize(("skip", "reads"), [(False, "spikes"), (True, "spikes"), (False, "current")])
def test_block_by_hand(skip, reads):
    """One residual block with and without a change of shape, and SECA-II, against the formulas."""
    model = small(seca=2, T=1, shortcut=reads, seca_bias=reads == "current").eval()
    block = model.blocks[1] if skip else model.blocks[2]
    x = torch.randn(1, 3, 4, 8, 8)

    def bn(layer, i):
        return F.batch_norm(i, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)

    s = torch.relu(x[0] - 0.5)
    i1 = bn(block.conv1.bn, block.conv1.conv(s))
    i1 = block.conv1.seca(x[0] + i1 if skip else i1)  # (N C H W counts as one step)
    i2 = bn(block.conv2.bn, block.conv2.conv(torch.relu(i1 - 0.5)))
    i2 = block.conv2.seca(i1 + i2)
    read = s if reads == "spikes" else x[0]
    shortcut = x[0] if skip else bn(block.shortcut["bn"], block.shortcut["conv"](read))
    assert (block.conv1.seca.conv.bias is None) == (reads == "spikes")
    assert torch.allclose(block(x)[0], i2 + shortcut, atol=1e-5)


def test_step_batch_norm_statistics_are_per_step():
    bn = StepBatchNorm(3).double()
    x = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    y = bn(x)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t in range(2):
        pixels = x[t].transpose(0, 1).flatten(1)
        want = (x[t] - pixels.mean(1).view(3, 1, 1)) / (pixels.var(1, correction=0).view(3, 1, 1) + 1e-5).sqrt()
        assert (y[t] - want).abs().max() < 1e-12
        mean, var = 0.9 * mean + 0.1 * pixels.mean(1), 0.9 * var + 0.1 * pixels.var(1)
    assert (bn.running_mean - mean).abs().max() < 1e-12
    assert (bn.running_var - var).abs().max() < 1e-12


def test_step_batch_norm_repeat():
    bn, once = StepBatchNorm(2).double(), StepBatchNorm(2).double()
    x = torch.randn(1, 5, 2, 3, 3, dtype=torch.float64)
    once(x, repeat=3)
    bn(x.expand(3, -1, -1, -1, -1))
    assert (bn.running_mean - once.running_mean).abs().max() < 1e-12
    assert (bn.running_var - once.running_var).abs().max() < 1e-12


def test_frozen_norm():
    model = small(neuron="mem_bn")
    empf.freeze_norm(model)
    before = [b.clone() for b in model.buffers()]
    x = torch.randn(6, 1, 8, 8)
    trained = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    empf.reset(model)
    assert torch.equal(trained, model.eval()(x))


def test_a_network_must_say_how_it_computes():
    class Unfinished(empf.SpikingNetwork):
        pass

    with pytest.raises(TypeError, match="abstract method '?body'?"):
        Unfinished(ModelConfig())


def test_the_potential_is_neither_saved_nor_a_buffer():
    model = small()
    keys = set(model.state_dict())
    model(torch.randn(6, 1, 8, 8))
    assert set(model.state_dict()) == keys
    assert {name for name, _ in model.named_buffers()} == {k for k in keys if "running" in k}


# ---- errors


def test_going_past_T():
    model = small(T=2)
    x = torch.randn(2, 1, 8, 8)
    model(x)
    with pytest.raises(ValueError, match=r"after step 2 of T = 2: call empf\.reset\(model\)"):
        model(x)
    with pytest.raises(ValueError, match=r"after step 2 of T = 2: call empf\.reset\(model\)"):
        model(x, steps=1)
    empf.reset(model)
    with pytest.raises(ValueError, match=r"2 \+ 1 more steps asked after step 0 of T = 2"):
        model(x, steps=1, past=2)


def test_another_batch_size_without_reset():
    model = small()
    model(torch.randn(4, 1, 8, 8), steps=1)
    with pytest.raises(ValueError, match=r"empf\.reset\(model\) before a batch of another size"):
        model(torch.randn(3, 1, 8, 8), steps=1)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 9), (2, 1, 16, 16), (1, 8, 8), (1, 4, 2, 1, 8, 8)])
def test_wrong_input_shape(shape):
    with pytest.raises(ValueError, match=r"images \(N, 1, 8, 8\) or events \(T, N, \.\.\.\)"):
        small()(torch.randn(shape))


def test_wrong_number_of_frames():
    with pytest.raises(ValueError, match="4 steps to run with T = 4, but the input has 3 frames"):
        small()(torch.randn(3, 2, 1, 8, 8))


def test_vgg_needs_16_pixels():
    with pytest.raises(ValueError, match="at least 16x16, got 8"):
        empf.vgg_snn(image_size=8)


def test_hooks_on_layers_and_blocks_fire_with_tensors():
    for model, x, watched in (
        (empf.resnet18(width=0.125, image_size=32), torch.randn(4, 3, 32, 32), ["blocks.0", "blocks.2.conv1", "stem"]),
        (empf.vgg_snn(width=0.125, image_size=16, T=2), torch.randn(2, 4, 2, 16, 16), ["layers.1", "layers.5"]),
    ):
        seen = []
        for name in watched:
            module = model.get_submodule(name)
            module.register_forward_hook(
                lambda m, inputs, out, name=name, seen=seen: seen.append((name, inputs[0], out))
            )
        wanted = model(x, steps=1)
        wanted.square().sum().backward()
        assert sorted({name for name, _, _ in seen}) == sorted(watched)
        for _, given, out in seen:
            out = out if isinstance(out, tuple) else (out,)
            assert isinstance(given, torch.Tensor) and all(isinstance(o, torch.Tensor) for o in out)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating-point numbers, normalised, got torch.uint8"),
        (np.zeros((2, 3, 8, 8), np.float32), "got ndarray"),
        ([[1.0]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_another_kind_of_input(x, error):
    with pytest.raises(TypeError, match=error):
        empf.resnet18(width=0.0625, image_size=8)(x)


def test_steps_are_whole_numbers():
    with pytest.raises(TypeError, match="whole numbers, got 1.5 and 0"):
        empf.resnet18(width=0.0625, image_size=8)(torch.randn(1, 3, 8, 8), steps=1.5)


@pytest.mark.parametrize(
    ("arch", "size"), [("resnet18", (24, 40)), ("resnet18", (40, 64)), ("resnet19", [8, 16]), ("vgg_snn", (16, 48))]
)
def test_images_that_are_not_square(arch, size):
    model = getattr(empf, arch)(width=0.0625, in_channels=2, image_size=size, T=2).eval()
    x = torch.randn(3, 2, *size)
    logits = model(x)
    assert logits.shape == (2, 3, 10) and (model.stem.pool is not None) == (max(size) > 48 and arch != "vgg_snn")
    assert torch.allclose(empf.pack(model)(x), logits, atol=1e-5)
    empf.reset(model)
    with pytest.raises(ValueError, match=rf"images \(N, 2, {size[0]}, {size[1]}\)"):
        model(x.transpose(2, 3))
    empf.online_backward(model.train(), x, torch.arange(3), torch.nn.functional.cross_entropy, steps=[2])


def test_a_norm_with_its_own_forward_is_called():
    class Louder(empf.StepBatchNorm):
        def forward(self, x, repeat=1):
            return 2 * super().forward(x, repeat)

    model = empf.resnet18(width=0.0625, image_size=8, T=1).eval()
    x = torch.randn(2, 3, 8, 8)
    norm = model.blocks[7].conv2.bn  # the head reads it
    torch.nn.init.ones_(norm.bias)
    before = model(x)
    norm.__class__ = Louder
    empf.reset(model)
    after = model(x)
    norm.__class__ = empf.StepBatchNorm
    with torch.no_grad():
        norm.weight.mul_(2), norm.bias.mul_(2)
    empf.reset(model)
    assert torch.allclose(after, model(x), atol=1e-6) and not torch.equal(after, before)


def test_a_builder_has_its_architecture():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'arch'"):
        empf.resnet18(arch="resnet34", width=0.0625)
