"""What training says: flags that do nothing, and the first few warnings of an epoch."""

from empf.training.config import TrainConfig
from empf.training.messages import epoch_line, few_updates, warning_lines, without_effect


def test_flags_that_do_nothing_are_named():
    config = TrainConfig(sync_bn=True, grad_compression="powersgd", workers=2)
    assert [line.split()[1] for line in without_effect(config, 1, in_memory=True)] == [
        "--sync-bn", "--grad-compression", "--workers",
    ]  # fmt: skip
    assert without_effect(TrainConfig(flip_bits=16), 1, True) == [
        "note: --flip-bits does nothing without --optimizer flip"
    ]
    assert without_effect(TrainConfig(flip_bits=16, optimizer="flip"), 1, True) == []
    assert without_effect(config, 2, in_memory=False) == without_effect(TrainConfig(), 1, in_memory=True) == []


def test_a_training_of_few_updates_is_named_where_the_images_are_ones_own():
    config = TrainConfig(dataset="photos", epochs=3, batch_size=64, accumulate=2)
    assert few_updates(config, 3).startswith("note: 6 updates in all, of 64 images each, are few: more --epochs")
    assert few_updates(config, 33) is None and few_updates(TrainConfig(epochs=1), 1) is None


def test_an_epoch_is_a_line_and_its_first_warnings():
    record = {
        "epoch": 7, "loss": 1.25, "train_accuracy": 50.0, "accuracy": [20.0, 30.125], "images_per_s": 99.6,
        "seconds": 2, "health": {"warnings": [f"layer {n}" for n in range(7)]},
    }  # fmt: skip
    start, end = "epoch   7  loss 1.2500  train 50.00 %  ", "test after each step 20.00 30.12 %  100 images/s  2.0 s"
    assert epoch_line(record) == start + end
    assert epoch_line(record | {"held_out": [1.0, 2.0]}) == f"{start}held out 2.00 %  {end}"
    lines = warning_lines(record)
    assert lines[:5] == [f"warning: layer {n}" for n in range(5)] and lines[5].startswith("warning: 2 more: python -m")
    assert warning_lines({"epoch": 1}) == []
