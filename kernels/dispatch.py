"""Which implementation runs: the Triton kernels or their plain torch definitions.

    mode     CUDA tensors       CPU tensors
    auto     Triton             torch
    on       Triton             Triton if TRITON_INTERPRET=1 was set before the import, else ValueError
    off      torch              torch

The mode is `auto` unless the environment variable EMPF_KERNELS (auto | on | off) or `set_backend` says otherwise.
Where Triton is not installed, `auto` means torch and `on` is an error: nothing pretends to be a kernel.
"""

import functools
import os
from collections import Counter
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
    from triton import knobs

    HAVE_TRITON = True
    INTERPRETED = bool(knobs.runtime.interpret)
except ImportError:  # the definitions in plain torch still work

    class _Absent:
        """Stands in for `triton` and `tl` so that the kernel files can be imported; no kernel is ever launched."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = _Absent()
    HAVE_TRITON = INTERPRETED = False

# Operator namespace. Two vendored copies must not collide in torch.library, not even as a.b_c and a_b.c: "_0" is an
# underscore, and as no name starts with a digit, any other "_" is a dot.
OPS = __package__.replace("_", "_0").replace(".", "_")
# A fused multiply-add rounds once where torch rounds twice, enough to flip a code at a tie; and versions of Triton
# differ in what they do unless told.
LAUNCH = {"enable_fp_fusion": False}
MODES = ("auto", "on", "off")
LAUNCHES = Counter()  # kernel name -> launches in this process; tests assert with it that a kernel ran


def set_backend(mode: str) -> None:
    """Choose the implementation for this process: `auto`, `on` (Triton or an error) or `off` (torch). See the table.

    >>> set_backend("auto")
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"backend must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "on" and not HAVE_TRITON:
        raise ValueError("backend 'on' needs Triton, which is not installed: pip install triton")
    _mode = mode


def backend(device: torch.device | str = "cpu") -> str:
    """The implementation that tensors on `device` get now: 'triton', 'triton-interpreter' or 'torch'.

    >>> backend("cpu")
    'torch'
    """
    cuda = torch.device(device).type == "cuda"
    if _mode == "off" or not HAVE_TRITON or (_mode == "auto" and not cuda):
        return "torch"
    return "triton-interpreter" if INTERPRETED else "triton"


def use_triton(x: torch.Tensor) -> bool:
    """True if the kernels are to run on `x`; raises where mode `on` cannot be honoured."""
    name = backend(x.device)
    if name == "triton" and not x.is_cuda:
        raise ValueError(
            f"backend 'on' with a tensor on {x.device}: move it to a GPU, set TRITON_INTERPRET=1 before the import, "
            "or choose set_backend('auto')"
        )
    return name != "torch"


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work around this call, in eager mode: left to the definitions."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def plain_tensors():
    """Outside of inference mode and of the transforms of torch.func: what is made here may be kept, for any caller."""
    if torch.compiler.is_compiling():  # traced, where there are neither
        yield
        return
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        yield


def own_precision(function):
    """`function(x, ...)` computes in the types of its arguments: autocast, which would round them, is off inside."""

    @functools.wraps(function)
    def run(x, *args, **kwargs):
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(x, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(x, *args, **kwargs)

    return run


@functools.cache
def device_facts(device: torch.device) -> tuple[int, bool]:
    """Number of multiprocessors, and whether it is a Hopper GPU."""
    if device.type != "cuda":
        return 4, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, torch.version.hip is None and properties.major == 9


def _from_environment() -> str:
    mode = os.environ.get("EMPF_KERNELS", "auto").lower()
    if mode not in MODES:
        raise ValueError(f"EMPF_KERNELS must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = "auto"
set_backend(_from_environment())
