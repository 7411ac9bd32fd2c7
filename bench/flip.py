"""Synapses without latent weights (--optimizer flip) against SGD with them, in short trainings, by threshold.

    python bench/flip.py                     digits: all of VARIANTS that are missing in bench/results/flip.jsonl
    python bench/flip.py --dataset cifar100 --data FOLDER --only sgd --seeds 0 1 2 --epochs 3 --images 50000
    python bench/flip.py --table             what is there, as the table in docs/results.md
    python bench/flip.py --picture           curves of `SGD` and `flip` in bench/recipe.py: recipe/flip.png

ResNet-18, binary, T = 4, online, batches of 64, one learning rate for all that is not a synapse; digits at x0.125, or
CIFAR-100 at x0.25, 16x16 pixels, the first `--images` training images, mirrored at random. Each line of the file is a
run: accuracy on all test images after each time step, loss of each epoch, share of the synapses that are no longer what
they were an epoch before, mean over the layers.
"""

import argparse
import json
import sys
import time
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
import empf
from bench.ablation import in_layout, shrink
from bench.machine import machine
from empf.data.batches import Batches
from empf.data.load import load_data
from empf.evaluate import correct_per_step
from empf.figures import BLUE, GREEN, ORANGE, WIDTH, pyplot, save_figure
from empf.training.config import TrainConfig
from empf.training.health import Health
from empf.training.optimizers import flips_of, learning_rate, make_optimizer
from train import updates

OUT = Path(__file__).resolve().parent / "results" / "flip.jsonl"
RECIPES = OUT.with_name("recipe")
COLOURS = {"SGD": BLUE, "flip": ORANGE, "flip, slower": GREEN}
DATASETS = {
    "digits": dict(width=0.125, flip=False),
    "cifar100": dict(width=0.25, threshold=0.1, crop=False),
}
FLIP = dict(optimizer="flip", lr=0.05)
VARIANTS = {f"{name} lr {lr:g}": dict(optimizer=name, lr=lr) for name in ("sgd", "muon") for lr in (0.05, 0.1)}
VARIANTS |= {
    f"{'adaptive' if adaptive else 'fixed'} {threshold:g}, rate {rate:g}":
    dict(**FLIP, flip_adaptive=adaptive, flip_threshold=threshold, flip_rate=rate)
    for rate in (0.01, 0.03) for threshold in (0.025, 0.05, 0.1) for adaptive in (True, False)
}  # fmt: skip


def train(dataset: str, changes: dict, seed: int, images: int, epochs: int, data: str | None) -> dict:
    """One run, as a line of the file."""
    settings = dict(mixup=0.0, cutmix=0.0, label_smoothing=0.0, **DATASETS[dataset])
    config = TrainConfig(
        **{"dataset": dataset, **settings, **changes}, seed=seed, epochs=epochs, warmup_epochs=0.1 * epochs
    )
    train_set, test_set = load_data(dataset, data)
    if dataset == "cifar100":
        train_set, test_set = shrink(train_set, images, 16), shrink(test_set, len(test_set), 16)
    torch.manual_seed(seed)
    model = empf.build(config.model(train_set.spec)).to(memory_format=torch.channels_last)
    flips = flips_of(model, config, [])
    optimizer = make_optimizer(model, config)
    batches = Batches(train_set, config.batch_size, train=True, seed=seed, augment=config.augment())
    health, begin = Health(model, len(batches)), time.process_time()
    losses, flipped = [], []
    for epoch in range(epochs):
        model.train()
        batches.set_epoch(epoch)
        passed = updates(
            model, in_layout(batches), optimizer, epoch * len(batches), len(batches), flips=flips,
            draw=partial(empf.draw_steps, config.T, 1, seed),
            rate=lambda done: learning_rate(config, done / len(batches)),
        )  # fmt: skip
        losses.append(mean(float(batch.loss) for batch in passed))
        flipped.append(mean(health.report(1.0)["flips"].values()))
    seconds = time.process_time() - begin
    empf.calibrate(model, (x for x, _ in islice(Batches(train_set, 250, train=False), 20)))
    correct = correct_per_step(model, Batches(test_set, 250, train=False)).tolist()
    accuracy = [100 * c / len(test_set) for c in correct]
    return dict(accuracy=accuracy, loss=losses, flipped=flipped, cpu_seconds=round(seconds, 1))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: list[dict]) -> str:
    """A line for each variant and length: mean accuracy after the last time step, and the range over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["images"], row["epochs"], row["variant"]), []).append(row)
    head = "| data | images | epochs | variant | accuracy, % | seeds | last loss | flipped in the first epoch, % |"
    lines = [head, "|--" * 8 + "|"]
    for (*what, variant), found in sorted(groups.items()):
        last = [row["accuracy"][-1] for row in found]
        spread = f"{mean(last):.1f}" + (f" ({min(last):.1f} to {max(last):.1f})" if len(last) > 1 else "")
        loss, flipped = (mean(row[name][at] for row in found) for name, at in (("loss", -1), ("flipped", 0)))
        lines.append(
            f"| {' | '.join(map(str, what))} | {variant} | {spread} | {len(last)} | {loss:.3f} | {100 * flipped:.1f} |"
        )
    return "\n".join(lines)


def picture(runs: list[dict], path: Path) -> None:
    """Training loss and accuracy by epoch, a panel each: mean of the seeds, and from the lowest to the highest."""
    with pyplot() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3), layout="constrained")
        for ax, key, title in zip(
            axes, ("loss", "train_accuracy"), ("training loss", "training accuracy (%)"), strict=True
        ):
            for (name, colour), (epochs, style) in product(COLOURS.items(), ((10, "-"), (3, "--"))):
                found = [r for r in runs if r["recipe"] == name and r["flags"]["epochs"] == epochs]
                if found:
                    each = list(zip(*([epoch[key] for epoch in r["epochs"]] for r in found), strict=True))
                    x, label = range(1, epochs + 1), f"{name}, {epochs} epochs (n = {len(found)})"
                    ax.plot(x, list(map(mean, each)), style, color=colour, label=label)
                    ax.fill_between(x, list(map(min, each)), list(map(max, each)), color=colour, alpha=0.2, linewidth=0)
            ax.set(title=title, xlabel="epoch")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        save_figure(plt, figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--data", help="local folder of CIFAR-100")
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose names contain one of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=10_000, help="of CIFAR-100; of the digits all 1,437")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--picture", action="store_true", help="draw the runs of bench/recipe.py, train nothing")
    options = parser.parse_args()
    if options.picture:
        return picture(read(RECIPES / "confirm.jsonl"), RECIPES / "flip.png")
    torch.set_num_threads(options.threads)
    names = [name for name in VARIANTS if any(part in name for part in options.only) and not options.table]
    for seed in options.seeds:
        for name in names:
            images = 1437 if options.dataset == "digits" else options.images
            key = dict(dataset=options.dataset, variant=name, changes=VARIANTS[name], images=images)
            key |= dict(epochs=options.epochs, seed=seed)
            if any(key.items() <= row.items() for row in read(options.out)):
                continue
            row = key | train(options.dataset, VARIANTS[name], seed, images, options.epochs, options.data) | machine()
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name:28} seed {seed}  {row['accuracy'][-1]:5.2f} %  loss {row['loss'][-1]:.3f}", flush=True)
    print(table(read(options.out)))


if __name__ == "__main__":
    main()
