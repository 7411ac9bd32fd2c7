"""How a process of this library uses a CPU: its threads, and the memory that it has freed."""

import ctypes
import os
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def cpu_threads(threads: int, processes: int = 1) -> int:
    """`threads`, or if that is 0 the share of one of `processes` in the cores this process may use.

    Raises ValueError for more threads than cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > cores:
        raise ValueError(f"{threads} threads are more than the {cores} cores of this process: use --threads 0")
    return threads or max(1, cores // processes)


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
