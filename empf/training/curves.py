"""curves.png of a run."""

from pathlib import Path
from textwrap import shorten

from empf.figures import pyplot, save_figure


def plot_curves(run: Path, history: list[dict], title: str) -> None:
    """Draw curves.png: training loss, test accuracy after each time step and, where it was looked at, the health."""
    plt = pyplot()
    watched = [record for record in history if "health" in record]
    rows = 2 if watched else 1
    fig, axes = plt.subplots(rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False)
    left, right = axes[0]
    epochs = [r["epoch"] for r in history]
    accuracy = [r["accuracy"] for r in history]
    T = len(accuracy[0])
    marker = "o" if len(epochs) == 1 else None
    left.plot(epochs, [r["loss"] for r in history], color="tab:red", marker=marker)
    left.set(ylabel="training loss (cross-entropy)", ylim=(0, None))
    shades = plt.get_cmap("viridis_r")
    for t in range(T):
        color = shades(0.25 + 0.75 * (t + 1) / T)
        label = f"t = {t + 1}: {accuracy[-1][t]:.2f} %"
        right.plot(
            epochs, [a[t] for a in accuracy], color=color, marker=marker, linewidth=1 + (t + 1 == T), label=label
        )
    right.set(ylabel="test accuracy (%)")
    right.legend(title="after time step, last epoch", loc="lower right")
    if watched:
        plot_health(*axes[1], watched, shades)
    for ax in axes.flat:
        ax.set(xlabel="epoch")
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.suptitle(title)
    save_figure(plt, fig, run / "curves.png", dpi=120)


def plot_health(left, right, watched: list[dict], shades) -> None:
    """Firing density and flip rate of every layer; a red line where there were warnings."""
    panels = ((left, "density", "non-zero spikes (%)"), (right, "flips", "weights flipped in the epoch (%)"))
    marker = "o" if len(watched) == 1 else None
    for ax, what, label in panels:
        layers = list(watched[0]["health"][what])
        for depth, layer in enumerate(layers):
            points = [(r["epoch"], 100 * r["health"][what][layer]) for r in watched if layer in r["health"][what]]
            color = shades(0.25 + 0.75 * (depth + 1) / len(layers))
            name = layer if depth in (0, len(layers) - 1) else None
            ax.plot(*zip(*points, strict=True), color=color, linewidth=1, marker=marker, label=name)
        ax.set(ylabel=label)
        if layers:
            ax.legend(title="first and last layer", fontsize=8, title_fontsize=8)
    if any(value > 0 for r in watched for value in r["health"]["flips"].values()):
        from matplotlib.ticker import LogFormatter  # an optional package

        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")  # 0.1, not 10^-1
        right.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))  # none where there are many powers
    warned = [r for r in watched if r["health"]["warnings"]]
    for record in warned:
        for ax in (left, right):
            ax.axvline(record["epoch"], color="tab:red", alpha=0.3, linewidth=1)
    if warned:
        count = f"warnings in {len(warned)} epochs, see metrics.jsonl; the last, in epoch {warned[-1]['epoch']}:"
        last = shorten(warned[-1]["health"]["warnings"][-1], 90)
        left.set_title(f"{count}\n{last}", fontsize=8, color="tab:red", loc="left")
