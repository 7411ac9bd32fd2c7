"""Training on images of one's own, from the command line to the packed network, and tests of it on other data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_tools import logits
from make_data import CLASSES, items, rows_of, write
from PIL import Image
from train_tools import metrics, resume, run_train

import empf
import eval
from empf import models
from empf.data.images import centre_crop
from empf.deploy.onnx import export_onnx
from empf.deploy.pack import load_packed
from empf.runs import read_config

FLAGS = ["--image-size", "12x16", "--epochs", "1", "--batch-size", "9", "--lr", "0.05"]
LAYOUT_SPLITS = [
    ("folders", ""), ("folders", "train"), ("parquet", ""), ("saved", ""), ("saved", "train"), ("table", "train"),
]  # fmt: skip


def evaluated(capsys, *flags: str | Path) -> dict:
    capsys.readouterr()
    eval.main([*map(str, flags), "--threads", "1", "--json", "-"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Networks of one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.RESNETS, "resnet18", ([1], [64], None))
        yield


@pytest.mark.parametrize("layout, split", LAYOUT_SPLITS)
def test_photos_of_mixed_sizes_in_every_layout(tmp_path, capsys, layout, split):
    """64x64 and 96x80, trained, tested on what is held out, or on the test split; eval.py finds the same."""
    splits = {split: items(8, "photos")} | ({"test": items(3, "photos")} if split else {})
    folder = write(tmp_path / "own", layout, splits)
    run_train("--dataset", folder, *FLAGS, "--output-dir", tmp_path / "run")
    found = evaluated(capsys, tmp_path / "run")
    assert found["accuracy"] == metrics(tmp_path / "run")[-1]["accuracy"]
    assert found["images"] == (9 if split else 3) and ("held out" in found["tested_on"]) == (not split)
    assert read_config(tmp_path / "run")["classes"] == list(CLASSES)
    assert (tmp_path / "run" / "best.safetensors").exists() == (not split)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with `own`, 3 classes of 10 photos each, `run`, one epoch on it, and `net.safetensors`, packed."""
    folder = tmp_path_factory.mktemp("photos")
    write(folder / "own", "folders", {"": items(10, "photos")})
    run_train("--dataset", folder / "own", *FLAGS, "--output-dir", folder / "run")
    eval.main([str(folder / "run"), "--pack", str(folder / "net.safetensors"), "--threads", "1"])
    return folder


