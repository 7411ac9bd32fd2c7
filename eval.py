"""Evaluate a run or a packed network: accuracy per time step, firing density, size, operations, energy and speed.

python eval.py runs/digits-resnet18
python eval.py runs/digits-resnet18/best.safetensors            the best epoch on what was held out
python eval.py runs/cifar100-resnet18 --data FOLDER --json result.json
python eval.py runs/cifar100-resnet18 --figure classes.png      also draw the accuracy per class and what is confused
python eval.py runs/cifar100-resnet18 --pack net.safetensors    pack it, and check the logits of the packed network
python eval.py net.safetensors                                  the same table of a packed network
python eval.py net.safetensors --image cat.png                  its five most probable classes
python eval.py cifar100-resnet18 --image cat.png                of a network that comes with the library
python eval.py net.safetensors --stream recording.aedat         its prediction after each frame of a recording

The file that --json writes stands for itself: it holds the machine, the code and the training of the run as well.
"""

import json
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch loads: on a busy machine, long spinning crawls

import torch

import empf
from empf import runs
from empf.checks import check_device
from empf.data.event_frames import EventSettings
from empf.data.load import load_test, make_batches
from empf.data.sets import DATASETS, ImageSettings, StreamSet
from empf.deploy.cpu_conv import multiplies_bf16
from empf.deploy.hub import shipped
from empf.deploy.origin import Origin
from empf.deploy.pack import load_packed, pack_to_file
from empf.deploy.predict import follow_recording, top_classes
from empf.evaluate import TOP, Mirrored, by_class, predictions
from empf.figures import has_matplotlib, per_class
from empf.files import check_result, write_result
from empf.kernels import backend
from empf.machine import VERSION, check_workers, machine, use_cpu
from empf.terminal import shown, steady_output
from empf.training.config import Parser, TrainConfig, training_of

FIGURES = (".png", ".pdf", ".svg")
COLUMNS = ("test_split", "image_column", "label_column", "config")
SHOWN = 20  # classes in the table; the worst where there are more


def evaluate(
    run: Path, data: str | None, limit: int | None, batch_size: int, count_batches: int, device: str,
    out: Path | None, workers: int = 0, columns: dict | None = None, mirror: bool = False,
    precision: str | None = None,
) -> dict:  # fmt: skip
    """Everything that eval.py reports, as plain values, of a run, its weights or a packed file; `out`: pack it.

    `columns`: names of columns, split and configuration of the data, where they are not those of the training;
    `mirror`: also count what the logits of an image and of its mirror image say together; `precision`: of the
    activations, `no` or `bf16`, without it as in training, and of packed networks `no`.
    """
    folder = runs.folder_of(run)
    if folder is None:
        if precision == "bf16" and (torch.device(device).type != "cpu" or not multiplies_bf16()):
            raise ValueError(
                f"--mixed-precision bf16 of a packed network needs a CPU that multiplies bf16 (AVX512-BF16), and a C++ "
                f"compiler; on {device} here leave it out"
            )
        model, streaming = load_packed(run, device), False
        whole, origin, training = model.net, model.origin, asdict(model.origin)
        if origin.dataset is None:
            raise ValueError(f"{run} does not say on which data it was trained: pack it from a run folder")
    else:
        train, training = training_of(runs.read_config(folder), folder), record_of(folder)
        model = whole = empf.load(run, device)
        origin, data, streaming = Origin.of(model), data or train.data, train.streaming
        precision = precision or train.mixed_precision
    c, dataset = model.config, origin.dataset
    test = load_test(
        dataset, data, limit=limit, device=device, spec=origin.spec(c), classes=origin.classes, streaming=streaming,
        images=ImageSettings(c.image_size, **origin.reading), columns=columns,
        events=EventSettings(c.T, c.image_size, split=origin.split or TrainConfig.split, **origin.frames()),
        trained_on=(origin.images, origin.limit),
    )  # fmt: skip
    check_classes(origin.classes, test.class_names)
    if workers and not isinstance(test, StreamSet):
        print(f"note: --workers does nothing, {dataset} lies in memory", file=sys.stderr)
    batches = make_batches(test, batch_size, train=False, workers=workers)
    packed = None if out is None else pack_to_file(model, out, batches)  # first: what is wrong with OUT is said at once
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
        predictions(model, islice(batches, 1))  # warm-up
        start = time.perf_counter()
        labels, predicted, near = (found.cpu() for found in predictions(model, batches))
        seconds = time.perf_counter() - start
    both = None  # an image and its mirror image
    if mirror:
        if c.in_channels == 2 or dataset in DATASETS and not DATASETS[dataset].flip:
            raise ValueError(f"--mirror is for images that mean the same mirrored, not for {dataset}: leave it out")
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            labels, seen, _ = (found.cpu() for found in predictions(Mirrored(model), batches))
        both = [100 * count / len(test) for count in (seen == labels).sum(1).tolist()]
    classes, confused = by_class(labels, predicted[-1], test.class_names)
    counted = empf.spike_account(whole, islice(batches, count_batches))
    return {
        "run": str(run),
        "dataset": dataset,
        "model": model.config.to_dict(),
        "mixed_precision": precision or "no",
        "images": len(test),
        "unread": len(test) - len(labels),  # they count as wrong
        "tested_on": test.split,
        "accuracy": [100 * c / len(test) for c in (predicted == labels).sum(1).tolist()],
        "accuracy_with_mirror": both,
        "top5": 100 * near.sum().item() / len(test) if len(classes) > TOP else None,
        "classes": classes,
        "confused": confused,
        "file_mb": (run if run.is_file() else run / "model.safetensors").stat().st_size / 1e6,
        "packed": packed,
        **counted,
        "counted_images": min(len(test), count_batches * batch_size),
        "images_per_s": len(test) / seconds,
        "device": device,
        "backend": backend(device),
        "machine": machine(device) | {"empf": VERSION},
        "training": training,
    }


