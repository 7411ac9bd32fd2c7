"""Training on images of one's own, from the command line to the packed network."""

import numpy as np
import pytest
from PIL import Image
from train_tools import metrics, run_train

import eval
from empf.runs import load, read_config


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_a_folder_of_pictures_of_mixed_sizes(tmp_path, capsys, streaming):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(20):
            shape = ((64, 64, 3), (96, 80, 3))[number % 2]
            picture = rng.integers(0, 60, shape, dtype=np.uint8)
            picture[..., label] += 150
            Image.fromarray(picture).save(tmp_path / "own" / name / f"{number}.png")
    run, packed = tmp_path / "run", tmp_path / "net.safetensors"
    flags = ["--image-size", "16", "--epochs", "2", "--lr", "0.05", "--batch-size", "9", *streaming]
    run_train("--dataset", tmp_path / "own", *flags, "--output-dir", run)
    assert "tested on 0.1 of the training data, held out with seed 0" in capsys.readouterr().out
    model = load(run)
    assert (model.config.num_classes, model.config.image_size, model.config.in_channels) == (3, 16, 3)
    assert read_config(run)["classes"] == ["ant", "bee", "cat"]
    found = tmp_path / "found.json"
    eval.main([str(run), "--pack", str(packed), "--json", str(found), "--threads", "1"])
    assert f"{metrics(run)[-1]['accuracy'][-1]:.2f} %" in capsys.readouterr().out
    Image.new("RGB", (50, 90), (10, 200, 10)).save(tmp_path / "green.png")
    eval.main([str(packed), "--image", str(tmp_path / "green.png"), "--threads", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(name for *_, name in lines) == ["ant", "bee", "cat"]
    assert sum(float(share) for share, *_ in lines) == pytest.approx(100, abs=0.02)
