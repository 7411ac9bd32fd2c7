"""How the code is laid out, read from the source alone: who imports whom, how deep, how long, and is it tested.

train.py, eval.py, bench/, examples/  ->  wings  ->  core, the files of empf/ itself  ->  kernels
wings: empf/data, deploy, diagnose, training; between them only the arrows of `BETWEEN_WINGS`
"""

import ast
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ("data", "deploy", "diagnose", "training")
BETWEEN_WINGS = {("training", "data"), ("deploy", "data"), ("diagnose", "data"), ("diagnose", "training")}
CORE = ("neuron", "synapse", "layer", "models", "online")
LINES_OF_A_FILE, LINES_OF_EMPF, LINES_OF_CORE, FLOORS = 450, 6_500, 1_400, 7

# What is not yet as it should be. Entries are only ever taken away.
TODAY: set[str] = {"empf/ has more than 6500 lines"}


@cache
def sources() -> dict[str, Path]:
    """Every file of the project by the name under which it is imported; `kernels` is `empf.kernels`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("empf", "kernels", "bench", "examples", "tests", "train", "eval"):
            continue
        parts = ("empf", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), feature_version=(3, 10))  # the oldest that pyproject.toml promises


def targets(node: ast.stmt, module: str) -> Iterator[str]:
    """The modules that an import statement names, in full."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:  # `from package import module` is an import of that module
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources() else base


@cache
def imports() -> dict[str, set[str]]:
    """For each module, what it imports anywhere in its file."""
    return {
        module: set(chain.from_iterable(targets(node, module) for node in ast.walk(tree(path))))
        for module, path in sources().items()
    }


def inside(module: str, *places: str) -> bool:
    """Is the module one of these packages or modules, or in one?"""
    return any(module == place or module.startswith(place + ".") for place in places)


