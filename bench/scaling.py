"""How training scales to many GPUs, on paper: bytes exchanged per update, operations per update, efficiency.

    python bench/scaling.py             ResNet-18 and ResNet-34 on 1 to 1,024 GPUs; bench/results/scaling.json
    python bench/scaling.py --flops 2e14 --network 25 --sync-bn
    python bench/scaling.py --check     one and two CPU processes: counted bytes, measured efficiency
    python bench/scaling.py --cores     one CPU process of two threads against two of one: images/s by width and type

Counted, on torch's meta device: operations of convolutions and matrix products of an update with one random step (mean
over t*), and after which of them each gradient is complete. Exchanged by data-parallel training: the gradient of every
parameter (latent weights are fp32, also those of 1-bit synapses), 4 numbers every 20 updates, and with --sync-bn two
numbers per channel for every batch norm and time step, and two more for the step with gradient.

Assumed: every GPU computes at --flops FLOP/s; all-reduce within a node is a ring over links of --node GB/s; between
nodes a ring, or a tree where that is faster, of the share of each GPU over its own link of --network GB/s; --latency
per hop; gradients leave in the buckets of DDP (1 MB, then 25 MB) as soon as they are complete, beside the computation
(`overlap`) or only after it. No noise, no congestion, data always ready.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: waiting threads leave a busy machine alone

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
import empf
from bench.cluster import READ_EVERY, SCALARS, Links, buckets, count, predict, slowest_network
from bench.machine import machine, spread
from empf.files import write_result
from empf.models import ModelConfig, build
from empf.training.config import Parser, TrainConfig
from empf.training.optimizers import make_optimizer
from empf.training.processes import settle

NETWORKS = {  # name -> configuration, images per GPU
    "resnet18": (ModelConfig(arch="resnet18", num_classes=100, image_size=32), 64),
    "resnet34": (ModelConfig(arch="resnet34", num_classes=1000, image_size=224), 64),
}
GPUS = [2**n for n in range(11)]


def study(links: Links, sync_bn: bool) -> dict:
    """Counted work and predicted efficiency of each network on each number of GPUs."""
    result = {"assumed": asdict(links), "sync_bn": sync_bn, "machine": machine(), "networks": {}}
    for name, (config, batch_size) in NETWORKS.items():
        work = count(config, batch_size)
        options = {
            "after the backward pass": {"overlap": False},
            "overlap": {},
            "overlap, bf16": {"compress": 0.5},
            "overlap, PowerSGD": {"compress": work.powersgd_bytes / work.bytes},
        }
        result["networks"][name] = {
            "image_size": config.image_size, "T": config.T, "batch_size": batch_size,
            "gflop_forward": work.forward / 1e9, "gflop_backward": work.backward / 1e9,
            "bytes": {
                "gradients": work.bytes, "buckets": [size for size, _ in buckets(work.gradients)],
                "gradients_bf16": work.bytes // 2, "gradients_powersgd": work.powersgd_bytes,
                "batch_norms": work.norm_bytes if sync_bn else 0, "scalars_per_update": SCALARS / READ_EVERY,
            },
            "flop_per_byte": (work.forward + work.backward) / work.bytes,
            "dominates_below_gb_per_s": slowest_network(work, GPUS[-1], links),
            "gpus": {
                p: {label: predict(work, p, links, sync_bn=sync_bn, **kw) for label, kw in options.items()}
                for p in GPUS
            },
        }  # fmt: skip
    return result


def conclusion(name: str, network: dict) -> str:
    """What the numbers say about the gradient traffic of the largest cluster."""
    p, options = max(network["gpus"].items(), key=lambda item: int(item[0]))
    late, full = options["after the backward pass"], options["overlap"]
    best = max(options, key=lambda label: options[label]["efficiency"])
    dominates = "dominates" if full["exchanging"] > full["computing"] else "does not dominate"
    return (
        f"{name} on {p} GPUs: exchanging gradients takes {1e3 * full['exchanging']:.2f} ms and computing "
        f"{1e3 * full['computing']:.2f} ms: gradient traffic {dominates}; it would below "
        f"{network['dominates_below_gb_per_s']:.1f} GB/s between nodes. Efficiency {100 * late['efficiency']:.0f} % "
        f"without overlap, {100 * full['efficiency']:.0f} % with it, best {100 * options[best]['efficiency']:.0f} % "
        f"({best})"
    )


def report(r: dict) -> str:
    """The study for people."""
    a = r["assumed"]
    lines = [
        f"assumed: {a['flops']:.3g} FLOP/s per GPU, {a['node']:g} GB/s within nodes of {a['per_node']}, "
        f"{a['network']:g} GB/s per GPU between them, {1e6 * a['latency']:g} us per hop"
        + (", batch norms synchronised" if r["sync_bn"] else ""),
    ]
    for name, n in r["networks"].items():
        b = n["bytes"]
        lines += [
            "",
            f"{name}, {n['image_size']}x{n['image_size']}, T = {n['T']}, {n['batch_size']} images per GPU: "
            f"{n['gflop_forward']:.1f} GFLOP forward (past steps included), {n['gflop_backward']:.1f} backward",
            f"gradients {b['gradients'] / 1e6:.2f} MB in {len(b['buckets'])} buckets (bf16 "
            f"{b['gradients_bf16'] / 1e6:.2f}, PowerSGD {b['gradients_powersgd'] / 1e6:.2f}), batch norms "
            f"{b['batch_norms'] / 1e6:.2f} MB, scalars {b['scalars_per_update']:g} bytes; "
            f"{n['flop_per_byte']:.0f} FLOP per byte of gradients",
            "",
        ]
        labels = list(next(iter(n["gpus"].values())))
        lines += ["| GPUs | computing ms | exchanging ms | " + " | ".join(f"{label} %" for label in labels) + " |"]
        lines += ["|---" * (3 + len(labels)) + "|"]
        for p, options in n["gpus"].items():
            plain = options["overlap"]
            cells = [f"{1e3 * plain['computing']:.2f}", f"{1e3 * plain['exchanging']:.2f}"]
            cells += [f"{100 * o['efficiency']:.1f}" for o in options.values()]
            lines.append(f"| {p} | " + " | ".join(cells) + " |")
        lines += ["", conclusion(name, n)]
    return "\n".join(lines)


# ---- against reality, with two processes


def counting_hook(state: tuple[Counter, dist.ProcessGroup], bucket):
    """A communication hook of DDP: counts what it sends."""
    sent, group = state
    sent.update(bytes=bucket.buffer().nbytes, buckets=1)
    return allreduce_hook(group, bucket)


def seconds_of(call, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def data_parallel(config: ModelConfig, group: dist.ProcessGroup, sent: Counter):
    """A new network on the processes of a group, which counts what it sends, and its optimizer."""
    torch.manual_seed(0)
    model = build(config).to(memory_format=torch.channels_last).train()
    parallel = DistributedDataParallel(
        model, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
    )  # fmt: skip
    parallel.register_comm_hook((sent, group), counting_hook)
    return parallel, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def worker(width: float, batch_size: int, rounds: int) -> None:
    """One of two processes: counts and times updates; rank 0 prints the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, p = dist.get_rank(), dist.get_world_size()
    config, sent = ModelConfig(width=width, T=2, image_size=32), Counter()
    single = dist.new_group([0])  # both processes have to ask for it
    both = parallel, _ = data_parallel(config, dist.group.WORLD, sent)
    one = data_parallel(config, single, Counter()) if rank == 0 else None
    x = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch_size) % 10

    def updates(model, optimizer):
        for t in range(1, config.T + 1):
            empf.online_backward(model, x, target, F.cross_entropy, steps=[t])
            optimizer.step()
            optimizer.zero_grad()

    def timed(trained) -> float:
        start = time.perf_counter()
        updates(*trained)
        return (time.perf_counter() - start) / config.T

    updates(*both)  # warm-up; DDP forms its buckets anew after the first update
    if one:
        updates(*one)
    sent.clear()
    updates(*both)
    found = {name: number / config.T for name, number in sent.items()}
    times = {"alone": [], "training alone": [], "beside": [], "exchanging": []}
    for _ in range(rounds):
        for name, seconds in times.items():
            dist.barrier()
            if name == "exchanging":
                seconds.append(timed(both))
            elif name == "training alone" and one:
                seconds.append(timed(one))
            elif name == "beside" or name == "alone" and one:
                with parallel.no_sync():
                    seconds.append(timed(both))
    size = sum(q.numel() * q.element_size() for q in parallel.parameters())
    large, small = torch.zeros(size // 4), torch.zeros(SCALARS // 4)
    hop = seconds_of(lambda: dist.all_reduce(small), 21) / (2 * (p - 1))
    rate = 2 * (p - 1) / p * size / max(seconds_of(lambda: dist.all_reduce(large), 11) - 2 * (p - 1) * hop, 1e-9)
    if rank == 0:
        print(json.dumps({"counted": found, "seconds": times, "hop": hop, "gb_per_s": rate / 1e9, "processes": p}))
    settle()
    dist.destroy_process_group()


def cores_worker(width: float, kind: str, batch_size: int, rounds: int) -> None:
    """One of two processes: both train on halves of batches, then the first alone with two threads on whole ones."""
    dist.init_process_group("gloo")
    rank, p = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = ModelConfig(num_classes=100, width=width, T=2, image_size=32)
    settings = TrainConfig(optimizer="muon", mixed_precision="no" if kind == "fp32" else "bf16")
    images = {"processes": batch_size // p, "threads": batch_size}

    def contender(name: str):
        net = build(config).to(memory_format=torch.channels_last).train()
        optimizer = make_optimizer(net, settings)
        if name == "processes":
            net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
        x = torch.randn(images[name], 3, 32, 32).contiguous(memory_format=torch.channels_last)
        target = torch.arange(images[name]) % config.num_classes
        torch.set_num_threads(1 if name == "processes" else p)
        rounded = torch.autocast("cpu", torch.bfloat16) if kind == "bf16" else nullcontext()

        def update(t: int) -> None:
            with rounded:
                empf.online_backward(net, x, target, F.cross_entropy, steps=[t])
            optimizer.step()
            optimizer.zero_grad()

        return update

    trained = {name: contender(name) for name in images if name == "processes" or rank == 0}
    times: dict[str, list[float]] = {name: [] for name in images}
    for turn in range(rounds + 1):  # one to warm up
        for name in list(images)[:: 1 if turn % 2 else -1]:
            torch.set_num_threads(1 if name == "processes" else p)
            dist.barrier()
            start = time.perf_counter()
            for t in range(1, config.T + 1) if name in trained else ():
                trained[name](t)
            times[name].append((time.perf_counter() - start) / config.T)
            dist.barrier()
    if rank == 0:
        print(json.dumps({name: seconds[1:] for name, seconds in times.items()}))
    settle()
    dist.destroy_process_group()


def cores(width: float, kind: str, batch_size: int, rounds: int) -> dict:
    """images/s of training with joined batches of `batch_size`, in the environment that train.py has."""
    options = ["--cores", "--widths", str(width), "--types", kind, "--images", str(batch_size)]
    seconds = launch(options, rounds, GOMP_SPINCOUNT="1000")
    return {
        "width": width, "type": kind, "batch_size": batch_size, "rounds": rounds,
        "images_per_s": {name: spread((batch_size / s for s in part), 2) for name, part in seconds.items()},
        "processes_over_threads": spread(
            a / b for a, b in zip(seconds["threads"], seconds["processes"], strict=True)
        ),
    }  # fmt: skip


def launch(options: list[str], rounds: int, **env: str) -> dict:
    """What the first of two processes of this file prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    command += ["--worker", *options, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    if done.returncode:
        said = re.split(r"^[WE]\d{4} ", done.stderr, maxsplit=1, flags=re.MULTILINE)[0]  # before the launcher's report
        raise ValueError(f"the two processes failed: {said.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(width: float, batch_size: int, rounds: int) -> dict:
    """Counted against predicted bytes, measured against predicted efficiency: one and two CPU processes of one thread.

    alone: one process works without exchange, the other waits; training alone: it trains as data-parallel training with
    one process does; beside: both work, without exchange; exchanging: both train together.
    """
    found = launch(["--width", str(width), "--images", str(batch_size)], rounds)
    work = count(ModelConfig(width=width, T=2, image_size=32), batch_size)
    seconds = found["seconds"]
    beside = statistics.median(seconds["beside"])

    def ratio(part: str, whole: str) -> dict:
        return spread(a / b for a, b in zip(seconds[part], seconds[whole], strict=True))

    links = Links(
        flops=(work.forward + work.backward) / beside, node=found["gb_per_s"], per_node=2, latency=found["hop"]
    )  # fmt: skip
    result = {
        "machine": machine(), "processes": found["processes"], "width": width, "batch_size": batch_size,
        "bytes": {"predicted": work.bytes, "counted": found["counted"]["bytes"]},
        "buckets": {"predicted": len(buckets(work.gradients)), "counted": found["counted"]["buckets"]},
        "gloo": {"gb_per_s": found["gb_per_s"], "seconds_per_hop": found["hop"]},
        "ms_per_update": {name: spread(1e3 * s for s in times) for name, times in seconds.items()},
        "images_per_s": {
            "1": batch_size / statistics.median(seconds["training alone"]),
            "2": 2 * batch_size / statistics.median(seconds["exchanging"]),
        },
        "efficiency": {  # gloo needs the very cores that compute, so nothing overlaps
            "1": {
                "predicted": predict(work, 1, links, overlap=False)["efficiency"],
                "measured": ratio("alone", "training alone"),
            },
            "2": {
                "predicted": predict(work, 2, links, overlap=False)["efficiency"],
                "measured": ratio("beside", "exchanging"),
                "measured_against_one_process": ratio("alone", "exchanging"),
            },
        },
    }  # fmt: skip
    if result["bytes"]["predicted"] != result["bytes"]["counted"]:
        raise ValueError("predicted {predicted} bytes per update, counted {counted}".format(**result["bytes"]))
    return result


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--flops", type=float, default=Links.flops, help="FLOP/s that a GPU reaches (default: %(default)g)")
    p.add_argument("--node", type=float, default=Links.node, help="GB/s of a GPU within a node (default: %(default)g)")
    p.add_argument("--network", type=float, default=Links.network, help="and between nodes (default: %(default)g)")
    p.add_argument("--per-node", type=int, default=Links.per_node, help="GPUs in a node (default: %(default)s)")
    p.add_argument("--latency", type=float, default=Links.latency, help="seconds per hop (default: %(default)g)")
    p.add_argument("--sync-bn", action="store_true", help="with synchronised batch norms")
    p.add_argument("--check", action="store_true", help="compare with one and two CPU processes")
    p.add_argument("--cores", action="store_true", help="one CPU process of two threads against two processes")
    p.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of --cores (0.25 0.5 1)")
    p.add_argument("--types", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of --cores (both)")
    p.add_argument("--rounds", type=int, default=7, help="of --check and --cores (default: %(default)s)")
    p.add_argument("--width", type=float, default=0.5, help="of the network of --check (default: %(default)s)")
    p.add_argument("--images", type=int, help="per process in --check (16), in the joined batch of --cores (64)")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: scaling*.json in bench/results/")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.worker:
        if args.cores:
            cores_worker(args.widths[0], args.types[0], args.images, args.rounds)
        else:
            worker(args.width, args.images, args.rounds)
        return
    results = Path(__file__).parent / "results"
    try:
        if args.check:
            result, out = check(args.width, args.images or 16, args.rounds), results / "scaling-check.json"
            print(json.dumps(result, indent=1))
        elif args.cores:
            result, out = {"machine": machine(), "cells": []}, results / "scaling-cores.json"
            for width, kind in product(args.widths, args.types):
                result["cells"].append(cores(width, kind, args.images or 64, args.rounds))
                print(json.dumps(result["cells"][-1]), flush=True)
                write_result(args.json or out, json.dumps(result, indent=1) + "\n")
        else:
            links = Links(args.flops, args.node, args.network, args.per_node, args.latency)
            result, out = study(links, args.sync_bn), results / "scaling.json"
            print(report(result))
        write_result(args.json or out, json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
