"""Images per second of training, where the time of an update goes, and what it keeps in memory.

    python bench/train.py       ResNet-18 x0.5, T = 4, batch 64, on a GPU or else the CPU
    python bench/train.py --device cuda --width 1 --bf16 --cuda-graph      or --compile
    python bench/train.py --threads 1 --cpu-time --repeats 3               on a busy machine: counts CPU seconds

    random          our loop: the steps before t* as one folded batch without gradient, stem and synapses formed once
    kept            the same, but no activation is made again in the backward pass (empf.layer switched off)
    authors-order   as kept, but in the authors' order: one time step after another through the whole network, stem and
                    synapses anew in each; in our memory layout and with our modules
    authors-loop    that order as the authors run it: in torch's default layout (N, C, H, W), the neuron in plain
                    operations, no kernels
    every           every step back-propagated by itself
    stbp            back-propagated through time

t* is uniform over 1..T, so the first four are timed at each t* equally often. Before anything is timed their gradients
and running statistics are compared, in float64 and in the precision that is timed, and those of `every` with the mean
over t*. An update is: a batch with the augmentation of train.py, gradients, SGD with momentum. The variants take turns,
and ratios are taken within a turn. Writes bench/results/train-cpu.json or train-cuda.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: waiting threads leave a busy machine alone

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
import empf
from bench.loops import ONE_STEP, PLAIN, Loop, Setting, Stopwatch, Watch
from bench.machine import machine, spread
from empf import layer
from empf.diagnose.memory import saved_for_backward
from empf.files import write_result
from empf.machine import cpu_threads, keep_freed_memory
from empf.model_config import ARCHS, WEIGHTS
from empf.training.config import Parser

VARIANTS = ("random", "kept", "authors-order", "authors-loop", "every", "stbp")


# ---- what is checked before anything is timed


def run_once(loop: Loop, variant: str, t: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients and running statistics, each as one vector; running statistics are put back."""
    loop, (x, target) = loop.of(variant), batch
    x = x if loop.setting.channels_last else x.contiguous()
    before = [b.clone() for b in loop.model.buffers()]
    loop.model.zero_grad()
    loop.gradients(variant, t, x, target)
    gradients = torch.cat([p.grad.flatten() for p in loop.model.parameters()])
    running = torch.cat([b.flatten() for b in loop.model.buffers()])
    with torch.no_grad():
        for buffer, old in zip(loop.model.buffers(), before, strict=True):
            buffer.copy_(old)
    loop.model.zero_grad()
    return gradients, running


