"""What a run begins with: by its data set, in a short training, and by the name of a recipe."""

import json
import re

import pytest
from test_config import parse
from train_tools import run_train

from empf.model_config import ModelConfig
from empf.runs import read_config
from empf.training.config import TrainConfig, for_resume, from_flags, parser
from empf.training.recipes import NAMED
from empf.training.session import of_call

AUTHORS = dict(
    optimizer="sgd", lr=0.01, weight_decay=5e-4, decay_all=True, batch_size=64, epochs=300, schedule="cosine",
    warmup_epochs=0.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1, crop=True, flip=True, auto_augment="cifar", cutout=8,
    mixed_precision="bf16", latent_init="positive", stem_init="normal", shortcut="current", granularity="layer",
    seca_bias=True,
)  # fmt: skip


def test_cifar_has_a_recipe_near_that_of_the_authors():
    config = parse("--dataset", "cifar100")
    recipe = dict(
        arch="resnet18", width=1.0, T=4, weights="binary", learning="random", steps_per_batch=1, lr=0.01, batch_size=64,
        epochs=300, warmup_epochs=5.0, weight_decay=5e-4, mixup=0.8, cutmix=1.0, label_smoothing=0.1, crop=True,
        flip=True,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in recipe} == recipe
    assert parse("--dataset", "cifar10").to_dict() == config.to_dict() | {"dataset": "cifar10"}


def test_digits_have_a_short_recipe_that_flags_override():
    assert parse() == parse("--dataset", "digits")
    assert (parse().epochs, parse().width, parse().mixup, parse().flip) == (30, 0.25, 0.0, False)
    config = parse("--epochs", "3", "--flip")
    assert (config.epochs, config.width, config.flip) == (3, 0.25, True)


def test_short_trainings_have_a_recipe_of_their_own():
    short = from_flags({"dataset": "cifar100", "epochs": 30})
    assert (short.lr, short.mixup, short.cutmix, short.label_smoothing) == (0.1, 0.0, 0.0, 0.0)
    assert (short.optimizer, short.threshold) == ("muon", 0.1)
    long = from_flags({"dataset": "cifar100", "epochs": 31})
    assert (long.lr, long.mixup, long.cutmix, long.label_smoothing) == (0.01, 0.8, 1.0, 0.1)
    assert from_flags({"dataset": "cifar10", "epochs": 10, "mixup": 0.2}).mixup == 0.2
    assert from_flags({"dataset": "imagenet200", "epochs": 10}).mixup == 0.8
    assert from_flags({"dataset": "photos", "epochs": 10}).optimizer == "muon"
    assert from_flags({"dataset": "photos"}).optimizer == "sgd"
    assert "up to 30 epochs: 0.1" in " ".join(parser().format_help().split())


def test_recipes_give_nothing_that_cannot_be(tmp_path):
    """The short recipe has a threshold, and LIF its own; recordings of one's own are mirrored where that is asked."""
    assert from_flags({"dataset": "cifar10", "epochs": 3, "neuron": "lif"}).threshold == TrainConfig.threshold
    with pytest.raises(ValueError, match="takes no threshold"):
        from_flags({"dataset": "cifar10", "epochs": 3, "neuron": "lif", "threshold": 0.1})
    (tmp_path / "a.npz").touch()
    assert not from_flags({"dataset": str(tmp_path)}).flip and from_flags({"dataset": str(tmp_path), "flip": True}).flip


@pytest.fixture
def kornia():
    pytest.importorskip("kornia", reason="pip install 'empf[augment]'")


def test_the_recipe_of_the_authors_comes_before_flags(kornia):
    config = parse("--dataset", "cifar100", "--weights", "ternary", "--recipe", "authors")
    plain = parse("--dataset", "cifar100", "--weights", "ternary").to_dict()
    assert config.to_dict() == plain | {"recipe": "authors"} | AUTHORS
    assert config.augment().auto_augment == "cifar" and config.augment().cutout == 8
    model = ModelConfig(num_classes=100, weights="ternary", shortcut="current", granularity="layer", seca_bias=True)
    assert config.model() == model
    flags = ["--epochs", "30", "--no-decay-all", "--shortcut", "spikes", "--cutout", "16", "--lr", "0.1"]
    given = dict(epochs=30, decay_all=False, shortcut="spikes", cutout=16, lr=0.1)
    assert parse("--dataset", "cifar100", "--recipe", "authors", *flags).to_dict() == config.to_dict() | given | {
        "weights": "binary"
    }
    digits = parse("--recipe", "authors")  # what goes with the size of the data stays
    assert (digits.width, digits.threads, digits.epochs, digits.lr) == (0.25, 1, 300, 0.01)


def test_a_recipe_is_kept_in_the_run(kornia, tmp_path):
    """config.json says all that it gave, whatever it gives later; and a resumed run has one recipe."""
    config = parse("--dataset", "cifar10", "--recipe", "authors", "--lr", "0.2")
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": {}, "train": config.to_dict()}))
    with pytest.MonkeyPatch.context() as later:
        later.setitem(NAMED, "authors", {"lr": 7.0, "epochs": 7})
        assert of_call(["--config", str(tmp_path / "config.json")])[0] == config
        assert for_resume(config.to_dict(), {"recipe": "authors"}) == config
    with pytest.raises(ValueError, match="started with recipe = default, not authors"):
        for_resume(TrainConfig().to_dict(), {"recipe": "authors"})
    (tmp_path / "named.yaml").write_text("recipe: authors\ndataset: cifar10\n")
    assert of_call(["--config", str(tmp_path / "named.yaml"), "--lr", "0.2"])[0] == config


def test_a_recipe_for_images_is_refused_for_events(kornia, tmp_path):
    with pytest.raises(ValueError, match="unknown recipe|recipe must be one of default, authors, got 'ours'"):
        from_flags({"recipe": "ours"})
    config = from_flags({"recipe": "authors", "dataset": "dvs-cifar10"})
    assert (config.arch, config.T, config.mixup) == ("vgg_snn", 10, 0.8)  # its batches refuse that
    (tmp_path / "class" / "a.aedat").parent.mkdir()
    (tmp_path / "class" / "a.aedat").touch()
    assert not from_flags({"recipe": "authors", "dataset": str(tmp_path)}).flip


def test_help_says_what_a_recipe_gives():
    text = " ".join(parser().format_help().split())
    for name, value in AUTHORS.items():
        default = TrainConfig.__dataclass_fields__[name].default
        where = re.search(rf"\(default: {re.escape(str(default))}[^)]*; --recipe authors: {value}\)", text)
        assert (where is None) == (value == default), name


def test_a_training_by_the_recipe_of_the_authors(kornia, tmp_path):
    flags = ["--recipe", "authors", "--epochs", "1", "--cutout", "2", "--weights", "ternary", "--seca", "1"]
    run_train(*flags, "--output-dir", tmp_path / "run")
    config = read_config(tmp_path / "run")
    assert AUTHORS.items() - config["train"].items() <= {("epochs", 300), ("cutout", 8), ("batch_size", 64)}
    assert config["model"]["shortcut"] == "current" and config["model"]["granularity"] == "layer"
