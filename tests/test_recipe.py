"""bench/recipe.py: what differs between the runs, results that are kept, and the report."""

import json
from dataclasses import replace

import pytest
import torch

import empf
from bench import recipe
from empf.data.sets import DATASETS, ImageSet
from empf.training.config import TrainConfig


@pytest.fixture(scope="module")
def sets():
    spec = replace(DATASETS["cifar100"], image_size=16)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (128, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return tuple(ImageSet(pixels, torch.arange(128) % 100, [str(c) for c in range(100)], spec) for _ in range(2))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(recipe, "OLD", {**recipe.OLD, "width": 0.0625})


def test_every_variant_is_a_setting_or_a_tweak():
    apart = {"adam", "latent_decay", "later", "linear"}
    for changes in recipe.VARIANTS.values():
        assert set(changes) <= set(TrainConfig.__dataclass_fields__) | set(recipe.TWEAKS) | apart
        TrainConfig(**{**recipe.OLD, **{k: v for k, v in changes.items() if k in TrainConfig.__dataclass_fields__}})
    for flags in recipe.RECIPES.values():
        assert TrainConfig(**flags).dataset == "cifar100"
    for changes, other in recipe.CHOICES.values():
        assert TrainConfig(**recipe.BASE | changes) != TrainConfig(**recipe.RECIPES[other])


CHANGES = [{"latent_scale": 3.0}, {"residual_gain": 0.0}, {"leak": 0.2}, {"adam": 1e-3}, {"later": 9.0}]


def test_each_change_changes_the_training_and_nothing_else_does(small, sets):
    base = recipe.screen({}, 0, sets, 1)
    found = [base, *(recipe.screen(changes, 0, sets, 1) for changes in CHANGES)]
    assert len({r["loss"][0] for r in found}) == 1 + len(CHANGES)
    again = recipe.screen({}, 0, sets, 1)
    assert again["loss"] == base["loss"] and again["accuracy"] == base["accuracy"] and len(base["accuracy"]) == 4


def test_the_learning_rate_falls_linearly(small, sets):
    config = TrainConfig(**{**recipe.OLD, "epochs": 4})
    assert [recipe.falling(config, p) for p in (0.5, 2.25, 4.0)] == pytest.approx([0.1, 0.05, 0.0])
    cosine, line = (recipe.screen(changes, 0, sets, 2)["loss"] for changes in ({}, {"linear": True}))
    assert line[0] == cosine[0] and line[1] != cosine[1]  # four updates: the first two are warm-up and peak


def test_latent_weights_have_a_decay_of_their_own_and_mem_bn_its_start():
    config = TrainConfig(**{**recipe.OLD, "width": 0.0625, "neuron": "mem_bn"})
    model = empf.build(config.model())
    for name, value in (("alpha", 1.0), ("beta", 0.0)):
        recipe.TWEAKS[name](model, value)
    neuron = model.blocks[0].conv1.neuron
    assert neuron.alpha.tolist() == [1.0] * 4 and neuron.beta.tolist() == [0.0] * 4
    groups = recipe.optimizer_of(model, config, 0.25, None).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert decay[id(model.blocks[0].conv1.conv.weight)] == 0.25
    assert decay[id(model.head.weight)] == config.weight_decay and decay[id(neuron.alpha)] == 0.0


def test_steps_are_drawn_later_or_earlier():
    config = TrainConfig(**recipe.OLD)
    late, early = ([recipe.draw(config, later, i)[0] for i in range(400)] for later in (1.0, -1.0))
    assert abs(sum(late) / 400 - 3.0) < 0.2 and abs(sum(early) / 400 - 1.92) < 0.2  # sum t^2 / sum t, 4 / sum 1/t
    assert recipe.draw(config, 0.0, 7) == recipe.draw(config, 0.0, 7)


def test_what_is_there_is_not_run_again(small, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "load_data", lambda *a: sets)
    monkeypatch.setattr(recipe, "shrink", lambda images, count, size: images)
    for _ in range(2):
        recipe.main(["screen", "--only", "old", "lr 0.3", "--epochs", "1", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "screen.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in rows] == ["old", "lr 0.3"]
    capsys.readouterr()
    recipe.main(["report", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (
        "20,000 images of 16x16, 1 epochs" in printed
        and "| lr 0.3 |" in printed
        and printed.strip() == (tmp_path / "report.md").read_text().strip()
    )


def test_cost_is_compared_within_a_day():
    def row(day, seconds):
        return {"date": f"2026-11-{day}T01:02:03+00:00", "cpu_seconds": seconds}

    old = [row(24, 100.0), row(25, 200.0), row(25, 400.0)]
    assert recipe.cost([row(24, 150.0)], old) == "1.50"
    assert recipe.cost([row(25, 150.0), row(26, 999.0)], old) == "0.50"
    assert recipe.cost([row(26, 1.0)], old) == ""


def test_a_recipe_is_confirmed_by_train(tmp_path, monkeypatch):
    called = []
    history = [{"loss": 1.0, "train_accuracy": 2.0, "accuracy": [3.0, 4.0], "seconds": 60.0}]
    monkeypatch.setattr(recipe, "train", lambda run, flags, *_: called.append((run.name, flags)) or True)
    monkeypatch.setattr(recipe, "read_metrics", lambda run: history)
    monkeypatch.setattr(recipe, "read_config", lambda run: {"git_commit": "abc"})
    for _ in range(2):
        where = ["--out", str(tmp_path), "--runs", str(tmp_path)]
        recipe.main(["confirm", "--only", "old", "--epochs", "7", "--threads", "2", "--seeds", "0", "5", *where])
    assert [name for name, _ in called] == ["recipe-old-7-0", "recipe-old-7-5"]
    assert (called[1][1]["seed"], called[1][1]["epochs"], called[1][1]["threads"]) == (5, 7, 2)
    rows = [json.loads(line) for line in (tmp_path / "confirm.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["accuracy"], r["minutes"]) for r in rows] == [(0, [3.0, 4.0], 1.0), (5, [3.0, 4.0], 1.0)]
    assert {r["commit"] for r in rows} == {"abc"}


def test_choices_are_compared_by_seed():
    accuracy = {
        "base": {0: 50.0, 1: 52.0, 2: 54.0}, "ternary": {0: 51.0, 1: 53.5, 2: 55.0},
        "ternary, of each layer": {0: 50.5}, "SECA-II with bias": {0: 60.0},
    }  # fmt: skip
    runs = [
        {"recipe": name, "seed": seed, "accuracy": [0.0, value], "flags": {"epochs": 10}}
        for name, seeds in accuracy.items() for seed, value in seeds.items()
    ]  # fmt: skip
    runs += [
        {"recipe": name, "seed": 0, "accuracy": [value], "flags": {"epochs": 3}}
        for name, value in (("SGD", 30.0), ("flip", 29.0))
    ]
    runs.append({"recipe": "Mem-BN", "seed": 0, "accuracy": [99.0], "flags": {"epochs": 3}})  # of another length
    rows = [line for line in recipe.choices(runs) if line.startswith("| ") and "accuracy" not in line]
    half = 4.303 * 0.2887 / 3**0.5  # t and standard deviation of 1, 1.5, 1
    assert rows == [
        "| 3 | flip | 29.00 | SGD | -1.00 | 1 |",
        f"| 10 | ternary | 53.17 +- 2.02 | base | +1.17 [{7 / 6 - half:+.2f}, {7 / 6 + half:+.2f}] | 3 |",
        "| 10 | ternary, of each layer | 50.50 | ternary | -0.50 | 1 |",
    ]


def test_wrong_calls_get_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["screen", "--only", "nothing"])
    assert "unknown: nothing; known: old" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no run of the variant 'old'"):
        recipe.main(["report", "--out", str(tmp_path)])
