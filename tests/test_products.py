"""What all packed products share: every mode of autograd, one rule of precision, counters that reset themselves."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from empf.kernels import binary_conv2d, binary_conv2d_neuron, binary_matmul, conv, matmul, products
from empf.kernels.conv import binary_conv2d_ref
from empf.kernels.matmul import binary_matmul_ref
from empf.kernels.pack import PackedWeight, pack, unpack
from empf.kernels.products import Counters

pytestmark = pytest.mark.kernel

PRODUCTS = {"matmul": (binary_matmul, binary_matmul_ref, {}), "conv": (binary_conv2d, binary_conv2d_ref, {"stride": 2})}
SHAPES = {"matmul": ((3, 40), (9, 40)), "conv": ((2, 8, 6, 5), (9, 8, 3, 3))}


def operands(name, device, kind="binary", seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=g) for shape in SHAPES[name])
    return x.to(device), pack(w, kind).to(device), torch.randn(9, generator=g).to(device)


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.fixture(params=PRODUCTS)
def product(request, device):
    """(function of x and bias, the same by definition in float64, x, bias, packed)"""
    function, ref, options = PRODUCTS[request.param]
    x, packed, bias = operands(request.param, device)

    def run(x, bias):
        return function(x, packed, bias=bias, **options)

    def definition(x, bias):
        return ref(x.double(), packed, bias=None if bias is None else bias.double(), **options)

    return run, definition, x, bias, packed


def test_forward_mode(product, kernels_on):
    """The tangent of x and that of the bias, alone and together; the kernel computes it."""
    run, definition, x, bias, _ = product
    x_t, bias_t = torch.randn_like(x), torch.randn_like(bias)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(run(forward_ad.make_dual(x, x_t), None))
    close(y.tangent, jvp(lambda x: definition(x, None), (x,), (x_t,))[1])
    for f, arguments, tangents in (
        (lambda b: run(x, b), (bias,), (bias_t,)),
        (run, (x, bias), (x_t, bias_t)),
    ):
        want = jvp(definition, (x, bias), (torch.zeros_like(x), bias_t) if f is not run else tangents)
        for got, expected in zip(jvp(f, arguments, tangents), want, strict=True):
            close(got, expected)
    assert sum(kernels_on.values()) >= 6


def test_forward_mode_of_a_bias_behind_codes(device, kernels_on):
    _, packed, bias = operands("matmul", device)
    codes = torch.randint(0, 16, (3, 40), dtype=torch.uint8, device=device)
    _, tangent = jvp(lambda b: binary_matmul(codes, packed, bias=b, step=0.25), (bias,), (bias,))
    assert torch.equal(tangent, bias.expand(3, 9))


def test_reverse_mode_of_torch_func(product, kernels_on):
    run, definition, x, bias, packed = product

    def loss(f):
        return lambda x, b: f(x, b).square().sum()

    for at in (0, 1):
        close(grad(loss(run), at)(x, bias), grad(loss(definition), at)(x, bias))
    close(jacrev(run)(x, bias), jacrev(definition)(x, bias))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(packed.operand("pair"))
    close(run(x, bias), definition(x, bias))  # and plain calls go on as before


def test_second_order(product, kernels_on):
    run, definition, x, bias, _ = product
    x = x[:1]
    close(hessian(lambda x: run(x, bias).pow(3).sum())(x), hessian(lambda x: definition(x, bias).pow(3).sum())(x))
    results = []
    for f in (run, definition):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf, bias).pow(3).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    close(*results)


def test_vmap(product, kernels_on):
    """Over x, over the bias, over both, along an inner dimension, and over gradients per example."""
    run, definition, x, bias, _ = product
    xs, biases = torch.stack([x, 2 * x, x.flip(0)], 1), torch.stack([bias, -bias, 2 * bias])
    for in_dims, arguments in (((1, None), (xs, bias)), ((None, 0), (x, biases)), ((1, 0), (xs, biases))):
        close(vmap(run, in_dims)(*arguments), vmap(definition, in_dims)(*arguments))
    per_example = [
        vmap(grad(lambda x, b, f=f: f(x, b).square().sum(), (0, 1)), (1, None))(xs, bias) for f in (run, definition)
    ]
    for got, want in zip(*per_example, strict=True):
        close(got, want)


def test_inference_neuron_refuses_transforms(device, kernels_on):
    packed, half = pack(torch.ones(4, 8, 3, 3)).to(device), torch.full((2,), 0.5, device=device)
    x = torch.ones(2, 1, 8, 4, 4, device=device)

    def run(x):
        return binary_conv2d_neuron(x, packed, None, half, half)[0]

    with pytest.raises(NotImplementedError, match="use binary_conv2d and neuron_update"):
        jvp(run, (x,), (x,))
    with pytest.raises(NotImplementedError, match="use binary_conv2d and neuron_update"):
        vmap(run)(x[None])


@pytest.mark.parametrize("name", PRODUCTS)
def test_first_call_in_inference_mode_then_a_gradient(name, device, kernels_on):
    """Nothing that inference mode or torch.func made stays behind in the cache of derived weights."""
    function, ref, options = PRODUCTS[name]
    with torch.inference_mode():
        x, packed, bias = operands(name, device)
        function(x, packed, **options)
    x = x.clone().requires_grad_()
    y = function(x, packed, bias=bias.clone(), **options)
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    ref(wide, packed, **options).sum().backward()
    close(x.grad, wide.grad)


def test_weights_written_to_after_a_call(product, device, kernels_on):
    """`packed.bits` may be loaded anew: kernels follow, and so do graphs, because the derived words stay in place."""
    run, definition, x, bias, packed = product
    words = [packed.operand("pair"), packed.row_sums()]
    before = run(x, bias)
    other = pack(-unpack(packed), "binary")
    packed.bits.copy_(other.bits)
    close(run(x, bias), definition(x, bias))
    assert (run(x, bias) - before).abs().max() > 1
    assert packed.operand("pair") is words[0] and torch.equal(words[0], other.operand("pair"))
    assert packed.row_sums() is words[1] and torch.equal(words[1], other.row_sums())
    leaf = x.clone().requires_grad_()
    y = run(leaf, bias)
    with torch.inference_mode():
        packed.bits.copy_(pack(unpack(other)).bits ^ 1)
    with pytest.raises(RuntimeError, match="between the forward and the backward"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_infinities_and_the_largest_numbers(name, precision, kind, device, kernels_on):
    """As the definition: an infinity stays one, the largest finite numbers too, opposite infinities are NaN."""
    function, ref, options = PRODUCTS[name]
    x, _, _ = operands(name, device)
    scale = torch.full((9,), 0.25, device=device)
    packed = pack(torch.randn(SHAPES[name][1], generator=torch.Generator().manual_seed(5)), kind).to(device)
    packed = packed.with_scale(scale)
    largest, inf, nan = torch.finfo(torch.float32).max, float("inf"), float("nan")
    payload = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32).item()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for values in ((inf,), (-inf,), (largest,), (-largest,), (inf, -inf), (nan,), (payload,), (inf, nan)):
            z = x.clone()
            z.view(-1)[11 : 11 + len(values)] = torch.tensor(values, device=device)
            got, want = function(z, packed, **options), ref(z, packed, **options)
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-4, equal_nan=True)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradient_of_half_x_is_scaled_before_it_is_cast(name, device, kernels_on):
    """An fp32 gradient of 1e6 and a scale of 1e-4: 100 fits fp16, 1e6 does not."""
    function, ref, options = PRODUCTS[name]
    x, packed, _ = operands(name, device)
    packed = packed.with_scale(torch.full((9,), 1e-4, device=device))
    x = x.half().requires_grad_()
    y = function(x, packed, out_dtype=torch.float32, **options)
    y.backward(torch.full_like(y, 1e6))
    wide = x.detach().double().requires_grad_()
    z = ref(wide, packed, **options)
    z.backward(torch.full_like(z, 1e6))
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-3, atol=0.5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_changes_nothing(name, device, kernels_on):
    """One rule for kernels and definitions: x is computed with in its own type, forward and backward."""
    function, ref, options = PRODUCTS[name]
    x, packed, bias = operands(name, device)
    results = []
    for enabled in (False, True):
        for f in (function, ref):
            leaf = x.clone().requires_grad_()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
                y = f(leaf, packed, bias=bias, **options)
            (d_x,) = torch.autograd.grad(y.sum(), leaf)
            results.append((y, d_x))
    for plain, cast in zip(results[:2], results[2:], strict=True):
        assert cast[0].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("step", [torch.tensor(0.25), torch.tensor(0.25).numpy()[()]], ids=["tensor", "numpy"])
def test_step_may_be_any_number(step, device, kernels_on):
    codes = torch.randint(0, 16, (1, 2, 8, 4, 4), dtype=torch.uint8, device=device)
    _, packed, _ = operands("matmul", device)
    filters, half = pack(torch.ones(4, 8, 3, 3)).to(device), torch.full((1,), 0.5, device=device)
    rows = codes.flatten()[:80].view(2, 40)
    assert torch.equal(binary_matmul(rows, packed, step=step), binary_matmul(rows, packed, step=0.25))
    assert torch.equal(binary_conv2d(codes[0], filters, step=step), binary_conv2d(codes[0], filters, step=0.25))
    got, want = (
        binary_conv2d_neuron(codes, filters, None, half, half, in_step=s, step=s, bits=4)[0] for s in (step, 0.25)
    )
    assert torch.equal(got, want)


def test_counters_clear_themselves(device, kernels_on, monkeypatch):
    """A split product launches nothing to clear its counters, leaves them at zero, and the next finds them so."""
    monkeypatch.setattr(matmul, "device_facts", lambda _: (64, False))
    packed = pack(torch.randn(70, 1040, generator=torch.Generator().manual_seed(0))).to(device)
    x = torch.randint(-4, 5, (3, 1040), device=device).float()
    want = binary_matmul_ref(x, packed)
    binary_matmul(x, packed)
    counters = Counters._of_device[x.device]
    taken = counters.used
    monkeypatch.setattr(products.torch, "zeros", None)
    for rows in (3, 1, 2):
        torch.testing.assert_close(binary_matmul(x[:rows], packed), want[:rows])
        assert not counters.buffer.any() and counters.used == taken
    assert kernels_on == {"binary_matmul": 4}


def test_counters_are_shared_by_nobody_who_runs_at_the_same_time(device):
    """One set for each stream, and one for each launch that a graph captures; none are left: fresh ones, cleared."""
    counters = Counters(torch.device(device), 3 * Counters.PER_STREAM)
    of_streams = [counters.take(5, stream) for stream in (1, 2)]
    assert counters.take(7, 1).data_ptr() == of_streams[0].data_ptr()
    captured = [counters.take(5, None) for _ in range(2)]
    places = sorted((c.data_ptr(), c.data_ptr() + 4 * len(c)) for c in of_streams + captured)
    assert all(end <= start for (_, end), (start, _) in zip(places, places[1:], strict=False))
    end = counters.buffer.data_ptr() + 4 * len(counters.buffer)
    for tiles, stream in ((5, 3), (5000, 1), (Counters.PER_STREAM, None)):  # no room, too many
        fresh = counters.take(tiles, stream)
        assert len(fresh) >= tiles and not counters.buffer.data_ptr() <= fresh.data_ptr() < end and not fresh.any()


@pytest.mark.gpu
def test_counters_in_graphs_on_several_streams(kernels_on):
    """Two graphs and eager calls at once, a thousand times, each the same to the bit."""
    packed = pack(torch.randn(64, 16384)).to("cuda")
    x = torch.randn(3, 16384, device="cuda")
    want = binary_matmul(x, packed)
    graphs, results = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(binary_matmul(x, packed))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(250):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = []
        for stream in streams[2:]:
            with torch.cuda.stream(stream):
                eager.append(binary_matmul(x, packed))
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y in results + eager)


def test_a_full_gpu_is_not_split():
    """512 channels at 4 x 4, batch 64, T = 4: 128 tiles on 132 multiprocessors, no partial sums of 17 MB."""
    tile = conv.pick_tile(1, 512, 256 * 16)
    assert conv.count_tiles(tile, 512, 256 * 16) == 128
    assert conv.split_plan(tile, 1, (512, 512, 3, 3), 256 * 16, 132).splits == 1


def test_weights_made_from_mapped_tensors_are_refused(device):
    w = torch.randn(4, 40, device=device)
    with pytest.raises(NotImplementedError, match="pack them outside"):
        grad(lambda w: pack(w).scale.sum())(w)
    packed = pack(w)
    with pytest.raises(NotImplementedError, match="pack them outside"):
        vmap(lambda bits: PackedWeight(bits, packed.scale, packed.shape).scale)(packed.bits[None])


def test_rows_up_to_2_31(device):
    """The kernel counts rows in int32 up to the end of the last tile."""
    packed = pack(torch.ones(1, 1)).to(device)
    with pytest.raises(ValueError, match="about 2.31 rows or more: split the batch"):
        binary_matmul(torch.zeros(1, 1, device=device).expand(2**31 - 200, 1), packed)
