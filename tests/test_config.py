"""The one dataclass is the command line, the recipes and the metadata; a wrong setting is one sentence."""

import argparse
import json
import math
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from train_tools import run_train

from empf.models import ModelConfig
from empf.training.config import (
    GROUPS,
    TrainConfig,
    batch_per_process,
    for_resume,
    from_flags,
    parser,
    training_of,
    with_file,
)
from empf.training.session import of_call


def parse(*flags: str) -> TrainConfig:
    given = vars(parser().parse_args(flags))
    return from_flags(given)


def test_round_trip_through_a_dict():
    config = TrainConfig(T=2, spike_bits=4, data="folder", limit=10, crop=False)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == {f.name for f in fields(TrainConfig)}


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match="unknown setting epoch, wieght"):
        TrainConfig.from_dict({"wieght": 1, "epochs": 3, "epoch": 3})


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        TrainConfig().lr = 1.0


# A value of each field that is neither the default nor that of a recipe, as on the command line; of learning the
# default, without which there are no steps per batch.
VALUES = {
    "dataset": "dvs-cifar10", "data": "folder", "image_size": "64x96", "image_column": "photo",
    "label_column": "kind", "train_split": "big", "test_split": "exam", "config": "plain", "recipe": "authors",
    "hold_out": "0.2",
    "streaming": True, "workers": "2", "split": "random",
    "frames_by": "time", "orientation": "mirrored", "resize": "8bit", "limit": "99",
    "arch": "resnet34", "width": "0.3", "T": "5", "weights": "ternary",
    "neuron": "mem_bn", "parallel": "0.4", "seca": "2", "spike_bits": "3", "spike_gradient": "clipped",
    "activation": "gelu",
    "threshold": "0.3", "per_channel": True, "shortcut": "current", "granularity": "layer", "seca_bias": True,
    "latent_init": "positive", "stem_init": "normal", "init_from": "runs/other", "freeze": "stem*",
    "learning": "random", "steps_per_batch": "2", "epochs": "7", "patience": "3", "batch_size": "33",
    "optimizer": "muon", "lr": "0.3", "weight_decay": "0.2", "decay_all": True, "warmup_epochs": "1.5",
    "schedule": "constant",
    "flip_rate": "0.02", "flip_threshold": "0.3", "flip_adaptive": False, "flip_bits": "16",
    "accumulate": "4", "ema": "0.9", "crop": False, "flip": False,
    "roll": "2", "rotate": "9", "shear": "0.2", "drop": "0.3", "auto_augment": "trivial", "erasing": "0.1",
    "cutout": "3", "mixup": "0.7", "cutmix": "0.6", "label_smoothing": "0.2",
    "seed": "11", "sync_bn": True, "grad_compression": "powersgd", "health": False, "mixed_precision": "bf16",
    "cuda_graphs": True, "threads": "3", "output_dir": "out", "save_minutes": "2.5", "max_steps": "8",
    "tracker": "tensorboard",
}  # fmt: skip


ALONE = {"grow": "4:1:0.5", "test_every": "2"}  # which do not go with all of the others


def test_every_field_is_a_flag():
    assert list(VALUES) == [f.name for f in fields(TrainConfig) if f.name not in ALONE]
    flags = []
    for name, value in VALUES.items():
        flag = name.replace("_", "-")
        flags += {False: [f"--no-{flag}"], True: [f"--{flag}"]}.get(value, [f"--{flag}", value])
    config = parse(*flags)
    for f in (f for f in fields(TrainConfig) if f.name not in ALONE):
        assert getattr(config, f.name) != f.default or f.name == "learning"
        expected = VALUES[f.name] if isinstance(VALUES[f.name], bool) else type(getattr(config, f.name))(VALUES[f.name])
        assert getattr(config, f.name) == expected, f.name
    assert parse("--learning", "stbp").learning == "stbp"
    for name, value in ALONE.items():
        assert str(getattr(parse(f"--{name.replace('_', '-')}", value), name)) == value


