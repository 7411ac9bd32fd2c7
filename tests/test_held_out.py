"""What is held out of the training set: it chooses the best epoch and when to stop, and the test set does not."""

import io
import json
import re
import shutil
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from make_data import image_folder
from train_tools import Died, die_at, leftovers, metrics, resume, run_train, trace

import empf
import eval
from empf import runs
from empf.data.events import EventSet
from empf.data.load import keep_apart, load_data, make_batches
from empf.data.sets import DATASETS, is_held_out
from empf.deploy.hub import model_card
from empf.deploy.origin import Origin
from empf.deploy.pack import pack
from empf.training.curves import plot_curves
from empf.training.session import Session

SMALL = ["--T", "1", "--limit", "60", "--batch-size", "16", "--no-health"]
HOLD = ["--hold-out", "0.25", "--epochs", "6", *SMALL]  # 2 batches in an epoch
HELD = [3, 6, 5, 6, 2, 9]  # correct, by epoch
TEST = [40, 10, 20, 30, 35, 20]


@contextmanager
def scripted():
    """What the two sets say after each epoch, whatever was trained."""
    record = Session.record

    def by_epoch(self, test, held):
        epoch = self.at["epoch"]
        record(self, [float(TEST[epoch]), 1.0], [float(HELD[epoch]), 1.0])

    with patch.object(Session, "record", by_epoch):
        yield


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run whose best epoch is the second of four (the test set likes others), and what it said."""
    run, said = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with scripted(), redirect_stdout(said):
        run_train(*HOLD, "--patience", "2", "--output-dir", run)
    return run, said.getvalue().splitlines()


def results(run: Path) -> tuple:
    return (run / "best.safetensors").read_bytes(), trace(run)


# ---- the part


def pixels(data) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in make_batches(data, 7, train=False) for image in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data"), "cifar10", train=40, test=20)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_part_of_each_class_is_kept_apart_beside_the_test_images(folder, streaming):
    images, test = load_data("cifar10", folder, streaming=streaming)
    train, held = keep_apart(images, test, 0.25)
    parts = [pixels(part) for part in (train, held)]
    assert sorted(chain(*parts)) == sorted(pixels(images)) and not set(parts[0]) & set(parts[1])
    labels = held.labels() if streaming else held.labels
    assert len(train) == 30 and np.bincount(labels).tolist() == [1] * 10
    assert is_held_out(held) and not is_held_out(test)
    assert pixels(keep_apart(*load_data("cifar10", folder, streaming=streaming), 0.25)[1]) == parts[1]
    assert keep_apart(images, test, None) == (images, None)
    assert keep_apart(train, held, 0.25) == (train, None)  # what is tested on was held out already


def test_recordings_are_kept_apart_too():
    frames, labels = torch.rand(20, 2, 2, 4, 4).half(), torch.arange(20) % 2
    events = EventSet(frames, labels, ["left", "right"], DATASETS["dvs-cifar10"], "folders")
    train, held = keep_apart(events, events, 0.2)
    assert (len(train), len(held)) == (16, 4) and held.labels.bincount().tolist() == [2, 2]


def test_a_class_of_one_image_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="error: class '.' has a single image, .* of its own without --hold-out"):
        run_train("--limit", "12", "--hold-out", "0.1", "--output-dir", tmp_path / "run")


# ---- the best epoch


def test_the_best_epoch_is_kept_and_patience_ends(stopped_early, tmp_path):
    """The first of two that are equally good; the test set has no say."""
    run, out = stopped_early
    assert "; 45 training, 15 held-out, 60 test images; 0.25 of the training data, held out with seed 0" in out[0]
    assert "  held out 40.00 %  test after each step 16.67 %" in out[3]
    end = "finished after 2 epochs without a better held-out accuracy; evaluate it with"
    assert out[-3] == f"{end}: python -m empf eval {run}"
    assert out[-2] == f"best held-out accuracy: 40.00 % in epoch 2: python -m empf eval {run / 'best.safetensors'}"
    records = metrics(run)
    assert [r["held_out"][-1] for r in records] == [100 * h / 15 for h in HELD[:4]]
    assert ["weights" in r for r in records] == [True, True, False, True]
    with scripted():
        run_train(*HOLD, "--max-steps", "4", "--output-dir", tmp_path / "two")
    assert (run / "best.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    assert (run / "best.safetensors").read_bytes() != (run / "model.safetensors").read_bytes()
    assert leftovers(run) == ["best.safetensors"]


def test_the_best_weights_can_be_evaluated_packed_and_published(stopped_early, tmp_path, capsys):
    """With the accuracy that they had on the test set, not with that of the last epoch."""
    run, _ = stopped_early
    best = run / "best.safetensors"
    model = empf.load(best)
    assert model.run == run and empf.from_pretrained(best).config == model.config
    origin = Origin.of(model)
    assert origin.accuracy == tuple(metrics(run)[1]["accuracy"]) and origin.epochs == 2
    assert empf.pack(model).origin == origin != Origin.of(empf.load(run))
    model.save_pretrained(tmp_path / "hub")
    assert Origin.of(empf.from_pretrained(tmp_path / "hub")) == origin
    found, packed = tmp_path / "found.json", tmp_path / "net.safetensors"
    eval.main([str(best), "--json", str(found), "--pack", str(packed), "--limit", "32", "--threads", "1"])
    result = json.loads(found.read_text())
    assert result["file_mb"] > 0 and "best.safetensors on disk" in capsys.readouterr().out
    assert empf.load_packed(packed).origin == origin
    with pytest.raises(SystemExit, match="error: .* is a file of a run"):
        eval.main([str(best), "--json", str(best), "--limit", "32", "--threads", "1"])
    stray = shutil.copy(best, tmp_path / "best.safetensors")
    with pytest.raises(SystemExit, match="error: .*best.safetensors is not a packed"):
        eval.main([str(stray), "--limit", "32"])


def test_without_a_test_split_the_part_that_is_tested_chooses(folder, tmp_path, capsys):
    run = tmp_path / "run"
    run_train("--dataset", folder / "train", "--batch-size", "12", "--patience", "9", "--output-dir", run)
    out = capsys.readouterr().out
    tested_on = "0.1 of the training data, held out with seed 0, also used to choose the epoch"
    assert f"; 30 training, 10 test images; tested on {tested_on}\n" in out and "%  held out after each step" in out
    assert re.search(
        r"best held-out accuracy: \d+\.00 % in epoch \d, optimistic, for it chose the epoch: python -m empf eval", out
    )
    records = metrics(run)
    assert [r["held_out"] for r in records] == [r["accuracy"] for r in records]
    assert {r["tested_on"] for r in records} == {tested_on}
    best = empf.load(run / "best.safetensors")
    card = str(model_card(pack(best)))
    assert (
        best.config.num_classes == 10 and f"| held-out images | {tested_on} |" in card and "test accuracy" not in card
    )
    resume(run, "--patience", "1")  # nothing to do, or nothing better
    assert len(metrics(run)) == 2


def test_patience_wants_a_held_out_part(tmp_path):
    with pytest.raises(SystemExit, match="error: --patience needs images that are held out .*: add --hold-out 0.1"):
        run_train("--patience", "3", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_held_out_unless_it_is_asked_for(tmp_path):
    run_train("--epochs", "1", *SMALL, "--output-dir", tmp_path / "run")
    assert leftovers(tmp_path / "run") == [] and "held_out" not in metrics(tmp_path / "run")[0]


# ---- interruptions


@pytest.mark.parametrize("batches", [3, 4, 5], ids=str)  # within the best epoch, at its end, after it
def test_best_epoch_and_patience_survive_a_stop(stopped_early, tmp_path, batches):
    run = tmp_path / "stopped"
    with scripted():
        run_train(*HOLD, "--patience", "2", "--output-dir", run, "--max-steps", batches)
        resume(run)
    assert results(run) == results(stopped_early[0])


@pytest.mark.parametrize("call", [7, 8, 9, 10])
def test_best_epoch_and_patience_survive_death_at_every_write(stopped_early, tmp_path, monkeypatch, call):
    """Of the second epoch, which is better than the first: state, weights, best weights, metrics."""
    run = tmp_path / "died"
    die_at(monkeypatch, call)
    with scripted(), pytest.raises(Died):
        run_train(*HOLD, "--patience", "2", "--output-dir", run)
    monkeypatch.undo()
    with scripted():
        resume(run)
    assert results(run) == results(stopped_early[0])


def test_a_run_that_lost_patience_goes_on_with_more_of_it(stopped_early, tmp_path):
    run = shutil.copytree(stopped_early[0], tmp_path / "copy")
    before = results(run)
    with scripted():
        resume(run)  # nothing to do
        assert results(run) == before
        resume(run, "--patience", "9")
    assert len(metrics(run)) == 6 and runs.best_epoch(metrics(run)) == 6
    assert (run / "best.safetensors").read_bytes() == (run / "model.safetensors").read_bytes() != before[0]


# ---- more epochs


def test_a_constant_schedule_can_go_on_for_more_epochs(tmp_path):
    flags = ["--schedule", "constant", "--hold-out", "0.25", *SMALL]
    run_train(*flags, "--epochs", "2", "--output-dir", tmp_path / "whole")
    run_train(*flags, "--epochs", "1", "--output-dir", tmp_path / "more")
    resume(tmp_path / "more", "--epochs", "2", "--max-steps", "1")
    assert runs.read_config(tmp_path / "more") == runs.read_config(tmp_path / "whole") | {
        "train": runs.read_config(tmp_path / "whole")["train"] | {"output_dir": str(tmp_path / "more")}
    }
    resume(tmp_path / "more")
    assert results(tmp_path / "more") == results(tmp_path / "whole")
    with pytest.raises(SystemExit, match="error: the run was started with epochs = 2, not 1: leave --epochs out"):
        resume(tmp_path / "more", "--epochs", "1")


def test_a_cosine_cannot_go_on(stopped_early):
    with pytest.raises(SystemExit, match="error: the run was started with epochs = 6, not 9: its learning rate falls"):
        resume(stopped_early[0], "--epochs", "9")


# ---- what is drawn


def test_the_curves_show_what_was_held_out(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr("empf.training.curves.save_figure", lambda plt, fig, *_, **__: seen.append(fig.axes[1]))
    held = {1: 5.0, 2: 9.0, 3: 7.0}
    history = [{"epoch": e, "loss": 1.0, "accuracy": [10.0 * e], "held_out": [h]} for e, h in held.items()]
    plot_curves(tmp_path, history, "title")
    (drawn,) = [line for line in seen[0].lines if line.get_label() == "held out, best in epoch 2"]
    assert list(drawn.get_ydata()) == list(held.values())
