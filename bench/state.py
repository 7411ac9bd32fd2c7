"""Where state matters: four neurons on sequences, online and through time, read at the last step and in the sum.

    python bench/state.py              all runs that are missing (resumable; --minutes N): pip install aeon
    python bench/state.py --updates 1500 --learning random --only "events, digit"
                                       longer, with the settings chosen in short runs
    python bench/state.py --report     tables and a plot of the differences from the results

The sequences: `bench/sequences.py`. The network: two spiking layers, the synapses between them 1 bit each; on frames
they are convolutions.

Learning: online with one random step per batch, or with every step; through time with the losses of all steps, which
differs from `every step` in nothing but the gradient that crosses steps; through time with the loss of the mean logits
(`stbp` of train.py). All runs of a task have the
same number of updates and, for a seed, the same batches and initial weights. Learning rate and (initial) leak are
chosen for each task, neuron and learning by the mean of both accuracies on a fifth of the training data, with another
seed; test data play no part.
Results: `bench/results/state/runs.jsonl`, one line per run.
"""

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

import empf
from bench.ablation import against, append, paired, read
from bench.machine import machine
from bench.sequences import TASKS, Split
from empf.evaluate import answers
from empf.figures import BLUE, GREY, ORANGE, WIDTH, has_matplotlib, pyplot, save_figure
from empf.files import write_atomic
from empf.layer import over_steps

OUT = Path(__file__).parent / "results" / "state"
UPDATES, BATCH, SEEDS, CHOOSING = 300, 50, 5, 100  # the last is the seed with which settings are chosen
LRS, LEAKS = (3e-3, 1e-2, 3e-2), (0.5, 0.9)
NEURONS: dict[str, Callable[[int, int, float], nn.Module]] = {  # LIF keeps its leak, the others learn it
    "vanilla": lambda T, channels, leak: empf.EMPFNeuron(T, leak=leak),
    "Mem-BN": lambda T, channels, leak: empf.EMPFNeuron(T, channels, mem_bn=True, leak=leak),
    "parallel": lambda T, channels, leak: empf.EMPFNeuron(T, parallel=True),
    "LIF": lambda T, channels, leak: empf.LIFNeuron(T, leak=leak),
}
LEARNING = {
    "random": "online, one step", "every": "online, every step",
    "losses": "through time", "stbp": "through time, mean logits",
}  # fmt: skip
REFERENCE, READ = ("vanilla", "random"), ("last", "sum")


