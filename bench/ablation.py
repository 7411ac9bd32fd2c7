"""What matters: one factor at a time around the default network, and the pairs that matter, on real images.

python bench/ablation.py --data FOLDER                 all runs that are missing (resumable; --minutes N stops after N)
python bench/ablation.py --data FOLDER --part 1/2      every second of them, for a second process
python bench/ablation.py --report                      tables and a plot of the differences from the results

A small setting, so that the whole study takes a few CPU hours: CIFAR-100 averaged to 16x16 pixels, 10,000 training
images, ResNet-18 at a quarter of its width, 4 epochs, one thread. All variants get the same images in the same order,
the same learning rate and the same number of updates; accuracy is that on all 10,000 test images after the last time
step, Mem-BN being calibrated first.

Two things differ from train.py, and stay as they are because all runs of a study must agree: weight decay is on all
parameters, leaks and thresholds included (train.py: on convolutions and linear layers only), and the learning rate is a
linear warm-up times a cosine over all updates (train.py: warm-up from 0.01 of it, and only then the cosine), so the two
schedules share no code.
Results: `bench/results/ablation/runs.jsonl`, one line per variant and seed.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

import empf
from bench.machine import machine
from empf.data.batches import Augment, Batches
from empf.data.load import load_data
from empf.data.sets import ImageSet
from empf.evaluate import correct_per_step
from empf.figures import BLUE, GREY, ORANGE, WIDTH, has_matplotlib, pyplot, save_figure
from empf.files import write_atomic
from train import updates

OUT = Path(__file__).parent / "results" / "ablation"

# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

DEFAULT = {
    "neuron": "empf", "weights": "binary", "parallel": 0.0, "seca": 0, "activation": "relu", "spike_bits": None, "T": 4,
    "spike_gradient": "identity", "learning": "random", "steps_per_batch": 1,
}  # fmt: skip

# Table -> variant -> what differs from the default. A variant may stand in several tables; it is run once.
TABLES = {
    "neuron and learning": {
        "EM-PF, random step": {},
        "EM-PF, 2 random steps": {"steps_per_batch": 2},
        "EM-PF, every step": {"learning": "every"},
        "EM-PF, through time": {"learning": "stbp"},
        "LIF, random step": {"neuron": "lif"},
        "LIF, every step": {"neuron": "lif", "learning": "every"},
        "LIF, through time": {"neuron": "lif", "learning": "stbp"},
    },
    "synapses": {
        "binary": {},
        "ternary": {"weights": "ternary"},
        "full precision": {"weights": "full"},
        "full precision, LIF, random step": {"weights": "full", "neuron": "lif"},
    },
    "version of the neuron": {
        "vanilla": {},
        "Mem-BN": {"neuron": "mem_bn"},
        "half parallel": {"parallel": 0.5},
        "all parallel": {"parallel": 1.0},
        "Mem-BN, half parallel": {"neuron": "mem_bn", "parallel": 0.5},
        "4-bit spikes": {"spike_bits": 4},
        "4-bit spikes, clipped gradient": {"spike_bits": 4, "spike_gradient": "clipped"},
        "4-bit spikes, half parallel": {"spike_bits": 4, "parallel": 0.5},
        "4-bit, half parallel, clipped": {"spike_bits": 4, "parallel": 0.5, "spike_gradient": "clipped"},
    },
    "channel attention": {
        "none": {},
        "SECA-I": {"seca": 1},
        "SECA-II": {"seca": 2},
        "SECA-II, Mem-BN": {"seca": 2, "neuron": "mem_bn"},
    },
    "activation": {
        "relu": {},
        "softplus": {"activation": "softplus"},
        "sigmoid": {"activation": "sigmoid"},
        "tanh": {"activation": "tanh"},
        "gelu": {"activation": "gelu"},
    },
    "time steps": {
        "T = 1": {"T": 1},
        "T = 2": {"T": 2},
        "T = 4": {},
        "T = 8": {"T": 8},
    },
}


@dataclass(frozen=True)
class Study:
    """What all variants have in common; written beside the results, which it must fit."""

    arch: str = "resnet18"
    width: float = 0.25
    image_size: int = 16
    images: int = 10_000
    test_images: int = 10_000
    epochs: int = 4
    batch_size: int = 50
    lr: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.1  # share of the updates


def name_of(changes: dict) -> str:
    """The key of a variant: what differs from the default."""
    return ", ".join(f"{k}={v}" for k, v in sorted(changes.items())) or "default"


def variants() -> list[dict]:
    """Every variant once: those of the first table and single changes, then the pairs."""
    first, *others = TABLES.values()
    once = {name_of(changes): changes for table in (first, *others) for changes in table.values()}
    return sorted(once.values(), key=lambda changes: len(changes) > 1 and changes not in first.values())


def shrink(images: ImageSet, count: int, size: int) -> ImageSet:
    """The first `count` images, averaged over squares of pixels to `size` x `size`."""
    factor, rest = divmod(images.spec.image_size, size)
    if rest or factor == 0:
        raise ValueError(f"images of {images.spec.image_size} pixels cannot be averaged to {size}: choose a divisor")
    pixels = F.avg_pool2d(images.images[:count].float(), factor).round().to(torch.uint8)
    spec = replace(images.spec, image_size=size, crop_padding=max(1, images.spec.crop_padding // factor))
    return ImageSet(pixels, images.labels[:count], images.class_names, spec)


def in_layout(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, images in the layout of the weights."""
    for images, target in batches:
        yield images.contiguous(memory_format=torch.channels_last), target


