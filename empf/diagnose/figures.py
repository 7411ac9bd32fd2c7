"""The figures of `python -m empf.diagnose`: 7.2 inches wide, in colours that all readers can tell apart."""

from pathlib import Path

from empf.figures import pyplot, save_figure

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"  # Okabe and Ito
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2,
    "lines.markersize": 3.5, "legend.frameon": False, "axes.titlelocation": "left", "pdf.fonttype": 42,
}  # fmt: skip


def shades(plt, count: int) -> list:
    """One colour per time step or lag, from light to dark."""
    return [plt.get_cmap("viridis_r")(0.12 + 0.88 * (k + 1) / count) for k in range(count)]


def number(value: float | None, spec: str = ".3f") -> str:
    """For people: an exact zero is told from a small number, what could not be measured is a dash."""
    return "-" if value is None else "0" if value == 0 else format(value, spec)


def known(values: list) -> list[float]:
    """None, where a gradient is zero, leaves a gap."""
    return [float("nan") if v is None else v for v in values]


def draw_separability(result: dict, samples: dict[str, list[dict]], path: Path) -> None:
    """Six panels: ds/dm, factors, activity | online against through time, what crosses steps, variance over t*.

    Layers are numbered from the input on.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, 3, figsize=(7.2, 4.7), layout="constrained")
        at_neurons(plt, axes[0], result, samples)
        at_weights(plt, axes[1], result)
        T = result["T"]
        step_legend(plt, fig, "lower left", "time step t (a, c, e)", range(1, T + 1))
        step_legend(plt, fig, "lower right", "lag t − t′ (b)", range(T))
        for ax, letter in zip(axes.flat, "abcdef", strict=True):
            ax.set_title(f"$\\bf{{{letter}}}$  {ax.get_title('left')}")
        save_figure(plt, fig, path)


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
    by_layer(ax, len(result["neurons"]), "spiking layer")
    for t in range(T):
        ys = [100 * steps[t]["above_threshold"] for steps in result["neurons"].values()]
        ax.plot(range(1, len(ys) + 1), ys, "o-", color=color[t])
    ax.set(ylabel="neurons above θ (%)", ylim=(0, None))
    ax.set_title("Activity")


def at_weights(plt, axes, result: dict) -> None:
    layers = {name: row for name, row in result["gradients"].items() if name.endswith(".weight")}
    whole, T, xs = result["gradients"]["all weights"], result["T"], range(1, len(layers) + 1)
    for ax in axes:
        by_layer(ax, len(layers), "weight layer")

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
    ax.legend()

    ax = axes[1]
    for t, color in enumerate(shades(plt, T)):
        ys = known([row["steps"][t]["temporal_share"] for row in layers.values()])
        ax.plot(xs, ys, "o-", color=color)
    ax.set(ylabel=r"$\|g_{\rm time}-g_{\rm online}\| / \|g_{\rm time}\|$", ylim=(0, None))
    ax.set_title("Gradient that crosses steps")

    ax = axes[2]
    ys = known([row["random"]["variance"] for row in layers.values()])
    ax.plot(xs, ys, "o-", color=PURPLE)
    ax.set(ylabel=r"$\mathrm{E}\,\|g_{t^*}-\bar g\|^2 / \|\bar g\|^2$", ylim=(0, None))
    ax.set_title(f"Drawn step: relative bias {number(whole['random']['bias'], '.0e')}")


def by_layer(ax, count: int, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(xlabel=label, xlim=(0.5, count + 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.grid(axis="y", alpha=0.3, linewidth=0.5)


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
    """Bytes over T: kept for the backward pass by each learning mode with the theory, and everything in parts.

    `random` and `every` hold one step: their points lie on each other, at T = 1 without a potential and so lower.
    """
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    rows = result["rows"]
    T = sorted({row["T"] for row in rows})
    kinds = {"stbp": (ORANGE, "s", 4), "every": (GREEN, "^", 6.5), "random": (BLUE, "o", 3.5)}
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")

        def curve(ax, key: str, learning: str, **style) -> None:
            values = [row[key] for row in rows if row["learning"] == learning]
            if None not in values:
                ax.plot(T, [value / 1e6 for value in values], color=kinds[learning][0], **style)

        for learning, (_, marker, size) in kinds.items():
            dots = {"marker": marker, "markersize": size, "linestyle": "", "label": learning}
            curve(axes[0], "theory", learning, linewidth=0.8, zorder=0)
            curve(axes[0], "saved", learning, **dots)
            curve(axes[0], "saved_plain", learning, linestyle=":")
            curve(axes[1], "total", learning, **{**dots, "linestyle": "-", "linewidth": 0.8})
            curve(axes[1], "allocated", learning, linestyle="--")
        extra = {"a: theory": {"linewidth": 0.8}, "a: nothing made again in backward": {"linestyle": ":"}}
        texts = ["kept for the backward pass (MB)", "in all (MB)"]
        more = [extra, {"b: allocated on the GPU": {"linestyle": "--"}} if rows[0]["allocated"] is not None else {}]
        fixed = sum(rows[0][part] for part in ("parameters", "gradients", "optimizer", "effective_weights"))
        axes[1].axhline(fixed / 1e6, color=GREY, linewidth=0.8, label="b: without activations")
        for ax, letter, text, lines in zip(axes, "ab", texts, more, strict=True):
            for label, style in lines.items():
                ax.plot([], [], color=GREY, label=label, **style)
            ax.set(xlabel="time steps T", ylabel=text, xscale="log", yscale="log")
            ax.set_xticks(T, [str(t) for t in T])
            ax.xaxis.set_minor_locator(plt.NullLocator())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:,.0f}")
            ax.yaxis.set_minor_formatter(plt.NullFormatter())
            ax.grid(alpha=0.3, linewidth=0.5)
            ax.set_title(f"$\\bf{{{letter}}}$")
        entries: dict = {}
        for ax in axes:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        fig.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4)
        save_figure(plt, fig, path)
