"""What the README prints is true: its example runs, its flags, files and names exist."""

import re
from dataclasses import fields
from pathlib import Path

import torch

import empf
from empf.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_example(number):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_example_of_diagnosis_runs(capsys):
    assert run_example(1)["result"]["summary"]["ds_dm_values"] == [0.0, 1.0]
    assert "blocks.7.conv2.neuron" in capsys.readouterr().out


def test_the_example_runs():
    names = run_example(0)
    assert names["logits"].shape == (4, 8, 100)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names["model"].parameters())


def test_online_backward_is_the_example_in_one_call():
    model = empf.resnet18(num_classes=100, T=4, weights="binary", width=0.25)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 100, (4,))
    loss, _ = empf.online_backward(model, images, labels, torch.nn.functional.cross_entropy, steps=[3])
    assert loss.isfinite()


def test_flags_exist():
    flags = {f.name.replace("_", "-") for f in fields(TrainConfig)} | {"resume", "no-crop"}
    other = {"help", "json", "pack", "image", "stream"}  # of eval.py
    other |= {"equality", "report", "check", "seeds", "only", "repeats", "memory", "untrained"}  # of bench/, diagnose
    other |= {"cpu", "num-processes", "config-file", "machine-rank", "main-process-ip", "dist"}  # launch, pytest
    named = {name.replace("_", "-") for name in re.findall(r"--([a-zA-Z][\w-]*)", README)}
    assert named <= flags | other
    assert len(named & flags) > 20


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_first_two_lines_install_and_run():
    first, second = re.findall(r"^    (pip install .*)$", README, re.M)[:2]
    assert first.endswith("accelerate launch train.py") and second.endswith("&& pytest -n auto --dist loadgroup")
