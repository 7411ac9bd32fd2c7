"""torch.compile(fullgraph=True) of a small network: no graph break, the same numbers."""

import pytest
import torch
import torch.nn.functional as F

import empf


def small(neuron):
    torch.manual_seed(0)
    return empf.resnet19(num_classes=3, image_size=8, in_channels=1, width=0.03125, T=2, neuron=neuron)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("neuron", ["empf", "mem_bn"])
def test_fullgraph(neuron):
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    results = []
    for compiled in (False, True):
        model = small(neuron)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        losses = []
        for _ in range(2):  # the second batch goes through the same graphs after a reset and an update
            empf.reset(model)
            loss = F.cross_entropy(run(images, steps=1, past=1)[0], labels)
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        model.eval()
        empf.reset(model)
        with torch.no_grad():
            results.append((losses, run(images), [p.detach() for p in model.parameters()]))
    (losses, logits, parameters), (want_losses, want_logits, want_parameters) = results
    assert losses == pytest.approx(want_losses, rel=1e-4) and losses[0] != losses[1]
    assert torch.allclose(logits, want_logits, atol=1e-3)
    for p, want in zip(parameters, want_parameters, strict=True):
        assert torch.allclose(p, want, atol=1e-3)
