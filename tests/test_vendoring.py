"""The kernels folder, copied to an empty place under another name, runs every example of its README."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.single_file import single_file

KERNELS = Path(__file__).parent.parent / "kernels"
BLOCKED = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"  # importing one of these fails


def examples():
    return re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), flags=re.DOTALL)


def vendored(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "my_package" / "fast", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "my_package" / "__init__.py").touch()


def run(tmp_path, script, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "EMPF_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**kept, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("case", ["without Triton", "interpreter"])
def test_examples_run_in_a_copy(case, tmp_path):
    vendored(tmp_path)
    names = ["empf", "einops", "datasets", "accelerate"] + ["triton"] * (case == "without Triton")
    script = BLOCKED.format(names=names) + "import torch\ntorch.set_num_threads(1)\n"
    if case == "interpreter":
        pytest.importorskip("triton", reason="needs Triton")
        script += "from my_package.fast.dispatch import LAUNCHES\n"
    script += "\n".join(examples()).replace("empf.kernels", "my_package.fast")
    if case == "interpreter":
        script += "\nprint(*sorted(LAUNCHES))"
    environment = {"TRITON_INTERPRET": "1", "EMPF_KERNELS": "on"} if case == "interpreter" else {}
    done = run(tmp_path, script, **environment)
    assert done.returncode == 0, done.stderr
    if case == "interpreter":
        launched = set(done.stdout.split())
        assert {"binary_matmul", "binary_conv2d", "binary_conv2d_neuron", "neuron_update", "bn_neuron"} <= launched


def test_every_public_function_has_an_example():
    text = "".join(examples())
    public = ("pack", "unpack", "binary_matmul", "binary_conv2d", "neuron_update", "quantize_spikes", "bn_neuron",
              "mem_bn_neuron", "binary_conv2d_neuron", "flip_update", "backend", "set_backend",
              "set_tuning")  # fmt: skip
    assert [name for name in public if not re.search(rf"\b{name}\(", text)] == []


def test_nothing_but_torch_and_triton_is_imported():
    for path in KERNELS.glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) +(\w+)", path.read_text(), flags=re.MULTILINE)
        assert set(imported) - set(sys.stdlib_module_names) <= {"torch", "triton"}, path.name


def test_two_copies_live_side_by_side_and_import_makes_no_cuda_call(tmp_path):
    """With CUDA initialisation made an error, every module of both can be imported."""
    vendored(tmp_path)
    shutil.copytree(tmp_path / "my_package", tmp_path / "other_package")
    script = "import torch\ndef fail(*a, **k): raise RuntimeError('CUDA call')\n"
    script += "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = fail\n"
    modules = [f"{package}.fast.{path.stem}" for package in ("my_package", "other_package")
               for path in sorted(KERNELS.glob("*.py")) if path.stem != "__init__"]  # fmt: skip
    done = run(tmp_path, script + "".join(f"import {module}\n" for module in modules))
    assert done.returncode == 0, done.stderr


def test_copies_with_names_that_look_alike_run_their_own_code(tmp_path):
    """As a.b_c and a_b.c, the second with another definition of its operators."""
    for parent, name in (("a", "b_c"), ("a_b", "c")):
        shutil.copytree(KERNELS, tmp_path / parent / name, ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / parent / "__init__.py").touch()
    script = "from a.b_c import dispatch, matmul, neuron\nfrom a_b.c import dispatch as other, matmul, neuron\n"
    done = run(tmp_path, script + "print(dispatch.OPS, other.OPS)")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first != second and first.isidentifier() and second.isidentifier()


def test_one_file_gives_what_the_folder_gives(tmp_path):
    """Every example, and the same bits from kernels of both, side by side in one process."""
    pytest.importorskip("triton", reason="needs Triton")
    vendored(tmp_path)
    (tmp_path / "one_file.py").write_text(single_file())
    script = BLOCKED.format(names=["empf"]) + "import torch\ntorch.set_num_threads(1)\nimport one_file\n"
    script += "\n".join(examples()).replace("empf.kernels", "one_file")
    script += """
import my_package.fast as folder
assert folder.__all__ == one_file.__all__ and folder.dispatch.OPS != one_file.dispatch.OPS
x = torch.randn(2, 3, 8, 5, 5, requires_grad=True)
w, half = torch.randn(9, 8, 3, 3), torch.full((2,), 0.5)
results = []
for k in (folder, one_file):
    k.set_backend("on")
    y = k.binary_conv2d(x.flatten(0, 1), k.pack(w), padding=1)
    s, v = k.neuron_update(y.unflatten(0, (2, 3)), None, half, half, bits=4)
    results.append((s, v, torch.autograd.grad(s.square().sum(), x)[0]))
    assert {"binary_conv2d", "neuron_update"} <= set(k.dispatch.LAUNCHES)
assert all(torch.equal(a, b) for a, b in zip(*results))
"""
    done = run(tmp_path, script, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_the_licence_is_in_the_folder():
    assert (KERNELS / "LICENSE").read_text() == (KERNELS.parent / "LICENSE").read_text()
