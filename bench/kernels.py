"""The kernels against dense cuBLAS / cuDNN, eager torch, torch.compile, and what others have, on the GPU at hand.

    python bench/kernels.py [--quick] [--json FILE]

With a GPU: each result is first checked against its definition, then timed: random inputs, enough copies of them to
leave the L2 cache cold, in a CUDA graph (EMPF_TUNE=1 has the kernels tuned before); median and the 10th to 90th
percentile of many replays. `share` compares with what copying and dense products reach on this device in the same run.
Writes bench/results/kernels-<device>.json and a picture per function; a quick run kernels-<device>-quick.*, which git
ignores.

Without a GPU: what the compiler makes of every kernel for eight targets, and the time that an H200 would need at least.
Writes bench/results/kernels-static.json (or -quick). No figure there is a measured time.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
from bench import aot
from bench.kernel_cases import Case, cases
from empf.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    WIDTH,
    has_matplotlib,
    plain_log,
    pyplot,
    save_figure,
    shades,
)
from empf.kernels import tune
from empf.kernels.dispatch import HAVE_TRITON, triton

HERE = Path(__file__).resolve().parent
MODULES = ("matmul", "conv", "conv_neuron", "neuron", "norm_kernels", "flip")
FUNCTIONS = {  # how the names of its cases start, its module in bench/aot_cases.py
    "matmul": ("matmul", "matmul"), "conv": ("conv3x3", "conv"), "conv_neuron": ("conv+bn", "conv_neuron"),
    "neuron": ("neuron", "neuron"), "norm_neuron": (("BN", "Mem-BN"), "norm_kernels"),
    "flip": ("flip", "flip"),
}  # fmt: skip
OURS = {"ours": BLUE, "ours int8": BLUE, "ours bf16": GREEN, "ours with v": GREEN}
H200 = {"copy": 4.3e12, "bf16": 790e12, "int8": 1580e12}  # bytes/s read and written, FLOP/s: rounded measurements
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)
FAILURES += (triton.TritonError,) if HAVE_TRITON else ()
AT_A_TIME = 96  # cases that are compiled between two writes of the result
ROTATED = 256 << 20  # bytes of inputs that are cycled through: several times the L2 of any GPU


def error(case: Case, contender: str, z: dict) -> float:
    """Largest error relative to the largest value; of gradients, without the few that rounding put beyond a kink."""
    got, want = case.contenders[contender](z), case.reference(z)
    got = got.float() * 0.25 if got.dtype == torch.uint8 else got.float()
    off = (got - want).abs().flatten()
    at_kinks = off.numel() // 100_000 if case.gradient else 0
    return (off.topk(at_kinks + 1).values[-1] / want.abs().max()).item()


def measure(function, sets: list[dict], replays: int) -> dict:
    """Microseconds per call, in a CUDA graph that goes once through all sets of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, tunes and builds derived buffers outside the capture
        for _ in range(3):
            for z in sets:
                function(z)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [function(z) for z in sets]
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(sets))
    del kept
    low, *_, high = statistics.quantiles(times[3:], n=10)
    return {"us": statistics.median(times[3:]), "p10": low, "p90": high}


def ceilings(replays: int) -> dict:
    """What copying and dense products reach here, in bytes and operations per second."""
    x = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copied = measure(lambda z: y.copy_(x), [{}], replays)["us"]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randint(-64, 64, (8192, 8192), device="cuda", dtype=torch.int8)
    half = measure(lambda z: a @ a, [{}], replays)["us"]
    integer = measure(lambda z: torch._int_mm(b, b.t()), [{}], replays)["us"]
    return {"copy": 4e6 * x.numel() / copied, "bf16": 2e6 * 8192**3 / half, "int8": 2e6 * 8192**3 / integer}