def train(study: Study, changes: dict, seed: int, sets: tuple[ImageSet, ImageSet]) -> dict:
    """One run: accuracy (%) after each time step on the test images, loss of each epoch, CPU seconds."""
    settings = {**DEFAULT, **changes}
    learning, k = settings.pop("learning"), settings.pop("steps_per_batch")
    spec = sets[0].spec
    shape = {"num_classes": spec.num_classes, "in_channels": spec.channels, "image_size": spec.image_size}
    torch.manual_seed(seed)
    model = empf.build(empf.ModelConfig(arch=study.arch, width=study.width, **shape, **settings))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=study.lr, momentum=0.9, nesterov=True, weight_decay=study.weight_decay
    )
    batches = Batches(sets[0], study.batch_size, train=True, seed=seed, augment=Augment(crop=True, flip=True))
    number, losses = study.epochs * len(batches), []

    def rate(done: int) -> float:
        warm_up = min(1.0, (done + 1) / (study.warmup * number))
        return study.lr * (warm_up * 0.5 * (1 + math.cos(math.pi * done / number)))

    start = time.process_time()
    for epoch in range(study.epochs):
        model.train()
        batches.set_epoch(epoch)
        epoch_of = updates(
            model, in_layout(batches), optimizer, epoch * len(batches), len(batches),
            draw=partial(empf.draw_steps, settings["T"], k, seed), rate=rate, learning=learning,
        )  # fmt: skip
        losses.append(sum(float(batch.loss) for batch in epoch_of) / len(batches))
    seconds = time.process_time() - start
    ordered = Batches(sets[0], 250, train=False)
    empf.calibrate(model, (images for images, _ in islice(ordered, 20)))
    correct = correct_per_step(model, Batches(sets[1], 250, train=False)).tolist()
    return {
        "variant": name_of(changes), "changes": changes, "seed": seed,
        "accuracy": [100 * c / len(sets[1]) for c in correct], "loss": losses, "cpu_seconds": round(seconds, 2),
    }  # fmt: skip


def read(out: Path) -> list[dict]:
    """The finished runs. An unfinished last line, of a process that was killed while it wrote, is left out.

    Raises ValueError that names the first other line which is not whole.
    """
    file = out / "runs.jsonl"
    if not file.exists():
        return []
    *lines, _ = file.read_text().split("\n")
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is damaged ({error}): delete it, its run is done again") from error
    return runs


def append(out: Path, result: dict) -> None:
    """Add a line; an unfinished one before it is cut off. Several processes may do this."""
    with FileLock(out / ".lock"), open(out / "runs.jsonl", "a+b") as f:  # the system frees the lock of a dead process
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(result).encode() + b"\n")


