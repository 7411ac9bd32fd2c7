"""The tuner: the fastest plan is found once per key, remembered, written whole, and never found in a graph capture."""

import json

import pytest
import torch

from empf.kernels import conv, conv_neuron, matmul, tune
from empf.kernels.pack import pack

CPU = torch.device("cpu")


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Tuning on for the test, its files in an empty folder; returns what sets the mode."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = tune._mode
    tune.set_tuning("1")
    yield tune.set_tuning
    tune.set_tuning(before)


@pytest.fixture
def timed(monkeypatch):
    """Calls take the time that they return; counts the measurements."""
    measured = []

    def measure(run):
        measured.append(run())
        return measured[-1]

    monkeypatch.setattr(tune, "measure", measure)
    return measured


def find(key="k", times=(3, 1, 2), default=0):
    return tune.fastest((key, 7), CPU, lambda: range(len(times)), lambda plan: times[plan], default)


def test_the_fastest_is_found_once_per_key(tuning, timed):
    assert [find(), find(), find("other", (1, 2))] == [1, 1, 0] and timed == [3, 1, 2, 1, 2]
    assert not tune.cache_file(CPU).exists()


def test_what_is_known_costs_no_list_of_candidates(tuning, timed, monkeypatch):
    assert find() == 1
    monkeypatch.setattr(tune, "cache_file", None)
    assert tune.fastest(("k", 7), CPU, None, None, 0) == 1
    with pytest.raises(TypeError):
        find("other")


def test_saved_plans_are_read_by_the_next_process(tuning, timed):
    tuning("save")
    assert find() == 1
    tuning("save")  # forgets what is in memory, as a new process would
    assert find() == 1 and find("other", (1, 2)) == 0 and len(timed) == 5
    file = tune.cache_file(CPU)
    assert json.loads(file.read_text()) == {"k 7": "1", "other 7": "0"}
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file is left
    tuning("save")
    assert find(times=(1,)) == 0  # the remembered plan is no candidate any more


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"k 7": 5}'])
def test_a_damaged_file_is_replaced(damage, tuning, timed):
    tuning("save")
    tune.cache_file(CPU).parent.mkdir()
    tune.cache_file(CPU).write_text(damage)
    assert find() == 1 and json.loads(tune.cache_file(CPU).read_text()) == {"k 7": "1"}


def test_a_folder_that_cannot_be_written_is_a_warning(tuning, timed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tuning("save")
    with pytest.warns(UserWarning, match="the tuner cannot write"):
        assert find() == 1


def test_nothing_is_timed_while_a_graph_is_captured(tuning, timed, monkeypatch):
    monkeypatch.setattr(tune, "cache_file", lambda device: "gpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.fastest(("k",), torch.device("cuda"), lambda: [1, 2], lambda plan: plan, 9) == 9 and timed == []


def test_modes():
    with pytest.raises(ValueError, match="one of 0, 1, save, got 'yes'"):
        tune.set_tuning("yes")


@pytest.mark.kernel
@pytest.mark.parametrize("wanted", [0, -1])
def test_every_product_asks_the_tuner(wanted, tuning, device, kernels_on, monkeypatch):
    """Whatever it chooses, the result is the same; the dense library is among the candidates where it takes x."""
    asked = {}

    def choose(key, device, plans, run, default):
        plans = asked[key[0]] = plans()
        assert isinstance(default, type(plans[0])) and len(set(plans)) == len(plans)
        for plan in plans:
            run(plan)
        return plans[wanted]

    for module in (matmul, conv, conv_neuron):
        monkeypatch.setattr(module, "device_facts", lambda _: (64, False))
    monkeypatch.setattr(tune, "fastest", choose)
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 288), dtype=torch.uint8, generator=g).to(device)
    packed = pack(torch.randn(24, 288, generator=g)).to(device)
    y = matmul.binary_matmul(codes, packed, step=0.25)
    assert torch.equal(y, matmul.binary_matmul_ref(codes, packed, step=0.25))
    filters = pack(torch.randn(24, 32, 3, 3, generator=g)).to(device)
    images = codes.view(2, 32, 12, 12)
    y = conv.binary_conv2d(images, filters, step=0.25)
    assert torch.equal(y, conv.binary_conv2d_ref(images, filters, step=0.25))
    steps, half = images[:, None], torch.full((2,), 0.5, device=device)
    got = conv_neuron.binary_conv2d_neuron(steps, filters, None, half, half, in_step=0.25, bits=4, codes=True)
    want = conv_neuron.binary_conv2d_neuron_ref(steps, filters, None, half, half, in_step=0.25, bits=4, codes=True)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1])
    assert asked["binary_matmul"][-1] == matmul.Plan(None)
    assert {plan.splits > 1 for plan in asked["binary_conv2d"]} == {True, False}
    assert set(asked) == {"binary_matmul", "binary_conv2d", "binary_conv2d_neuron"}
