"""bench/kernels.py: what it compares agrees with the definitions, and without a GPU it says what can be known."""

import json

import pytest
import torch

from bench import kernels as bench

SMALL = bench.cases(small=True)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contenders_agree_with_the_definition(case):
    """At small sizes on this machine: ours, dense and eager; torch.compile and other libraries need the GPU."""
    torch.manual_seed(0)
    z = case.inputs("cpu")
    checked = [name for name in case.contenders if name in case.tolerance or name == "eager"]
    for name in checked:
        if not name.startswith("gemlite"):
            assert bench.error(case, name, z) <= case.tolerance.get(name, 0.1), name
    assert any(name.startswith("ours") for name in checked)


def test_error_is_a_maximum():
    """One wrong element is seen."""
    case = SMALL[-4]
    z = case.inputs("cpu")
    right = case.contenders["ours"]

    def wrong(z):
        y = right(z).clone()
        y[0, 0, 0, 0, 7] += 1
        return y

    broken = bench.Case(case.name, case.inputs, {"ours": wrong}, case.reference, case.tolerance, case.moved)
    assert bench.error(broken, "ours", z) > case.tolerance["ours"]


def test_goals_name_contenders():
    for case in bench.cases():
        for ours, rival, ratio in case.goals:
            assert ours in case.contenders and rival in case.contenders and ratio > 0


def test_floors_by_hand():
    """16384 x 16384 one-bit weights are 33.6 MB, 7.8 us; 4096^3 in int8 is bound by the product, 87 us."""
    floors = {row["case"]: row["floor_us"] for row in bench.floors()}
    assert floors["matmul 1x16384x16384"]["ours int8"] == pytest.approx(7.8, abs=0.1)
    assert floors["matmul 4096x4096x4096"]["ours int8"] == pytest.approx(87, abs=1)
    assert floors["matmul 4096x4096x4096"]["ours bf16"] == pytest.approx(174, abs=1)
    assert floors["conv3x3 256x64@32"]["ours bf16"] == pytest.approx(24.5, abs=0.1)
    assert floors["neuron forward 4x64x64x32x32"]["ours"] == pytest.approx(15.6, abs=0.1)


def test_report_prints_ratio_share_and_goal(capsys):
    case = bench.cases()[0]
    measured = {name: {"us": 10.0, "p10": 9.0, "p90": 11.0} for name in case.contenders}
    measured["cuBLAS bf16"]["us"] = 120.0
    measured["cuBLAS int8"] = {"failed": "RuntimeError: no"}
    rows = bench.report(case, measured, bench.H200)
    printed = capsys.readouterr().out
    assert "12.00x, goal 10.0x, met" in printed and "78 % of the limit" in printed and "RuntimeError: no" in printed
    assert rows[0]["speedup"]["cuBLAS bf16"] == 12.0 and "cuBLAS int8" not in rows[0]["speedup"]


@pytest.mark.parametrize("measured", [True, False])
def test_figures(measured, tmp_path):
    """One for each function, of times and of counts."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    time = {"us": 10.0, "p10": 9.0, "p90": 12.0}
    result = {"device": "a GPU", "rows": []}
    for case in bench.cases(small=True):
        result["rows"] += [{"case": case.name, "contender": name, "share": 0.5 if name in case.moved else None} | time
                           for name in case.contenders]  # fmt: skip
        result["rows"].append({"case": case.name, "goal": "a / b", "wanted": 2.0, "ratio": 1.0})
    if not measured:
        row = {"case": "a", "target": "sm_90", "instructions": 9, "loop_instructions": 0}
        result = {"device": "static", "floors_h200_us": bench.floors()}
        result["compiled"] = [row | {"module": module} for module in bench.MODULES]
    made = bench.figures(result, tmp_path / "kernels.json")
    assert [path.name for path in made] == [f"kernels-{name}.png" for name in bench.FUNCTIONS]
    assert all(path.stat().st_size > 5000 for path in made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "MODULES", ("neuron",))
    bench.main(["--quick", "--json", str(tmp_path / "result.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU") and "nothing is timed" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"machine", "device", "torch", "triton", "commit", "date"} <= set(result) and result["device"] == "static"
    assert all(row["module"] == "neuron" and row["spills"] == 0 for row in result["compiled"]) and result["compiled"]
    assert len(result["floors_h200_us"]) == len(bench.cases())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_quick_run_leaves_the_full_result_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "run_static", lambda *arguments: [])
    bench.main(["--quick"])
    written = [path.name for path in (tmp_path / "results").iterdir()]
    assert "kernels-static-quick.json" in written and all("-quick" in name for name in written)


def test_only_what_has_changed_is_compiled_again(tmp_path, monkeypatch):
    """And a run that was stopped continues."""
    asked = []

    def compiled(wanted):
        if len(asked) == 1 and not path.with_suffix(".stopped").exists():
            path.with_suffix(".stopped").touch()
            raise KeyboardInterrupt
        asked.append(wanted)
        return [bench.aot.Facts(*case, *[0] * 7, {}) for case in wanted]

    monkeypatch.setattr(bench.aot, "compile_cases", compiled)
    monkeypatch.setattr(bench, "AT_A_TIME", 5)
    path, about = tmp_path / "a.json", {"triton": "3", "commit": "a"}
    with pytest.raises(KeyboardInterrupt):
        bench.run_static(True, path, about)
    rows = bench.run_static(True, path, about)
    assert sorted(sum(asked, [])) == sorted((row["module"], row["case"], row["target"]) for row in rows)
    assert bench.run_static(True, path, about | {"commit": "b"}) == rows
    stored = json.loads(path.read_text())
    stored["compiled"][3]["digest"] = "of another kernel"
    path.write_text(json.dumps(stored))
    again = bench.run_static(True, path, about | {"commit": "b"})
    assert [row["commit"] for row in again].index("b") == 3 and again[3] == rows[3] | {"commit": "b"}
    assert {row["commit"] for row in bench.run_static(True, path, {"triton": "4", "commit": "c"})} == {"c"}
