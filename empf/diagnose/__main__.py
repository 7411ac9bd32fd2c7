"""Look into a network: how separable its gradient is in time, and what its training keeps in memory.

python -m empf.diagnose RUN                   table, and RUN/separability.png; measured on a batch of training images
python -m empf.diagnose RUN --untrained       the same configuration, freshly initialised
python -m empf.diagnose --memory              bytes for T = 1..32 and each learning mode; no run needed
    --json FILE --figure FILE.png|.pdf|.svg   for both

What is measured and what the theory says is described in `separability.py` and `memory.py` of this folder. For a
network of your own call `empf.measure_separability`, and give its result to `separability_table`; or `network_memory`.
"""

import json
import sys
from pathlib import Path
from textwrap import wrap

import torch

from empf import runs
from empf.checks import check_device
from empf.data.load import load_data, make_batches
from empf.diagnose import figures as diagnose_figures
from empf.diagnose.figures import number
from empf.diagnose.memory import STEPS, training_memory
from empf.diagnose.separability import measure_separability
from empf.figures import has_matplotlib
from empf.files import write_result
from empf.machine import cpu_threads, machine
from empf.model_config import ARCHS, NEURONS, WEIGHTS, ModelConfig
from empf.models import SpikingNetwork, build
from empf.terminal import shown, steady_output
from empf.training.config import Parser, training_of
from empf.training.initial import begun

FIXED = ("parameters", "gradients", "optimizer", "effective_weights")
FIGURES = (".png", ".pdf", ".svg")
POOL = 4096  # images of the split, the first ones, from which the batch is drawn


def load_model(run: Path, untrained: bool, device: str) -> SpikingNetwork:
    if not untrained:
        return runs.load(run, device)
    config = runs.read_config(run)
    train = training_of(config, run)
    torch.manual_seed(train.seed)  # the weights with which the run began
    return begun(build(ModelConfig.from_dict(config["model"])), train).to(device)


def trained_by(run: Path) -> dict:
    """What trained a run, for a file that stands for itself: settings, epochs done, commit, versions. No paths."""
    config = runs.read_config(run)
    train, measured = training_of(config, run), runs.read_metrics(run)
    folders = {name: Path(at).name for name in ("data", "output_dir") if (at := getattr(train, name)) is not None}
    known = {"commit": config.get("git_commit"), "versions": config.get("versions")}
    return {"settings": config["train"] | folders, "epochs_done": measured[-1]["epoch"] if measured else 0, **known}


def separability(
    run: Path, *, data: str | None, split: str, batch_size: int, seed: int, untrained: bool, device: str
) -> tuple[dict, dict]:
    """What `measure_separability` finds on a run, with what it was found on; and the samples."""
    train = training_of(runs.read_config(run), run)
    model = load_model(run, untrained, device)
    pool = min(train.limit or POOL, POOL)
    sets = load_data(train.dataset, data or train.data, limit=pool, device=device, **train.reading())
    images = sets[split == "test"]
    x, target = next(iter(make_batches(images, batch_size, train=True, seed=seed)))  # drawn, not augmented
    result, samples = measure_separability(model, x, target)
    training = trained_by(run) | ({"epochs_done": 0} if untrained else {})
    about = {
        "run": run.resolve().name, "untrained": untrained, "dataset": train.dataset, "split": split,
        "images": len(target), "seed": seed, "device": device, "model": model.config.to_dict(), "training": training,
        "machine": machine(device),
    }  # fmt: skip
    return about | result, samples


def rows_to_text(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [header, *rows])
    return "\n".join(lines)


def listed(values: list[float] | None, extent: list[float]) -> str:
    """Few values are listed, a curve shows its range."""
    if values is None:
        return f"{extent[0]:.3g} .. {extent[1]:.3g}"
    return "{" + ", ".join(f"{v:.3g}" for v in values) + "}"


def about_run(r: dict) -> list[tuple[str, str]]:
    """The rows of the table that say what was measured."""
    m = r["model"]
    weights = "untrained" if r["untrained"] else "trained"
    return [
        ("run", f"{r['run']} ({weights})"),
        ("network", f"{m['arch']} x{m['width']:g}, {m['weights']} weights, {m['neuron']} neurons, T = {m['T']}"),
        ("batch", f"{r['images']} {r['split']} images of {r['dataset']}, seed {r['seed']}; statistics of the batch"),
    ]


