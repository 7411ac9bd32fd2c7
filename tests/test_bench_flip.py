"""bench/flip.py: its runs, its table, and what docs/results.md says of them."""

from pathlib import Path

import pytest

from bench import flip


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
