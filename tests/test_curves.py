"""curves.png of a run."""

from pathlib import Path

import numpy as np
import pytest

from empf.training.curves import plot_curves, plot_losses


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path


def test_the_curves_are_a_picture(run):
    from PIL import Image

    pytest.importorskip("matplotlib")
    history = [{"epoch": e, "loss": 1 / e, "accuracy": [10.0 * e, 20.0 * e]} for e in (1, 2)]
    history[1]["health"] = {"density": {r"\$a$\x": 0.3}, "flips": {}, "warnings": [r"$\y$: a warning"]}
    plot_curves(run, history, r"folder $1_$2\z$: a title")  # no mathematics
    with Image.open(run / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and image.width >= 800
        assert len(image.convert("L").histogram()) - image.convert("L").histogram().count(0) > 50


def test_the_curves_show_the_health(run):
    """A second row of panels, with the warnings in red; runs without health and epochs without it are fine."""
    from PIL import Image

    pytest.importorskip("matplotlib")
    history = [{"epoch": e, "loss": 1 / e, "accuracy": [10.0 * e, 20.0 * e]} for e in (1, 2, 3)]
    shapes = {}
    for warnings in ([], ["layer: it is silent: lower --lr"]):
        for record in history[1:]:
            record["health"] = {"density": {"a": 0.3, "b": 0.1}, "flips": {"c": 0.01}, "warnings": warnings}
        plot_curves(run, history, "title")
        with Image.open(run / "curves.png") as image:
            pixels = np.asarray(image.convert("RGB"))[image.height // 2 :].reshape(-1, 3)
            shapes[len(warnings)] = image.size, ((pixels[:, 0] > 180) & (pixels[:, 1:] < 90).all(1)).sum()
    assert shapes[0][0] == shapes[1][0] and shapes[0][0][1] > 900
    assert shapes[0][1] == 0 and shapes[1][1] > 100


def test_the_loss_of_a_first_test_that_is_far_off_leaves_the_others_readable():
    figures = pytest.importorskip("matplotlib.figure")
    for losses, scale in (([1.2, 0.1], "log"), ([0.0, 0.0], "linear")):
        ax = figures.Figure().subplots()
        plot_losses(ax, [{"epoch": e, "loss": x, "test_loss": 200 * x} for e, x in enumerate(losses)])
        assert ax.get_yscale() == scale
