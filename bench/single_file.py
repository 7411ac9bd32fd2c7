"""Write the folder `kernels/` as one file, for those who copy one file.

    python bench/single_file.py my_kernels.py

`import my_kernels` then gives what the folder gives, its modules included (`from my_kernels.pack import pack`): the
file holds the text of each, unchanged and readable, and a loader of twenty lines. Operators get its name.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = '''"""Kernels for 1-bit synapses and floating-point spikes: the modules of a folder in one file.

{license}"""

import importlib.abc
import importlib.util
import sys

MODULES = {{}}  # name -> source
'''
MODULE = """
# ---------------------------------------------------------------------------------------------------- {name}.py
MODULES["{name}"] = r'''{source}'''
"""
TAIL = '''
# ----------------------------------------------------------------------------------------------------


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the modules above as submodules of this one; Triton reads their source through `get_source`."""

    def find_spec(self, fullname, path=None, target=None):
        parent, _, name = fullname.rpartition(".")
        if parent == __name__ and name in MODULES:
            spec = importlib.util.spec_from_loader(fullname, self, origin=__file__)
            spec.has_location = True  # so each has a __file__, beside which there is no C++
            return spec

    def get_source(self, fullname):
        return MODULES[fullname.rpartition(".")[2]]

    def get_code(self, fullname):
        return compile(self.get_source(fullname), f"{__file__}:{fullname}", "exec")


__path__, __package__ = [], __name__
sys.meta_path.append(_Modules())
exec(compile(MODULES["__init__"], __file__, "exec"))
'''


def single_file() -> str:
    """The text of the file."""
    text = HEAD.format(license=(ROOT / "LICENSE").read_text())
    for path in sorted((ROOT / "kernels").glob("*.py")):
        source = path.read_text()
        if "'''" in source or source.endswith("\\"):
            raise ValueError(f"{path} cannot stand in a raw string: it contains three single quotes")
        text += MODULE.format(name=path.stem, source=source)
    return text + TAIL


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the folder kernels/ as one file.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    path.write_text(single_file())
    print(f"written: {path}, {len(path.read_text().splitlines())} lines")


if __name__ == "__main__":
    main()
