"""Train, pack and evaluate the record network: ResNet-18 with four time steps on CIFAR-100, binary and ternary.

    python bench/record.py --data FOLDER                   all of it; without --data from the Hugging Face Hub
    python bench/record.py --data FOLDER --minutes 25      one slice of it; the same command continues
    python bench/record.py --table                         the rows of the README, from the results so far
    python bench/record.py --smoke                         all of it within two minutes on a CPU, on a tiny network

Training is that of train.py, in runs/record-WEIGHTS: at the end of a slice, on Ctrl-C and on SIGTERM it saves; after
a crash it continues from its last checkpoint. The folder may be carried to another machine between two slices. Then
eval.py packs the network and evaluates the packed file on the whole test set. Writes bench/results/record-WEIGHTS.json
(--smoke: beside the run, on random pictures unless --data is given).

The paper has 78.45 % with binary synapses (3.00 MB, as it counts 2 bits for each), 80.16 % with ternary ones (4.40 MB,
3 bits): arXiv 2410.07547.
"""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch loads: on a busy machine, long spinning crawls

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
from bench.machine import machine
from empf.data.sets import DATASETS
from empf.files import write_atomic, write_result
from empf.runs import read_config, read_metrics
from empf.training.config import RESUME_MAY_CHANGE, Parser, from_flags, training_of
from empf.training.recipes import NAMED
from eval import main as eval_main

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
WEIGHTS = ("binary", "ternary")
NUMBERS = ("params_mb", "params_authors_mb", "params_full_mb", "nops", "sops", "energy_mj")

# Flags of train.py: the authors' recipe as far as it is known, since nothing measured here speaks against it at 300
# epochs, and of their networks the best one. After 10 epochs at x0.25 Mem-BN is 3.8 points below the vanilla neuron and
# SECA-II costs 0.4 (docs/results.md). AutoAugment needs the extra `augment`.
RECIPE = {
    "dataset": "cifar100", "arch": "resnet18", "width": 1.0, "T": 4, "neuron": "mem_bn", "seca": 2,
    "learning": "random", **NAMED["authors"], "seed": 0, "save_minutes": 5.0,
    "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
}  # fmt: skip
SMOKE = {
    "width": 0.0625, "T": 2, "epochs": 2, "batch_size": 32, "warmup_epochs": 0.5, "lr": 0.05, "limit": 64,
    "auto_augment": "none", "threads": 1,
}  # fmt: skip


