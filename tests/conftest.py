"""Runs the kernel tests on the Triton interpreter where there is no GPU, and skips GPU-only tests there, visibly."""

import os
import signal
import threading

# Read when torch loads. Threads that wait actively make everything ten times slower where others use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # counts only if set before the kernels are imported

import pytest
from interpreter import hasten
from tqdm import tqdm

# tqdm's own lock is shared by processes that were forked: one that a test kills would take it along, for all of us
tqdm.set_lock(threading.RLock())

BUILT_ONCE = ("found", "command_line", "learned", "elsewhere", "narrow")  # fixtures that take many seconds


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """`kernel` tests run everywhere and count as `gpu` tests where there is a GPU; `gpu` tests need one.

    With `--dist loadgroup` the tests of one fixture of `BUILT_ONCE` run in one process.
    """
    for item in items:
        for fixture in set(BUILT_ONCE) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(fixture))
        if torch.cuda.is_available():
            if "kernel" in item.keywords:
                item.add_marker(pytest.mark.gpu)
        elif "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def python_handles_signals():
    """As in a new process: a training within this one has left its own handlers behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def release(module) -> tuple[int, int]:
    """Major and minor version."""
    major, minor, *_ = module.__version__.split(".")
    return int(major), int(minor)


@pytest.fixture
def device() -> str:
    """Where kernels are tested: the GPU, or CPU tensors under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels_on():
    """Switch the Triton kernels on (also on CPU tensors, under the interpreter) and hand out the launch counter."""
    from empf.kernels import dispatch

    triton = pytest.importorskip("triton", reason="needs Triton")
    if dispatch.INTERPRETED and release(triton) < (3, 9) and release(numpy) >= (2, 5):
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy before 2.5: pip install 'numpy<2.5'")
    hasten()
    before = dispatch._mode
    dispatch.set_backend("on")
    dispatch.LAUNCHES.clear()
    yield dispatch.LAUNCHES
    dispatch.set_backend(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh buffers hold NaN (or a huge integer), so that what a kernel does not write is seen."""
    empty = torch.empty

    def poison(*size, **options):
        buffer = empty(*size, **options)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)

    monkeypatch.setattr(torch, "empty", poison)
