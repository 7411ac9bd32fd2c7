"""bench/first_gpu.py: a rehearsal runs here, one failing step costs one row, a second call continues."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import first_gpu
from empf.kernels import binary_conv2d

ROOT = Path(__file__).parents[1]


def call(out, *arguments):
    command = [sys.executable, "bench/first_gpu.py", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "steps.json").read_text()), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")
def test_rehearsal(tmp_path):
    """Every step, the failing one in the middle."""
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    rows, printed = call(tmp_path, "--rehearse")
    rehearsed = [step.name for step in first_gpu.steps(tmp_path, None) if step.rehearsal]
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rehearsed, "passed") | {
        "fails": "failed (1)"
    }, "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert {"split", "kernels-0", "alternatives", "train-fp32", "deploy", "record-0"} < set(rows)
    assert set(json.loads((tmp_path / "deploy.json").read_text())["file_mb"]) == {"packed", "model"}
    assert rows["fails"]["last"] == "this step fails on purpose"
    assert "edges are right" in (tmp_path / "edges.log").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert all(f"| {name} | {row['status']} |" in summary for name, row in rows.items())
    first_gpu.main(["--out", str(tmp_path), "--rehearse"])
    assert json.loads((tmp_path / "steps.json").read_text()) == rows  # nothing is done twice


def test_every_step_is_a_program_that_is_there(tmp_path):
    listed = first_gpu.steps(tmp_path, "data")
    assert len({step.name for step in listed}) == len(listed)
    for step in listed:
        assert step.minutes <= 9
        for command in (step.command, step.rehearsal):
            scripts = [word for word in command or [] if word.endswith(".py")]
            assert all((ROOT / script).is_file() for script in scripts), step
        for script in [word for word in step.command or [] if word.startswith("bench/")]:
            text = (ROOT / script).read_text() + (ROOT / "bench/loops.py").read_text()
            flags = [word for word in step.command if word.startswith("--")]
            assert all(flag in text or flag[2:].replace("-", "_") in text for flag in flags), step
    names = [step.name for step in listed]
    order = ["versions", "tests-bf16", "split", "memcheck", "edges", "kernels-0", "alternatives", "kernels-tuned-0",
             "train-bf16", "deploy", "record-0"]  # fmt: skip
    assert sorted(order, key=names.index) == order and "fails" in names[: len(names) // 2 + 1]


def test_ranking_starts_with_what_is_farthest_from_its_target(tmp_path):
    rows = [
        {"case": "a", "goal": "ours / cuBLAS", "wanted": 10.0, "ratio": 9.0},
        {"case": "b", "contender": "ours", "us": 1.0, "share": 0.2},
        {"case": "c", "contender": "cuBLAS", "us": 1.0, "share": None},
    ]
    (tmp_path / "kernels-0.json").write_text(json.dumps({"rows": rows}))
    lines = first_gpu.ranking(tmp_path)
    assert len(lines) == 2 and "0.20" in lines[0] and "b, ours" in lines[0] and "0.90" in lines[1]


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    command = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"]
    row = first_gpu.run_step(first_gpu.Step("slow", 0.03, command, None), command, tmp_path, False)
    assert row["status"] == "stopped after 0.03 minutes" and row["seconds"] < 30


@pytest.mark.kernel
def test_a_repeat_that_differs_is_seen(device, kernels_on, monkeypatch):
    calls = []

    def wavering(*args, **options):
        calls.append(0)
        return binary_conv2d(*args, **options) + (len(calls) > 1)

    monkeypatch.setattr(first_gpu, "binary_conv2d", wavering)
    with pytest.raises(SystemExit, match="conv: repeat 0 differs"):
        first_gpu.check_split(1)
