"""Kernels compiled ahead of time for four GPUs, none of which need be there, and what must hold of the machine code."""

import functools
import sys

import pytest

from bench import aot
from empf.kernels.matmul import CONFIGS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the tools inside the Triton wheel for Linux")
pytest.importorskip("triton", reason="needs Triton")

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes per program


@functools.cache
def facts(module):
    return {(found.case, found.target): found for found in aot.compile_cases(module)}


def name(x, config):
    return f"{x} binary {config.block_m}x{config.block_n}x{config.block_k}"


def test_every_matmul_configuration_compiles_for_every_target():
    for x, configs in (("i8", CONFIGS[1]), ("bf16", CONFIGS[2]), ("fp32", CONFIGS[4])):
        for config in configs:
            for target in aot.TARGETS if config.block_m <= 128 else ("sm_90",):
                found = facts("matmul")[name(x, config), target]
                assert found.tensor_core > 0 and found.loop_instructions > 0, found
                assert 0 < found.shared <= SHARED_LIMIT[target], found


def test_matmul_keeps_to_registers():
    for found in facts("matmul").values():
        if found.target == "sm_90":
            assert found.spills == 0 and found.stack == 0, found


@pytest.mark.parametrize("x", ["bf16", "fp16", "i8", "u8"])
def test_unpacked_weights_never_pass_through_shared_memory_on_hopper(x):
    """The loop holds wgmma. Only uint8 codes are stored again, as int8: 64 bytes per thread, 16 at a time."""
    cases = [found for (case, target), found in facts("matmul").items() if case.startswith(x) and target == "sm_90"]
    assert cases
    for found in cases:
        loop = found.loop
        assert loop.get("IGMMA" if x in ("i8", "u8") else "HGMMA", 0) > 0, (found.case, loop)
        stores = sum(loop.get(store, 0) for store in ("STS", "STSM"))
        assert stores <= (4 if x == "u8" else 0), (found.case, loop)
        assert not {"LDL", "STL"} & set(loop), (found.case, loop)


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize(("x", "tile", "limit"), [("bf16", "128x128x64", 140), ("i8", "128x128x128", 125)])
def test_instructions_per_warp_and_step(x, tile, limit, kind):
    found = facts("matmul")[f"{x} {kind} {tile}", "sm_90"]
    assert 0 < found.loop_instructions <= limit, found


def test_selection_of_cases_and_targets():
    [found] = aot.compile_cases("matmul", targets=("sm_90",), only="unpack")
    assert (found.module, found.case, found.target) == ("matmul", "unpack bf16", "sm_90")
    assert found.registers > 0 and found.instructions > 0
    assert found.tensor_core == 0 and found.loop == {} and found.loop_instructions == 0
    with pytest.raises(ValueError, match="sm_42"):
        aot.compile_cases("matmul", targets=("sm_42",))


def test_a_failure_is_told():
    with pytest.raises(RuntimeError, match="aot_cases"):
        aot.compile_cases("dispatch")


def test_loop_is_the_innermost_with_tensor_cores():
    lines = list(enumerate(["MOV", "HMMA", "LDS", "HMMA", "HMMA", "BRA", "BRA", "IADD3", "BRA"]))
    found = aot._count(lines, [(3, 5), (1, 6), (7, 8)])
    assert found["loop"] == {"HMMA": 2, "BRA": 1} and found["all"]["HMMA"] == 3
    assert aot._count(lines, [(7, 8)])["loop"] == {}
