"""Faults of the machine: what was saved survives, nothing is half-written, the next start works.

Damaged images and shards of each kind are in test_data.py and test_streaming.py, damaged run folders in test_runs.py, a
process that dies among several in test_distributed.py, and a death at each single write in test_resume.py.
"""

import errno
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import tqdm
from make_data import image_folder, parquet_folder
from train_tools import TINY, leftovers, metrics, resume, run_train, trace, undisturbed

import eval as evaluation
import train
from empf import runs
from empf.data.batches import Batches
from empf.data.load import load_data

SAVE_ALWAYS = ("--save-minutes", "0")
TESTS = Path(__file__).parent
PATIENCE = 600  # seconds for what happens by itself: nobody waits for it, a busy machine has the time


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to: 2 epochs of 3 batches."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_train("--output-dir", run)
    return run


def in_another_process(call: str, *arguments: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a function of this module, `call(*sys.argv[1:])`, in a process that has not trained before."""
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    result = subprocess.run(
        [*prefix, sys.executable, "-c", f"import sys, test_faults; test_faults.{call}(*sys.argv[1:])", *arguments],
        capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


# ---- killed and asked to stop

STORM = ["--epochs", "14", "--limit", "288", *SAVE_ALWAYS]  # more than can be done between the signals
SIGNALS = [*[signal.SIGKILL] * 10, signal.SIGTERM, *[signal.SIGKILL] * 10, signal.SIGINT, signal.SIGHUP, None]


def storm(run: str) -> None:
    """Kill the run in this folder at random moments; print the exit statuses of its processes, and where each stopped.

    The processes are forked from this one, which has never trained: it imports everything once for all of them.
    """
    load_data("digits")
    train.make_optimizer(torch.nn.Linear(1, 1), train.TrainConfig())
    statuses, places, rng = [], [], random.Random(0)
    config, state = Path(run, "config.json"), Path(run, "state", "state.pt")
    for number in SIGNALS:
        started = config.exists()
        before = state.stat().st_mtime_ns if started else 0
        process = os.fork()
        if process == 0:
            if started:
                resume(Path(run), *SAVE_ALWAYS)
            else:
                run_train("--output-dir", run, *STORM)
            sys.stdout.flush()
            os._exit(0)
        if number is not None:
            while not (config.exists() and state.stat().st_mtime_ns > before):  # until it saves for the first time
                if os.waitpid(process, os.WNOHANG)[0]:
                    sys.exit("the run ended before it was signalled")
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.06))
            os.kill(process, number)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        at = runs.load_state(Path(run))["at"]
        places.append((at["epoch"], at["batch"]))
    print(json.dumps((statuses, places)), file=sys.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_20_random_moments_and_all_signals_to_stop(tmp_path):
    """Each start saves after every batch, and goes on exactly where the last one had saved: it never falls back."""
    run = tmp_path / "killed"
    result = in_another_process("storm", run)
    statuses, places = json.loads(result.stderr.splitlines()[-1])
    assert statuses == [-9 if number == signal.SIGKILL else 0 for number in SIGNALS] and statuses.count(-9) == 20
    assert all(before < after for before, after in pairwise(places)) and places[-1] == [14, 0]
    assert result.stdout.count("stopped and saved") == 3 and result.stdout.count("finished") == 1
    assert leftovers(run) == []
    run_train("--output-dir", tmp_path / "whole", *STORM)
    assert trace(run) == trace(tmp_path / "whole")


# ---- a full disk


def refused(run: Path, reason: str) -> None:
    """Resume where there is no room: one sentence, and the last checkpoint stays. Then room is made by the caller."""
    before = (run / "state/state.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        resume(run, *SAVE_ALWAYS)
    assert str(stop.value).startswith(f"error: could not write {run}/state/state.pt ({reason}): make room")
    assert (run / "state/state.pt").read_bytes() == before and leftovers(run) == []


def test_the_disk_refuses_to_flush(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run_train("--output-dir", run, "--max-steps", "2")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(run, "No space left on device")
    monkeypatch.undo()
    resume(run)
    assert trace(run) == trace(whole)


def test_a_file_may_not_grow(whole, tmp_path):
    """The kernel refuses in the middle of the write."""
    run = tmp_path / "run"
    run_train("--output-dir", run, "--max-steps", "2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "state/state.pt").stat().st_size // 2, limits[1]))
    try:
        refused(run, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resume(run)
    assert trace(run) == trace(whole)


OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


def on_a_small_disk(folder: str) -> None:
    """In a process with mounts of its own: fill a disk of 4 MB, resume, make room, resume."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    run, filler = Path(folder, "run"), Path(folder, "filler")
    run_train("--output-dir", run, "--max-steps", "2")
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 14))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    refused(run, "No space left on device")
    filler.unlink()
    resume(run)
    shutil.copytree(run, f"{folder}-copy")  # the disk goes with this process


