"""Calls train.py in this process on a few digits, and compares what runs leave behind."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

import train
from empf import runs
from empf.training import session

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TINY = ["--width", "0.0625", "--T", "2", "--epochs", "2", "--limit", "96", "--batch-size", "32"]  # 3 batches
TINY += ["--warmup-epochs", "0", "--threads", "1"]


@contextmanager
def undisturbed():
    """Give back what train.py sets for its whole process: signal handlers, threads, Accelerate's state."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_train(*flags: str | Path, curves: bool = False) -> None:
    """`train.py TINY flags`; without the drawing of curves.png, which would take most of the time."""
    with undisturbed(), patch.object(session, "has_matplotlib", return_value=curves):
        train.main([*TINY, *map(str, flags)])


def resume(run: Path, *flags: str) -> None:
    """`train.py --resume run flags`."""
    with undisturbed(), patch.object(session, "has_matplotlib", return_value=False):
        train.main(["--resume", str(run), *flags])


@contextmanager
def in_double():
    """Train in float64: the rounding of fp32 flips the sign of a binary weight now and then, and the runs part."""
    build = train.empf.build

    def in_float64(config):
        model = build(config).double()
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        return model

    with patch.object(train.empf, "build", in_float64):
        yield


class Died(BaseException):
    """Stands for `kill -9`: nothing catches it, nothing is cleaned up."""


def die_at(monkeypatch, call: int) -> None:
    """Die when the given file is written, but has not taken its place: after that, only the next file is missing."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == call:
            raise Died(target)
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trace(run: Path) -> tuple:
    """What must not depend on interruptions: weights, the whole state for resuming, metrics apart from the clock."""
    state = runs.load_state(run)
    clock = ("images_per_s", "seconds")
    records = [{key: value for key, value in record.items() if key not in clock} for record in metrics(run)]
    tensors = {}
    for part in ("model", "average"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in (state[part] or {}).items()}
    for index, slot in state["optimizer"]["state"].items():
        tensors |= {f"momentum.{index}.{name}": tensor for name, tensor in slot.items()}
    values = {name: tensor.tolist() for name, tensor in tensors.items()}
    return (run / "model.safetensors").read_bytes(), values, records, state["at"]["epoch"], state["rng"].tolist()


def leftovers(run: Path) -> list[str]:
    """Everything in the run folder that a finished run does not have."""
    expected = {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "curves.png",
        "log.txt",
        "state/state.pt",
        "state/lock",
    }
    found = {os.path.relpath(Path(folder) / name, run) for folder, _, names in os.walk(run) for name in names}
    return sorted(found - expected)
