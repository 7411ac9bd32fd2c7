"""From a checkout train.py runs whether the package was installed editable, as a wheel, or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from train_tools import TINY, metrics

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy: building leaves files in the folder it builds from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("empf", "kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("train.py", "eval.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def python(tmp_path) -> Path:
    """A new environment with the packages of this one, but without an installed empf."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.skipif(os.name != "posix", reason="paths of a POSIX environment")
@pytest.mark.parametrize("how", ["editable", "wheel", "dependencies only"])
def test_train_runs_from_a_checkout(checkout, python, tmp_path, how):
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    pip += ["--ignore-installed"]  # what this environment has of it stays where it is
    if how != "dependencies only":
        pytest.importorskip("setuptools", reason="needs setuptools to build")
        run(*pip, *(["--editable"] if how == "editable" else []), checkout, cwd=tmp_path)
    where = "import empf, empf.kernels; print(empf.__file__, empf.kernels.__file__, empf.__version__)"
    for folder in (checkout, tmp_path):
        if folder == checkout or how != "dependencies only":
            package, kernels, version = run(python, "-c", where, cwd=folder).split()
            inside = folder == checkout or how == "editable"
            assert Path(package).is_relative_to(checkout) == Path(kernels).is_relative_to(checkout) == inside
            assert version and (Path(package).parent / "py.typed").is_file()
    run(python, "train.py", *TINY, "--epochs", "1", "--output-dir", tmp_path / "run", cwd=checkout)
    assert len(metrics(tmp_path / "run")) == 1
    if how == "wheel":  # what is in it, without the checkout
        code = "import empf, pathlib; print(*(p.name for p in pathlib.Path(empf.__file__).parent.glob('scripts/*')))"
        assert set(run(python, "-c", code, cwd=tmp_path).split()) - {"__pycache__"} == {"train.py", "eval.py", "bench"}
        run(python, "-m", "empf", "eval", "run", "--limit", "32", "--json", "result.json", cwd=tmp_path)
        assert json.loads((tmp_path / "result.json").read_text())["images"] == 32
        assert "\nusage: deploy.py" in "\n" + run(python, "-m", "empf", "bench", "deploy", "--help", cwd=tmp_path)
        code = "from importlib.metadata import metadata; print(metadata('empf').get_payload())"
        page = run(python, "-c", code, cwd=tmp_path)
        links = re.findall(r"\]\(([^)]+)\)", page)
        assert links and all(re.match("https?://|#", link) for link in links)
