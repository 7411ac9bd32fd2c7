"""What no network can take is one sentence, whoever is called."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import empf
from empf.checks import whole
from empf.synapse import FullConv2d

SETTINGS = dict(num_classes=4, in_channels=1, image_size=8, width=0.0625, T=2)
X, TARGET = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
INPUTS = {
    "list": X.tolist(), "None": None, "numpy": X.numpy(), "text": "x", "int64": X.long(), "bool": X > 0,
    "complex": X.to(torch.complex64), "sparse": X.to_sparse(), "float8": X.to(torch.float8_e4m3fn),
    "nested": torch.nested.nested_tensor(list(X)), "double": X.double(), "meta": X.to("meta"),
}  # fmt: skip


@pytest.fixture(scope="module")
def networks() -> dict:
    model = empf.resnet18(**SETTINGS)
    return {"model": model, "packed": empf.pack(model.eval())}


def online(x, target=TARGET, criterion=F.cross_entropy, **options):
    return empf.online_backward(empf.resnet18(**SETTINGS), x, target, criterion, **{"steps": [1], **options})


@pytest.mark.parametrize("call", ["model", "packed", "online"])
@pytest.mark.parametrize("kind", [*INPUTS, "half", "bf16"])
def test_an_input_that_is_none(networks, call, kind):
    x = {**INPUTS, "half": X.half(), "bf16": X.bfloat16()}[kind]
    net = online if call == "online" else networks[call]
    if call != "online":
        empf.reset(net)
    if call == "packed" and kind in ("half", "bf16"):
        assert net(x).isfinite().all()
        return
    sentence = "the input must be a dense tensor of floating-point numbers, normalised, got|the input is torch.*x.to"
    with pytest.raises(TypeError, match=sentence) as error:
        net(x)
    assert "\n" not in str(error.value)
    if call != "online":
        assert net(X).isfinite().all()  # nothing was moved on


SYNAPSES = {
    "conv2d": (empf.BinaryConv2d(3, 4, 3, padding=1), (2, 3, 5, 5), "(N, 3, 1 or more, 1 or more)"),
    "wide": (empf.BinaryConv2d(3, 4, 3, dilation=2), (3, 6, 5), "(N, 3, 5 or more, 5 or more)"),
    "conv1d": (empf.BinaryConv1d(3, 4, 3, kind="ternary"), (2, 3, 5), "(N, 3, 3 or more)"),
    "linear": (empf.BinaryLinear(6, 4), (2, 5, 6), "(..., 6)"),
    "full": (FullConv2d(3, 4, 3, padding=1), (2, 3, 5, 5), "(N, 3, 1 or more, 1 or more)"),
}


@pytest.mark.parametrize("name", SYNAPSES)
def test_what_a_synapse_cannot_take(name):
    synapse, shape, wanted = SYNAPSES[name]
    x = torch.ones(shape)
    others = [x.tolist(), None, "x", x.numpy(), x.long(), x > 0, x.to(torch.complex64), x.to(torch.float8_e4m3fn)]
    for other in (*others, x.double(), x.half(), torch.nested.nested_tensor([x, x])):
        with pytest.raises(
            TypeError, match="the input must be a dense tensor of|the input is torch.*: use x.to"
        ) as error:
            synapse(other)
        assert "\n" not in str(error.value)
    for other in (x.flatten()[:7], x.sum(), x[:, :, :2] if name == "conv1d" else x[..., :0], x[None, None, ..., :4]):
        with pytest.raises(ValueError, match=re.escape(f"shape {wanted}, got {tuple(other.shape)}")):
            synapse(other)
    assert synapse(x[:0] if name != "wide" else x).isfinite().all()


def test_other_faults_of_a_synapse_are_its_own(monkeypatch):
    synapse = empf.BinaryLinear(6, 4)
    monkeypatch.setattr(synapse, "effective_weight", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synapse(torch.ones(2, 6))


@pytest.mark.parametrize(
    "sizes", [{"kernel_size": 0}, {"kernel_size": (3, 3, 3)}, {"stride": 0}, {"dilation": 0}, {"padding": -1}], ids=str
)
@pytest.mark.parametrize("kind", [empf.BinaryConv1d, empf.BinaryConv2d])
def test_sizes_that_no_convolution_has(kind, sizes):
    (name,) = sizes
    with pytest.raises(ValueError, match=rf"{name} of a {kind.__name__} must be one or \d whole numbers of at least"):
        kind(3, 4, **{"kernel_size": 3, **sizes})


@pytest.mark.parametrize("net", [None, 3, "net", [], torch.ones(1), nn.Linear], ids=str)
@pytest.mark.parametrize(
    "call", ["pack", "reset", "calibrate", "spike_account", "freeze_norm", "set_online", "time_steps"]
)
def test_what_is_no_network(call, net):
    more = {"calibrate": ([X],), "spike_account": ([(X, TARGET)],), "set_online": (True,)}.get(call, ())
    with pytest.raises(TypeError, match=f"a network is needed, a torch.nn.Module, got {type(net).__name__}"):
        getattr(empf, call)(net, *more)


def test_what_no_network_is_built_from_or_exported():
    for call, words in (
        (empf.build, "build takes a ModelConfig, got dict"),
        (lambda none: empf.export_onnx(none, "net.onnx"), "what is exported is what empf.pack returns, got dict"),
    ):
        with pytest.raises(TypeError, match=words):
            call({})


@pytest.mark.parametrize("device", ["x", "", "cuda:99", "meta", 99, [], "x" * 5000], ids=lambda d: repr(d)[:9])
def test_a_device_that_cannot_be_used(device):
    for load in (empf.load, empf.load_packed, lambda path, device: empf.from_pretrained(path, device=device)):
        with pytest.raises(ValueError, match="cannot use the device .*: leave it out or use cpu") as error:
            load(__file__, device)  # before anything is read
        assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("steps", ["1", 1.5, True, [1.0], torch.tensor(1)], ids=str)
@pytest.mark.parametrize("call", ["model", "packed", "past", "online"])
def test_steps_that_are_no_numbers(networks, call, steps):
    with pytest.raises(TypeError, match="must be whole numbers, got"):
        if call == "online":
            online(X, steps=steps)
        elif call == "past":
            networks["model"](X, steps=1, past=steps)
        else:
            networks[call](X, steps=steps)


@pytest.mark.parametrize(
    "target, words",
    [
        (torch.tensor([0, 4]), r"target torch.int64 \(2,\), says: Target 4 is out of bounds"),
        (torch.tensor([0, -1]), "says: Target -1 is out of bounds"),
        (torch.tensor([0]), r"\(2, 4\) and the target torch.int64 \(1,\), says"),
        (torch.tensor([0.0, 1.0]), r"target torch.float32 \(2,\), says"),
        (torch.zeros(2, 7), r"target torch.float32 \(2, 7\), says"),
        (None, "target NoneType, says"),
        ([0, 1], "target list, says"),
    ],
)
def test_labels_that_do_not_fit(target, words):
    with pytest.raises(ValueError, match=rf"criterion, given logits .*{words}") as error:
        online(X, target)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("learning", ["every", "stbp"])
@pytest.mark.parametrize("loss", [lambda logits, target: logits, lambda logits, target: 3.0])
def test_a_loss_that_is_no_number(loss, learning):
    with pytest.raises(ValueError, match="must return a loss of one number, got"):
        online(X, criterion=loss, learning=learning, steps=None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("not enough memory: x")])
def test_faults_of_the_machine_are_not_the_targets(error):
    def loss(logits, target):
        raise error

    with pytest.raises(type(error)) as found:
        online(X, criterion=loss)
    assert found.value is error


def test_whole_numbers():
    assert whole("steps", torch.tensor([1, 2])) == [1, 2]
    for values in ([1.5], [None], 3, "12"):
        with pytest.raises(TypeError, match="steps must be whole numbers, got"):
            whole("steps", values)
    with pytest.raises(TypeError, match="T, k, seed and iteration must be whole numbers"):
        empf.draw_steps(4, 1.5, 0, 0)
