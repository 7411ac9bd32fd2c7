"""bench/scaling.py: counted work against formulas, predicted bytes against those that two processes exchange."""

import json
import subprocess
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import empf
from bench import cluster, scaling
from bench.cluster import Links, Work, all_reduce, buckets, count, powersgd_bytes, predict
from empf.accounting import macs
from empf.models import ModelConfig, build
from empf.training import processes, session, sync_norm

TINY = ModelConfig(width=0.0625, T=3, image_size=8)


@pytest.fixture(scope="module")
def work() -> Work:
    return count(TINY, batch_size=4)


def test_counted_operations_are_those_of_the_formula(work):
    """Forward: stem once, the rest at t* = 1..T steps; backward: twice that of one step, no gradient of the image."""
    model, of_layer = build(TINY), {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(lambda m, _, y: of_layer.update({m: 2 * macs(m, y)}))
    model(torch.randn(4, 3, 8, 8), steps=1)
    stem = of_layer.pop(model.stem.conv)
    rest = sum(of_layer.values())
    assert work.forward == stem + 2 * rest  # (1 + 2 + 3) / 3 steps
    assert work.backward == stem + 2 * rest


def test_every_gradient_is_exchanged_once_when_it_is_complete(work):
    assert work.bytes == 4 * sum(p.numel() for p in build(TINY).parameters())
    ready = [operations for _, operations in work.gradients]
    assert ready == sorted(ready) and ready[-1] == work.backward and 0 < ready[0] < 0.1 * work.backward


def test_bytes_of_synchronised_norms(work, monkeypatch):
    """Counted where the norms send, mean over t*."""
    sent = []
    monkeypatch.setattr(sync_norm, "joint_mean", lambda values: sent.append(4 * values.numel()) or values)
    monkeypatch.setattr(sync_norm.dist, "get_world_size", lambda: 1)
    model = build(TINY)
    sync_norm.sync_norms(model)
    for t in range(1, TINY.T + 1):
        empf.online_backward(model, torch.randn(4, 3, 8, 8), torch.zeros(4).long(), F.cross_entropy, steps=[t])
    assert sum(sent) / TINY.T == work.norm_bytes and len(sent) / TINY.T == work.norm_calls


def test_assumptions_are_those_of_train():
    assert cluster.READ_EVERY == session.READ_EVERY
    assert processes.COMPRESSION["powersgd"][1]["matrix_approximation_rank"] == cluster.POWERSGD_RANK


def test_powersgd_sends_factors_of_large_matrices():
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(100, 50), "small": torch.nn.Linear(10, 9)})
    assert powersgd_bytes(model) == 4 * (4 * (100 + 50) + 50 + 10 * 9 + 9)


def test_all_reduce_by_hand():
    links = Links(node=2.0, network=1.0, per_node=4, latency=1e-3)
    assert all_reduce(1e9, 1, links) == 0
    assert all_reduce(1e9, 2, links) == pytest.approx(0.5 + 2e-3)  # ring: all bytes over a link once
    assert all_reduce(1e9, 4, links) == pytest.approx(0.75 + 6e-3)
    assert all_reduce(1e9, 8, links) == pytest.approx(0.75 + 6e-3 + 0.25 + 2e-3)  # a quarter between the nodes
    assert all_reduce(0, 4096, links) == pytest.approx(4e-3 + 20e-3)  # trees: 2 log2(4) + 2 log2(1024) hops
    with pytest.raises(ValueError, match="network must be positive, got 0"):
        Links(network=0)


def test_gradients_leave_in_buckets():
    mb = 2**20
    assert buckets([(mb // 2, 1), (mb, 2), (20 * mb, 3), (6 * mb, 4), (mb, 5)]) == [
        (mb + mb // 2, 2), (26 * mb, 4), (mb, 5)
    ]  # fmt: skip


def test_overlap_hides_what_is_complete_early():
    """Backward of 2 s; 1e9 bytes complete after 1 s and after 2 s, 1 s to send each: 1 s is left, or 2 s."""
    work = Work(1.0, 2.0, [(10**9, 1.0), (10**9, 2.0)], 0, [], 4)
    links = Links(flops=1.0, node=1.0, latency=1e-12)
    assert predict(work, 2, links)["waiting"] == pytest.approx(1.0, rel=1e-6)
    assert predict(work, 2, links)["efficiency"] == pytest.approx(3 / 4, rel=1e-6)
    assert predict(work, 2, links, overlap=False)["waiting"] == pytest.approx(2.0, rel=1e-6)
    assert predict(work, 2, links, compress=0.5)["waiting"] == pytest.approx(0.5, rel=1e-6)
    assert predict(work, 1, links)["efficiency"] == 1


def test_study_and_what_it_concludes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "NETWORKS", {"tiny": (TINY, 4)})
    results = {}
    for name, network in (("fast", "1e6"), ("slow", "1e-4")):
        scaling.main(["--network", network, "--sync-bn", "--json", str(tmp_path / "s.json")])
        results[name] = json.loads((tmp_path / "s.json").read_text())["networks"]["tiny"]
        assert results[name]["bytes"]["batch_norms"] > 0
    printed = capsys.readouterr().out
    for n in results.values():
        labels = ("after the backward pass", "overlap", "overlap, bf16", "overlap, PowerSGD")
        efficiency = [[n["gpus"][str(p)][label]["efficiency"] for p in scaling.GPUS] for label in labels]
        assert all(row[0] == 1 and row == sorted(row, reverse=True) for row in efficiency)
        for late, early in pairwise(efficiency):
            assert all(a <= b for a, b in zip(late, early, strict=True))
    assert "| 1024 |" in printed and "gradient traffic dominates" in printed


def test_two_processes_exchange_the_predicted_bytes():
    """Also: what is exchanged is exchanged by both, and costs time."""
    r = scaling.check(width=0.0625, batch_size=2, rounds=1)
    assert r["bytes"]["predicted"] == r["bytes"]["counted"] > 0 and r["buckets"]["predicted"] == r["buckets"]["counted"]
    one, two = r["efficiency"]["1"], r["efficiency"]["2"]
    assert one["predicted"] == 1 > two["predicted"] > 0 and r["processes"] == 2
    assert all(e["measured"]["median"] > 0 for e in (one, two)) and min(r["images_per_s"].values()) > 0


def test_what_the_processes_said_is_said_and_not_the_report_of_the_launcher(monkeypatch):
    said = "terminate called\nW1127 22:56:23.9 1 api.py:1] closing\nE1127 22:56:24.0 1 api.py:2] failed\n" + 600 * "="
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="^the two processes failed: terminate called$"):
        scaling.launch([], 1)


def test_two_processes_against_two_threads(tmp_path, capsys):
    """Each cell is written as it comes; a ratio is that of the same round."""
    file = tmp_path / "cores.json"
    flags = ["--widths", "0.0625", "--types", "bf16", "--images", "4", "--rounds", "1", "--json", str(file)]
    scaling.main(["--cores", *flags])
    (cell,) = json.loads(file.read_text())["cells"]
    assert {"width": 0.0625, "type": "bf16", "batch_size": 4}.items() <= cell.items()
    speed = {name: found["median"] for name, found in cell["images_per_s"].items()}
    ratio = cell["processes_over_threads"]["median"]
    assert ratio == pytest.approx(speed["processes"] / speed["threads"], rel=0.01)
    assert json.loads(capsys.readouterr().out) == cell
