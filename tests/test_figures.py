"""The style that all figures share."""

import math

import matplotlib
import pytest
import torch

from empf.figures import (
    STYLE,
    by_layer,
    gaps,
    lettered,
    per_class,
    plain_log,
    pyplot,
    raster,
    save_figure,
    shades,
    short_names,
)


@pytest.fixture
def plt():
    with pyplot() as plt:
        yield plt
        plt.close("all")


def texts(axis) -> list[str]:
    axis.figure.canvas.draw()
    return [t.get_text() for t in axis.get_ticklabels() if t.get_text()]


@pytest.mark.parametrize(
    ("values", "some"),
    [
        ([2, 3], "2"),
        ([0.3, 0.7], "0.4"),
        ([1, 9], "5"),
        ([1, 150], "20"),
        ([1e-3, 5e4], "1,000"),
        ([1, 1e7], "1,000,000"),
    ],
)
@pytest.mark.parametrize("which", ["x", "y"])
def test_numbers_on_logarithmic_axes_are_plain_over_any_range(plt, values, some, which):
    ax = plt.subplots()[1]
    ax.plot(*([values, values]))
    axis = getattr(ax, f"{which}axis")
    plain_log(axis)
    labels = texts(axis)
    assert getattr(ax, f"get_{which}scale")() == "log" and some in labels and len(labels) >= 3
    assert not any(c in label for label in labels for c in "$^e")


def test_zeros_and_unknown_values_are_gaps():
    found = gaps([2.0, 0.0, None, 1e-9])
    assert found[0] == 2 and math.isnan(found[1]) and math.isnan(found[2]) and found[3] == 1e-9


def test_names_lose_what_tells_nothing_apart():
    weights = ["stem.conv.weight", "blocks.0.conv1.conv.weight", "blocks.2.shortcut.conv.weight", "head.weight"]
    assert short_names(weights) == ["stem", "blocks.0.conv1", "blocks.2.shortcut", "head"]
    assert short_names(["a.neuron", "a.conv.neuron", "a"]) == ["a.neuron", "a.conv.neuron", "a"]
    assert short_names(["layers.0.neuron", "neuron"]) == ["layers.0", "neuron"]


@pytest.mark.parametrize("count", [1, 5, 24, 25, 37, 100])
def test_layers_have_names_and_room(plt, count):
    ax = plt.subplots()[1]
    by_layer(ax, [f"blocks.{k}.conv.weight" for k in range(count)])
    labels = texts(ax.xaxis)
    assert labels[0] == "blocks.0" and labels[-1] == f"blocks.{count - 1}" and len(labels) <= 24
    assert len(labels) == count or count > 24


def test_the_style_is_left_behind(tmp_path):
    before = dict(matplotlib.rcParams)
    with pyplot() as plt:
        assert all(matplotlib.rcParams[name] == value for name, value in STYLE.items())
        figure, axes = plt.subplots(1, 2)
        axes[1].set_title("title")
        lettered(axes)
        assert axes[1].get_title("left") == "$\\bf{b}$  title"
        save_figure(plt, figure, tmp_path / "a.svg")
        assert not plt.get_fignums()
        assert len(set(shades(plt, 7))) == 7
    assert {k: v for k, v in matplotlib.rcParams.items() if k != "backend"} == {
        k: v for k, v in before.items() if k != "backend"
    }
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_a_raster_shows_spikes_and_potentials_of_one_scale(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("empf.figures.save_figure", lambda plt, figure, path: figures.append((figure, path)))
    spikes = torch.zeros(3, 2, 25)
    spikes[1, 0, 0], spikes[2, 1, 24] = 2.0, 0.5
    raster(spikes, spikes - 1, "a.png", neurons=10)
    ((figure, path),) = figures
    left, right, _ = figure.axes
    assert left.collections[0].get_offsets().tolist() == [[2, 0], [3, 9]]  # step, row: the first and the last neuron
    assert left.collections[0].get_sizes().tolist() == [40, 10] and path.name == "a.png"
    assert right.images[0].get_clim() == (-1, 1) and "10 of 50" in right.get_title("left")
    assert "1%" in left.get_title("left")


@pytest.mark.parametrize(("spikes", "potentials"), [((3, 4), (3, 5)), ((3,), (3,)), ((3, 0), (3, 0))])
def test_a_raster_refuses_what_it_cannot_draw(spikes, potentials, tmp_path):
    with pytest.raises(ValueError, match="same shape"):
        raster(torch.ones(spikes), torch.ones(potentials), tmp_path / "a.png")


@pytest.mark.parametrize("count", [2, 60])
def test_classes_of_any_number_and_name(tmp_path, count, monkeypatch):
    """The worst on top; what matplotlib would read as mathematics, or cannot print, is text."""
    kept = []
    monkeypatch.setattr("empf.figures.save_figure", lambda plt, figure, path: kept.append(figure))
    classes = [{"class": f"$c_{k}$ \n{'x' * 30}", "images": 9, "accuracy": float(k)} for k in range(count)]
    confused = [{"class": "a$b", "taken_for": "c$d", "images": 3, "share": 12.5}]
    per_class([*classes, {"class": "none", "images": 0, "accuracy": None}], confused, tmp_path / "a.png", "$t$")
    left, right = kept[0].axes
    assert [bar.get_width() for bar in left.patches] == [float(k) for k in reversed(range(count))]
    assert left.get_ylim()[0] < left.get_ylim()[1] and right.get_ylim()[0] > right.get_ylim()[1]
    assert texts(right.yaxis) == ["a\\$b \N{RIGHTWARDS ARROW} c\\$d"]
    assert (len(texts(left.yaxis)) == 2) == (count == 2)
    per_class(classes, [], tmp_path / "a.png", "no confusions")
