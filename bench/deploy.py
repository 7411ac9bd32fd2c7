"""What packing a network gains, and that it changes nothing.

    python bench/deploy.py                            size, load time, memory, latency and throughput, on the CPU
    python bench/deploy.py --device cuda              the same on a GPU, with bf16 activations
    python bench/deploy.py --equality --data FOLDER   logits of small trained networks on real CIFAR-100 images

The packed network is compared with `model.eval()`, with the same network with full-precision weights and, where they
are installed, with ONNX Runtime and OpenVINO on the exported file. Memory is that of a fresh process for each; times
are taken in turns in one process, so that their ratios hold on a busy machine too.
Writes bench/results/deploy-cpu.json, deploy-cuda.json, deploy-equality.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

import empf
from bench.machine import machine, spread
from empf import runs
from empf.data.batches import Batches
from empf.data.load import load_data
from empf.data.sets import ImageSet
from empf.deploy.layers import PackedNeuron
from empf.deploy.lazy import Spikes
from empf.deploy.pack import PackedModel, load_packed, pack
from empf.files import write_result
from empf.kernels import native
from empf.machine import installed
from empf.models import ModelConfig, build
from empf.neuron import StatefulNeuron

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 64)
ONNX_RUNTIME, ONNX_FP32, OPENVINO = "ONNX Runtime", "ONNX Runtime, fp32", "OpenVINO"
# who runs the exported file: its package
RUNTIMES = {ONNX_RUNTIME: "onnxruntime", ONNX_FP32: "onnxruntime", OPENVINO: "openvino"}
QUIET = 0.05  # seconds after which the threads that another one left behind have stopped looking for work


def contenders(device: str, spike_bits: int | None) -> tuple[str, ...]:
    """Who is measured; the first is the packed network. n-bit spikes are exported for integers, and without."""
    exported = device == "cpu" and all(map(installed, ("onnx", "onnxscript")))
    runtimes = [name for name, package in RUNTIMES.items() if exported and installed(package)]
    if spike_bits is None and ONNX_FP32 in runtimes:
        runtimes.remove(ONNX_FP32)
    return ("packed", "model", "full precision", *runtimes)


class Session(nn.Module):
    """An exported file in ONNX Runtime, with as many threads as torch has."""

    def __init__(self, path: Path):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        _, channels, size, _ = self.session.get_inputs()[0].shape
        self.config = SimpleNamespace(in_channels=channels, image_size=size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])


class Compiled(nn.Module):
    """An exported file in OpenVINO, as Session, compiled for each shape when it comes: faster than for a free one.

    It is asked to be as `accurate` as the others are: left to itself it takes bf16 where the processor has that.
    """

    def __init__(self, path: Path, accurate: bool = True):
        super().__init__()
        import openvino

        self.core = openvino.Core()
        self.core.set_property("CPU", {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
            "EXECUTION_MODE_HINT": "ACCURACY" if accurate else "PERFORMANCE",
        })  # fmt: skip
        self.network, self.compiled = self.core.read_model(path), {}
        *_, channels, size, _ = self.network.inputs[0].partial_shape
        self.config = SimpleNamespace(in_channels=channels.get_length(), image_size=size.get_length())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.compiled:
            network = self.network.clone()
            network.reshape(list(x.shape))
            self.compiled[x.shape] = self.core.compile_model(network, "CPU")
        return torch.from_numpy(self.compiled[x.shape](x.numpy(), share_outputs=False)[0])


class InBf16(nn.Module):
    """A packed network whose spikes are bf16."""

    def __init__(self, packed: PackedModel):
        super().__init__()
        self.packed, self.config = packed, packed.config

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.packed(x)


@torch.inference_mode()
def run(net: nn.Module, x: Tensor) -> Tensor:
    empf.reset(net)
    # on a GPU everybody computes with bf16 activations: the packed network has the type of its input
    half = x.is_cuda and not isinstance(net, PackedModel)
    with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
        logits = net(x.bfloat16() if x.is_cuda else x)
    empf.reset(net)
    return logits.float()


def prepare(folder: Path, config: ModelConfig, names: tuple[str, ...]) -> dict[str, Path]:
    """Write what each contender loads: networks whose statistics fit random images, so that neurons fire."""
    paths = {}
    for name, kind in (("model", config.weights), ("full precision", "full")):
        torch.manual_seed(0)
        model = build(ModelConfig.from_dict({**config.to_dict(), "weights": kind}))
        with torch.no_grad():
            for _ in range(5):
                empf.reset(model)
                model(torch.randn(8, config.in_channels, config.image_size, config.image_size))
        empf.reset(model)
        paths[name] = folder / name
        runs.save_config(paths[name], model.config, {"seed": 0}, [], (), ())
        runs.save_results(paths[name], model, [{"epoch": 1, "loss": 0.0, "accuracy": [0.0] * config.T}])
    paths["packed"] = folder / "packed.safetensors"
    packed = pack(runs.load(paths["model"]))
    packed.save(paths["packed"])
    for name in (name for name in RUNTIMES if name in names):
        int8 = name == ONNX_RUNTIME and config.spike_bits is not None
        paths[name] = folder / f"net-{'int8' if int8 else 'fp32'}.onnx"
        if not paths[name].is_file():
            empf.export_onnx(packed, paths[name], int8=int8)
    return paths


def load_contender(name: str, path: Path, device: str) -> nn.Module:
    if name == "packed":
        return load_packed(path, device)
    if name in RUNTIMES:
        return (Compiled if name == OPENVINO else Session)(path)
    model = runs.load(path, device)
    return model.to(memory_format=torch.channels_last) if device == "cuda" else model  # its fastest layout


def size(path: Path) -> int:
    return (path if path.is_file() else path / "model.safetensors").stat().st_size


def measure_alone(name: str, path: Path, device: str, threads: int, batches=BATCHES) -> dict:
    """In a fresh process: milliseconds to load, and with the first call; peak memory of each batch size, in MB.

    What is imported first is not part of them.
    """
    torch.set_num_threads(threads)
    if name in RUNTIMES:
        import_module(RUNTIMES[name])
    peak = (lambda: torch.cuda.max_memory_allocated() / 1e6) if device == "cuda" else resident_peak
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: what importing took for a while does not count as a peak
    before = peak()
    start = time.perf_counter()
    net = load_contender(name, path, device)
    result = {"load_ms": 1e3 * (time.perf_counter() - start), "memory_mb": {"loaded": peak() - before}}
    c = net.config
    for n in batches:
        x = torch.randn(n, c.in_channels, c.image_size, c.image_size, device=device)
        for _ in range(2):
            run(net, x)
            result.setdefault("first_call_ms", 1e3 * (time.perf_counter() - start))
        result["memory_mb"][str(n)] = peak() - before
    return result


def resident_peak() -> float:
    """Largest resident memory of this process so far, in MB (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6


def in_fresh_process(*arguments: str) -> dict:
    command = [sys.executable, __file__, "--alone", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_times(nets: dict[str, nn.Module], device: str, n: int, rounds: int) -> dict:
    """Milliseconds per call of each network, taken in turns, and the ratios within each round.

    In its turn each waits until the others are quiet and is called twice; the second call counts, as in a stream.
    """
    c = next(iter(nets.values())).config
    x = torch.randn(n, c.in_channels, c.image_size, c.image_size, device=device)
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(rounds):
        names = list(nets) if turn % 2 else list(nets)[::-1]
        for name in names:
            time.sleep(QUIET)
            run(nets[name], x)
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(nets[name], x)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    ratios = {
        name: spread([other / ours for other, ours in zip(times[name], times["packed"], strict=True)])
        for name in nets
        if name != "packed"
    }
    return {
        "ms": {name: spread(values, 2) for name, values in times.items()},
        "images_per_s": {name: round(1e3 * n / statistics.median(values), 1) for name, values in times.items()},
        "speed_of_packed_over": ratios,
        "rounds": rounds,
    }


def measure(config: ModelConfig, device: str, threads: int, rounds: int, batches=BATCHES, only=()) -> dict:
    torch.set_num_threads(threads)
    names = contenders(device, config.spike_bits)
    if only:
        names = tuple(name for name in names if name in ("packed", "model", *only))
    result = {"machine": machine(device), "native": native.library() is not None, "model": config.to_dict()}
    with tempfile.TemporaryDirectory() as folder:
        paths = prepare(Path(folder), config, names)
        result["file_mb"] = {name: size(paths[name]) / 1e6 for name in names}
        common = (device, str(threads), *map(str, batches))
        alone = {name: in_fresh_process(name, str(paths[name]), *common) for name in names}
        for part in ("load_ms", "first_call_ms"):
            result[part] = {name: round(alone[name][part], 1) for name in names}
        result["memory_mb"] = {name: alone[name]["memory_mb"] for name in names}
        nets = {name: load_contender(name, paths[name], device) for name in names}
    x = torch.randn(4, config.in_channels, config.image_size, config.image_size, device=device)
    wanted, found = run(nets["model"], x), run(nets["packed"], x)
    result["relative_difference"] = difference(found, wanted)
    if config.spike_bits is None and device == "cpu" and result["relative_difference"] > 1e-4:
        raise SystemExit(f"error: the packed logits differ by {result['relative_difference']:.1e}, nothing was timed")
    for name in (name for name in RUNTIMES if name in names):
        result.setdefault("difference_of", {})[name] = difference(run(nets[name], x), found)
    result["batch"] = {str(n): measure_times(nets, device, n, max(3, rounds // (1 + n // 16))) for n in batches}
    return result


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest relative error of the logits of any image and step: (T, N, classes)."""
    return ((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max().item()


def train(config: ModelConfig, batches: Batches) -> nn.Module:
    """One pass: enough to move every parameter and statistic from where it starts."""
    torch.manual_seed(0)
    model = build(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for images, labels in batches:
        optimizer.zero_grad()
        empf.online_backward(model, images, labels, F.cross_entropy, learning="every")
        optimizer.step()
    empf.reset(model)
    return model.eval()


def codes_of(net: nn.Module, kind: type, x: Tensor, handed_on: list[Tensor] | None = None) -> tuple[Tensor, list]:
    """(logits, codes of every neuron layer). `handed_on`: what each layer gives to the next instead of its output."""
    seen: list[Tensor] = []

    def hook(neuron, inputs, spikes):
        seen.append(spikes.codes if isinstance(spikes, Spikes) else (spikes / neuron.spike_step).round().byte())
        if handed_on is not None:
            return Spikes(handed_on[len(seen) - 1], spikes.step, spikes.top)

    handles = [module.register_forward_hook(hook) for module in net.modules() if isinstance(module, kind)]
    logits = run(net, x)
    for handle in handles:
        handle.remove()
    return logits, seen


def compare(model: nn.Module, packed: PackedModel, images: Tensor, exact: int) -> dict:
    """Predictions of all images; of the first `exact` ones also the logits or, of n-bit spikes, the codes.

    A code that flips changes the currents of all layers behind it. So codes are compared twice: as the networks run,
    and with the codes of the model handed to every layer, where a layer shows the flips of its own rounding.
    """
    rounded = model.config.spike_bits is not None
    worst, same, free, alone, steps, count = 0.0, 0, 0, 0, 0, 0
    size = min(250, packed.images_at_once(model.config.T, images.device))  # in one part, for the hooks
    for at in range(0, len(images), size):
        x = images[at : at + size]
        if rounded and at < exact:
            wanted, codes = codes_of(model, StatefulNeuron, x)
            found, own = codes_of(packed, PackedNeuron, x)
            free += sum(int((a != b).sum()) for a, b in zip(codes, own, strict=True))
            for a, b in zip(codes, codes_of(packed, PackedNeuron, x, codes)[1], strict=True):
                gap = (a.int() - b.int()).abs()
                alone, count, steps = alone + int((gap > 0).sum()), count + gap.numel(), max(steps, int(gap.max()))
        else:
            wanted, found = run(model, x), run(packed, x)
        if at < exact:
            worst = max(worst, difference(found, wanted))
        same += (wanted.sum(0).argmax(-1) == found.sum(0).argmax(-1)).sum().item()
    result = {"same_class": same / len(images), "images": len(images)}
    if not rounded:
        return {"relative_difference": worst, **result}
    flips = {"as_they_run": free / count, "given_the_codes_of_the_model": alone / count}
    return {"codes_that_differ": flips, "given_the_codes_of_the_model_by_at_most_steps": steps, **result}


def holds(row: dict) -> bool:
    """Whether a packed network is the model: up to rounding, and where spikes are rounded but for rare flips."""
    if row["spike_bits"] is None:
        return row["relative_difference"] <= 1e-4 and row["same_class"] == 1
    one_step = row["given_the_codes_of_the_model_by_at_most_steps"] <= 1
    return one_step and max(row["codes_that_differ"].values()) <= 1e-3 and row["same_class"] >= 0.999


def equality(folder: str, width: float, threads: int, limit: int | None, path: Path) -> dict:
    """Every kind of network, briefly trained on real images: logits and codes of 1,000 test images, classes of all.

    The result is written after each network; networks that `path` holds already, from the same code and settings, are
    not measured again.
    """
    torch.set_num_threads(threads)
    train_set, test_set = load_data("cifar100", folder)
    short = ImageSet(train_set.images[:640], train_set.labels[:640], train_set.class_names, train_set.spec)
    batches = Batches(short, 64, train=True)
    images = torch.cat([x for x, _ in Batches(test_set, 1000, train=False)])[:limit]
    settings = {"width": width, "trained_images": len(short), "test_images": len(images)}
    result = {"machine": machine(), "settings": settings, "networks": []}
    if path.is_file():
        before = json.loads(path.read_text())
        if before.get("settings") == settings and before["machine"]["commit"] == result["machine"]["commit"]:
            result = before
    neurons = {"vanilla": {}, "mem_bn": {"neuron": "mem_bn"}, "half parallel": {"parallel": 0.5}}
    for (name, neuron), weights, seca, bits in product(neurons.items(), ("binary", "ternary"), (0, 1, 2), (None, 4)):
        row = {"neuron": name, "weights": weights, "seca": seca, "spike_bits": bits}
        if any(row.items() <= done.items() for done in result["networks"]):
            continue
        config = ModelConfig(num_classes=100, width=width, weights=weights, seca=seca, spike_bits=bits, **neuron)
        model = train(config, batches)
        row |= compare(model, pack(model), images, exact=1000)
        result["networks"].append(row)
        write(path, result)
        print(json.dumps(row), flush=True)
    return result


def write(path: Path, result: dict) -> None:
    write_result(path, json.dumps(result, indent=1) + "\n")


def report(result: dict) -> str:
    names = list(result["file_mb"])
    lines = [f"{'':24}" + "".join(f"{name:>20}" for name in names)]

    def row(title: str, values: dict, form: str) -> None:
        lines.append(f"{title:24}" + "".join(f"{values[name]:>20{form}}" for name in names))

    row("file, MB", result["file_mb"], ".3f")
    row("load, ms", result["load_ms"], ".0f")
    row("load and first call, ms", result["first_call_ms"], ".0f")
    for part, title in (("loaded", "loaded"), *((n, f"batch {n}") for n in result["batch"])):
        row(f"memory {title}, MB", {name: result["memory_mb"][name][part] for name in names}, ".0f")
    for n, times in result["batch"].items():
        row(f"batch {n}, ms", {name: times["ms"][name]["median"] for name in names}, ".1f")
        over = times["speed_of_packed_over"]
        told = {"model": "model.eval()", "full precision": "the network with full-precision weights"}
        ratios = (f"{over[name]['median']:.2f}x as fast as {told.get(name, name)}" for name in over)
        lines.append(f"  packed is {', '.join(ratios)}")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description="Measure packed networks.", allow_abbrev=False)
    p.add_argument("--arch", default="resnet18")
    p.add_argument("--width", type=float, help="multiplier of all channel counts (1; with --equality 0.125)")
    p.add_argument("--weights", default="binary", choices=("binary", "ternary"))
    p.add_argument("--neuron", default="empf")
    p.add_argument("--spike-bits", type=int)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=40, help="calls per network at batch 1")
    p.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes (default: 1 64)")
    p.add_argument("--only", nargs="+", choices=contenders("cpu", 4), default=(), help="beside packed and model")
    p.add_argument("--equality", action="store_true", help="compare logits on real images instead")
    p.add_argument("--data", help="local folder of CIFAR-100")
    p.add_argument("--limit", type=int, help="with --equality: use only the first so many test images")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: in bench/results/")
    p.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.alone:
        name, path, device, threads, *batches = args.alone
        print(json.dumps(measure_alone(name, Path(path), device, int(threads), [int(n) for n in batches])))
        return
    if args.equality:
        path = args.json or RESULTS / "deploy-equality.json"
        rows = equality(args.data, args.width or 0.125, args.threads, args.limit, path)["networks"]
        print(f"{len(rows)} networks, written to {path}")
        if wrong := [row for row in rows if not holds(row)]:
            sys.exit(f"error: {len(wrong)} packed networks are not the model: {json.dumps(wrong)}")
        return
    config = ModelConfig(
        arch=args.arch, num_classes=100, width=args.width or 1.0, weights=args.weights, neuron=args.neuron,
        spike_bits=args.spike_bits,
    )  # fmt: skip
    result = measure(config, args.device, args.threads, args.rounds, args.batches, args.only)
    path = args.json or RESULTS / f"deploy-{args.device}.json"
    write(path, result)
    print(f"{report(result)}\nwritten to {path}")


if __name__ == "__main__":
    main()
