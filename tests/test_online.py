"""Online learning: what is drawn, what is remembered, and how the modes relate."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import empf
from empf import layer
from empf.diagnose.memory import Storages, saved_for_backward
from empf.online import draw_steps, online_backward


def batch(n=6):
    torch.manual_seed(7)
    return torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.arange(n) % 5


def small(seed=0, **kwargs):
    """A network whose running statistics fit its input, so that its neurons fire with frozen norms too."""
    torch.manual_seed(seed)
    config = dict(num_classes=5, in_channels=1, image_size=8, width=0.0625, T=4)
    model = empf.resnet18(**{**config, **kwargs}).double()
    with torch.no_grad():
        for _ in range(20):
            empf.reset(model)
            model(batch()[0])
    empf.reset(model)
    return model


def gradients(model, **kwargs):
    model.zero_grad()
    x, y = batch()
    loss, logits = online_backward(model, x, y, F.cross_entropy, **kwargs)
    return loss, logits, [p.grad.clone() for p in model.parameters()]


def assert_close(a, b, tolerance=1e-10):
    for u, v in zip(a, b, strict=True):
        assert (u - v).abs().max() <= tolerance * (1 + v.abs().max())


# ---- drawing


def test_steps_are_uniform_different_and_ascending():
    single = Counter(draw_steps(4, 1, seed=3, iteration=i)[0] for i in range(4000))
    assert set(single) == {1, 2, 3, 4}
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in single.values())
    pairs = Counter(tuple(draw_steps(4, 2, seed=3, iteration=i)) for i in range(3000))
    assert set(pairs) == {(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)}
    assert all(abs(count - 500) < 5 * (3000 / 6 * 5 / 6) ** 0.5 for count in pairs.values())


def test_steps_depend_on_seed_and_iteration_alone():
    torch.manual_seed(1)
    a = [draw_steps(8, 1, 0, i) for i in range(50)]
    torch.manual_seed(2)
    assert a == [draw_steps(8, 1, 0, i) for i in range(50)]
    assert a != [draw_steps(8, 1, 1, i) for i in range(50)]


@pytest.mark.parametrize("k", [0, 5])
def test_too_many_steps(k):
    with pytest.raises(ValueError, match=f"1..T = 4, got {k}"):
        draw_steps(4, k, 0, 0)


# ---- gradients


@pytest.mark.parametrize(
    "kind", [dict(), dict(neuron="mem_bn"), dict(neuron="lif"), dict(parallel=0.5, seca=1)], ids=str
)
def test_random_is_an_unbiased_estimate_of_every(kind):
    model = small(**kind)
    empf.freeze_norm(model)
    each = [gradients(model, steps=[t])[2] for t in range(1, 5)]
    mean = [torch.stack(g).mean(0) for g in zip(*each, strict=True)]
    loss, _, every = gradients(model, learning="every")
    assert_close(mean, every)
    assert loss.item() == pytest.approx(sum(gradients(model, steps=[t])[0].item() for t in range(1, 5)) / 4)


def test_k_steps_are_the_mean_of_their_losses():
    model = small()
    empf.freeze_norm(model)
    two = gradients(model, steps=[1, 3])[2]
    one, three = gradients(model, steps=[1])[2], gradients(model, steps=[3])[2]
    assert_close(two, [(a + b) / 2 for a, b in zip(one, three, strict=True)])


def test_random_equals_the_example_written_out():
    """reset, t - 1 steps without gradient, one with: the lines of the README."""
    model, x_y = small(), batch()
    got = gradients(model, steps=[3])
    other = small()
    empf.reset(other)
    with torch.no_grad():
        other(x_y[0], steps=2)
    loss = F.cross_entropy(other(x_y[0], steps=1)[0], x_y[1])
    loss.backward()
    assert got[0].item() == pytest.approx(loss.item())
    assert_close(got[2], [p.grad for p in other.parameters()])


@pytest.mark.parametrize("neuron", ["empf", "mem_bn", "lif"])
def test_with_one_step_through_time_equals_random(neuron):
    model = small(T=1, neuron=neuron)
    empf.freeze_norm(model)
    assert_close(gradients(model, steps=[1])[2], gradients(model, learning="stbp")[2])


def test_through_time_differs_from_every_and_restores_online():
    model = small()
    empf.freeze_norm(model)
    stbp, every = gradients(model, learning="stbp")[2], gradients(model, learning="every")[2]
    assert max((a - b).abs().max() for a, b in zip(stbp, every, strict=True)) > 1e-4
    assert_close(gradients(model, learning="every")[2], every)


def test_through_time_is_autograd_of_the_mean_logits():
    model = small()
    loss, _, got = gradients(model, learning="stbp")
    other, (x, y) = small(), batch()
    empf.set_online(other, False)
    empf.reset(other)
    want = F.cross_entropy(torch.stack([other(x, steps=1)[0] for _ in range(4)]).mean(0), y)
    want.backward()
    assert loss.item() == pytest.approx(want.item())
    assert_close(got, [p.grad for p in other.parameters()], 1e-9)


def test_every_parameter_has_a_gradient_whatever_the_step():
    for kind in (dict(), dict(neuron="mem_bn"), dict(parallel=0.5, seca=2)):
        for t in (1, 4):
            model = small(**kind)
            x, y = batch()
            online_backward(model, x, y, F.cross_entropy, steps=[t])
            assert [n for n, p in model.named_parameters() if p.grad is None] == []


# ---- memory for back-propagation

KINDS = [dict(), dict(neuron="mem_bn"), dict(parallel=0.5, seca=1)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_memory_of_one_step_whatever_T(kind):
    def saved(T, t):
        return saved_for_backward(small(T=T, **kind), batch()[0], past=t - 1)["bytes"]

    two = saved(2, 2)
    assert two > 100_000
    for T in (4, 32):
        assert saved(T, T) == saved(T, 2) == two
        assert saved(T, 1) <= two  # before the first step there is no potential


def largest(T, learning, **kind):
    """Bytes of the tensors made in a batch that are alive at the start of a backward pass, at most; no gradients."""
    model, (x, y), sizes = small(T=T, **kind), batch(), []

    def backward(loss):
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        sizes.append(sum(made.alive().values()) - gradients)
        loss.backward()

    with Storages() as made:
        online_backward(model, x, y, F.cross_entropy, learning=learning, backward=backward)
    assert len(sizes) == (T if learning == "every" else 1)
    return max(sizes)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=str)  # Mem-BN has parameters (T, C)
def test_memory_of_every_step_is_that_of_one(kind):
    assert largest(16, "every", **kind) <= 1.01 * largest(4, "every", **kind)


def test_memory_through_time_grows_with_T():
    four, eight, twelve = (largest(T, "stbp") for T in (4, 8, 12))
    assert twelve - eight == pytest.approx(eight - four, rel=0.05)  # linear in T
    assert twelve > 2.5 * four


# ---- errors


@pytest.mark.parametrize("steps", [[], [0], [5], [2, 1], [2, 2]])
def test_bad_steps(steps):
    x, y = batch()
    with pytest.raises(ValueError, match=r"ascending and within 1\.\.T = 4"):
        online_backward(small(), x, y, F.cross_entropy, steps=steps)


def test_no_steps_says_how_to_draw_them():
    x, y = batch()
    with pytest.raises(ValueError, match=r"learning='random' needs steps: pass steps=empf\.draw_steps\(4, 1, seed, "):
        online_backward(small(), x, y, F.cross_entropy)


def test_bad_mode():
    x, y = batch()
    with pytest.raises(ValueError, match="learning must be one of random, every, stbp, got 'bptt'"):
        online_backward(small(), x, y, F.cross_entropy, learning="bptt")


class OwnNet(nn.Module):
    """A network of a stranger: a synapse that is used twice, a functional pooling, its own head."""

    def __init__(self, T: int | None = 4, neuron=empf.EMPFNeuron):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), empf.BinaryConv2d(4, 4, 3, padding=1, bias=True)
        self.neurons = nn.ModuleList(neuron(T) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x):  # k N 1 H W
        current = self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        for neuron in self.neurons[:2]:
            current = current + self.conv(neuron(current).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(
            F.avg_pool2d(self.neurons[2](current).flatten(0, 1), 2).mean((-2, -1)).unflatten(0, x.shape[:2])
        )


def test_another_number_of_frames_is_refused():
    with pytest.raises(ValueError, match=r"4 time steps first, \[T, N, \.\.\.\], got \(6, 1, 6, 6\): x\.expand\(4"):
        empf.online_backward(
            OwnNet(), torch.randn(6, 1, 6, 6), torch.zeros(6).long(), F.cross_entropy, learning="every"
        )


def test_after_learning_through_time_nothing_holds_the_graph():
    net = OwnNet()
    empf.online_backward(net, torch.randn(4, 6, 1, 6, 6), torch.arange(6) % 5, F.cross_entropy, learning="stbp")
    assert all(n.v.grad_fn is None for n in net.neurons)
    copy.deepcopy(net)
    model = empf.resnet18(width=0.0625, image_size=8, T=2)
    empf.online_backward(model, torch.randn(6, 3, 8, 8), torch.arange(6) % 5, F.cross_entropy, learning="stbp")
    torch.optim.swa_utils.AveragedModel(model)


def test_reset_leaves_the_modules_of_others_alone():
    class Metric(nn.Module):
        def reset(self, what):
            raise AssertionError("this is not ours")

    class Own(nn.Module):
        holds_state = True

        def reset(self):
            self.done = True

    net = nn.ModuleList([Metric(), Own(), empf.EMPFNeuron(2)])
    empf.reset(net)
    assert net[1].done


def test_a_forward_that_was_interrupted_asks_for_reset():
    model = empf.resnet18(width=0.0625, image_size=8, T=2).eval()
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x, steps=1)

    def fail(module, inputs):
        raise KeyboardInterrupt

    empf.reset(model)
    handle = model.blocks[5].conv2.conv.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(x, steps=1)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"interrupted, .* empf\.reset\(model\)"):
        model(x, steps=1)
    empf.reset(model)
    assert torch.equal(model(x, steps=1), wanted)


@pytest.mark.parametrize("size", [6, 80])  # kept, and made again
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_refused(size, reentrant):
    neuron, conv = empf.EMPFNeuron(2), empf.BinaryConv2d(4, 4, 3, padding=1)
    x = torch.randn(1, 3, 4, size, size, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: conv(neuron(x)[0]), x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="within a backward pass, as by torch.utils.checkpoint"):
        y.sum().backward()


@pytest.mark.parametrize("size", [6, 80])
def test_gradients_of_second_order_are_refused(size):
    neuron = empf.EMPFNeuron(2)
    x = torch.randn(1, 3, 4, size, size, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True asks for more"):
        (d_x,) = torch.autograd.grad(neuron(x).square().sum(), x, create_graph=True)
        d_x.sum().backward()
    empf.reset(neuron)
    with layer.enabled(False):
        (d_x,) = torch.autograd.grad(neuron(x).square().sum(), x, create_graph=True)
        d_x.sum().backward()