def run(study: Study, out: Path, data: str | None, seeds: int, part: tuple[int, int], minutes: float) -> None:
    """All missing runs of this part, seed by seed, until the time is over."""
    out.mkdir(parents=True, exist_ok=True)
    common = json.dumps(study.__dict__, indent=1) + "\n"
    if (out / "study.json").exists() and (out / "study.json").read_text() != common:
        raise ValueError(f"{out} holds a study with other settings: give another folder with --out")
    write_atomic(out / "study.json", common.encode())
    jobs = [(changes, seed) for seed in range(seeds) for changes in variants()][part[0] - 1 :: part[1]]
    sets = load_data("cifar100", data)
    sets = tuple(shrink(s, n, study.image_size) for s, n in zip(sets, (study.images, study.test_images), strict=True))
    stop = time.monotonic() + 60 * minutes
    for changes, seed in jobs:
        if any(r["variant"] == name_of(changes) and r["seed"] == seed for r in read(out)):
            continue
        if time.monotonic() > stop:
            print("time is over; the same command continues")
            return
        result = train(study, changes, seed, sets) | machine()
        append(out, result)
        print(
            f"{result['variant']:50s} seed {seed}  {result['accuracy'][-1]:5.2f} %  {result['cpu_seconds']:.0f} s",
            flush=True,
        )


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t with so many degrees of freedom, to 0.001; above 10 by an expansion."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def paired(runs: dict[int, float], default: dict[int, float]) -> list[float]:
    """Differences of runs with the same seed, by seed."""
    return [runs[seed] - default[seed] for seed in sorted(runs.keys() & default.keys())]


def against(runs: dict[int, float], default: dict[int, float]) -> tuple[int, float, float]:
    """(n, mean, half of the 95 % interval) of the differences of runs with the same seed; by seed, accuracies."""
    differences = paired(runs, default)
    n = len(differences)
    if n < 2:
        return n, differences[0] if n else math.nan, math.nan
    return n, statistics.mean(differences), t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)


def summary(runs: list[dict]) -> dict[str, dict]:
    """Variant -> n, mean and standard deviation of the accuracy, the means per time step, mean CPU seconds.

    "against", "differences": to the default variant, see `against` and `paired`.
    """
    result = {}
    last = {}
    for r in runs:
        last.setdefault(r["variant"], {})[r["seed"]] = r["accuracy"][-1]
    for name, by_seed in last.items():
        mine = [r for r in runs if r["variant"] == name]
        values = list(by_seed.values())
        result[name] = {
            "n": len(values), "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else math.nan,
            "steps": [statistics.mean(a) for a in zip(*(r["accuracy"] for r in mine), strict=True)],
            "cpu_seconds": statistics.mean(r["cpu_seconds"] for r in mine),
            "against": against(by_seed, last.get("default", {})),
            "differences": paired(by_seed, last.get("default", {})),
        }  # fmt: skip
    return result


