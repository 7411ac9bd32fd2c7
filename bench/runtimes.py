"""Packed networks against ONNX Runtime and `model.eval()` on a CPU: widths, batch sizes, threads, kinds of spikes.

    python bench/runtimes.py

All take turns in one process; ONNX Runtime runs the library's own export. A cell that the result holds from the same
code is not measured again. Writes bench/results/runtimes.json and runtimes.png.
"""

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

from bench import deploy
from bench.deploy import ONNX_RUNTIME
from bench.machine import machine
from empf.figures import plain_log, pyplot, save_figure
from empf.kernels import native
from empf.machine import installed
from empf.models import ModelConfig

OUT = Path(__file__).parent / "results" / "runtimes.json"
SPIKES = {"float": None, "4-bit": 4}
NAMES = ("packed", "model", ONNX_RUNTIME)
CELL = ("spikes", "width", "threads", "batch")


def measure(spikes: str, width: float, threads: int, batches: list[int], rounds: int, size: int = 32) -> list[dict]:
    """A row for each batch size: milliseconds per call, and the time of packed over that of the others."""
    config = ModelConfig(num_classes=100, image_size=size, width=width, spike_bits=SPIKES[spikes])
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = deploy.prepare(Path(folder), config, NAMES)
        nets = {name: deploy.load_contender(name, paths[name], "cpu") for name in NAMES}
    for batch in batches:
        found = deploy.measure_times(nets, "cpu", batch, max(3, rounds // (1 + batch // 8)))
        over = {
            name: {"median": round(1 / s["median"], 3), "quartiles": [round(1 / q, 3) for q in s["quartiles"][::-1]]}
            for name, s in found["speed_of_packed_over"].items()
        }
        about = dict(zip(CELL, (spikes, width, threads, batch), strict=True))
        rows.append({**about, "ms": found["ms"], "packed_over": over, "rounds": found["rounds"]})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'spikes':8}{'width':>7}{'threads':>9}{'batch':>7}" + "".join(f"{n + ', ms':>18}" for n in NAMES)]
    lines[0] += f"{'packed / ' + ONNX_RUNTIME:>26}"
    for row in rows:
        times = "".join(f"{row['ms'][name]['median']:18.1f}" for name in NAMES)
        over = row["packed_over"][ONNX_RUNTIME]
        spread = f"{over['median']:.2f} ({over['quartiles'][0]:.2f} to {over['quartiles'][1]:.2f})"
        lines.append(f"{row['spikes']:8}{row['width']:7g}{row['threads']:9}{row['batch']:7}{times}{spread:>26}")
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """The ratio of each cell to ONNX Runtime with its quartiles, a panel for each number of threads."""
    rows = result["rows"]
    counts = sorted({row["threads"] for row in rows})
    with pyplot() as plt:
        size = (3.4 * len(counts), 1.3 + 0.16 * len({(row["width"], row["batch"]) for row in rows}))
        figure, axes = plt.subplots(1, len(counts), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax, threads in zip(axes[0], counts, strict=True):
            here = [row for row in rows if row["threads"] == threads]
            cells = sorted({(row["width"], row["batch"]) for row in here})
            for spikes, marker in zip(SPIKES, "os", strict=True):
                of = [row for row in here if row["spikes"] == spikes]
                over = [row["packed_over"][ONNX_RUNTIME] for row in of]
                ax.errorbar(
                    [o["median"] for o in over], [cells.index((row["width"], row["batch"])) for row in of],
                    xerr=[[abs(o["median"] - o["quartiles"][i]) for o in over] for i in (0, 1)],
                    fmt=marker, label=f"{spikes} spikes",
                )  # fmt: skip
            ax.axvline(1, color="0.6", zorder=0)
            ax.set_xscale("log")
            plain_log(ax.xaxis)
            ax.set_yticks(range(len(cells)), [f"x{width:g}, batch {batch}" for width, batch in cells])
            ax.invert_yaxis() if ax is axes[0][0] else None
            ax.set_title(f"{threads} thread{'s' * (threads > 1)}")
        figure.supxlabel("time of packed / time of ONNX Runtime, median and quartiles", fontsize="medium")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        save_figure(plt, figure, path)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="Packed networks against ONNX Runtime.", allow_abbrev=False)
    p.add_argument("--widths", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rounds", type=int, default=40, help="calls of each at batch 1 (default: 40)")
    p.add_argument("--image-size", type=int, default=32, help="of the ResNet-18 (default: 32)")
    p.add_argument("--json", type=Path, default=OUT, help="default: bench/results/runtimes.json")
    args = p.parse_args(argv)
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if installed(name) is None]:
        sys.exit(f"error: {', '.join(missing)} must be installed: pip install {' '.join(missing)}")
    about = {**machine(), "native": native.library() is not None, "onnxruntime": installed("onnxruntime")}
    about.pop("threads")
    result = {"machine": about, "rows": []}
    if args.json.is_file():
        before = json.loads(args.json.read_text())
        if before["machine"]["commit"] == about["commit"]:
            result["rows"] = before["rows"]
    for width, spikes, threads in product(args.widths, SPIKES, args.threads):
        done = {row["batch"] for row in result["rows"] if [row[n] for n in CELL[:3]] == [spikes, width, threads]}
        if missing := [batch for batch in args.batches if batch not in done]:
            rows = measure(spikes, width, threads, missing, args.rounds, args.image_size)
            result["rows"] = sorted(result["rows"] + rows, key=lambda row: tuple(row[name] for name in CELL))
            deploy.write(args.json, result)
            print(table(rows), flush=True)
    draw(result, args.json.with_suffix(".png"))
    print(f"written to {args.json} and {args.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
