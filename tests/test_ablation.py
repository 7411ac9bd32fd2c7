"""bench/ablation.py: runs are resumed, shared and summarised; one factor is changed at a time."""

import json
from dataclasses import replace

import pytest
import torch
from make_data import parquet_folder, random_set

from bench import ablation
from bench.ablation import DEFAULT, TABLES, Study, name_of, shrink, summary, tables, variants

TINY = Study(width=0.0625, image_size=8, images=40, test_images=20, epochs=1, batch_size=20)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.__dict__.items()]


@pytest.fixture
def few(monkeypatch):
    """Three variants instead of all."""
    rows = {"EM-PF": {}, "LIF": {"neuron": "lif"}, "Mem-BN": {"neuron": "mem_bn"}}
    monkeypatch.setattr(ablation, "TABLES", {"neuron": rows})


def test_variants_are_settings_of_a_network():
    for changes in variants():
        assert changes.keys() <= DEFAULT.keys()
        assert all(DEFAULT[name] != value for name, value in changes.items())
    assert len({name_of(v) for v in variants()}) == len(variants())
    wanted = {"weights": 3, "parallel": 3, "seca": 3, "activation": 5, "T": 4, "learning": 3, "neuron": 3}
    for name, count in wanted.items():
        assert len({v.get(name, DEFAULT[name]) for v in variants()}) == count, name


def test_images_are_averaged():
    images = random_set(4)
    small = shrink(images, 3, 8)
    assert small.images.shape == (3, 3, 8, 8) and small.spec.image_size == 8
    square = images.images[2, 1, 4:8, 12:16].double().mean()
    assert abs(small.images[2, 1, 1, 3] - square) <= 0.5
    with pytest.raises(ValueError, match="cannot be averaged to 7"):
        shrink(images, 3, 7)


def test_study(tmp_path, few, capsys, monkeypatch):
    data, out = str(parquet_folder(tmp_path / "data", "cifar100")), tmp_path / "out"
    common = ["--data", data, "--out", str(out), *FLAGS]
    ablation.main([*common, "--seeds", "2", "--part", "2/2"])
    first = ablation.read(out)
    assert [(r["variant"], r["seed"]) for r in first] == [("neuron=lif", 0), ("default", 1), ("neuron=mem_bn", 1)]
    ablation.main([*common, "--seeds", "2"])  # the others
    runs = ablation.read(out)
    assert runs[:3] == first and len(runs) == 6
    assert {"cpu", "commit", "date"} <= set(runs[0])
    assert all(len(r["accuracy"]) == 4 and len(r["loss"]) == 1 and r["cpu_seconds"] > 0 for r in runs)
    monkeypatch.setattr(ablation, "train", None)  # nothing is left to train
    ablation.main([*common, "--seeds", "2"])
    with pytest.raises(SystemExit, match="another folder"):
        ablation.main([*common, "--lr", "0.2"])
    ablation.main(["--report", "--out", str(out)])
    assert "| EM-PF |" in capsys.readouterr().out and (out / "report.png").stat().st_size > 1000
    assert "| EM-PF |" in (out / "report.md").read_text()


def test_a_run_depends_on_its_seed_alone():
    sets = tuple(shrink(random_set(40, "cifar100", seed), 40, 8) for seed in range(2))
    results = [ablation.train(TINY, {}, seed, sets) for seed in (0, 0, 1)]
    assert results[0]["loss"] == results[1]["loss"] != results[2]["loss"]
    assert torch.get_default_dtype() == torch.float32
    long = ablation.train(replace(TINY, epochs=2), {}, 0, sets)
    assert len(long["loss"]) == 2


def test_summary_and_table():
    runs = [
        {"variant": "default", "seed": s, "accuracy": [10.0, a], "cpu_seconds": 2.0} for s, a in enumerate((20, 22, 24))
    ]
    runs += [{"variant": "neuron=lif", "seed": 0, "accuracy": [5.0, 15.0], "cpu_seconds": 3.0}]
    found = summary(runs)
    assert found["default"]["mean"] == 22 and found["default"]["std"] == 2 and found["default"]["steps"] == [10, 22]
    text = tables(json.loads(json.dumps(Study().__dict__)), found)
    assert "| EM-PF, random step | 22.00 +- 2.00 | +0.00 | 1.00 | 3 |" in text
    assert "| LIF, random step | 15.00 | -7.00 | 1.50 | 1 |" in text
    assert text.count("## ") == len(TABLES)


def test_report_without_results(tmp_path):
    with pytest.raises(SystemExit, match="run the study first"):
        ablation.main(["--report", "--out", str(tmp_path)])
