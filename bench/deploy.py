"""What packing a network gains, and that it changes nothing.

    python bench/deploy.py                            size, load time, memory, latency and throughput, on the CPU
    python bench/deploy.py --device cuda              the same on a GPU, with bf16 activations
    python bench/deploy.py --equality --data FOLDER   logits of small trained networks on real CIFAR-100 images

The packed network is compared with `model.eval()` and with the same network with full-precision weights. Memory is that
of a fresh process for each; times are taken in turns in one process, so that their ratios hold on a busy machine too.
Writes bench/results/deploy-cpu.json, deploy-cuda.json, deploy-equality.json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import empf
from empf import data, runs
from empf.deploy import PackedModel, load_packed, pack
from empf.models import ModelConfig, build
from empf.neuron import StatefulNeuron
from empf.packed_layers import PackedNeuron

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 64)
CONTENDERS = ("packed", "model", "full precision")


def machine(device: str, threads: int) -> dict:
    """What stands beside every number."""
    cpu = next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = {"gpu": torch.cuda.get_device_name(), "triton": runs.installed("triton")} if device == "cuda" else {}
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": threads, **gpu, "python": platform.python_version(),
        "torch": torch.__version__, "commit": runs.git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def reset(net: nn.Module) -> None:
    empf.reset(net)
    if isinstance(net, PackedModel):
        net.reset()


@torch.inference_mode()
def run(net: nn.Module, x: Tensor) -> Tensor:
    reset(net)
    # on a GPU everybody computes with bf16 activations: the packed network has the type of its input
    half = x.is_cuda and not isinstance(net, PackedModel)
    with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
        logits = net(x.bfloat16() if x.is_cuda else x)
    reset(net)
    return logits.float()


def prepare(folder: Path, config: ModelConfig) -> dict[str, Path]:
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
        runs.save_results(paths[name], model, [{"epoch": 1, "loss": 0.0, "accuracy": [0.0] * config.T}], name)
    paths["packed"] = folder / "packed.safetensors"
    pack(runs.load(paths["model"])).save(paths["packed"])
    return paths


def load(name: str, path: Path, device: str) -> nn.Module:
    if name == "packed":
        return load_packed(path, device)
    model = runs.load(path, device)
    return model.to(memory_format=torch.channels_last) if device == "cuda" else model  # its fastest layout


def size(path: Path) -> int:
    return (path if path.is_file() else path / "model.safetensors").stat().st_size


def measure_alone(name: str, path: Path, device: str, threads: int) -> dict:
    """In a fresh process: seconds to load, and peak memory of loading and running each batch size, in MB."""
    torch.set_num_threads(threads)
    peak = (lambda: torch.cuda.max_memory_allocated() / 1e6) if device == "cuda" else resident_peak
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: what importing took for a while does not count as a peak
    before = peak()
    start = time.perf_counter()
    net = load(name, path, device)
    result = {"load_ms": 1e3 * (time.perf_counter() - start), "memory_mb": {"loaded": peak() - before}}
    c = net.config
    for n in BATCHES:
        x = torch.randn(n, c.in_channels, c.image_size, c.image_size, device=device)
        for _ in range(2):
            run(net, x)
        result["memory_mb"][str(n)] = peak() - before
    return result


def resident_peak() -> float:
    """Largest resident memory of this process so far, in MB (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6


def in_fresh_process(*arguments: str) -> dict:
    command = [sys.executable, __file__, "--alone", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def spread(values: list[float], digits: int = 4) -> dict:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}


def measure_times(nets: dict[str, nn.Module], device: str, n: int, rounds: int) -> dict:
    """Milliseconds per call of each network, taken in turns, and the ratios within each round."""
    c = next(iter(nets.values())).config
    x = torch.randn(n, c.in_channels, c.image_size, c.image_size, device=device)
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(rounds + 2):  # two to warm up
        names = list(nets) if turn % 2 else list(nets)[::-1]
        for name in names:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(nets[name], x)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    times = {name: values[2:] for name, values in times.items()}
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


def measure(config: ModelConfig, device: str, threads: int, rounds: int) -> dict:
    result = {"machine": machine(device, threads), "model": config.to_dict()}
    with tempfile.TemporaryDirectory() as folder:
        paths = prepare(Path(folder), config)
        result["file_mb"] = {name: size(paths[name]) / 1e6 for name in CONTENDERS}
        alone = {name: in_fresh_process(name, str(paths[name]), device, str(threads)) for name in CONTENDERS}
        result["load_ms"] = {name: round(alone[name]["load_ms"], 1) for name in CONTENDERS}
        result["memory_mb"] = {name: alone[name]["memory_mb"] for name in CONTENDERS}
        nets = {name: load(name, paths[name], device) for name in CONTENDERS}
    torch.set_num_threads(threads)
    x = torch.randn(4, config.in_channels, config.image_size, config.image_size, device=device)
    wanted, found = run(nets["model"], x), run(nets["packed"], x)
    result["relative_difference"] = difference(found, wanted)
    if config.spike_bits is None and device == "cpu" and result["relative_difference"] > 1e-4:
        raise SystemExit(f"error: the packed logits differ by {result['relative_difference']:.1e}, nothing was timed")
    result["batch"] = {str(n): measure_times(nets, device, n, max(3, rounds // (1 + n // 16))) for n in BATCHES}
    return result


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest relative error of the logits of any image and step: (T, N, classes)."""
    return ((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max().item()


def train(config: ModelConfig, batches: data.Batches) -> nn.Module:
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


def compare(model: nn.Module, packed: PackedModel, images: Tensor, exact: int) -> dict:
    """Logits of the first `exact` images, predictions of all, and the codes of n-bit spikes."""
    codes: dict[str, list[Tensor]] = {"model": [], "packed": []}

    def watch(net: nn.Module, kind: type, where: str) -> list:
        hook = lambda module, inputs, spikes: codes[where].append(spikes)  # noqa: E731
        return [module.register_forward_hook(hook) for module in net.modules() if isinstance(module, kind)]

    handles = watch(model, StatefulNeuron, "model") + watch(packed, PackedNeuron, "packed")
    worst, same, off, spikes, first, steps = 0.0, 0, 0, 0, 0, 0
    for at in range(0, len(images), 250):
        wanted, found = run(model, images[at : at + 250]), run(packed, images[at : at + 250])
        if at < exact:
            worst = max(worst, difference(found, wanted))
        same += (wanted.sum(0).argmax(-1) == found.sum(0).argmax(-1)).sum().item()
        if model.config.spike_bits is not None:
            equal = torch.ones(wanted.shape[1], dtype=torch.bool)  # images without a difference so far
            for a, b in zip(codes["model"], codes["packed"], strict=True):
                gap = ((a / 0.25).round() - b).abs()
                of_image = gap.transpose(0, 1).flatten(1).amax(1)
                off, spikes = off + int((gap > 0).sum()), spikes + gap.numel()
                first, steps = max(first, int((of_image * equal).max())), max(steps, int(of_image.max()))
                equal &= of_image == 0
        codes["model"].clear(), codes["packed"].clear()
    for handle in handles:
        handle.remove()
    result = {"same_class": same / len(images), "images": len(images)}
    if model.config.spike_bits is None:
        return {"relative_difference": worst, **result}
    # a code that flips changes the currents behind it, so the layers that follow may be further off than one step
    flips = {"codes_that_differ": off / spikes, "at_first_by_at_most_steps": first, "later_by_at_most_steps": steps}
    return flips | result


def equality(folder: str, width: float, threads: int, limit: int | None) -> dict:
    """Every kind of network, trained on 1,280 real images: 1,000 test images, and all of them without SECA."""
    torch.set_num_threads(threads)
    train_set, test_set = data.load("cifar100", folder)
    short = data.ImageSet(train_set.images[:1280], train_set.labels[:1280], train_set.class_names, train_set.spec)
    batches = data.Batches(short, 64, train=True)
    images = torch.cat([x for x, _ in data.Batches(test_set, 1000, train=False)])[:limit]
    neurons = {"vanilla": {}, "mem_bn": {"neuron": "mem_bn"}, "half parallel": {"parallel": 0.5}}
    rows = []
    for (name, neuron), weights, seca, bits in product(neurons.items(), ("binary", "ternary"), (0, 1, 2), (None, 4)):
        config = ModelConfig(num_classes=100, width=width, weights=weights, seca=seca, spike_bits=bits, **neuron)
        model = train(config, batches)
        row = {"neuron": name, "weights": weights, "seca": seca, "spike_bits": bits}
        rows.append(row | compare(model, pack(model), images[:1000] if seca else images, exact=1000))
        print(json.dumps(rows[-1]), flush=True)
    return {"machine": machine("cpu", threads), "width": width, "trained_images": len(short), "networks": rows}


def report(result: dict) -> str:
    lines = [f"{'':24}" + "".join(f"{name:>16}" for name in CONTENDERS)]

    def row(title: str, values: dict, form: str) -> None:
        lines.append(f"{title:24}" + "".join(f"{values[name]:>16{form}}" for name in CONTENDERS))

    row("file, MB", result["file_mb"], ".3f")
    row("load, ms", result["load_ms"], ".0f")
    for part, title in (("loaded", "loaded"), *((str(n), f"batch {n}") for n in BATCHES)):
        row(f"memory {title}, MB", {name: result["memory_mb"][name][part] for name in CONTENDERS}, ".0f")
    for n, times in result["batch"].items():
        row(f"batch {n}, ms", {name: times["ms"][name]["median"] for name in CONTENDERS}, ".1f")
        over = times["speed_of_packed_over"]
        lines.append(
            f"  packed is {over['model']['median']:.2f}x as fast as model.eval(), "
            f"{over['full precision']['median']:.2f}x as with full-precision weights"
        )
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description="Measure packed networks.", allow_abbrev=False)
    p.add_argument("--arch", default="resnet18")
    p.add_argument("--width", type=float, help="multiplier of all channel counts (1; with --equality 0.0625)")
    p.add_argument("--weights", default="binary", choices=("binary", "ternary"))
    p.add_argument("--neuron", default="empf")
    p.add_argument("--spike-bits", type=int)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=40, help="calls per network at batch 1")
    p.add_argument("--equality", action="store_true", help="compare logits on real images instead")
    p.add_argument("--data", help="local folder of CIFAR-100")
    p.add_argument("--limit", type=int, help="with --equality: use only the first so many test images")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: in bench/results/")
    p.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.alone:
        name, path, device, threads = args.alone
        print(json.dumps(measure_alone(name, Path(path), device, int(threads))))
        return
    if args.equality:
        result, name = equality(args.data, args.width or 0.0625, args.threads, args.limit), "equality"
    else:
        config = ModelConfig(
            arch=args.arch, num_classes=100, width=args.width or 1.0, weights=args.weights, neuron=args.neuron,
            spike_bits=args.spike_bits,
        )  # fmt: skip
        result, name = measure(config, args.device, args.threads, args.rounds), args.device
        print(report(result))
    path = args.json or RESULTS / f"deploy-{name}.json"
    runs.write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written to {path}")


if __name__ == "__main__":
    main()