def apart(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def draw(loop: Loop, images: int) -> tuple[Tensor, Tensor]:
    x, target = next(loop.batches)
    return (x[:images] if x.dim() == 4 else x[:, :images]), target[:images]


def compare(loop: Loop, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative distance (norms) of the gradients and running statistics of each variant from those of `random`."""
    ours = [run_once(loop, "random", t, batch) for t in loop.steps("random")]
    result = {}
    for variant in ONE_STEP[1:]:
        pairs = [
            zip(run_once(loop, variant, t, batch), one, strict=True)
            for t, one in zip(loop.steps(variant), ours, strict=True)
        ]
        result[variant] = max(apart(found, wanted) for pair in pairs for found, wanted in pair)
    mean = torch.stack([gradients for gradients, _ in ours]).mean(0)
    result["every"] = apart(run_once(loop, "every", 1, batch)[0], mean)
    return result


def rounding(loop: Loop, batch: tuple[Tensor, Tensor]) -> float:
    """The same distance of `random` from itself in float64, with the same weights and images."""
    exact = Loop(replace(loop.setting, bf16=False), torch.float64)
    exact.model.load_state_dict(loop.model.state_dict())
    wide = tuple(b.double() if b.is_floating_point() else b for b in batch)
    steps = loop.steps("random")
    pairs = [(run_once(loop, "random", t, batch)[0], run_once(exact, "random", t, wide)[0]) for t in steps]
    return max(apart(found, wanted) for found, wanted in pairs)


def check_gradients(setting: Setting) -> dict:
    """The comparison of `compare` in float64 and as timed. Raises ValueError where it is more than rounding.

    A spike at its threshold to rounding switches its gradient, and there are many of them: so the bound of what is
    timed is 1 %, or twice what rounding does to `random` itself, for two results may err in opposite directions. In
    bf16 that is a fourth of the gradient of a network that has learned nothing; a whole one would say nothing.
    """
    plain = replace(setting, compile=False, cuda_graph=False)
    loop = Loop(replace(plain, bf16=False), torch.float64)
    exact = compare(loop, draw(loop, min(8, setting.batch_size)))
    loop = Loop(plain)
    batch = draw(loop, setting.batch_size)
    timed, own = compare(loop, batch), rounding(loop, batch)
    if not own < 1:
        raise ValueError(f"rounding alone changes the gradients of random by {own:.1e} of their size: nothing timed")
    for distances, bound in ((exact, 1e-9), (timed, max(1e-2, 2 * own))):
        for variant, distance in distances.items():
            if not distance < bound:
                raise ValueError(
                    f"the gradients of {variant} are {distance:.1e} from those of random, more than {bound:.1e}: "
                    "nothing timed"
                )
    return {"float64": exact, "as timed": timed, "rounding of random": own}


def watch(loop: Loop, variant: str = "random", t: int | None = None) -> Watch:
    """Run the gradients and the optimizer of one update under `Watch`."""
    x, target = next(loop.batches)
    with Watch(loop.model) as seen:
        loop.gradients(variant, t or loop.setting.T, x, target)
        loop.optimizer.step()
    loop.optimizer.zero_grad()
    return seen


# ---- what is measured


def in_turns(loop: Loop, variants, repeats: int, clock: Callable[[], float], laps: bool) -> dict[str, list[Counter]]:
    """For each variant and turn, the seconds of one update: "total", and its parts where `laps` are taken.

    `past`: what the forward pass takes longer at t* than at t* = 1, where no step comes before.
    """
    found: dict[str, list[Counter]] = {variant: [] for variant in variants}
    updates = 1 if laps else 5  # between two waits for a GPU
    for turn in range(-1, repeats):  # one to warm up
        for variant in variants if turn % 2 else variants[::-1]:
            parts, first, n = Counter(), 0.0, updates * len(loop.steps(variant))
            for t in loop.steps(variant):
                stopwatch = Stopwatch(loop.setting.device, clock)
                for _ in range(updates):
                    loop.of(variant).update(variant, t, stopwatch.lap if laps else lambda name: None)
                stopwatch.lap("rest")
                seconds = stopwatch.seconds
                first = first or seconds["forward"]
                seconds.update(total=sum(seconds.values()), past=seconds["forward"] - first)
                seconds["forward"] -= seconds["past"]
                parts.update(seconds)
            if turn >= 0:
                found[variant].append(Counter({name: value / n for name, value in parts.items()}))
    return found


def operations(loop: Loop, variant: str) -> float:
    """Floating-point operations of the convolutions and matrix products of one update, mean over t*."""
    counts, loop = [], loop.of(variant)
    for t in loop.steps(variant):
        with FlopCounterMode(display=False) as counter:
            loop.gradients(variant, t, *next(loop.batches))
        counts.append(counter.get_total_flops())
    loop.optimizer.zero_grad()
    return statistics.mean(counts)


def largest_rate(setting: Setting, clock: Callable[[], float], n: int = 1024) -> float:
    """FLOP/s of a large matrix product: what the arithmetic of this machine can do."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    a, b = (torch.randn(n * 8 if setting.device != "cpu" else n, n, device=setting.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        stopwatch = Stopwatch(setting.device, clock)
        a @ b.T
        stopwatch.lap("product")
        seconds.append(stopwatch.seconds["product"])
    return 2 * len(a) * len(b) * n / statistics.median(seconds[1:])


def saved(loop: Loop, variant: str) -> dict[str, int]:
    """Bytes kept for the backward pass and in membrane potentials, at the most expensive t*."""
    loop = loop.of(variant)
    x, _ = next(loop.batches)
    T, through_time = loop.setting.T, variant == "stbp"
    run = {"past": 0, "steps": T} if through_time else {"past": T - 1, "steps": 1}
    empf.set_online(loop.model, not through_time)
    try:
        with layer.enabled(variant not in PLAIN):
            counted = saved_for_backward(loop.model, x, **run)
    finally:
        empf.set_online(loop.model, True)
    return {"saved": counted["bytes"], "potentials": counted["potentials"]}


@contextmanager
def cpu_peak() -> Iterator[Callable[[], int]]:
    """Hands out the growth of this process's resident memory, at its largest, in bytes (Linux)."""
    path = Path("/proc/self")

    def line(name: str) -> int:
        return next(
            int(s.split()[1]) * 1024 for s in (path / "status").read_text().splitlines() if s.startswith(name)
        )  # fmt: skip

    (path / "clear_refs").write_text("5")  # the peak starts anew
    before = line("VmRSS")
    yield lambda: line("VmHWM") - before


def peak_alone(setting: Setting, variant: str) -> int:
    """Peak memory of one update at t* = T beyond what stays allocated between updates, in bytes."""
    loop = Loop(setting).of(variant)
    loop.update("random", 1)  # makes the momentum
    if torch.device(setting.device).type == "cuda":
        loop.update(variant, loop.steps(variant)[-1])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loop.update(variant, loop.steps(variant)[-1])
        return torch.cuda.max_memory_allocated() - before
    with cpu_peak() as growth:
        loop.update(variant, loop.steps(variant)[-1])
        return growth()


def peak(setting: Setting, variant: str) -> int | None:
    """`peak_alone` in a fresh process, so that no variant finds the memory of another; None where it is not known."""
    if torch.device(setting.device).type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--alone", variant, *flags(setting)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"the process that measures the memory of {variant} failed: {result.stderr.strip()[-300:]}")
    return int(result.stdout)


def shares(loop: Loop, top: int = 12) -> dict[str, float]:
    """Share of each kind of operation in the time of our update, by the profiler, mean over t*."""
    gpu = torch.device(loop.setting.device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=kinds) as profiler:
        for t in loop.steps("random"):
            loop.update("random", t)
    spent = Counter()
    for event in profiler.key_averages():
        spent[event.key] += event.self_device_time_total if gpu else event.self_cpu_time_total
    whole = sum(spent.values())
    return {name: round(value / whole, 4) for name, value in spent.most_common(top)}


def measure(setting: Setting, repeats: int, cpu_time: bool = False, variants=VARIANTS) -> dict:
    """Everything this file reports, as plain values; `random` is among the variants."""
    clock = time.process_time if cpu_time else time.perf_counter
    result = {"setting": asdict(setting), "machine": machine(setting.device), "clock": clock.__name__}
    result["gradients_apart"] = check_gradients(setting)
    loop = Loop(setting)
    plain = Loop(replace(setting, compile=False, cuda_graph=False))
    seen = watch(plain)
    result["layout_conversions"], result["host_reads"] = dict(seen.conversions), dict(seen.reads)
    result["weight_conversions"] = dict(seen.weights)
    gpu = torch.device(setting.device).type == "cuda"
    turns = in_turns(loop, variants, repeats, clock, laps=not gpu)
    parts = in_turns(loop, variants, max(1, repeats // 2), clock, laps=True) if gpu else turns
    limit = largest_rate(setting, clock)
    result |= {"repeats": repeats, "matmul_flops_per_s": limit, "variants": {}}
    for variant, seconds in turns.items():
        rates = [setting.batch_size / s["total"] for s in seconds]
        flop = operations(plain, variant)
        ms = {
            name: round(1e3 * statistics.median(s[name] for s in parts[variant]), 3)
            for name in ("data", "past", "forward", "backward", "forward and backward", "optimizer", "rest")
            if any(s[name] for s in parts[variant])
        }
        result["variants"][variant] = {
            "images_per_s": spread(rates, 2), "ms_per_update": ms, "gflop_per_update": flop / 1e9,
            "share_of_limit": round(flop / (limit * statistics.median(s["total"] for s in seconds)), 3),
            "bytes": {**saved(plain, variant), "peak": peak(setting, variant)},
        }  # fmt: skip
    result["speed_of_random_over"] = {
        other: spread(b["total"] / a["total"] for a, b in zip(turns["random"], turns[other], strict=True))
        for other in variants
        if other != "random"
    }
    result["shares_of_operations"] = shares(plain)
    return result


def report(r: dict) -> str:
    """The result for people."""
    s, m = r["setting"], r["machine"]
    lines = [
        f"{s['arch']} x{s['width']:g}, T = {s['T']}, batch {s['batch_size']}, {s['weights']} weights, "
        f"{m.get('gpu', m['cpu'])}, "
        f"{m['threads']} threads; median [quartiles] of {r['repeats']} turns, clock: {r['clock']}",
        f"{'':13s} {'images/s':>24s} {'random is':>10s} {'saved':>9s} {'peak':>9s}  ms per update",
    ]
    for name, v in r["variants"].items():
        low, high = v["images_per_s"]["quartiles"]
        ratio = r["speed_of_random_over"].get(name, {"median": 1})["median"]
        peak_mb = "" if v["bytes"]["peak"] is None else f"{v['bytes']['peak'] / 1e6:.1f} MB"
        lines.append(
            f"{name:13s} {v['images_per_s']['median']:8.1f} [{low:.1f}, {high:.1f}] {ratio:9.2f}x "
            f"{v['bytes']['saved'] / 1e6:6.1f} MB {peak_mb:>9s}  "
            + ", ".join(f"{part} {ms:.1f}" for part, ms in v["ms_per_update"].items())
            + f"; {100 * v['share_of_limit']:.0f} % of a matrix product's FLOP/s"
        )
    for what in ("layout_conversions", "weight_conversions", "host_reads"):
        lines.append(f"{what.replace('_', ' ')} in an update: {r[what] or 'none'}")
    lines.append("time of `random`: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in r["shares_of_operations"].items()))
    return "\n".join(lines)


def flags(setting: Setting) -> list[str]:
    """The command line of a setting."""
    result = []
    for name, value in asdict(setting).items():
        flag = name.replace("_", "-")
        result += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return [*result, "--threads", str(torch.get_num_threads())]


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    choices = {"arch": ARCHS, "weights": WEIGHTS}
    for f in fields(Setting):
        default = ("cuda" if torch.cuda.is_available() else "cpu") if f.name == "device" else f.default
        flag = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            p.add_argument(flag, type=f.type, default=default, choices=choices.get(f.name))
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core (default: 0)")
    p.add_argument("--repeats", type=int, default=9, help="turns (default: 9)")
    p.add_argument("--cpu-time", action="store_true", help="count CPU seconds of all threads instead of wall time")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/train-cpu.json or train-cuda.json")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="timed beside random")
    p.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    try:
        setting = Setting(**{f.name: getattr(args, f.name) for f in fields(Setting)})
        torch.set_num_threads(cpu_threads(args.threads))
        if args.alone:  # freed memory must not stay, or the growth is not that of one update
            print(peak_alone(setting, args.alone))
            return
        keep_freed_memory()
        result = measure(setting, args.repeats, args.cpu_time, tuple(dict.fromkeys(("random", *args.variants))))
        print(report(result))
        kind = torch.device(setting.device).type
        out = args.json or Path(__file__).parent / "results" / f"train-{kind}.json"
        write_result(out, json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
