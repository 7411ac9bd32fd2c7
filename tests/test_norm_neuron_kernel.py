"""BN + neuron and Mem-BN in training: kernels, and the torch path, against float64 autograd of the definitions."""

import pytest
import torch

from empf.kernels import dispatch, norm_kernels, steps
from empf.kernels.norm_kernels import MAX_STEPS
from empf.kernels.norm_neuron import bn_neuron, bn_neuron_ref, mem_bn_neuron, mem_bn_neuron_ref

pytestmark = pytest.mark.kernel

FORMS = {"bn": (bn_neuron, bn_neuron_ref), "mem_bn": (mem_bn_neuron, mem_bn_neuron_ref)}
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter is wrong for bf16
EPS = {torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # rounding of one number


def lay_out(x, layout):
    """x (T, N, C, ...) with contiguous steps, channels_last steps, or steps that are neither."""
    if layout == "channels_last":
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "neither" else x.contiguous()


def inputs(
    form, T, shape, *, per_channel=False, v=True, layout="contiguous", dtype=torch.float32, device="cpu", mean=1.0
):
    """Arguments in order; leaves that require gradients."""
    g = torch.Generator().manual_seed(T)
    C = shape[1]
    per = (T, C) if per_channel else (T,)
    norm = (C,) if form == "bn" else (T, C)
    x = [
        lay_out((mean + torch.randn(T, *shape, generator=g)).to(dtype), layout),
        lay_out(torch.randn(1, *shape, generator=g), layout)[0] if v else None,
        0.3 + 0.5 * torch.rand(per, generator=g),
        0.2 + 0.5 * torch.rand(per, generator=g),
    ]
    if form == "mem_bn":
        x += [0.5 + torch.rand(per, generator=g), 0.5 + torch.rand(per, generator=g)]
    x += [0.5 + torch.rand(norm, generator=g), 0.3 * torch.randn(norm, generator=g)]
    return [None if p is None else p.to(device).requires_grad_() for p in x]


def loss(spikes, v):
    """A weighted sum in which every spike, and the last potential, has another weight."""
    w = torch.linspace(-3, 3, spikes.numel(), dtype=torch.float64, device=spikes.device).cos().view(spikes.shape)
    total = (spikes.double() * w).sum()
    return total if v is None or not v.requires_grad else total + (v.double() * w[0]).sum()


def check(form, x, **options):
    """Outputs, statistics and all gradients against float64 autograd of the definition."""
    function, ref = FORMS[form]
    y = [None if p is None else p.detach().double().requires_grad_() for p in x]
    got, want = function(*x, **options), ref(*y, **options)
    eps = EPS[x[0].dtype]
    terms = x[0][0, :, 0].numel()
    assert got[0].dtype == x[0].dtype
    for name, a, b in zip(("spikes", "v", "mean", "var"), got, want, strict=True):
        if name == "v" and options.get("parallel"):
            assert a is x[1]
            continue
        bound = (4 if name == "spikes" else 0) * eps * (b.abs() + 1) + 2e-6 * (b.abs() + 1)
        assert ((a.double() - b).abs() <= bound).all(), f"{name}: off by {(a.double() - b).abs().max()}"
    names = ["x", "v", "leak", "threshold", "alpha", "beta", "weight", "bias"]
    names = names if form == "mem_bn" else names[:4] + names[6:]
    wanted = [i for i, p in enumerate(x) if p is not None]
    d_got = torch.autograd.grad(loss(got[0], None if options.get("parallel") else got[1]), [x[i] for i in wanted],
                                allow_unused=True)  # fmt: skip
    d_want = torch.autograd.grad(loss(want[0], None if options.get("parallel") else want[1]), [y[i] for i in wanted],
                                 allow_unused=True)  # fmt: skip
    for i, a, b in zip(wanted, d_got, d_want, strict=True):
        if b is None:
            assert a is None or not a.any(), names[i]
            continue
        scale = (b.abs() + 1) * (1 if i < 2 else terms**0.5)
        bound = 4 * (eps if i == 0 else EPS[torch.float32] * 8 if i == 1 else max(eps / 4, 2e-6)) * scale + 2e-6 * scale
        assert ((a.double() - b).abs() <= bound).all(), f"d_{names[i]}: off by {(a.double() - b).abs().max()}"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh tensors hold NaN, so an element that is not written is seen."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        return plain(self, *args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture(params=["kernel", "torch"])
def path(request):
    """Both implementations of the functions: the Triton kernels, and the definitions."""
    launches = request.getfixturevalue("kernels_on")
    if request.param == "torch":
        dispatch.set_backend("off")
    yield request.param
    assert (len(launches) > 0) == (request.param == "kernel"), launches


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 10])
def test_steps(form, T, path, device):
    check(form, inputs(form, T, (2, 5, 3, 7), v=T != 2, device=device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
@pytest.mark.parametrize("detach", [True, False])
def test_per_channel(form, layout, detach, path, device):
    x = inputs(form, 3, (3, 6, 5, 7), per_channel=True, layout=layout, device=device)
    check(form, x, detach=detach, bits=3, clipped=layout != "contiguous")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 31, 33), (1, 2, 513), (9, 128, 2, 2), (17, 20, 2, 2), (3, 6, 9, 23)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_edges_of_tiles(form, shape, layout, kernels_on, device, monkeypatch):
    """And several tiles for a program, in the larger of these."""
    monkeypatch.setattr(steps, "PROGRAMS", 1)
    monkeypatch.setattr(steps, "device_facts", lambda _: (4, False))
    check(form, inputs(form, 2, shape, layout=layout, device=device))
    assert len(kernels_on) == 2  # forward and backward


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form, dtype, path, device):
    check(form, inputs(form, 2, (2, 24, 5, 7), layout="channels_last", dtype=dtype, device=device))


