"""bench/record.py: train, pack, evaluate, in slices that can be interrupted anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_tools import undisturbed

import eval as eval_script
import train
from bench import record
from empf.training import config as settings
from empf.training.recipes import NAMED

SLEEP = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


def wait_for(file: Path, text: str) -> None:
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text() == text):
        assert time.monotonic() < end, f"{file} never said {text}"
        time.sleep(0.02)


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        return str(tmp_path / "script.py")

    return write


def test_a_slice_ends_when_its_time_is_over(script, tmp_path):
    said = tmp_path / "said"
    assert record.call(script(SLEEP), str(said), seconds=2) is False
    assert said.read_text() == "saved"
    assert record.call(script(""), seconds=60) is True
    with pytest.raises(ValueError, match="failed with exit status 3"):
        record.call(script("import sys; sys.exit(3)"))


def test_interrupting_saves(script, tmp_path):
    """Ctrl-C, or SIGTERM, which main() turns into the same."""
    said, path, parent = tmp_path / "said", script(SLEEP), os.getpid()
    when_started = f"import os, pathlib, signal, time\np = pathlib.Path({str(said)!r})\nend = time.time() + 30\n"
    when_started += "while not (p.exists() and p.read_text() == 'started') and time.time() < end: time.sleep(0.02)\n"
    helper = subprocess.Popen([sys.executable, "-c", when_started + f"os.kill({parent}, signal.SIGINT)"])
    with pytest.raises(KeyboardInterrupt):
        record.call(path, str(said))
    helper.wait()
    assert said.read_text() == "saved"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_training_saves_when_its_parent_is_killed(script, tmp_path):
    said, path = tmp_path / "said", script(SLEEP)
    parent = os.fork()
    if parent == 0:
        subprocess.Popen([sys.executable, path, str(said)], preexec_fn=record.die_with_parent)
        time.sleep(60)
        os._exit(1)
    wait_for(said, "started")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(said, "saved")


def test_all_of_it_in_slices(tmp_path, monkeypatch, capsys):
    """The scripts run in this process; the first slice ends after one update."""
    called = []

    def call(script, *arguments, seconds=None, processes=1):
        called.append(script)
        with undisturbed():
            train.main([*arguments, *(["--max-steps", "1", "--threads", "1"] if called == ["train.py"] else [])])
        return True

    def evaluate(arguments):
        called.append("eval.py")
        with undisturbed():
            eval_script.main([*arguments, "--threads", "1"])

    monkeypatch.setattr(record, "call", call)
    monkeypatch.setattr(record, "eval_main", evaluate)
    monkeypatch.setattr("empf.training.session.has_matplotlib", lambda: False)
    monkeypatch.setattr(record, "SMOKE", {**record.SMOKE, "T": 2, "limit": 40, "batch_size": 20})
    command = ["--smoke", "--weights", "ternary", "--minutes", "9", "--runs"]
    record.main([*command, str(tmp_path / "here")])
    assert called == ["train.py"] and "the same command continues" in capsys.readouterr().out
    (tmp_path / "here" / "smoke-record-ternary").rename(tmp_path / "smoke-record-ternary")  # to another machine
    shutil.rmtree(tmp_path / "here")
    command += [str(tmp_path)]
    file = tmp_path / "smoke-record-ternary" / "record-ternary.json"
    assert not file.exists()
    record.main(command)
    assert called == ["train.py", "train.py", "eval.py", "eval.py"]
    result = json.loads(file.read_text())
    assert [e["epoch"] for e in result["epochs"]] == [1, 2] and result["test_images"] == 40
    assert len(result["accuracy"]) == 2 and result["accuracy"] == result["accuracy_unpacked"]
    packed = tmp_path / "smoke-record-ternary" / "packed.safetensors"
    assert result["file_mb"] == packed.stat().st_size / 1e6
    assert result["file_mb"] < (packed.parent / "model.safetensors").stat().st_size / 4e6
    assert result["recipe"]["weights"] == "ternary" and {"cpu", "date"} <= set(result["machine"])
    row = f"| ternary | 2 | {result['accuracy'][-1]:.2f} % | {result['file_mb']:.2f} MB |"
    row += f" {result['params_authors_mb']:.2f} MB |"
    assert 1.2 * result["params_mb"] < result["params_authors_mb"] <= 1.5 * result["params_mb"]
    assert row in capsys.readouterr().out
    record.main(command)  # all is done: nothing runs again
    assert len(called) == 4 and row in capsys.readouterr().out
    monkeypatch.setitem(record.SMOKE, "lr", 0.06)
    with pytest.raises(SystemExit, match=r"was started with other settings \({'lr': 0.05}\)"):
        record.main(command)
    monkeypatch.setitem(record.SMOKE, "lr", 0.05)
    monkeypatch.delitem(record.RECIPE, "seca")  # what a recipe does not name is the default
    with pytest.raises(SystemExit, match=r"was started with other settings \({'seca': 2}\)"):
        record.main(command)


def test_the_recipe_is_that_of_the_authors():
    authors = NAMED["authors"] | {"mixed_precision": record.RECIPE["mixed_precision"]}
    assert record.RECIPE.items() >= authors.items() and record.RECIPE["shortcut"] == "current"


def test_the_recipe_is_made_of_flags_of_train():
    for recipe in (record.RECIPE, {**record.RECIPE, **record.SMOKE}):
        for weights in record.WEIGHTS:
            flags = record.flags({**recipe, "weights": weights})
            config = settings.from_flags(vars(settings.parser().parse_args(flags)))
            assert config.to_dict().items() >= {**recipe, "weights": weights}.items()


def test_the_table_of_nothing_and_time_that_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.main(["--table"])
    assert capsys.readouterr().out.count("\n") == 2
    monkeypatch.setattr(record, "call", lambda *a, **k: pytest.fail("no time was left"))
    record.main(["--smoke", "--minutes", "0", "--runs", str(tmp_path)])
    assert "time is over" in capsys.readouterr().out
