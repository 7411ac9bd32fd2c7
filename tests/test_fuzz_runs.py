"""Altered run folders."""

import pytest
from fuzz_runs import one
from fuzz_tools import fuzz


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about what it is given
def test_an_altered_run_is_refused_or_the_same_network_or_claims_nothing(tmp_path):
    """300 cases; `python tests/fuzz_runs.py 20000` for more."""
    outcomes, wrong, slowest = fuzz(one, 300, 0, tmp_path)
    assert wrong == [] and outcomes["refused"] > 150
    assert min(outcomes[kind] for kind in ("the same network", "continued", "another network")) > 0
    assert slowest < 30
