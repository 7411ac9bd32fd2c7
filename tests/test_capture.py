"""CUDA graphs of training: what is kept between replays, what is not, and what is refused.

Where there is no GPU, a graph is stood in for by a tape: the operations of its recording, repeated on the same memory.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_tools import run_train

import empf
from empf.synapse import QuantizedWeight
from empf.training import capture
from empf.training.capture import CapturedBackward, check_capture

# ---- a graph on the CPU


class Tape(TorchDispatchMode):
    """Operations in order; whatever is written to in a recording is put back, as a recording does not compute."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.keep(value)
            self.keep(kwargs.get("out"))
        if "batch_norm" in func.__name__:  # its running statistics are not declared as written to
            self.keep([x for x in args if isinstance(x, torch.Tensor) and x.dim() == 1])
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def keep(self, written) -> None:
        for x in tree_leaves(written):
            if isinstance(x, torch.Tensor) and x.data_ptr() not in self.before:
                self.before[x.data_ptr()] = x, x.clone()

    def put_back(self) -> None:
        for x, value in self.before.values():
            x.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def tapes(monkeypatch):
    """CUDA graphs on CPU tensors; the list of the graphs that were recorded."""
    recorded = []

    @contextmanager
    def record(graph, pool, capture_error_mode):
        with torch.autograd.set_multithreading_enabled(False), graph:
            yield
        with torch.no_grad():
            graph.put_back()
        recorded.append((graph, pool))

    for name, fake in {
        "graph": record, "CUDAGraph": Tape, "graph_pool_handle": object, "Stream": FakeStream,
        "current_stream": FakeStream, "stream": lambda stream: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(capture, "check_capture", lambda device: None)
    monkeypatch.setattr(capture, "WARM_UP", 1)
    return recorded


# ---- the same training


def network(device, **kind):
    torch.manual_seed(0)
    settings = dict(num_classes=5, in_channels=1, image_size=8, width=0.0625, T=3, neuron="mem_bn", parallel=0.5)
    return empf.resnet18(**settings | kind).to(device)


def updates(model, captured, drawn, soft, accumulate=1):
    """Train for one update per choice of steps; losses, weights, momenta and running statistics after it.

    captured: whether each batch is; None: none of them, and no `CapturedBackward` exists.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    backward = None if captured is None else CapturedBackward(model, F.cross_entropy)
    generator, losses, kept = torch.Generator().manual_seed(1), [], []
    for i, steps in enumerate(drawn):
        for _ in range(accumulate):
            x = torch.randn(4, 1, 8, 8, generator=generator).to(device)
            target = torch.arange(4, device=device) % 5
            target = F.one_hot(target, 5).float() if soft else target
            if captured is not None and captured[i]:
                loss, logits = backward(x, target, steps=steps, divisor=accumulate)
            else:
                loss, logits = empf.online_backward(
                    model, x, target, F.cross_entropy, steps=steps, backward=lambda loss: (loss / accumulate).backward()
                )
            kept.append((loss, loss.item(), logits, logits.clone()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=i % 2 == 0)
    for loss, value, logits, logits_then in kept:  # nothing that was handed out has been written over
        assert loss.item() == value and torch.equal(logits, logits_then)
        losses.append(loss)
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return backward, [torch.stack(losses), *model.state_dict().values(), *momenta]


DRAWN = [[1], [3], [2], [3], [1], [3], [2]]


def compare(device, *, captured, drawn=DRAWN, soft=False, tolerance=0.0, **more):
    kind, accumulate = more.pop("kind", {}), more.pop("accumulate", 1)
    model, other = network(device, **kind), network(device, **kind)
    _, want = updates(other, None, drawn, soft, accumulate)
    backward, got = updates(model, captured, drawn, soft, accumulate)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())
    assert len(set(want[0].tolist())) == len(drawn) * accumulate
    return model, backward


def test_training_is_the_same(tapes):
    """Graphs are replayed in another order than recorded, weights move between, some batches are not captured."""
    model, backward = compare("cpu", captured=[True, True, False, True, True, True, False])
    assert len(tapes) == len(backward.graphs) == 2 and len({pool for _, pool in tapes}) == 1
    backward.clear()
    assert backward.graphs == {}


def test_gradients_that_others_have_made_stay_in_the_sum(tapes):
    model = network("cpu")
    backward = CapturedBackward(model, F.cross_entropy)
    first, second, *_ = model.parameters()
    first.grad = torch.ones_like(first)
    backward.gradients[1].fill_(7)  # what an earlier update has left
    backward.own_gradients()
    assert all(p.grad is g for p, g in zip(model.parameters(), backward.gradients, strict=True))
    assert (first.grad == 1).all() and (second.grad == 0).all()


def test_several_steps_accumulation_and_soft_labels(tapes):
    drawn = [[1, 3], [2, 3], [1, 3], [1, 3]]
    _, backward = compare("cpu", captured=[True] * 4, drawn=drawn, soft=True, accumulate=2, kind={"seca": 2})
    assert len(tapes) == len(backward.graphs) == 2


def test_a_batch_of_another_size_gets_its_own_graph(tapes):
    model = network("cpu", neuron="empf")
    backward = CapturedBackward(model, F.cross_entropy)
    for n, graphs in ((4, 1), (2, 2), (4, 2), (2, 2)):
        x, target = torch.randn(n, 1, 8, 8), torch.arange(n)
        _, logits = backward(x, target, steps=[2])
        assert logits.shape == (n, 5) and len(tapes) == graphs
    backward(x, target, steps=[2], divisor=2)
    assert len(tapes) == 3
    every = CapturedBackward(model, F.cross_entropy, learning="every")
    losses = [every(x, target, steps=[t])[0] for t in (1, 2)]  # the steps that train.py draws do not matter
    assert len(tapes) == 4 and losses[0] == losses[1]


def test_nothing_of_a_graph_is_left_in_the_model(tapes):
    """A network that is evaluated after a recording forms its synapses from the weights as they are then."""
    model = network("cpu", neuron="empf")
    backward = CapturedBackward(model, F.cross_entropy)
    backward(torch.randn(4, 1, 8, 8), torch.arange(4), steps=[2])
    assert model.t == 0 and all(m._formed is None for m in model.modules() if isinstance(m, QuantizedWeight))
    assert all(m.v is None for m in model.modules() if hasattr(m, "v"))


def test_autocast(tapes):
    """Weights that autocast has cast are not constants of the graph."""
    model, other = network("cpu"), network("cpu")
    for m in (model, other):
        m.forward = torch.autocast("cpu", torch.bfloat16)(m.forward)
    got = updates(model, [True] * 4, DRAWN[:4], False)[1]
    want = updates(other, None, DRAWN[:4], False)[1]
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-6 * (1 + b.abs().max())


# ---- what is refused


def test_what_is_refused():
    gpu = torch.device("cuda")
    check_capture(gpu, T=10, steps_per_batch=1)
    with pytest.raises(ValueError, match="need a GPU, and training is on cpu: leave --cuda-graphs out"):
        CapturedBackward(network("cpu"), F.cross_entropy)
    with pytest.raises(ValueError, match="for one process, and there are 2"):
        check_capture(gpu, processes=2)
    with pytest.raises(ValueError, match="5 of T = 10 steps can be drawn in 252 ways"):
        check_capture(gpu, T=10, steps_per_batch=5)


def test_train_refuses_it_on_a_cpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="^error: CUDA graphs need a GPU, and training is on cpu"):
        run_train("--cuda-graphs", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [dict(), dict(neuron="empf", weights="ternary"), dict(seca=2, spike_bits=4)], ids=str)
def test_training_is_the_same_on_a_gpu(kind):
    """A spike that rounding moves across its threshold changes a gradient: few updates, and a bound with room."""
    torch.backends.cudnn.deterministic = True
    _, backward = compare("cuda", captured=[True] * 7, kind=kind, tolerance=1e-3)
    assert len(backward.graphs) == 3


@pytest.mark.gpu
def test_bf16_on_a_gpu():
    model, other = network("cuda"), network("cuda")
    for m in (model, other):
        m.forward = torch.autocast("cuda", torch.bfloat16)(m.forward)
    (losses, *_), (want, *_) = (updates(m, c, DRAWN, True)[1] for m, c in ((model, [True] * 7), (other, None)))
    assert torch.allclose(losses, want, atol=2e-2) and losses.std() > 1e-3


@pytest.mark.gpu
def test_train_with_graphs(tmp_path):
    """The flag trains, also through the batches that the health checks look at."""
    run_train("--cuda-graphs", "--accumulate", "2", "--output-dir", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()