@pytest.mark.parametrize("detach", [True, False])
def test_parallel(detach, path, device):
    x = inputs("bn", 3, (2, 5, 3, 7), device=device)
    check("bn", x, parallel=True, detach=detach)
    check("bn", [*x[:2], None, *x[3:]], parallel=True, detach=detach)


@pytest.mark.parametrize("form", FORMS)
def test_large_mean(form, path, device):
    """A mean of 1000 standard deviations costs the digits that the input itself lacks, no more."""
    x = inputs(form, 2, (4, 3, 9, 9), v=False, mean=1000.0, device=device)
    *_, mean, var = FORMS[form][0](*x)
    *_, want_mean, want_var = FORMS[form][1](*[None if p is None else p.detach().double() for p in x])
    assert ((mean - want_mean) / want_mean).abs().max() < 1e-6 and ((var - want_var) / want_var).abs().max() < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_more_steps_than_a_launch_holds(form, kernels_on, device):
    check(form, inputs(form, MAX_STEPS + 1, (2, MAX_STEPS + 1, 4), device=device))  # C = T: (C,) is not taken for (T,)


def test_bn_as_torch_has_it(path, device):
    """Mean, variance and normalisation are those of torch's batch norm in training."""
    x, _, leak, threshold, weight, bias = inputs("bn", 1, (4, 6, 5, 5), device=device)
    spikes, v, mean, var = bn_neuron(x, None, leak, threshold, weight, bias)
    running = torch.zeros(6, device=device), torch.ones(6, device=device)
    current = torch.nn.functional.batch_norm(x[0], *running, weight, bias, training=True, momentum=1.0)
    assert torch.allclose(spikes[0] + v, current, atol=1e-5)
    assert torch.allclose(mean[0], running[0], atol=1e-6) and torch.allclose(var[0] * 100 / 99, running[1], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 127, 128, 300])
