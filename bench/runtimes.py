"""Packed networks against ONNX Runtime, OpenVINO and `model.eval()` on a CPU: widths, batches, threads, spikes.

    python bench/runtimes.py

All take turns in one process, as in bench/deploy.py; the runtimes read the library's own export. Then, each time in a
fresh process: loading and the first call. What the result holds from the same code is not measured again, and every
step is written as it comes, so a run may be stopped. Writes bench/results/runtimes.json and runtimes.png.
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
from bench.deploy import ONNX_RUNTIME, OPENVINO, RUNTIMES
from bench.machine import machine, spread
from empf.deploy.cpu_conv import multiplies_bf16
from empf.figures import GREEN, GREY, ORANGE, WIDTH, plain_log, pyplot, save_figure
from empf.kernels import native
from empf.machine import installed
from empf.models import ModelConfig

OUT = Path(__file__).parent / "results" / "runtimes.json"
SPIKES = {"float": None, "bf16": None, "4-bit": 4}  # bf16: those of packed, and OpenVINO; the others compute in fp32
CELL = ("spikes", "width", "threads", "batch")
COLOURS = {"model": GREY, ONNX_RUNTIME: ORANGE, OPENVINO: GREEN}
TOLERANCE = 1e-3  # of logits; 4-bit spikes may take the next code where sums are rounded otherwise


def contenders(spikes: str) -> tuple[str, ...]:
    return tuple(name for name in deploy.contenders("cpu", SPIKES[spikes]) if name != "full precision")


def prepared(folder: Path, spikes: str, width: float, size: int) -> dict[str, Path]:
    """The files of a network, which are made where they are missing."""
    folder = folder / f"{SPIKES[spikes] or 'float'}-{width:g}-{size}"  # the same for spikes in bf16
    if not (listed := folder / "paths.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = ModelConfig(num_classes=100, image_size=size, width=width, spike_bits=SPIKES[spikes])
        paths = deploy.prepare(folder, config, contenders(spikes))
        listed.write_text(json.dumps({name: str(path.relative_to(folder)) for name, path in paths.items()}))
    return {name: folder / path for name, path in json.loads(listed.read_text()).items()}


def measure(paths: dict[str, Path], about: dict, batches: list[int], rounds: int) -> list[dict]:
    """A row for each batch size: milliseconds per call, and the time of packed over that of the others."""
    torch.set_num_threads(about["threads"])
    nets = {name: deploy.load_contender(name, paths[name], "cpu") for name in contenders(about["spikes"])}
    differ = differences(nets)
    if about["spikes"] == "float" and max(differ.values()) > TOLERANCE:
        raise SystemExit(f"error: the logits are not those of the packed network, nothing was timed: {differ}")
    if about["spikes"] == "bf16":
        nets["packed"] = deploy.InBf16(nets["packed"])
        if OPENVINO in nets:
            nets[OPENVINO] = deploy.Compiled(paths[OPENVINO], accurate=False)
    rows = []
    for batch in batches:
        found = deploy.measure_times(nets, "cpu", batch, max(3, rounds // (1 + batch // 8)))
        over = {
            name: {"median": round(1 / s["median"], 3), "quartiles": [round(1 / q, 3) for q in s["quartiles"][::-1]]}
            for name, s in found["speed_of_packed_over"].items()
        }
        rows.append(
            {**about, "batch": batch, "ms": found["ms"], "packed_over": over, "rounds": found["rounds"],
             "difference_of": differ}
        )  # fmt: skip
    return rows


def differences(nets: dict) -> dict[str, float]:
    """Largest relative difference of anybody's logits to those of the packed network."""
    c = nets["packed"].config
    x = torch.randn(4, c.in_channels, c.image_size, c.image_size)
    wanted = deploy.run(nets["packed"], x)
    return {name: deploy.difference(deploy.run(net, x), wanted) for name, net in nets.items() if name != "packed"}


