"""What the data sets that have a name look like."""

import pytest
from make_data import random_set

from empf.data.load import load_data
from empf.data.sets import DATASETS


def test_digits_mean_and_std_are_those_of_the_training_images():
    train, _ = load_data("digits")
    scaled = train.images.double() / 255
    assert train.spec.mean == pytest.approx((scaled.mean().item(),), abs=5e-5)
    assert train.spec.std == pytest.approx((scaled.std().item(),), abs=5e-5)


def test_every_name_says_what_the_data_look_like():
    shapes = {name: (spec.channels, spec.image_size, spec.num_classes) for name, spec in DATASETS.items()}
    assert shapes == {
        "digits": (1, 8, 10),
        "cifar10": (3, 32, 10),
        "cifar100": (3, 32, 100),
        "imagenet200": (3, 64, 200),
        "imagenet1k": (3, 224, 1000),
        "dvs-cifar10": (2, 48, 10),
    }
    for name, spec in DATASETS.items():
        assert spec.name == name and len(spec.mean) == len(spec.std) == spec.channels


def test_a_set_moves_as_a_whole():
    data = random_set(7)
    moved = data.to("meta")
    assert len(moved) == 7 and moved.device.type == moved.labels.device.type == "meta"
    assert moved.class_names == data.class_names and moved.spec is data.spec
