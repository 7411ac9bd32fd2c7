"""Images and time steps that grow while training."""

import json
import re

import pytest
import torch
from train_tools import resume, run_train

import empf
from empf.runs import read_metrics
from empf.training.config import TrainConfig
from empf.training.growth import Stage, lend_steps, shrunk, stage_of, stages


def test_stages_follow_each_other():
    text = "16:1:0.25,24:2:0.5"
    assert stages(text, 4) == [Stage(16, 1, 0.25), Stage(24, 2, 0.75), Stage(None, 4, 1.0)]
    assert [stage_of(text, 4, epoch / 8)[:2] for epoch in range(8)] == 2 * [(16, 1)] + 4 * [(24, 2)] + 2 * [(None, 4)]
    assert stage_of(None, 4, 0.0) == Stage(None, 4, 1.0)


def test_shares_are_summed_without_an_epoch_too_many():
    """0.1 + 0.2 is a little more than 0.3 in floating point."""
    assert stage_of("8:1:0.1,16:1:0.2", 4, 3 / 10) == Stage(None, 4, 1.0)


@pytest.mark.parametrize("text", ["16", "16:1", "a:1:0.5", "16:1:0.5:2", "16:1.5:0.5", ",", "16:1:x"])
def test_what_is_no_stage_is_refused(text):
    with pytest.raises(ValueError, match="side:T:share"):
        TrainConfig(grow=text)


@pytest.mark.parametrize("text", ["0:1:0.5", "16:0:0.5", "16:5:0.5", "16:1:0", "16:1:0.6,24:1:0.6", "16:1:nan"])
def test_stages_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match="side of at least 1, time steps within 1..4 and a share above 0"):
        TrainConfig(grow=text)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(grow="8:1:0.5", learning="every"), "--learning random"),
        (dict(grow="8:4:0.5", cuda_graphs=True), "cuda_graphs"),
        (dict(test_every=2, patience=3), "--test-every or --patience"),
        (dict(test_every=0), "test_every must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainConfig(**settings)


def test_whole_steps_grow_with_any_learning():
    assert TrainConfig(grow="8:4:0.5", learning="every").grow


def test_images_are_averaged():
    images = torch.arange(32.0).reshape(2, 1, 4, 4)
    assert torch.equal(shrunk(images, 2), images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))
    for side in (None, 4, 9):
        assert shrunk(images, side) is images


def test_frames_and_oblong_images_keep_their_shape():
    assert shrunk(torch.rand(4, 2, 3, 12, 8), 6).shape == (4, 2, 3, 6, 4)
    assert shrunk(torch.rand(2, 3, 40, 1), 4).shape == (2, 3, 4, 1)


def test_later_steps_take_over_what_was_learned():
    net = empf.resnet18(in_channels=1, image_size=8, width=0.125, neuron="mem_bn", per_channel=True)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.rand_like(p))
    learned = {name: p.clone() for name, p in net.state_dict().items()}
    lend_steps(net, 2)
    changed = {name for name, p in net.state_dict().items() if not torch.equal(p, learned[name])}
    of_neurons = {name for name, p in before.items() if ".neuron." in name or name.startswith("neuron.")}
    assert changed and changed <= of_neurons
    for name in changed:
        p = net.state_dict()[name]
        assert torch.equal(p[:2], learned[name][:2]) and torch.equal(p[2], p[1]) and torch.equal(p[3], p[1])
    lend_steps(net, 4)
    lend_steps(empf.EMPFNeuron(None), 1)


def test_a_run_sees_small_images_and_few_steps_first_and_is_tested_last(tmp_path, monkeypatch):
    import train

    seen, backward = [], train.empf.online_backward

    def watched(model, images, *args, steps, **kwargs):
        seen.append((images.shape[-1], max(steps)))
        return backward(model, images, *args, steps=steps, **kwargs)

    monkeypatch.setattr(train.empf, "online_backward", watched)
    run = tmp_path / "run"
    run_train(
        "--output-dir",
        run,
        "--epochs",
        "4",
        "--grow",
        "4:1:0.5",
        "--test-every",
        "3",
        "--steps-per-batch",
        "2",
        curves=True,
    )
    assert seen[:6] == 6 * [(4, 1)]
    assert seen[6:] == 6 * [(8, 2)]
    assert ["accuracy" in record for record in read_metrics(run)] == [False, False, True, True]
    said = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("epoch")]
    assert ["test after each step" in line for line in said] == [False, False, True, True]
    assert (run / "curves.png").is_file()
    assert json.loads((run / "config.json").read_text())["train"]["grow"] == "4:1:0.5"


def test_a_run_that_ends_small_tests_equal_steps(tmp_path):
    run = tmp_path / "run"
    run_train("--output-dir", run, "--epochs", "2", "--grow", "4:1:1")
    state = empf.load(run).state_dict()
    thresholds = [p for name, p in state.items() if name.endswith("threshold_logit")]
    assert thresholds and all(torch.equal(p, p[:1].expand_as(p)) for p in thresholds)


def test_a_run_that_grew_does_not_go_on_with_small_images(tmp_path):
    """Its stages are shares of the epochs: of more epochs they would begin anew."""
    run = tmp_path / "run"
    run_train("--output-dir", run, "--epochs", "1", "--grow", "4:1:0.9", "--schedule", "constant")
    with pytest.raises(SystemExit, match="its images and steps grow in shares of them"):
        resume(run, "--epochs", "3")
