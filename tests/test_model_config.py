"""The configuration of a network: what it refuses, and what a file of it gives back."""

import json
from dataclasses import fields

import pytest

import empf
from empf.model_config import ModelConfig


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(weights="trinary"), "weights must be one of binary, ternary, full, got 'trinary'"),
        (dict(neuron="izhikevich"), "neuron must be one of"),
        (dict(seca=3), "seca must be one of 0, 1, 2, got 3"),
        (dict(spike_bits=0), "spike_bits must be one of"),
        (dict(spike_gradient="clip", spike_bits=4), "spike_gradient must be one of identity, clipped, got 'clip'"),
        (dict(spike_gradient="clipped"), "clipped is for n-bit spikes: give spike_bits"),
        (dict(neuron="lif", spike_gradient="clipped"), "LIF baseline .* takes no spike_gradient"),
        (dict(parallel=1.5), "must lie in 0..1, got 1.5"),
        (dict(width=0), "width must be positive"),
        (dict(T=0), "T must be at least 1, got 0"),
        (dict(neuron="lif", parallel=0.5), "LIF baseline"),
        (dict(shortcut="currents"), "shortcut must be one of spikes, current, got 'currents'"),
        (dict(granularity="weight"), "granularity must be one of channel, layer, got 'weight'"),
        (dict(seca_bias=1), "seca_bias must be bool, got 1"),
        (dict(weigths="binary"), "unknown model setting weigths"),
    ],
)
def test_bad_configuration(kwargs, message):
    with pytest.raises(ValueError, match=message):
        empf.resnet18(**kwargs)


def test_configuration_round_trip():
    config = ModelConfig(arch="vgg_snn", spike_bits=4, width=0.5)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == {f.name for f in fields(ModelConfig)}


LATER = {"shortcut": "current", "granularity": "layer", "seca_bias": True, "spike_gradient": "clipped"}


def test_what_older_files_do_not_have_is_as_it_was():
    config = ModelConfig(T=2, spike_bits=4)
    old = {name: value for name, value in config.to_dict().items() if name not in LATER}
    assert ModelConfig.from_dict(old) == config and config.for_checksum() == old
    for name, value in LATER.items():
        assert ModelConfig.from_dict(old | {name: value}).for_checksum() == old | {name: value}


def test_sizes_of_images():
    config = ModelConfig(image_size=(24, 40))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig(image_size=(32, 32)) == ModelConfig()
    for size in ((0, 8), (8, 8, 8), ("8", 8), (8, 10_000)):
        with pytest.raises(ValueError, match="image_size must be"):
            ModelConfig(image_size=size)
