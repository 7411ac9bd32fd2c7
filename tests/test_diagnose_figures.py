"""The figures of `python -m empf.diagnose`: what is drawn, and where the legends are."""

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from own_networks import Twice

from empf import ModelConfig, measure_separability
from empf.diagnose.figures import draw_memory, draw_separability, number
from empf.diagnose.memory import training_memory

matplotlib.use("Agg")


@pytest.fixture
def drawn(monkeypatch):
    """The figures, which are not closed."""
    figures = []
    monkeypatch.setattr("empf.diagnose.figures.save_figure", lambda plt, figure, path: figures.append(figure))
    yield figures
    plt.close("all")


def legends_lie_outside(figure) -> bool:
    figure.canvas.draw()
    panels = [ax.get_window_extent() for ax in figure.axes]
    boxes = [legend.get_window_extent() for legend in figure.legends]
    return bool(boxes) and not any(box.overlaps(panel) for box in boxes for panel in panels)


def test_separability_has_layer_names_and_scales_that_can_be_compared(drawn, tmp_path):
    torch.manual_seed(0)
    result, samples = measure_separability(Twice(), torch.randn(3, 12, 6), torch.arange(12) % 4)
    draw_separability(result, samples, tmp_path / "a.png")
    (figure,) = drawn
    names = [[t.get_text() for t in ax.get_xticklabels()] for ax in figure.axes]
    assert names[2] == ["neurons.0", "neurons.1", "neurons.2"] and names[3] == ["first", "shared", "last"]
    assert figure.axes[2].get_ylim() == (0, 100) and all(ax.get_ylim()[1] >= 1 for ax in figure.axes[3:])
    assert [ax.get_title("left")[:8] for ax in figure.axes] == [f"$\\bf{{{c}}}$" for c in "abcdef"]
    assert legends_lie_outside(figure) and figure.get_suptitle() == "T = 3"


def test_memory_is_titled_on_one_scale(drawn, tmp_path):
    config = ModelConfig(width=0.0625, image_size=8)
    result = {"model": config.to_dict(), "batch_size": 2, "rows": training_memory(config, 2, steps=(1, 2, 4))}
    draw_memory(result, tmp_path / "a.png")
    (figure,) = drawn
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim() and all(len(ax.get_title("left")) > 20 for ax in figure.axes)
    assert [t.get_text() for t in left.get_xticklabels()] == ["1", "2", "4"]
    assert legends_lie_outside(figure) and "resnet18 x0.0625" in figure.get_suptitle()
    points = {tuple(line.get_ydata()) for line in left.lines if line.get_marker() == "s"}
    assert points == {tuple(row["saved"] / 1e6 for row in result["rows"] if row["learning"] == "stbp")}


def test_numbers_tell_a_zero_from_a_small_one():
    assert [number(v, ".2f") for v in (None, 0.0, 1e-9, 0.5)] == ["-", "0", "0.00", "0.50"]
