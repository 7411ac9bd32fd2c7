"""Batch norms of joined batches: each thread stands for a process, and sees what one norm of the whole batch does."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F

import empf
from empf.training import sync_norm


@pytest.fixture
def processes(monkeypatch) -> ThreadPoolExecutor:
    """Two threads whose `joint_mean` is that of both."""
    barrier, given = Barrier(2, timeout=20), []

    def joint_mean(values: torch.Tensor) -> torch.Tensor:
        given.append(values.clone())
        barrier.wait()
        mean = torch.stack(given).mean(0)
        if barrier.wait() == 0:
            given.clear()
        barrier.wait()
        return values.copy_(mean)

    monkeypatch.setattr(sync_norm, "joint_mean", joint_mean)
    monkeypatch.setattr(sync_norm.dist, "get_world_size", lambda: 2)
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_halves_are_normalised_as_the_whole(processes, dtype):
    """Outputs, gradients (those of weight and bias are means, as DDP takes them), running statistics."""
    torch.manual_seed(0)
    x, d_y = (torch.randn(6, 3, 4, 5, dtype=torch.float64).add(100 * k).to(dtype) for k in (1, 0))
    weight, bias = torch.randn(2, 3, dtype=torch.float64)

    def run(norm, rows: slice):
        leaves = [t.clone().requires_grad_() for t in (x[rows], weight, bias)]
        running = torch.zeros(3).double(), torch.ones(3).double()
        y = norm(leaves[0], *running, *leaves[1:], training=True, momentum=0.1, eps=1e-5)
        return [y, *torch.autograd.grad(y, leaves, d_y[rows].to(y.dtype)), *running]

    halves = list(processes.map(lambda rows: run(sync_norm.sync_batch_norm, rows), (slice(0, 3), slice(3, 6))))
    x = x.double()
    x = x.double()
    whole = run(F.batch_norm, slice(0, 6))
    joined = []
    for i, parts in enumerate(zip(*halves, strict=True)):
        joined.append(torch.cat(parts) if i < 2 else sum(parts) / (2 if i > 3 else 1))
    for found, wanted in zip(joined, whole, strict=True):
        close = 1e-9 if dtype == torch.float64 else 0.02
        assert (found - wanted).abs().max() <= close * (1 + wanted.abs().max())
    assert halves[0][0].dtype == dtype and all(torch.equal(a, b) for a, b in zip(*(h[4:] for h in halves), strict=True))


@pytest.mark.parametrize("neuron", ["empf", "mem_bn"])
def test_a_network_learns_as_from_the_joined_batch(processes, neuron):
    torch.manual_seed(0)
    whole = empf.resnet18(num_classes=4, in_channels=1, image_size=8, width=0.0625, T=2, neuron=neuron).double()
    x, labels = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}

    def learn(model, rows: slice):
        empf.online_backward(model, x[rows], labels[rows], F.cross_entropy, steps=[2])
        return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())

    def half(rows: slice):
        model = empf.build(whole.config).double()
        model.load_state_dict(state)
        sync_norm.sync_norms(model)
        assert list(model.state_dict()) == list(state)
        return learn(model, rows)

    one, other = processes.map(half, (slice(0, 4), slice(4, 8)))
    for name, wanted in learn(whole, slice(0, 8)).items():
        found = (one[name] + other[name]) / 2
        assert (found - wanted).abs().max() <= 1e-9 * (1 + wanted.abs().max()), name
