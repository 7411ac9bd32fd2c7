"""curves.png of a run."""

from math import isnan
from pathlib import Path
from textwrap import shorten

from empf.figures import BLUE, ORANGE, WIDTH, gaps, lettered, plain, plain_log, pyplot, save_figure, shades, short_names
from empf.runs import best_epoch


def plot_curves(run: Path, history: list[dict], title: str) -> None:
    """Draw curves.png: losses, test accuracy after each time step and, where it was looked at, the health."""
    watched = [record for record in history if "health" in record]
    rows = 2 if watched else 1
    with pyplot() as plt:
        fig, axes = plt.subplots(rows, 2, figsize=(WIDTH, 3.2 * rows), layout="constrained", squeeze=False)
        plot_losses(axes[0, 0], history)
        if any("accuracy" in record for record in history):
            plot_accuracy(axes[0, 1], [record for record in history if "accuracy" in record], plt)
        if watched:
            plot_health(*axes[1], watched, plt)
        for ax in axes.flat:
            ax.set(xlabel="epoch", xlim=(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5))
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            below(ax)
        lettered(axes.flat)
        fig.suptitle(plain(title, 110))
        save_figure(plt, fig, run / "curves.png", dpi=150)


def below(ax) -> None:
    """The legend where no data are."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        columns = 2 if max(map(len, labels)) > 15 else 3
        ax.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=columns, fontsize=6.5,
            handlelength=1, columnspacing=1,
        )  # fmt: skip


def line(ax, records: list[dict], values: list[float], **style) -> None:
    """A value of each epoch; a single one is a dot."""
    ax.plot([r["epoch"] for r in records], values, marker="o" if len(records) == 1 else None, **style)


def plot_losses(ax, history: list[dict]) -> None:
    tested = [r for r in history if "test_loss" in r]
    line(ax, history, losses := gaps([r["loss"] for r in history]), color=ORANGE, label="training")
    if tested:
        line(ax, tested, gaps([r["test_loss"] for r in tested]), color=BLUE, label="test")
    ax.set(ylabel="cross-entropy", title="Loss")
    if not all(map(isnan, losses)):
        plain_log(ax.yaxis)  # the first tests of a training are far off


def plot_accuracy(ax, history: list[dict], plt) -> None:
    accuracy = [r["accuracy"] for r in history]
    T = len(accuracy[0])
    for t, color in enumerate(shades(plt, T)):
        label = f"t = {t + 1}: {accuracy[-1][t]:.2f} %"
        line(ax, history, [a[t] for a in accuracy], color=color, linewidth=1 + (t + 1 == T), label=label)
    held = [r for r in history if "held_out" in r]
    if held:
        label = f"held out, best in epoch {best_epoch(history)}"
        line(ax, held, [r["held_out"][-1] for r in held], color=ORANGE, linestyle="--", label=label)
    tested = "held-out" if "tested_on" in history[-1] else "test"
    ax.set(ylabel=f"{tested} accuracy (%)", title="Accuracy after time step t (legend: last epoch)")


def plot_health(left, right, watched: list[dict], plt) -> None:
    """Firing density and flip rate of every layer; a red line where there were warnings."""
    panels = ((left, "density", "non-zero spikes (%)"), (right, "flips", "weights flipped in the epoch (%)"))
    for ax, what, label in panels:
        layers = list(watched[0]["health"][what])
        for depth, (layer, name) in enumerate(zip(layers, short_names(layers), strict=True)):
            points = [r for r in watched if layer in r["health"][what]]
            values = [100 * r["health"][what][layer] for r in points]
            named = {0: f"{name} (first)", len(layers) - 1: f"{name} (last)"}.get(depth)
            named = None if named is None else plain(named, 40)
            values = gaps(values) if ax is right else values
            line(ax, points, values, color=shades(plt, len(layers))[depth], linewidth=1, label=named)
        ax.set(ylabel=label, title=f"{'Activity' if ax is left else 'Flips'} of each layer, from the first to the last")
    left.set(ylim=(0, None))
    if any(value > 0 for r in watched for value in r["health"]["flips"].values()):
        plain_log(right.yaxis)
    warned = [r for r in watched if r["health"]["warnings"]]
    for record in warned:
        for ax in (left, right):
            ax.axvline(record["epoch"], color="tab:red", alpha=0.3, linewidth=1)
    if warned:
        last = plain(shorten(warned[-1]["health"]["warnings"][-1], 90), 90)
        count = f"warnings in {len(warned)} epochs, see metrics.jsonl; the last, in epoch {warned[-1]['epoch']}:"
        left.figure.supxlabel(f"{count}\n{last}", fontsize=7, color="tab:red")
