"""Batch norms among time steps: torch's own one step at a time, named where they mix steps or cannot be frozen."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import empf


class Net(nn.Module):
    """A convolution with torch's own batch norm, time first."""

    def __init__(self, per_step: bool):
        super().__init__()
        self.per_step = per_step
        self.conv, self.norm = empf.BinaryConv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        if per_step:
            self.norm = empf.PerStep(self.norm)
        self.neuron, self.head = empf.EMPFNeuron(3, 4), nn.Linear(4, 5)

    def forward(self, x):  # k N 2 H W
        y = self.conv(x.flatten(0, 1))
        y = self.norm(y.unflatten(0, x.shape[:2])) if self.per_step else self.norm(y).unflatten(0, x.shape[:2])
        return self.head(self.neuron(y).mean((-2, -1)))


@pytest.mark.parametrize(("learning", "steps"), [("random", [3]), ("stbp", None)])
def test_a_norm_that_mixes_steps_is_named(learning, steps):
    x, target = torch.randn(3, 6, 2, 5, 5), torch.arange(6) % 5
    with pytest.warns(UserWarning, match=r"BatchNorm2d is fed [23] time steps at once.*empf\.PerStep"):
        empf.online_backward(Net(False), x, target, F.cross_entropy, learning=learning, steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empf.online_backward(Net(True), x, target, F.cross_entropy, learning=learning, steps=steps)
        empf.online_backward(Net(False), x, target, F.cross_entropy, learning="every")  # one step at a time: none mixed


def test_per_step_is_each_step_by_itself():
    norm, one = empf.PerStep(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)
    x = torch.randn(3, 6, 4, 5, 5)
    assert torch.equal(norm(x), torch.stack([one(step) for step in x]))
    assert torch.equal(norm.module.running_var, one.running_var)


def test_norms_that_cannot_be_frozen_are_named():
    net = Net(True)
    with pytest.warns(UserWarning, match=r"torch's own batch norms alone \(norm\.module\)"):
        empf.freeze_norm(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empf.freeze_norm(empf.resnet18(width=0.0625))