def test_partial_sums_of_many_programs(rows, kernels_on, device):
    """Mean and variance from the statistics of any number of programs, some without numbers; the same at every call."""
    T, C, per_program = 2, 19, 5
    x = torch.randn(rows, per_program, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) + 7
    used = torch.arange(rows) % 3 != 1
    variances, means = torch.var_mean(x, 1, correction=0)
    counts = torch.full_like(means, per_program)
    partial = (torch.stack([counts, means, variances * per_program]) * used[:, None, None]).float().to(device)
    results = []
    for _ in range(2):
        mean, var = torch.empty(2, T, C, device=device)
        norm_kernels._finish(partial, used.sum().item() * per_program, mean, var)
        results.append((mean, var))
    want_var, want_mean = torch.var_mean(x[used].flatten(0, 1), 0, correction=0)
    torch.testing.assert_close(mean.double().cpu(), want_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double().cpu(), want_var, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_statistics_about_no_single_number(form, kernels_on, device):
    """The first number of the channel an outlier: as precise as torch's own batch normalisation, not 7 % off."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 2, 32, 32, generator=g)  # 16,384 numbers per channel
    x[0, 0, :, 0, 0] = 1e5
    x[0, :, 1] += 1e4  # and a large mean
    x = x.to(device)
    half = torch.full((1,), 0.5, device=device)
    parameters = (half, half) if form == "mem_bn" else ()
    affine = [torch.ones(2, device=device), torch.zeros(2, device=device)]
    affine = [p[None] for p in affine] if form == "mem_bn" else affine
    _, _, mean, var = FORMS[form][0](x, None, half, half, *parameters, *affine)
    want_var, want_mean = torch.var_mean(x.double(), (1, 3, 4), correction=0)
    running = torch.zeros(2, device=device), torch.ones(2, device=device)
    torch.nn.functional.batch_norm(x[0], *running, training=True, momentum=1.0)
    count = x[0, :, 0].numel()
    of_torch = (running[1].double() * (count - 1) / count - want_var[0]).abs() / want_var[0]
    assert (((var - want_var).abs() / want_var)[0] <= of_torch + 3e-6).all()
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_dtype_follows_x_whatever_the_parameters_are(form, dtypes, kernels_on, device):
    of_x, of_parameters = dtypes
    x = inputs(form, 2, (3, 4, 5), device=device)
    x = [p.detach().to(of_x if i < 2 else of_parameters).requires_grad_() for i, p in enumerate(x)]
    spikes, v, mean, var = FORMS[form][0](*x, detach=False)
    assert {y.dtype for y in (spikes, v, mean, var)} == {of_x}
    y = [p.detach().double().requires_grad_() for p in x]
    want = FORMS[form][1](*y, detach=False)
    for a, b in zip((spikes, v, mean, var), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss(spikes, v), x)
    for p, a, b in zip(x, gradients, torch.autograd.grad(loss(*want[:2]), y), strict=True):
        assert a.dtype == p.dtype
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    assert bool(kernels_on) == (of_x == torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("used", ["spikes", "v"])
def test_loss_of_one_output(form, used, path, device):
    """Then the other has no gradient, not one of zeros."""
    x = inputs(form, 2, (3, 4, 5), device=device)
    y, gradients = [p.detach().double().requires_grad_() for p in x], []
    for z, function in zip((x, y), FORMS[form], strict=True):
        out = dict(zip(("spikes", "v"), function(*z, detach=False), strict=False))[used]
        gradients.append(torch.autograd.grad((out.double() * out.detach().double().cos()).sum(), z))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        assert want.any()


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_nan(form, path, device):
    """In all of its channel, and in the variance that a running average would take up."""
    x = [p.detach() for p in inputs(form, 2, (3, 4, 5), device=device)]
    x[0][0, 1, 2, 3] = float("nan")
    for got, want in zip(FORMS[form][0](*x, bits=3), FORMS[form][1](*x, bits=3), strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and 0 < got.isnan().sum() < got.numel()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3])
def test_again_with_the_statistics_of_before(form, T, path, device, request):
    """The same spikes and potential, without a statistics pass; from other statistics, others."""
    x = inputs(form, T, (3, 6, 5, 7), layout="channels_last", device=device)
    spikes, v, mean, var = FORMS[form][0](*x, bits=3)
    again, v_again, *_ = FORMS[form][0](*x, bits=3, stats=(mean, var))
    if path == "kernel":
        assert torch.equal(again, spikes) and torch.equal(v_again, v)
        assert request.getfixturevalue("kernels_on")[f"{form}_neuron_again"] == 1
    assert (v_again - v).abs().max() < 1e-5 and (again != spikes).float().mean() < 0.01
    assert again.stride() == spikes.stride() and not again.requires_grad
    strided = [s.double().t().contiguous().t() for s in (mean, var)]  # neither contiguous nor fp32
    assert torch.equal(FORMS[form][0](*x, bits=3, stats=strided)[0], again)
    assert not torch.allclose(FORMS[form][0](*x, stats=(mean + 1, var))[0], FORMS[form][0](*x)[0])


@pytest.mark.parametrize("form", FORMS)
def test_errors_of_statistics(form, kernels_on, device):
    x = inputs(form, 2, (3, 4), device=device)
    with pytest.raises(ValueError, match=r"stats must be \(mean, var\) of shape \(2, 4\).*\(4,\)"):
        FORMS[form][0](*x, stats=(torch.zeros(4, device=device), torch.ones(2, 4, device=device)))
    x, T = inputs(form, MAX_STEPS + 1, (3, 4), device=device), MAX_STEPS + 1
    with torch.no_grad():  # more steps than a launch holds
        spikes, v, *stats = FORMS[form][0](*x)
        again, v_again, *_ = FORMS[form][0](*x, stats=stats)
    assert len(spikes) == T and torch.equal(again, spikes) and torch.equal(v_again, v)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_half_of_what_modules_keep(form, kernels_on, device):
    x = inputs(form, 4, (2, 8, 8, 8), device=device)

    def saved(function):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
        ):
            function(*x)
        return sum(storages.values())

    vectors = sum(p.numel() for p in x[2:]) + 2 * 4 * 8
    assert saved(FORMS[form][0]) <= 4 * (x[0].numel() + x[1].numel() + vectors)
    assert saved(FORMS[form][0]) <= saved(FORMS[form][1]) / 2


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form, path, device):
    x = inputs(form, 2, (2, 4, 5, 5), layout="channels_last", device=device)
    compiled = torch.compile(FORMS[form][0], fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    plain, fast = FORMS[form][0](*x), compiled(*x)
    assert torch.equal(plain[0], fast[0]) and fast[0].stride() == plain[0].stride()
    d_plain, d_fast = (torch.autograd.grad(loss(*out[:2]), [x[0], x[3]]) for out in (plain, fast))
    for a, b in zip(d_plain, d_fast, strict=True):  # the definition is traced operation by operation
        assert torch.equal(a, b) if path == "kernel" else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("bn", {0: torch.zeros(2, 1, 4), 1: None}, r"more than one value.*\(2, 1, 4\)"),
        ("bn", {0: torch.zeros(2, 3)}, r"\(2, 3\)"),
        ("bn", {4: torch.zeros(2, 4)}, r"weight.*\(4,\).*\(2, 4\)"),
        ("bn", {5: torch.zeros(3)}, r"bias.*\(4,\).*\(3,\)"),
        ("mem_bn", {0: torch.zeros(2, 3)}, r"\(2, 3\)"),
        ("mem_bn", {4: torch.zeros(3)}, r"alpha.*\(2,\) or \(2, 4\).*\(3,\)"),
        ("mem_bn", {5: torch.zeros(2, dtype=torch.int64)}, "beta.*int64"),
        ("mem_bn", {6: torch.zeros(4)}, r"weight.*\(2, 4\).*\(4,\)"),
        ("mem_bn", {7: torch.zeros(2, 4, device="meta")}, "bias.*meta"),
    ],
)
def test_errors(form, change, message):
    x = inputs(form, 2, (3, 4))
    with pytest.raises(ValueError, match=message):
        FORMS[form][0](*[change.get(i, p) for i, p in enumerate(x)])


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match="got 0"):
        bn_neuron(*inputs("bn", 2, (3, 4)), eps=0)
