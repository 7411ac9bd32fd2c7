"""Altered recordings of every format."""

import pytest
from fuzz_recordings import one
from fuzz_tools import fuzz


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # casts of absurd numbers
def test_an_altered_recording_is_refused_or_gives_finite_frames(tmp_path):
    """500 cases; `python tests/fuzz_recordings.py 20000` for more."""
    outcomes, wrong, slowest = fuzz(one, 500, 0, tmp_path)
    assert wrong == [] and outcomes["refused"] > 250 and outcomes["frames"] > 100
    assert slowest < 20
