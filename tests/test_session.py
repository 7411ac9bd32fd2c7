"""The parts of the training loop that need no training: signals, and flags that do nothing."""

import os
import signal

import pytest
from train_tools import undisturbed

from empf.training.config import TrainConfig
from empf.training.session import Stop, without_effect


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_flags_that_do_nothing_are_named():
    config = TrainConfig(sync_bn=True, grad_compression="powersgd", workers=2)
    assert [line.split()[1] for line in without_effect(config, 1, in_memory=True)] == [
        "--sync-bn", "--grad-compression", "--workers",
    ]  # fmt: skip
    assert without_effect(config, 2, in_memory=False) == without_effect(TrainConfig(), 1, in_memory=True) == []
