"""An interrupted run, continued, equals the uninterrupted one bit for bit, however it was interrupted."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_tools import TINY, leftovers, metrics, resume, run_train, trace

import train
from empf import runs

SETTINGS = {
    "plain": [],
    "mixed": ["--mixup", "0.8", "--cutmix", "1", "--label-smoothing", "0.1", "--cutout", "2"],
    "average": ["--ema", "0.9", "--neuron", "mem_bn", "--learning", "every"],
}
SAVE_ALWAYS = ("--save-minutes", "0")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Path]:
    """A finished run for each of SETTINGS: 2 epochs of 3 batches."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in SETTINGS}
    for name, folder in folders.items():
        run_train(*SETTINGS[name], "--output-dir", folder)
    return folders


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("batches", [(2, 2), (3,)], ids=str)  # 3 is the end of an epoch
def test_continues_exactly_after_max_steps(uninterrupted, tmp_path, capsys, name, batches):
    run = tmp_path / "run"
    run_train(*SETTINGS[name], "--output-dir", run, "--max-steps", batches[0])
    for count in batches[1:]:
        resume(run, "--max-steps", str(count))
    position = runs.load_state(run)["at"]
    assert (position["epoch"], position["batch"]) == divmod(sum(batches), 3)
    assert f"continue with: train.py --resume {run}" in capsys.readouterr().out
    resume(run)
    assert trace(run) == trace(uninterrupted[name])


def test_random_numbers_of_torch_continue(tmp_path, monkeypatch):
    """Nothing in the library draws any while it trains; what a user adds, say dropout, does."""
    backward = train.empf.online_backward

    def noisy(model, images, *args, **kwargs):
        return backward(model, images + torch.randn_like(images), *args, **kwargs)

    monkeypatch.setattr(train.empf, "online_backward", noisy)
    run_train("--output-dir", tmp_path / "whole")
    run_train("--output-dir", tmp_path / "stopped", "--max-steps", "2")
    resume(tmp_path / "stopped")
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")


