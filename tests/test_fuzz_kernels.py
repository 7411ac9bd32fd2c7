"""A few random calls of each function; `python tests/fuzz_kernels.py` makes thousands, see there."""

import fuzz_kernels
import pytest
import torch

CASES = 300 if torch.cuda.is_available() else 6  # the interpreter takes up to half a second for one


@pytest.mark.kernel
@pytest.mark.parametrize("name", fuzz_kernels.FUNCTIONS)
def test_random_calls(name, kernels_on):
    cases = 300 if name in ("pack", "quantizer") else CASES
    assert fuzz_kernels.run(name, cases) == []
    assert sum(kernels_on.values()) >= CASES // 2 or name in ("pack", "quantizer")


def test_a_finding_is_told(monkeypatch):
    """A case that goes wrong is a line with what is needed to run it again."""
    monkeypatch.setattr(fuzz_kernels, "unpack", lambda packed: torch.zeros(packed.shape))
    assert any(line.startswith("pack ") and "unpacked" in line for line in fuzz_kernels.run("pack", 5))


def test_cases_are_the_same_everywhere():
    """Drawn from the name and number alone."""
    first, second = (fuzz_kernels.Draw("matmul 7").signal(5, 3)[0].double().cpu() for _ in range(2))
    assert torch.equal(first, second)
