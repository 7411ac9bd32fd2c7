"""eval.py on packed files: the same table, packing with its check, and the classes of a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_tools import logits, trained
from PIL import Image

import empf
from empf.deploy import load_packed, pack
from empf.hub import Origin
from empf.runs import save_config, save_results
from eval import main

NUMBERS = ("accuracy", "neurons", "nops", "params_full_mb", "params_mb", "sops", "energy_mj", "macs", "energy_full_mj")


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
    save_results(folder, model, [{"epoch": 1, "loss": 1.0, "accuracy": [50.0] * 3}], "test")
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
    for flags, sentence in (
        ([file, "--pack", tmp_path / "x"], "is packed already: --pack takes a run folder"),
        ([run, "--image", tmp_path / "x"], "--image takes a packed file"),
        ([file, "--image", tmp_path / "none.png"], "no image"),
        ([file, "--stream", tmp_path / "none.npz"], "needs a network for events of 2 polarities"),
        ([tmp_path / "cut.safetensors"], "cut.safetensors is damaged"),
        ([tmp_path / "nameless.safetensors"], "does not say on which data it was trained"),
        ([run, "--pack", "/dev/null/net.safetensors"], "could not write /dev/null/net.safetensors"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_eval(*flags, "--limit", "32")
        code = stop.value.code
        message = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (0, None) and message.startswith("error: ") and sentence in message, message
        assert message.strip().count("\n") == 0
