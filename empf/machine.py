"""The machine and the code that run: what stands beside every number that is measured; threads and memory of a CPU."""

import ctypes
import multiprocessing
import os
import platform
import subprocess
import threading
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

VERSION = "0.1.0"  # of this code, whether it was installed or not; pyproject.toml says the same
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the code that runs, with "-dirty" behind it where files were changed; None outside a checkout."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():  # git would look further up, and find the repository of someone else
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(device: str = "cpu") -> dict:
    """CPU, cores, threads that torch uses, GPU if `device` is one, versions, commit and date."""
    gpu = torch.device(device).type == "cuda"
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name(device), "triton": installed("triton")} if gpu else {}),
        "python": platform.python_version(), "torch": torch.__version__, "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def cpu_threads(threads: int, processes: int = 1) -> int:
    """`threads`, or if that is 0 the share of one of `processes` in the cores this process may use.

    Raises ValueError for more threads than cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > cores:
        raise ValueError(f"{threads} threads are more than the {cores} cores of this process: use --threads 0")
    return threads or max(1, cores // processes)


def check_workers(workers: int) -> None:
    """Raise ValueError for more processes that decode than this machine could run."""
    if not 0 <= workers <= (most := 8 * (os.cpu_count() or 1)):
        raise ValueError(f"workers must lie in 0..{most} on this machine, got {workers}")


def check_memory(needed: int, device: str | torch.device, remedy: str) -> None:
    """Raise ValueError where `needed` bytes are more than are free on a device; `remedy`: what to do."""
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on {device.type}: {remedy}")


def keep_freed_memory() -> None:
    """Let the C library (glibc) use freed memory again instead of handing it back to the system.

    An update of training allocates the same activations as the one before; pages that were handed back are cleared
    and mapped anew each time, which takes about 5 % of it. Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)  # larger blocks are still handed back
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_cpu(threads: int, processes: int = 1) -> None:
    """`torch.set_num_threads` with `cpu_threads`, and `keep_freed_memory`. Raises as they do."""
    torch.set_num_threads(cpu_threads(threads, processes))
    keep_freed_memory()


def end_with_parent() -> None:
    """In a worker process: end with the process that asked for it, however that one ends."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
