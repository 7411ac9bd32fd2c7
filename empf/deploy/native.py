"""The neuron of a packed network on a CPU, in C++ that is compiled on the machine where it runs.

torch's own operations make several passes over a current, and a call for each step of each; here a layer is one pass,
with the rounding of n-bit spikes: all steps of some neurons while they are in registers. It is the arithmetic of
`neuron_step`, with multiplication and addition fused where the processor does that.

The library is kept in `native` in $EMPF_CACHE or ~/.cache/empf. Where there is no C++ compiler, or with EMPF_NATIVE=0,
torch's operations are used.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from empf.kernels.dispatch import transformed
from empf.kernels.steps import empty_like_steps, is_channels_last, lay_out_like

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
ALONE = 1 << 16  # numbers of a current; up to here a second thread costs more than it saves
POINTERS = ("x", "v_in", "leak", "threshold", "gain", "shift", "v_out", "out")


class Layer(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_long) for name in ("k", "n", "x_step", "period")),
        *((name, ctypes.c_float) for name in ("inverse", "top")),
    )


def cache_folder() -> Path:
    return Path(os.environ.get("EMPF_CACHE") or Path.home() / ".cache" / "empf") / "native"


def processor() -> str:
    """What `-march=native` depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compiled(compiler: str) -> Path:
    """The library, compiled now unless it was before. Raises OSError or SubprocessError where that fails."""
    about = (SOURCE.read_bytes(), compiler, Path(compiler).stat().st_mtime, FLAGS, platform.machine(), processor())
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():  # code that somebody else wrote is not run
        raise PermissionError(f"{folder} belongs to another user")
    path = folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / path.name
            for threads in (["-fopenmp"], []):  # without, everything runs in the thread that calls
                command = [compiler, *FLAGS, *threads, str(SOURCE), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, timeout=60)
                if done.returncode == 0:
                    break
            done.check_returncode()
            made.replace(path)
    return path


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if os.environ.get("EMPF_NATIVE") == "0" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def runs(x: Tensor, per_channel: bool) -> bool:
    """Whether `fire` can be had of the current x (k, N, C, ...): not where torch traces or differentiates."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or transformed() or not x.is_cpu:
        return False
    laid_out = is_channels_last(x)
    channels_in_order = laid_out or not per_channel or x.dim() == 3
    return x.dtype == torch.float32 and laid_out is not None and channels_in_order and library() is not None


def table(parameters: Sequence[Tensor | None], steps: int) -> list[Tensor | None]:
    """leak, threshold, gain, shift of `steps` steps, each (k,) or (k, C), laid out for `fire`: (k, period)."""
    channels = max((p.shape[1] for p in parameters if p is not None and p.dim() == 2), default=1)
    period = math.lcm(channels, library().lanes())
    found = [None if p is None else p.float().view(steps, -1) for p in parameters]
    return [None if p is None else p.repeat(1, period // p.shape[1]).contiguous() for p in found]


def fire(
    x: Tensor, v: Tensor | None, parameters: Sequence[Tensor | None], *, potential: bool,
    bits: int | None = None, step: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """k steps of a relu neuron: (spikes, or where `bits` is given codes as uint8; v after them, if it is wanted).

    parameters: what `table` returned, without leak for neurons without state; x: such that `runs` says yes.
    """
    spikes = empty_like_steps(x, torch.float32 if bits is None else torch.uint8)
    v_out = empty_like_steps(x, torch.float32, one_step=True) if potential else None
    v_in = None if v is None or parameters[0] is None else lay_out_like(v[None].float(), x)
    tensors = (x, v_in, *parameters, v_out, spikes)
    k, n = len(x), x[0].numel()
    sizes = (k, n, x.stride(0), parameters[1].shape[1])
    rounding = (0.0, 0.0) if bits is None else (1 / step, 2**bits - 0.5)
    layer = Layer(*(None if t is None else t.data_ptr() for t in tensors), *sizes, *rounding)
    library().neuron(ctypes.byref(layer), torch.get_num_threads() if k * n > ALONE else 1)
    return spikes, v_out