def flags(recipe: dict) -> list[str]:
    """The command line of some fields of TrainConfig."""
    found = []
    for name, value in recipe.items():
        flag = name.replace("_", "-")
        found += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def die_with_parent() -> None:
    """Linux: where this process is killed, training gets a SIGTERM: it saves, and no second one runs beside it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def call(script: str, *arguments: str, seconds: float | None = None, processes: int = 1) -> bool:
    """Run a script of the repository; after so many seconds, or on Ctrl-C, ask it to save and stop.

    `processes`: on a CPU.

    Returns whether it was left alone to its end. Raises ValueError where it failed.
    """
    several = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)] * (processes > 1)
    child = subprocess.Popen([sys.executable, *several, str(ROOT / script), *arguments], preexec_fn=die_with_parent)
    asked, interrupted = False, None
    while True:
        try:
            code = child.wait(None if asked else seconds)
            break
        except subprocess.TimeoutExpired:
            child.terminate()
        except KeyboardInterrupt as error:
            child.terminate()
            interrupted = error
        asked = True
    if interrupted is not None:
        raise interrupted
    if code and not (asked and code == -signal.SIGTERM):  # it may not have come to its first batch
        raise ValueError(f"{script} failed with exit status {code}: see its message above; the same command continues")
    return not asked


def train(run: Path, recipe: dict, data: str | None, seconds: float | None, processes: int = 1) -> bool:
    """Train until the end or for so many seconds; returns whether the run is finished."""
    where = [] if data is None else ["--data", data]
    if (run / "config.json").exists():
        started = training_of(read_config(run), run).to_dict()
        wanted = from_flags(recipe).to_dict()  # what is not named counts as well
        free = {"output_dir", *RESUME_MAY_CHANGE} - set(recipe)
        other = {name: started.get(name) for name in set(wanted) - free if started.get(name) != wanted[name]}
        if other:
            raise ValueError(f"{run} was started with other settings ({other}): move it away or choose another --runs")
        if len(read_metrics(run)) == recipe["epochs"]:
            return True
        how = ["--resume", str(run)]
    else:
        how = [*flags(recipe), "--output-dir", str(run)]
    call("train.py", *how, *where, seconds=seconds, processes=processes)
    return len(read_metrics(run)) == recipe["epochs"]


def evaluate(run: Path, recipe: dict, data: str | None) -> dict:
    """Pack the finished run, evaluate the packed file, and sum up."""
    packed, where = run / "packed.safetensors", [] if data is None else ["--data", data]
    if "limit" in recipe:
        where += ["--limit", str(recipe["limit"])]
    found = {}
    for name, arguments in (("run", [str(run), "--pack", str(packed)]), ("packed", [str(packed)])):
        file = run / f"eval-{name}.json"
        eval_main([*arguments, *where, "--json", str(file)])
        found[name] = json.loads(file.read_text())
    config, history, result = read_config(run), read_metrics(run), found["packed"]
    return {
        "command": f"python bench/record.py --weights {recipe['weights']}",
        "recipe": recipe, "trained_with": {"commit": config["git_commit"], **config["versions"]},
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "test_images": result["images"], "accuracy": result["accuracy"], "accuracy_unpacked": found["run"]["accuracy"],
        "packed": found["run"]["packed"], "file_mb": result["file_mb"],
        **{name: result[name] for name in NUMBERS},
        "minutes_of_training": sum(e["seconds"] for e in history) / 60,
        "images_per_s": statistics.median(e["images_per_s"] for e in history),
        "epochs": [{name: e[name] for name in ("epoch", "loss", "train_accuracy", "accuracy")} for e in history],
    }  # fmt: skip


def table(results: list[dict]) -> str:
    """Rows for the README."""
    lines = [
        "| data | network | synapses | epochs | accuracy of the packed file | file | as the paper counts | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        c, m = r["recipe"], r["machine"]
        lines.append(
            f"| {c['dataset']}, {r['test_images']:,} test images | {c['arch']} x{c['width']:g}, T = {c['T']} | "
            f"{c['weights']} | {c['epochs']} | {r['accuracy'][-1]:.2f} % | {r['file_mb']:.2f} MB | "
            f"{r['params_authors_mb']:.2f} MB | "
            f"{r['minutes_of_training']:.0f} min on {m.get('gpu', m['cpu'])} |"
        )
    return "\n".join(lines)


def synthetic(folder: Path, name: str, images: int) -> Path:
    """Random pictures in parquet files with the columns and features of the Hub's copy of CIFAR-100."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    spec = DATASETS[name]
    generator = torch.Generator().manual_seed(0)
    label = {"names": [f"class{c:03}" for c in range(spec.num_classes)], "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}, "fine_label": label}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"img": kind, "fine_label": pyarrow.int64()}, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = []
        for i in range(images):
            shape = (spec.image_size, spec.image_size, 3)
            pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(png := BytesIO(), "PNG")
            rows.append({"img": {"bytes": png.getvalue(), "path": None}, "fine_label": i % spec.num_classes})
        buffer = BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer)
        write_atomic(folder / f"{split}-00000-of-00001.parquet", buffer.getvalue())
    return folder


def record(weights: str, folder: Path, data: str | None, smoke: bool, until: float | None) -> dict | None:
    """The result of one network, if it is finished by `until` (of time.monotonic)."""
    name = f"record-{weights}"
    run = folder / (f"smoke-{name}" if smoke else name)
    out = (run if smoke else RESULTS) / f"{name}.json"
    recipe = {**RECIPE, **(SMOKE if smoke else {}), "weights": weights}
    if out.exists() and (result := json.loads(out.read_text()))["recipe"] == recipe:
        return result
    if smoke and data is None:
        data = str(synthetic(folder / "smoke-data", recipe["dataset"], recipe["limit"]))
    seconds = None if until is None else until - time.monotonic()
    if (seconds is not None and seconds <= 0) or not train(run, recipe, data, seconds):
        return None
    result = evaluate(run, recipe, data)
    write_result(out, json.dumps(result, indent=1) + "\n")
    return result


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="default: one after the other")
    p.add_argument("--data", help="local folder with CIFAR-100 instead of the Hugging Face Hub")
    p.add_argument("--minutes", type=float, help="save and stop after so many minutes; the same command continues")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    p.add_argument("--smoke", action="store_true", help="try all of it with a tiny network and few images")
    p.add_argument("--table", action="store_true", help="only print the rows of the README")
    args = p.parse_args(argv)
    if args.table:
        files = [file for w in WEIGHTS if (file := RESULTS / f"record-{w}.json").exists()]
        print(table([json.loads(file.read_text()) for file in files]))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    results = []
    try:
        for weights in args.weights:
            result = record(weights, args.runs, args.data, args.smoke, until)
            if result is None:
                print("time is over, all is saved; the same command continues")
                break
            results.append(result)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped, all is saved; the same command continues")
    if results:
        print(table(results))


if __name__ == "__main__":
    main()
