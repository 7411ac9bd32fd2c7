"""Kernels compiled ahead of time for eight GPUs, none of which need be there: what must hold of the machine code."""

import functools
import json
import sys
from pathlib import Path

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
ON_HOPPER = ("128x128", "fp16")  # cases of products looked at more closely below


def spread_out():
    """Every case for one of its targets in turn; what `ON_HOPPER` names for sm_90."""
    targets = {}
    for module, case, target in aot.chosen(*MODULES):
        targets.setdefault((module, case), []).append(target)
    return [
        (
            *case,
            "sm_90"
            if case[0] in PRODUCTS and any(text in case[1] for text in ON_HOPPER)
            else fitting[n % len(fitting)],
        )
        for n, (case, fitting) in enumerate(targets.items())
    ]


@functools.cache
def facts():
    """What `spread_out` names, compiled once for all tests; the result file has all cases for all targets."""
    return {(f.module, f.case, f.target): f for f in aot.compile_cases(spread_out())}


def on_hopper(module):
    return {case: found for (of, case, target), found in facts().items() if of == module and target == "sm_90"}


def test_every_configuration_compiles_and_stays_in_registers():
    """No local-memory traffic, tensor cores in every product, and no more shared memory than there is."""
    compiled = {(name, case) for name, case, _ in facts()}
    assert compiled == {(name, case[0]) for name in MODULES for case in CASES[name]()}
    assert {target for _, _, target in facts()} == set(aot.TARGETS)
    for found in facts().values():
        assert found.spills == 0 and found.stack == 0, found
        if found.module in PRODUCTS:
            assert 0 < found.shared <= SHARED_LIMIT[found.target], found
            assert found.tensor_core > 0 or found.case.startswith("unpack"), found
        else:
            assert found.registers <= 255 and found.shared <= 8192, found


def test_the_result_file_has_every_case_for_every_target_without_spills():
    """Made by `python bench/kernels.py` without a GPU."""
    rows = json.loads((Path(aot.__file__).parent / "results" / "kernels-static.json").read_text())["compiled"]
    assert {(row["module"], row["case"], row["target"]) for row in rows} == set(aot.chosen(*MODULES))
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


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(aot, "PROCESSES", 1)  # it compiles the first case and every second after it


def test_selection_of_cases_and_targets(one_process):
    [found] = aot.compile_cases(aot.chosen("matmul", targets=("sm_90",), only=("unpack bf16",)))
    assert (found.module, found.case, found.target) == ("matmul", "unpack bf16", "sm_90")
    assert found.registers > 0 and found.instructions > 0
    assert found.tensor_core == 0 and found.loop == {} and found.loop_instructions == 0
    with pytest.raises(ValueError, match="sm_42"):
        aot.chosen("matmul", targets=("sm_42",))
    with pytest.raises(ValueError, match="modules must be among matmul, .*, got dispatch"):
        aot.chosen("dispatch")


def test_a_failure_is_told(one_process, monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise RuntimeError('no compiler here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="does not compile: (.|\n)*no compiler here"):
        aot.compile_cases(aot.chosen("matmul", targets=("sm_90",)))


def test_loop_is_the_innermost_with_tensor_cores():
    lines = list(enumerate(["MOV", "HMMA", "LDS", "HMMA", "HMMA", "BRA", "BRA", "IADD3", "BRA"]))
    found = aot._count(lines, [(3, 5), (1, 6), (7, 8)])
    assert found["loop"] == {"HMMA": 2, "BRA": 1} and found["all"]["HMMA"] == 3
    assert aot._count(lines, [(7, 8)])["loop"] == {}
