"""The style of every figure: matplotlib without a screen, sizes of a paper, one palette, and a file that is whole.

7.2 inches are the width of a page. Colours that all readers can tell apart (Okabe and Ito): one for each meaning, and
shades from light to dark for time steps and layers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from empf.files import write_atomic
from empf.machine import installed
from empf.terminal import shown

__all__ = ["per_class", "raster"]  # the rest is the style of the library
WIDTH = 7.2  # inches
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "legend.title_fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "figure.titlesize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True,
    "grid.alpha": 0.3, "grid.linewidth": 0.5, "lines.linewidth": 1.2, "lines.markersize": 3.5, "legend.frameon": False,
    "pdf.fonttype": 42,
}  # fmt: skip


@contextmanager
def pyplot() -> Iterator:
    """`matplotlib.pyplot`, drawing into memory in the style of this file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        yield plt


def save_figure(plt, figure, path: Path, dpi: int = 300) -> None:
    """Save in the format of the path's suffix, and close."""
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=dpi)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def shades(plt, count: int) -> list:
    """One colour per time step, lag or layer, from light to dark."""
    return [plt.get_cmap("viridis_r")(0.12 + 0.88 * (k + 1) / count) for k in range(count)]


def short_names(names: Sequence[str]) -> list[str]:
    """Names of layers without endings that tell nothing apart: blocks.0.conv1.conv.weight -> blocks.0.conv1."""
    short = list(names)
    for ending in (".weight", ".neuron", ".conv"):
        cut = [name.removesuffix(ending) for name in short]
        short = cut if len(set(cut)) == len(cut) else short
    return short


def plain(text: object, most: int = 16) -> str:
    """A text that may come from anywhere, as it is: not as mathematics, which begins with $."""
    return shown(text, most).replace("$", r"\$")


