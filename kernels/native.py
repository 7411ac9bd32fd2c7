"""The neuron on a CPU, in C++ that is compiled on the machine where it runs, together with lookup.cpp.

torch's own operations make several passes over a current, and a call for each step of each; here a layer is one pass:
batch norm that is a gain and a shift, the sum of currents, all steps of some neurons while they are in registers, the
rounding of n-bit spikes. It is the arithmetic of `neuron_step`, with multiplication and addition fused where the
processor does that; activations in bf16 are computed with in fp32.

The library is kept in `native` in $EMPF_CACHE or ~/.cache/empf. Where there is no C++ compiler, or with EMPF_NATIVE=0,
torch's operations are used.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .dispatch import transformed
from .steps import empty_like_steps, is_channels_last, lay_out_like

HEADER = Path(__file__).with_suffix(".h")
SOURCES = [Path(__file__).with_name(f"{name}.cpp") for name in ("native", "lookup")]
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
ALONE = 1 << 16  # numbers of a current; up to here a second thread costs more than it saves
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # uint8: the codes of n-bit spikes
MORE = 4  # terms of a current besides the first


# The structures of native.cpp: ctypes would take several times as long to fill them
LAYER = struct.Struct(f"{(1 + MORE) * '3Pl'} 8P 3l 3f 5i")
GRADIENT = struct.Struct("4P 2l fi")
NO_TERM = (0, 0, 0, 0)
POINTERS = [word for word, kind in enumerate("PPPl" * (1 + MORE) + 8 * "P") if kind == "P"]  # of a LAYER
watch = threading.local()  # watch.tell, where it is set, hears what `call` is given in its thread


def cache_folder() -> Path:
    return Path(os.environ.get("EMPF_CACHE") or Path.home() / ".cache" / "empf") / "native"


def processor() -> str:
    """What `-march=native` depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compiled(compiler: str) -> Path:
    """The library, compiled now unless it was before. Raises OSError or SubprocessError where that fails."""
    texts = [path.read_bytes() for path in (HEADER, *SOURCES)]
    about = (texts, compiler, Path(compiler).stat().st_mtime, FLAGS, platform.machine(), processor())
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():  # code that somebody else wrote is not run
        raise PermissionError(f"{folder} belongs to another user")
    path = folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / path.name
            for threads in (["-fopenmp"], []):  # without, everything runs in the thread that calls
                command = [compiler, *FLAGS, *threads, *map(str, SOURCES), "-o", str(made)]
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
        found = ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for function in (found.lookup, found.lookup_neuron, found.neuron_backward):
        function.errcheck = memory_error
    return found


def memory_error(failed: int, *_) -> None:
    if failed:
        raise MemoryError("no memory is left for a layer: give it fewer or smaller images at a time")


def ready() -> bool:
    """Whether there is anything of `fire`: not where torch traces or differentiates."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or transformed()) and library() is not None


def runs(x: Tensor, per_channel: bool) -> bool:
    """Whether `fire` can be had of the current x (k, N, C, ...)."""
    if not x.is_cpu or not ready():
        return False
    laid_out = is_channels_last(x)
    channels_in_order = laid_out or not per_channel or x.shape[3:].numel() == 1
    number = x.dtype in (torch.float32, torch.bfloat16)
    return number and laid_out is not None and channels_in_order


def table(parameters: Sequence[Tensor | None], steps: int, channels: int = 1) -> list[Tensor | None]:
    """Parameters of `steps` steps, each (k,) or (k, C), laid out for `fire`: (k, period). `channels`: C, if it matters
    beyond them."""
    channels = max((p.shape[1] for p in parameters if p is not None and p.dim() == 2), default=channels)
    period = math.lcm(channels, library().lanes())
    found = [None if p is None else p.float().view(steps, -1) for p in parameters]
    return [None if p is None else p.repeat(1, period // p.shape[1]).contiguous() for p in found]


def at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def empty_like_current(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`empty_like_steps` of a current that `runs` says yes to."""
    dense = x.stride(0) == x.numel() // x.shape[0]
    return torch.empty_like(x, dtype=dtype) if dense else empty_like_steps(x, dtype)