def check_classes(trained: Sequence[str], found: Sequence[str]) -> None:
    """Raise ValueError where a class has another label than in training, or none: the accuracy would mean nothing.

    Names that are the labels themselves stand for classes that nobody has named.
    """
    named = [names for names in (trained, found) if list(names) != [str(label) for label in range(len(names))]]
    if len(named) == 2 and not set(trained) & set(found):
        raise ValueError(
            f"none of the classes of the data ({', '.join(found[:3])}, ...) is one that the network was trained on "
            f"({', '.join(trained[:3])}, ...): use the classes it was trained on"
        )
    for label, name in enumerate(found):
        if name in trained and name not in trained[label : label + 1]:  # a name may stand for two classes
            raise ValueError(
                f"the data give the label {label} to {name!r}, the network was trained with {trained.index(name)}: "
                "use the classes it was trained on"
            )


def record_of(run: Path) -> dict:
    """Settings, versions and commit of a run, and its epochs; folders are named without their place."""
    config = {name: part for name, part in runs.read_config(run).items() if name not in ("model", "classes")}
    return config | {"epochs": runs.read_metrics(run)}


def without_places(value):
    """The same value with absolute paths cut to their last part: the rest says nothing on another machine."""
    if isinstance(value, dict):
        return {name: without_places(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def table(r: dict) -> str:
    """The result for people."""
    m = r["model"]
    bits = "floating-point" if m["spike_bits"] is None else f"{m['spike_bits']}-bit"
    bits = "binary" if m["neuron"] == "lif" else bits
    rows = [
        ("run", r["run"]),
        ("network", f"{m['arch']} x{m['width']:g}, {m['weights']} weights, {m['neuron']} neurons, T = {m['T']}"),
        ("test images", f"{r['images']} of {r['dataset']}"),
        *([("which could not be read", f"{r['unread']}, they count as wrong")] if r["unread"] else []),
        *([("which are", r["tested_on"])] if r["tested_on"] else []),
        ("device, kernels", f"{r['device']}, {r['backend']}"),
        *((f"accuracy after step {t}", f"{a:.2f} %") for t, a in enumerate(r["accuracy"], 1)),
        *([("with mirror images", f"{r['accuracy_with_mirror'][-1]:.2f} %")] if r["accuracy_with_mirror"] else []),
        *([("top-5 accuracy", f"{r['top5']:.2f} %")] if r["top5"] is not None else []),
        ("parameters, full precision", f"{r['params_full_mb']:.3f} MB"),
        ("parameters, stored", f"{r['params_mb']:.3f} MB"),
        ("parameters, as the authors count", f"{r['params_authors_mb']:.3f} MB (2 bits if binary, 3 if ternary)"),
        *files(r),
        ("neurons", f"{r['neurons']:,}"),
        ("NOPs per image", f"{r['nops'] / 1e6:.3f} M"),
        ("SOPs per image", f"{r['sops'] / 1e6:.3f} M (first {r['counted_images']} images)"),
        ("energy of the SOPs", f"{r['energy_mj']:.6f} mJ per image ({bits} spikes)"),
        ("energy of stem and head", f"{r['energy_full_mj']:.6f} mJ per image ({r['macs'] / 1e6:.3f} M MAC)"),
        *((f"not counted: {name}", f"{count / 1e6:.3f} M MAC") for name, count in r["not_counted"].items()),
        ("speed", f"{r['images_per_s']:.0f} images/s"),
        *((f"density of {name}", f"{100 * d:.1f} %") for name, d in r["density"].items()),
    ]
    known = [c for c in r["classes"] if c["accuracy"] is not None]
    worst = sorted(known, key=lambda c: c["accuracy"])[:SHOWN] if len(known) > SHOWN else known
    if len(known) > SHOWN:
        rows.append(("classes", f"{len(known)}, of which the {SHOWN} worst follow"))
    rows += [(f"accuracy of {called(c['class'])}", f"{c['accuracy']:.2f} % of {c['images']} images") for c in worst]
    rows += [
        (f"{called(c['class'])} taken for {called(c['taken_for'])}", f"{c['share']:.2f} %, {c['images']} images")
        for c in r["confused"]
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def called(text: str) -> str:
    """A class, for people."""
    return shown(text, 30)


def files(r: dict) -> list[tuple[str, str]]:
    """The rows of the table about files."""
    if runs.folder_of(r["run"]) is None:
        return [("packed file on disk", f"{r['file_mb']:.3f} MB")]
    name = Path(r["run"]).name if Path(r["run"]).is_file() else "model.safetensors"
    rows = [(f"{name} on disk", f"{r['file_mb']:.3f} MB (latent weights, for training on)")]
    if p := r["packed"]:
        agree = (
            f"logits within {p['relative_difference']:.1e}, {100 * p['same_class']:.2f} % of the classes are the same"
        )
        rows += [
            (f"{Path(p['file']).name} on disk", f"{p['file_mb']:.3f} MB (packed)"),
            ("packed and not packed", agree),
        ]
    return rows


def main(argv: list[str] | None = None) -> None:
    p = Parser(description="Evaluate a training run or a packed network.", allow_abbrev=False)
    p.add_argument(
        "run",
        type=Path,
        help="run folder that train.py wrote, its best.safetensors, packed file, or name of a network of the library",
    )
    p.add_argument("--data", help="local folder of the data set, or of other data; default: where the run found it")
    for name in COLUMNS:
        flag = name.replace("_", "-")
        p.add_argument(f"--{flag}", help="as that of train.py, where the data differ from those of the training")
    p.add_argument("--limit", type=int, help="use only the first so many test images")
    p.add_argument("--batch-size", type=int, default=256, help="images per batch (default: 256)")
    p.add_argument("--count-batches", type=int, default=4, help="batches whose spikes are counted (default: 4)")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core (default: 0)")
    p.add_argument("--workers", type=int, default=0, help="processes that decode a streamed test set (default: 0)")
    p.add_argument(
        "--figure", type=Path, metavar="OUT", help="draw accuracy per class and confusions (.png, .pdf, .svg)"
    )
    p.add_argument("--pack", type=Path, metavar="OUT", help="also pack the run into this file, and check its logits")
    p.add_argument("--mirror", action="store_true", help="also the accuracy of logits averaged with the mirror image's")
    p.add_argument("--mixed-precision", choices=("no", "bf16"), help="default: as in training; no, of packed networks")
    p.add_argument("--image", type=Path, metavar="FILE", help="with a packed file: only classify this picture")
    p.add_argument("--stream", type=Path, metavar="FILE", help="only follow this recording (.aedat, .npy, .npz)")
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result to FILE; -: print it, not the table"
    )
    arguments = sys.argv[1:] if argv is None else argv
    args = p.parse_args(arguments)
    with steady_output():
        try:
            given = [name for name, value in vars(args).items() if value != p.get_default(name)]
            answer(args, shlex.join(without_places(["python", "eval.py", *arguments])), given)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {shown(error, 1000)}")


def answer(args: Namespace, command: str, given: list[str]) -> None:
    """Do what the flags say, after checking them; `given`: those that are not as by default."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if min(args.batch_size, args.count_batches) < 1 or min(args.threads, args.workers) < 0:
        raise ValueError(
            "--batch-size and --count-batches must be at least 1, --threads and --workers at least 0, "
            f"got {args.batch_size}, {args.count_batches}, {args.threads} and {args.workers}"
        )
    if empty := [name for name, value in vars(args).items() if value == ""]:
        raise ValueError(f"{empty[0]} must not be empty: leave --{empty[0]} out")
    check_device(device, "--device")
    check_workers(args.workers)
    use_cpu(args.threads)
    args.run = shipped(args.run)
    if args.image is not None or args.stream is not None:
        heeded = ("run", "device", "threads", "stream" if args.image is None else "image")
        if wrong := [f"--{name.replace('_', '-')}" for name in given if name not in heeded]:
            raise ValueError(f"--image and --stream only print what they find: leave out {' and '.join(wrong)}")
    if args.image is not None:
        classify(args.run, args.image, device)
    elif args.stream is not None:
        stream(args.run, args.stream, device)
    elif args.pack is not None and runs.folder_of(args.run) is None:
        raise ValueError(f"{args.run} is packed already: --pack takes a run folder")
    else:
        check_result(args.json)
        check_figure(args.figure)
        result = evaluate(
            args.run, args.data, args.limit, args.batch_size, args.count_batches, device, args.pack, args.workers,
            {name: value for name in COLUMNS if (value := getattr(args, name)) is not None}, args.mirror,
            args.mixed_precision,
        )  # fmt: skip
        if args.json is not None:  # first: it is kept where nobody reads what is printed
            written = {"command": command, **without_places(result)}
            write_result(args.json, json.dumps(written, indent=1) + "\n")
        if args.figure is not None:
            title = f"{result['run']}: {result['accuracy'][-1]:.2f} % of {result['images']} test images"
            per_class(result["classes"], result["confused"], args.figure, title)
        if str(args.json) != "-":
            print(table(result))


def check_figure(path: Path | None) -> None:
    """Raise ValueError where no picture can be drawn there."""
    check_result(path)
    if path is not None and path.suffix not in FIGURES:
        raise ValueError(f"--figure must end in {', '.join(FIGURES)}, got {path}")
    if path is not None and not has_matplotlib():
        raise ValueError("--figure needs a package: pip install 'empf[plot]'")


def classify(file: Path, image: Path, device: str) -> None:
    """Print the most probable classes of a picture."""
    if file.is_dir():
        raise ValueError(f"--image takes a packed file, and {file} is a folder: make the file with --pack")
    for name, probability in top_classes(load_packed(file, device), image):
        print(f"{100 * probability:6.2f} %  {shown(name)}")


def stream(run: Path, recording: Path, device: str) -> None:
    """Print the prediction after each frame: the class with the largest sum of logits so far."""
    net = load_packed(run, device) if runs.folder_of(run) is None else empf.load(run, device)
    for t, (name, share, seconds) in enumerate(follow_recording(net, recording), 1):
        print(f"frame {t:3d}  {100 * share:6.2f} %  {shown(name)}  ({1e3 * seconds:.1f} ms)", flush=True)


if __name__ == "__main__":
    main()
