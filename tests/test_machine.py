"""How a process uses the CPU."""

import os
import platform
import subprocess
import sys

import pytest

from empf.machine import cpu_threads


def test_threads_are_the_cores_shared_by_the_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert [cpu_threads(0), cpu_threads(0, 2), cpu_threads(0, 4), cpu_threads(0, 9), cpu_threads(5, 9)] == [
        6, 3, 1, 1, 5,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="7 threads are more than the 6 cores of this process: use --threads 0"):
        cpu_threads(7)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set by glibc's mallopt")
def test_freed_memory_is_used_again():
    """In a fresh process, as the setting stays: faults of pages while the same block is made again and again."""
    script = """
import resource, sys, torch
from empf.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(16 << 20)  # 64 MiB, larger than what glibc keeps by itself
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[4])  # the median: the heap grows in some of the first turns
"""
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    )
    assert plain >= 32  # even with pages of 2 MiB
    assert kept < plain / 10
