"""The examples run from a checkout, are short, and do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, *options: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 120


def test_own_network_goes_from_training_to_a_packed_file(tmp_path):
    out = run("own_network.py", "--epochs", "3", "--width", "8", cwd=tmp_path)
    accuracy, difference = re.search(r"([\d.]+) % of 360 test images.* differ by (\S+) of", out).groups()
    assert float(accuracy) > 85 and float(difference) < 1e-5
    assert (tmp_path / "own.safetensors").stat().st_size > 0
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")


def test_the_state_is_worth_something_on_rows_of_digits(tmp_path):
    out = run("sequence.py", "--epochs", "12", "--width", "64", "--seeds", "1", "--json", "a.json", cwd=tmp_path)
    found = json.loads((tmp_path / "a.json").read_text())["accuracy"]
    assert list(found) == ["vanilla", "parallel", "lif"] and all(name in out for name in found)
    assert found["vanilla"]["last"][0] > found["parallel"]["last"][0] + 10


def test_the_transformer_learns_and_names_its_products(tmp_path):
    out = run("transformer.py", "--iterations", "60", "--width", "32", cwd=tmp_path)
    assert float(out.split(" %")[0]) > 50
    assert re.search(r"not_counted +block: bmm +65,536\n", out)


def test_the_notebook_runs_without_a_network(tmp_path, monkeypatch):
    """In one epoch instead of eight."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient", reason="pip install nbclient")
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    notebook.cells[1].source = notebook.cells[1].source.replace("EPOCHS = 4, 8", "EPOCHS = 4, 1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in shown) == 2
    printed = "".join(output.get("text", "") for output in shown)
    assert float(re.search(r"([\d.]+)%\n", printed)[1]) > 70
    assert (tmp_path / "tour.safetensors").stat().st_size < 12_000
