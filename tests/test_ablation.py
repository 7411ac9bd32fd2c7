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
    results = []
    for seed in (0, 0, 1):
        results.append(ablation.train(TINY, {}, seed, sets))
        torch.rand(3)  # what was drawn before makes no difference
    assert results[0]["loss"] == results[1]["loss"] != results[2]["loss"]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    long = ablation.train(replace(TINY, epochs=2), {}, 0, sets)
    assert len(long["loss"]) == 2


def result(variant, seed, accuracy, **more):
    return {"variant": variant, "seed": seed, "accuracy": [5.0, accuracy], "cpu_seconds": 2.0, **more}


def test_summary_and_table():
    runs = [result("default", seed, accuracy) for seed, accuracy in enumerate((20.0, 22.0, 24.0))]
    runs += [result("neuron=lif", 0, 15.0, cpu_seconds=3.0)]
    runs += [result("learning=every", seed, accuracy) for seed, accuracy in ((2, 25.0), (1, 23.5), (0, 20.5))]
    found = summary(runs)
    assert found["default"]["mean"] == 22 and found["default"]["std"] == 2 and found["default"]["steps"] == [5, 22]
    text = tables(json.loads(json.dumps(Study().__dict__)), found, {"abc": 7})
    assert "| EM-PF, random step | 22.00 +- 2.00 | - | 1.00 | 3 |" in text
    assert "| LIF, random step | 15.00 | -5.00, n = 1: no conclusion | 1.50 | 1 |" in text  # against its own seed
    # differences 0.5, 1.5, 1.0: standard deviation 0.5, 4.303 * 0.5 / sqrt(3) = 1.242
    assert "| EM-PF, every step | 23.00 +- 2.29 | +1.00 [-0.24, +2.24] | 1.00 | 3 |" in text
    assert text.count("## ") == len(TABLES)
    for said in ("weight decay 0.0005 on all parameters", "batches of 50", "10 % of the updates", "abc (7 runs)"):
        assert said in text


def test_interval_of_paired_differences():
    assert ablation.against({0: 3.0, 1: 5.0}, {1: 4.0, 2: 9.0})[:2] == (1, 1.0)
    assert ablation.against({0: 3.0}, {1: 4.0})[0] == 0
    n, mean, half = ablation.against({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    assert (n, mean) == (2, 1.5) and half == pytest.approx(12.706 * 0.5, rel=1e-4)  # of few runs, little is known
    assert [round(ablation.t_quantile(freedom), 3) for freedom in (1, 2, 10)] == [12.706, 4.303, 2.228]
    assert ablation.t_quantile(11) == pytest.approx(2.201, abs=1e-3)
    assert ablation.t_quantile(30) == pytest.approx(2.042, abs=1e-3)


def test_a_run_killed_while_it_writes(tmp_path):
    file = tmp_path / "runs.jsonl"
    ablation.append(tmp_path, {"seed": 0})
    with open(file, "a") as f:
        f.write('{"seed": 1, "accu')
    assert ablation.read(tmp_path) == [{"seed": 0}]
    ablation.append(tmp_path, {"seed": 1})
    assert ablation.read(tmp_path) == [{"seed": 0}, {"seed": 1}] and file.read_text().count("\n") == 2
    file.write_text('{"seed": 0}\n{"seed"\n{"seed": 2}\n')
    with pytest.raises(ValueError, match="runs.jsonl, line 2 is damaged"):
        ablation.read(tmp_path)


def test_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "has_matplotlib", lambda: False)
    ablation.append(tmp_path, result("default", 0, 20.0, commit=None))
    (tmp_path / "study.json").write_text(json.dumps(Study().__dict__))
    ablation.main(["--report", "--out", str(tmp_path)])
    assert "pip install 'empf[plot]'" in capsys.readouterr().out
    assert "unknown (1 runs)" in (tmp_path / "report.md").read_text() and not (tmp_path / "report.png").exists()


def test_the_picture_shows_differences_of_pairs(tmp_path, monkeypatch):
    """Not accuracies from zero: each pair, their mean, its interval, n; the default as the line at 0."""
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(ablation, "save_figure", lambda plt, figure, file: figures.append(figure))
    for seed, (default, ternary) in enumerate([(20.0, 21.0), (30.0, 33.0)]):
        ablation.append(tmp_path, result("default", seed, default, commit="a"))
        ablation.append(tmp_path, result("weights=ternary", seed, ternary, commit="a"))
    ablation.append(tmp_path, result("seca=1", 0, 26.0, commit="a"))
    (tmp_path / "study.json").write_text(json.dumps(Study().__dict__))
    ablation.main(["--report", "--out", str(tmp_path)])
    (figure,) = figures
    (ax,) = figure.axes
    places = {t.get_text(): y for t, y in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)}
    at = {place: [line for line in ax.lines if abs(line.get_ydata()[0] - y) < 0.4] for place, y in places.items()}
    assert [list(line.get_xdata()) for line in at["ternary"][:2]] == [[1.0, 3.0], [2.0]]
    low, high = ax.collections[0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706), rel=1e-4)
    assert [list(line.get_xdata()) for line in at["SECA-I"]] == [[6.0]] and "Mem-BN" not in places
    texts = {round(t.xy[1]): t.get_text() for t in ax.texts}
    assert texts[places["ternary"]] == "27.00 %, n = 2" and texts[places["binary"]] == "25.00 % (the default)"
    plt.close("all")


def test_wrong_numbers_are_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="must be at least 1, got 0 and 3"):
        ablation.main(["--threads", "0", "--out", str(tmp_path)])


def test_report_without_results(tmp_path):
    with pytest.raises(SystemExit, match="run the study first"):
        ablation.main(["--report", "--out", str(tmp_path)])
