"""Which weights are taken from another network, what is said about the others, and what stays frozen."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from train_tools import resume, run_train, trace

import empf
from empf import runs
from empf.deploy import hub
from empf.files import fingerprint
from empf.layer import active, enabled
from empf.training.fine_tuning import freeze, take_weights

SHAPE = dict(width=0.0625, in_channels=1, image_size=8, T=2)


def network(classes: int = 10, seed: int = 1, **config) -> empf.SpikingNetwork:
    torch.manual_seed(seed)
    return empf.resnet18(num_classes=classes, **{**SHAPE, **config})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on the digits, and a packed file of it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run_train("--epochs", "1", "--output-dir", run)
    empf.pack(empf.load(run)).save(run / "net.safetensors")
    return run


def differing(model, source) -> set[str]:
    found = source.state_dict()
    return {name for name, t in model.state_dict().items() if not torch.equal(t, found[name])}


def test_what_fits_is_taken_and_the_rest_is_listed():
    source, model = network(5, seed=2), network(5)
    assert differing(model, source)
    assert take_weights(model, source, ["a"] * 5) == "134 of 134 tensors"
    assert differing(model, source) == set()
    other = network(7)
    said = take_weights(other, source, ["a"] * 7)
    assert said == "132 of 134 tensors; not taken: head.weight (5x32 in it, 7x32 here), head.bias (5 in it, 7 here)"
    attention = network(5, seca=1)
    words = "; not taken: blocks.0.conv1.seca.conv.weight ({}), blocks.0.conv2.seca.conv.weight ({}), "
    assert words.format("not in it", "not in it") in take_weights(attention, source, ["a"] * 5)
    assert words.format("not here", "not here") in take_weights(source, attention, ["a"] * 5)
    attention = network(5, seca=1, T=3)
    said = take_weights(attention, source, ["a"] * 5)
    assert "blocks.0.conv1.neuron.leak_logit (2 in it, 3 here)" in said and said.endswith("more") and len(said) < 500
    with pytest.raises(ValueError, match="no weight of --init-from fits this network: give the --arch and --width"):
        take_weights(network(5, width=0.125), source, ["a"] * 5)


def test_other_classes_get_a_new_head_also_where_their_number_is_the_same(trained):
    source = empf.load(trained)
    digits = runs.read_config(trained)["classes"]
    for classes in (digits[::-1], [f"letter {n}" for n in range(10)]):
        model = network()
        assert "not taken: head.weight (other classes), head.bias (other classes)" in take_weights(
            model, source, classes
        )
        assert differing(model, source) == {"head.weight", "head.bias"}
    model = network()
    take_weights(model, source, digits)
    assert differing(model, source) == set()


def test_a_packed_file_gives_the_signs(trained):
    source, model = empf.load(trained), network()
    name = "blocks.1.conv1.conv.weight"
    size = model.state_dict()[name].abs().mean()
    said = take_weights(model, empf.load_packed(trained / "net.safetensors"), runs.read_config(trained)["classes"])
    assert "neuron.leak_logit (not in it)" in said
    assert torch.equal(model.state_dict()[name], source.state_dict()[name].sign() * size)
    assert torch.equal(model.head.weight, source.head.weight)
    fresh = network()
    assert torch.equal(model.blocks[1].conv1.bn.weight, fresh.blocks[1].conv1.bn.weight)


def test_a_run_a_file_a_packed_file_and_the_hub(trained, tmp_path, monkeypatch):
    """Without an update, so that the weights that a run starts with are those that it ends with."""
    empf.load(trained).save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(
        hub.hf, "hf_hub_download", lambda repo_id, filename, **_: local(tmp_path / "snapshot" / filename)
    )
    start = runs.load_state(trained)["model"]
    for at, source in enumerate([trained, trained / "model.safetensors", "someone/net", trained / "net.safetensors"]):
        run = tmp_path / f"run{at}"
        run_train("--epochs", "1", "--lr", "1e-30", "--weight-decay", "0", "--init-from", source, "--output-dir", run)
        found = runs.load_state(run)["model"]
        name = "blocks.2.conv2.conv.weight"
        if at < 3:
            assert torch.equal(found[name], start[name]) and torch.equal(found["head.bias"], start["head.bias"])
        else:
            assert torch.equal(found[name].sign(), start[name].sign()) and not torch.equal(found[name], start[name])
        log = (run / "log.txt").read_text()
        assert f"started from {source}: " in log and str(runs.read_config(run)["train"]["init_from"]) == str(source)


def local(path: Path) -> str:
    if not path.is_file():
        raise hub.hf.errors.EntryNotFoundError("404")
    return str(path)


def test_a_source_that_is_none_is_one_sentence(trained, tmp_path, monkeypatch):
    def refused(repo_id, filename, **_):
        raise OSError("no connection\nat all")

    monkeypatch.setattr(hub.hf, "hf_hub_download", refused)
    stray = tmp_path / "best.safetensors"
    stray.write_bytes((trained / "model.safetensors").read_bytes())
    (tmp_path / "empty").mkdir()
    for source, words in {
        "runs/typo": "no folder or file runs/typo, and the Hub gives no such network .no connection at all.: check",
        stray: "best.safetensors is not a packed",
        tmp_path / "empty": "is not a run folder",
        "": "init_from must not be empty: leave --init-from out",
    }.items():
        with pytest.raises(SystemExit, match=f"error: .*{words}"):
            run_train("--init-from", source, "--output-dir", tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_that_started_from_another_continues_without_it(trained, tmp_path):
    flags = ["--init-from", tmp_path / "source", "--freeze", "stem*, blocks.0.*", "--neuron", "mem_bn"]
    run_train("--epochs", "1", "--neuron", "mem_bn", "--output-dir", tmp_path / "source")
    flags += ["--epochs", "1"]
    run_train(*flags, "--output-dir", tmp_path / "whole")
    run_train(*flags, "--output-dir", tmp_path / "stopped", "--max-steps", "2")
    (tmp_path / "source").rename(tmp_path / "gone")
    resume(tmp_path / "stopped")
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags", [[], ["--optimizer", "muon", "--learning", "every", "--neuron", "mem_bn", "--ema", "0.5"]]
)
def test_frozen_parameters_and_their_statistics_stay(tmp_path, capsys, flags):
    """The stem and all up to the third block: nothing of them moves, everything behind does."""
    start, run = tmp_path / "start", tmp_path / "run"
    run_train(*flags, "--epochs", "1", "--output-dir", start)
    patterns = "stem*,blocks.0.*,blocks.1.*,blocks.2.conv1.conv.weight"
    run_train(*flags, "--epochs", "1", "--init-from", start, "--freeze", patterns, "--output-dir", run)
    source, model = empf.load(start), empf.load(run)
    moved, frozen = differing(model, source), freeze(empf.load(run), patterns)
    parts = ("stem", "blocks.0.", "blocks.1.", "blocks.2.conv1.conv.weight")
    assert not {name for name in moved if name.startswith(parts)}
    learns = {n for n, p in model.named_parameters() if n not in frozen and p.dim() > 1}
    assert learns and moved >= learns | {"blocks.2.conv1.bn.running_mean"}
    assert "blocks.0" in str(sorted(frozen)) and f"{len(frozen)} of " in capsys.readouterr().out
    state = runs.load_state(run)["optimizer"]
    assert sum(len(group["params"]) for group in state["param_groups"]) == len(list(model.parameters())) - len(frozen)
    assert "flipped" not in str(runs.read_metrics(run)[0]["health"]["warnings"])


def test_patterns_that_fit_nothing_or_everything_are_refused(tmp_path):
    for pattern, words in {
        "stem*,conv9*": "'conv9*' fits no parameter; some of their names: stem.conv.weight, blocks.",
        "*": "'*' leaves nothing to train; some of the names: stem.conv.weight, blocks.",
        "head*,": "'' fits no parameter",
    }.items():
        with pytest.raises(SystemExit, match=re.escape(f"error: --freeze {words}")):
            run_train("--freeze", pattern, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("patterns", ["stem*,blocks.0.*", "stem.conv*,blocks.1.conv2.conv*", "blocks.1.*,head*"])
def test_gradients_behind_and_before_frozen_parts(patterns):
    """With activations that are large enough to be made again: those of plain modules, and none of what is frozen."""
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for again in (True, False):
        torch.manual_seed(0)
        model = empf.resnet18(num_classes=5, width=0.125, T=2)
        model.blocks = model.blocks[:2]
        model.head = torch.nn.Linear(8, 5)
        frozen = freeze(model, patterns)
        with enabled(again):
            assert active(torch.empty(1, 16, 8, 32, 32)) == again
            empf.online_backward(model, images, torch.arange(16) % 5, F.cross_entropy, steps=[2])
        assert {name for name, p in model.named_parameters() if p.grad is None} >= frozen
        found.append({name: p.grad for name, p in model.named_parameters() if name not in frozen})
    assert found[0].keys() == found[1].keys() and all(grad is not None for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_calibration_leaves_a_frozen_mem_bn_alone():
    model = network(neuron="mem_bn")
    freeze(model, "blocks.0.conv1.*")
    before = fingerprint(model.blocks[0].conv1.state_dict())
    other = fingerprint(model.blocks[0].conv2.state_dict())
    empf.calibrate(model, [torch.randn(4, 1, 8, 8)])
    assert fingerprint(model.blocks[0].conv1.state_dict()) == before
    assert fingerprint(model.blocks[0].conv2.state_dict()) != other
