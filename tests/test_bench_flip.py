"""bench/flip.py: its runs, its table, and what docs/results.md says of them."""

from pathlib import Path

import pytest

from bench import flip
from empf.figures import has_matplotlib


@pytest.mark.parametrize("variant", ["sgd lr 0.05", "adaptive 0.05, rate 0.03"])
def test_a_run_is_a_line(variant, monkeypatch):
    monkeypatch.setitem(flip.DATASETS, "digits", dict(width=0.0625, T=1))
    row = flip.train("digits", flip.VARIANTS[variant], 0, 1437, 1, None)
    assert len(row["accuracy"]) == 1 and len(row["loss"]) == len(row["flipped"]) == 1
    assert 0 < row["flipped"][0] < 0.5 and row["loss"][0] < 3.5


def test_the_table_and_the_documentation_say_what_the_file_says():
    lines = flip.table(flip.read(flip.OUT)).splitlines()
    found = {line.split(" | ")[3]: line.split(" | ")[4] for line in lines if line.startswith("| digits | 1437 | 5 |")}
    text = (Path(flip.__file__).parents[1] / "docs" / "results.md").read_text()
    flipped, sgd = found["adaptive 0.05, rate 0.03"], found["sgd lr 0.05"]
    assert flipped.replace(" (", " % (").replace(")", ", 3 seeds)") in text and sgd.replace(" (", " % (") in text
    assert f"fixed threshold comes to {found['fixed 0.05, rate 0.03']}" in text
    lines = [line.split(" | ") for line in lines if line.startswith("| cifar100 | 10000 | 1 |")]
    found = {variant: accuracy for _, _, _, variant, accuracy, *_ in lines}
    adaptive = [found[f"adaptive {threshold}, rate 0.03"] for threshold in ("0.1", "0.05")]
    assert (
        "{} % with `--flip-threshold 0.1`, {} with the default, {} with".format(
            *adaptive, found["fixed 0.1, rate 0.03"]
        )
        in text
    )
    assert f"fixed threshold of 0.1; SGD {found['sgd lr 0.05']}." in text
    row = dict(dataset="a", images=1, epochs=2, variant="b", accuracy=[1.0, 3.0], loss=[1.0, 0.5], flipped=[0.25, 0.0])
    assert flip.table([row]).splitlines()[-1] == "| a | 1 | 2 | b | 3.0 | 1 | 0.500 | 25.0 |"


@pytest.mark.skipif(not has_matplotlib(), reason="matplotlib")
def test_curves_are_drawn_of_the_runs_that_are_there(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(flip, "save_figure", lambda plt, figure, path: drawn.append(figure))
    epochs = [{"loss": 3.0 - k, "train_accuracy": 10.0 * k} for k in range(3)]
    runs = [{"recipe": name, "flags": {"epochs": 3}, "epochs": epochs} for name in ("SGD", "SGD", "flip", "base")]
    flip.picture(runs, tmp_path / "flip.png")
    for ax, values in zip(drawn[0].axes, ([3.0, 2.0, 1.0], [0.0, 10.0, 20.0]), strict=True):
        assert [list(line.get_ydata()) for line in ax.lines] == [values] * 2
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == [
        "SGD, 3 epochs (n = 2)", "flip, 3 epochs (n = 1)",
    ]  # fmt: skip
