"""What matters: one factor at a time around the default network, and the pairs that matter, on real images.

python bench/ablation.py --data FOLDER                 all runs that are missing (resumable; --minutes N stops after N)
python bench/ablation.py --data FOLDER --part 1/2      every second of them, for a second process
python bench/ablation.py --report                      tables (mean +- standard deviation) and a plot from the results

A small setting, so that the whole study takes a few CPU hours: CIFAR-100 averaged to 16x16 pixels, 10,000 training
images, ResNet-18 at a quarter of its width, 4 epochs, one thread. All variants get the same images in the same order,
the same learning rate and the same number of updates; accuracy is that on all 10,000 test images after the last time
step, Mem-BN being calibrated first.
Results: `bench/results/ablation/runs.jsonl`, one line per variant and seed.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

import empf
from bench.machine import machine
from empf.data import Augment, Batches, ImageSet, load
from empf.evaluate import correct_per_step
from empf.runs import write_atomic

OUT = Path(__file__).parent / "results" / "ablation"

DEFAULT = {
    "neuron": "empf", "weights": "binary", "parallel": 0.0, "seca": 0, "activation": "relu", "spike_bits": None, "T": 4,
    "learning": "random", "steps_per_batch": 1,
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
        "4-bit spikes, half parallel": {"spike_bits": 4, "parallel": 0.5},
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
    updates, done, losses = study.epochs * len(batches), 0, []
    start = time.process_time()
    for epoch in range(study.epochs):
        model.train()
        batches.set_epoch(epoch)
        total = 0.0
        for images, target in batches:
            rate = min(1.0, (done + 1) / (study.warmup * updates)) * 0.5 * (1 + math.cos(math.pi * done / updates))
            for group in optimizer.param_groups:
                group["lr"] = study.lr * rate
            steps = empf.draw_steps(settings["T"], k, seed, done)
            images = images.contiguous(memory_format=torch.channels_last)
            loss, _ = empf.online_backward(model, images, target, F.cross_entropy, learning=learning, steps=steps)
            optimizer.step()
            optimizer.zero_grad()
            done, total = done + 1, total + float(loss)
        losses.append(total / len(batches))
    seconds = time.process_time() - start
    ordered = Batches(sets[0], 250, train=False)
    empf.calibrate(model, (images for images, _ in islice(ordered, 20)))
    correct = correct_per_step(model, Batches(sets[1], 250, train=False)).tolist()
    return {
        "variant": name_of(changes), "changes": changes, "seed": seed,
        "accuracy": [100 * c / len(sets[1]) for c in correct], "loss": losses, "cpu_seconds": round(seconds, 2),
    }  # fmt: skip


def read(out: Path) -> list[dict]:
    file = out / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(study: Study, out: Path, data: str | None, seeds: int, part: tuple[int, int], minutes: float) -> None:
    """All missing runs of this part, seed by seed, until the time is over."""
    out.mkdir(parents=True, exist_ok=True)
    common = json.dumps(study.__dict__, indent=1) + "\n"
    if (out / "study.json").exists() and (out / "study.json").read_text() != common:
        raise ValueError(f"{out} holds a study with other settings: give another folder with --out")
    write_atomic(out / "study.json", common.encode())
    jobs = [(changes, seed) for seed in range(seeds) for changes in variants()][part[0] - 1 :: part[1]]
    sets = load("cifar100", data)
    sets = tuple(shrink(s, n, study.image_size) for s, n in zip(sets, (study.images, study.test_images), strict=True))
    stop = time.monotonic() + 60 * minutes
    for changes, seed in jobs:
        if any(r["variant"] == name_of(changes) and r["seed"] == seed for r in read(out)):
            continue
        if time.monotonic() > stop:
            print("time is over; the same command continues")
            return
        result = train(study, changes, seed, sets) | machine()
        with open(out / "runs.jsonl", "a") as f:  # one write: lines of several processes do not mix
            f.write(json.dumps(result) + "\n")
        print(
            f"{result['variant']:50s} seed {seed}  {result['accuracy'][-1]:5.2f} %  {result['cpu_seconds']:.0f} s",
            flush=True,
        )


def summary(runs: list[dict]) -> dict[str, dict]:
    """Variant -> n, mean and standard deviation of the accuracy, its means per time step, mean CPU seconds."""
    result = {}
    for name in {r["variant"]: None for r in runs}:
        mine = [r for r in runs if r["variant"] == name]
        last = [r["accuracy"][-1] for r in mine]
        result[name] = {
            "n": len(mine), "mean": statistics.mean(last), "std": statistics.stdev(last) if len(last) > 1 else math.nan,
            "steps": [statistics.mean(a) for a in zip(*(r["accuracy"] for r in mine), strict=True)],
            "cpu_seconds": statistics.mean(r["cpu_seconds"] for r in mine),
        }  # fmt: skip
    return result


def tables(study: dict, found: dict[str, dict]) -> str:
    """The report in Markdown."""
    lines = [
        "# Ablation", "",
        f"CIFAR-100 at {study['image_size']}x{study['image_size']}, {study['images']} training images, "
        f"{study['arch']} x{study['width']}, {study['epochs']} epochs, lr {study['lr']}; test accuracy in %, mean +- "
        "standard deviation over n seeds; cost: CPU time of training, relative to the default.",
        "`python bench/ablation.py --data FOLDER && python bench/ablation.py --report`", "",
    ]  # fmt: skip
    for table, rows in TABLES.items():
        lines += [f"## {table}", "", "| variant | accuracy | against the default | cost | n |", "|---|---|---|---|---|"]
        for label, changes in rows.items():
            if (r := found.get(name_of(changes))) is None:
                lines.append(f"| {label} | not run | | | 0 |")
                continue
            difference, cost = r["mean"] - found["default"]["mean"], r["cpu_seconds"] / found["default"]["cpu_seconds"]
            spread = f" +- {r['std']:.2f}" if r["n"] > 1 else ""
            lines.append(f"| {label} | {r['mean']:.2f}{spread} | {difference:+.2f} | {cost:.2f} | {r['n']} |")
        lines.append("")
    return "\n".join(lines)


def plot(found: dict[str, dict], file: Path) -> None:
    """One panel per table: mean and standard deviation of each variant, the default as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = -(-len(TABLES) // 3)
    figure, axes = plt.subplots(height, 3, figsize=(15, 3.75 * height), layout="constrained", squeeze=False)
    for ax in axes.flat[len(TABLES) :]:
        ax.remove()
    for ax, (table, rows) in zip(axes.flat, TABLES.items(), strict=False):
        labels = [label for label, changes in rows.items() if name_of(changes) in found]
        values = [found[name_of(rows[label])] for label in labels]
        colors = ["tab:orange" if not rows[label] else "tab:blue" for label in labels]
        spread = [0 if math.isnan(v["std"]) else v["std"] for v in values]
        ax.barh(labels, [v["mean"] for v in values], xerr=spread, color=colors, capsize=3)
        ax.axvline(found["default"]["mean"], color="tab:orange", linewidth=1, linestyle="--")
        ax.invert_yaxis()
        ax.set(title=table, xlabel="test accuracy (%)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(out: Path) -> None:
    runs = read(out)
    if not any(r["variant"] == "default" for r in runs):
        raise ValueError(f"no run of the default variant in {out}: run the study first, without --report")
    found = summary(runs)
    text = tables(json.loads((out / "study.json").read_text()), found)
    write_atomic(out / "report.md", text.encode())
    plot(found, out / "report.png")
    print(text)


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
    torch.set_num_threads(args["threads"])
    try:
        if args["report"]:
            report(args["out"])
        else:
            study = Study(**{name: args[name] for name in Study().__dict__})
            run(study, args["out"], args["data"], args["seeds"], args["part"], args["minutes"])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
