"""The run folder: whole files or the old ones, and one sentence for everything that can be wrong with it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from train_tools import leftovers, run_train

import empf
from empf import runs
from empf.files import fingerprint
from empf.machine import git_commit
from empf.training.config import training_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    run_train("--epochs", "1", "--output-dir", run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


# ---- writing


def test_new_folder_takes_the_next_free_name(tmp_path):
    base = tmp_path / "runs" / "digits-resnet18"
    folders = [runs.new_folder(base) for _ in range(3)]
    assert [folder.name for folder in folders] == ["digits-resnet18", "digits-resnet18-2", "digits-resnet18-3"]
    assert all(folder.is_dir() for folder in folders)


def test_leftovers_go_and_files_stay(run):
    for name in (".config.json.123.tmp", "state/.state.pt.456.tmp"):
        (run / name).touch()
    (run / "notes.tmp").touch()
    runs.remove_leftovers(run)
    assert leftovers(run) == ["notes.tmp"]


# ---- reading


def test_load_rebuilds_the_trained_network(run):
    model = empf.load(run)
    assert not model.training and model.config.T == 2 and model.config.width == 0.0625
    state = runs.load_state(run)
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())


def test_config_says_what_ran(run):
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == config["train"]["seed"] == 0
    assert config["model"] == empf.load(run).config.to_dict()
    assert config["classes"] == [str(digit) for digit in range(10)]
    assert config["normalisation"] == {"mean": [0.3054], "std": [0.3760]}
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["empf"] == empf.__version__
    assert f'\nversion = "{empf.__version__}"\n' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert {"triton", "accelerate", "datasets", "numpy", "python"} < set(config["versions"])


def test_git_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Not of the repository in which someone has installed it."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    if shutil.which("git") is None:
        pytest.skip("needs git")
    code = tmp_path / "empf" / "runs.py"
    monkeypatch.setattr("empf.machine.__file__", str(code))
    code.parent.mkdir()
    code.write_text("first")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() == head
    code.write_text("changed")
    assert git_commit() == f"{head}-dirty"
    installed = tmp_path / "venv" / "site-packages" / "empf"
    installed.mkdir(parents=True)
    monkeypatch.setattr("empf.machine.__file__", str(installed / "runs.py"))
    assert git_commit() is None


def edit_config(run: Path, change) -> None:
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


def edit_weights(run: Path, change) -> None:
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, run / "model.safetensors")


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


DAMAGES = {
    "no folder": (lambda run: shutil.rmtree(run), "is not a run folder, it has no config.json"),
    "no config": (lambda run: (run / "config.json").unlink(), "is not a run folder, it has no config.json"),
    "config cut": (lambda run: cut(run / "config.json", 0.5), "config.json is damaged"),
    "config empty": (lambda run: cut(run / "config.json", 0), "config.json is damaged"),
    "config binary": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "config a list": (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
    "config without model": (lambda run: edit_config(run, lambda c: c.pop("model")), "config.json is damaged"),
    "config of text": (lambda run: edit_config(run, lambda c: c.update(model="x")), "config.json is damaged"),
    "config nested": (lambda run: (run / "config.json").write_text("[" * 100_000), "config.json is damaged"),
    "classes a number": (lambda run: edit_config(run, lambda c: c.update(classes=3)), "damaged (classes or normal"),
    "classes of numbers": (lambda run: edit_config(run, lambda c: c.update(classes=[3])), "damaged (classes or norm"),
    "mean a text": (lambda run: edit_config(run, lambda c: c["normalisation"].update(mean="x")), "damaged (classes"),
    "config of the future": (
        lambda run: edit_config(run, lambda c: c.update(format=99)),
        "has format 99, this version",
    ),
}
MODEL_DAMAGES = {
    "no weights": (
        lambda run: (run / "model.safetensors").unlink(),
        "model.safetensors is missing: train for at least",
    ),
    "weights cut": (lambda run: cut(run / "model.safetensors", 0.7), "model.safetensors is damaged"),
    "weights empty": (lambda run: cut(run / "model.safetensors", 0), "model.safetensors is damaged"),
    "weights noise": (lambda run: (run / "model.safetensors").write_bytes(bytes(99)), "model.safetensors is damaged"),
    "another width": (
        lambda run: edit_config(run, lambda c: c["model"].update(width=0.125)),
        "belongs to another architecture than the configured resnet18: blocks.0.conv1.bn.bias differs",
    ),
    "images that are too small": (
        lambda run: edit_config(run, lambda c: c["model"].update(arch="vgg_snn")),
        "run/config.json: vgg_snn pools four times and needs images of at least 16x16, got 8; use the version",
    ),
    "another neuron": (
        lambda run: edit_config(run, lambda c: c["model"].update(neuron="lif")),
        "belongs to another architecture than the configured resnet18: blocks.0.conv1.neuron.leak_logit is not part",
    ),
    "another attention": (
        lambda run: edit_config(run, lambda c: c["model"].update(seca=1)),
        "belongs to another architecture than the configured resnet18: blocks.0.conv1.seca.conv.weight is missing",
    ),
    "huge width": (
        lambda run: edit_config(run, lambda c: c["model"].update(width=64.0)),
        "belongs to another architecture than the configured resnet18: blocks.0.conv1.bn.bias differs",
    ),
    "huge T": (lambda run: edit_config(run, lambda c: c["model"].update(T=10**9)), "T must be at most 4,096"),
    "many classes": (
        lambda run: edit_config(run, lambda c: c["model"].update(num_classes=10**6)),
        "belongs to another architecture than the configured resnet18: head.bias differs",
    ),
    "too many classes": (
        lambda run: edit_config(run, lambda c: c["model"].update(num_classes=10**19)),
        "num_classes must be at most 1,000,000",
    ),
    "huge images": (
        lambda run: edit_config(run, lambda c: c["model"].update(image_size=10**9)),
        "image_size must be at most 4,096",
    ),
    "hostile name": (
        lambda run: edit_config(run, lambda c: c["model"].update({"\x1b]0;x\x07" + 9999 * "y": 1})),
        "run/config.json: unknown model setting ?]0;x?yyy",
    ),
    "hostile tensor": (
        lambda run: safetensors.torch.save_file({"\x1b]0;x\x07\n" * 999: torch.ones(1)}, run / "model.safetensors"),
        "is not part of the model",
    ),
    "numbers not finite": (
        lambda run: edit_weights(run, lambda t: t["head.bias"].fill_(float("nan"))),
        "model.safetensors is damaged (head.bias holds numbers of another type, or not finite): restore it",
    ),
    "another type": (
        lambda run: edit_weights(run, lambda t: t.update({"head.bias": t["head.bias"].int()})),
        "model.safetensors is damaged (head.bias holds numbers of another type, or not finite): restore it",
    ),
    "unknown setting": (
        lambda run: edit_config(run, lambda c: c["model"].update(depth=3)),
        "run/config.json: unknown model setting depth: ",
    ),
}


@pytest.mark.parametrize("name", [*DAMAGES, *MODEL_DAMAGES])
def test_a_damaged_model_is_one_sentence(run, name):
    damage, sentence = {**DAMAGES, **MODEL_DAMAGES}[name]
    damage(run)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        empf.load(run)
    assert sentence in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 900


def test_nothing_is_built_before_the_sizes_are_known(run, monkeypatch):
    edit_config(run, lambda c: c["model"].update(width=64.0))
    real, built = runs.build, []

    def noted(config):
        model = real(config)
        built.append({p.device.type for p in model.parameters()})
        return model

    monkeypatch.setattr(runs, "build", noted)
    with pytest.raises(ValueError, match="differs"):
        empf.load(run)
    assert built == [{"meta"}]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "3",
        '{"epoch": 1, "accuracy": [NaN]}',
        '{"epoch": 1, "loss": "\x1b"}',
        '{"epoch": 1, "weights": [1]}',
        '{"epoch": "x"}',
        f'{{"epoch": 1, "accuracy": [{10**400}]}}',
        f'{{"epoch": 1, "loss": {10**400}}}',
        f'{{"epoch": {2**63}}}',
        '{"epoch": 1, "health": {"warnings": 3}}',
        "{",
    ],
)
def test_damaged_metrics_are_one_sentence(run, line):
    (run / "metrics.jsonl").write_text('{"epoch": 1, "accuracy": [1.0]}\n' + line)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged: restore it from a copy of the run"):
        runs.read_metrics(run)


def test_the_last_line_names_the_weights(run):
    (record,) = runs.read_metrics(run)
    assert record["weights"] == runs.identity(empf.load(run))


@pytest.mark.parametrize("place", [("normalisation", "mean"), ("data", "images"), ("train", "save_minutes")], ids=str)
def test_numbers_that_no_tensor_holds_are_one_sentence(run, place):
    """Python has whole numbers of any length; they overflow where a fraction or 64 bits are wanted."""
    config = runs.read_config(run)
    part, name = place
    config[part][name] = [10**400] if name == "mean" else 10**400
    runs.write_config(run, config)
    with pytest.raises(ValueError, match=r"config.json is damaged \(a whole number of 401 digits\): restore it"):
        empf.load(run)


NETWORK = ("shortcut", "granularity", "seca_bias", "spike_gradient")
OLDER_LACK = {"model": NETWORK, "train": (*NETWORK, "recipe", "latent_init", "stem_init", "decay_all")}


def test_a_folder_of_an_older_version(run):
    """Settings that it does not have are at their defaults, and its weights are still those that were measured."""
    now, settings = empf.load(run), training_of(runs.read_config(run), run)
    for part, later in OLDER_LACK.items():
        edit_config(run, lambda c, part=part, later=later: [c[part].pop(name) for name in later])
    then = empf.load(run)
    assert training_of(runs.read_config(run), run) == settings
    assert then.config == now.config and runs.identity(then) == runs.identity(now)
    text = json.dumps(runs.read_config(run)["model"], sort_keys=True)
    assert runs.identity(then) == fingerprint(then.state_dict(), text)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: c["train"].update(epoch=3), "run/config.json: unknown setting epoch; use the version that wrote it"),
        (lambda c: c["train"].update(T="4"), "run/config.json: T must be int, got '4'; use the version that wrote it"),
        (
            lambda c: c.update(train={}),
            "run does not say on which data it was trained: give a run folder that train.py",
        ),
    ],
)
def test_the_training_of_a_run_or_one_sentence(run, change, sentence):
    """Without a training: a folder of the Hub."""
    config = runs.read_config(run)
    assert training_of(config, run).to_dict() == config["train"]
    change(config)
    with pytest.raises(ValueError) as error:
        training_of(config, run)
    assert sentence in str(error.value)


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 0xFF
    path.write_bytes(data)


STATE_DAMAGES = {
    "missing": (lambda state: state.unlink(), "there is no checkpoint in"),
    "cut": (lambda state: cut(state, 0.7), "state.pt is damaged"),
    "empty": (lambda state: cut(state, 0), "state.pt is damaged"),
    "noise": (lambda state: state.write_bytes(os.urandom(5000)), "state.pt is damaged"),
    "text": (lambda state: state.write_text("hello\n" * 100), "state.pt is damaged"),
    "one byte": (lambda state: flip(state, 0.5), "state.pt is damaged"),
    "something else": (lambda state: torch.save([1], state), "state.pt is not a checkpoint of this version"),
    "code": (lambda state: torch.save({"format": 1, "x": Path("x")}, state), "state.pt is damaged"),
}


@pytest.mark.parametrize("name", STATE_DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(run, name):
    damage, sentence = STATE_DAMAGES[name]
    damage(run / "state" / "state.pt")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        runs.load_state(run)
    assert sentence in str(error.value) and "\n" not in str(error.value)


# ---- the lock


def test_a_folder_is_held_by_one_and_a_dead_one_holds_nothing(tmp_path):
    with runs.held(tmp_path):
        assert (tmp_path / "state" / "owner").read_text().startswith(f"process {os.getpid()} on ")
        held_again = runs.held(tmp_path)
        with pytest.raises(ValueError, match=f"is being trained by process {os.getpid()} on .*: wait for its end"):
            held_again.__enter__()
    (tmp_path / "state" / "owner").write_text("process 4711 on nowhere")
    with runs.held(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "state" / "owner").read_text()
    assert not (tmp_path / "state" / "owner").exists()


def test_begun_is_what_has_made_an_update(run, tmp_path):
    assert runs.begun(run) and not runs.begun(tmp_path / "none")
    state = runs.load_state(run)
    runs.save_state(run, state | {"at": {**state["at"], "epoch": 0}, "history": []})
    assert not runs.begun(run)
    (run / "state" / "state.pt").write_bytes(b"")
    assert runs.begun(run)
