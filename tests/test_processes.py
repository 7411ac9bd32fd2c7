"""Two processes train as one: gradients, drawn steps, counts, files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from train_tools import TINY, in_double, leftovers, metrics, resume, run_train, trace
from two_processes import CASES, FLIP, SYNC

import empf
import train
from empf import runs
from empf.data.batches import Batches
from empf.data.load import load_data
from empf.evaluate import scores
from empf.training import processes as launch
from empf.training.config import of_launcher

ROOT = Path(train.__file__).parent
PATIENCE = 600  # seconds for an end that comes by itself: nobody waits for it, a busy machine has the time


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command that has to succeed, without a warning of any package."""
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, env=environment()
    )
    assert result.returncode == 0 and "Warning:" not in result.stderr, result.stderr
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
    record = metrics(run)[0]
    *correct, loss = scores(empf.load(run), Batches(load_data("digits", limit=101)[1], 101, train=False)).tolist()
    assert record["accuracy"] == [100 * c / 101 for c in correct]
    assert record["test_loss"] == pytest.approx(loss / 101, rel=1e-5)
    assert correct[0] > 0


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict]:
    """What two_processes.py has left; all of it happens in one launch."""
    folder = tmp_path_factory.mktemp("two_processes")
    with in_double():
        run_train(*SYNC, "--output-dir", folder / "one then two", "--max-steps", "14")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, str(ROOT / "tests" / "two_processes.py"), str(folder), cwd=folder)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_joined_batch(found, case):
    """Every parameter has one in every step, whatever the neuron."""
    result = found[1]["gradients"][case]
    assert result["without"] == 0
    assert result["largest"] > 1e-3 and result["silent"] == 0
    assert result["difference"] < 1e-13 * max(1, result["largest"])


def test_both_processes_draw_the_same_steps(found):
    first, second = found[1]["steps"]
    assert len(first) == 6  # 2 epochs of 3 batches
    assert first == second and {step for (step,) in first} == {1, 2}


def test_both_processes_evaluate_the_same_network(found):
    first, second = found[1]["means"]
    assert len(first) == 2 and first == second and first[0] != first[1]


def test_both_processes_average_the_same_buffers(found):
    """Those of the weights and those of their moving average, in one order; and so again in a second run."""
    folder, result = found
    first, second = result["averaged"]
    assert len(first) == 2 and first == second
    files = [(folder / name / "model.safetensors").read_bytes() for name in ("averaged", "averaged again")]
    assert files[0] == files[1]


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


# ---- batch norms over processes, and another number of processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, list[float]]:
    """One process with the joined batch: the run, and the loss of each batch."""
    run, losses, backward = tmp_path_factory.mktemp("alone") / "run", [], train.empf.online_backward

    def noted(*args, **kwargs):
        loss, logits = backward(*args, **kwargs)
        losses.append(loss.item())
        return loss, logits

    with patch.object(train.empf, "online_backward", noted), in_double():
        run_train(*SYNC, "--output-dir", run)
    return run, losses


def test_two_processes_with_joined_norms_have_the_losses_of_one(found, alone):
    first, second = found[1]["joined"]
    assert len(first) == len(second) == len(alone[1]) == 20 and first != second
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert mean == pytest.approx(alone[1], rel=1e-9)
    assert alone[1][19] < 0.9 * alone[1][0]
    states = [runs.load_state(run)["model"] for run in (found[0] / "joined", alone[0])]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("name", ["two then one", "one then two"])
