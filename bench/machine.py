"""What stands beside every number: the machine, the versions, the commit, the date; and how numbers are summed up."""

import os
import platform
import statistics
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

from empf import runs


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(device: str = "cpu") -> dict:
    """CPU, cores, threads that torch uses, GPU if `device` is one, versions, commit and date."""
    gpu = torch.device(device).type == "cuda"
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name(device), "triton": runs.installed("triton")} if gpu else {}),
        "python": platform.python_version(), "torch": torch.__version__, "commit": runs.git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def spread(values: Iterable[float], digits: int = 4) -> dict:
    """Median and quartiles."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}
