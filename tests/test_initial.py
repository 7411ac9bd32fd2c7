"""The weights with which a training begins."""

import math

import pytest
import torch
from train_tools import run_train

import empf
from empf.diagnose.__main__ import load_model
from empf.synapse import QuantizedWeight
from empf.training.config import TrainConfig
from empf.training.initial import begun


def built(**settings) -> torch.nn.Module:
    torch.manual_seed(3)
    config = TrainConfig(dataset="cifar10", arch="resnet19", width=0.25, **settings)
    return begun(empf.build(config.model()), config)


def test_by_default_they_are_those_of_torch():
    torch.manual_seed(3)
    plain = empf.resnet19(width=0.25)
    state = torch.get_rng_state()
    model = built()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_latent_weights_that_are_all_positive():
    model, plain = built(latent_init="positive"), built().state_dict()
    latent = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    assert len(latent) == 19 and "hidden.linear.weight" in latent
    for name, tensor in model.state_dict().items():
        if name not in latent:
            assert torch.equal(tensor, plain[name]), name
        else:
            assert 0 <= tensor.min() < 2e-5 and 9.8e-4 < tensor.max() <= 1e-3
            assert tensor.mean().item() == pytest.approx(5e-4, rel=0.1)


def test_the_stem_by_its_fan_out():
    model, plain = built(stem_init="normal"), built().state_dict()
    stem = model.stem.conv.weight
    deviation = math.sqrt(2 / (32 * 9))
    assert stem.std().item() == pytest.approx(deviation, rel=0.1) and stem.abs().max() > 2.5 * deviation
    different = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])]
    assert different == ["stem.conv.weight"]


def test_a_training_begins_with_them(tmp_path):
    run = tmp_path / "run"
    run_train(
        "--latent-init", "positive", "--stem-init", "normal", "--lr", "1e-9", "--epochs", "1", "--output-dir", run
    )
    trained, first = empf.load(run), load_model(run, untrained=True, device="cpu")
    weight = trained.blocks[1].conv1.conv.weight
    assert (weight > 0).all() and weight.max() < 1.1e-3
    for name, parameter in first.named_parameters():
        assert torch.allclose(trained.get_parameter(name), parameter, atol=1e-6), name
