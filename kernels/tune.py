"""Optional tuner: times the few shipped configurations of a product on the GPU at hand and remembers the fastest.

    EMPF_TUNE=0 (default)    a stated heuristic chooses, the same on every machine
    EMPF_TUNE=1              the first call with new sizes times the candidates (about 0.2 s, beside the seconds that
                             they take to compile where they are not in Triton's cache); remembered in the process
    EMPF_TUNE=save           and in a file, ~/.cache/empf-kernels/<device>-triton-<version>.json (or $XDG_CACHE_HOME)

`set_tuning("0" | "1" | "save")` does the same from Python. Sizes that grow with the batch are rounded up to a power of
two. Where a CUDA graph is being captured nothing can be timed: what is known by then is used, else the heuristic.
What is timed are calls, not graphs: candidates for a product of a few microseconds are ranked by what launching costs.
Candidates compute the same up to the order of fp32 sums, so processes that tune apart may differ in the last bits. The
dense library is a candidate for bf16 only where the result is bf16 too, for it gets the scale rounded to bf16.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch

from .dispatch import triton

MODES = ("0", "1", "save")
Plan = TypeVar("Plan")

_found: dict[tuple, object] = {}  # (device, key) -> plan
_saved: dict[Path, dict[str, str]] = {}  # file of a device -> key -> plan, both as text


def set_tuning(mode: str) -> None:
    """'0': off, '1': on and remembered in this process, 'save': also in a file of the user's cache directory.

    >>> set_tuning("0")
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"tuning (EMPF_TUNE) must be one of {', '.join(MODES)}, got {mode!r}")
    _mode = mode
    _found.clear()
    _saved.clear()


def enabled() -> bool:
    return _mode != "0"


def fastest(
    key: tuple, device: torch.device, plans: Callable[[], Sequence[Plan]], run: Callable[[Plan], object], default: Plan
) -> Plan:
    """The plan among `plans()` for which `run(plan)` takes the least time on `device`, found on the first call with
    this key, which has to determine `plans()`.

    `default` is returned while a CUDA graph is captured and the key is new. A plan from the file that is no longer
    among `plans()` is found anew.
    """
    if (device, key) not in _found:
        path, named = cache_file(device), {repr(plan): plan for plan in plans()}
        if path not in _saved:
            _saved[path] = _read(path) if _mode == "save" else {}
        name = " ".join(str(part).removeprefix("torch.") for part in key)
        best = _saved[path].get(name)
        if best not in named:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return default
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                times = {text: measure(lambda plan=plan: run(plan)) for text, plan in named.items()}
            best = _saved[path][name] = min(times, key=times.get)
            if _mode == "save":
                _write(path, {name: best})
        _found[device, key] = named[best]
    return _found[device, key]


def measure(run: Callable[[], object]) -> float:
    """Median time of a call in milliseconds, with a cold L2 cache."""
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def cache_file(device: torch.device) -> Path:
    """Where plans for this device and Triton version are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "empf-kernels"
    return folder / f"{name.lower().replace(' ', '-').replace('/', '-')}-triton-{triton.__version__}.json"


def _read(path):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, unreadable or damaged: found anew, and replaced
        return {}
    return found if isinstance(found, dict) else {}


def _write(path, found):
    """Add to the file, which other processes may read or have extended meanwhile: replaced in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(_read(path) | found, file, indent=1)
        os.replace(file.name, path)
    except OSError as problem:
        warnings.warn(f"the tuner cannot write {path}: {problem}", stacklevel=2)


_mode = "0"
set_tuning(os.environ.get("EMPF_TUNE", "0"))