def test_every_flag_is_explained():
    for action in parser()._actions:
        assert action.help and (isinstance(action, argparse._HelpAction) or "%" not in action.help)
    assert "(default: 300; digits: 30)" in " ".join(parser().format_help().split())


def test_help_has_every_flag_in_a_group():
    text = parser().format_help()
    at = [text.index(f"\n{name}:\n") for name in GROUPS.values()]
    assert at == sorted(at)
    for flag, group in {
        "--limit": 0,
        "--spike-bits": 1,
        "--steps-per-batch": 2,
        "--ema": 3,
        "--mixup": 4,
        "--resume": 5,
    }.items():
        assert at[group] < text.index(f"\n  {flag} ") < [*at, len(text)][group + 1]


def test_a_file_of_settings_and_flags_that_win(tmp_path):
    """Its values are read as those of flags are, whatever the format makes of `no` and `1e-3`."""
    (tmp_path / "a.yaml").write_text(
        "lr: 1e-3\nimage-size: 64\nmixed_precision: no\nflip: true\nlimit: null\nepochs: 7\n"
    )
    config = of_call(["--config", str(tmp_path / "a.yaml"), "--epochs", "9"])[0]
    assert config == parse("--lr", "1e-3", "--image-size", "64", "--flip", "--epochs", "9")
    (tmp_path / "b.JSON").write_text(
        '{"dataset": "owner/set", "config": "plain", "T": 2, "crop": false, "data": "\\u732b"}'
    )
    config = of_call(["--config", str(tmp_path / "b.JSON")])[0]
    assert config == parse("--dataset", "owner/set", "--config", "plain", "--T", "2", "--no-crop", "--data", "猫")


def test_a_run_is_repeated_from_its_config_file(tmp_path):
    config = TrainConfig(T=2, spike_bits=4, crop=False, data="a=b", output_dir=str(tmp_path / "run"), max_steps=3)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": {}, "train": config.to_dict()}))
    assert of_call(["--config", str(tmp_path / "config.json")])[0] == replace(config, output_dir=None, max_steps=None)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("epoch: 3", "unknown setting epoch; train.py --help lists them"),
        ("epochs: many", "argument --epochs: invalid int value: 'many'"),
        ("epochs: [1, 2]", 'epochs must be one value, got ["1", "2"]'),
        ("flip: 1", "flip must be true or false, got 1"),
        ("neuron: hh", "argument --neuron: invalid choice: 'hh'"),
        ("epochs", "must hold names and values of flags"),
        ("a: b: c", "cannot read"),
    ],
)
def test_a_wrong_file_of_settings_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as found:
        of_call(["--config", str(file)])
    assert str(file) in str(found.value) and "\n" not in str(found.value)


def test_a_missing_file_of_settings():
    with pytest.raises(FileNotFoundError, match="no file of settings no.json: check"):
        of_call(["--config", "no.json"])


def test_augmentation_is_that_of_the_flags():
    augment = parse("--cutout", "3", "--no-crop", "--mixup", "0.5").augment()
    assert (augment.cutout, augment.crop, augment.mixup, augment.cutmix) == (3, False, 0.5, 0.0)


def test_model_fits_the_data_set():
    model = parse("--dataset", "imagenet200", "--T", "2", "--seca", "1").model()
    assert model == ModelConfig(num_classes=200, in_channels=3, image_size=64, T=2, seca=1)
    digits = parse().model()
    assert (digits.num_classes, digits.in_channels, digits.image_size, digits.width) == (10, 1, 8, 0.25)


