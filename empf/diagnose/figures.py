"""The figures of `python -m empf.diagnose`."""

from pathlib import Path

from empf.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    WIDTH,
    by_layer,
    lettered,
    plain_log,
    pyplot,
    save_figure,
    shades,
)


def number(value: float | None, spec: str = ".3f") -> str:
    """For people: an exact zero is told from a small number, what could not be measured is a dash."""
    return "-" if value is None else "0" if value == 0 else format(value, spec)


def known(values: list) -> list[float]:
    """None, where a gradient is zero, leaves a gap."""
    return [float("nan") if v is None else v for v in values]


def draw_separability(result: dict, samples: dict[str, list[dict]], path: Path) -> None:
    """Six panels: ds/dm, factors, activity | online against through time, what crosses steps, variance over t*.

    Shares have the scale from 0 to 1 in every figure, so that networks can be compared.
    """
    with pyplot() as plt:
        fig, axes = plt.subplots(2, 3, figsize=(WIDTH, 6.2), layout="constrained")
        at_neurons(plt, axes[0], result, samples)
        at_weights(plt, axes[1], result)
        T = result["T"]
        step_legend(plt, fig, "lower left", "time step t (a, c, e)", range(1, T + 1))
        step_legend(plt, fig, "lower right", "lag t − t′ (b)", range(T))
        handles, labels = axes[1, 0].get_legend_handles_labels()
        fig.legend(handles, labels, title="online against through time (d)", loc="outside lower center", ncols=3)
        lettered(axes.flat)
        fig.suptitle(about(result))
        save_figure(plt, fig, path)


def about(result: dict) -> str:
    """What was measured, where a result says so."""
    if "model" not in result:
        return f"T = {result['T']}"
    m = result["model"]
    return (
        f"{m['arch']} x{m['width']:g}, {m['weights']} weights, {m['neuron']} neurons, T = {m['T']}, "
        f"{'untrained' if result['untrained'] else 'trained'}; {result['images']} {result['split']} images of "
        f"{result['dataset']}"
    )


def at_neurons(plt, axes, result: dict, samples: dict[str, list[dict]]) -> None:
    summary, T = result["summary"], result["T"]
    color = shades(plt, T)
    label = r"\hat m" if result["mem_bn"] else "m"

    ax = axes[0]
    for t in range(T):
        xs, ys = ([v for layer in samples.values() for v in layer[t][key]] for key in ("x", "ds_dm"))
        ax.plot(xs, ys, ".", color=color[t], markersize=2, alpha=0.5, rasterized=True)
    everything = sorted(v for layer in samples.values() for step in layer for v in step["x"])
    low, high = (everything[int(q * (len(everything) - 1))] for q in (0.005, 0.995))
    ax.set(xlim=(min(low, -0.2), max(high, 0.2)), xlabel=rf"${label}-\theta$", ylabel=rf"$\partial s/\partial {label}$")
    ax.set_title(f"Spread on one side of θ: {number(summary['ds_dm_dependence'], '.2g')}")

    ax = axes[1]
    for lag in reversed(range(T)):
        pairs = [f[1:] for layer in samples.values() for step in layer for f in step["factors"] if f[0] == lag]
        xs, ys = ([v for pair in pairs for v in pair[k]] for k in (0, 1))
        ax.plot(
            xs, ys, "o", color=color[lag], markersize=3, alpha=0.6, markeredgewidth=0, rasterized=True, label=f"{lag}"
        )
    low, high = (f([f(ax.get_xlim()), f(ax.get_ylim())]) for f in (min, max))
    ax.plot([low, high], [low, high], color=GREY, linewidth=0.7, zorder=0)
    ax.set(xlabel="factor predicted", ylabel=r"$\partial s[t]/\partial I[t']$ measured")
    ax.set_title(f"Largest error: {number(summary['factor_error'], '.2g')}")

    ax = axes[2]
    by_layer(ax, list(result["neurons"]))
    for t in range(T):
        ys = [100 * steps[t]["above_threshold"] for steps in result["neurons"].values()]
        ax.plot(range(1, len(ys) + 1), ys, "o-", color=color[t])
    ax.set(ylabel="neurons above θ (%)", ylim=(0, 100))
    ax.set_title("Activity of each layer")