def test_a_small_disk_is_full(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the two tests above refuse to write in other ways")
    in_another_process("on_a_small_disk", disk, prefix=OWN_MOUNTS)
    assert trace(tmp_path / "disk-copy") == trace(whole)


# ---- everything else


def test_nan_in_a_batch(whole, tmp_path, monkeypatch):
    """The sentence names epoch and batch; what was saved before goes on once the data are repaired."""

    class Poisoned(Batches):
        def iterate(self, start: int = 0, begun_by: int | None = None):
            for number, (images, target) in enumerate(super().iterate(start, begun_by), start + 1):
                if (self.epoch, number) == (1, 2):
                    images[0, 0, 0, 0] = float("nan")
                yield images, target

    run = tmp_path / "run"
    monkeypatch.setattr("empf.data.load.Batches", Poisoned)
    with pytest.raises(SystemExit, match="error: the data of epoch 2, batch 2 hold numbers that are not finite"):
        run_train("--output-dir", run, *SAVE_ALWAYS)
    at = runs.load_state(run)["at"]
    assert (at["epoch"], at["batch"]) == (1, 1) and leftovers(run) == []
    monkeypatch.undo()
    resume(run)
    assert trace(run) == trace(whole)


@pytest.mark.parametrize(
    "write, name", [(parquet_folder, "train-00001-of-00002.parquet"), (image_folder, "train/class003/00003.png")]
)
def test_a_damaged_file_of_the_data(tmp_path, write, name):
    """One sentence names it; the run goes on once it is repaired."""
    data, run = write(tmp_path / "data", "digits", train=96), tmp_path / "run"
    run_train("--data", data, "--output-dir", tmp_path / "whole")
    run_train("--data", data, "--output-dir", run, "--max-steps", "4")
    whole, before = (data / name).read_bytes(), (run / "state/state.pt").read_bytes()
    (data / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=rf"^error: cannot (read|decode) .*{name}.*: (copy|replace) [^\n]*$"):
        resume(run)
    assert (run / "state/state.pt").read_bytes() == before and leftovers(run) == []
    (data / name).write_bytes(whole)
    resume(run)
    assert trace(run) == trace(tmp_path / "whole")


def test_leftovers_and_stale_locks_are_in_nobodys_way(whole, tmp_path):
    """Half-written files of a dead process are removed, its lock is taken over, files of others stay."""
    run = tmp_path / "run"
    run_train("--output-dir", run, "--max-steps", "2")
    (run / "state" / "owner").write_text("process 4711 on nowhere")
    for name in ("state/.state.pt.4711.tmp", ".model.safetensors.4711.tmp", "state/state.pt.lock", ".lock"):
        (run / name).write_bytes(b"half")
    resume(run)
    assert leftovers(run) == [".lock", "state/state.pt.lock"]
    assert trace(run) == trace(whole)


def test_the_clock_goes_backwards(whole, tmp_path, monkeypatch):
    """Durations and the moments to save come from a clock that cannot."""
    clock, saves, save_state = itertools.count(2e9, -3600), [], runs.save_state
    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: next(clock))
    monkeypatch.setattr(runs, "save_state", lambda run, state: (saves.append(state["at"]), save_state(run, state)))
    run = tmp_path / "run"
    run_train("--output-dir", run, *SAVE_ALWAYS)
    assert next(clock) < 2e9 - 3600  # it was looked at
    assert len(saves) == 7  # the beginning and each batch
    assert all(0 < record["seconds"] < 600 and record["images_per_s"] > 0 for record in metrics(run))
    assert trace(run) == trace(whole)


# ---- streams, folders and processes


def command_line(*flags: str | Path, resumed: Path | None = None) -> list[str]:
    """train.py as a process of its own: the flags of TINY, or --resume."""
    start = ["--resume", str(resumed)] if resumed else TINY
    return [sys.executable, str(TESTS.parent / "train.py"), *start, *map(str, flags)]


