"""All that is to be run first on a new GPU, in slices under ten minutes: a failure costs one row, not the hour.

    python bench/first_gpu.py --out first                 as many steps as fit into 9.5 minutes; call again to continue
    python bench/first_gpu.py --out first --again split   these steps anew
    python bench/first_gpu.py --out try --rehearse        all steps here, tiny, on the CPU (kernels on Triton's
                                                          interpreter), one of which fails

Steps, in this order: versions; tests of the kernels, bf16 first, which runs nowhere else; split K under load, and under
compute-sanitizer; edges; random calls; kernels against dense libraries; the candidates of the tuner side by side; the
same tuned; training; packed networks; the record network in slices. Each step is a process with a time limit. OUT holds
steps.json (what is done), a log for each step, the results, and summary.md: one row per step, and the kernels ranked by
how far they are from their targets. In a rehearsal each step is a copy of this process, for importing torch takes most
of the time.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
if "--rehearse" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from bench.kernel_cases import cases
from bench.kernels import error
from empf.kernels import (
    binary_conv2d,
    binary_conv2d_neuron,
    binary_conv2d_ref,
    binary_matmul,
    binary_matmul_ref,
    pack,
    set_backend,
    set_tuning,
    tune,
)
from empf.kernels.dispatch import triton

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = (
    "matmul",
    "dense",
    "products",
    "conv",
    "conv_neuron",
    "pack",
    "neuron_kernel",
    "norm_neuron_kernel",
    "flip_kernel",
    "steps",
)
FUZZED = ("pack", "matmul", "conv", "gradients", "neuron", "quantizer", "conv_neuron", "norm", "flip")
PARTS = 6  # of the cases of bench/kernels.py
OFF = {"EMPF_KERNELS": "off"}  # in the rehearsal of a step: training on the interpreter would take minutes


class Step(NamedTuple):
    """A command, the minutes it may take, and what stands in for it in a rehearsal (None: nothing could)."""

    name: str
    minutes: float
    command: list
    rehearsal: list | None
    environment: dict = {}
    rehearsal_environment: dict = {"EMPF_KERNELS": "on"}


def steps(out: Path, data: str | None) -> list[Step]:
    """Everything, in order."""
    python, me = sys.executable, [sys.executable, str(Path(__file__).resolve()), "--check"]
    source = ["--data", data] if data else []
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    gpu_tests, bf16 = [*tests, "-m", "gpu", "-n", "12"], "bfloat16 or bf16 or dtype1 or dtype2"
    files = [f"tests/test_{name}.py" for name in KERNEL_TESTS]
    listed = [
        Step("versions", 1, [*me, "versions"], [*me, "versions"]),
        Step("tests-bf16", 9, [*gpu_tests, "-k", bf16, *files], [*tests, "-k", "canonical", "tests/test_pack.py"]),
    ]
    listed += [Step(f"tests-{name}", 9, [*gpu_tests, f"tests/test_{name}.py"], None) for name in KERNEL_TESTS]
    listed += [Step("split", 5, [*me, "split"], [*me, "split"])]
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *me, "split", "--repeats", "2"]
        listed.append(Step(tool, 9, command, None))
    listed += [
        Step("edges", 5, [*me, "edges"], [*me, "edges"]),
        Step("fails", 1, None, [python, "-c", "raise SystemExit('this step fails on purpose')"]),
    ]
    fuzz = [python, "tests/fuzz_kernels.py"]
    for name in FUZZED:
        tiny = [*fuzz, "--functions", name, "--cases", "3"] if name in ("pack", "quantizer") else None
        listed.append(Step(f"fuzz-{name}", 9, [*fuzz, "--functions", name, "--cases", "1000"], tiny))
    kernels = [python, "bench/kernels.py"]
    for tuned in ("", "-tuned"):
        environment = {"EMPF_TUNE": "save", "XDG_CACHE_HOME": str(out / "cache")} if tuned else {}
        for part in range(PARTS):
            result = ["--part", f"{part}/{PARTS}", "--json", str(out / f"kernels{tuned}-{part}.json")]
            tiny = [*me, "contenders"] if part == 0 and not tuned else None
            listed.append(Step(f"kernels{tuned}-{part}", 9, [*kernels, *result], tiny, environment))
        if not tuned:
            listed.append(Step("alternatives", 9, [*me, "alternatives"], [*me, "alternatives"]))
    train = [python, "bench/train.py", "--device", "cuda", "--width", "1"]
    tiny_train = [python, "bench/train.py", "--width", "0.0625", "--T", "2", "--batch-size", "2", "--repeats", "1"]
    tiny_train += ["--variants", "random", "--threads", "1"]
    for name, flags in (("bf16", ["--bf16"]), ("bf16-graph", ["--bf16", "--cuda-graph"]), ("fp32", []),
                        ("bf16-compile", ["--bf16", "--compile"]), ("fp32-graph", ["--cuda-graph"])):  # fmt: skip
        result = ["--json", str(out / f"train-{name}.json")]
        tiny = None if flags else [*tiny_train, *result]
        listed.append(Step(f"train-{name}", 9, [*train, *flags, *result], tiny, {}, OFF))
    deploy, result = [python, "bench/deploy.py"], ["--json", str(out / "deploy.json")]
    tiny_deploy = [*deploy, "--width", "0.0625", "--rounds", "1", "--batches", "1", *result, "--threads", "1"]
    tiny_deploy += ["--only", "model"]
    listed.append(Step("deploy", 9, [*deploy, "--device", "cuda", *result], tiny_deploy, {}, OFF))
    record = [python, "bench/record.py", "--runs", str(out / "runs"), *source]
    smoke = [*record, "--smoke", "--weights", "binary"]
    sliced = [*record, "--minutes", "8"]
    listed += [Step(f"record-{i}", 9, sliced, smoke if i == 0 else None, {}, OFF) for i in range(8)]
    return listed


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_versions(repeats: int) -> None:
    print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
    print("numpy", version("numpy"), "cuda", torch.version.cuda, "hip", torch.version.hip)
    print(torch.cuda.get_device_properties(0) if device() == "cuda" else "no GPU")
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)


def products(large: bool) -> dict:
    """Products whose sum over K is split: name -> function of nothing."""
    k, c, where = (16384, 512, device()) if large else (1024, 64, device())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, k, generator=generator).to(where)
    weight = pack(torch.randn(64, k, generator=generator)).to(where)
    codes = torch.randint(0, 16, (2, 1, c, 4, 4), dtype=torch.uint8, generator=generator).to(where)
    filters = pack(torch.randn(c, c, 3, 3, generator=generator)).to(where)
    half = torch.full((2,), 0.5, device=where)
    return {
        "matmul": lambda: binary_matmul(rows, weight),
        "conv": lambda: binary_conv2d(codes[0], filters, padding=1, step=0.25),
        "conv_neuron": lambda: binary_conv2d_neuron(
            codes, filters, None, half, half, padding=1, in_step=0.25, bits=4, codes=True
        )[0],
    }


def check_split(repeats: int) -> None:
    """The same bits at every repeat, and on several streams at once."""
    on_gpu = device() == "cuda"
    for name, run in products(on_gpu).items():
        want = run()
        streams = [torch.cuda.Stream() for _ in range(4)] if on_gpu else []
        for i in range(repeats if on_gpu else 2):
            results = [run()]
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(run())
            if on_gpu:
                torch.cuda.synchronize()
            if not all(torch.equal(y, want) for y in results):
                raise SystemExit(f"{name}: repeat {i} differs")
        print(name, "equal at every repeat")


def check_edges(repeats: int) -> None:
    """Sizes of 1, a step that is no power of two, graph capture."""
    where = device()
    for n, k in ((1, 1), (1, 33), (129, 1)):
        x, w = torch.randint(0, 16, (1, k), dtype=torch.uint8, device=where), pack(torch.randn(n, k, device=where))
        if not torch.equal(binary_matmul(x, w, step=0.1), binary_matmul_ref(x, w, step=0.1)):
            raise SystemExit(f"matmul of N = {n}, K = {k} differs from its definition")
    for size, o in (((3, 3), 1), ((3, 9), 5), ((9, 3), 65)):
        x = torch.randint(0, 16, (1, 7, *size), dtype=torch.uint8, device=where)
        w = pack(torch.randn(o, 7, 3, 3, device=where))
        if not torch.equal(binary_conv2d(x, w, step=0.1), binary_conv2d_ref(x, w, step=0.1)):
            raise SystemExit(f"convolution of {size} with {o} outputs differs from its definition")
    if where == "cuda":
        for name, run in products(True).items():
            want, graph = run(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run()
            for _ in range(10):
                y.zero_()
                graph.replay()
                if not torch.equal(y, want):
                    raise SystemExit(f"{name}: a replay differs")
    print("edges are right")


def check_contenders(repeats: int) -> None:
    """What a rehearsal has in place of timing: small cases agree with their definitions."""
    for case in (cases(small=True)[0], cases(small=True)[-4]):
        off = error(case, next(iter(case.contenders)), case.inputs(device()))
        print(f"{case.name}: {off:.1e}")


def check_alternatives(repeats: int) -> None:
    """Every candidate of the tuner, timed side by side; what the heuristic takes is marked."""
    on_gpu, seen = device() == "cuda", set()

    def fastest(key, where, plans, run, default):
        if key not in seen:
            seen.add(key)
            print(*key)
            for plan in dict.fromkeys([default, *plans()]):
                time_of = tune.measure(lambda plan=plan: run(plan)) if on_gpu else float("nan")
                print(f"  {time_of * 1e3:9.1f} us  {plan}{'  (heuristic)' * (plan == default)}", flush=True)
        return default

    tune.fastest = fastest
    set_tuning("1")
    for case in cases() if on_gpu else cases(small=True)[:1]:
        for name in case.moved:
            case.contenders[name](case.inputs(device()))


CHECKS = {
    "versions": check_versions, "split": check_split, "edges": check_edges, "contenders": check_contenders,
    "alternatives": check_alternatives,
}  # fmt: skip


def as_python(arguments: list[str], environment: dict, file) -> None:
    """What `python ARGUMENTS` would do, in this process."""
    os.environ |= environment
    os.chdir(ROOT)
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    set_backend(environment["EMPF_KERNELS"])
    kind, *rest = arguments
    sys.argv = rest if kind == "-m" else arguments
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if kind == "-c":
            exec(rest[0])
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(kind).resolve().parent))
            runpy.run_path(kind, run_name="__main__")


def run_copy(command: list, environment: dict, file, timeout: float) -> int:
    """The exit status of a Python command, run in a copy of this process."""
    copy = multiprocessing.get_context("fork").Process(target=as_python, args=(command[1:], environment, file))
    copy.start()
    copy.join(timeout)
    if copy.is_alive():
        copy.kill()
        raise subprocess.TimeoutExpired(command, timeout)
    return copy.exitcode


def run_step(step: Step, command: list, out: Path, rehearse: bool) -> dict:
    """The row of a step; what it printed is in its log."""
    start, log, timeout = time.time(), out / f"{step.name}.log", 60 * step.minutes
    with log.open("w", buffering=1) as file:
        try:
            if rehearse:
                code = run_copy(command, step.rehearsal_environment, file, timeout)
            else:
                environment = {**os.environ, **step.environment}
                code = subprocess.run(
                    command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=timeout
                ).returncode
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.minutes} minutes"
        except OSError as problem:
            status = f"failed ({problem})"
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"status": status, "seconds": round(time.time() - start, 1), "last": lines[-1][:200] if lines else ""}


def ranking(out: Path) -> list[str]:
    """Goals of bench/kernels.py and shares of the limit, the farthest from its target first."""
    rows = [
        (path.stem, row) for path in sorted(out.glob("kernels*.json")) for row in json.loads(path.read_text())["rows"]
    ]
    found = [(r["ratio"] / r["wanted"], f"{name}: {r['case']}, {r['goal']}") for name, r in rows if "goal" in r]
    found += [
        (r["share"], f"{name}: {r['case']}, {r['contender']}, share of the limit") for name, r in rows if r.get("share")
    ]
    return [f"| {ratio:.2f} | {what} |" for ratio, what in sorted(found)]


def write_summary(out: Path, done: dict) -> None:
    text = ["| step | result | s | last line |", "|---|---|---|---|"]
    text += [f"| {name} | {row['status']} | {row['seconds']} | {row['last']} |" for name, row in done.items()]
    if ranked := ranking(out):
        text += ["", "| reached / target | kernel |", "|---|---|", *ranked]
    (out / "summary.md").write_text("\n".join(text) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What is to be run first on a new GPU, in slices.")
    parser.add_argument("--out", type=Path, default=Path("first_gpu"), help="folder of all output (default: first_gpu)")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call (default: 9.5)")
    parser.add_argument("--data", help="local folder of CIFAR-100, for the record network")
    parser.add_argument("--only", nargs="+", help="steps whose name starts with one of these")
    parser.add_argument("--again", nargs="+", default=[], help="run these steps again")
    parser.add_argument("--rehearse", action="store_true", help="all of it here, tiny")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1000, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.check:
        return CHECKS[options.check](options.repeats)
    if not options.rehearse and device() == "cpu":
        parser.error("there is no GPU: try it with --rehearse")
    out, end = options.out.resolve(), time.time() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    path = out / "steps.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    done = {name: row for name, row in done.items() if name not in options.again}
    for step in steps(out, options.data):
        command = step.rehearsal if options.rehearse else step.command
        chosen = not options.only or step.name.startswith(tuple(options.only))
        if command is None or step.name in done or not chosen:
            continue
        if not options.rehearse and time.time() + 60 * step.minutes > end + 30:
            print(f"{step.name} is next: call again")
            break
        done[step.name] = run_step(step, command, out, options.rehearse)
        print(f"{step.name:20} {done[step.name]['status']:10} {done[step.name]['seconds']:6.1f} s", flush=True)
        path.write_text(json.dumps(done, indent=1) + "\n")
        write_summary(out, done)
    print(f"written: {out / 'summary.md'}")


if __name__ == "__main__":
    main()
