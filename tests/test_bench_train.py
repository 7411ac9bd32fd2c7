"""bench/train.py: the loops it compares are the same learning, and what it counts is really there."""

import json
import mmap
import sys
from pathlib import Path

import pytest
import torch

from bench import loops
from bench import train as bench
from bench.loops import Loop, Setting, Watch
from empf import layer

TINY = Setting(width=0.0625, T=2, batch_size=4)


def test_measurement_of_a_small_network(monkeypatch):
    monkeypatch.setattr(bench, "peak", lambda setting, variant: 1_000_000)  # without five processes
    monkeypatch.setattr(bench, "largest_rate", lambda setting, clock: 1e9)
    monkeypatch.setattr(layer, "SMALL", 0)
    r = json.loads(json.dumps(bench.measure(TINY, repeats=1)))
    assert list(r["variants"]) == list(bench.VARIANTS) and {"cpu", "threads", "commit", "date"} <= set(r["machine"])
    assert max(r["gradients_apart"]["float64"].values()) < 1e-9
    for name, v in r["variants"].items():
        parts = v["ms_per_update"]
        assert v["images_per_s"]["median"] > 0 and parts["forward"] > 0 and parts["backward"] > 0
        total = 4e3 / sum(parts.values())  # images/s
        assert total == pytest.approx(v["images_per_s"]["median"], rel=0.01)
        assert ("past" in parts) == (name in loops.ONE_STEP)
    gflop, saved = ({n: f(v) for n, v in r["variants"].items()} for f in (
        lambda v: v["gflop_per_update"], lambda v: v["bytes"]["saved"],
    ))  # fmt: skip
    assert gflop["kept"] < gflop["authors-order"] == gflop["authors-loop"] < gflop["every"]  # the stem in each step
    assert saved["random"] == saved["every"] < saved["kept"] == saved["authors-order"] < saved["stbp"]
    assert {"authors-order", "authors-loop"} < set(r["speed_of_random_over"])
    text = bench.report(r)
    assert "layout conversions in an update: none" in text and "host reads in an update: none" in text


def test_another_order_of_learning_is_refused(monkeypatch):
    right = loops.authors_order
    monkeypatch.setattr(loops, "authors_order", lambda model, x, target, criterion, t, backward: right(
        model, x, target, criterion, max(1, t - 1), backward
    ))  # fmt: skip
    with pytest.raises(ValueError, match="the gradients of authors-order are .* nothing timed"):
        bench.check_gradients(TINY)


@pytest.mark.parametrize("variant", ["random", "kept", "every", "stbp"])
def test_no_layout_conversion_and_no_read_by_the_host(variant):
    """Forward, backward and optimizer of a channels_last network."""
    seen = bench.watch(Loop(TINY), variant)
    assert not seen.conversions and not seen.reads


def test_the_loop_of_the_authors_is_plain_and_in_the_default_layout(monkeypatch):
    monkeypatch.setattr(layer, "SMALL", 0)
    loop = Loop(TINY)
    plain, found = loop.of("authors-loop"), []
    assert plain is loop.of("authors-loop") and loop.of("authors-order") is loop
    x, target = next(plain.batches)
    plain.model.blocks[0].conv2.neuron.register_forward_pre_hook(lambda m, inputs: found.append(inputs[0][0]))
    plain.model.blocks[0].conv2.register_forward_hook(lambda m, inputs, out: found.append(out[0]))
    plain.gradients("authors-loop", 2, x, target)
    layouts = {name for y in [x, *found] for name in loops.formats(y)}
    assert len(found) == 4 and layouts == {"contiguous"}  # of two steps, and the current reached the neuron
    functions, queue = set(), [found[-1].grad_fn]
    while queue:
        node = queue.pop()
        functions.add(node.name())
        queue += [n for n, _ in node.next_functions if n is not None]
    assert "NativeBatchNormBackward0" in functions and not any("Fire" in f or "NormFn" in f for f in functions)


