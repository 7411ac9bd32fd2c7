"""Every public function shows an example, and each example does what it says; help() says what a method is for."""

import doctest
import inspect

import pytest
import torch

import empf

FUNCTIONS = [name for name in empf.__all__ if inspect.isfunction(getattr(empf, name))]
CLASSES = [name for name in empf.__all__ if inspect.isclass(getattr(empf, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "empf": empf}
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(empf, name), name, module=False, globs=names)
    assert f"empf.{name}(" in "".join(example.source for example in found.examples)
    torch.manual_seed(0)
    assert doctest.DocTestRunner().run(found).failed == 0


@pytest.mark.parametrize("name", CLASSES)
def test_help_of_a_class_says_what_each_method_of_its_own_is_for(name):
    """And not what torch says of any module."""
    cls = getattr(empf, name)
    assert cls.__doc__
    for attribute, value in vars(cls).items():
        if inspect.isfunction(value) and not attribute.startswith("_"):
            assert value.__doc__, f"{name}.{attribute}"