def call(function: Callable, layers: Sequence[tuple[bytes, Sequence[int]]], threads: int, kept: object) -> None:
    """Call a function of the library with structures, each with the places of its pointers; kept: what these show."""
    function(*(layer for layer, _ in layers), threads)
    if hasattr(watch, "tell"):
        watch.tell(function, layers, threads, kept)


def threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers > ALONE else 1


def fire(
    x: Tensor | tuple, v: Tensor | None, parameters: Sequence[Tensor | None], *, potential: bool,
    current: Sequence[Tensor | None] = (None, None), more: Sequence[tuple[Tensor, Tensor | None, Tensor | None]] = (),
    bits: int | None = None, step: float = 1.0, codes: bool = False, out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """k steps of a relu neuron: (spikes of the type of x, or `codes` as uint8; v after them, if it is wanted).

    parameters: leak, threshold, gain and shift of the potential, as `table` returned them, without leak for neurons
    without state; without threshold the current itself is put out. current: gain and shift of x; more: what is added to
    it, (y, gain, shift), all fp32 or bf16, of the shape and layout of x. out: (k, N, C, ...) laid out as x; it may be
    one of `more`. total: as `out`, where the current goes besides. x: such that `runs` says yes; or a `Lookup`,
    whose values the neurons take as they are computed, with `out`.
    """
    if out is None:
        out = empty_like_current(x, torch.uint8 if codes else x.dtype)
    product, x, kind = (None, x, x.dtype) if isinstance(x, Tensor) else (x, out, torch.float32)
    k, n = x.shape[0], x.numel() // x.shape[0]
    v_out = empty_like_steps(x, torch.float32, one_step=True) if potential else None
    v_in = None if v is None or parameters[0] is None else lay_out_like(v[None].float(), x)
    period = next(p.shape[1] for p in (*parameters, *current) if p is not None)
    rounding = (0.0, 0.0, 0.0) if bits is None else (1 / step, 2**bits - 0.5, step)
    terms = [number for y, *norm in more for number in (at(y), *map(at, norm), y.stride(0))]
    layer = LAYER.pack(
        at(x), *map(at, current), x.stride(0), *terms, *NO_TERM * (MORE - len(more)),
        at(v_in), *map(at, parameters), at(v_out), at(out), at(total), k, n, period, *rounding,
        len(more), TYPES[kind], TYPES[more[0][0].dtype] if more else 0, TYPES[out.dtype],
        0 if total is None else TYPES[total.dtype],
    )  # fmt: skip
    kept = parameters, current, [norm for _, *norm in more]
    if product is None:
        call(library().neuron, [(layer, POINTERS)], threads(k * n), kept)
    else:
        call(library().lookup_neuron, [product.layer(None), (layer, POINTERS)], product.threads, (product, kept))
    return out, v_out


def fire_backward(d: Tensor, s: Tensor, v: Tensor | None, channels: int, top: float | None) -> Tensor:
    """The gradient d of the spikes s, one step (N, C, ...), is written over s where that is above 0, and 0 elsewhere;
    with `top` also 0 where s is above that.

    Returns the sums of it, and of it times v (0 without), float64 (2, channels); with `channels` 1 over all. d and
    s are of one type and layout, v is fp32 of that layout.
    """
    period = math.lcm(channels, library().lanes())
    sums = torch.zeros(2, period, dtype=torch.float64)
    top = math.inf if top is None else top
    layer = GRADIENT.pack(at(d), at(s), at(v), at(sums), s.numel(), period, top, TYPES[s.dtype])
    library().neuron_backward(layer, threads(s.numel()))
    return sums.view(2, -1, channels).sum(1)
