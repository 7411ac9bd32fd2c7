"""The kernels against dense cuBLAS / cuDNN, eager torch, torch.compile, and what others have, on the GPU at hand.

    python bench/kernels.py [--quick] [--json FILE]

With a GPU: each result is first checked against its definition, then timed: random inputs, enough copies of them to
leave the L2 cache cold, in a CUDA graph; median and the 10th to 90th percentile of many replays. `share` compares with
what copying and dense products reach on this device in the same run. Writes bench/results/kernels-<device>.json, .png.

Without a GPU: what the compiler makes of every kernel for four targets, and the time that an H200 would need at least.
Writes bench/results/kernels-static.json. No figure there is a measured time.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F

from empf.kernels import conv, conv_neuron, matmul, neuron, norm_neuron
from empf.kernels.dispatch import HAVE_TRITON
from empf.kernels.pack import pack, signs, unpack

HERE = Path(__file__).resolve().parent
MODULES = ("matmul", "conv", "conv_neuron", "neuron", "norm_kernels")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
H200 = {"copy": 4.3e12, "bf16": 790e12, "int8": 1580e12}  # bytes/s read and written, FLOP/s: rounded measurements
ROTATED = 256 << 20  # bytes of inputs that are cycled through: several times the L2 of any GPU


@dataclass
class Case:
    """One operation at one size. `inputs` makes one random set; every contender maps a set to its result."""

    name: str
    inputs: Callable[[str], dict]
    contenders: dict[str, Callable[[dict], torch.Tensor]]  # ours first
    reference: Callable[[dict], torch.Tensor]
    tolerance: dict[
        str, float
    ]  # of the largest error, relative to the largest value; contenders without are not checked
    moved: dict[str, int]  # bytes that ours have to read and write
    operations: int = 0
    goals: list[tuple[str, str, float]] = field(default_factory=list)  # (ours, rival, speed-up asked for)
    gradient: bool = False

    def floor(self, ceilings: dict, ours: str) -> float:
        """Least time in microseconds on a device with these ceilings."""
        unit = "int8" if "int8" in ours else "bf16"
        return 1e6 * max(self.moved[ours] / ceilings["copy"], self.operations / ceilings[unit])


def cases(small: bool = False) -> list[Case]:
    """What is measured. `small` keeps the operations and shrinks the sizes, so that they can be checked anywhere."""
    shrink = 64 if small else 1
    listed = []
    for m, n in ((1, 16384), (16, 16384), (64, 4096), (256, 4096), (4096, 4096)):
        listed.append(matmul_case(max(1, m // shrink), n // shrink))
    for c, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        listed.append(conv_case(256 // shrink, max(8, c // shrink), size))
        listed.append(layer_case(4, 64 // shrink, max(8, c // shrink), size))
    shape = (4, 64 // shrink, max(8, 64 // shrink), 32, 32)
    return listed + [neuron_case(shape), training_case(shape), norm_case(shape, mem=False), norm_case(shape, mem=True)]


def matmul_case(m: int, n: int) -> Case:
    k = n

    def inputs(device):
        w = torch.randn(n, k, device=device)
        codes = torch.randint(0, 16, (m, k), device=device, dtype=torch.int8)
        packed = pack(w)
        dense = unpack(packed).bfloat16()
        rows = F.pad(codes, (0, 0, 0, -m % 32)) if m < 32 else codes  # torch._int_mm wants more than 16 rows
        return {"x": codes.bfloat16() / 4, "codes": codes, "packed": packed, "dense": dense, "rows": rows,
                "int8": signs(packed)}  # fmt: skip

    def int8_dense(z):
        return torch._int_mm(z["rows"], z["int8"].t())[:m] * (0.25 * z["packed"].scale)

    contenders = {
        "ours bf16": lambda z: matmul.binary_matmul(z["x"], z["packed"]),
        "ours int8": lambda z: matmul.binary_matmul(z["codes"], z["packed"], step=0.25, out_dtype=torch.bfloat16),
        "cuBLAS bf16": lambda z: z["x"] @ z["dense"].t(),
        "cuBLAS int8": int8_dense,
    }
    if importlib.util.find_spec("gemlite"):
        contenders["gemlite 1-bit"] = gemlite_product(n, k)
    goals = {1: [("ours int8", "cuBLAS bf16", 10.0)], 16: [("ours int8", "cuBLAS bf16", 8.0)]}
    goals[4096] = [("ours int8", "cuBLAS bf16", 1.4), ("ours bf16", "cuBLAS bf16", 0.9)]
    moved = {"ours bf16": n * k // 8 + 2 * m * (n + k), "ours int8": n * k // 8 + m * (2 * n + k)}
    if m in (1, 16):
        goals[m].append(("ours bf16", "cuBLAS bf16", goals[m][0][2]))
    return Case(
        f"matmul {m}x{n}x{k}", inputs, contenders,
        lambda z: matmul.binary_matmul_ref(z["codes"], z["packed"], step=0.25),
        dict.fromkeys(contenders, 0.02), moved, 2 * m * n * k, goals=goals.get(m, []),
    )  # fmt: skip


def gemlite_product(n: int, k: int):
    """1-bit product of gemlite: (code - zero) * scale in groups of 128; a layer is made once per set of inputs."""
    layers = {}

    def run(z):
        from gemlite import DType, GemLiteLinear

        if id(z["packed"]) not in layers:
            layer = GemLiteLinear(
                1, group_size=128, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
            )
            scales = (2 * z["packed"].scale)[:, None].expand(n, k // 128).bfloat16().contiguous()
            codes = (signs(z["packed"]) > 0).to(torch.uint8)
            layer.pack(codes, scales, torch.full_like(scales, 0.5), None)
            layers[id(z["packed"])] = layer
        return layers[id(z["packed"])](z["x"])

    return run


def conv_case(images: int, c: int, size: int) -> Case:
    def inputs(device):
        codes = torch.randint(0, 16, (images, c, size, size), device=device, dtype=torch.int8)
        codes = codes.to(memory_format=torch.channels_last)
        packed = pack(torch.randn(c, c, 3, 3, device=device))
        dense = unpack(packed).bfloat16().to(memory_format=torch.channels_last)
        return {"x": codes.bfloat16() / 4, "codes": codes, "packed": packed, "dense": dense}

    contenders = {
        "ours bf16": lambda z: conv.binary_conv2d(z["x"], z["packed"], padding=1),
        "ours int8": lambda z: conv.binary_conv2d(
            z["codes"], z["packed"], padding=1, step=0.25, out_dtype=torch.bfloat16
        ),
        "cuDNN bf16": lambda z: F.conv2d(z["x"], z["dense"], padding=1),
    }
    numbers = images * c * size * size
    moved = {"ours bf16": 4 * numbers, "ours int8": 3 * numbers}
    return Case(
        f"conv3x3 {images}x{c}@{size}", inputs, contenders,
        lambda z: conv.binary_conv2d_ref(z["codes"], z["packed"], padding=1, step=0.25),
        dict.fromkeys(contenders, 0.02), moved, 18 * numbers * c,
        goals=[("ours int8", "cuDNN bf16", 1.3)],
    )  # fmt: skip


def layer_case(t: int, n: int, c: int, size: int) -> Case:
    """Convolution, batch normalisation in evaluation, T steps of the neuron and 4-bit spikes."""

    def inputs(device):
        codes = torch.randint(0, 16, (t * n, c, size, size), device=device, dtype=torch.int8)
        codes = codes.to(memory_format=torch.channels_last)
        w = torch.randn(c, c, 3, 3, device=device)
        packed = pack(w, scale=torch.rand(c, device=device) / (3 * math.sqrt(c)))
        dense = unpack(packed).bfloat16().to(memory_format=torch.channels_last)
        z = {"codes": codes, "x": codes.bfloat16() / 4, "packed": packed, "dense": dense}
        z |= {"leak": torch.full((t,), 0.5, device=device), "threshold": torch.full((t,), 0.5, device=device)}
        z |= {"mean": torch.randn(c, device=device).bfloat16(), "var": torch.rand(c, device=device).bfloat16() + 0.5}
        return z | {"one": torch.ones_like(z["mean"]), "zero": torch.zeros_like(z["mean"])}

    def folded(z):
        rstd = torch.rsqrt(z["var"].float() + 1e-5)
        return z["packed"].with_scale(z["packed"].scale * rstd), -z["mean"].float() * rstd

    prepared = {}

    def ours(z, codes):
        if id(z["packed"]) not in prepared:
            prepared[id(z["packed"])] = folded(z)
        packed, bias = prepared[id(z["packed"])]
        x = z["codes" if codes else "x"].unflatten(0, (t, n))
        spikes, _ = conv_neuron.binary_conv2d_neuron(
            x, packed, None, z["leak"], z["threshold"], padding=1, bias=bias, bits=4,
            in_step=0.25 if codes else None, codes=codes,
        )  # fmt: skip
        return spikes

    def eager(z):
        y = F.conv2d(z["x"], z["dense"], padding=1)
        y = F.batch_norm(y, z["mean"], z["var"], z["one"], z["zero"], eps=1e-5)
        return neuron.neuron_update_ref(y.unflatten(0, (t, n)), None, z["leak"], z["threshold"], bits=4)[0]

    def reference(z):
        packed, bias = folded(z)
        return conv_neuron.binary_conv2d_neuron_ref(
            z["x"].float().unflatten(0, (t, n)), packed, None, z["leak"], z["threshold"], padding=1, bias=bias, bits=4
        )[0]

    contenders = {
        "ours int8": lambda z: ours(z, True),
        "ours bf16": lambda z: ours(z, False),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    numbers = t * n * c * size * size
    goals = [("ours int8", "eager", 4.0), ("ours int8", "torch.compile", 2.0)]
    # a rounding may flip a code, which is a whole step: the definition allows one step of 15
    return Case(
        f"conv+bn+neuron T={t} {n}x{c}@{size}", inputs, contenders, reference,
        {"ours int8": 0.08, "ours bf16": 0.08}, {"ours int8": 2 * numbers, "ours bf16": 4 * numbers},
        18 * numbers * c, goals,
    )  # fmt: skip


def neuron_inputs(shape, form=""):
    """Current (channels_last steps), parameters per step, and what the normalised forms need."""
    t, n, c, *rest = shape

    def inputs(device):
        current = torch.randn(t, n, *rest, c, device=device).bfloat16().movedim(-1, 2)
        z = {"current": current.requires_grad_(), "leak": torch.full((t,), 0.5, device=device, requires_grad=True)}
        z["threshold"] = torch.full((t,), 0.5, device=device, requires_grad=True)
        if form:
            norm = (t, c) if form == "mem" else (c,)
            z |= {"weight": torch.ones(norm, device=device, requires_grad=True)}
            z |= {"bias": torch.zeros(norm, device=device, requires_grad=True)}
        if form == "mem":
            z |= {name: torch.full((t,), 0.5, device=device, requires_grad=True) for name in ("alpha", "beta")}
        return z | {"d_spikes": torch.randn_like(current)}

    return inputs


def forward_of(function, form="", *, backward):
    """The function as a contender: spikes, or with `backward` the gradient of the current (all are computed)."""
    order = ("leak", "threshold") + {"": (), "bn": ("weight", "bias"), "mem": ("alpha", "beta", "weight", "bias")}[form]

    def run(z):
        parameters = [z[name] for name in order]
        if not backward:
            with torch.no_grad():
                return function(z["current"], None, *parameters)[0]
        spikes = function(z["current"], None, *parameters)[0]
        return torch.autograd.grad(spikes, [z["current"], *parameters], z["d_spikes"])[0]

    return run


def in_float(function, form="", *, backward):
    """The definition on fp32 copies of the inputs."""
    run = forward_of(function, form, backward=backward)

    def reference(z):
        return run({name: p.detach().float().requires_grad_() for name, p in z.items()})

    return reference


def neuron_case(shape) -> Case:
    numbers = math.prod(shape)
    compiled = torch.compile(neuron.neuron_update_ref, dynamic=False)
    contenders = {
        "ours": forward_of(neuron.neuron_update, backward=False),
        "eager": forward_of(neuron.neuron_update_ref, backward=False),
        "torch.compile": forward_of(compiled, backward=False),
    }
    return Case(
        f"neuron forward {'x'.join(map(str, shape))}", neuron_inputs(shape), contenders,
        in_float(neuron.neuron_update_ref, backward=False), {"ours": 0.01}, {"ours": 4 * numbers},
    )  # fmt: skip


def training_case(shape) -> Case:
    numbers = math.prod(shape)
    compiled = torch.compile(neuron.neuron_update_ref, dynamic=False)
    contenders = {
        "ours": forward_of(neuron.neuron_update, backward=True),
        "eager": forward_of(neuron.neuron_update_ref, backward=True),
        "torch.compile": forward_of(compiled, backward=True),
    }
    goals = []
    if importlib.util.find_spec("spikingjelly"):
        contenders["SpikingJelly LIF"] = spikingjelly_lif()
        goals = [("ours", "SpikingJelly LIF", 2.0)]
    return Case(
        f"neuron training {'x'.join(map(str, shape))}", neuron_inputs(shape), contenders,
        in_float(neuron.neuron_update_ref, backward=True), {"ours": 0.01}, {"ours": 10 * numbers}, goals=goals,
        gradient=True,
    )  # fmt: skip


def spikingjelly_lif():
    """Forward and backward of a binary LIF neuron: another neuron with the same traffic. It wants contiguous inputs."""
    made = {}

    def run(z):
        from spikingjelly.activation_based import functional
        from spikingjelly.activation_based import neuron as others

        if "node" not in made:  # version 2 has no choice of backend: on a GPU it is Triton
            choice = {"backend": "triton"} if "backend" in signature(others.LIFNode).parameters else {}
            made["node"] = others.LIFNode(v_reset=None, detach_reset=True, step_mode="m", **choice)
        if id(z["current"]) not in made:
            made[id(z["current"])] = z["current"].detach().contiguous().requires_grad_(), z["d_spikes"].contiguous()
        current, d_spikes = made[id(z["current"])]
        functional.reset_net(made["node"])
        return torch.autograd.grad(made["node"](current), current, d_spikes)[0]

    return run


def norm_case(shape, mem: bool) -> Case:
    form, numbers = "mem" if mem else "bn", math.prod(shape)
    fused = norm_neuron.mem_bn_neuron if mem else norm_neuron.bn_neuron
    ref = norm_neuron.mem_bn_neuron_ref if mem else norm_neuron.bn_neuron_ref
    contenders = {
        "ours": forward_of(fused, form, backward=True),
        "eager": forward_of(ref, form, backward=True),
        "torch.compile": forward_of(torch.compile(ref, dynamic=False), form, backward=True),
    }
    # forward: two reads, one write, and m once to memory and back; backward: input and gradient twice, one write
    moved = {"ours": 2 * numbers * (3 + 5 + (4 if mem else 0))}
    return Case(
        f"{'Mem-BN' if mem else 'BN'} + neuron training {'x'.join(map(str, shape))}", neuron_inputs(shape, form),
        contenders, in_float(ref, form, backward=True), {"ours": 0.02}, moved, gradient=True,
    )  # fmt: skip


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


def run_gpu(quick: bool) -> tuple[dict, list[dict]]:
    """Check and time every case; a contender that fails is reported with its message and left out."""
    replays = 20 if quick else 100
    limits = ceilings(replays)
    print(f"ceilings here: copy {limits['copy'] / 1e12:.2f} TB/s, bf16 {limits['bf16'] / 1e12:.0f} TFLOP/s, "
          f"int8 {limits['int8'] / 1e12:.0f} TOP/s\n")  # fmt: skip
    chosen = cases()
    rows = []
    for case in chosen[::3] if quick else chosen:
        torch.manual_seed(0)
        first = case.inputs("cuda")
        copies = min(96, max(2, -(-ROTATED // min(case.moved.values()))))
        sets = [first] + [case.inputs("cuda") for _ in range(copies - 1)]
        measured = {}
        for name, function in case.contenders.items():
            try:
                if name in case.tolerance and not (off := error(case, name, first)) <= case.tolerance[name]:
                    raise RuntimeError(f"wrong: relative error {off:.2e}, allowed {case.tolerance[name]:.2e}")
                measured[name] = measure(function, sets, replays)
            except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as problem:
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


def run_static(quick: bool) -> list[dict]:
    """The table of bench/aot.py for all kernels, two modules at a time; with `quick` for sm_90 only."""
    targets = ("sm_90",) if quick else TARGETS
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(module):
        command = [sys.executable, str(HERE / "aot.py"), module, "--json", "--targets", *targets]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{module} does not compile:\n{done.stderr[-2000:]}")
        return [{key: value for key, value in row.items() if key != "loop"} for row in json.loads(done.stdout)]

    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(compiled, MODULES) for row in found]
    columns = ("registers", "shared", "spills", "tensor_core", "instructions", "loop_instructions")
    print(f"{'kernel and configuration':72} {'target':7} " + " ".join(f"{c.replace('_', ' '):>12}" for c in columns))
    for row in rows:
        label = f"{row['module']}: {row['case']}"
        print(f"{label:72} {row['target']:7} " + " ".join(f"{row[c]:>12}" for c in columns))
    return rows


def origin(device: str) -> dict:
    """Machine, versions, commit and date, to stand beside every number."""
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    version = __import__("triton").__version__ if HAVE_TRITON else None
    return {
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "device": device,
        "torch": torch.__version__,
        "triton": version,
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Speed-up of ours over every rival, one bar each; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{row['case']}: {row['contender']} / {rival}", ratio) for row in rows if row.get("share")
            for rival, ratio in row["speedup"].items() if not rival.startswith("ours")]  # fmt: skip
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(10, 0.24 * len(bars) + 1), layout="constrained")
    labels, ratios = zip(*reversed(bars), strict=True)
    axes.barh(labels, ratios, color=["tab:blue" if ratio >= 1 else "tab:red" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast", title=title)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the kernels, or without a GPU say what can be known of them.")
    parser.add_argument("--quick", action="store_true", help="fewer cases or targets, under a minute")
    parser.add_argument("--json", type=Path, help="write the result here instead of bench/results/")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and HAVE_TRITON
    device = torch.cuda.get_device_name() if gpu else "static"
    result = origin(device) | {"quick": options.quick}
    if gpu:
        result["ceilings"], result["rows"] = run_gpu(options.quick)
        result["timing"] = "CUDA graph over rotated random inputs, median and 10th to 90th percentile"
    else:
        print("No GPU (or no Triton) here: nothing is timed. What the compiler says, and least times on an H200:\n")
        result["floors_h200_us"] = floors()
        result["compiled"] = run_static(options.quick) if HAVE_TRITON else []
        print(f"\n{'least time on an H200, microseconds':50}")
        for row in result["floors_h200_us"]:
            print(f"{row['case']:50} " + "  ".join(f"{name} {us}" for name, us in row["floor_us"].items()))
    path = options.json or HERE / "results" / f"kernels-{device.lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {path}")
    if gpu and importlib.util.find_spec("matplotlib"):
        plot(result["rows"], device, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
