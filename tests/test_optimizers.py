"""Muon: its directions against the singular value decomposition, its update against the formulas, who gets it."""

import pytest
import torch
from torch import nn

import empf
from empf.synapse import QuantizedWeight
from empf.training.config import TrainConfig
from empf.training.optimizers import Muon, make_optimizer, orthogonal

SHAPES = [(16, 8, 3, 3), (32, 16, 1, 1), (24, 24), (5, 64), (1, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_those_of_the_nearest_orthogonal_matrix(shape):
    torch.manual_seed(0)
    g = 1e-3 * torch.randn(shape, dtype=torch.float64)
    found = orthogonal(g)
    u, _, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
    along = u.T @ found.flatten(1) @ vh.T  # diagonal: only the lengths of the singular directions are approximate
    lengths = along.diagonal()
    assert (along - lengths.diag()).abs().max() < 1e-6
    assert lengths.min() > 0.6 and lengths.max() < 1.25
    torch.testing.assert_close(orthogonal(1000 * g), found, rtol=1e-6, atol=1e-9)


def test_layout_and_dtype_stay_and_zeros_stay_zeros():
    g = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    found = orthogonal(g)
    assert found.dtype == g.dtype and found.stride() == g.stride()
    torch.testing.assert_close(found, orthogonal(g.contiguous()), rtol=1e-5, atol=1e-6)
    assert orthogonal(torch.zeros(3, 2)).tolist() == [[0.0, 0.0]] * 3


def test_updates_by_the_formulas():
    torch.manual_seed(0)
    w, b = (torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2))
    groups = [
        {"params": [w], "weight_decay": 0.1, "momentum": 0.0, "nesterov": False, "orthogonal_momentum": 0.9},
        {"params": [b]},
    ]
    optimizer = Muon(groups, lr=0.5, momentum=0.9, nesterov=True)
    plain = torch.nn.Parameter(b.detach().clone())
    sgd = torch.optim.SGD([plain], lr=0.5, momentum=0.9, nesterov=True)
    expected, average = w.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(3):
        g = torch.randn(3, 4, dtype=torch.float64)
        w.grad, b.grad, plain.grad = g.clone(), g.clone(), g.clone()
        optimizer.step()
        sgd.step()
        average = 0.9 * average + 0.1 * g
        expected = expected - 0.5 * (orthogonal(0.1 * g + 0.9 * average) + 0.1 * expected)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(b, plain)  # the other group is plain SGD


def test_a_parameter_without_a_gradient_stays():
    w = torch.nn.Parameter(torch.ones(2, 2))
    Muon([{"params": [w], "momentum": 0.0, "nesterov": False, "orthogonal_momentum": 0.9}], lr=0.1).step()
    assert w.tolist() == [[1.0, 1.0]] * 2


def test_a_wrapper_may_pass_a_closure():
    """Accelerate's optimizer calls step(closure), with None where there is none."""
    w, v = (torch.nn.Parameter(torch.eye(3)) for _ in range(2))
    one, other = (
        Muon([{"params": [p], "momentum": 0.0, "nesterov": False, "orthogonal_momentum": 0.9}], lr=0.1) for p in (w, v)
    )

    def closure():
        loss = (w * torch.arange(9.0).view(3, 3)).sum()
        loss.backward()
        return loss

    assert one.step(closure).item() == 12.0
    v.grad = torch.arange(9.0).view(3, 3)
    assert other.step(None) is None and torch.equal(w, v) and not torch.equal(w, torch.eye(3))


def test_latent_weights_stay_where_the_straight_through_gradient_is_alive():
    model = empf.resnet18(width=0.0625, image_size=8, num_classes=3, T=1)
    optimizer = make_optimizer(model, TrainConfig(width=0.0625, optimizer="muon", lr=10.0))
    weight = model.blocks[2].shortcut["conv"].weight
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8))[0], torch.arange(4) % 3)
        loss.backward()
        assert weight.grad.count_nonzero() == weight.numel()
        optimizer.step()
        optimizer.zero_grad()
        empf.reset(model)
        assert weight.abs().max() == 1.0


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_what_decays(optimizer, decay_all):
    """Where all gradients are 0, a parameter becomes 1 - lr * decay of itself, or stays."""
    config = TrainConfig(
        dataset="cifar10", width=0.0625, optimizer=optimizer, neuron="mem_bn", seca=1, seca_bias=True, lr=0.1,
        weight_decay=0.5, decay_all=decay_all,
    )  # fmt: skip
    model = empf.build(config.model())
    update, before = make_optimizer(model, config), {}
    for name, parameter in model.named_parameters():
        torch.nn.init.uniform_(parameter, 0.1, 0.2)
        parameter.grad, before[name] = torch.zeros_like(parameter), parameter.detach().clone()
    update.step()
    weights = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert len(weights) == 21 < len(before)
    for name, parameter in model.named_parameters():
        orthogonal = optimizer == "muon" and isinstance(weights.get(name), QuantizedWeight)  # without momentum
        share = (0.95 if orthogonal else 1 - 0.1 * 1.9 * 0.5) if decay_all or name in weights else 1.0
        torch.testing.assert_close(parameter.detach(), share * before[name])


@pytest.mark.parametrize("weights", ["binary", "ternary", "full"])
def test_hidden_convolutions_get_it_and_nothing_else(weights):
    config = TrainConfig(dataset="cifar100", width=0.0625, weights=weights, optimizer="muon", seca=1)
    model = empf.build(config.model())
    optimizer = make_optimizer(model, config)
    names = {p: name for name, p in model.named_parameters()}
    groups = {g["orthogonal_momentum"]: [names[p] for p in g["params"]] for g in optimizer.param_groups[1:]}
    hidden = [n for n in names.values() if n.startswith("blocks.") and n.endswith("conv.weight") and "seca" not in n]
    assert groups[0.95] == hidden and len(hidden) == 19
    assert sorted(n for g in optimizer.param_groups for n in map(names.get, g["params"])) == sorted(names.values())
    assert type(make_optimizer(model, TrainConfig(optimizer="sgd"))) is torch.optim.SGD


def test_with_bf16_the_products_of_muon_are_in_bf16(monkeypatch):
    """Of training in fp32 on a CPU they are not; the direction is that of fp32 up to rounding."""
    g, seen = torch.randn(16, 64), []
    fp32, bf16 = orthogonal(g), orthogonal(g, bf16=True)
    assert bf16.dtype == g.dtype and 0 < (bf16 - fp32).norm() / fp32.norm() < 0.05
    monkeypatch.setattr("empf.training.optimizers.orthogonal", lambda g, bf16: (seen.append(bf16), g)[1])
    for precision in ("bf16", "no"):
        model = empf.BinaryLinear(8, 4)
        optimizer = make_optimizer(model, TrainConfig(optimizer="muon", mixed_precision=precision))
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
    assert seen == [True, None]