WRONG = [
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--lr", "1,0"], "argument --lr: invalid float value: '1,0'"),
    (["--dataset", "mnist"], "unknown dataset 'mnist': choose one of digits, "),
    (["--neuron", "hh"], "argument --neuron: invalid choice: 'hh'"),
    (["--mixed-precision", "fp16"], "argument --mixed-precision: invalid choice: 'fp16'"),
    (["--seca", "3"], "argument --seca: invalid choice: 3"),
    (["--T"], "argument --T: expected one argument"),
    (["--T", "0"], "T must be at least 1, got 0"),
    (["--steps-per-batch", "3"], "steps_per_batch = 3 is more than T = 2 time steps"),
    (
        ["--learning", "every", "--steps-per-batch", "2"],
        "steps_per_batch is for the learning mode random, not for every: leave it out",
    ),
    (["--resize", "8bit"], "resize is for events, not for the images of digits: leave --resize out"),
    (["--frames-by", "time", "--dataset", "cifar10"], "frames_by is for events, not for the images of cifar10"),
    (["--threads", "100000"], "100000 threads are more than the"),
    (["--epochs", "0"], "epochs must be at least 1, got 0"),
    (["--accumulate", "0"], "accumulate must be at least 1, got 0"),
    (["--grad-compression", "fp16"], "argument --grad-compression: invalid choice: 'fp16'"),
    (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    (["--limit", "0"], "limit must be at least 1, got 0"),
    (["--seed", "-1"], "seed must be at least 0, got -1"),
    (["--seed", str(2**63)], "seed must be below 2^63, got 9223372036854775808"),
    (["--limit", str(10**400)], f"limit must be below 2^63, got 1{36 * '0'}..."),
    (["--roll", "1"], "roll is for events, not for images: set it to 0"),
    (["--mixup", "-0.1"], "mixup must be at least 0, got -0.1"),
    (["--lr", "0"], "lr must be positive"),
    (["--lr", "nan"], "lr must be a finite number, got nan"),
    (["--width", "inf"], "width must be a finite number, got inf"),
    (["--width", "0"], "width must be positive and at most 64, got 0.0"),
    (["--T", "100000"], "T must be at most 4,096, got 100000"),
    (["--lr", "1e300"], "lr must be at most 1e+30, got 1e+300"),
    (["--weight-decay", "1e300"], "weight_decay must be at most 1e+30, got 1e+300"),
    (["--epochs", "99999999999"], "epochs must be at most 1000000, got 99999999999"),
    (["--batch-size", "99999999999"], "batch_size must be at most 1000000, got 99999999999"),
    (["--cutout", "99999999999"], "cutout must be at most 4096, got 99999999999"),
    (["--mixup", "1e300"], "mixup must be at most 1000.0, got 1e+300"),
    (["--workers", "1000000"], "workers must lie in 0.."),
    (["--width", "64", "--arch", "resnet19"], " GB are needed, "),
    (["--dataset="], "dataset must not be empty: leave --dataset out"),
    (["--train-split="], "train_split must not be empty: leave --train-split out"),
    (["--output-dir="], "output_dir must not be empty: leave --output-dir out"),
    (["--output-dir", "/dev/null/run"], "could not write /dev/null/run/state/state.pt (Not a directory): make room or"),
    (["--data", ""], "data must not be empty: leave --data out"),
    (["--width", "1e9"], "width must be positive and at most 64, got 1000000000.0"),
    (["--label-smoothing", "1"], "label_smoothing and ema in [0, 1)"),
    (["--ema", "1"], "label_smoothing and ema in [0, 1)"),
    (["--parallel", "1.5"], "parallel is a share and must lie in 0..1, got 1.5"),
    (["--spike-bits", "9"], "spike_bits must be one of"),
    (["--neuron", "lif", "--spike-bits", "4"], "the LIF baseline has binary spikes"),
    (["--tracker", "notebook"], "tracker 'notebook' is unknown to Accelerate or not installed"),
    (["--arch", "vgg_snn"], "vgg_snn pools four times and needs images of at least 16x16, got 8"),
    (["--data", "no/such/folder"], "no folder no/such/folder"),
    (["--batch-size", "97"], "96 training images do not fill one batch of 97"),
    (["--resume", "no/such/run"], "no/such/run is not a run folder"),
    (["--resume", ""], "is not a run folder"),
]


@pytest.mark.parametrize("flags, sentence", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_flag_is_one_sentence(tmp_path, monkeypatch, capsys, flags, sentence):
    """On stderr, with exit code 1 or 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_train(*flags)
    code = stop.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err  # a string: printed at exit, code 1
    assert code not in (0, None)
    assert message.startswith("error: ") and sentence in message
    assert message.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


SHARED = [("T", "4"), ("T", 2.5), ("T", True), ("T", None), ("spike_bits", 2.0), ("width", "1"), ("per_channel", 1)]


@pytest.mark.parametrize(
    "kind, name, value",
    [(kind, *wrong) for kind in (TrainConfig, ModelConfig) for wrong in SHARED]
    + [(TrainConfig, "crop", 1), (TrainConfig, "data", 3), (TrainConfig, "lr", None), (ModelConfig, "seca", False)],
)
def test_a_wrong_type_is_named(kind, name, value):
    """As a damaged config.json may have it."""
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        kind(**{name: value})


@pytest.mark.parametrize("width", [math.nan, math.inf])
def test_a_width_that_is_not_finite_is_refused(width):
    with pytest.raises(ValueError, match=f"width must be a finite number, got {width}"):
        ModelConfig(width=width)


def test_whole_numbers_are_fine_where_fractions_are():
    assert TrainConfig(lr=1, warmup_epochs=0).lr == ModelConfig(width=1).width == 1


def test_resume_takes_stored_settings_and_may_change_those_without_effect():
    stored = TrainConfig(T=2, max_steps=5, threads=1).to_dict()
    assert for_resume(stored, {}) == TrainConfig(T=2, threads=1)  # max_steps was for that call
    harmless = dict(
        data="elsewhere", threads=2, save_minutes=1.0, max_steps=3, tracker="wandb", health=False, workers=1
    )
    assert for_resume(stored, {"T": 2, **harmless}) == TrainConfig(T=2, **harmless)
    with pytest.raises(ValueError, match="started with batch_size = 64, not 32: leave --batch-size out"):
        for_resume(stored, {"batch_size": 32})


def test_the_joined_batch_is_kept_by_another_number_of_processes():
    assert [batch_per_process(48, n) for n in (1, 2, 3, 48)] == [48, 24, 16, 1]
    with pytest.raises(ValueError, match="has 6 images .* which 4 processes cannot share: .* 1, 2, 3 or 6$"):
        batch_per_process(6, 4)


@pytest.mark.parametrize("share, read", [(0.1, None), (0.2, 0.2)])
def test_what_was_the_default_of_older_runs_holds_nothing_out(tmp_path, share, read):
    """They held out where there was no test split, and only then; 0.1 is what is held out there now."""
    older = {name: value for name, value in TrainConfig(hold_out=share).to_dict().items() if name != "patience"}
    assert training_of({"train": older}, "run").hold_out == read
    assert training_of({"train": older | {"patience": None}}, "run").hold_out == share
    (tmp_path / "config.json").write_text(json.dumps({"train": older}))
    assert with_file({"config": str(tmp_path / "config.json")}).get("hold_out") == read


def test_warm_up_leaves_room_for_training():
    assert from_flags({"dataset": "cifar100"}).warmup_epochs == 5.0
    assert from_flags({"dataset": "cifar100", "epochs": 3}).warmup_epochs == 0.3
    assert from_flags({"epochs": 3, "warmup_epochs": 2.0}).warmup_epochs == 2.0
    with pytest.raises(ValueError, match="leaves nothing of 3 epochs"):
        from_flags({"epochs": 3, "warmup_epochs": 3.0})
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        from_flags({"epochs": 0})