def test_the_settings_of_the_test_leave_traces(uninterrupted):
    """Momentum and the moving average are really among what is compared."""
    state = runs.load_state(uninterrupted["average"])
    assert len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][0]["params"]) + len(
        state["optimizer"]["param_groups"][1]["params"]
    )
    assert not torch.equal(state["average"]["module.head.weight"], state["model"]["head.weight"])
    traces = [trace(folder) for folder in uninterrupted.values()]
    assert traces[0][0] != traces[1][0] != traces[2][0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_batch(uninterrupted, tmp_path, monkeypatch, number):
    """In the second of three batches: `main` returns (exit code 0) and two batches are saved."""
    backward, calls = train.empf.online_backward, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return backward(*args, **kwargs)

    monkeypatch.setattr(train.empf, "online_backward", interrupted)
    run = tmp_path / "run"
    run_train("--output-dir", run)
    assert len(calls) == 2 and runs.load_state(run)["at"]["batch"] == 2
    monkeypatch.undo()
    resume(run)
    assert trace(run) == trace(uninterrupted["plain"])


class Died(BaseException):
    """Stands for `kill -9`: nothing catches it, nothing is cleaned up."""


def die_at(monkeypatch, call: int) -> None:
    """Die when the given file is written, but has not taken its place: after that, only the next file is missing."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == call:
            raise Died(target)
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)


WRITES = 12  # state, config; then per epoch the state after each of 3 batches, weights and metrics


@pytest.mark.parametrize("call", range(1, WRITES + 1))
def test_survives_death_at_every_write(uninterrupted, tmp_path, monkeypatch, call):
    run = tmp_path / "run"
    die_at(monkeypatch, call)
    with pytest.raises(Died):
        run_train("--output-dir", run, *SAVE_ALWAYS)
    monkeypatch.undo()
    (half_written,) = leftovers(run)
    (run / half_written).rename((run / half_written).with_suffix(".1.tmp"))  # of a process that is gone
    if call <= 2:  # nothing was trained, and nothing stands in the way of a new run
        run_train("--output-dir", run, *SAVE_ALWAYS)
    else:
        resume(run, *SAVE_ALWAYS)
        assert leftovers(run) == []
    assert trace(run) == trace(uninterrupted["plain"])


def test_number_of_writes(tmp_path, monkeypatch):
    """The test above covers them all: there is no further one to die at."""
    die_at(monkeypatch, WRITES + 1)
    run_train("--output-dir", tmp_path / "run", *SAVE_ALWAYS)


def test_resuming_a_complete_run_restores_its_results(uninterrupted, tmp_path):
    run = tmp_path / "run"
    run_train("--output-dir", run)
    (run / "metrics.jsonl").unlink()
    (run / "model.safetensors").write_bytes(b"torn")
    resume(run)
    assert trace(run) == trace(uninterrupted["plain"])


STORM = ["--epochs", "8", "--limit", "288", *SAVE_ALWAYS]  # more than can be done between the signals
SIGNALS = [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, None]


def storm(run: str) -> None:
    """Kill the run in this folder at random moments; print the exit statuses of its processes.

    The processes are forked from this one, which has never trained: it imports everything once for all of them.
    """
    train.load("digits")
    train.make_optimizer(torch.nn.Linear(1, 1), train.TrainConfig())
    statuses, rng = [], random.Random(0)
    config, state = Path(run, "config.json"), Path(run, "state", "state.pt")
    for number in SIGNALS:
        started = config.exists()
        process = os.fork()
        if process == 0:
            if started:
                resume(Path(run), *SAVE_ALWAYS)
            else:
                run_train("--output-dir", run, *STORM)
            sys.stdout.flush()
            os._exit(0)
        before = state.stat().st_mtime_ns if started else 0
        if number is not None:
            while not (config.exists() and state.stat().st_mtime_ns > before):  # until it saves for the first time
                if os.waitpid(process, os.WNOHANG)[0]:
                    sys.exit("the run ended before it was signalled")
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.06))
            os.kill(process, number)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        runs.load_state(Path(run))
    print(json.dumps(statuses), file=sys.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_survives_kill_9_at_random_moments(tmp_path):
    code = "import sys, test_resume; test_resume.storm(sys.argv[1])"
    paths = os.pathsep.join((str(Path(__file__).parent), str(Path(train.__file__).parent)))
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "killed")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    statuses = json.loads(result.stderr.splitlines()[-1])
    assert statuses == [-9 if number == signal.SIGKILL else 0 for number in SIGNALS]
    assert result.stdout.count("stopped and saved") == 2 and result.stdout.count("finished") == 1
    assert leftovers(tmp_path / "killed") == []
    run_train("--output-dir", tmp_path / "whole", *STORM)
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run_train("--output-dir", run, "--max-steps", "2")
    before = (run / "state/state.pt").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        resume(run)
    assert str(stop.value).startswith(f"error: could not write {run}/state/state.pt (No space left on device): ")
    assert (run / "state/state.pt").read_bytes() == before and leftovers(run) == []
    monkeypatch.undo()
    resume(run)
    assert len(metrics(run)) == 2


@pytest.mark.parametrize("flags", [["--width", "0.125"], ["--arch", "resnet19"], ["--no-crop"], ["--lr", "0.1"]])
def test_contradicting_flags_are_refused(uninterrupted, flags):
    name = flags[0].strip("-").removeprefix("no-")
    with pytest.raises(SystemExit, match=f"error: the run was started with {name} = .* leave --{name} out"):
        resume(uninterrupted["plain"], *flags)


def test_flags_that_change_nothing_are_accepted(uninterrupted, tmp_path):
    """Also those of the run itself: here TINY."""
    run = tmp_path / "run"
    run_train("--output-dir", run, "--max-steps", "2")
    resume(run, *TINY, *SAVE_ALWAYS)
    assert trace(run) == trace(uninterrupted["plain"])


def test_another_number_of_processes_is_refused(uninterrupted, tmp_path):
    state = runs.load_state(uninterrupted["plain"])
    run = tmp_path / "run"
    runs.save_state(run, {**state, "processes": 2})
    (run / "config.json").write_bytes((uninterrupted["plain"] / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="error: .* was trained by 2 processes, not 1: .* --num_processes 2"):
        resume(run)


def test_checkpoint_of_another_architecture_is_refused(uninterrupted, tmp_path):
    run = tmp_path / "run"
    run_train("--output-dir", run, "--width", "0.125", "--max-steps", "1")
    (run / "config.json").write_bytes((uninterrupted["plain"] / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="error: .* belongs to another architecture than the configured resnet18"):
        resume(run)
