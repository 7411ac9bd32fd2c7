"""The documentation is true: its code runs, page by page, and its flags, files, extras and names exist.

Blocks of `python` share the names of their page; `bash` is run in this process, with trainings made small; `console` is
what cannot be run here (several processes, the network), of which the flags are checked.
"""

import re
import runpy
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_readme import CONSOLE, check_flags, extras, links
from train_tools import undisturbed

import empf
import eval as eval_script
import train
from empf.diagnose import __main__ as diagnose
from empf.training import health, session

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if not p.is_symlink()]
SMALL = ["--width", "0.0625", "--epochs", "1", "--limit", "96", "--batch-size", "32"]
SMALL += ["--warmup-epochs", "0", "--threads", "1"]
NAMES = [page.relative_to(DOCS).as_posix() for page in PAGES]
EXPORTS_OF_A_RESNET = ("tutorials/own-images.md", "tutorials/edge.md")
RUN = [name for name, page in zip(NAMES, PAGES, strict=True) if re.search("```(python|bash)", page.read_text())]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M)


def command(line: str) -> None:
    """Run a command of the documentation in this process, a training on few images."""
    match shlex.split(line, comments=True):
        case ["pip", "install", *what]:
            assert {extra for name in what for extra in extras(name)} <= extras_of_the_package()
        case ["python", "-m", "empf", "train", *flags]:
            train.main(flags if "--resume" in flags else [*flags, *SMALL])
        case ["python", "-m", "empf", "eval", *flags]:
            eval_script.main(flags)
        case ["python", "-m", "empf.diagnose", *flags]:
            diagnose.main(flags)
        case ["python", "-m", "empf.training.health", *flags]:
            health.main(flags)
        case other:
            raise AssertionError(f"who runs {other}?")


def export_checked(packed: empf.PackedModel, path: str, x: torch.Tensor | None = None) -> None:
    """In place of an export of 15 seconds, which tests/test_onnx.py does: would the call be accepted?"""
    assert isinstance(packed.net, empf.SpikingNetwork) and x is None
    Path(path).write_bytes(b"")


def extras_of_the_package() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return set(re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "has_matplotlib", lambda: False)  # curves.png would take most of the time
    torch.manual_seed(0)
    if name in EXPORTS_OF_A_RESNET:
        monkeypatch.setattr(empf, "export_onnx", export_checked)
    names: dict = {"__name__": "__main__"}
    for language, text in blocks(DOCS / name):
        with undisturbed() if language == "bash" else nullcontext():
            if language == "python":
                exec(compile(text, name, "exec"), names)
            elif language == "bash":
                for line in text.replace("\\\n", " ").splitlines():
                    command(line)
    check = CHECKS.get(name)
    assert check is None or check(names), name


CHECKS = {  # what a reader would see
    "tutorials/own-network.md": lambda names: names["accuracy"] > 0.8 and Path("own.onnx").stat().st_size > 0,
    "tutorials/separability.md": lambda names: names["result"]["summary"]["ds_dm_values"] == [0.0, 1.0],
    "how-to/onnx.md": lambda names: names["logits"].shape == (4, 3, 10),
    "tutorials/edge.md": lambda names: names["logits"].shape == (4, 16, 10) and len(names["clear"]) == 16,
}


@pytest.mark.parametrize("name", NAMES)
def test_flags_files_and_names_of_a_page_exist(name):
    page = DOCS / name
    text = page.read_text()
    check_flags(text)
    for target in links(text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:empf|kernels|tests|bench|docs)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for requirement in re.findall(r"(empf\[[\w,]+\])", text):
        assert set(extras(requirement)) <= extras_of_the_package(), requirement
    for dotted in re.findall(r"`(empf\.\w+(?:\.\w+)*)[`(]", text):
        thing = empf
        for part in dotted.split(".")[1:]:
            thing = getattr(thing, part)


def test_the_overview_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "figures" / "overview.py"))["draw"](tmp_path / "overview.png")
    assert (tmp_path / "overview.png").read_bytes()[:4] == (DOCS / "figures" / "overview.png").read_bytes()[:4]


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference" / "library.md").read_text()
    assert [name for name in empf.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", nav, re.M)) == pages


def test_console_blocks_are_only_what_cannot_be_run_here():
    for page in PAGES:
        for language, text in blocks(page):
            assert language in ("python", "bash", "console", "text"), f"{page}: {language}"
            for line in text.splitlines() if language == "console" else []:
                assert re.match(CONSOLE, line), line
