"""An interrupted run, continued, equals the uninterrupted one bit for bit, however it was interrupted."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from train_tools import TINY, Died, die_at, leftovers, resume, run_train, trace

import train
from empf import runs

SETTINGS = {
    "plain": [],
    "mixed": ["--mixup", "0.8", "--cutmix", "1", "--label-smoothing", "0.1", "--cutout", "2"],
    "muon": ["--optimizer", "muon", "--weights", "ternary"],
    "grow": ["--grow", "4:1:0.5", "--test-every", "2"],
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
    assert f"continue with: python -m empf train --resume {run}" in capsys.readouterr().out
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


def test_a_folder_without_its_training_is_not_continued(uninterrupted, tmp_path):
    """As `save_pretrained` writes it for a model whose run is not known."""
    run = shutil.copytree(uninterrupted["plain"], tmp_path / "run")
    config = runs.read_config(run) | {"train": {}}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="error: .*run does not say on which data it was trained: give a run folder"):
        resume(run)


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


def test_processes_that_cannot_share_the_batch_are_refused(uninterrupted, tmp_path, monkeypatch):
    """Another number of processes keeps the joined batch, here 32 images (see test_distributed.py)."""
    run = tmp_path / "run"
    run_train("--output-dir", run, "--max-steps", "1")
    monkeypatch.setattr(Accelerator, "num_processes", 5)
    with pytest.raises(SystemExit, match="error: the run has 32 images .* 5 processes cannot share: .*8, 16 or 32"):
        resume(run)
    monkeypatch.undo()
    resume(run)
    assert trace(run) == trace(uninterrupted["plain"])


def test_a_checkpoint_in_another_memory_layout_continues(tmp_path):
    """Of the weights and of their momentum: files of older versions are not channels_last."""
    run = tmp_path / "run"
    run_train("--width", "0.25", "--epochs", "1", "--output-dir", tmp_path / "whole")
    run_train("--width", "0.25", "--epochs", "1", "--output-dir", run, "--max-steps", "2")
    state = runs.load_state(run)
    layouts = {tensor.is_contiguous(memory_format=torch.channels_last) for tensor in convolutions(state)}
    assert layouts == {True}
    state["model"] = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    for slot in state["optimizer"]["state"].values():
        slot["momentum_buffer"] = slot["momentum_buffer"].contiguous()
    runs.save_state(run, state)
    resume(run)
    assert trace(run) == trace(tmp_path / "whole")


def convolutions(state: dict) -> list[torch.Tensor]:
    """Weights with a kernel of 3x3 and several input channels: where the layouts differ."""
    return [tensor for tensor in state["model"].values() if tensor.dim() == 4 and min(tensor.shape[1:]) > 1]


def test_accumulation_continues_exactly(tmp_path):
    """6 batches in groups of 4 and 2, with one update each."""
    flags = ["--batch-size", "16", "--accumulate", "4"]
    run_train(*flags, "--output-dir", tmp_path / "whole")
    run_train(*flags, "--output-dir", tmp_path / "stopped", "--max-steps", "3")
    position = runs.load_state(tmp_path / "stopped")["at"]
    assert (position["epoch"], position["batch"]) == (1, 4)
    resume(tmp_path / "stopped")
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")


def test_checkpoint_of_another_architecture_is_refused(uninterrupted, tmp_path):
    run = tmp_path / "run"
    run_train("--output-dir", run, "--width", "0.125", "--max-steps", "1")
    (run / "config.json").write_bytes((uninterrupted["plain"] / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="error: .* belongs to another architecture than the configured resnet18"):
        resume(run)


def without(name: str):
    return lambda state: state.pop(name)


def put(*path, value):
    def change(state):
        *parents, last = path
        for name in parents:
            state = state[name]
        state[last] = value

    return change


DAMAGES = {
    **{f"without {n}": without(n) for n in ("at", "history", "processes", "rng", "model", "optimizer", "average")},
    "at a list": put("at", value=[]),
    "epoch a text": put("at", "epoch", value="1"),
    "epoch beyond the history": put("at", "epoch", value=7),
    "batch below 0": put("at", "batch", value=-1),
    "batch beyond the epoch": put("at", "batch", value=99),
    "sums of two": put("at", "sums", value=[0.0, 0.0]),
    "sums not finite": put("at", "sums", value=[float("nan")] * 3),
    "seconds a text": put("at", "seconds", value="x"),
    "begun by none": put("at", "begun_by", value=0),
    "history of numbers": put("history", value=[3]),
    "no processes": put("processes", value=0),
    "random state cut": put("rng", value=torch.zeros(3, dtype=torch.uint8)),
    "random state a list": put("rng", value=[1]),
    "model a tensor": put("model", value=torch.ones(1)),
    "optimizer empty": put("optimizer", value={}),
    "groups gone": put("optimizer", "param_groups", value=[]),
    "a group without rate": lambda state: state["optimizer"]["param_groups"][0].pop("lr"),
    "momentum of another shape": lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.ones(1)),
    "momentum of a parameter more": lambda state: state["optimizer"]["state"].update({999: {"m": torch.ones(1)}}),
    "momentum a number": lambda state: state["optimizer"]["state"].update({0: 3}),
    "average a list": put("average", value=[]),
    "average not finite": lambda state: state["average"]["module.head.weight"].fill_(float("nan")),
    "momentum not finite": lambda state: state["optimizer"]["state"][0]["momentum_buffer"].fill_(float("inf")),
    "weights sparse": lambda state: put("model", "head.bias", value=state["model"]["head.bias"].to_sparse())(state),
    "weights on meta": lambda state: put("model", "head.bias", value=state["model"]["head.bias"].to("meta"))(state),
    "weights a number": put("model", "head.weight", value=3),
    "history without a loss": lambda state: state["history"][0].pop("loss"),
    "history of a text": put("history", 0, "loss", value="\x1b]0;x\x07"),
    "history without steps": put("history", 0, "accuracy", value=[]),
    "history without layers": put("history", 0, "health", "density", value=3),
    "history of layers without numbers": put("history", 0, "health", "flips", value={"a": None}),
    "history without warnings": lambda state: state["history"][0]["health"].pop("warnings"),
    "history of another epoch": put("history", 0, "epoch", value=5),
    "too many processes": put("processes", value=10**30),
    "begun by too many": put("at", "begun_by", value=10**30),
    "health without layers": put("health", "states", value={}),
    "health a text": put("health", "seen", value="x"),
    "health of no spikes": put("health", "seen", "density", "blocks.0.conv1.neuron", value=[1.0, 0]),
    "health of no shape": put("health", "stateful", value={"blocks.0.conv1.neuron": 3}),
    "health of a state elsewhere": put("health", "stateful", value={"elsewhere": [1]}),
    "health beyond all numbers": put("health", "seen", "density", "blocks.0.conv1.neuron", value=[float("inf"), 1]),
    "history of long numbers": put("history", 0, "loss", value=10**400),
    "accuracies of long numbers": put("history", 0, "accuracy", value=[1.0, 10**400]),
    "batch of a long number": put("at", "batch", value=2**63),
    "health of other layers": put("health", "seen", "density", value={"elsewhere": [0.0, 1]}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_part_that_is_missing_or_wrong_is_one_sentence(stopped, tmp_path, name):
    run = shutil.copytree(stopped, tmp_path / "run")
    state = runs.load_state(run)
    DAMAGES[name](state)
    runs.save_state(run, state)
    before = (run / "state" / "state.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        resume(run)
    message = str(stop.value)
    assert message.startswith("error: ") and message.isprintable()
    assert re.search(r"state.pt is damaged \(.*\): restore it from a copy or start anew$", message), message
    assert (run / "state" / "state.pt").read_bytes() == before


def test_the_settings_of_the_optimizer_are_those_of_the_run(stopped, tmp_path):
    """Whatever the checkpoint says of them."""
    for name, change in (("run", {}), ("altered", {"lr": float("inf"), "momentum": 1e300, "weight_decay": 7.0})):
        run = shutil.copytree(stopped, tmp_path / name)
        state = runs.load_state(run)
        for group in state["optimizer"]["param_groups"]:
            group |= change
        runs.save_state(run, state)
        resume(run)
    assert trace(tmp_path / "altered") == trace(tmp_path / "run")


def test_a_tensor_of_another_network_is_named(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    state = runs.load_state(run)
    state["model"]["head.weight"] = torch.ones(1)
    runs.save_state(run, state)
    with pytest.raises(SystemExit, match="error: .* belongs to another architecture .*: head.weight differs"):
        resume(run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run with an average that was stopped within its second epoch."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    run_train("--ema", "0.9", "--output-dir", run, "--max-steps", "4")
    return run
