"""The fused neuron against float64 autograd of its definition: forward and every gradient, layouts, edges, errors."""

import pytest
import torch

from empf.kernels import steps
from empf.kernels.neuron import MAX_STEPS, neuron_update, neuron_update_ref, quantize_spikes

pytestmark = pytest.mark.kernel

HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter is wrong for bf16
EPS = {torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # rounding of one number


def lay_out(x, layout):
    """x (T, N, C, ...) with contiguous steps, channels_last steps, or steps that are neither."""
    if layout == "channels_last":
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "neither" else x.contiguous()


def inputs(
    T, shape, *, per_channel=False, folded=False, v=True, layout="contiguous", dtype=torch.float32, device="cpu"
):
    """Arguments of neuron_update by name; leaves that require gradients."""
    g = torch.Generator().manual_seed(T)
    C = shape[1]
    p_shape = (T, C) if per_channel else (T,)
    x = {
        "current": lay_out(torch.randn(T, *shape, generator=g).to(dtype), layout),
        "v": lay_out(torch.randn(1, *shape, generator=g), layout)[0] if v else None,
        "leak": 0.3 + 0.5 * torch.rand(p_shape, generator=g),
        "threshold": 0.2 + 0.5 * torch.rand(p_shape, generator=g),
        "gain": 0.5 + torch.rand(T, C, generator=g) if folded else None,
        "shift": 0.3 * torch.randn(T, C, generator=g) if folded else None,
    }
    return {k: None if p is None else p.to(device).requires_grad_() for k, p in x.items()}


def in_float64(x):
    return {k: None if p is None else p.detach().double().requires_grad_() for k, p in x.items()}


def loss(spikes, v, weights_of=torch.float64):
    """A weighted sum in which every spike, and the last potential, has another weight."""
    w = torch.linspace(-1, 1, spikes.numel(), dtype=torch.float64, device=spikes.device).cos().view(spikes.shape)
    total = (spikes.double() * w.to(weights_of)).sum()
    return total if v is None or not v.requires_grad else total + (v.double() * w[0]).sum()


def assert_close(name, got, want, eps, terms=1):
    """Per element: rounding of the result, and of a sum over `terms` numbers of order one."""
    assert got.isfinite().all(), name
    error = (got.double() - want.double()).abs()
    bound = 4 * eps * (want.double().abs() + 1) * max(1, terms**0.5)
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{name}: {got.flatten()[worst]} instead of {want.flatten()[worst]}"


def check(x, launches, **options):
    """Forward and all gradients of the kernel against the definition in float64; both kernels ran."""
    y = in_float64(x)
    spikes, v = neuron_update(**x, **options)
    want_spikes, want_v = neuron_update_ref(**y, **options)
    eps = EPS[x["current"].dtype]
    assert spikes.dtype == x["current"].dtype and launches["neuron_update"] >= 1
    assert_close("spikes", spikes, want_spikes, eps)
    if options.get("parallel"):
        assert v is x["v"]
        v = want_v = None
    else:
        assert v.dtype == torch.float32 and v.requires_grad != options.get("detach", True)
        assert_close("v", v, want_v, EPS[torch.float32], terms=4)
    loss(spikes, v).backward()
    loss(want_spikes, want_v).backward()
    assert launches["neuron_update_backward"] >= 1
    terms = x["current"][0].numel()
    for name, p in x.items():
        if p is None or y[name].grad is None:
            assert p is None or p.grad is None, name
        else:
            d_eps = eps if name == "current" else max(EPS[torch.float32], eps / 4)
            assert_close(f"d_{name}", p.grad, y[name].grad, d_eps, terms=1 if name in ("current", "v") else terms)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh tensors hold NaN (255 in uint8), so an element that a kernel does not write is seen."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 10])
@pytest.mark.parametrize("detach", [True, False])
def test_steps(T, detach, kernels_on, device):
    check(inputs(T, (2, 5, 3, 7), v=T != 2, device=device), kernels_on, detach=detach)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("detach", [True, False])
def test_per_channel(layout, folded, detach, kernels_on, device):
    x = inputs(3, (3, 6, 5, 7), per_channel=True, folded=folded, layout=layout, device=device)
    check(x, kernels_on, detach=detach)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (1, 1, 31, 33),
        (1, 1, 32, 32),
        (5, 205),
        (1, 2, 513),
        (9, 128, 2, 2),
        (2, 130, 3, 3),
        (33, 48, 2, 2),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_edges_of_tiles(shape, layout, kernels_on, device):
    check(inputs(2, shape, per_channel=True, layout=layout, device=device), kernels_on)
    check(inputs(2, shape, layout=layout, device=device), kernels_on)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("T", [1, 4])
def test_several_tiles_per_program(T, layout, kernels_on, device, monkeypatch):
    """More tiles than the programs of a launch, so partial sums run over tiles and over programs."""
    monkeypatch.setattr(steps, "PROGRAMS", 1)
    monkeypatch.setattr(steps, "device_facts", lambda _: (4, False))
    x = inputs(T, (3, 6, 7, 11), per_channel=True, folded=True, layout=layout, device=device)
    check(x, kernels_on, detach=False)


@pytest.mark.parametrize("mixed", ["leak", "threshold"])
def test_one_parameter_per_channel_and_the_other_not(mixed, kernels_on, device):
    x = inputs(3, (2, 5, 3, 3), per_channel=True, device=device)
    x[mixed] = x[mixed][:, 0].detach().clone().requires_grad_()
    check(x, kernels_on, detach=False)


@pytest.mark.parametrize("per_channel", [True, False])
def test_parallel(per_channel, kernels_on, device):
    x = inputs(4, (2, 3, 5, 5), per_channel=per_channel, folded=per_channel, device=device)
    check(x, kernels_on, parallel=True)
    x["leak"] = None
    check({**inputs(4, (2, 3, 5, 5), device=device), "leak": None}, kernels_on, parallel=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision(dtype, layout, kernels_on, device):
    check(
        inputs(4, (2, 24, 5, 7), per_channel=True, layout=layout, dtype=dtype, device=device), kernels_on, detach=False
    )


def test_more_steps_than_a_launch_holds(kernels_on, device):
    check(inputs(MAX_STEPS + 3, (2, 3, 4), device=device), kernels_on, detach=False)
    assert kernels_on["neuron_update"] == 2


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("step", [0.25, 0.1])
@pytest.mark.parametrize("clipped", [False, True])
def test_quantised(bits, step, clipped, kernels_on, device):
    x = inputs(3, (2, 5, 7), device=device)
    x["current"] = (x["current"].detach() * 40 * step).requires_grad_()  # far over the top code for 1 bit
    check(x, kernels_on, bits=bits, step=step, clipped=clipped, detach=False)


def test_codes_and_halves_are_exact(kernels_on, device):
    """Dyadic numbers leave no rounding: all codes, and every tie, equal the definition."""
    current = torch.arange(-64, 448, device=device).div(64).view(1, 1, 1, 512).expand(2, 2, 3, 512)
    half = torch.full((2,), 0.5, device=device)
    for bits in (1, 2, 4, 8):
        codes, v = neuron_update(current, None, half, half, bits=bits, codes=True)
        want, want_v = neuron_update_ref(current, None, half, half, bits=bits, codes=True)
        assert codes.dtype == torch.uint8 and torch.equal(codes, want) and torch.equal(v, want_v)
        spikes, _ = neuron_update(current, None, half, half, bits=bits)
        assert torch.equal(spikes, codes * 0.25)
    assert kernels_on["neuron_update"] == 8


def test_quantiser():
    """Its gradient is the identity, also below 0 and above the largest code, where the clipped one is 0."""
    s = torch.tensor([-1, 0, 0.1249, 0.125, 0.374, 0.375, 3.75, 3.76, 9.0], requires_grad=True)
    q = quantize_spikes(s, bits=4)
    assert q.tolist() == [0, 0, 0, 0.25, 0.25, 0.5, 3.75, 3.75, 3.75]
    q.sum().backward()
    assert s.grad.tolist() == [1] * 9
    clipped, s.grad = quantize_spikes(s, bits=4, clipped=True), None
    clipped.sum().backward()
    assert torch.equal(clipped, q) and s.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert quantize_spikes(torch.tensor([float("inf"), -float("inf")]), bits=4).tolist() == [3.75, 0]


def test_layouts_are_kept_and_read_in_place(kernels_on, device):
    """The output of a channels_last convolution over folded time, one slice of it, and a repeated static image."""
    nd = torch.randn(12, 8, 5, 6, device=device).to(memory_format=torch.channels_last)
    p = torch.full((3,), 0.5, device=device)
    for current in (nd.unflatten(0, (3, 4)), nd.unflatten(0, (6, 2))[1:4], nd[:4].expand(3, 4, 8, 5, 6)):
        spikes, v = neuron_update(current, None, p, p)
        assert torch.equal(spikes, neuron_update_ref(current, None, p, p)[0])
        assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert v.is_contiguous(memory_format=torch.channels_last)


def test_gradients_in_another_layout(kernels_on, device):
    x = inputs(2, (2, 3, 4, 5), layout="channels_last", device=device)
    y = in_float64(x)
    for z, f in ((x, neuron_update), (y, neuron_update_ref)):
        f(**z)[0].sum().backward()  # an expanded scalar
    assert_close("d_current", x["current"].grad, y["current"].grad, 1e-7)
    w = torch.randn(2, 2, 3, 4, 5, device=device)
    (d,) = torch.autograd.grad(neuron_update(**x)[0], x["current"], w)  # a contiguous gradient of channels_last spikes
    (want,) = torch.autograd.grad(neuron_update_ref(**y)[0], y["current"], w.double())
    assert_close("d_current", d, want, 1e-6)


def test_parameter_gradients_are_deterministic(kernels_on, device):
    x = inputs(2, (2, 6, 19, 23), per_channel=True, device=device)
    first = torch.autograd.grad(loss(*neuron_update(**x)), [x["leak"], x["threshold"]])
    again = torch.autograd.grad(loss(*neuron_update(**x)), [x["leak"], x["threshold"]])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("used", [("spikes",), ("v",)])
def test_loss_of_one_output(used, kernels_on, device):
    """Then the other has no gradient, not one of zeros."""
    x = inputs(3, (2, 5, 7), per_channel=True, device=device)
    y, gradients = in_float64(x), []
    for z, f in ((x, neuron_update), (y, neuron_update_ref)):
        out = dict(zip(("spikes", "v"), f(**z, detach=False), strict=True))
        weights = torch.linspace(1, 2, 70, dtype=torch.float64, device=device).view(2, 5, 7)
        total = sum((out[name].double() * weights).sum() for name in used)
        gradients.append(torch.autograd.grad(total, [z[k] for k in ("current", "v", "leak", "threshold")]))
    for got, want in zip(*gradients, strict=True):
        assert_close("gradient", got, want, EPS[torch.float32], terms=70)
        assert want.any()
    assert kernels_on["neuron_update_backward"] == 1


@pytest.mark.parametrize("bits", [None, 4])
def test_nan_stays_nan(bits, kernels_on, device):
    """From its step on, in its neuron: a spike of 0 would hide it."""
    x = {k: None if p is None else p.detach() for k, p in inputs(3, (2, 5, 7), device=device).items()}
    x["current"][1, 0, 3, 4] = float("nan")
    for got, want, count in zip(neuron_update(**x, bits=bits), neuron_update_ref(**x, bits=bits), (2, 1), strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == count
    assert kernels_on == {"neuron_update": 1}


def test_only_wanted_gradients(kernels_on, device):
    x = inputs(2, (2, 3, 4), device=device)
    frozen = {k: p.detach() if p is not None and k != "current" else p for k, p in x.items()}
    got = torch.autograd.grad(loss(*neuron_update(**frozen)), x["current"])[0]
    want = torch.autograd.grad(loss(*neuron_update(**x)), x["current"])[0]
    assert torch.equal(got, want) and frozen["leak"].grad is None


def test_memory_saved_is_the_input(kernels_on, device):
    x = inputs(4, (2, 3, 8, 8), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        neuron_update(**x)
    assert sum(saved) == sum(x[k].numel() for k in ("current", "v", "leak", "threshold"))


def test_compiles_without_a_graph_break(kernels_on, device):
    """fullgraph=True, forward and backward, with the operators' fake implementations."""
    x = inputs(3, (2, 4, 5, 5), per_channel=True, layout="channels_last", device=device)
    args = [p for p in x.values() if p is not None]

    def run(current, v, leak, threshold):
        return neuron_update(current * 1.0, v, leak, threshold, bits=4, detach=False)

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    plain, fast = run(*args), compiled(*args)
    assert torch.equal(plain[0], fast[0]) and fast[0].stride() == plain[0].stride()
    for a, b in zip(torch.autograd.grad(loss(*plain), args), torch.autograd.grad(loss(*fast), args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [2, MAX_STEPS + 2])
def test_without_the_potential(T, kernels_on, device):
    """Spikes and gradients are the same, and None is returned in its place, kernels on and off."""
    x = inputs(T, (2, 3, 4), device=device)
    with_v, without = neuron_update(**x, detach=False), neuron_update(**x, detach=False, return_v=False)
    assert torch.equal(with_v[0], without[0]) and without[1] is None
    assert neuron_update(**in_float64(x), return_v=False)[1] is None
    assert neuron_update(**x, parallel=True, return_v=False)[1] is None
    grads = (torch.autograd.grad(spikes.sum(), [x["current"], x["v"], x["leak"]]) for spikes in (with_v[0], without[0]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_operators_are_registered_properly(kernels_on, device):
    from empf.kernels.neuron import _neuron_forward

    x = inputs(2, (2, 3, 4), device=device)
    for quantiser in ((0, None), (2, 0.75)):  # bits, top
        args = (*x.values(), quantiser[0], 0.25, False, False, False, True, quantiser[1])
        torch.library.opcheck(
            _neuron_forward, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
        )


def test_float64_and_empty_batches_use_the_definition(kernels_on, device):
    y = in_float64(inputs(2, (2, 3, 4), device=device))
    assert neuron_update(**y)[0].dtype == torch.float64
    p = torch.full((2,), 0.5, device=device)
    assert neuron_update(torch.zeros(2, 0, 3, device=device), None, p, p)[0].shape == (2, 0, 3)
    assert kernels_on["neuron_update"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"current": torch.zeros(2, 3)}, r"\(2, 3\)"),
        ({"current": torch.zeros(2, 3, 4, dtype=torch.int32)}, "int32"),
        ({"current": torch.zeros(0, 3, 4)}, "T >= 1"),
        ({"v": torch.zeros(3, 5)}, r"\(3, 4\).*\(3, 5\)"),
        ({"v": torch.zeros(3, 4, device="meta")}, "meta"),
        ({"leak": torch.zeros(3)}, r"leak.*\(2,\) or \(2, 4\).*\(3,\)"),
        ({"leak": None}, "parallel"),
        ({"threshold": torch.zeros(2, 3)}, r"threshold.*\(2, 3\)"),
        ({"threshold": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"gain": torch.zeros(2, 4)}, "shift=False"),
        ({"gain": torch.zeros(2), "shift": torch.zeros(2)}, r"gain.*\(2, 4\)"),
        ({"bits": 0}, "got 0"),
        ({"bits": 9}, "got 9"),
        ({"codes": True}, "needs bits"),
        ({"step": 0.0}, "got 0.0"),
        ({"step": float("inf")}, "positive and finite, got inf"),
    ],
)
def test_errors(change, message):
    good = {"current": torch.zeros(2, 3, 4), "v": None, "leak": torch.zeros(2), "threshold": torch.zeros(2)}
    neuron_update(**good)
    with pytest.raises(ValueError, match=message):
        neuron_update(**{**good, **change})
