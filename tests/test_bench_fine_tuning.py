"""bench/fine_tuning.py: what it writes, and what was recorded."""

import json
from pathlib import Path

from train_tools import undisturbed

from bench import fine_tuning

RECORDED = json.loads(Path(fine_tuning.OUT).read_text())


def test_the_comparison_is_run_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "FLAGS", [*fine_tuning.FLAGS, "--width", "0.0625", "--T", "1", "--limit", "64"])
    with undisturbed():
        fine_tuning.main(
            ["--first-epochs", "1", "--epochs", "1", "--seeds", "1", "--json", str(tmp_path / "found.json")]
        )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"] == "python bench/fine_tuning.py --first-epochs 1 --epochs 1 --seeds 1"
    assert list(found["accuracy"]) == list(RECORDED["accuracy"])
    assert all(0 <= accuracy <= 100 for ((accuracy,),) in found["accuracy"].values())


def test_to_start_from_a_trained_network_beat_to_start_from_scratch():
    """After the same epochs, with each of three seeds; from the signs on average."""
    scratch, tuned, signs = (
        [epochs[-1] for epochs in RECORDED["accuracy"][name]]
        for name in ("from scratch", "--init-from RUN", "--init-from PACKED")
    )
    assert len(scratch) == 3 and all(a > b for a, b in zip(tuned, scratch, strict=True))
    assert sum(signs) > sum(scratch)
