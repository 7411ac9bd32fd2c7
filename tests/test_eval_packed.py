"""eval.py on packed files: the same table, packing with its check, and the classes of a picture."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_tools import logits, trained
from PIL import Image

import empf
import eval
from empf.deploy import cpu_conv
from empf.deploy.origin import Origin
from empf.deploy.pack import load_packed, pack, pack_to_file
from empf.runs import save_config, save_results
from empf.terminal import shown
from eval import main

NUMBERS = (
    "accuracy",
    "neurons",
    "nops",
    "params_full_mb",
    "params_mb",
    "params_authors_mb",
    "sops",
    "energy_mj",
    "macs",
    "energy_full_mj",
)


def run_eval(*flags: str | Path) -> None:
    threads = torch.get_num_threads()
    try:
        main([*map(str, flags), "--threads", "1"])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model, _ = trained(neuron="mem_bn", weights="ternary")
    train = {"dataset": "digits", "data": None, "seed": 0, "mixed_precision": "no"}
    save_config(folder, model.config, train, [f"digit {i}" for i in range(10)], (0.3054,), (0.376,))
    save_results(folder, model, [{"epoch": 1, "loss": 1.0, "accuracy": [50.0] * 3}])
    return folder


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory) -> tuple[Path, dict]:
    """(packed file, what evaluating the run and packing it gave)."""
    folder = tmp_path_factory.mktemp("packed")
    run_eval(run, "--limit", "96", "--pack", folder / "net.safetensors", "--json", folder / "run.json")
    return folder / "net.safetensors", json.loads((folder / "run.json").read_text())


def test_packing_checks_the_logits_and_reports_the_size(run, packed):
    file, result = packed
    found = result["packed"]
    assert found["file"] == file.name and found["file_mb"] == file.stat().st_size / 1e6 < result["file_mb"] / 8
    assert found["images"] == 96 and found["same_class"] == 1 and 0 < found["relative_difference"] < 1e-5
    assert load_packed(file).origin.classes[3] == "digit 3"


def test_a_packed_file_has_the_numbers_of_its_run(packed, tmp_path, capsys):
    file, result = packed
    run_eval(file, "--limit", "96", "--json", tmp_path / "packed.json")
    found = json.loads((tmp_path / "packed.json").read_text())
    for name in NUMBERS:
        assert found[name] == pytest.approx(result[name], rel=1e-3), name
    assert found["density"] == pytest.approx(result["density"], rel=1e-2)
    assert found["file_mb"] == result["packed"]["file_mb"]
    printed = capsys.readouterr().out
    assert "packed file on disk" in printed and "model.safetensors" not in printed
    assert found["training"]["dataset"] == "digits" and found["training"]["accuracy"] == [50.0] * 3


def test_the_table_of_a_run_says_what_packing_gave(run, tmp_path, capsys):
    run_eval(run, "--limit", "32", "--pack", tmp_path / "small.safetensors")
    printed = capsys.readouterr().out
    assert "small.safetensors on disk" in printed and "MB (packed)" in printed
    assert "100.00 % of the classes are the same" in printed


def test_the_five_most_probable_classes(packed, tmp_path, capsys):
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "cat.png")
    run_eval(packed[0], "--image", tmp_path / "cat.png")
    lines = [line.split("%") for line in capsys.readouterr().out.splitlines()]
    shares = [float(share) for share, _ in lines]
    assert len(lines) == 5 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.01
    assert all(name.strip() in {f"digit {i}" for i in range(10)} for _, name in lines)


def test_the_prediction_is_followed_frame_by_frame(tmp_path, capsys):
    model, x = trained("vgg_snn")
    pack(model).save(tmp_path / "net.safetensors")
    frames = x[:, 0]  # T 2 H W
    np.savez(tmp_path / "frames.npz", frames.numpy())
    run_eval(tmp_path / "net.safetensors", "--stream", tmp_path / "frames.npz")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    so_far = logits(model, frames.unsqueeze(1))[:, 0].cumsum(0) / torch.arange(1, 4).view(-1, 1)
    shares, best = so_far.softmax(-1).max(-1)
    assert [line[:2] for line in lines] == [["frame", "1"], ["frame", "2"], ["frame", "3"]]
    assert [float(line[2]) for line in lines] == pytest.approx((100 * shares).tolist(), abs=0.01)
    assert [int(line[5]) for line in lines] == best.tolist()  # "class 7"


def test_what_is_wrong_is_one_sentence(run, packed, tmp_path, capsys):
    file = packed[0]
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-5])
    nameless = pack(empf.load(run))
    nameless.origin = Origin()
    nameless.save(tmp_path / "nameless.safetensors")
    weights = (run / "model.safetensors").read_bytes()
    for flags, sentence in (
        ([file, "--pack", tmp_path / "x"], "is packed already: --pack takes a run folder"),
        ([run, "--image", tmp_path / "x"], "--image takes a packed file"),
        ([file, "--image", tmp_path / "none.png"], "no image"),
        ([file, "--stream", tmp_path / "none.npz"], "needs a network for events of 2 polarities"),
        ([tmp_path / "cut.safetensors"], "cut.safetensors is damaged"),
        ([tmp_path / "nameless.safetensors"], "does not say on which data it was trained"),
        ([run, "--pack", "/dev/null/net.safetensors"], "could not write /dev/null/net.safetensors"),
        ([run, "--pack", run / "model.safetensors"], "model.safetensors exists and is not a packed network"),
        ([run, "--pack", tmp_path], "exists and is not a packed network: choose another name"),
        (
            [file, "--image", tmp_path / "x", "--json", tmp_path / "x.json"],
            "only print what they find: leave out --json",
        ),
        (
            [
                file,
                "--stream",
                tmp_path / "x",
                "--data",
                tmp_path,
                "--limit",
                3,
                "--test-split",
                "x",
                "--batch-size",
                1,
            ],
            "only print what they find: leave out --data and --test-split and --limit and --batch-size",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            run_eval(*flags, *([] if {"--image", "--stream"} & set(flags) else ["--limit", "32"]))
        code = stop.value.code
        message = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (0, None) and message.startswith("error: ") and sentence in message, message
        assert message.strip().count("\n") == 0
    assert (run / "model.safetensors").read_bytes() == weights


def test_a_packed_file_may_be_written_again_under_any_name(run, tmp_path):
    _, x = trained(neuron="mem_bn", weights="ternary")
    for _ in range(2):
        assert pack_to_file(empf.load(run), tmp_path / "new" / "net", [(x, None)])["images"] == len(x)
    with pytest.raises(ValueError, match="no images to compare"):
        pack_to_file(empf.load(run), tmp_path / "new" / "unchecked", [])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["net"]
    assert load_packed(tmp_path / "new" / "net").config == empf.load(run).config


def test_data_with_the_classes_in_another_order_are_refused(packed, tmp_path):
    net = load_packed(packed[0])
    net.origin = replace(net.origin, classes=tuple("0213456789"))
    net.save(tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="label 1 to '1', the network was trained with 2: use the classes it"):
        run_eval(tmp_path / "other.safetensors", "--limit", "32")


def test_names_cannot_command_the_terminal(packed, tmp_path, capsys):
    net = load_packed(packed[0])
    net.origin = replace(net.origin, classes=("\x1b[2J", "a\nb", "\udcff", *(["猫 é"] * 7)))
    net.save(tmp_path / "odd.safetensors")
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "cat.png")
    run_eval(tmp_path / "odd.safetensors", "--image", tmp_path / "cat.png")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and {line.split("%  ")[1] for line in lines} <= {"?[2J", "a?b", "?", "猫 é"}
    assert [shown(name) for name in net.origin.classes[:4]] == ["?[2J", "a?b", "?", "猫 é"]


def test_a_network_of_the_library_is_evaluated_by_its_name(tmp_path, capsys):
    """Its accuracy is that of its model card, and `--image` names its classes."""
    run_eval("digits-resnet18", "--json", tmp_path / "digits.json")
    found = json.loads((tmp_path / "digits.json").read_text())
    assert found["accuracy"] == pytest.approx(empf.from_pretrained("digits-resnet18").origin.accuracy)
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    capsys.readouterr()
    run_eval("digits-resnet18", "--image", tmp_path / "digit.png")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_packed_network_in_bf16(packed, tmp_path, monkeypatch, capsys):
    flags = (packed[0], "--limit", "96", "--mixed-precision", "bf16")
    if cpu_conv.multiplies_bf16():
        run_eval(*flags, "--json", tmp_path / "bf16.json")
        found = json.loads((tmp_path / "bf16.json").read_text())
        assert found["mixed_precision"] == "bf16"
        assert found["accuracy"] == pytest.approx(packed[1]["accuracy"], abs=2)
    monkeypatch.setattr(eval, "multiplies_bf16", lambda: False)
    with pytest.raises(SystemExit, match="needs a CPU that multiplies bf16 .* on cpu here leave it out"):
        run_eval(*flags)


def test_mirrored_digits_are_refused():
    with pytest.raises(SystemExit, match="--mirror is for images that mean the same mirrored, not for digits"):
        run_eval("digits-resnet18", "--mirror")
