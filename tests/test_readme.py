"""What the README prints is true: its examples run, its flags, files and names exist."""

import re
from dataclasses import fields
from pathlib import Path

import torch

import empf
from empf.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAIN = {f.name.replace("_", "-") for f in fields(TrainConfig)} | {"resume", "no-crop", "no-flip", "no-flip-adaptive"}
SCRIPTS = [ROOT / "eval.py", ROOT / "empf/diagnose/__main__.py", *(ROOT / "bench").glob("*.py")]
OTHER = {flag for script in SCRIPTS for flag in re.findall(r'"--([a-z][\w-]*)"', script.read_text())}
OTHER |= {"help", "cpu", "num-processes", "config-file", "machine-rank", "main-process-ip"}  # of accelerate launch
OTHER |= {
    "gradient-accumulation-steps",
    "dist",
    "logdir",
    "strict",
}  # also pytest, tensorboard, twine
CONSOLE = r"(accelerate launch|python (train\.py|-m empf train)) "


def check_flags(text: str) -> set[str]:
    """The flags of training that a text names; none may be unknown."""
    named = {name.replace("_", "-") for name in re.findall(r"--([a-zA-Z][\w-]*)", text)}
    assert named <= TRAIN | OTHER, named - TRAIN - OTHER
    return named & TRAIN


def links(text: str) -> list[str]:
    """The files of the repository that a text links to."""
    return re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)


def extras(requirement: str) -> list[str]:
    """Of empf[a,b]: a and b."""
    return re.findall(r"\w+", "".join(re.findall(r"^(?:empf|\.)\[(.*)\]$", requirement)))


def run_example(number):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_example_runs():
    names = run_example(0)
    assert names["logits"].shape == (4, 8, 100)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names["model"].parameters())


def test_the_example_of_an_own_network_runs(capsys):
    names = run_example(1)
    assert names["logits"].shape == (8, 10) and all(p.grad is not None for p in names["net"].parameters())
    assert float(capsys.readouterr().out) > 0
    x, packed = names["x"], names["packed"]
    empf.reset(names["net"])
    assert torch.allclose(packed(x), names["net"](x), atol=1e-5)


def test_online_backward_is_the_example_in_one_call():
    model = empf.resnet18(num_classes=100, T=4, weights="binary", width=0.25)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 100, (4,))
    loss, _ = empf.online_backward(model, images, labels, torch.nn.functional.cross_entropy, steps=[3])
    assert loss.isfinite()


def test_flags_exist():
    pages = [ROOT / "docs/reference/commands.md", *(ROOT / "docs/how-to").glob("*.md")]  # they were once in the README
    assert len(check_flags(README + "".join(page.read_text() for page in pages))) > 40


def test_linked_files_exist():
    assert len(links(README)) > 20
    for target in links(README):
        assert (ROOT / target).exists(), target


def test_named_results_exist():
    for text in (README, (ROOT / "docs/results.md").read_text()):
        named = set(re.findall(r"`([\w/-]+\.(?:jsonl?|png))`", text)) - {"metrics.jsonl", "config.json"}
        assert len(named) > 8
        for name in named:
            assert (ROOT / "bench/results" / name.removeprefix("bench/results/")).exists(), name


def test_the_first_two_lines_install_and_run():
    first, second = re.findall(r"^    (pip install .*)$", README, re.M)[:2]
    assert first.endswith("accelerate launch train.py") and second.endswith("&& pytest -n auto --dist loadgroup")
