"""How two gradients are compared, and the estimator that draws a step."""

import pytest
import torch

from empf.diagnose.gradients import compare, estimator


def test_agreement_and_estimator_by_hand():
    row = compare([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])])
    assert row == pytest.approx(
        {"cosine": 0.5**0.5, "norm_ratio": 0.5**0.5, "sign_agreement": 0.5, "temporal_share": 0.5**0.5}
    )
    assert set(compare([torch.zeros(2)], [torch.ones(2)]).values()) == {None}
    steps = [[torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 0.0])]]
    assert estimator(steps, [torch.tensor([2.0, 0.0])]) == {"bias": 0, "variance": 0.25}
    assert estimator(steps, [torch.tensor([4.0, 0.0])]) == {"bias": 0.5, "variance": 0.25}