def separability_table(r: dict) -> str:
    """A result of `measure_separability` for people.

    >>> net = empf.resnet18(num_classes=2, image_size=8, width=0.0625, T=2)
    >>> result, samples = empf.measure_separability(net, torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
    >>> print(separability_table(result))  # doctest: +ELLIPSIS
    separable ...
    """
    s, gradients = r["summary"], r["gradients"]
    unit = "ds/dm (in units of the gain of Mem-BN)" if r["mem_bn"] else "ds/dm"
    whole = gradients["all weights"]
    rows = [
        *(about_run(r) if "run" in r else []),
        ("separable", "yes" if r["verdict"]["separable"] else "no"),
        *(("", line) for reason in r["verdict"]["reasons"] for line in wrap(reason, 88)),
        *(("silent, nothing to measure", name) for name in r["verdict"]["silent"]),
        (unit, listed(s["ds_dm_values"], s["ds_dm_range"])),
        ("its dependence on m", f"{number(s['ds_dm_dependence'], '.3g')} (largest difference on one side of θ)"),
        ("factors, measured - theory", number(s["factor_error"], ".1e")),
        ("online gradient across steps", number(s["online_leak"], ".1e")),
        ("online against through time", agreement(whole["mean_of_losses"]) + "  (mean of the steps' losses)"),
        ("the same, loss of mean logits", agreement(whole["loss_of_mean"])),
        ("the two losses, through time", agreement(whole["between_losses"])),
        ("crosses steps", f"{number(s['temporal_share'])} of the norm of the gradient through time"),
        ("one drawn step instead of all T", f"relative bias of the mean gradient {number(s['random_bias'], '.1e')}"),
        ("", f"variance {number(s['random_variance'])} of its squared norm"),
    ]
    width = max(len(name) for name, _ in rows)
    neurons = [
        (
            name,
            " ".join(f"{100 * step['above_threshold']:.0f}" for step in steps),
            listed(*values_of(steps)),
            number(max(step["dependence"] for step in steps), ".3g"),
            number(max(step["factor_error"] for step in steps), ".1e"),
            " ".join(number(step["temporal_share"], ".2f") for step in steps),
            number(max(step["online_leak"] for step in steps), ".1e"),
        )
        for name, steps in r["neurons"].items()
    ]
    layers = [
        (
            name,
            *(number(row["mean_of_losses"][key]) for key in ("cosine", "norm_ratio", "sign_agreement")),
            " ".join(number(step["temporal_share"], ".2f") for step in row["steps"]),
            number(row["random"]["variance"]),
            number(row["random"]["bias"], ".1e"),
        )
        for name, row in gradients.items()
    ]
    across = f"crosses steps, step 1..{r['T']}"
    at_neurons = ("neurons", f"% above θ, step 1..{r['T']}", "ds/dm", "dependence", "factor error", across, "leak")
    at_weights = ("weights", "cosine", "norm", "signs", across, "variance", "bias")
    head = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    return "\n\n".join([head, rows_to_text(at_neurons, neurons), rows_to_text(at_weights, layers)])


def values_of(steps: list[dict]) -> tuple[list[float] | None, list[float]]:
    """ds/dm of a layer over its steps: the distinct values where they are few, and the range."""
    values = [step["ds_dm"]["values"] for step in steps]
    extent = [min(step["ds_dm"]["min"] for step in steps), max(step["ds_dm"]["max"] for step in steps)]
    return None if None in values else sorted(set().union(*values)), extent


def agreement(row: dict) -> str:
    return (
        f"cosine {number(row['cosine'], '.4f')}, norm {number(row['norm_ratio'])}, "
        f"signs {number(row['sign_agreement'])}"
    )


def memory(config: ModelConfig, batch_size: int, device: str, steps: list[int], optimizer: str = "sgd") -> dict:
    """`training_memory` with what it was counted for."""
    rows = training_memory(config, batch_size, device, sorted(set(steps)), optimizer == "flip")
    model = {key: value for key, value in config.to_dict().items() if key != "T"}
    about = {"model": model, "batch_size": batch_size, "device": device, "optimizer": optimizer}
    return about | {"machine": machine(device), "rows": rows}


def memory_table(r: dict) -> str:
    m, rows = r["model"], r["rows"]
    mb = lambda value: "-" if value is None else f"{value / 1e6:.1f}"  # noqa: E731
    keys = ("saved", "saved_plain", "theory", "potentials", "total", "allocated")
    titles = ("saved", "plain", "theory", "potentials", "total", "allocated")
    table = [
        (
            f"{row['T']:>2} {row['learning']}",
            *(mb(row[key]) for key in keys),
            f"{row['saved'] / row['saved_plain']:.2f}",
        )
        for row in rows
    ]
    fixed = ", ".join(f"{key.replace('_', ' ')} {mb(rows[0][key])}" for key in FIXED)
    head = (
        f"{m['arch']} x{m['width']:g}, {m['weights']} weights, {m['neuron']} neurons, {m['image_size']} pixels, "
        f"batch of {r['batch_size']}, {r['device']}; MB = 10^6 bytes\n"
        f"whatever T is, with {r['optimizer']}: {fixed}; {mb(sum(rows[0][key] for key in FIXED))} in all\n"
        "saved: for the backward pass; plain: with nothing made again; theory: of saved, from the shapes alone\n"
        "random and every hold one step at a time: the same count"
    )
    return head + "\n\n" + rows_to_text((" T learning", *titles, "saved / plain"), table)


