"""torch.compile(fullgraph=True) of small networks: no graph break, the same numbers."""

import pytest
import torch
import torch.nn.functional as F

import empf
from empf.models import Block, Builder, ModelConfig


def small(**kwargs):
    torch.manual_seed(0)
    return empf.vgg_snn(num_classes=3, image_size=16, in_channels=1, width=0.0625, T=2, **kwargs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_training():
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    results = []
    for compiled in (False, True):
        model = small(neuron="mem_bn", parallel=0.5)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        losses = []
        for _ in range(2):  # the second batch goes through the same graph after an update and a reset
            empf.reset(model)
            loss = F.cross_entropy(run(images, steps=1, past=1)[0], labels)
            loss.backward()
            losses.append(loss.item())
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        results.append((losses, [p.grad for p in model.parameters()]))
    (losses, gradients), (want_losses, want_gradients) = results
    assert losses == pytest.approx(want_losses, rel=1e-4) and losses[0] != losses[1]
    for got, want in zip(gradients, want_gradients, strict=True):
        assert torch.allclose(got, want, atol=1e-3 * want.abs().max().item())


@torch.no_grad()
def test_inference():
    images = torch.randn(4, 1, 16, 16)
    model = small()
    for _ in range(20):  # running statistics with which the neurons fire
        model(images)
        empf.reset(model)
    model.eval()
    want = model(images)
    empf.reset(model)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    assert want.std() > 0.01
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.kernel
def test_training_on_kernels(kernels_on, device):
    """A residual block with Mem-BN and a parallel neuron, behind it the batch norm that the kernel takes over."""
    x = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = Block(Builder(ModelConfig(T=2, width=0.0625, neuron="mem_bn", parallel=0.5)), 4, 4, 1).to(device)
        run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
        run(x).square().mean().backward()
        results.append([p.grad for p in block.parameters()] + list(block.buffers()))
        assert kernels_on["bn_neuron"] == kernels_on["mem_bn_neuron"] == 1 + compiled
    for want, got in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-4 * (1e-3 + want.abs().max().item()))
