"""Evaluate a run: accuracy per time step, firing density, size, operations, energy and speed.

python eval.py runs/digits-resnet18
python eval.py runs/cifar100-resnet18 --data FOLDER --json result.json
"""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch

import empf
from empf import runs
from empf.config import Parser, TrainConfig, cpu_threads
from empf.data import Batches, load
from empf.evaluate import correct_per_step
from empf.kernels import backend


def evaluate(run: Path, data: str | None, limit: int | None, batch_size: int, count_batches: int, device: str) -> dict:
    """Everything that eval.py reports, as plain values."""
    config = runs.read_config(run)
    model = empf.load(run, device)
    train = TrainConfig.from_dict(config["train"])
    _, test = load(train.dataset, data or train.data, limit=limit, device=device)
    batches = Batches(test, batch_size, train=False)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=train.mixed_precision == "bf16"):
        correct_per_step(model, islice(batches, 1))  # warm-up
        start = time.perf_counter()
        correct = correct_per_step(model, batches).tolist()
        seconds = time.perf_counter() - start
    counted = empf.spike_account(model, islice(batches, count_batches))
    return {
        "run": str(run),
        "dataset": train.dataset,
        "model": config["model"],
        "mixed_precision": train.mixed_precision,
        "images": len(test),
        "accuracy": [100 * c / len(test) for c in correct],
        "file_mb": (run / "model.safetensors").stat().st_size / 1e6,
        **counted,
        "counted_images": min(len(test), count_batches * batch_size),
        "images_per_s": len(test) / seconds,
        "device": device,
        "backend": backend(device),
        "threads": torch.get_num_threads(),
    }


def table(r: dict) -> str:
    """The result for people."""
    m = r["model"]
    bits = "floating point" if m["spike_bits"] is None else f"{m['spike_bits']} bits"
    rows = [
        ("run", r["run"]),
        ("network", f"{m['arch']} x{m['width']:g}, {m['weights']} weights, {m['neuron']} neurons, T = {m['T']}"),
        ("test images", f"{r['images']} of {r['dataset']}"),
        ("device, kernels", f"{r['device']}, {r['backend']}"),
        *((f"accuracy after step {t}", f"{a:.2f} %") for t, a in enumerate(r["accuracy"], 1)),
        ("parameters, full precision", f"{r['params_full_mb']:.3f} MB"),
        ("parameters, stored", f"{r['params_mb']:.3f} MB"),
        ("model.safetensors on disk", f"{r['file_mb']:.3f} MB (latent weights, for training on)"),
        ("neurons", f"{r['neurons']:,}"),
        ("NOPs per image", f"{r['nops'] / 1e6:.3f} M"),
        ("SOPs per image", f"{r['sops'] / 1e6:.3f} M (first {r['counted_images']} images)"),
        ("energy of the SOPs", f"{r['energy_mj']:.6f} mJ per image ({bits} spikes)"),
        ("energy of stem and head", f"{r['energy_full_mj']:.6f} mJ per image ({r['macs'] / 1e6:.3f} M MAC)"),
        ("speed", f"{r['images_per_s']:.0f} images/s"),
        *((f"density of {name}", f"{100 * d:.1f} %") for name, d in r["density"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: list[str] | None = None) -> None:
    p = Parser(description="Evaluate a training run.", allow_abbrev=False)
    p.add_argument("run", type=Path, help="run folder that train.py wrote")
    p.add_argument("--data", help="local folder of the data set; default: where the run found it")
    p.add_argument("--limit", type=int, help="use only the first so many test images")
    p.add_argument("--batch-size", type=int, default=256, help="images per batch (default: 256)")
    p.add_argument("--count-batches", type=int, default=4, help="batches whose spikes are counted (default: 4)")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core (default: 0)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    args = p.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if min(args.batch_size, args.count_batches) < 1 or args.threads < 0:
            raise ValueError(
                "--batch-size and --count-batches must be at least 1 and --threads at least 0, "
                f"got {args.batch_size}, {args.count_batches} and {args.threads}"
            )
        check_device(device)
        torch.set_num_threads(cpu_threads(args.threads))
        result = evaluate(args.run, args.data, args.limit, args.batch_size, args.count_batches, device)
        print(table(result))
        if args.json is not None:
            runs.write_atomic(args.json, (json.dumps(result, indent=1) + "\n").encode())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use --device {device} ({reason}): leave it out or use cpu") from error


if __name__ == "__main__":
    main()