def test_a_conversion_and_a_read_are_seen():
    loop = Loop(TINY)
    x = torch.randn(2, 3, 8, 8)
    with Watch(loop.model) as seen:
        x.contiguous(memory_format=torch.channels_last)
        x.to(memory_format=torch.channels_last, copy=True)
        torch.empty(2, 3, 8, 8).to(memory_format=torch.channels_last).copy_(x)
        x.clone()
        x.sum().item()
    assert sum(seen.conversions.values()) == 4 and seen.reads == {"_local_scalar_dense": 1}
    plain = bench.watch(Loop(Setting(width=0.0625, T=2, batch_size=4, channels_last=False)))
    assert any(name.startswith("convolution_backward") for name in plain.conversions)
    loop.model.stem.register_forward_hook(lambda module, inputs, out: out + out.sum().item() * 0)
    assert sum(bench.watch(loop).reads.values()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_of_this_process():
    with bench.cpu_peak() as growth:
        before, size = growth(), 80_000_000
        block = mmap.mmap(-1, size)  # what malloc hands out may be resident already
        block.write(b"1" * size)
        assert growth() - before > 0.95 * size
        block.close()
    with bench.cpu_peak() as growth:
        assert growth() < 10_000_000  # the peak starts anew


def test_events_and_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda setting, repeats, cpu_time, variants: {"setting": setting.width})
    monkeypatch.setattr(bench, "report", lambda result: "done")
    bench.main(
        [
            "--width",
            "0.25",
            "--device",
            "cpu",
            "--threads",
            str(torch.get_num_threads()),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    assert json.loads((tmp_path / "r.json").read_text()) == {"setting": 0.25} and "done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--cuda-graph needs a GPU"):
        bench.main(["--device", "cpu", "--cuda-graph"])
    setting = Setting("vgg_snn", width=0.0625, T=2, batch_size=2)
    loop = Loop(setting, torch.float64)
    assert max(bench.compare(loop, bench.draw(loop, 2)).values()) < 1e-9


def test_gradients_that_are_wrong_are_not_timed(monkeypatch):
    setting = Setting(width=0.0625, T=2, batch_size=4)
    found = bench.check_gradients(setting)
    assert max(found["float64"].values()) < 1e-9 and 0 < found["rounding of random"] < 0.1
    plain = bench.compare
    monkeypatch.setattr(bench, "compare", lambda *a: {**plain(*a), "kept": 0.5})
    with pytest.raises(ValueError, match="gradients of kept are 5.0e-01"):
        bench.check_gradients(setting)


def test_the_bound_is_that_of_measured_rounding(monkeypatch):
    """bf16 changes a quarter of the gradient of a network that has learned nothing, and two variants differ by more."""
    setting = Setting(width=0.0625, T=2, batch_size=4)
    plain = bench.compare

    def apart(loop, batch):
        return plain(loop, batch) | ({} if loop.dtype == torch.float64 else {"kept": 0.37})

    monkeypatch.setattr(bench, "compare", apart)
    monkeypatch.setattr(bench, "rounding", lambda *_: 0.25)
    assert bench.check_gradients(setting)["as timed"]["kept"] == 0.37
    monkeypatch.setattr(bench, "rounding", lambda *_: 0.18)
    with pytest.raises(ValueError, match="gradients of kept are 3.7e-01 .* more than 3.6e-01"):
        bench.check_gradients(setting)
    for useless in (1.5, float("nan")):
        monkeypatch.setattr(bench, "rounding", lambda *_, own=useless: own)
        with pytest.raises(ValueError, match="rounding alone changes"):
            bench.check_gradients(setting)


def test_the_flags_of_a_setting_give_the_setting(monkeypatch):
    found = []
    monkeypatch.setattr(bench, "peak_alone", lambda setting, variant: found.append((setting, variant)) or 7)
    setting = Setting("resnet19", 0.125, 3, 5, "ternary", "cpu", bf16=True, channels_last=False)
    bench.main(["--alone", "every", *bench.flags(setting)])
    assert found == [(setting, "every")] and Path(bench.__file__).name == "train.py"


@pytest.mark.gpu
def test_a_captured_graph_gives_the_gradients_of_the_loop():
    eager, captured = (Loop(Setting(width=0.25, T=2, batch_size=8, device="cuda", cuda_graph=g)) for g in (False, True))
    captured.model.load_state_dict(eager.model.state_dict())
    x, target = next(eager.batches)
    for t in (2, 1, 2):
        eager.model.zero_grad()
        eager.gradients("random", t, x, target)
        captured.replay("random", t, x, target)
        for a, b in zip(eager.model.parameters(), captured.model.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-2 * a.grad.norm() + 1e-7
        captured.optimizer.zero_grad(set_to_none=False)
    assert len(captured.captured["random"].graphs) == 2