class Net(nn.Module):
    """x (k, N, features) or (k, N, C, H, W) -> logits (k, N, classes)."""

    def __init__(self, T: int, shape: tuple[int, ...], classes: int, neuron: str, leak: float):
        super().__init__()
        if len(shape) == 1:
            first = second = read_out = 128
            self.embed, self.hidden = nn.Linear(*shape, first, bias=False), empf.BinaryLinear(first, second)
        else:
            first, second = 16, 32
            conv = dict(kernel_size=3, stride=2, padding=1)
            self.embed = nn.Conv2d(shape[0], first, bias=False, **conv)
            self.hidden = empf.BinaryConv2d(first, second, **conv)
            read_out = second * math.prod(-(-side // 4) for side in shape[1:])
        self.norm1, self.norm2 = empf.StepBatchNorm(first), empf.StepBatchNorm(second)
        self.neuron1, self.neuron2 = (NEURONS[neuron](T, channels, leak) for channels in (first, second))
        self.head = nn.Linear(read_out, classes)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron1(self.norm1(over_steps(self.embed, x)))
        spikes = self.neuron2(self.norm2(over_steps(self.hidden, spikes)))
        return self.head(spikes.flatten(2))


def held_out(x: Tensor, y: Tensor) -> tuple[Split, Split]:
    """Every fifth sequence to choose by, the others to train with."""
    mine = torch.arange(len(y)) % 5 == 0
    return (x[:, ~mine], y[~mine]), (x[:, mine], y[mine])


def backward(net: nn.Module, x: Tensor, y: Tensor, learning: str, seed: int, iteration: int) -> None:
    if learning != "losses":
        steps = empf.draw_steps(len(x), 1, seed, iteration)
        empf.online_backward(net, x, y, F.cross_entropy, learning=learning, steps=steps)
        return
    empf.reset(net)
    empf.set_online(net, False)
    F.cross_entropy(net(x).flatten(0, 1), y.repeat(len(x))).backward()
    empf.set_online(net, True)


def train(
    sets: tuple[Split, Split], neuron: str, learning: str, updates: int, seed: int, lr: float, leak: float
) -> dict[str, float]:
    """One run: % of the second set that is right at the last step and in the sum of all steps, CPU seconds."""
    (x, y), test = sets
    begin = time.process_time()
    torch.manual_seed(seed)
    net = Net(len(x), tuple(x.shape[2:]), int(y.max()) + 1, neuron, leak)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates)
    for iteration in range(updates):
        rows = torch.randperm(len(y))[:BATCH]
        backward(net, x[:, rows], y[rows], learning, seed, iteration)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.process_time() - begin
    empf.calibrate(net, x.split(250, 1))
    ((logits, _),) = answers(net, [test])
    empf.reset(net.train())
    with torch.no_grad():  # a batch norm has then statistics of its own for each step, as in training
        by_step = net(test[0])
    right = [
        100 * (y.argmax(-1) == test[1]).double().mean().item() for z in (logits, by_step) for y in (z[-1], z.sum(0))
    ]
    names = (*READ, *(f"{name}_by_step" for name in READ))
    return dict(zip(names, right, strict=True)) | {"cpu_seconds": round(seconds, 2)}


def jobs(task: str, out: Path, updates: int, learning: Sequence[str]) -> Iterator[dict]:
    """The runs of a task: short ones by which settings are chosen, then the seeds, with the best settings."""
    kinds = [{"task": task, "neuron": neuron, "learning": how} for neuron in NEURONS for how in learning]
    for kind in kinds:
        for lr in LRS:
            for leak in LEAKS if kind["neuron"] != "parallel" else LEAKS[:1]:
                yield kind | {"updates": UPDATES, "held_out": True, "seed": CHOOSING, "lr": lr, "leak": leak}
    for seed in range(SEEDS):
        for kind in kinds:
            tried = [r for r in read(out) if r["held_out"] and kind.items() <= r.items()]
            best = max(tried, key=lambda r: r["last"] + r["sum"])
            settings = {"lr": best["lr"], "leak": best["leak"]}
            yield kind | {"updates": updates, "held_out": False, "seed": seed, **settings}


def run(out: Path, tasks: list[str], updates: int, learning: Sequence[str], minutes: float) -> None:
    """All missing runs, until the time is over."""
    out.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + 60 * minutes
    for task in tasks:
        sets = TASKS[task]()
        for key in jobs(task, out, updates, learning):
            if any(key.items() <= r.items() for r in read(out)):
                continue
            if time.monotonic() > stop:
                print("time is over; the same command continues")
                return
            how = {name: key[name] for name in ("neuron", "learning", "updates", "seed", "lr", "leak")}
            result = train(held_out(*sets[0]) if key["held_out"] else sets, **how)
            append(out, key | result | machine())
            print(*key.values(), *(f"{name} {value:.2f}" for name, value in result.items()), flush=True)


class Kind:
    """The runs of a neuron and a way of learning; `accuracy`: last and sum, by seed."""

    def __init__(self, runs: list[dict]):
        self.runs = runs
        self.accuracy = {name: {r["seed"]: r[name] for r in runs} for name in READ}

    def mean(self, name: str) -> float:
        return statistics.mean(r[name] for r in self.runs)

    def both(self, name: str) -> str:
        own = f" ({self.mean(f'{name}_by_step'):.1f})" if f"{name}_by_step" in self.runs[0] else ""
        return f"{self.mean(name):.1f}{own}"

    def less(self, other: "Kind", name: str) -> str:
        n, mean, half = against(self.accuracy[name], other.accuracy[name])
        return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]" if n > 1 and self is not other else ""


def kinds_of(runs: list[dict]) -> dict[tuple[str, int], dict[tuple[str, str], Kind]]:
    """(task, updates) -> (neuron, learning) -> its runs on test data, where the reference has been run."""
    found = {}
    for task, updates in sorted({(r["task"], r["updates"]) for r in runs}, key=lambda t: (list(TASKS).index(t[0]), t)):
        of = [r for r in runs if (r["task"], r["updates"], r["held_out"]) == (task, updates, False)]
        names = [(n, how) for n in NEURONS for how in LEARNING]
        kinds = {name: Kind([r for r in of if (r["neuron"], r["learning"]) == name]) for name in names}
        if kinds[REFERENCE].runs:
            found[task, updates] = {name: kind for name, kind in kinds.items() if kind.runs}
    return found


