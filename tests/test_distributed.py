"""Two processes train as one: gradients, drawn steps, counts, files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_tools import leftovers, metrics, trace
from two_processes import CASES

import empf
import train
from empf import launch, runs
from empf.data import Batches, load
from empf.evaluate import correct_per_step

ROOT = Path(train.__file__).parent


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=400, env=env
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def command_line(tmp_path_factory) -> tuple[Path, str]:
    """One epoch on 101 training and 101 test images: 50 test images for one process, 51 for the other."""
    cwd = tmp_path_factory.mktemp("command_line")
    flags = ["--epochs", "1", "--limit", "101", "--batch-size", "16", "--T", "2", "--width", "0.125", "--lr", "0.2"]
    flags += ["--ema", "0.5"]
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    printed = run(*launcher, str(ROOT / "train.py"), *flags, "--warmup-epochs", "0", "--threads", "1", cwd=cwd)
    return cwd / "runs" / "digits-resnet18", printed


def test_command_line(command_line):
    run, printed = command_line
    assert os.listdir(run.parent) == [run.name] and leftovers(run) == []
    assert printed.count("2 x cpu (1 threads)") == printed.count("epoch   1") == printed.count("finished") == 1


def test_accuracy_is_counted_over_every_test_image_once(command_line):
    """One process that loads the saved network finds the same number of correct predictions."""
    run, _ = command_line
    accuracy = metrics(run)[0]["accuracy"]
    correct = correct_per_step(empf.load(run), Batches(load("digits", limit=101)[1], 101, train=False)).tolist()
    assert accuracy == [100 * c / 101 for c in correct]
    assert correct[0] > 0


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict]:
    """What two_processes.py has left; all of it happens in one launch."""
    folder = tmp_path_factory.mktemp("two_processes")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, str(ROOT / "tests" / "two_processes.py"), str(folder), cwd=folder)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_joined_batch(found, case):
    """Every parameter has one in every step, whatever the neuron."""
    result = found[1]["gradients"][case]
    assert result["without"] == 0
    assert result["largest"] > 1e-3 and result["difference"] < 1e-13 * max(1, result["largest"])


def test_both_processes_draw_the_same_steps(found):
    first, second = found[1]["steps"]
    assert len(first) == 6  # 2 epochs of 3 batches
    assert first == second and {step for (step,) in first} == {1, 2}


def test_both_processes_evaluate_the_same_network(found):
    first, second = found[1]["means"]
    assert len(first) == 2 and first == second and first[0] != first[1]


def test_only_the_first_process_writes(found):
    first, second = found[1]["files"]
    assert first.count("state.pt") == 3 and first.count("config.json") == 1 and second == []


def test_continues_at_the_end_of_an_epoch_exactly(found):
    folder, _ = found
    assert trace(folder / "between") == trace(folder / "whole")


def test_continues_within_an_epoch(found):
    """Weights and training loss exactly; running statistics, which differ between processes, from the first one."""
    folder, _ = found
    whole, within = (runs.load_state(folder / name)["model"] for name in ("whole", "within"))
    for name, tensor in whole.items():
        assert "running" in name or torch.equal(tensor, within[name]), name
    for a, b in zip(metrics(folder / "whole"), metrics(folder / "within"), strict=True):
        assert (a["loss"], a["train_accuracy"]) == (b["loss"], b["train_accuracy"])


def test_a_signal_to_one_process_stops_both_at_the_same_batch(found):
    folder, result = found
    assert result["signalled"] == [3, 3]
    state = runs.load_state(folder / "signalled")
    assert (state["at"]["epoch"], state["at"]["batch"]) == (1, 0)


# ---- the launcher


@pytest.mark.parametrize(
    "command, expected",
    [
        ("python accelerate launch --cpu --num_processes 2 train.py --epochs 1", 2),
        ("python -m accelerate.commands.launch --cpu --num-processes=3 train.py", 3),
        ("accelerate launch --cpu train.py --epochs 1", None),
    ],
)
def test_number_of_processes_on_the_command_line(command, expected):
    assert launch.asked_for(command.split()) == expected


@pytest.mark.parametrize(
    "environment",
    [{}, {"MASTER_PORT": "1"}, {"ACCELERATE_USE_CPU": "True"}]
    + [{"MASTER_PORT": "1", "ACCELERATE_USE_CPU": "True", name: "2"} for name in launch.ALREADY_STARTED],
    ids=lambda e: " ".join(e) or "plain",
)
def test_nothing_is_started_unasked_or_twice(monkeypatch, environment):
    monkeypatch.setattr(launch.os, "environ", environment)
    monkeypatch.setattr(launch.os, "execv", pytest.fail)
    monkeypatch.setattr(launch, "launcher", pytest.fail)
    launch.start_processes(["train.py"])


def test_an_unknown_number_of_processes_is_one_sentence(monkeypatch):
    monkeypatch.setattr(launch.os, "environ", {"MASTER_PORT": "1", "ACCELERATE_USE_CPU": "True"})
    monkeypatch.setattr(launch, "launcher", lambda: ["accelerate", "launch", "train.py"])
    with pytest.raises(ValueError, match="starts one process only on CPUs: .* torchrun --nproc-per-node N train.py"):
        launch.start_processes(["train.py"])