def run_gpu(quick: bool, part: tuple[int, int] = (0, 1)) -> tuple[dict, list[dict]]:
    """Check and time every case; a contender that fails is reported with its message and left out."""
    replays = 20 if quick else 100
    limits = ceilings(replays)
    print(f"ceilings here: copy {limits['copy'] / 1e12:.2f} TB/s, bf16 {limits['bf16'] / 1e12:.0f} TFLOP/s, "
          f"int8 {limits['int8'] / 1e12:.0f} TOP/s\n")  # fmt: skip
    chosen = cases()[part[0] :: part[1]]
    rows = []
    for case in chosen[::3] if quick else chosen:
        torch.manual_seed(0)
        first = case.inputs("cuda")
        copies = min(1024, max(2, -(-ROTATED // min(case.moved.values()))))
        sets = [first] + [case.inputs("cuda") for _ in range(copies - 1)]
        measured = {}
        for name, function in case.contenders.items():
            try:
                if name in case.tolerance and not (off := error(case, name, first)) <= case.tolerance[name]:
                    raise RuntimeError(f"wrong: relative error {off:.2e}, allowed {case.tolerance[name]:.2e}")
                measured[name] = measure(function, sets, replays)
            except FAILURES as problem:
                measured[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        rows += report(case, measured, limits)
        del sets, first
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return limits, rows


def report(case: Case, measured: dict, limits: dict) -> list[dict]:
    """Print the contenders of a case and return them as rows."""
    rows = []
    print(case.name)
    for name, time in measured.items():
        row = {"case": case.name, "contender": name, **time}
        if "us" in time:
            row["share"] = case.floor(limits, name) / time["us"] if name in case.moved else None
            row["speedup"] = {
                other: t["us"] / time["us"] for other, t in measured.items() if other != name and "us" in t
            }
            share = "" if row["share"] is None else f"  {100 * row['share']:3.0f} % of the limit"
            print(f"  {name:18} {time['us']:9.1f} us  [{time['p10']:.1f}, {time['p90']:.1f}]{share}")
        else:
            print(f"  {name:18} {time['failed']}")
        rows.append(row)
    for row in rows:
        if case.share and row.get("share"):
            reached = "reached" if row["share"] >= case.share else "NOT reached"
            print(f"  {row['contender']}: {100 * case.share:.0f} % of the limit {reached}")
    for ours, rival, wanted in case.goals:
        if "us" in measured.get(ours, {}) and "us" in measured.get(rival, {}):
            ratio = measured[rival]["us"] / measured[ours]["us"]
            print(f"  {ours} against {rival}: {ratio:.2f}x, goal {wanted}x, {'met' if ratio >= wanted else 'NOT met'}")
            rows.append({"case": case.name, "goal": f"{ours} / {rival}", "wanted": wanted, "ratio": ratio})
    return rows


def floors() -> list[dict]:
    """Least times on an H200 in microseconds, from bytes and operations alone."""
    rows = []
    for case in cases():
        rows.append({"case": case.name, "floor_us": {name: round(case.floor(H200, name), 2) for name in case.moved}})
    return rows


def run_static(quick: bool, path: Path, about: dict) -> list[dict]:
    """The table of bench/aot.py for all kernels; with `quick` a few for each target.

    Rows of the last time stay where neither the kernel nor Triton has changed. Written to `path` as it grows, so that
    a run which was stopped continues.
    """
    wanted = [case for case in aot.in_turn() if case[0] in MODULES][::2] if quick else aot.chosen(*MODULES)
    digests = {case: aot.digest(*case) for case in wanted}
    old = json.loads(path.read_text()) if path.exists() else {}
    known = {(row["module"], row["case"], row["target"]): row for row in old.get("compiled", [])}
    if old.get("triton") != about["triton"]:
        known = {}
    missing = [case for case in wanted if known.get(case, {}).get("digest") != digests[case]]
    for start in range(0, len(missing), AT_A_TIME):
        for case, found in zip(missing[start:], aot.compile_cases(missing[start : start + AT_A_TIME]), strict=False):
            facts = {key: value for key, value in vars(found).items() if key != "loop"}
            known[case] = facts | {"digest": digests[case], "commit": about["commit"]}
        rows = [known[case] for case in wanted if case in known]
        path.write_text(json.dumps(about | {"compiled": rows}, indent=1) + "\n")
    rows = [known[case] for case in wanted]
    columns = ("registers", "shared", "spills", "tensor_core", "instructions", "loop_instructions")
    print(f"{'kernel and configuration':72} {'target':7} " + " ".join(f"{c.replace('_', ' '):>17}" for c in columns))
    for row in rows:
        label = f"{row['module']}: {row['case']}"
        print(f"{label:72} {row['target']:7} " + " ".join(f"{row[c]:>17}" for c in columns))
    spilled = [f"{row['module']}: {row['case']} for {row['target']}" for row in rows if row["spills"] or row["stack"]]
    print("\nNo kernel spills registers." if not spilled else f"\nSpills registers: {', '.join(spilled)}")
    return rows


def origin(device: str) -> dict:
    """Machine, versions, commit and date, to stand beside every number."""
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAVE_TRITON else None,
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def figures(result: dict, path: Path) -> list[Path]:
    """A picture for each function, `path` with its name in it: times beside the least possible, or what is counted."""
    floors = {row["case"]: row["floor_us"] for row in result.get("floors_h200_us", [])}
    times = {}
    for row in result.get("rows", []):
        if "us" in row:
            times.setdefault(row["case"], {})[row["contender"]] = row
            if row["share"]:
                floors.setdefault(row["case"], {})[row["contender"]] = row["share"] * row["us"]
    made = []
    for function, (starts, module) in FUNCTIONS.items():
        names = [name for name in floors if name.startswith(starts)][::-1]
        counted = [row for row in result.get("compiled", []) if row["module"] == module]
        kinds = list(dict.fromkeys(row["case"] for row in counted))[::-1]
        if not names:
            continue
        with pyplot() as plt:
            rows = [max(4, 1.4 * len(names)), max(8, len(kinds))][: 2 if counted else 1]
            size = (WIDTH, 0.15 * sum(rows) + 0.6 * len(rows) + 0.3)
            figure, axes = plt.subplots(
                len(rows), figsize=size, height_ratios=rows, layout="constrained", squeeze=False
            )
            draw_times(axes[0, 0], names, floors, times)
            if counted:
                draw_instructions(plt, axes[1, 0], kinds, counted)
            what = f"measured on {result['device']}" if times else "counted, not measured: no GPU was at hand"
            figure.suptitle(f"{function}: {what}", x=0.01, ha="left")
            made.append(path.with_name(f"{path.stem}-{function}.png"))
            save_figure(plt, figure, made[-1], dpi=150)
    return made


def draw_times(axes, names: list[str], floors: dict, times: dict) -> None:
    """A row for each case: medians with the 10th to 90th percentile, and the least time of ours as a bar."""
    others = dict.fromkeys(name for of_case in times.values() for name in of_case if not name.startswith("ours"))
    colours = OURS | dict(zip(others, (ORANGE, PURPLE, GREY, "black"), strict=False))
    for place, case in enumerate(names):
        found = [(name, floors[case][name], None, "|") for name in floors[case]]
        for name, t in times.get(case, {}).items():
            found.append((name, t["us"], [[t["us"] - t["p10"]], [t["p90"] - t["us"]]], "."))
        for number, (name, us, spread, marker) in enumerate(found):
            axes.errorbar(
                us, place + 0.12 * (number % 2 - 0.5), xerr=spread, fmt=marker, color=colours.get(name, GREY),
                markersize=8 if marker == "|" else 4, label=f"{name}, least time" if marker == "|" else name,
            )  # fmt: skip
    axes.set(xlabel="time (us)" if times else "least time on an H200, from bytes and operations (us)", xscale="log")
    finish(axes, [name.removesuffix(" training") for name in names])


def draw_instructions(plt, axes, kinds: list[str], counted: list[dict]) -> None:
    """A row for each case, a dot for each target, a square for those of AMD."""
    loops = any(row["loop_instructions"] for row in counted)
    nvidia = [target for target in aot.TARGETS if target.startswith("sm_")]
    colours = dict(zip(nvidia, shades(plt, len(nvidia)), strict=True)) | {"gfx942": ORANGE, "gfx950": PURPLE}
    for target in aot.TARGETS:
        rows = [row for row in counted if row["target"] == target]
        values = [row["loop_instructions"] or row["instructions"] for row in rows]
        places, marker = [kinds.index(row["case"]) for row in rows], "o" if target in nvidia else "s"
        axes.scatter(values, places, s=9, marker=marker, color=colours[target], label=target)
    what = " and step of the loop (in all, where there is none)" if loops else ""
    axes.set(xlabel=f"instructions per warp{what}", xscale="log")
    finish(axes, kinds)


def finish(axes, names: list[str]) -> None:
    """A name for each row, room above and below, and the legend at the right, each of its labels once."""
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(-0.7, len(names) - 0.3)
    plain_log(axes.xaxis)
    labels = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(labels.values(), labels, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the kernels, or without a GPU say what can be known of them.")
    parser.add_argument("--quick", action="store_true", help="a third of the cases; fewer without a GPU")
    parser.add_argument("--json", type=Path, help="write the result here, anywhere, instead of bench/results/")
    parser.add_argument("--part", metavar="I/N", default="0/1", help="every N-th case from number I on, with a GPU")
    options = parser.parse_args(arguments)
    part = tuple(int(number) for number in options.part.split("/"))
    gpu = torch.cuda.is_available() and HAVE_TRITON
    device = torch.cuda.get_device_name() if gpu else "static"
    name = f"kernels-{device.lower().replace(' ', '-').replace('/', '-')}" + "-quick" * options.quick
    path = options.json or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = origin(device) | {"quick": options.quick}
    if gpu:
        result["ceilings"], result["rows"] = run_gpu(options.quick, part)
        result["tuning"] = tune.enabled()
        result["timing"] = "CUDA graph over rotated random inputs, median and 10th to 90th percentile"
    else:
        print("No GPU (or no Triton) here: nothing is timed. What the compiler says, and least times on an H200:\n")
        result["floors_h200_us"] = floors()
        result["compiled"] = run_static(options.quick, path, result) if HAVE_TRITON else []
        print(f"\n{'least time on an H200, microseconds':50}")
        for row in result["floors_h200_us"]:
            print(f"{row['case']:50} " + "  ".join(f"{name} {us}" for name, us in row["floor_us"].items()))
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {path}")
    if has_matplotlib():
        figures(result, path)


if __name__ == "__main__":
    main()
