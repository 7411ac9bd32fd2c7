"""Synapses without latent weights: the same network and gradients, the update by its formula, memory, checkpoints."""

import copy
import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_tools import resume, run_train, trace

import empf
from empf import layer, runs
from empf.diagnose.memory import saved_for_backward
from empf.kernels.flip import signs_of
from empf.training.config import TrainConfig
from empf.training.fine_tuning import freeze
from empf.training.flip import FLIPPED, Flipped, Flips, convert
from empf.training.optimizers import flips_of, make_optimizer


def pair(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A network with latent weights, and the same one without."""
    other = copy.deepcopy(net)
    convert(other)
    return net, other


def gradients(net: nn.Module, learning: str = "random", steps=(2,), T: int = 2) -> dict[str, torch.Tensor]:
    """By name; those of magnitudes in the shape of the weight, under its name."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.arange(8) % 5
    steps = list(steps) if learning == "random" else None
    empf.online_backward(net, x, y, F.cross_entropy, learning=learning, steps=steps)
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {
        n.replace("magnitude", "weight"): g.movedim(-1, 1) if n.endswith("magnitude") else g for n, g in found.items()
    }


@pytest.mark.parametrize("made_again", [True, False])
@pytest.mark.parametrize("learning", ["random", "stbp"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet19"])
def test_same_logits_and_gradients_as_with_latent_weights(arch, learning, made_again, monkeypatch):
    """To the bit, where the layer makes its spikes again and where it does not; no latent weight is beyond 1 here."""
    monkeypatch.setattr(layer, "SMALL", 0)
    net = empf.build(empf.ModelConfig(arch=arch, num_classes=5, image_size=16, width=0.125, T=2)).to(
        memory_format=torch.channels_last
    )
    latent, flipped = pair(net)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert flipped(x).equal(latent(x))
    with layer.enabled(made_again):
        wanted, found = gradients(latent, learning), gradients(flipped, learning)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].equal(wanted[name]), name
    assert sum(isinstance(m, Flipped) for m in flipped.modules()) == 19


SYNAPSES = {
    "conv2d": (partial(empf.BinaryConv2d, 4, 6, 3, stride=2, padding=1, groups=2, bias=True), (5, 4, 7, 6)),
    "conv2d 1x1": (partial(empf.BinaryConv2d, 4, 6, 1, stride=2, granularity="layer"), (5, 4, 7, 6)),
    "conv1d": (partial(empf.BinaryConv1d, 4, 6, 3, dilation=2, padding=1, bias=True), (5, 4, 9)),
    "linear": (partial(empf.BinaryLinear, 7, 6, bias=True), (5, 3, 7)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SYNAPSES)
def test_each_kind_of_synapse(name, autocast):
    make, shape = SYNAPSES[name]
    latent, flipped = pair(nn.Sequential(make()))
    x = torch.randn(shape)
    results = []
    for net in (latent, flipped):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = net(inputs)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        (y.float() * torch.arange(y.numel()).view(y.shape)).sum().backward()
        d_w = net[0].weight.grad if net is latent else net[0].magnitude.grad.movedim(-1, 1)
        results.append((y, inputs.grad, d_w, None if net[0].bias is None else net[0].bias.grad))
    for wanted, found in zip(*results, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-5)
    with torch.no_grad():
        assert flipped[0].weight.equal(latent[0].effective_weight()) and not hasattr(latent[0], "magnitude")


def line(weights: int = 40, bias: bool = False, **options) -> tuple[nn.Module, Flips]:
    net = nn.Sequential(empf.BinaryLinear(weights, 1, bias))
    return net, Flips(net, **{"lr": 0.1, **options})


def learn(net: nn.Module, grad: torch.Tensor) -> None:
    """A backward pass in which the weight of a `line` has this gradient."""
    net(grad[None]).sum().backward()


@pytest.mark.parametrize("adaptive", [True, False])
def test_update_by_the_formula(adaptive):
    """Momentum, threshold with its mean square and the schedule; the first update knows no mean square, flips none."""
    torch.manual_seed(0)
    net, flips = line(300, rate=0.25, threshold=0.2, adaptive=adaptive, momentum_bits=16)
    w = net[0].weight.sign().double().flatten()
    m, square, flipped = torch.zeros(300, dtype=torch.float64), 0.0, []
    for lr in (0.1, 0.1, 0.05, 0.1, 0.0, 0.1):
        flips.lr, g = lr, torch.randn(300)
        m = 0.75 * m + 0.25 * g
        flip = w * m > (0.2 * square**0.5 * 0.1 / lr if lr and square else float("inf"))
        w, m = torch.where(flip, -w, w), torch.where(flip, 0, m).bfloat16().double()
        new = g.double().square().mean().item()
        square = new if not square else 0.75 * square + 0.25 * new if adaptive else square
        learn(net, g)
        assert net[0].weight.sign().double().flatten().equal(w) and net[0].magnitude.grad is None
        torch.testing.assert_close(flips.states["0"]["momentum"].double(), m, rtol=2**-7, atol=1e-6)
        assert flips.states["0"]["square"].item() == pytest.approx(square, rel=1e-6)
        flipped.append(int(flip.sum()))
    assert flipped[0] == flipped[4] == 0 and min(flipped[1:4] + flipped[5:]) > 0 and flipped[2] < flipped[1]


def test_passes_that_are_gathered_are_one_with_the_sum():
    """Of gradients whose momenta are exact in bf16. Between them nothing flips: the weights of an update are one."""
    torch.manual_seed(0)
    (one, at_once), (other, gathered) = (line(64, rate=0.5, threshold=1.0, momentum_bits=16) for _ in range(2))
    other.load_state_dict(one.state_dict())
    for k in range(4):
        parts = torch.randint(-3, 4, (3, 64)).float()
        before = one[0].weight
        learn(one, parts.sum(0))
        with gathered.gathering():
            for part in parts[:2]:
                learn(other, part)
        assert other[0].weight.equal(before)
        learn(other, parts[2])
        assert other[0].weight.equal(one[0].weight) and before.equal(one[0].weight) == (k == 0)
        assert gathered.states["0"]["momentum"].equal(at_once.states["0"]["momentum"])
        if k == 0:  # as if the passes were independent
            assert gathered.states["0"]["square"].item() == pytest.approx(parts.square().mean(1).sum().item())
        at_once.states["0"]["square"].fill_(1.0)
        gathered.states["0"]["square"].fill_(1.0)


def test_gathering_enters_the_other_context_and_ends_with_an_error():
    entered = []

    class Other(nullcontext):
        def __enter__(self):
            entered.append(self)

    flips = line()[1]
    with pytest.raises(ZeroDivisionError), flips.gathering(Other), flips.gathering():
        assert not flips.last and len(entered) == 1
        raise ZeroDivisionError
    assert flips.last


def test_one_gradient_is_alive_and_no_weight_is_kept(monkeypatch):
    """In the backward pass of a network whose small last stages autograd runs, and whose large ones the layer."""
    net = empf.resnet18(num_classes=5, image_size=16, width=0.125, T=2)
    flips = Flips(net, lr=0.1, rate=0.1, threshold=0.01)
    monkeypatch.setattr(layer, "SMALL", 8 * 32 * 8 * 8)
    alive = []

    def grads(_):
        alive.append(sum(p.grad is not None for p in flips.parameters))

    for parameter in flips.parameters:
        parameter.register_post_accumulate_grad_hook(grads)
    before = {name: m.bits.clone() for name, m in flips.synapses.items()}
    for _ in range(2):
        gradients(net)
    assert len(alive) == 38 and max(alive) <= 1  # one that comes with another of its layer
    assert all(p.grad is None for p in flips.parameters)
    assert all(not m.bits.equal(before[name]) for name, m in flips.synapses.items())
    counted = saved_for_backward(net, torch.randn(8, 3, 16, 16), past=1)
    assert counted["effective_weights"] == 0
    held = sum(p.untyped_storage().nbytes() for p in flips.parameters)
    assert held == 4 * sum(m.out_channels for m in flips.synapses.values())


def test_everything_but_activations_of_a_resnet18_is_25_mb():
    """135 MB with latent weights, gradients and momentum; 45 of effective weights. `diagnose --memory` counts it."""
    net = empf.resnet18(num_classes=100)
    flips = Flips(net, lr=0.1)
    rest = 3 * 4 * sum(p.numel() for p in net.parameters() if p not in flips)
    counted = flips.memory()
    assert counted["gradients"] == 4 * 512 * 512 * 9
    assert rest + sum(counted.values()) <= 25e6
    weights = sum(p.numel() for p in flips.parameters)
    assert counted["optimizer"] == pytest.approx(weights, rel=0.01)  # bytes
    assert counted["parameters"] == pytest.approx(weights / 8, rel=0.02)
    sixteen = Flips(empf.resnet18(width=0.125), lr=0.1, momentum_bits=16)
    assert sixteen.memory()["optimizer"] == pytest.approx(2 * sum(p.numel() for p in sixteen.parameters), rel=0.01)


def test_checkpoints_are_those_of_latent_weights():
    """The weights +-a stand in them: such a network has the logits of this one, and so has the packed one."""
    net = empf.resnet18(num_classes=5, image_size=16, width=0.125, T=2)
    names = list(net.state_dict())
    flips, plain = Flips(net, lr=0.1), copy.deepcopy(net)
    for _ in range(3):
        gradients(net)
    state = net.state_dict()
    assert list(state) == names
    latent = empf.build(net.config)
    latent.load_state_dict(state)
    plain.load_state_dict(state)
    x, nets = torch.randn(4, 3, 16, 16), [net.eval(), plain.eval(), latent.eval(), empf.pack(net)]
    empf.reset(net)
    with torch.no_grad():
        logits = [each(x) for each in nets]
    assert logits[1].equal(logits[0]) and set(map(type, plain.modules())) == set(map(type, net.modules()))
    for found in logits[2:]:
        torch.testing.assert_close(found, logits[0], rtol=1e-4, atol=1e-5)
    assert flips.load_state_dict(copy.deepcopy(flips.state_dict())) is None
    wrong = {**state, "blocks.0.conv1.conv.weight": state["stem.conv.weight"]}
    with pytest.raises(RuntimeError, match=r"blocks.0.conv1.conv.weight has shape \(8, 3, 3, 3\), here \(8, 8, 3, 3\)"):
        plain.load_state_dict(wrong)
    del state["blocks.0.conv1.conv.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*blocks.0.conv1.conv.weight"):
        plain.load_state_dict(state)


def test_latent_weights_that_are_loaded_become_bits():
    latent, flipped = pair(nn.Sequential(empf.BinaryConv2d(4, 6, 3, bias=True)))
    with torch.no_grad():
        latent[0].weight.copy_(torch.randn_like(latent[0].weight))
        latent[0].bias.fill_(3.0)
    flipped.load_state_dict(latent.state_dict())
    assert flipped[0].weight.equal(latent[0].effective_weight()) and flipped[0].bias.eq(3.0).all()


def test_the_rest_learns_by_sgd_and_frozen_synapses_stay():
    net = empf.build(empf.ModelConfig(arch="resnet19", num_classes=5, image_size=16, width=0.125, T=2))
    frozen = freeze(net, "blocks.0.*")
    notes: list[str] = []
    config = TrainConfig(optimizer="flip", lr=0.1)
    flips = flips_of(net, config, notes)
    optimizer = make_optimizer(net, config)
    theirs = [p for group in optimizer.param_groups for p in group["params"]]
    everything = set(net.parameters())
    kept = {p for name, p in net.named_parameters() if name.replace("magnitude", "weight") in frozen}
    assert set(theirs) | set(flips.parameters) | kept == everything
    assert len(theirs) + len(flips.parameters) + len(kept) == len(everything)
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        gradients(net)
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in net.state_dict().items() if not tensor.equal(before[name])}
    assert changed.isdisjoint(frozen) and {"head.weight", "hidden.linear.weight", "stem.conv.weight"} <= changed
    assert "hold 1 bit and 8 bits of momentum; weight decay is for the other parameters" in notes[0]
    assert flips_of(net, TrainConfig(), notes) is None and len(notes) == 1


def test_biases_of_synapses_learn_by_sgd():
    net, flips = line(bias=True)
    optimizer = make_optimizer(net, TrainConfig(optimizer="flip", lr=0.1))
    assert [p for group in optimizer.param_groups for p in group["params"]] == [net[0].bias]


def test_flips_live_as_long_as_their_network():
    """Also where nobody else keeps them; a copy of the network is flipped by nobody; and nothing is left in the end."""
    net = nn.Sequential(empf.BinaryLinear(64, 1))
    alive = weakref.ref(Flips(net, lr=0.1, threshold=0.0))
    gc.collect()
    before, copied = net[0].weight, copy.deepcopy(net)
    for each in (net, net, copied):
        learn(each, torch.ones(64))
    assert not net[0].weight.equal(before) and copied[0].weight.equal(before)
    assert copied[0].magnitude.grad is not None and net[0].magnitude.grad is None
    del net, before, each
    gc.collect()
    assert alive() is None


def test_what_cannot_flip_is_said():
    with pytest.raises(ValueError, match="only binary synapses flip, and 0 is ternary"):
        Flips(nn.Sequential(empf.BinaryLinear(3, 2, kind="ternary")), lr=0.1)
    with pytest.raises(ValueError, match="only binary synapses flip, and the network has none"):
        Flips(nn.Sequential(nn.Linear(3, 2)), lr=0.1)
    for wrong in (dict(rate=0.0), dict(rate=1.5), dict(threshold=-1.0), dict(momentum_bits=4)):
        with pytest.raises(ValueError, match="rate must lie in"):
            line(**wrong)
    assert set(FLIPPED) == {empf.BinaryConv2d, empf.BinaryConv1d, empf.BinaryLinear}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (dict(weights="ternary"), "weights ternary: only binary ones flip"),
        (dict(weights="full"), "weights full"),
        (dict(ema=0.9), "ema 0.9: the average of bits"),
        (dict(cuda_graphs=True), "cuda_graphs"),
        (dict(grad_compression="powersgd"), "grad_compression powersgd"),
        (dict(flip_rate=0.0), "flip_rate must lie in"),
        (dict(flip_threshold=-0.1), "flip_threshold be at least 0"),
        (dict(flip_bits=4), "flip_bits must be one of 8, 16"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_with_it(flags, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**{"optimizer": "flip", **flags})


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--learning", "every", "--accumulate", "2", "--no-flip-adaptive", "--flip-bits", "16"),
    ],
    ids=str,
)
def test_training_continues_exactly(flags, tmp_path, capsys):
    """Stopped between updates and within an epoch: bits, momenta and mean squares as if it had not been."""
    flags = ("--optimizer", "flip", "--lr", "0.05", *flags)
    run_train(*flags, "--output-dir", tmp_path / "whole")
    run_train(*flags, "--output-dir", tmp_path / "stopped", "--max-steps", "2")
    state = runs.load_state(tmp_path / "stopped")
    assert state["at"]["batch"] or "accumulate" in str(flags)
    assert all(s["momentum"].any() for s in state["flips"].values())
    resume(tmp_path / "stopped")
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")
    found, wanted = (runs.load_state(tmp_path / name)["flips"] for name in ("stopped", "whole"))
    assert found.keys() == wanted.keys()
    assert all(found[name][part].equal(wanted[name][part]) for name in wanted for part in wanted[name])
    assert "hold 1 bit and" in capsys.readouterr().out
    model = empf.load(tmp_path / "whole")
    assert {len(row.unique()) for row in model.blocks[0].conv1.conv.weight.flatten(1).abs()} == {1}


def test_a_run_with_latent_weights_is_gone_on_with_from_its_signs(tmp_path, capsys):
    """And a checkpoint without momenta is refused."""
    run_train("--epochs", "1", "--output-dir", tmp_path / "latent")
    source = empf.load(tmp_path / "latent")
    flags = ("--optimizer", "flip", "--init-from", tmp_path / "latent", "--flip-threshold", "1e9")
    run_train(*flags, "--output-dir", tmp_path / "bits", "--max-steps", "1")
    state = runs.load_state(tmp_path / "bits")
    conv = source.blocks[1].conv2.conv
    assert state["model"]["blocks.1.conv2.conv.weight"].equal(conv.effective_weight())
    state["flips"] = None
    runs.save_state(tmp_path / "bits", state)
    with pytest.raises(SystemExit, match="state.pt is damaged .flips"):
        resume(tmp_path / "bits")


def test_signs_of_a_layer_lie_channels_last():
    """As documented: the bits are those of the weight with its channels last."""
    _, net = pair(nn.Sequential(empf.BinaryConv2d(3, 2, 3)))
    m = net[0]
    signs = signs_of(m.bits, m.magnitude.numel()).view(2, 3, 3, 3)
    assert m.magnitude.shape == (2, 3, 3, 3) and m.weight.sign().movedim(1, -1).equal(signs)
    assert m.weight.is_contiguous(memory_format=torch.channels_last)