def measure_first(paths: dict[str, Path], about: dict, repeats: int) -> dict:
    """Milliseconds to load and with the first call on one image, of fresh processes that take turns."""
    found: dict[str, list[dict]] = {name: [] for name in contenders(about["spikes"])}
    for _ in range(repeats):
        for name, alone in found.items():
            alone.append(deploy.in_fresh_process(name, str(paths[name]), "cpu", str(about["threads"]), "1"))
    return {
        **about,
        "file_mb": {name: deploy.size(paths[name]) / 1e6 for name in found},
        **{part: {name: spread((a[part] for a in alone), 1) for name, alone in found.items()}
           for part in ("load_ms", "first_call_ms")},
        "repeats": repeats,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    names = list(rows[0]["ms"])
    lines = [f"{'spikes':8}{'width':>7}{'threads':>9}{'batch':>7}" + "".join(f"{n + ', ms':>24}" for n in names)]
    lines[0] += "".join(f"{'packed / ' + name:>29}" for name in names if name in RUNTIMES)
    for row in rows:
        line = f"{row['spikes']:8}{row['width']:7g}{row['threads']:9}{row['batch']:7}"
        line += "".join(f"{row['ms'][name]['median']:24.1f}" for name in names)
        for over in (row["packed_over"][name] for name in names if name in RUNTIMES):
            line += f"{'{:.2f} ({:.2f} to {:.2f})'.format(over['median'], *over['quartiles']):>29}"
        lines.append(line)
    return "\n".join(lines)


def table_of_first(rows: list[dict]) -> str:
    names = list(rows[0]["first_call_ms"])
    lines = ["load and first call, ms:" + "".join(f"{name:>20}" for name in names)]
    for row in rows:
        line = f"{row['spikes']:8}{row['width']:7g}{row['threads']:9}"
        lines.append(line + "".join(f"{row['first_call_ms'][name]['median']:20.0f}" for name in names))
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Time of packed over that of each contender, with quartiles: a panel for kind of spikes and number of threads."""
    rows = result["rows"]
    counts = sorted({row["threads"] for row in rows})
    kinds = [kind for kind in SPIKES if any(row["spikes"] == kind for row in rows)]
    cells = sorted({(row["width"], row["batch"]) for row in rows})
    with pyplot() as plt:
        size = (WIDTH, 1 + len(kinds) * (0.4 + 0.17 * len(cells)))
        figure, axes = plt.subplots(
            len(kinds), len(counts), figsize=size, sharey=True, sharex=True, squeeze=False, layout="constrained"
        )
        for (kind, threads), ax in zip(product(kinds, counts), axes.flat, strict=True):
            here = [row for row in rows if row["threads"] == threads and row["spikes"] == kind]
            for shift, name in enumerate(name for name in COLOURS if name in rows[0]["packed_over"]):
                over = [row["packed_over"][name] for row in here]
                ax.errorbar(
                    [o["median"] for o in over],
                    [cells.index((row["width"], row["batch"])) + 0.2 * (shift - 1) for row in here],
                    xerr=[[abs(o["median"] - o["quartiles"][i]) for o in over] for i in (0, 1)],
                    fmt="o", color=COLOURS[name], label=name if name in RUNTIMES else "model.eval()",
                )  # fmt: skip
            ax.axvline(1, color="0.3", linewidth=0.8, zorder=0)
            ax.set_title(f"{kind} spikes, {threads} thread{'s' * (threads > 1)}")
        for ax in axes.flat:
            plain_log(ax.xaxis)
        axes[0][0].set_yticks(range(len(cells)), [f"x{width:g}, batch {batch}" for width, batch in cells])
        axes[0][0].invert_yaxis()
        figure.supxlabel(
            "time of packed / time of the other (left of 1: packed is faster), median and quartiles", size=8
        )
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS))
        save_figure(plt, figure, path)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="Packed networks against other runtimes.", allow_abbrev=False)
    p.add_argument("--widths", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    p.add_argument("--spikes", nargs="+", choices=SPIKES, default=list(SPIKES), help="default: all")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rounds", type=int, default=40, help="calls of each at batch 1 (default: 40)")
    p.add_argument("--repeats", type=int, default=3, help="processes for each first call; 0: none (default: 3)")
    p.add_argument("--image-size", type=int, default=32, help="of the ResNet-18 (default: 32)")
    p.add_argument(
        "--files", type=Path, help="keep the networks there, for another run (default: they are thrown away)"
    )
    p.add_argument("--json", type=Path, default=OUT, help="default: bench/results/runtimes.json")
    args = p.parse_args(argv)
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if installed(name) is None]:
        sys.exit(f"error: {', '.join(missing)} must be installed: pip install {' '.join(missing)}")
    about = {**machine(), "native": native.library() is not None, **{n: installed(n) for n in RUNTIMES.values()}}
    about.pop("threads")
    result = {"machine": about, "rows": [], "first": []}
    if args.json.is_file():
        before = json.loads(args.json.read_text())
        if before["machine"]["commit"] == about["commit"]:
            result.update(rows=before["rows"], first=before["first"])
    cells = list(product(args.widths, [s for s in args.spikes if s != "bf16" or multiplies_bf16()], args.threads))

    def keep(kind: str, rows: list[dict]) -> None:
        result[kind] = sorted(result[kind] + rows, key=lambda row: tuple(row[name] for name in CELL if name in row))
        deploy.write(args.json, result)

    with tempfile.TemporaryDirectory() as folder:
        files = args.files or Path(folder)
        for kind, (width, spikes, threads) in product(("rows", "first"), cells):
            this = dict(zip(CELL, (spikes, width, threads), strict=False))
            same = [row for row in result[kind] if this.items() <= row.items()]
            missing = [batch for batch in args.batches if batch not in {row.get("batch") for row in same}]
            if kind == "rows" and missing:
                keep(kind, rows := measure(prepared(files, spikes, width, args.image_size), this, missing, args.rounds))
                print(table(rows), flush=True)
            if kind == "first" and args.repeats and not same and threads == max(args.threads) and spikes != "bf16":
                row = measure_first(prepared(files, spikes, width, args.image_size), this, args.repeats)
                keep(kind, [row])
                print(table_of_first([row]), flush=True)
    draw(result, args.json.with_suffix(".png"))
    print(f"written to {args.json} and {args.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