def tables(runs: list[dict]) -> str:
    """The report in Markdown."""
    commits = Counter(r["commit"] or "unknown" for r in runs)
    lines = [
        "# Where state matters", "",
        f"Updates of {BATCH} sequences, AdamW, {SEEDS} seeds. Accuracy: mean % of the test sequences by the "
        "logits of the last step, and by those of all steps, summed. Differences: mean and 95 % interval "
        "(t-distribution) of runs with the same seed. An interval that holds 0 shows no difference; each stands for "
        "itself: among many, one in twenty is wrong. In parentheses: each step of the "
        "test data normalised with its own statistics, as in training. Chosen on held-out training data in "
        f"{UPDATES} updates (seed {CHOOSING}): lr of {', '.join(map(str, LRS))}, (first) leak of "
        f"{', '.join(map(str, LEAKS))}.", "",
        f"Code: {', '.join(f'{commit} ({count} runs)' for commit, count in commits.items())}. "
        "`python bench/state.py && python bench/state.py --report`", "",
    ]  # fmt: skip
    for (task, updates), kinds in kinds_of(runs).items():
        lines += [
            f"## {task}, {updates} updates", "",
            "| neuron | learning | last | sum | last: less vanilla online | sum | last: less itself through time "
            "| sum | lr | leak | CPU s |", "|--" * 11 + "|",
        ]  # fmt: skip
        for (neuron, learning), kind in kinds.items():
            others = [kinds[REFERENCE], kinds.get((neuron, "losses"), kind)]
            cells = [neuron, LEARNING[learning], *map(kind.both, READ)]
            cells += [kind.less(other, name) for other in others for name in READ]
            cells += [kind.runs[0]["lr"], kind.runs[0]["leak"] if neuron != "parallel" else ""]
            seconds = statistics.mean(r["cpu_seconds"] for r in kind.runs)
            lines.append(f"| {' | '.join(map(str, cells))} | {seconds:.1f} |")
        lines.append("")
    return "\n".join(lines)


def plot(runs: list[dict], file: Path) -> None:
    """A panel for each task: differences to the reference, run by run, their mean and interval."""
    tasks = {task: kinds for (task, updates), kinds in kinds_of(runs).items() if updates == UPDATES}
    names = [(neuron, how) for neuron in NEURONS for how in LEARNING]
    shape = (-(-len(tasks) // 3), min(3, len(tasks)))
    with pyplot() as plt:
        size = (WIDTH, 0.6 + 2.8 * shape[0])
        figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", sharey=True, squeeze=False)
        for ax, (task, kinds) in zip(axes.flat, tasks.items(), strict=False):
            zero = kinds[REFERENCE]
            ax.axvline(0, color=GREY, linewidth=0.8)
            for y, name in ((y, name) for y, name in enumerate(names) if name in kinds):
                for read_out, color, shift in zip(READ, (ORANGE, BLUE), (-0.2, 0.2), strict=True):
                    pair = kinds[name].accuracy[read_out], zero.accuracy[read_out]
                    n, mean, half = against(*pair)
                    ax.plot(paired(*pair), [y + shift] * n, ".", color=GREY, markersize=2)
                    label = {"last": "last step", "sum": "sum of all steps"}[read_out] if name == REFERENCE else None
                    ax.errorbar(mean, y + shift, xerr=half, fmt="o", color=color, markersize=2.5, label=label)
            ax.set_title(f"{task}\n0: last {zero.mean('last'):.1f}, sum {zero.mean('sum'):.1f} %")
            ax.grid(visible=False, axis="y")
            for y in range(len(LEARNING), len(names), len(LEARNING)):
                ax.axhline(y - 0.5, color=GREY, linewidth=0.3)
        axes[0, 0].set_yticks(range(len(names)), [f"{n}, {LEARNING[how]}" for n, how in names])
        axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
        figure.suptitle(
            "Difference of the test accuracy to vanilla, online, one step (points)\n"
            f"{SEEDS} pairs of runs with the same seed (grey), mean and 95 % interval; without a dot: not run"
        )
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        save_figure(plt, figure, file)


def report(out: Path) -> None:
    runs = read(out)
    if not kinds_of(runs):
        raise ValueError(f"no run with {REFERENCE} on test data in {out}: run the study first, without --report")
    text = tables(runs)
    write_atomic(out / "report.md", text.encode())
    print(text)
    if has_matplotlib():
        plot(runs, out / "report.png")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="these tasks", metavar="TASK")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    p.add_argument("--updates", type=int, default=UPDATES, help=f"of the runs on test data (default: {UPDATES})")
    p.add_argument("--learning", nargs="+", choices=LEARNING, default=list(LEARNING), help="these ways", metavar="HOW")
    p.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    p.add_argument("--report", action="store_true", help="write report.md and report.png from the results")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    try:
        report(args.out) if args.report else run(args.out, args.only, args.updates, args.learning, args.minutes)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