def by_layer(ax, names: Sequence[str], most: int = 24) -> None:
    """Layers 1, 2, ... along the x axis with their names; of more than `most` layers, the first, the last and some."""
    every = -(-len(names) // most)
    ticks = [k for k in range(len(names)) if k % every == 0 and len(names) - 1 - k >= every] + [len(names) - 1]
    ax.set_xticks([k + 1 for k in ticks], [short_names(names)[k] for k in ticks], rotation=90, fontsize=5)
    ax.set(xlim=(0.5, len(names) + 0.5))
    ax.grid(visible=False, axis="x")


def plain_log(axis) -> None:
    """A logarithmic axis whose numbers are written out, and enough of them over any range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(MaxNLocator(5) if decades < 0.7 else LogLocator(subs=digits, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def gaps(values: Sequence[float | None]) -> list[float]:
    """What a logarithmic axis cannot show, or what is not known, becomes a gap and not a fall."""
    return [math.nan if value is None or value <= 0 else value for value in values]


def lettered(axes) -> None:
    """a, b, c ... before the titles of the panels."""
    for letter, ax in zip("abcdefghijkl", axes, strict=False):
        ax.set_title(f"$\\bf{{{letter}}}$  {ax.get_title('left')}")


def raster(spikes: Tensor, potentials: Tensor, path: str | Path, *, neurons: int = 32) -> None:
    """Draw what the neurons of one layer do over time for one input: the spikes they fire and what they keep.

    Args:
        spikes, potentials: (T, ...), all neurons of the layer at each step; the potentials after it has fired.
        path: the picture; its suffix is the format.
        neurons: the most that are drawn, evenly spread over the layer.

    The area of a dot is the height of the spike. Raises ValueError for shapes that differ, and without a neuron.

    >>> empf.figures.raster(torch.rand(4, 8).round(), torch.rand(4, 8), "layer.png")
    """
    if spikes.shape != potentials.shape or spikes.dim() < 2 or not spikes.numel() or neurons < 1:
        raise ValueError(
            "spikes and potentials must be (T, ...) of the same shape with at least one neuron to draw, "
            f"got {tuple(spikes.shape)}, {tuple(potentials.shape)} and neurons={neurons}"
        )
    s, v = (x.detach().float().cpu().flatten(1) for x in (spikes, potentials))
    firing = (s != 0).float().mean().item()
    chosen = torch.linspace(0, s.shape[1] - 1, min(neurons, s.shape[1])).round().long()
    s, v = s[:, chosen].T, v[:, chosen].T  # neurons T
    row, step = s.nonzero(as_tuple=True)
    heights, highest, reach = s[row, step].abs(), max(s.abs().max().item(), 1e-12), max(v.abs().max().item(), 1e-12)
    area = lambda height: 40 * height / highest  # noqa: E731
    with pyplot() as plt:
        size = (WIDTH, 1.2 + 0.1 * max(10, len(chosen)))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        left.scatter(step + 1, row, area(heights), color=BLUE, linewidths=0)
        for share in (0.25, 0.5, 1):
            left.scatter([], [], area(highest * share), color=BLUE, linewidths=0, label=f"{highest * share:.2g}")
        left.legend(title="spike", loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
        picture = right.imshow(
            v.numpy(), "RdBu_r", aspect="auto", vmin=-reach, vmax=reach, extent=_cells(v), origin="lower"
        )
        figure.colorbar(picture, ax=right, label="membrane potential after the step", aspect=30)
        left.set_title(f"Spikes: {firing:.0%} of the layer fires at a step")
        right.set_title(f"Potentials of {len(chosen)} of {spikes[0].numel():,} neurons")
        steps = torch.arange(1, s.shape[1] + 1, max(1, s.shape[1] // 10)).tolist()
        labels = torch.arange(0, len(chosen), -(-len(chosen) // 16)).tolist()
        for ax in (left, right):
            ax.set(xlabel="time step", xticks=steps, xlim=(0.5, s.shape[1] + 0.5), ylim=(-0.5, len(chosen) - 0.5))
        left.set_yticks(labels, chosen[labels].tolist())
        left.set_ylabel("neuron (index in the layer)")
        right.grid(visible=False)
        lettered((left, right))
        save_figure(plt, figure, Path(path))


def per_class(classes: Sequence[dict], confused: Sequence[dict], path: str | Path, title: str, named: int = 40) -> None:
    """Draw the accuracy of each class, the worst on top, and the pairs of classes that were confused most often.

    Args:
        classes, confused: as `empf.evaluate.by_class` returns them; of up to `named` classes the names are shown.
        path: the picture; its suffix is the format.

    >>> cats = {"class": "cat", "images": 4, "accuracy": 75.0}
    >>> pair = {"class": "cat", "taken_for": "dog", "images": 1, "share": 25.0}
    >>> empf.figures.per_class([cats], [pair], "classes.png", "four cats")
    """
    known = sorted((c for c in classes if c["accuracy"] is not None), key=lambda c: -c["accuracy"])
    few = len(known) <= named
    with pyplot() as plt:
        size = (WIDTH, 1 + 0.15 * (max(len(known), 12) if few else 20))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
        accuracy = [c["accuracy"] for c in known]
        mean = sum(accuracy) / len(accuracy)
        left.barh(range(len(known)), accuracy, height=0.7 if few else 1, color=BLUE)
        left.axvline(mean, color=GREY, linestyle="--")
        left.set(title=f"Accuracy per class; mean {mean:.1f} % (dashed)", xlabel="accuracy (%)", xlim=(0, 100))
        if few:
            left.set_yticks(range(len(known)), [f"{plain(c['class'])} (n = {c['images']})" for c in known])
        else:
            left.set_ylabel("class, from the best to the worst")
        right.barh(range(len(confused)), [c["images"] for c in confused], height=0.7, color=ORANGE)
        pairs = [f"{plain(c['class'])} \N{RIGHTWARDS ARROW} {plain(c['taken_for'])}" for c in confused]
        right.set_yticks(range(len(confused)), pairs)
        for row, c in enumerate(confused):
            right.annotate(f"{c['share']:.1f} %", (c["images"], row), (2, 0), textcoords="offset points", va="center")
        right.set(title="Confusions (share of the class)", xlabel="images")
        if not confused:
            right.text(0.5, 0.5, "none", transform=right.transAxes, ha="center", color=GREY)
        right.set_xlim(0, 1.25 * max([c["images"] for c in confused], default=1))
        right.invert_yaxis()
        for ax in (left, right):
            ax.grid(visible=False, axis="y")
            ax.set_ylim(*sorted(ax.get_ylim(), reverse=ax is right))
        right.xaxis.get_major_locator().set_params(integer=True)
        lettered((left, right))
        figure.suptitle(plain(title, 110))
        save_figure(plt, figure, Path(path))


def _cells(values: Tensor) -> tuple[float, float, float, float]:
    """Edges of an image (rows, T) whose rows are numbered from 0 and whose steps from 1."""
    return 0.5, values.shape[1] + 0.5, -0.5, len(values) - 0.5


def has_matplotlib() -> bool:
    return installed("matplotlib") is not None
