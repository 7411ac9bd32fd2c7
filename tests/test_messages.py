"""What training says: flags that do nothing, and the first few warnings of an epoch."""

import numpy as np
from make_data import random_set

import empf
from empf.data.sets import StreamSet
from empf.training.config import TrainConfig
from empf.training.messages import epoch_line, few_updates, warning_lines, without_effect


def test_flags_that_do_nothing_are_named():
    digits, photos = (random_set(4, name) for name in ("digits", "cifar10"))
    streamed = StreamSet(None, np.zeros((0, 4)), None, photos.spec)
    none, some = (empf.resnet18(width=0.0625, parallel=share) for share in (0.0, 0.5))
    config = TrainConfig(sync_bn=True, grad_compression="powersgd", workers=2, parallel=0.01)
    assert [line.split()[1] for line in without_effect(config, 1, digits, none)] == [
        "--sync-bn", "--grad-compression", "--workers", "--flip", "--parallel",
    ]  # fmt: skip
    assert without_effect(TrainConfig(flip_bits=16), 1, photos, none) == [
        "note: --flip-bits does nothing without --optimizer flip"
    ]
    assert without_effect(TrainConfig(flip_bits=16, optimizer="flip"), 1, photos, none) == []
    assert without_effect(config, 2, streamed, some) == without_effect(TrainConfig(), 1, photos, none) == []
    network = dict(shortcut="current", granularity="layer", seca_bias=True, latent_init="positive")
    in_vain = TrainConfig(dataset="dvs-cifar10", arch="vgg_snn", weights="full", **network)
    assert without_effect(in_vain, 1, photos, none) == [
        "note: --shortcut does nothing in a network without shortcuts",
        "note: --granularity does nothing without --weights ternary",
        "note: --seca-bias does nothing without --seca",
        "note: --latent-init does nothing with --weights full",
    ]
    assert without_effect(TrainConfig(weights="ternary", seca=1, **network), 1, photos, none) == []
    config = TrainConfig(init_from="run", threshold=0.1)
    assert without_effect(config, 1, photos, none) == ["note: --threshold is that of --init-from where its neurons fit"]


def test_the_better_gradient_of_n_bit_spikes_is_named():
    photos, net = random_set(4, "cifar10"), empf.resnet18(width=0.0625, spike_bits=4)
    (note,) = without_effect(TrainConfig(spike_bits=4), 1, photos, net)
    assert note == "note: n-bit spikes have trained better with --spike-gradient clipped"
    assert without_effect(TrainConfig(spike_bits=4, spike_gradient="clipped"), 1, photos, net) == []


def test_a_training_of_few_updates_is_named_where_the_images_are_ones_own():
    config = TrainConfig(dataset="photos", epochs=3, batch_size=64, accumulate=2)
    assert few_updates(config, 3).startswith("note: 6 updates in all, of 64 images each, are few: give more --epochs")
    assert few_updates(config, 33) is None and few_updates(TrainConfig(epochs=1), 1) is None


def test_an_epoch_is_a_line_and_its_first_warnings():
    record = {
        "epoch": 7, "loss": 1.25, "train_accuracy": 50.0, "accuracy": [20.0, 30.125], "images_per_s": 99.6,
        "seconds": 2, "health": {"warnings": [f"layer {n}" for n in range(7)]},
    }  # fmt: skip
    start, end = "epoch   7  loss 1.2500  train 50.00 %  ", "test after each step 20.00 30.12 %  100 images/s  2.0 s"
    assert epoch_line(record) == start + end
    assert epoch_line(record | {"held_out": [1.0, 2.0]}) == f"{start}held out 2.00 %  {end}"
    alone = epoch_line(record | {"held_out": [1.0, 2.0], "tested_on": "a part"})
    assert alone == start + end.replace("test after", "held out after")
    lines = warning_lines(record)
    assert lines[:5] == [f"warning: layer {n}" for n in range(5)] and lines[5].startswith("warning: 2 more: python -m")
    assert warning_lines({"epoch": 1}) == []