def at_weights(plt, axes, result: dict) -> None:
    layers = {name: row for name, row in result["gradients"].items() if name.endswith(".weight")}
    whole, T, xs = result["gradients"]["all weights"], result["T"], range(1, len(layers) + 1)
    for ax in axes:
        by_layer(ax, list(layers))

    ax = axes[0]
    kinds = (
        ("cosine", "cosine", BLUE, "o"),
        ("norm_ratio", "norm ratio", ORANGE, "s"),
        ("sign_agreement", "equal signs", GREEN, "^"),
    )
    for key, text, color, marker in kinds:
        ys = known([row["mean_of_losses"][key] for row in layers.values()])
        ax.plot(xs, ys, marker + "-", color=color, label=text)
    ax.axhline(1, color=GREY, linewidth=0.7, zorder=0)
    ax.set(ylabel="online against through time", ylim=(0, max(1.05, ax.get_ylim()[1])))
    ax.set_title(f"All weights: cosine {number(whole['mean_of_losses']['cosine'], '.3f')}")

    ax = axes[1]
    for t, color in enumerate(shades(plt, T)):
        ys = known([row["steps"][t]["temporal_share"] for row in layers.values()])
        ax.plot(xs, ys, "o-", color=color)
    ax.set(ylabel=r"$\|g_{\rm time}-g_{\rm online}\| / \|g_{\rm time}\|$", ylim=(0, max(1, ax.get_ylim()[1])))
    ax.set_title(f"Crosses steps: {number(whole['mean_of_losses']['temporal_share'], '.2g')} of all")

    ax = axes[2]
    ys = known([row["random"]["variance"] for row in layers.values()])
    ax.plot(xs, ys, "o-", color=PURPLE)
    ax.set(ylabel=r"$\mathrm{E}\,\|g_{t^*}-\bar g\|^2 / \|\bar g\|^2$", ylim=(0, max(1, ax.get_ylim()[1])))
    ax.set_title(f"Drawn step: relative bias {number(whole['random']['bias'], '.0e')}")


def step_legend(plt, fig, place: str, title: str, values: range) -> None:
    """Below the panels: the colours of steps or lags, of at most 9 of them."""
    color = shades(plt, len(values))
    shown = sorted({round(k * (len(values) - 1) / 8) for k in range(9)})
    dots = [plt.Line2D([], [], marker="o", linestyle="", color=color[k], label=str(values[k])) for k in shown]
    fig.legend(
        handles=dots, title=title, title_fontsize=7, loc=f"outside {place}", ncols=len(dots), handletextpad=0.1,
        columnspacing=0.8,
    )  # fmt: skip


def draw_memory(result: dict, path: Path) -> None:
    """Bytes over T, on one scale: kept for the backward pass by each learning mode with the theory, and in all.

    `random` and `every` hold one step: one curve, at T = 1 without a potential and so lower.
    """
    rows, m = result["rows"], result["model"]
    T = sorted({row["T"] for row in rows})
    kinds = {"stbp": (ORANGE, "s", "through time (stbp)"), "every": (BLUE, "o", "online (random, every)")}
    fixed = sum(rows[0][part] for part in ("parameters", "gradients", "optimizer", "effective_weights")) / 1e6
    with pyplot() as plt:
        fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained", sharey=True)

        def curve(ax, key: str, learning: str, **style) -> None:
            values = [row[key] for row in rows if row["learning"] == learning]
            if None not in values:
                ax.plot(T, [value / 1e6 for value in values], color=kinds[learning][0], **style)

        for learning, (_, marker, label) in kinds.items():
            curve(axes[0], "saved", learning, marker=marker, linestyle="", label=label)
            curve(axes[0], "theory", learning, linewidth=0.8, zorder=0)
            curve(axes[0], "saved_plain", learning, linestyle=":")
            curve(axes[1], "total", learning, marker=marker, linewidth=0.8)
            curve(axes[1], "allocated", learning, linestyle="--")
        axes[0].plot([], [], color=GREY, linewidth=0.8, label="theory, from the shapes alone (a)")
        axes[0].plot([], [], color=GREY, linestyle=":", label="nothing made again in backward (a)")
        axes[1].axhline(fixed, color=GREY, linewidth=0.8, label="without activations (b)")
        if rows[0]["allocated"] is not None:
            axes[1].plot([], [], color=GREY, linestyle="--", label="allocated on the GPU (b)")
        axes[0].set(title="Kept for the backward pass", xlabel="time steps T", ylabel="MB ($10^6$ bytes)")
        axes[1].set(title="In all: with weights, gradients, momentum, potentials", xlabel="time steps T")
        for ax in axes:
            ax.set_xscale("log", base=2)
            ax.set_xticks(T, [str(t) for t in T])
            ax.xaxis.set_minor_locator(plt.NullLocator())
        plain_log(axes[0].yaxis)
        lettered(axes)
        fig.legend(loc="outside lower center", ncols=3)
        fig.suptitle(
            f"{m['arch']} x{m['width']:g}, {m['weights']} weights, {m['neuron']} neurons, {m['image_size']} pixels, "
            f"batch of {result['batch_size']}"
        )
        save_figure(plt, fig, path)
