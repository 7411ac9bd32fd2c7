"""Kernels compiled ahead of time for eight GPUs, none of which need be there: what must hold of the machine code."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import aot
from bench.aot_cases import CASES
from empf.kernels.conv_tiles import TILES
from empf.kernels.matmul import CONFIGS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs the tools inside the Triton wheel for Linux"),
    pytest.mark.xdist_group("facts"),  # in one process, which compiles once
]
pytest.importorskip("triton", reason="needs Triton")

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
SHARED_LIMIT |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101_376)  # bytes per program
TILE_KEYS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS", "COLUMNS")


MODULES = tuple(CASES)
PRODUCTS = ("matmul", "conv", "conv_neuron")
LOOKED_INTO = {  # whose loop is looked at, on sm_90
    "matmul": ("bf16 binary 128x128", "bf16 ternary", "fp16", "i8 binary 128x", "i8 ternary", "u8 binary", "unpack b"),
    "conv": ("128x128",), "conv_neuron": ("128x128",),
}  # fmt: skip


@functools.cache
def facts():
    """(cases of each kernel for each target in turn, what is looked into), compiled once for all tests."""
    in_turn = aot.in_turn()
    wanted = [case for m, only in LOOKED_INTO.items() for case in aot.chosen(m, targets=("sm_90",), only=only)]
    found = aot.compile_cases(in_turn + wanted, brief=len(in_turn))
    return found[: len(in_turn)], found[len(in_turn) :]


def on_hopper(module):
    return {f.case: f for f in facts()[1] if f.module == module}


def test_each_kernel_stays_in_registers_and_in_shared_memory():
    """No local-memory traffic, tensor cores in every product. The result file below has all cases for all targets."""
    in_turn, looked_into = facts()
    kernels = {(module, name): kernel for module in MODULES for name, kernel, *_ in CASES[module]()}
    assert {f.target for f in in_turn} == set(aot.TARGETS)
    assert {kernels[f.module, f.case] for f in in_turn} == set(kernels.values())
    for found in in_turn + looked_into:
        assert found.spills == 0 and found.stack == 0, found
        if found.module in PRODUCTS:
            assert 0 < found.shared <= SHARED_LIMIT[found.target], found
            assert found.tensor_core > 0 or found.case.startswith("unpack"), found
        else:
            assert found.registers <= 255 and found.shared <= 8192, found


def test_the_result_file_has_every_case_for_every_target_without_spills():
    """Compiled from the kernels as they are; if not, `python bench/kernels.py` compiles what has changed."""
    rows = json.loads((Path(aot.__file__).parent / "results" / "kernels-static.json").read_text())["compiled"]
    found = {(row["module"], row["case"], row["target"]): row["digest"] for row in rows}
    assert found == {case: aot.digest(*case) for case in aot.chosen(*MODULES)}
    assert [row for row in rows if row["spills"] or row["stack"]] == []
    assert all(row["shared"] <= SHARED_LIMIT[row["target"]] for row in rows)


def test_every_choice_of_the_launchers_is_a_case():
    """Each tile of the tables, each type of x, binary and ternary, split and whole."""
    for name, table in (("matmul", CONFIGS), ("conv", TILES), ("conv_neuron", TILES)):
        cases = [case for case in CASES[name]() if "x_ptr" in case[2]]
        tiles = {tuple(size for key, size in case[3].items() if key in TILE_KEYS) for case in cases}
        assert tiles == {tuple(tile[: 3 if name == "matmul" else 2]) for tiles in table.values() for tile in tiles}
        assert {case[2]["x_ptr"] for case in cases} == {"*bf16", "*fp16", "*fp32", "*i8", "*u8"}
        assert {case[3]["TERNARY"] for case in cases} == {case[3]["SPLIT"] for case in cases} == {True, False}


@pytest.mark.parametrize("x", ["bf16", "fp16", "i8", "u8"])
def test_unpacked_weights_never_pass_through_shared_memory_on_hopper(x):
    """The loop holds wgmma. Only uint8 codes are stored again, as int8: 64 bytes per thread, 16 at a time."""
    cases = {case: found.loop for case, found in on_hopper("matmul").items() if case.startswith(x)}
    for module in ("conv", "conv_neuron"):
        cases |= {case: f.loop for case, f in on_hopper(module).items() if case.startswith(x) and "128x128" in case}
    assert cases
    for case, loop in cases.items():
        assert loop.get("IGMMA" if x in ("i8", "u8") else "HGMMA", 0) > 0, (case, loop)
        assert sum(loop.get(store, 0) for store in ("STS", "STSM")) <= (4 if x == "u8" else 0), (case, loop)


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize(("x", "tile", "limit"), [("bf16", "128x128x64", 140), ("i8", "128x128x128", 125)])
def test_instructions_per_warp_and_step(x, tile, limit, kind):
    found = on_hopper("matmul")[f"{x} {kind} {tile}"]
    assert 0 < found.loop_instructions <= limit, found


@pytest.mark.parametrize(
    ("module", "case", "limit"),  # 181, 163, 152 and 139 when this was written
    [
        ("conv", "bf16 3x3 128x128", 190),
        ("conv", "i8 3x3 128x128", 190),
        ("conv_neuron", "bf16 T=4 128x128", 160),
        ("conv_neuron", "i8 T=4 128x128 folded", 160),
    ],
)
def test_instructions_of_a_convolution(module, case, limit):
    assert 0 < on_hopper(module)[case].loop_instructions <= limit


KERNEL = '@triton.jit\ndef f(x):\n    """Says."""\n    if x:\n        y = g(1)\n    z = 2\n\n'
KERNEL += "@triton.jit\ndef g(x):\n    return x\n\n@triton.jit\ndef h(x):\n    return f(5)\n"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Says", "Said", True), ("2", "2  # why", True), ("5", "6", True), ("2", "3", False),
        ("   z", "       z", False), ("return x", "return 0", False), (None, None, False),
    ],
)  # fmt: skip
def test_a_digest_follows_what_is_compiled(old, new, same, monkeypatch, tmp_path):
    """The code of the kernel, its indentation, what it calls, its options; no comment, docstring or other kernel."""
    case = SimpleNamespace(__name__="f"), {}, {}
    monkeypatch.setattr(aot.kernels, "__file__", str(tmp_path / "__init__.py"))
    found = []
    for text, warps in ((KERNEL, 4), (KERNEL.replace(old, new) if old else KERNEL, 4 if old else 8)):
        (tmp_path / "a.py").write_text(text)
        monkeypatch.setattr(aot, "CASES", {"m": lambda warps=warps: [("c", *case, {"num_warps": warps})]})
        aot.functions.cache_clear()
        found.append(aot.digest("m", "c", "sm_90"))
    aot.functions.cache_clear()
    assert (found[0] == found[1]) == same


def test_selection_of_cases_and_targets():
    found = on_hopper("matmul")["unpack bf16"]
    assert found.registers > 0 and found.instructions > 0 and found.target == "sm_90"
    assert found.tensor_core == 0 and found.loop == {} and found.loop_instructions == 0
    with pytest.raises(ValueError, match="sm_42"):
        aot.chosen("matmul", targets=("sm_42",))
    with pytest.raises(ValueError, match="modules must be among matmul, .*, got dispatch"):
        aot.chosen("dispatch")


def test_a_failure_is_told(monkeypatch, tmp_path):
    compiler = tmp_path / "python"
    compiler.write_text("#!/bin/sh\necho 'matmul: a for sm_90' >&2\necho 'no compiler here' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(compiler))
    with pytest.raises(RuntimeError, match="does not compile: matmul: a for sm_90\n(.|\n)*no compiler here"):
        aot.compile_cases(aot.chosen("matmul", targets=("sm_90",)))


def test_loop_is_the_innermost_with_tensor_cores():
    lines = list(enumerate(["MOV", "HMMA", "LDS", "HMMA", "HMMA", "BRA", "BRA", "IADD3", "BRA"]))
    found = aot._count(lines, [(3, 5), (1, 6), (7, 8)])
    assert found["loop"] == {"HMMA": 2, "BRA": 1} and found["all"]["HMMA"] == 3
    assert aot._count(lines, [(7, 8)])["loop"] == {}