def test_continues_with_another_number_of_processes(found, alone, name):
    """Within an epoch: the same images in the same batches, the same steps."""
    run = found[0] / name
    if name == "two then one":
        at = runs.load_state(run)["at"]
        assert (at["batch"], at["begun_by"]) == (4, 2)
        with in_double():
            resume(run)
    for mine, other in zip(metrics(run), metrics(alone[0]), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert (mine["train_accuracy"], mine["accuracy"]) == (other["train_accuracy"], other["accuracy"])


def test_two_processes_flip_the_weights_that_one_flips(found, tmp_path):
    """Two backward passes make an update, and the run is resumed: the same bits, codes of the momenta and scales."""
    with in_double():
        run_train(*FLIP, "--output-dir", tmp_path / "run")
    joined, alone = (runs.load_state(run) for run in (found[0] / "flipped", tmp_path / "run"))
    assert metrics(found[0] / "flipped")[0]["loss"] == pytest.approx(metrics(tmp_path / "run")[0]["loss"], rel=1e-9)
    for name, state in alone["flips"].items():
        assert joined["model"][f"{name}.weight"].equal(alone["model"][f"{name}.weight"])
        assert joined["flips"][name]["momentum"].equal(state["momentum"])
        torch.testing.assert_close(joined["flips"][name]["scale"], state["scale"], rtol=1e-6, atol=0)
    assert max(metrics(tmp_path / "run")[0]["health"]["flips"].values()) > 0


def test_an_epoch_is_continued_as_it_was_begun(tmp_path, monkeypatch):
    """Batches that another number of processes shares in another way are told who began, until the epoch ends."""
    run, asked, iterate = tmp_path / "run", [], Batches.iterate
    run_train("--output-dir", run, "--max-steps", "2")
    state = runs.load_state(run)
    state["at"]["begun_by"] = 2
    runs.save_state(run, state)

    def noted(self, start: int = 0, begun_by: int | None = None):
        if begun_by is not None:
            asked.append((start, begun_by))
        return iterate(self, start, begun_by)

    monkeypatch.setattr(Batches, "iterate", noted)
    resume(run)
    assert asked == [(2, 2), (0, 1)]


def test_compressed_gradients(found):
    """Other weights than with whole gradients, but the same on both processes, and they learn."""
    folder, result = found
    first, second = result["compressed"]
    assert first == second
    whole, compressed = (runs.load_state(folder / name)["model"] for name in ("whole", "compressed"))
    assert not torch.equal(whole["head.weight"], compressed["head.weight"])
    losses = [[record["loss"] for record in metrics(folder / name)] for name in ("whole", "compressed")]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert result["bf16"].startswith("processes on CPUs cannot exchange gradients in bf16")


def test_a_dead_process_stops_the_job_and_loses_nothing(tmp_path):
    """Started with a configuration file of Accelerate; kill -9 after the first epoch; one process goes on alone."""
    run, config = tmp_path / "run", ROOT / "bench" / "configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(ROOT / "train.py")]
    command += [*TINY, *SYNC, "--batch-size", "16", "--epochs", "5", "--output-dir", str(run)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        while not (run / "metrics.jsonl").exists():
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.05)
        workers = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        workers[-1].kill()
        output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", output)
    assert "error: another process has died; what was saved is intact, continue with --resume" in output
    before = metrics(run)
    assert 1 <= len(before) < 5
    resume(run)
    assert leftovers(run) == [] and len(metrics(run)) == 5
    del before[-1]["weights"]  # named in the last line
    assert metrics(run)[: len(before)] == before


# ---- the launcher

ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TWO = {"torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
TWO["accelerate"] = ["accelerate.commands.launch", "--num_processes", "2"]  # none of them says a word of CPUs


def unsaid() -> dict[str, str]:
    return {name: value for name, value in environment().items() if name != "ACCELERATE_USE_CPU"}


@pytest.mark.parametrize(
    "launcher, number",
    [
        *((ACCELERATE, n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
        (TWO["torchrun"], signal.SIGHUP), (TWO["accelerate"], signal.SIGKILL),
    ],
    ids=lambda value: getattr(value, "name", None) or f"{value[0].split('.')[0]} {value[-1]}",
)  # fmt: skip
def test_processes_end_with_their_launcher(tmp_path, launcher, number):
    """They save and end, as a scheduler or a closed terminal expects; none trains on alone.

    Two processes join without a word of CPUs: not two trainings into one folder, nor one instead of two.
    """
    run = tmp_path / "run"
    if launcher != ACCELERATE and torch.cuda.is_available():
        pytest.skip("two processes need two GPUs there")
    command = [sys.executable, "-m", *launcher, str(ROOT / "train.py"), *TINY, "--epochs", "100000"]
    with subprocess.Popen(
        [*command, "--batch-size", "16", "--output-dir", str(run)], stdout=subprocess.DEVNULL,
        env=environment() if launcher == ACCELERATE else unsaid(), stderr=subprocess.DEVNULL, start_new_session=True,
    ) as job:  # fmt: skip
        while not (run / "metrics.jsonl").exists():
            assert job.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(number)
        job.wait(PATIENCE)
    left = psutil.wait_procs(workers, timeout=PATIENCE)[1]
    for process in left:
        process.kill()
    assert workers and left == []
    log = (run / "log.txt").read_text()
    assert log.count(f"{launcher[-1]} x cpu (1 threads)") == log.count("\nepoch   1 ") == 1
    assert log.splitlines()[-1].startswith("stopped and saved; continue with")
    assert runs.load_state(run)["at"]["epoch"] >= len(metrics(run)) >= 1


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


def test_number_of_processes_in_a_configuration_file():
    file = str(ROOT / "bench" / "configs" / "cpu.yaml")
    command = ["accelerate", "launch", "--config_file", file, "train.py"]
    assert launch.asked_for(command) == 2
    assert launch.asked_for([*command[:4], "--num_processes", "3", "train.py"]) == 3


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "configs").iterdir()), ids=lambda file: file.name)
def test_configuration_files_are_those_of_accelerate(file):
    """It refuses keys that it does not know."""
    config = load_config_from_file(str(file))
    assert config.num_processes > 1 and config.mixed_precision is not None


@pytest.mark.parametrize(
    "environment",
    [{}, {"MASTER_PORT": "1"}, {"ACCELERATE_USE_CPU": "True"}]
    + [{"MASTER_PORT": "1", "ACCELERATE_USE_CPU": "True", name: "2"} for name in launch.ALREADY_STARTED],
    ids=lambda e: " ".join(e) or "plain",
)
def test_nothing_is_started_unasked_or_twice(monkeypatch, environment):
    monkeypatch.setattr(launch.os, "environ", environment)
    monkeypatch.setattr(launch.os, "execv", pytest.fail)
    monkeypatch.setattr(launch, "launcher", lambda: ["bash", "accelerate.sh"])
    monkeypatch.setattr(launch, "end_with_launcher", pytest.fail)
    launch.start_processes(["train.py"])


def test_an_unknown_number_of_processes_is_one_sentence(monkeypatch):
    monkeypatch.setattr(launch.os, "environ", {"MASTER_PORT": "1", "ACCELERATE_USE_CPU": "True"})
    monkeypatch.setattr(launch, "launcher", lambda: ["accelerate", "launch", "train.py"])
    monkeypatch.setattr(launch, "end_with_launcher", lambda: None)
    with pytest.raises(ValueError, match="starts one process only on CPUs: .* torchrun --nproc-per-node N train.py"):
        launch.start_processes(["train.py"])


def test_settings_of_the_launcher_are_taken_over(tmp_path, monkeypatch, capsys):
    """As flags of train.py are: the loss is divided once."""
    run_train("--output-dir", tmp_path / "flags", "--epochs", "1", "--accumulate", "2", "--mixed-precision", "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    run_train("--output-dir", tmp_path / "launched", "--epochs", "1")
    assert trace(tmp_path / "launched") == trace(tmp_path / "flags")
    said = capsys.readouterr().out
    assert said.count("note: --accumulate 2, as accelerate launch says") == 1
    assert said.count("note: --mixed-precision bf16, as accelerate launch says") == 1


@pytest.mark.parametrize(
    "name, told, flags, sentence",
    [
        ("MIXED_PRECISION", "bf16", ["--mixed-precision", "no"], "was given --mixed_precision bf16, train.py"),
        (
            "MIXED_PRECISION",
            "fp16",
            [],
            "was given --mixed_precision fp16, which cannot be: mixed_precision must be one",
        ),
        ("GRADIENT_ACCUMULATION_STEPS", "3", ["--accumulate", "2"], "steps 3, train.py --accumulate 2: give it once"),
        ("GRADIENT_ACCUMULATION_STEPS", "auto", [], "--gradient_accumulation_steps auto, which cannot be"),
    ],
)
def test_settings_of_the_launcher_are_contradicted_aloud(monkeypatch, name, told, flags, sentence):
    monkeypatch.setenv(f"ACCELERATE_{name}", told)
    with pytest.raises(SystemExit, match=f"^error: accelerate launch .*{sentence}"):
        run_train(*flags)


def test_what_the_launcher_says_by_default_changes_nothing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert of_launcher({"mixed_precision": "bf16", "accumulate": 4}) == {}


@pytest.mark.parametrize("backend, waits", [("gloo", 1), ("nccl", 0), (None, 0)])
def test_only_gloo_is_waited_for_before_the_end(monkeypatch, backend, waits):
    """Its threads abort a process that ends too early: now and then, so only the wait itself can be looked at."""
    slept = []
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(launch.dist, "get_backend", lambda: backend)
    launch.settle()
    assert len(slept) == waits
