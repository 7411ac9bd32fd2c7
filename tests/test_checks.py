"""What no network can take is one sentence, whoever is called."""

import pytest
import torch
import torch.nn.functional as F

import empf
from empf.checks import whole

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
