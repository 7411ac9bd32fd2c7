"""The network for events uses time: it learns what no single frame can tell, and parallel neurons do not."""

import pytest
import torch
import torch.nn.functional as F
from make_events import moving_bars

import empf
from empf.data.event_frames import EventSettings
from empf.data.events import EventBatches, load_events
from empf.evaluate import correct_per_step

T, EPOCHS = 6, 6


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bars")
    moving_bars(folder / "data" / "train", 256, T=T, seed=0)
    moving_bars(folder / "data" / "test", 128, T=T, seed=1)
    return load_events(folder / "data", EventSettings(T, 16), cache=folder / "cache", workers=1)


def test_one_class_is_the_other_played_backwards(bars):
    train, test = bars
    assert train.class_names == ["left", "right"] and len(train) == 512 and len(test) == 256
    left, right = train.frames[0::2], train.frames[1::2]  # the two directions of the same recording
    assert torch.equal(left, right.flip(1))
    assert not torch.equal(left, right)


def accuracy(bars, **config) -> list[float]:
    """Per cent of the test recordings after each step, after training online with one random step per batch."""
    train, test = bars
    torch.manual_seed(0)
    model = empf.vgg_snn(num_classes=2, image_size=16, T=T, width=1 / 16, **config)
    batches = EventBatches(train, 32, train=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(batches))
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for number, (events, labels) in enumerate(batches):
            steps = empf.draw_steps(T, 1, 0, epoch * len(batches) + number)
            empf.online_backward(model, events, labels, F.cross_entropy, steps=steps)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return (100 * correct_per_step(model, EventBatches(test, 128, train=False)) / len(test)).tolist()


def test_membrane_potentials_tell_the_direction(bars):
    per_step = accuracy(bars)
    assert per_step[-1] >= 95
    assert 35 <= per_step[0] <= 65  # before anything has moved


def test_parallel_neurons_cannot(bars):
    assert all(35 <= a <= 65 for a in accuracy(bars, parallel=1.0))
