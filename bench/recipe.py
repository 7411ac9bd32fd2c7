"""Which settings of training help at equal cost: many of them in a short training, the best ones in a longer one.

python bench/recipe.py screen --data FOLDER            every variant below that is missing (resumable; --minutes N)
python bench/recipe.py confirm --data FOLDER           old and new recipe (also in bf16), x0.25, 3 seeds
python bench/recipe.py confirm --data FOLDER --only short       what 20 minutes bring, or one of the choices below
python bench/recipe.py report                          the tables

screen: CIFAR-100 averaged to 16x16 pixels, 20,000 training images, ResNet-18 x0.25, T = 4, binary, 4 epochs (or
--epochs), one thread. Variants get the same images in the same order and, but for other batch
sizes, the same number of updates.
confirm: train.py on all of CIFAR-100, in slices of --minutes that continue where the last one stopped.
Results: one line per run in `bench/results/recipe/`, screen.jsonl and confirm.jsonl.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

import empf
from bench.ablation import against, in_layout, shrink
from bench.machine import machine
from bench.record import train
from empf.data.batches import Batches
from empf.data.load import load_data
from empf.data.sets import ImageSet
from empf.evaluate import correct_per_step
from empf.files import write_atomic
from empf.neuron import EMPFNeuron, logit
from empf.runs import read_config, read_metrics
from empf.synapse import QuantizedWeight
from empf.training.config import Parser, TrainConfig
from empf.training.optimizers import learning_rate, make_optimizer
from train import updates

OUT = Path(__file__).parent / "results" / "recipe"
IMAGE_SIZE, IMAGES = 16, 20_000

# What the first small CIFAR-100 run of this repository was trained with.
OLD = dict(
    dataset="cifar100", width=0.25, epochs=4, batch_size=64, optimizer="sgd", lr=0.1, weight_decay=5e-4,
    warmup_epochs=0.5, threshold=0.5, mixup=0.0, cutmix=0.0, label_smoothing=0.0, threads=1,
)  # fmt: skip

NEW = dict(threshold=0.1, optimizer="muon", crop=False)
LONG = dict(lr=0.01, mixup=0.8, cutmix=1.0, label_smoothing=0.1)  # what train.py has for 300 epochs

# Twenty minutes on two cores, and what choices are compared with: small images first, tested once, at the end.
GROWN = {
    "dataset": "cifar100", "batch_size": 64, "optimizer": "muon", "lr": 0.1, "threshold": 0.1, "mixup": 0.0,
    "cutmix": 0.0, "label_smoothing": 0.1, "mixed_precision": "bf16",
}  # fmt: skip
SHORT = {**GROWN, "width": 0.5, "grow": "20:1:0.34,24:1:0.25,28:1:0.16,32:1:0.16", "epochs": 12, "test_every": 12}
BASE = {
    **GROWN, "batch_size": 128, "width": 0.25, "grow": "20:4:0.5,24:4:0.2", "epochs": 10, "test_every": 10,
}  # fmt: skip

# Choice -> what differs from BASE, and what it is compared with.
CHOICES = {
    "shortcut current": ({"shortcut": "current"}, "base"),
    "decay of everything": ({"decay_all": True}, "base"),
    "latent weights from 0..0.001": ({"latent_init": "positive"}, "base"),
    "label smoothing 0.19": ({"label_smoothing": 0.19}, "base"),
    "two random steps": ({"steps_per_batch": 2}, "base"),
    "Mem-BN": ({"neuron": "mem_bn"}, "base"),
    "4-bit spikes": ({"spike_bits": 4}, "base"),
    "4-bit spikes, clipped gradient": ({"spike_bits": 4, "spike_gradient": "clipped"}, "4-bit spikes"),
    "ternary": ({"weights": "ternary"}, "base"),
    "ternary, of each layer": ({"weights": "ternary", "granularity": "layer"}, "ternary"),
    "SECA-II": ({"seca": 2}, "base"),
    "SECA-II with bias": ({"seca": 2, "seca_bias": True}, "SECA-II"),
    "SGD": ({"optimizer": "sgd"}, "base"),
    "flip": ({"optimizer": "flip", "flip_rate": 0.02, "flip_threshold": 0.1}, "SGD"),
    "flip, slower": ({"optimizer": "flip", "flip_rate": 0.005, "flip_threshold": 0.03}, "SGD"),
}

FIRST = {name: {**OLD, "epochs": 3, **changes} for name, changes in (("long", LONG), ("old", {}), ("new", NEW))}
FIRST["new, bf16"] = FIRST["new"] | {"mixed_precision": "bf16"}
RECIPES = FIRST | {"short": SHORT, "base": BASE} | {name: BASE | changes for name, (changes, _) in CHOICES.items()}

# Name -> what differs from OLD: fields of TrainConfig, or tweaks (below).
VARIANTS: dict[str, dict] = {
    "old": {},
    "new": NEW,
    "new but with crop": {**NEW, "crop": True},
    "long": LONG,
    "two random steps": {"steps_per_batch": 2},
    "later steps more often": {"later": 1.0},
    "earlier steps more often": {"later": -1.0},
    "mixup 0.2": {"mixup": 0.2},
    "no crop": {"crop": False},
    "muon": {"optimizer": "muon"},
    "new, SECA-II": {**NEW, "seca": 2},
    "new, lr 0.05": {**NEW, "lr": 0.05},
    "new, lr 0.2": {**NEW, "lr": 0.2},
    "new, two random steps": {**NEW, "steps_per_batch": 2},
    "new, label smoothing 0.1": {**NEW, "label_smoothing": 0.1},
    "new, mixup 0.2": {**NEW, "mixup": 0.2},
    "lr 0.03": {"lr": 0.03},
    "lr 0.3": {"lr": 0.3},
    "lr 1": {"lr": 1.0},
    "lr falls linearly": {"linear": True},
    "no weight decay on latent weights": {"latent_decay": 0.0},
    "weight decay 2e-3": {"weight_decay": 2e-3},
    "latent weights x 0.3": {"latent_scale": 0.3},
    "latent weights x 3": {"latent_scale": 3.0},
    "threshold 0.02": {"threshold": 0.02},
    "threshold 0.1": {"threshold": 0.1},
    "threshold 0.25": {"threshold": 0.25},
    "leak 0.2": {"leak": 0.2},
    "leak 0.8": {"leak": 0.8},
    "Mem-BN": {"neuron": "mem_bn"},
    "Mem-BN, alpha 1, beta 0": {"neuron": "mem_bn", "alpha": 1.0, "beta": 0.0},
    "Mem-BN, alpha 0, beta 1": {"neuron": "mem_bn", "alpha": 0.0, "beta": 1.0},
    "last BN of a block starts at 0": {"residual_gain": 0.0},
    "last BN of a block starts at 0.3": {"residual_gain": 0.3},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "batch 32": {"batch_size": 32},
    "batch 128": {"batch_size": 128},
    "Adam": {"adam": 2e-3},
    "EMA 0.99": {"ema": 0.99},
    "SECA-II": {"seca": 2},
    "SECA-II, threshold 0.1": {"seca": 2, "threshold": 0.1},
    "SECA-II, threshold 0.1, Mem-BN": {"seca": 2, "threshold": 0.1, "neuron": "mem_bn"},
    "SECA-II, threshold 0.1, label smoothing 0.1": {"seca": 2, "threshold": 0.1, "label_smoothing": 0.1},
    "SECA-II, threshold 0.1, leak 0.2": {"seca": 2, "threshold": 0.1, "leak": 0.2},
}


def scale_latent(model: nn.Module, factor: float) -> None:
    for m in model.modules():
        if isinstance(m, QuantizedWeight):
            m.weight.data.mul_(factor)


def start_leak(model: nn.Module, value: float) -> None:
    for m in model.modules():
        if isinstance(m, EMPFNeuron):
            m.leak_logit.data.fill_(logit(value))


def start(name: str) -> Callable[[nn.Module, float], None]:
    def tweak(model: nn.Module, value: float) -> None:
        for m in model.modules():
            if isinstance(m, EMPFNeuron) and m.mem_bn:
                getattr(m, name).data.fill_(value)

    return tweak


def residual_gain(model: nn.Module, value: float) -> None:
    for block in model.blocks:
        block.conv2.bn.weight.data.fill_(value)


TWEAKS = {
    "latent_scale": scale_latent, "leak": start_leak,
    "alpha": start("alpha"), "beta": start("beta"), "residual_gain": residual_gain,
}  # fmt: skip


def optimizer_of(model: nn.Module, config: TrainConfig, latent_decay: float | None, adam: float | None):
    if adam is not None:
        return torch.optim.Adam(model.parameters(), lr=adam)
    optimizer = make_optimizer(model, config)
    if latent_decay is not None:
        latent = {m.weight for m in model.modules() if isinstance(m, QuantizedWeight)}
        mine = [p for p in optimizer.param_groups[0]["params"] if p in latent]
        optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p not in latent]
        optimizer.add_param_group({"params": mine, "weight_decay": latent_decay})
    return optimizer


def draw(config: TrainConfig, later: float, done: int) -> list[int]:
    """`later` > 0: steps with probability proportional to t^later."""
    if later == 0:
        return empf.draw_steps(config.T, config.steps_per_batch, config.seed, done)
    weights = torch.arange(1.0, config.T + 1) ** later
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + done)
    return [int(torch.multinomial(weights, 1, generator=generator)) + 1]


def falling(config: TrainConfig, progress: float) -> float:
    """A straight line instead of the cosine of `learning_rate`."""
    if progress < config.warmup_epochs:
        return learning_rate(config, progress)
    return config.lr * (config.epochs - progress) / (config.epochs - config.warmup_epochs)


def screen(changes: dict, seed: int, sets: tuple[ImageSet, ImageSet], number: int) -> dict:
    """One short run, of a `number` of epochs."""
    fields = {k: v for k, v in changes.items() if k in TrainConfig.__dataclass_fields__}
    tweaks = {k: v for k, v in changes.items() if k not in fields}
    config = TrainConfig(**{**OLD, **fields, "seed": seed, "epochs": number})
    adam, decay, later = tweaks.pop("adam", None), tweaks.pop("latent_decay", None), tweaks.pop("later", 0.0)
    rate = falling if tweaks.pop("linear", False) else learning_rate
    torch.manual_seed(seed)
    model = empf.build(config.model(sets[0].spec)).to(memory_format=torch.channels_last)
    for name, value in tweaks.items():
        TWEAKS[name](model, value)
    optimizer = optimizer_of(model, config, decay, adam)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    batches = Batches(sets[0], config.batch_size, train=True, seed=seed, augment=config.augment())
    factor = 1 if adam is None else adam / config.lr
    losses, begin = [], time.process_time()
    for epoch in range(config.epochs):
        model.train()
        batches.set_epoch(epoch)
        epoch_losses = []
        for batch in updates(
            model, in_layout(batches), optimizer, epoch * len(batches), len(batches),
            draw=partial(draw, config, later), rate=lambda done: rate(config, done / len(batches)) * factor,
        ):  # fmt: skip
            if config.ema:
                average.update_parameters(model)
            epoch_losses.append(float(batch.loss))
        losses.append(sum(epoch_losses) / len(batches))
    seconds = time.process_time() - begin
    model = average.module if config.ema else model
    empf.calibrate(model, (images for images, _ in islice(Batches(sets[0], 250, train=False), 20)))
    test = Batches(sets[1], 250, train=False)
    correct = correct_per_step(model, test).tolist()
    return {
        "accuracy": [100 * c / len(sets[1]) for c in correct],
        "loss": losses, "cpu_seconds": round(seconds, 3),  # of a tiny one, 0.0 would be divided by
    }  # fmt: skip


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, result: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:  # one write: lines of several processes do not mix
        f.write(json.dumps(result) + "\n")


def screen_all(out: Path, data: str | None, names: list[str], number: int, seeds: list[int], until: float) -> None:
    """The runs of a `number` of epochs that are missing, seed by seed."""
    sets = load_data("cifar100", data)
    sets = tuple(shrink(s, n, IMAGE_SIZE) for s, n in zip(sets, (IMAGES, len(sets[1])), strict=True))
    for seed in seeds:
        for name in names:
            key = {"variant": name, "changes": VARIANTS[name], "epochs": number, "seed": seed}
            if any(key.items() <= r.items() for r in read(out / "screen.jsonl")):
                continue
            if time.monotonic() > until:
                print("time is over; the same command continues")
                return
            result = key | screen(VARIANTS[name], seed, sets, number) | machine()
            add(out / "screen.jsonl", result)
            done = f"{name:45s} {number} epochs, seed {seed}  {result['accuracy'][-1]:5.2f} %"
            print(f"{done}  {result['cpu_seconds']:.0f} s", flush=True)


def confirm_all(
    out: Path, data: str | None, names: list[str], change: dict, seeds: list[int], runs: Path, until: float,
    processes: int,
) -> None:  # fmt: skip
    """Train with train.py what is missing, seed by seed, with `change`.

    A run that time stops continues with the next call.
    """
    for seed in seeds:
        for name in names:
            flags = {**RECIPES[name], **change, "seed": seed}
            if any(r["recipe"] == name and r["flags"] == flags for r in read(out / "confirm.jsonl")):
                continue
            run = runs / f"recipe-{name.replace(' ', '-')}-{flags['epochs']}-{seed}"
            left = until - time.monotonic()
            if left <= 0 or not train(run, flags, data, None if math.isinf(left) else left, processes):
                print("time is over; the same command continues")
                return
            history = read_metrics(run)
            result = {
                "recipe": name, "flags": flags, "seed": seed, "accuracy": history[-1]["accuracy"],
                "minutes": round(sum(e["seconds"] for e in history) / 60, 1),
                "processes": processes,
                "epochs": [{k: e.get(k) for k in ("loss", "train_accuracy", "accuracy", "seconds")} for e in history],
            } | machine() | {"commit": read_config(run)["git_commit"]}  # fmt: skip
            add(out / "confirm.jsonl", result)
            print(
                f"{name:10s} {flags['epochs']} epochs, seed {seed}  {result['accuracy'][-1]:.2f} %  "
                f"{result['minutes']:.0f} min", flush=True,
            )  # fmt: skip


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def cost(rows: list[dict], old: list[dict]) -> str:
    """CPU time as a multiple of that of `old` on the same day, since the machine may be another one or busier."""
    days: dict[str, list[float]] = {}
    for r in old:
        days.setdefault(r["date"][:10], []).append(r["cpu_seconds"])
    known = [r["cpu_seconds"] / statistics.mean(days[day]) for r in rows if (day := r["date"][:10]) in days]
    return f"{statistics.mean(known):.2f}" if known else ""


def choices(confirmed: list[dict]) -> list[str]:
    """The table of `CHOICES`: differences of runs of the same length with the same seed."""
    lines = [
        "", "## Choices", "",
        "All images. Difference: mean and 95 % interval (t-distribution) of runs with the same seed.", "",
        "| epochs | choice | accuracy | against | difference | n |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for number in sorted({r["flags"]["epochs"] for r in confirmed}):
        runs = [r for r in confirmed if r["flags"]["epochs"] == number]
        found = {name: {r["seed"]: r["accuracy"][-1] for r in runs if r["recipe"] == name} for name in RECIPES}
        for name, (_, other) in CHOICES.items():
            n, mean, half = against(found[name], found[other])
            if n:
                interval = f"{mean:+.2f}" + f" [{mean - half:+.2f}, {mean + half:+.2f}]" * (n > 1)
                lines.append(f"| {number} | {name} | {spread([*found[name].values()])} | {other} | {interval} | {n} |")
    return lines


def report(out: Path) -> str:
    """The tables in Markdown."""
    screened = read(out / "screen.jsonl")
    if not any(r["variant"] == "old" for r in screened):
        raise ValueError(f"no run of the variant 'old' in {out}: run `python bench/recipe.py screen` first")
    lines = [
        "# Recipe", "",
        "Test accuracy in %, mean +- standard deviation over n seeds; cost: CPU time, `old` of the same day is 1, and",
        "minutes of training with so many threads (other jobs ran beside, so a tenth means little in one, a quarter in",
        "the other). `python bench/recipe.py screen`, then `confirm`, then `report`.",
    ]  # fmt: skip
    for number in sorted({r["epochs"] for r in screened}):
        found: dict[str, list[dict]] = {}
        for r in screened:
            if r["epochs"] == number:
                found.setdefault(r["variant"], []).append(r)
        accuracy = {name: [r["accuracy"][-1] for r in rows] for name, rows in found.items()}
        old = found.get("old", [])
        lines += [
            "", f"## Screened: {IMAGES:,} images of {IMAGE_SIZE}x{IMAGE_SIZE}, {number} epochs", "",
            "| variant | accuracy | against old | cost | n |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for name in sorted(found, key=lambda n: -statistics.mean(accuracy[n])):
            mean = statistics.mean(accuracy[name])
            gain = f"{mean - statistics.mean(accuracy['old']):+.2f}" if old else ""
            lines.append(
                f"| {name} | {spread(accuracy[name])} | {gain} | {cost(found[name], old)} | {len(found[name])} |"
            )
    lines += [
        "", "## Confirmed: all of CIFAR-100", "",
        "| epochs | recipe | seeds | accuracy | processes x threads | minutes |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    confirmed = read(out / "confirm.jsonl")
    for number in sorted({r["flags"]["epochs"] for r in confirmed}):
        for name in RECIPES:
            rows = [r for r in confirmed if r["recipe"] == name and r["flags"]["epochs"] == number]
            if rows:
                seeds, accuracy = ", ".join(str(r["seed"]) for r in rows), spread([r["accuracy"][-1] for r in rows])
                used = [(r.get("processes", 1), r["flags"]["threads"] or r["cores"] // r["processes"]) for r in rows]
                threads = ", ".join(f"{processes} x {each}" for processes, each in used)
                minutes = ", ".join(str(round(r["minutes"])) for r in rows)
                lines.append(f"| {number} | {name} | {seeds} | {accuracy} | {threads} | {minutes} |")
    if not confirmed:
        lines[-2:] = ["Not run yet."]
    lines += choices(confirmed)
    named = {name: CHOICES[name][0] if name in CHOICES else flags for name, flags in RECIPES.items()}
    lines += ["", *(f"{name}: `{json.dumps(flags)}`" for name, flags in named.items()), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("what", choices=("screen", "confirm", "report"))
    p.add_argument("--data", help="local folder with CIFAR-100 instead of the Hugging Face Hub")
    p.add_argument(
        "--only", nargs="+", metavar="NAME", help="these variants or recipes (default: all, or the first four)"
    )
    p.add_argument("--epochs", type=int, help=f"default: {OLD['epochs']} to screen, as the recipe has it to confirm")
    p.add_argument("--threads", type=int, default=1, help="of each process, to confirm (default: 1)")
    p.add_argument("--processes", type=int, default=1, help="to confirm (default: 1)")
    p.add_argument("--seeds", nargs="+", type=int, help="default: 0 to screen, 0 1 2 to confirm")
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after so many minutes")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs of train.py (default: runs)")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = p.parse_args(argv)
    known = VARIANTS if args.what == "screen" else RECIPES
    names = args.only or list(VARIANTS if args.what == "screen" else FIRST)
    if unknown := sorted(set(names) - set(known)):
        p.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    until = time.monotonic() + 60 * args.minutes
    try:
        if args.what == "screen":
            torch.set_num_threads(1)
            screen_all(args.out, args.data, names, args.epochs or OLD["epochs"], args.seeds or [0], until)
        elif args.what == "confirm":
            change = {"threads": args.threads} | ({"epochs": args.epochs} if args.epochs else {})
            confirm_all(args.out, args.data, names, change, args.seeds or [0, 1, 2], args.runs, until, args.processes)
        else:
            text = report(args.out)
            write_atomic(args.out / "report.md", text.encode())
            print(text)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