def parser() -> Parser:
    p = Parser(prog="python -m empf.diagnose", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("run", type=Path, nargs="?", help="run folder that train.py wrote")
    p.add_argument("--batch-size", type=int, help="images (default: 32; with --memory 8, or 64 on a GPU)")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core (default: 0)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    p.add_argument(
        "--figure", type=Path, metavar="FILE",
        help="default: separability.png in the run folder; with --memory none",
    )  # fmt: skip
    run = p.add_argument_group("gradient of a run")
    run.add_argument("--untrained", action="store_true", default=None, help="as the run began, before training")
    run.add_argument("--data", help="local folder of the data set; default: where the run found it")
    run.add_argument("--split", choices=("train", "test"), help="images (default: train)")
    run.add_argument("--seed", type=int, help="draws the images (default: 0)")
    m = p.add_argument_group("memory of a configuration")
    m.add_argument("--memory", action="store_true", help="count the memory of training instead")
    m.add_argument("--T", type=int, nargs="+", help="time steps (default: 1 2 4 8 16 32)")
    m.add_argument("--arch", choices=ARCHS, help="default: resnet18")
    m.add_argument("--width", type=float, help="default: 1")
    m.add_argument("--weights", choices=WEIGHTS, help="default: binary")
    m.add_argument("--neuron", choices=NEURONS, help="default: empf")
    m.add_argument("--optimizer", choices=("sgd", "flip"), help="flip: without latent weights (default: sgd)")
    m.add_argument("--parallel", type=float, help="share of parallel neurons (default: 0)")
    m.add_argument("--image-size", type=int, help="default: 32; vgg_snn 48")
    m.add_argument("--num-classes", type=int, help="default: 100")
    return p


OF_A_RUN = {"untrained": False, "data": None, "split": "train", "seed": 0}
OF_MEMORY = {
    "T": STEPS, "arch": "resnet18", "width": 1.0, "weights": "binary", "neuron": "empf", "parallel": 0.0,
    "image_size": None, "num_classes": 100, "optimizer": "sgd",
}  # fmt: skip


def with_defaults(args) -> None:
    """Fill in what was not given; ValueError for a flag of the other mode, which would do nothing."""
    if (args.run is None) != args.memory:
        raise ValueError("give either a run folder that train.py wrote, or --memory")
    other, here = (OF_A_RUN, "--memory") if args.memory else (OF_MEMORY, "a run")
    if wrong := ["--" + name.replace("_", "-") for name in other if getattr(args, name) is not None]:
        raise ValueError(f"leave out {' and '.join(wrong)}, which would do nothing with {here}")
    for name, value in {**OF_A_RUN, **OF_MEMORY}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def memory_config(args) -> ModelConfig:
    events = args.arch == "vgg_snn"
    size = (48 if events else 32) if args.image_size is None else args.image_size
    return ModelConfig(
        arch=args.arch, width=args.width, weights=args.weights, neuron=args.neuron, parallel=args.parallel,
        num_classes=args.num_classes, image_size=size, in_channels=2 if events else 3,
    )  # fmt: skip


def diagnose(args) -> None:
    """Measure, print, write."""
    with_defaults(args)
    if min(args.threads, args.seed) < 0 or (args.batch_size is not None and args.batch_size < 2):
        raise ValueError(
            "--batch-size must be at least 2 (statistics of the batch), --threads and --seed at least 0, got "
            f"{args.batch_size}, {args.threads} and {args.seed}"
        )
    torch.set_num_threads(cpu_threads(args.threads))
    if min(args.T) < 1:
        raise ValueError(f"--T takes numbers of time steps from 1 on, got {min(args.T)}")
    if args.figure is not None and args.figure.suffix not in FIGURES:
        raise ValueError(f"--figure must end with {', '.join(FIGURES)}, got {args.figure.name}")
    if args.figure is not None and not has_matplotlib():
        raise ValueError("--figure needs matplotlib: pip install 'empf[plot]'")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device, "--device")
    if args.memory:
        batch_size = args.batch_size or (64 if device.startswith("cuda") else 8)
        result = memory(memory_config(args), batch_size, device, args.T, args.optimizer)
        text, figure = memory_table(result), args.figure
        draw = lambda: diagnose_figures.draw_memory(result, figure)  # noqa: E731
    else:
        result, samples = separability(
            args.run, data=args.data, split=args.split, batch_size=args.batch_size or 32, seed=args.seed,
            untrained=args.untrained, device=device,
        )  # fmt: skip
        text = separability_table(result)
        figure = args.figure or args.run / f"separability{'-untrained' if args.untrained else ''}.png"
        draw = lambda: diagnose_figures.draw_separability(result, samples, figure)  # noqa: E731
    print(text)
    if args.json is not None:
        write_result(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if figure is not None and has_matplotlib():
        draw()
        print(f"\nfigure: {figure}")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with steady_output():
        try:
            diagnose(args)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {shown(error, 1000)}")


if __name__ == "__main__":
    main()