def wing(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "empf" and len(parts) > 1 and parts[1] in WINGS else None


def scripts() -> list[str]:
    return [module for module in sources() if inside(module, "train", "eval", "bench", "examples")]


def parts() -> list[str]:
    """The modules of empf/ and of kernels/, without `empf` itself, the door that hands names on."""
    return [module for module in sources() if inside(module, "empf") and module != "empf"]


def circles() -> set[str]:
    def reached(module: str) -> set[str]:
        seen, open_ends = set(), [module]
        while open_ends:
            new = imports()[open_ends.pop()] & sources().keys() - seen
            seen |= new
            open_ends += new
        return seen

    return {f"{module} imports itself by way of others" for module in sources() if module in reached(module)}


def upward() -> set[str]:
    """Arrows from core to a wing, between wings, from the library to a script, or from kernels to anything."""
    found = set()
    for module in parts():
        for target in imports()[module]:
            if inside(module, "empf.kernels"):
                wrong = inside(target, "empf", "kernels") and not inside(target, "empf.kernels")
            elif inside(target, "train", "eval", "bench", "examples", "tests", "kernels") or target == "empf":
                wrong = True
            else:
                pair = (wing(module), wing(target))
                wrong = pair[1] is not None and pair[0] != pair[1] and pair not in BETWEEN_WINGS
            if wrong:
                found.add(f"{module} imports {target}")
    return found


def absolute_in_kernels() -> set[str]:
    """In kernels/ every import of its own files is relative: the folder may be copied under another name."""
    return {
        f"{module} imports {alias} by its full name"
        for module in parts() if inside(module, "empf.kernels")
        for node in ast.walk(tree(sources()[module]))
        if not (isinstance(node, ast.ImportFrom) and node.level)
        for alias in targets(node, module) if inside(alias, "empf", "kernels")
    }  # fmt: skip


def in_functions() -> set[str]:
    found = set()
    for module in [*parts(), *scripts()]:
        functions = (n for n in ast.walk(tree(sources()[module])) if isinstance(n, ast.FunctionDef | ast.Lambda))
        for node in chain.from_iterable(map(ast.walk, functions)):
            found |= {f"{module} imports {t} in a function" for t in targets(node, module) if inside(t, "empf")}
    return found


def misplaced() -> set[str]:
    """`datasets` outside of empf/data, `accelerate` outside of the scripts and empf/training."""
    allowed = {"datasets": ("empf.data",), "accelerate": ("empf.training", *scripts())}
    return {
        f"{module} imports {package}"
        for module in [*parts(), *scripts()]
        for package, places in allowed.items()
        if any(inside(target, package) for target in imports()[module]) and not inside(module, *places)
    }


def lines(module: str) -> int:
    return len(sources()[module].read_text().splitlines())


def too_long() -> set[str]:
    found = {
        f"{module} has more than {LINES_OF_A_FILE} lines" for module in sources() if lines(module) > LINES_OF_A_FILE
    }
    library = [module for module in sources() if inside(module, "empf") and not inside(module, "empf.kernels")]
    if sum(map(lines, library)) > LINES_OF_EMPF:
        found.add(f"empf/ has more than {LINES_OF_EMPF} lines")
    if sum(lines(m) for m in library if inside(m, *(f"empf.{name}" for name in CORE))) > LINES_OF_CORE:
        found.add(f"the core has more than {LINES_OF_CORE} lines")
    return found


def too_deep() -> set[str]:
    """A chain of imports through empf/ is at most `FLOORS` modules long; a command, `__main__`, stands on the roof."""

    def floor(module: str, below: tuple[str, ...] = ()) -> int:
        under = [m for m in imports()[module] if wanted(m) and m not in below]
        return 1 + max((floor(m, (*below, module)) for m in under), default=0)

    def wanted(module: str) -> bool:
        return (
            module in sources() and inside(module, "empf") and module != "empf" and not inside(module, "empf.kernels")
        )

    if circles():
        return {"floors cannot be counted in circles"}
    deep = {module: floor(module) for module in parts() if wanted(module) and not module.endswith("__main__")}
    return {f"{module} stands on floor {count} of {FLOORS}" for module, count in deep.items() if count > FLOORS}


def untested() -> set[str]:
    """A component has a test file of its name: tests/test_<name>.py, or tests/test_<wing>_<name>.py."""
    found = set()
    for module in parts():
        path = sources()[module]
        names = [path.stem, *([f"{wing(module)}_{path.stem}"] if wing(module) else [])]
        component = not path.stem.startswith("__") and not inside(module, "empf.kernels")
        if component and not any((ROOT / "tests" / f"test_{name}.py").exists() for name in names):
            found.add(f"{module} has no test file")
    return found


RULES = (circles, upward, absolute_in_kernels, in_functions, misplaced, too_long, too_deep, untested)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_layout_keeps_its_rules(rule):
    assert sorted(rule() - TODAY) == []


def test_every_file_is_read_by_the_oldest_python(tmp_path):
    assert all(map(tree, sources().values())) and 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    (tmp_path / "a.py").write_text("try:\n    pass\nexcept* OSError:\n    pass\n")
    with pytest.raises(SyntaxError, match="3.11"):
        tree(tmp_path / "a.py")


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    """Each rule against a small project that breaks it."""
    files = {
        "empf/__init__.py": "from empf.core import a\n",
        "empf/core.py": "from empf import data\nfrom empf.data.load import f\n",
        "empf/data/__init__.py": "",
        "empf/data/load.py": "def f():\n    from empf.core import a\n",
        "empf/deploy/__init__.py": "import accelerate\nfrom empf.training import x\n",
        "empf/training/__init__.py": "import datasets.load\nimport train\n" + "\n" * LINES_OF_A_FILE,
        "kernels/__init__.py": "from .x import y\n",
        "kernels/x.py": "from kernels.y import z\nfrom ..floor7 import a\n",
        "kernels/y.py": "from empf.kernels.z import a\n",
        "train.py": "g = lambda: 0\n",
        "tests/test_core.py": "",
    }
    for number in range(FLOORS + 1):
        files[f"empf/floor{number}.py"] = f"from . import floor{number + 1}\n" if number < FLOORS else ""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    clear()
    try:
        found = {rule.__name__: rule() for rule in RULES}
        (tmp_path / "empf/data/load.py").write_text("")
        clear()
        found["too_deep"] = too_deep()
    finally:
        clear()
    assert found["circles"] == {f"{m} imports itself by way of others" for m in ("empf.core", "empf.data.load")}
    assert found["upward"] == {
        "empf.core imports empf.data", "empf.core imports empf.data.load", "empf.deploy imports empf.training",
        "empf.training imports train", "empf.kernels.x imports empf.floor7", "empf.kernels.x imports kernels.y",
    }  # fmt: skip
    assert found["absolute_in_kernels"] == {
        "empf.kernels.x imports kernels.y by its full name", "empf.kernels.y imports empf.kernels.z by its full name",
    }  # fmt: skip
    assert found["in_functions"] == {"empf.data.load imports empf.core in a function"}
    assert found["misplaced"] == {"empf.deploy imports accelerate", "empf.training imports datasets"}
    assert found["too_long"] == {f"empf.training has more than {LINES_OF_A_FILE} lines"}
    assert found["too_deep"] == {f"empf.floor0 stands on floor {FLOORS + 1} of {FLOORS}"}
    floors = {f"empf.floor{number} has no test file" for number in range(FLOORS + 1)}
    assert found["untested"] == floors | {"empf.data.load has no test file"}


def clear() -> None:
    for cached in (sources, tree, imports):
        cached.cache_clear()
