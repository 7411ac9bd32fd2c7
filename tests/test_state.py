"""bench/state.py: moving digits as events, learning through time, and a study that is resumed and chooses blindly."""

import pytest
import torch

import empf
from bench import sequences, state
from bench.sequences import CONTRAST, FRAMES, SENSOR, recordings


def one_task(seed=0, classes=3):
    """(T, N, features) with labels, to train and to test with."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(3, n, 4, generator=generator), torch.arange(n) % classes) for n in (20, 10))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(state, "TASKS", {"random": one_task})
    for name, value in {"UPDATES": 2, "BATCH": 10, "SEEDS": 2, "LRS": (0.01, 0.02)}.items():
        monkeypatch.setattr(state, name, value)
    monkeypatch.setattr(state, "NEURONS", {name: state.NEURONS[name] for name in ("vanilla", "parallel", "LIF")})
    monkeypatch.setattr(state, "LEARNING", {name: state.LEARNING[name] for name in ("random", "losses")})


def test_events_are_changes_of_brightness_that_move(monkeypatch):
    monkeypatch.setattr(sequences, "NOISE", 0.0)
    images = torch.zeros(64, 8, 8)
    images[:, 2:6, 2:6] = 1
    frames, direction = recordings(images, 3)
    assert frames.shape == (FRAMES, 64, 2, SENSOR, SENSOR) and set(direction.tolist()) == set(range(8))
    assert (frames >= 0).all() and torch.equal(frames, frames.round())
    gained = CONTRAST * (frames[:, :, 1] - frames[:, :, 0]).sum(0)  # the last picture less the first
    assert (gained.sum((1, 2)).abs() < 4).all() and gained.min() >= -1.001 and gained.max() <= 1.001
    place = torch.arange(SENSOR).float()

    def centre(counts):  # N y x
        weights = counts / counts.sum((1, 2), keepdim=True)
        return torch.stack([(weights.sum(2) * place).sum(1), (weights.sum(1) * place).sum(1)], 1)

    for moved in (
        centre(frames[-5:].sum((0, 2))) - centre(frames[:5].sum((0, 2))),  # over time
        centre(frames[:, :, 1].sum(0)) - centre(frames[:, :, 0].sum(0)),  # and in each frame: brighter is ahead
    ):
        assert torch.equal((torch.atan2(moved[:, 0], moved[:, 1]) * 4 / torch.pi).round().long() % 8, direction)
    assert torch.equal(recordings(images, 3)[0], frames) and not torch.equal(recordings(images, 4)[0], frames)
    monkeypatch.undo()
    assert 0.01 < recordings(0 * images, 3)[0].mean() < 0.03  # of black images there is noise alone


def test_tasks():
    """But for speech, which needs a package."""
    shapes = {name: [(*x.shape,) for x, _ in make()] for name, make in sequences.TASKS.items() if name != "speech"}
    assert shapes["digits by rows"] == [(8, 1437, 8), (8, 360, 8)]
    assert shapes["digit, then noise"] == [(8, 1437, 64), (8, 360, 64)]
    assert shapes["events, digit"] == shapes["events, direction"] == [(10, 1437, 2, 12, 12), (10, 360, 2, 12, 12)]
    assert shapes["direction, one polarity"] == [(10, 1437, 1, 12, 12), (10, 360, 1, 12, 12)]
    (digit, _), (direction, one) = (
        sequences.TASKS["events, digit"]()[0],
        sequences.TASKS["direction, one polarity"]()[0],
    )
    assert torch.equal(digit.sum(2, keepdim=True), direction) and set(one.tolist()) == set(range(8))
    x, y = sequences.recall()[0]
    rows, labels = sequences.series("digits")[0]
    assert torch.equal(x[0], rows.transpose(0, 1).flatten(1)) and torch.equal(y, labels)
    of_class = torch.stack([x[1:, y == c].mean((0, 1)) for c in range(10)])
    assert of_class.std(0).max() < 0.06 < torch.stack([x[0, y == c].mean(0) for c in range(10)]).std(0).max()


@pytest.mark.parametrize("shape", [(4,), (2, 12, 12)])
@pytest.mark.parametrize("neuron", state.NEURONS)
def test_through_time_differs_from_every_step_in_the_gradient_that_crosses_steps_alone(neuron, shape):
    """A parallel neuron has no such gradient, and the losses are the same for all."""
    torch.manual_seed(0)
    net, x, y = state.Net(3, shape, 3, neuron, 0.9), torch.rand(3, 12, *shape), torch.arange(12) % 3
    gradients = {}
    for learning in ("every", "losses", "stbp", "random"):
        net.zero_grad()
        state.backward(net, x, y, learning, 0, 0)
        gradients[learning] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        assert all(n.online for n in (net.neuron1, net.neuron2))
    equal = {name: torch.allclose(g, gradients["every"][name], atol=1e-5) for name, g in gradients["losses"].items()}
    assert equal["head.weight"] and equal["hidden.weight"] == equal["embed.weight"] == (neuron == "parallel")
    assert not torch.allclose(gradients["stbp"]["head.weight"], gradients["every"]["head.weight"], atol=1e-5)


def test_a_run_depends_on_its_seed_alone(few):
    results = []
    for seed in (0, 0, 1):
        results.append(state.train(one_task(), "vanilla", "random", 2, seed, 0.01, 0.5))
        torch.rand(3)  # what was drawn before makes no difference
    for result in results:
        assert result.pop("cpu_seconds") >= 0
    assert results[0] == results[1] and set(results[0]) == {"last", "sum", "last_by_step", "sum_by_step"}


def test_study(tmp_path, few, monkeypatch, capsys):
    state.main(["--out", str(tmp_path), "--minutes", "0"])
    assert not state.read(tmp_path) and "time is over" in capsys.readouterr().out
    state.main(["--out", str(tmp_path), "--learning", "losses"])
    assert {r["learning"] for r in state.read(tmp_path)} == {"losses"}
    state.main(["--out", str(tmp_path)])
    runs = state.read(tmp_path)
    assert len(runs) == 2 * (4 + 2 + 4) + 2 * 2 * 3 and {"cpu", "commit", "date"} <= set(runs[0])
    for r in runs:
        assert (r["seed"] == 100) == r["held_out"]
    with monkeypatch.context() as patch:
        patch.setattr(state, "train", None)  # nothing is left to train
        state.main(["--out", str(tmp_path)])
    state.main(["--out", str(tmp_path), "--report"])
    text = (tmp_path / "report.md").read_text()
    assert "| LIF | through time |" in text and text in capsys.readouterr().out
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_settings_are_chosen_without_the_test_data(tmp_path, few, monkeypatch):
    train, seen = state.train, []
    monkeypatch.setattr(state, "train", lambda sets, **how: seen.append((sets, how)) or train(sets, **how))
    state.main(["--out", str(tmp_path)])
    x = one_task()[0][0]
    for sets, how in seen:
        choosing = how["seed"] == 100
        assert [len(y) for _, y in sets] == ([16, 4] if choosing else [20, 10])
        if choosing:
            both = torch.cat([x for x, _ in sets], 1)
            assert torch.allclose(both.sum(1), x.sum(1), atol=1e-5)


def result(learning, seed, last, total, held_out=False, lr=0.01):
    key = {"task": "random", "neuron": "vanilla", "learning": learning, "updates": 2, "held_out": held_out}
    return key | {"seed": seed, "lr": lr, "leak": 0.5, "last": last, "sum": total, "cpu_seconds": 2.0, "commit": None}


def test_the_best_settings_are_those_of_both_readings(tmp_path, few):
    for lr, last, total in ((0.01, 90.0, 10.0), (0.02, 60.0, 60.0), (0.03, 10.0, 90.0)):
        state.append(tmp_path, result("random", 100, last, total, held_out=True, lr=lr))
    state.append(tmp_path, result("random", 0, 100.0, 100.0, lr=0.05))
    for updates in (2, 7):
        jobs = state.jobs("random", tmp_path, updates, ["random"])
        first = next(job for job in jobs if not job["held_out"])
        assert first["lr"] == 0.02 and first["seed"] == 0 and first["updates"] == updates


def test_report(tmp_path, few, capsys):
    with pytest.raises(SystemExit, match="run the study first"):
        state.main(["--report", "--out", str(tmp_path)])
    state.append(tmp_path, result("random", 0, 70.0, 70.0) | {"updates": 7})  # another table
    for seed, (online, through) in enumerate([(20.0, 21.0), (30.0, 33.0)]):
        state.append(tmp_path, result("random", seed, online, 50.0))
        own = {"last_by_step": through + 5, "sum_by_step": 60.0}
        state.append(tmp_path, result("losses", seed, through, 50.0, lr=0.02) | own)
    state.append(tmp_path, result("random", 100, 99.0, 99.0, held_out=True))  # is not in the table
    state.main(["--report", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    # differences 1, 3: standard deviation 1.414, 12.706 * 1.414 / sqrt(2) = 12.7
    losses = "| vanilla | through time | 27.0 (32.0) | 50.0 (60.0) | +2.0 [-10.7, +14.7] | +0.0 [+0.0, +0.0] |  |  |"
    assert losses + " 0.02 | 0.5 | 2.0 |" in text
    assert "| vanilla | online, one step | 25.0 | 50.0 |  |  | -2.0 [-14.7, +10.7] | +0.0 [+0.0, +0.0] |" in text
    assert "unknown (6 runs)" in text and text.index("## random, 2 up") < text.index("## random, 7 up")


def test_the_picture_shows_differences_of_pairs(tmp_path, few, monkeypatch):
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(state, "save_figure", lambda plt, figure, file: figures.append(figure))
    runs = [result(how, seed, *pair) for how, pairs in {
        "random": [(20.0, 50.0), (30.0, 50.0)], "losses": [(21.0, 60.0), (33.0, 50.0)],
    }.items() for seed, pair in enumerate(pairs)]  # fmt: skip
    state.plot(runs, tmp_path / "report.png")
    ax = figures[0].axes[0]
    at = [[list(line.get_xdata()) for line in ax.lines if abs(line.get_ydata()[0] - y) < 1e-6] for y in (0.8, 1.2)]
    assert at == [[[1.0, 3.0], [2.0]], [[10.0, 0.0], [5.0]]]  # last, sum
    assert ax.get_title("left") == "random\n0: last 25.0, sum 50.0 %"
    assert [t.get_text() for t in ax.get_yticklabels()][:2] == ["vanilla, online, one step", "vanilla, through time"]
    plt.close("all")


def test_the_network_resets_between_batches():
    net = state.Net(3, (4,), 3, "vanilla", 0.9)
    state.backward(net, torch.rand(3, 6, 4), torch.arange(6) % 3, "losses", 0, 0)
    state.backward(net, torch.rand(3, 4, 4), torch.arange(4) % 3, "random", 0, 0)
    empf.reset(net)
    assert net.neuron1.v is None


def test_the_numbers_of_the_section_are_those_of_the_runs():
    text = " ".join((state.Path(state.__file__).parents[1] / "docs/results.md").read_text().split())
    runs = state.read(state.OUT)
    kinds = state.kinds_of(runs)

    def means(task, how, name, digits=0, neurons=("Mem-BN", "vanilla", "LIF", "parallel")):
        return ", ".join(f"{kinds[task, 300][n, how].mean(name):.{digits}f}" for n in neurons)

    tasks = ("digits by rows", "events, digit", "direction, one polarity", "digit, then noise")
    for how, said in (
        ("losses", "rows {}; digit from events {}; direction without polarity {}; digit, then noise {}."),
        ("random", "rows {}; digit from events {}; direction {}; digit, then noise {}."),
    ):
        assert said.format(*(means(task, how, "last") for task in tasks)) in text
    order = ("parallel", "vanilla", "Mem-BN", "LIF")
    assert f"direction from OFF and ON events: {means('events, direction', 'random', 'sum', 1, order)}." in text
    for task, summed, last in (
        ("digits by rows", "rows, vanilla {}, Mem-BN {}, LIF {};", "rows {}, {}, {};"),
        ("events, digit", "digit from events, vanilla {}, Mem-BN {}, LIF {}.", "digit {}, {}, {}."),
    ):
        for said, name, digits in ((summed, "sum", 1), (last, "last", 0)):
            pairs = [[kinds[task, 1500][n, how].mean(name) for how in ("random", "losses")] for n in order[1:]]
            assert said.format(*(f"{a:.{digits}f} and {b:.{digits}f}" for a, b in pairs)) in text
    rows = kinds["digits by rows", 300]
    for neuron in ("vanilla", "Mem-BN", "LIF"):
        n, mean, half = state.against(*(rows[neuron, how].accuracy["last"] for how in ("losses", "every")))
        assert n == 5 and f"{mean:.1f}" in text and f"{mean - half:.1f} to {mean + half:.1f}" in text