def alone(command: list[str], **options) -> subprocess.Popen:
    """Start it with the library of this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment | options.pop("env", {}), **options)


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


LONG = ["--epochs", "1000", "--save-minutes", "0"]


@pytest.mark.parametrize("how", ["2>&- | head -1", ">&- 2> /dev/full"])
def test_nobody_listens(whole, tmp_path, how):
    """The reader has gone, the streams are closed, their device is full: training goes on, the log has it all."""
    run = tmp_path / "run"
    shell = ["bash", "-c", f'set -o pipefail; "$0" "$@" {how}', *command_line("--output-dir", run)]
    process = alone(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0 and "Traceback" not in said and "ignored" not in said
    assert trace(run) == trace(whole)
    log = (run / "log.txt").read_text().splitlines()
    assert len(log) == 5 and log[-1] == f"finished; evaluate it with: python -m empf eval {run}"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> tuple[Path, str, str]:
    """A run on an ASCII terminal into a folder that is not, where a warning is an error: (run, printed, said)."""
    run = tmp_path_factory.mktemp("runs") / "Bäume 猫"
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    strict = ["-W", "error::DeprecationWarning", "-W", "error::FutureWarning", "-W", "error::UserWarning"]
    python, *command = command_line("--output-dir", run, "--epochs", "1", "--ema", "0.5")
    process = alone(
        [python, *strict, *command], env=ascii_only, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    printed, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return run, printed, said


def test_an_ascii_terminal_and_a_folder_that_is_not(narrow, capsys, monkeypatch):
    """Training and evaluation."""
    run, printed, _ = narrow
    assert "B\\xe4ume" in printed or "\\udc" in printed
    assert leftovers(run) == []
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with undisturbed():
        evaluation.main([str(run), "--limit", "32", "--threads", "1", "--json", str(run.parent / "Ergebnis ä.json")])
    terminal.flush()
    assert b"B\\xe4ume \\u732b" in terminal.buffer.getvalue()
    assert json.loads((run.parent / "Ergebnis ä.json").read_text())["images"] == 32


def test_dependencies_have_nothing_to_warn_of(narrow):
    """Of what this code does: a warning would have been an error."""
    assert "Warning" not in narrow[2]


def test_a_folder_that_is_deleted_while_it_is_used(whole, tmp_path, monkeypatch):
    """What a resume needs is written again, config.json too."""
    run, save_state, times = tmp_path / "run", runs.save_state, []

    def delete(folder, state):
        times.append(state["at"])
        if len(times) == 4:
            shutil.rmtree(folder)
        save_state(folder, state)

    monkeypatch.setattr(runs, "save_state", delete)
    run_train("--output-dir", run, *SAVE_ALWAYS, "--max-steps", "4")
    monkeypatch.undo()
    resume(run)
    assert trace(run) == trace(whole)


def test_one_folder_has_one_training(tmp_path):
    """A second training and a resume are refused and told who is there; a dead one holds nothing."""
    run = tmp_path / "run"
    with alone(command_line(*LONG, "--output-dir", run), stdout=subprocess.DEVNULL) as process:
        try:
            wait_for((run / "metrics.jsonl").exists)
            before = len(metrics(run))
            for second in (lambda: resume(run), lambda: run_train("--output-dir", run)):
                with pytest.raises(SystemExit, match=f"error: .* (by process {process.pid} on|already holds a run)"):
                    second()
            wait_for(lambda: len(metrics(run)) > before)
        finally:
            process.kill()
    resume(run, "--max-steps", "1")
    assert not (run / "state" / "owner").exists()


def test_a_folder_without_an_update_is_used_again(whole, tmp_path, capsys):
    """Whatever stopped the first start: here a batch in which batch norm has one value per channel."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="use a larger batch"):
        run_train("--batch-size", "1", "--limit", "2", "--output-dir", run)
    assert (run / "config.json").exists()
    run_train("--output-dir", run)
    assert trace(run) == trace(whole)


def test_training_in_a_thread(whole, tmp_path):
    """Signals are for the first thread; the others train without them."""
    run, errors = tmp_path / "run", []

    def work():
        try:
            train.main([*TINY, "--output-dir", str(run)])
        except BaseException as error:
            errors.append(error)

    with undisturbed():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert errors == [] and trace(run) == trace(whole)
