"""What stands beside every number that is measured: the machine, the versions, the commit and the date."""

import os
import platform
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
