"""Every public function shows an example, and each example does what it says; help() says what a method is for."""

import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import empf
from empf import data, deploy, diagnose, figures, kernels
from empf.kernels import dispatch

ROOT = Path(__file__).parents[1]
CLASSES = [getattr(empf, name) for name in empf.__all__ if inspect.isclass(getattr(empf, name))]


def public() -> dict:
    """The functions of the library that people are handed, by name.

    Those of `empf` and `empf.kernels`, what the wings and `figures` hand on, and what README and docs/ name.
    """
    found = [getattr(module, name) for module in (empf, figures) for name in module.__all__]
    for wing in (data, deploy, diagnose):
        source = inspect.getsource(wing)
        found += [getattr(wing, name) for name in re.findall(r"^from \S+ import (\w+) as \1$", source, re.M)]
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for module, names in re.findall(r"^ *from (empf[\w.]*) import ([\w, ]+)", page.read_text(), re.M):
            found += [getattr(importlib.import_module(module), name) for name in names.split(", ")]
        for module, name in re.findall(r"\b(empf\.\w[\w.]*)\.(\w+)\(", page.read_text()):
            found.append(getattr(sys.modules.get(module), name, None))
    functions = {f for f in found if inspect.isfunction(f) and not f.__module__.startswith("empf.kernels")}
    functions = {f.__name__: f for f in sorted(functions, key=lambda f: f.__name__)}
    return functions | {f"kernels.{name}": getattr(kernels, name) for name in kernels.__all__}


FUNCTIONS = public()


def test_the_functions_of_every_wing_are_found():
    wings = {"pack", "from_tonic", "raster", "per_class", "top_classes", "separability_table"}
    assert wings | {"kernels.pack", "kernels.PackedWeight"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dispatch, "_mode", "auto")
    function = FUNCTIONS[name]
    names = {"torch": torch, "np": np, "empf": empf}
    if name.startswith("kernels."):  # people import from the folder
        names |= vars(kernels)
    names |= vars(sys.modules[function.__module__])
    (found,) = doctest.DocTestFinder(recurse=False).find(function, name, module=False, globs=names)
    assert re.search(rf"\b{function.__name__}\(", "".join(example.source for example in found.examples))
    torch.manual_seed(0)
    assert doctest.DocTestRunner().run(found).failed == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_help_of_a_class_says_what_each_method_of_its_own_is_for_and_has_them_first(cls):
    """And not what torch says of any module."""
    assert cls.__doc__
    ours = [base for base in cls.__mro__ if base.__module__.startswith("empf")]
    assert list(cls.__mro__[: len(ours)]) == ours  # the order of help()
    for attribute, value in vars(cls).items():
        if inspect.isfunction(value) and not attribute.startswith("_"):
            assert value.__doc__, f"{cls.__name__}.{attribute}"