def difference(name: str, r: dict) -> str:
    """A cell of the report: the difference to the default and what it is worth."""
    n, mean, half = r["against"]
    if name == "default":
        return "-"
    if n == 0:
        return "no seed in common"
    return f"{mean:+.2f}, n = 1: no conclusion" if n == 1 else f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def tables(study: dict, found: dict[str, dict], commits: dict[str, int]) -> str:
    """The report in Markdown; `commits`: of the code that made the runs, with their numbers."""
    code = ", ".join(f"{commit} ({count} runs)" for commit, count in commits.items())
    lines = [
        "# Ablation", "",
        f"CIFAR-100 at {study['image_size']}x{study['image_size']}, {study['images']} training images, "
        f"{study['arch']} x{study['width']}, {study['epochs']} epochs, batches of {study['batch_size']}, "
        f"SGD with lr {study['lr']} (warm-up over {100 * study['warmup']:g} % of the updates, cosine over all), weight "
        f"decay {study['weight_decay']} on all parameters (train.py: on convolutions and linear layers only).", "",
        "Accuracy: % of the test images, mean +- standard deviation over n seeds. Against the default: mean and 95 % "
        "interval (t-distribution) of the differences between runs with the same seed; an interval that holds 0 shows "
        "no difference. Each stands for itself: among many, one in twenty is wrong. Cost: CPU time of training, "
        "relative to the default.", "",
        f"Code: {code}. `python bench/ablation.py --data FOLDER && python bench/ablation.py --report`", "",
    ]  # fmt: skip
    for table, rows in TABLES.items():
        lines += [f"## {table}", "", "| variant | accuracy | against the default | cost | n |", "|---|---|---|---|---|"]
        for label, changes in rows.items():
            if (r := found.get(name_of(changes))) is None:
                lines.append(f"| {label} | not run | | | 0 |")
                continue
            cost = r["cpu_seconds"] / found["default"]["cpu_seconds"]
            spread = f" +- {r['std']:.2f}" if r["n"] > 1 else ""
            cells = (f"{r['mean']:.2f}{spread}", difference(name_of(changes), r), f"{cost:.2f}", str(r["n"]))
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(found: dict[str, dict], study: dict, file: Path) -> None:
    """All tables below each other: differences of each variant to the default, run by run, their mean and interval."""
    lines: list[tuple[str, dict | None]] = []  # label, result; a table's name has none
    for table, rows in TABLES.items():
        known = [(label, found[name]) for label, changes in rows.items() if (name := name_of(changes)) in found]
        lines += [(table, None), *known]
    places = range(len(lines), 0, -1)
    with pyplot() as plt:
        figure, ax = plt.subplots(figsize=(WIDTH, 0.17 * len(lines) + 1), layout="constrained")
        ax.axvline(0, color=GREY, linewidth=0.8)
        for y, (_, r) in zip(places, lines, strict=True):
            if r is None:
                continue
            if r is found["default"]:
                ax.plot(0, y, "D", color=ORANGE)
                text = f"{r['mean']:.2f} % (the default)"
            else:
                n, mean, half = r["against"]
                ax.plot(r["differences"], [y + 0.3] * n, "o", color=GREY, markersize=2, markeredgewidth=0)
                if n > 1:
                    ax.errorbar(mean, y, xerr=half, fmt="o", color=BLUE, capsize=2)
                text = f"{r['mean']:.2f} %, n = {n}"
            ax.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=6)
        ax.set_yticks(list(places), [label for label, _ in lines])
        for tick, (_, r) in zip(ax.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if r is None else "normal")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(visible=False, axis="y")
        ax.set(ylim=(0.3, len(lines) + 0.7), xlabel="difference of the test accuracy to the default (points)")
        figure.suptitle(
            f"CIFAR-100 at {study['image_size']}x{study['image_size']}, {study['images']:,} images, {study['arch']} "
            f"x{study['width']:g}, {study['epochs']} epochs\npairs of runs with the same seed (grey), mean and 95 % "
            "interval (blue)"
        )
        save_figure(plt, figure, file)


def report(out: Path) -> None:
    runs = read(out)
    if not any(r["variant"] == "default" for r in runs):
        raise ValueError(f"no run of the default variant in {out}: run the study first, without --report")
    found = summary(runs)
    commits = Counter(r["commit"] or "unknown" for r in runs)
    study = json.loads((out / "study.json").read_text())
    text = tables(study, found, commits)
    write_atomic(out / "report.md", text.encode())
    print(text)
    if has_matplotlib():
        plot(found, study, out / "report.png")
    else:
        print("no report.png without matplotlib: pip install 'empf[plot]'")


def part(text: str) -> tuple[int, int]:
    number, of = (int(n) for n in text.split("/"))
    if not 1 <= number <= of:
        raise ValueError
    return number, of


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--data", help="local folder with CIFAR-100 instead of the Hugging Face Hub")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    p.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    p.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="only the runs of process I of N")
    p.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--report", action="store_true", help="write report.md and report.png from the results")
    for field, default in Study().__dict__.items():
        p.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    args = vars(p.parse_args(argv))
    try:
        if min(args["threads"], args["seeds"]) < 1:
            raise ValueError(f"--threads and --seeds must be at least 1, got {args['threads']} and {args['seeds']}")
        torch.set_num_threads(args["threads"])
        if args["report"]:
            report(args["out"])
        else:
            study = Study(**{name: args[name] for name in Study().__dict__})
            run(study, args["out"], args["data"], args["seeds"], args["part"], args["minutes"])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
