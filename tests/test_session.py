"""The parts of the training loop that need no training: signals, memory, and the updates of an epoch."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from train_tools import undisturbed

import empf
from empf.training.config import TrainConfig
from empf.training.session import Stop, check_size
from train import updates


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_a_second_sigterm_changes_nothing(number):
    with undisturbed():
        stop = Stop()
        os.kill(os.getpid(), number)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes it on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_ctrl_c_ends_at_once():
    process = os.fork()
    if process == 0:
        stop = Stop()
        os.kill(os.getpid(), signal.SIGINT)
        if stop.asked:
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGINT


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    with undisturbed():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = Stop()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_network_that_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    small, large = TrainConfig(dataset="cifar10"), TrainConfig(dataset="cifar10", width=4.0)
    check_size(small.model(), small, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"2\.1 GB are needed, 1\.0 GB are free on cpu: use a smaller --width"):
        check_size(large.model(), large, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"1\.4 GB are needed"):
        check_size(large.model(), replace(large, optimizer="flip"), torch.device("cpu"))


def test_updates_are_shared_by_batches_and_yield_what_happened():
    """Five batches in groups of two, the last of one; steps and rates by the number of batches before."""
    model = empf.resnet18(width=0.0625, image_size=8, num_classes=3, T=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 3) for _ in range(5)]
    rates = []
    seen = list(
        updates(
            model, batches, optimizer, 10, 5, draw=lambda before: [1 + before % 2], accumulate=2,
            rate=lambda before: rates.append(before) or 0.1,
        )
    )  # fmt: skip
    assert [batch.update for batch in seen] == [False, True, False, True, True]
    assert [batch.steps for batch in seen] == [[1], [2], [1], [2], [1]]
    assert rates == [10, 12, 14] and optimizer.param_groups[0]["lr"] == 0.1
    assert all(batch.logits.shape == (4, 3) and batch.loss.isfinite() for batch in seen)
