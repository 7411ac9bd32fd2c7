"""Accuracy after each step; calibration of Mem-BN: its running statistics become those of evaluation."""

import pytest
import torch
from own_networks import PlainNorms
from torch import nn

import empf
from empf.evaluate import Mirrored, by_class, correct_per_step, predictions, scores


def network(neuron: str = "mem_bn") -> empf.SpikingNetwork:
    torch.manual_seed(0)
    model = empf.resnet18(num_classes=3, image_size=8, width=0.0625, T=3, neuron=neuron)
    for _ in range(3):  # running statistics of their own, by step
        empf.reset(model)
        model(torch.randn(16, 3, 8, 8) + 1)
    return model


def mem_inputs(model: empf.SpikingNetwork, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each Mem-BN normalises in evaluation, m of every step, (T, N, C, H, W)."""
    found, handles = {}, []

    def hook(name):
        def see(module, inputs):
            (current,) = inputs
            v, ms = torch.zeros_like(current[0]), []
            gain, shift = module.folded_norm()
            for t, i in enumerate(current):
                m = module.leak[t] * v + i
                v = torch.minimum(gain[t, :, None, None] * m + shift[t, :, None, None], module.threshold[t])
                ms.append(m)
            found[name] = torch.stack(ms)

        return see

    for name, module in model.named_modules():
        if isinstance(module, empf.EMPFNeuron):
            handles.append(module.register_forward_pre_hook(hook(name)))
    empf.reset(model)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def test_statistics_are_those_of_evaluation():
    model, images = network().eval(), torch.randn(64, 3, 8, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    empf.calibrate(model, [images])
    # the first neuron sees in evaluation what it saw while it was calibrated
    name, m = next(iter(mem_inputs(model, images).items()))
    neuron = model.get_submodule(name)
    assert torch.allclose(m[0].mean((0, 2, 3)), neuron.running_mean[0], atol=1e-5)
    assert torch.allclose(m[0].var((0, 2, 3)), neuron.running_var[0], rtol=1e-4)
    # batch norms of the convolutions keep theirs
    for name, buffer in model.named_buffers():
        own = isinstance(model.get_submodule(name.rpartition(".")[0]), empf.EMPFNeuron)
        assert own != torch.equal(buffer, before[name]), name
    assert not model.training


def test_each_neuron_keeps_its_own_momentum():
    model, momenta = network().eval(), []
    for number, neuron in enumerate(m for m in model.modules() if isinstance(m, empf.EMPFNeuron)):
        neuron.momentum = 0.01 * (number + 1)
        momenta.append(neuron.momentum)
    model.blocks[1].conv1.bn.frozen_norm = True  # as the user has set it
    empf.calibrate(model, [torch.randn(8, 3, 8, 8)])
    assert [m.momentum for m in model.modules() if isinstance(m, empf.EMPFNeuron)] == momenta
    assert [n for n, m in model.named_modules() if getattr(m, "frozen_norm", False)] == ["blocks.1.conv1.bn"]


def test_mean_over_the_batches():
    images = torch.randn(3, 32, 3, 8, 8)
    means = []
    for batch in images:
        model = network()
        empf.calibrate(model, [batch])
        means.append(model.blocks[0].conv1.neuron.running_mean.clone())
    model = network()
    empf.calibrate(model, images)
    assert torch.allclose(model.blocks[0].conv1.neuron.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert model.training


def test_error_leaves_the_model_usable():
    model = network().eval()
    with pytest.raises(ValueError, match="the input must be"):
        empf.calibrate(model, [torch.randn(2, 3, 9, 9)])
    assert not model.training
    assert not any(m.frozen_norm for m in model.modules() if hasattr(m, "frozen_norm"))


def test_without_mem_bn_nothing_is_read():
    def images():
        raise AssertionError("read")
        yield

    empf.calibrate(network("empf"), images())


def test_the_prediction_is_that_of_the_summed_logits():
    """Of a network of one's own, whose parts are in different modes."""
    torch.manual_seed(0)
    model, x, labels = PlainNorms(), torch.randn(3, 8, 1, 6, 6), torch.arange(8) % 4
    model.norms[0].eval()
    correct = correct_per_step(model, [(x[:, :5], labels[:5]), (x[:, 5:], labels[5:])])
    assert [m.training for m in (model, *model.norms)] == [True, False, True]
    assert all(neuron.t == 0 for neuron in model.neurons)
    with torch.no_grad():
        logits = model.eval()(x)
    sums = [logits[0], logits[0] + logits[1], logits[0] + logits[1] + logits[2]]
    assert correct.tolist() == [int((step.argmax(1) == labels).sum()) for step in sums]
    assert correct_per_step(empf.resnet18(T=2, width=0.0625), []).tolist() == [0, 0]
    losses = [nn.functional.cross_entropy(step, labels, reduction="sum") for step in logits]
    found = scores(model.train(), [(x, labels)])
    assert found[:-1].tolist() == correct.tolist() and found[-1] == pytest.approx(sum(losses).item() / 3, rel=1e-5)


def test_calibration_keeps_torchs_own_norms():
    torch.manual_seed(0)
    model = PlainNorms()
    model.neurons[0] = empf.EMPFNeuron(3, 4, mem_bn=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    empf.calibrate(model, torch.randn(2, 3, 8, 1, 6, 6))
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"neurons.0.running_mean", "neurons.0.running_var"}
    assert model.training and all(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_predictions_and_what_they_are_taken_for():
    """Few classes, ties, and a class without images."""

    class Fixed(nn.Module):
        def forward(self, x):
            return x  # the logits themselves

    logits = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 1, 0]], [[0, 3, 0], [0, 0, 1], [0, 0, 0]]])  # T N classes
    model = Fixed()
    model.config = empf.ModelConfig(T=2)
    labels, predicted, near = predictions(model, [(logits, torch.tensor([0, 2, 0]))])
    assert predicted.tolist() == [[0, 0, 1], [1, 2, 1]] and labels.tolist() == [0, 2, 0] and near.all()
    classes, confused = by_class(labels, predicted[-1], ["a", "b", "c"])
    assert [c["accuracy"] for c in classes] == [0, None, 100] and [c["images"] for c in classes] == [2, 0, 1]
    assert confused == [{"class": "a", "taken_for": "b", "images": 2, "share": 100}]
    assert by_class(labels, labels, ["a", "b", "c"])[1] == []


def test_an_image_and_its_mirror_image_are_judged_together():
    model, x = network().eval(), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        each = []
        for images in (x, x.flip(-1)):
            empf.reset(model)
            each.append(model(images))
        wanted = (each[0] + each[1]) / 2
    assert not torch.allclose(each[0], each[1])
    labels, seen, _ = predictions(Mirrored(model), [(x, torch.arange(6) % 3)])
    assert torch.equal(seen, wanted.cumsum(0).argmax(-1))
    assert predictions(Mirrored(model), [(x.flip(-1), labels)])[1].equal(seen)
