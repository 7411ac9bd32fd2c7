"""A few random calls of each function; `python tests/fuzz_kernels.py` makes thousands, see there."""

import contextlib

import fuzz_kernels
import pytest
import torch
from interpreter import without_overflow_checks

CASES = 300
INTERPRETED = not torch.cuda.is_available()  # which takes 10 to 60 ms for a small case, up to a second for any


@pytest.mark.kernel
@pytest.mark.parametrize("name", fuzz_kernels.FUNCTIONS)
def test_random_calls(name, kernels_on):
    with without_overflow_checks() if INTERPRETED else contextlib.nullcontext():
        assert fuzz_kernels.run(name, CASES, small=INTERPRETED) == []
    assert sum(kernels_on.values()) >= CASES // 2 or name in ("pack", "quantizer")


@pytest.mark.kernel
@pytest.mark.parametrize("case", (101494, 102040))
def test_what_was_once_a_finding(case, kernels_on):
    """Gradients of fp16 convolutions, which torch adds up in fp16 on CPUs."""
    assert fuzz_kernels.run("gradients", 1, case) == []


def test_a_finding_is_told(monkeypatch):
    """A case that goes wrong is a line with what is needed to run it again."""
    monkeypatch.setattr(fuzz_kernels, "unpack", lambda packed: torch.zeros(packed.shape))
    assert any(line.startswith("pack ") and "unpacked" in line for line in fuzz_kernels.run("pack", 5))


def test_cases_are_the_same_everywhere():
    """Drawn from the name and number alone."""
    first, second = (fuzz_kernels.Draw("matmul 7").signal(5, 3)[0].double().cpu() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter tells what a launch is told")
def test_every_launch_says_whether_to_fuse(kernels_on, monkeypatch):
    """Multiplication with addition: Triton 3.10 has another default than 3.9."""
    interpreter, said = pytest.importorskip("triton.runtime.interpreter"), {}
    run = interpreter.InterpretedFunction.run

    def listening(kernel, *args, **options):
        said.setdefault(kernel.__name__, set()).add(options.get("enable_fp_fusion"))
        return run(kernel, *args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", listening)
    assert not any(fuzz_kernels.run(name, 4, small=True) for name in fuzz_kernels.FUNCTIONS)
    assert len(said) >= 8 and all(None not in values for values in said.values()), said
