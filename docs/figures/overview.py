"""Draws overview.png: a neuron over time, the gradient of a spike, and what training keeps.

    python docs/figures/overview.py

Spikes, potentials and gradients are computed here by the library; the memory is that of bench/results/memory.json.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed
import empf  # noqa: E402
from empf.figures import BLUE, GREY, ORANGE, WIDTH, lettered, plain_log, pyplot, save_figure  # noqa: E402

T, LEAK, THRESHOLD = 8, 0.5, 0.5
NEURONS = {
    "EM-PF: floating-point spikes": (lambda T: empf.EMPFNeuron(T, leak=LEAK, threshold=THRESHOLD), BLUE),
    "LIF: binary spikes": (lambda T: empf.LIFNeuron(T, leak=LEAK, threshold=THRESHOLD), ORANGE),
}
CURRENT = torch.tensor([0.4, 0.9, 0.1, 1.3, -0.5, 0.7, 1.0, 0.2])


@torch.no_grad()
def trajectory(neuron) -> tuple[list[float], list[float]]:
    """Spikes and potentials of one neuron that is fed with `CURRENT`."""
    spikes, potentials = [], []
    for current in CURRENT:
        spikes.append(neuron(current.view(1, 1, 1)).item())
        potentials.append(neuron.v.item())
    return spikes, potentials


def slope(neuron) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a spike with respect to its potential."""
    m = torch.linspace(-1, 2.5, 701).requires_grad_()
    neuron(m.view(1, 1, -1)).sum().backward()
    return m.detach(), m.grad


def draw(path: Path) -> None:
    memory = json.loads((ROOT / "bench/results/memory.json").read_text())
    with pyplot() as plt:
        fig, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), layout="constrained")
        steps = range(1, T + 1)
        for ax, (name, (make, colour)) in zip(axes[0], NEURONS.items(), strict=True):
            spikes, potentials = trajectory(make(T))
            ax.bar(steps, spikes, 0.5, color=colour, label="spike s")
            ax.step(steps, CURRENT, where="mid", color=GREY, lw=1, label="current I")
            ax.plot(steps, potentials, "o-", color="black", ms=3, lw=1, label="potential v, after the reset")
            ax.axhline(THRESHOLD, color="black", lw=0.6, ls=":")
            ax.set(title=name, xlabel="time step", ylim=(-0.7, 2.1), xticks=list(steps))
        axes[0, 0].set_ylabel("value; dotted: threshold")
        axes[0, 0].legend(loc="upper right")
        for name, (make, colour) in NEURONS.items():
            axes[1, 0].plot(*slope(make(1)), color=colour, label=name.split(":")[0])
        axes[1, 0].set(title="gradient of a spike", xlabel="potential m before the reset", ylabel="ds/dm")
        axes[1, 0].legend()
        draw_memory(axes[1, 1], memory)
        lettered(axes.flat)
        save_figure(plt, fig, path, dpi=150)


def draw_memory(ax, memory: dict) -> None:
    """MB that are kept for the backward pass, by T."""
    for mode, colour in (("random", BLUE), ("stbp", ORANGE)):
        rows = [row for row in memory["rows"] if row["learning"] == mode]
        label = {"random": "one random step", "stbp": "through time"}[mode]
        ax.plot([r["T"] for r in rows], [r["saved"] / 1e6 for r in rows], "o-", color=colour, ms=3, label=label)
    ax.set(title="kept for the backward pass", xlabel="time steps T", ylabel="MB", xscale="log", yscale="log")
    plain_log(ax.xaxis)
    plain_log(ax.yaxis)
    ax.legend()


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