def as_tested(picture: Image.Image, run: Path) -> torch.Tensor:
    norm = read_config(run)["normalisation"]
    mean, std = (torch.tensor(norm[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(centre_crop(picture, (12, 16)).copy()) / 255 - mean) / std


@pytest.mark.filterwarnings("ignore")  # of the exporter of ONNX, about its own packages
def test_a_picture_of_another_size_from_training_to_onnx(photos, tmp_path, capsys):
    """`--image` prepares it as the photos were prepared for testing, also where it has the size of the network."""
    packed = load_packed(photos / "net.safetensors")
    assert (packed.config.num_classes, packed.config.image_size, packed.origin.resized) == (3, (12, 16), True)
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    export_onnx(packed, tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for size in ((50, 90), (12, 16)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        picture.save(tmp_path / "a.png")
        x = as_tested(picture, photos / "run")[None]
        wanted = logits(packed, x)
        assert (torch.from_numpy(session.run(None, {"x": x.numpy()})[0]) - wanted).abs().max() < 1e-5
        capsys.readouterr()
        eval.main([str(photos / "net.safetensors"), "--image", str(tmp_path / "a.png"), "--threads", "1"])
        found = {name: float(share) for share, _, name in map(str.split, capsys.readouterr().out.splitlines())}
        for name, share in zip(CLASSES, wanted.mean(0).softmax(-1)[0].tolist(), strict=True):
            assert found[name] == pytest.approx(100 * share, abs=0.006)


@pytest.mark.parametrize("layout", ["test only", "not divided", "a table of its own columns", "labels by number"])
def test_other_data_are_tested_whole_as_the_training_images_were(photos, tmp_path, capsys, monkeypatch, layout):
    """Nothing is found out of them anew: neither statistics, nor sizes, nor classes, of which one is missing."""
    monkeypatch.setattr("empf.data.load.own_spec", None)
    pictures = [(name, image) for name, image in items(5, "mixed") if name != "ant"]
    flags = ["--data", tmp_path / "new"]
    if layout == "labels by number":
        rows = rows_of(pictures, "floats")
        (tmp_path / "new").mkdir()
        rows.to_parquet(tmp_path / "new" / "all.parquet")
    else:
        split = "test" if layout == "test only" else ""
        write(tmp_path / "new", "table" if "table" in layout else "folders", {split: pictures})
    if "table" in layout:
        table = tmp_path / "new" / "labels.csv"
        table.write_text(table.read_text().replace("file_name,label", "photo,kind"))
        flags += ["--image-column", "photo", "--label-column", "kind"]
    x, labels = torch.stack([as_tested(p, photos / "run") for _, p in pictures]), [n for n, _ in pictures]
    wanted = logits(empf.load(photos / "run"), x).cumsum(0).argmax(-1)  # T N
    right = [100 * sum(CLASSES[p] == n for p, n in zip(row, labels, strict=True)) / 10 for row in wanted.tolist()]
    for network in ("run", "net.safetensors"):
        found = evaluated(capsys, photos / network, *flags)
        assert found["images"] == 10 and [c["images"] for c in found["classes"]] == [0, 5, 5]
        assert found["accuracy"] == pytest.approx(right)
        assert found["tested_on"] == ("test" if layout == "test only" else f"all of {tmp_path / 'new'}")


def test_a_copy_of_the_training_images_is_tested_where_they_were_held_out(photos, tmp_path, capsys):
    shutil.copytree(photos / "own", tmp_path / "copy")
    wanted = evaluated(capsys, photos / "run")
    for network in ("run", "net.safetensors"):
        found = evaluated(capsys, photos / network, "--data", tmp_path / "copy")
        assert (found["images"], found["accuracy"]) == (3, wanted["accuracy"])
        assert found["tested_on"] == "0.1 of the training data, held out with seed 0, also used to choose the epoch"


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_classes_that_are_not_known_are_refused(photos, tmp_path, layout):
    write(
        tmp_path / "new", layout, {"": [("yak" if name == "ant" else name, image) for name, image in items(3, "mixed")]}
    )
    with pytest.raises(SystemExit, match="'yak'"):
        eval.main([str(photos / "run"), "--data", str(tmp_path / "new"), "--threads", "1"])


def test_with_a_limit_the_same_images_are_held_out(tmp_path, capsys):
    write(tmp_path / "own", "folders", {"": items(10, "photos")})
    run_train("--dataset", tmp_path / "own", *FLAGS, "--limit", "20", "--output-dir", tmp_path / "run")
    assert evaluated(capsys, tmp_path / "run")["accuracy"] == metrics(tmp_path / "run")[-1]["accuracy"]
    assert evaluated(capsys, tmp_path / "run", "--limit", "2")["images"] == 2


def test_a_run_does_not_continue_on_other_data(tmp_path):
    """Neither with more images nor with a class of another name; with a copy it does."""
    write(tmp_path / "own", "folders", {"": items(8, "photos")})
    run_train("--dataset", tmp_path / "own", *FLAGS, "--output-dir", tmp_path / "run", "--max-steps", "1")
    for place in ("more", "other", "copy"):
        shutil.copytree(tmp_path / "own", tmp_path / place)
    shutil.copy(tmp_path / "own" / "ant" / "0000.png", tmp_path / "more" / "ant" / "new.png")
    (tmp_path / "other" / "ant").rename(tmp_path / "other" / "yak")
    for place, now in (("more", "25 images of 3 classes now"), ("other", "24 images of 3 classes now, such as 'yak'")):
        with pytest.raises(SystemExit, match=rf"run began with 24 images of 3 classes, and there are {now}: give it"):
            resume(tmp_path / "run", "--data", str(tmp_path / place))
    resume(tmp_path / "run", "--data", str(tmp_path / "copy"))
    assert len(metrics(tmp_path / "run")) == 1


def test_pictures_that_cannot_be_read_count_as_wrong_and_are_counted(photos, tmp_path, capsys):
    folder = write(tmp_path / "new", "folders", {"test": items(5, "mixed")})
    file = folder / "test" / "ant" / "0000.png"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="skipped .*0000.png"):
        eval.main(
            [str(photos / "run"), "--data", str(folder), "--threads", "1", "--json", str(tmp_path / "found.json")]
        )
    assert re.search("which could not be read +1, they count as wrong", capsys.readouterr().out)
    found = json.loads((tmp_path / "found.json").read_text())
    right = sum(c["accuracy"] * c["images"] for c in found["classes"]) / 100
    assert (found["images"], found["unread"], [c["images"] for c in found["classes"]]) == (15, 1, [4, 5, 5])
    assert found["accuracy"][-1] == pytest.approx(100 * right / 15)


def test_mirror_images_are_counted_beside_the_accuracy(photos, capsys):
    found = evaluated(capsys, photos / "run", "--mirror")
    assert len(found["accuracy_with_mirror"]) == len(found["accuracy"])
    assert evaluated(capsys, photos / "run")["accuracy_with_mirror"] is None
