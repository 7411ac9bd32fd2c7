"""The packed matrix product: exact on integers, right to rounding elsewhere, in every path the launcher can take."""

import pytest
import torch
from product_tools import BF16, INTEGERS, KINDS, exact, integers, weights

from empf.kernels import matmul, set_backend
from empf.kernels.dense import unpack_op
from empf.kernels.matmul import CONFIGS, FLOATS, binary_matmul, binary_matmul_ref
from empf.kernels.pack import PackedWeight, pack, signs

X_TYPES = [torch.float32, torch.float16, BF16, torch.uint8, torch.int8]

# Every value of M, N in 1, 7, 16, 33, 129 and of K in 1, 31, 32, 33, 96, 1120.
SHAPES = [
    (1, 129, 1120),
    (7, 16, 1),
    (16, 33, 96),
    (33, 7, 31),
    (129, 1, 33),
    (1, 7, 32),
    (129, 129, 96),
    (33, 1, 1120),
]


@pytest.fixture
def machine(monkeypatch):
    """Set the number of multiprocessors that the launcher plans for, and whether it is a Hopper GPU."""
    return lambda processors, hopper=False: monkeypatch.setattr(matmul, "device_facts", lambda _: (processors, hopper))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", X_TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact_on_integers(m, n, k, kind, dtype, device, kernels_on, poisoned):
    x, packed = integers(m, k, dtype, device), weights(n, k, kind, device)
    step = 0.25 if dtype in INTEGERS else None
    bias = None if m == 7 else integers(n, 2, torch.float32, device, seed=2)[:, 0]  # every second number
    y = binary_matmul(x, packed, bias=bias, step=step, out_dtype=torch.float32)
    assert kernels_on["binary_matmul"] == 1
    want = exact(x, packed, bias, step)
    assert torch.equal(y.cpu().double(), want)
    assert torch.equal(binary_matmul_ref(x, packed, bias=bias, step=step, out_dtype=torch.float32).double().cpu(), want)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.uint8, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_position(kind, dtype, device, kernels_on):
    """One minus per row of the weights against one 1 per row of x: each product is a single weight."""
    w = torch.ones(64, 64) - 2 * torch.eye(64)
    if kind == "ternary":
        w[:, ::3] = 0
    packed = pack(w, kind, torch.ones(64)).to(device)
    x = torch.eye(64, device=device).to(dtype)
    y = binary_matmul(x, packed, step=1.0 if dtype in INTEGERS else None)
    assert kernels_on["binary_matmul"] == 1
    assert torch.equal(y.cpu().float(), torch.where(w < 0, -1.0, 1.0).mul(w != 0).T)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        pytest.param(dtype, config, marks=pytest.mark.gpu if dtype == torch.bfloat16 else ())
        for dtype in (*FLOATS, *INTEGERS)
        for config in CONFIGS[dtype.itemsize]
    ],
)
def test_every_configuration(dtype, config, device, kernels_on, poisoned, monkeypatch):
    """Ragged in M, and where the launcher lets a tile be also in N and K; more than one tile and step each way."""
    if config.block_m > 128 and device == "cuda" and not matmul.device_facts(torch.device("cuda"))[1]:
        pytest.skip(f"{config} is for Hopper")
    monkeypatch.setitem(CONFIGS, dtype.itemsize, (config,) * 2)
    wide = config.block_m > 128  # see `_fits`
    m, n, k = config.block_m + (config.block_m > 16), config.block_n + 5, 2 * config.block_k + 16
    n, k = (config.block_n + 16, 2 * config.block_k) if wide else (n, k)
    x, packed = integers(m, k, dtype, device), weights(n, k, "binary", device)
    step = 0.5 if dtype in INTEGERS else None
    y = binary_matmul(x, packed, step=step, out_dtype=torch.float32)
    assert kernels_on["binary_matmul"] == 1
    assert torch.equal(y.cpu().double(), exact(x, packed, None, step))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", X_TYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 4864), (16, 1552), (70, 784)])
def test_split_k(m, k, dtype, device, kernels_on, poisoned, machine):
    """Many processors and few tiles; steps that the parts cannot share evenly; the bias is added once."""
    machine(64)
    config, splits = matmul._choose(m, 70, k, dtype.itemsize, 64, False)
    assert splits > 1 and -(-k // config.block_k) % splits
    x, packed = integers(m, k, dtype, device), weights(70, k, "binary", device)
    bias, step = integers(1, 70, torch.float32, device)[0], 0.5 if dtype in INTEGERS else None
    y = binary_matmul(x, packed, bias=bias, step=step, out_dtype=torch.float32)
    assert kernels_on["binary_matmul"] == 1
    assert torch.equal(y.cpu().double(), exact(x, packed, bias, step))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_persistent_grid(dtype, device, kernels_on, poisoned, machine, monkeypatch):
    """Few programs for many tiles: groups of tiles, the last of them incomplete."""
    machine(1)
    monkeypatch.setattr(matmul, "PERSISTENT_ROWS", 1)
    monkeypatch.setitem(CONFIGS, dtype.itemsize, CONFIGS[dtype.itemsize][-1:] * 2)
    x, packed = integers(600, 48, dtype, device), weights(300, 48, "binary", device)
    step = 0.5 if dtype in INTEGERS else None
    y = binary_matmul(x, packed, step=step, out_dtype=torch.float32)
    assert kernels_on["binary_matmul"] == 1
    assert torch.equal(y.cpu().double(), exact(x, packed, None, step))


@pytest.mark.parametrize("itemsize", CONFIGS)
def test_choice_of_configuration(itemsize):
    for hopper in (False, True):
        for m in (1, 16, 17, 64, 300, 4096):
            for n, k in ((10, 16), (512, 4608), (4096, 4096), (16384, 16384)):
                config, splits = matmul._choose(m, n, k, itemsize, 132, hopper)
                assert (config.block_m == 16) == (m <= 16)
                assert hopper or config.block_m <= 128
                assert 1 <= splits <= 16 and (splits == 1 or splits * 2 * config.block_k <= k + config.block_k)
    ragged = [matmul._choose(4096, n, k, itemsize, 132, True) for n, k in ((4097, 4096), (4096, 4112))]
    assert all(plan.tile.block_m <= 128 for plan in ragged)
    assert matmul._choose(1, 32768, 16384, itemsize, 132, True)[1] == 1
    assert matmul._choose(1, 16384, 16384, itemsize, 132, True)[1] == 2
    assert matmul._choose(1, 4096, 4096, itemsize, 132, True)[1] == 8
    assert matmul._choose(4096, 4096, 4096, itemsize, 132, True)[0] == CONFIGS[itemsize][1]
    if itemsize < 4:  # 256 rows: 128 by 64 leaves 128 programs, and half the unpacking of 64 by 64
        assert matmul._choose(256, 4096, 4096, itemsize, 132, True)[0][:2] == (128, 64)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", KINDS)
def test_all_codes(kind, device, kernels_on):
    """Every uint8 code and every int8 code, each against a weight of each sign."""
    w = torch.tensor([1.0, -1.0]).repeat(3, 128)
    w[2, 100:] = 0
    packed = pack(w, kind, torch.ones(3)).to(device)
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    codes = torch.stack([row.roll(shift) for shift, row in enumerate(codes)]).to(device)
    for x in (codes, codes.view(torch.int8)):
        assert torch.equal(binary_matmul(x, packed, step=1.0).cpu().double(), exact(x, packed, None, 1.0))
    assert kernels_on["binary_matmul"] == 2


@pytest.mark.kernel
def test_codes_are_exact_where_fp32_is_not(device, kernels_on):
    """Sums past 2^24, which fp32 accumulation would round: 255 * 70,000; then one rounding, as in the definition."""
    k = 70_000
    packed = pack(torch.ones(2, k), scale=torch.tensor([0.3, 1.0])).to(device)
    x = torch.full((1, k), 255, dtype=torch.uint8, device=device)
    x[0, -1] = 254
    y = binary_matmul(x, packed, step=0.1)
    assert kernels_on["binary_matmul"] == 1
    want = torch.tensor(float(255 * k - 1)).float() * (packed.scale.cpu() * 0.1)
    assert torch.equal(y[0].cpu(), want) and torch.equal(binary_matmul_ref(x, packed, step=0.1), y)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float32, "highest", 1e-6),
        (torch.float32, "high", 5e-6),
        (torch.float32, "medium", 1e-5),
        (torch.float16, "highest", 1e-3),
        pytest.param(torch.bfloat16, "highest", 8e-3, marks=pytest.mark.gpu),
    ],
)
def test_error_on_random_numbers(dtype, precision, bound, kind, device, kernels_on):
    """The largest error, relative to sqrt(K), the size of a sum."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 1000, generator=generator).to(dtype).to(device)
    packed = pack(torch.randn(50, 1000, generator=generator), kind, torch.rand(50, generator=generator)).to(device)
    bias = torch.randn(50, generator=generator).to(dtype).to(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        y = binary_matmul(x, packed, bias=bias)
    finally:
        torch.set_float32_matmul_precision(before)
    assert kernels_on["binary_matmul"] == 1 and y.dtype == dtype
    want = binary_matmul_ref(x.double(), packed, bias=bias)
    assert (y.double() - want).abs().max() < bound * 1000**0.5


@pytest.mark.kernel
@pytest.mark.parametrize(("precision", "bits"), [("highest", 24), ("high", 24), ("medium", 16)])
def test_bits_of_fp32_that_count(precision, bits, device, kernels_on):
    """Odd integers of all the bits that the bf16 terms hold together come out unchanged."""
    x = (2**bits - 1 - 2 * torch.arange(16, device=device)).float().diag()
    packed = pack(torch.ones(3, 16), scale=torch.ones(3)).to(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        y = binary_matmul(x, packed)
    finally:
        torch.set_float32_matmul_precision(before)
    assert kernels_on["binary_matmul"] == 1 and torch.equal(y, x.diag()[:, None].expand(16, 3))


@pytest.mark.kernel
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_out_dtype(dtype, out_dtype, device, kernels_on):
    x, packed = integers(5, 32, dtype, device), weights(6, 32, "binary", device)
    step = 0.5 if dtype in INTEGERS else None
    y = binary_matmul(x, packed, step=step, out_dtype=out_dtype)
    assert kernels_on["binary_matmul"] == 1
    assert y.dtype == (out_dtype or (torch.float32 if dtype in INTEGERS else dtype))
    assert torch.equal(y.cpu(), exact(x, packed, None, step).to(y.dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_strides_and_leading_dimensions(dtype, device, kernels_on):
    wide, packed = integers(24, 3 * 96, dtype, device), weights(9, 96, "ternary", device)
    options = dict(step=0.5 if dtype in INTEGERS else None, out_dtype=torch.float32)
    views = {
        "rows of a wider matrix": wide[:, 96:192],
        "rows that start off a 16-byte boundary": wide[:, 1:97],
        "every third element": wide[:, ::3],
        "transposed": wide[:, :24].T.contiguous().T.repeat(1, 4),
        "columns": integers(96, 24, dtype, device).T,
        "one row for all": wide[:1, :96].expand(24, 96),
        "three dimensions": wide.view(2, 12, 288)[..., :96],
        "one dimension": wide[0, :96],
    }
    for name, x in views.items():
        kernels_on.clear()
        y = binary_matmul(x, packed, **options)
        assert kernels_on["binary_matmul"] == 1 and y.shape == (*x.shape[:-1], 9), name
        want = exact(x.reshape(-1, 96), packed, None, options["step"]).view(y.shape)
        assert torch.equal(y.cpu().double(), want), name
    assert binary_matmul(wide[:0, :96], packed, **options).shape == (0, 9)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, dtype, device, kernels_on, poisoned):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 11, 70, generator=generator).to(device, dtype).requires_grad_()
    packed = pack(torch.randn(33, 70, generator=generator), kind).to(device)
    bias = torch.randn(33, generator=generator).to(device).requires_grad_()
    d_y = torch.randn(3, 11, 33, generator=generator).to(device, dtype)
    y = binary_matmul(x, packed, bias=bias)
    y.backward(d_y)
    assert kernels_on == {"binary_matmul": 1, "binary_unpack": 1}
    wide, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    binary_matmul_ref(wide, packed, bias=wide_bias).backward(d_y.double())
    size = wide.grad.abs().max()
    assert x.grad.dtype == dtype and (x.grad.double() - wide.grad).abs().max() < 4 * torch.finfo(dtype).eps * size
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad.double(), wide_bias.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.kernel
def test_gradient_of_bias_alone(device, kernels_on):
    packed = weights(9, 40, "binary", device)
    bias = torch.zeros(9, device=device, requires_grad=True)
    binary_matmul(integers(6, 40, torch.uint8, device), packed, bias=bias, step=0.5).sum().backward()
    assert kernels_on == {"binary_matmul": 1} and bias.grad.tolist() == [6.0] * 9


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_operator_is_registered_as_it_behaves(dtype, device, kernels_on):
    """Schema, fake tensors and autograd of the operators, by torch's own checks."""
    packed = weights(9, 40, "binary", device)
    float_x = dtype in FLOATS
    x = integers(6, 40, dtype, device).requires_grad_(float_x)
    words, sums = packed.operand("pair" if float_x else "quad"), None if float_x else packed.row_sums()
    bias = torch.zeros(9, device=device, requires_grad=True)
    arguments = (x, words, packed.scale, bias, sums, 1.0, False, torch.float32)
    torch.library.opcheck(matmul._matmul_op, arguments)
    if float_x:
        torch.library.opcheck(unpack_op, (torch.ones(6, 9, device=device), words, 9, 40, False, torch.float32))
    assert kernels_on["binary_matmul"] > 0


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_compiles_as_one_graph(dtype, mode, device, kernels_on):
    """The first compiled call also builds the derived weights; another number of rows changes nothing."""
    set_backend(mode)
    packed, step = weights(9, 40, "binary", device), 0.5 if dtype in INTEGERS else None
    bias = torch.ones(9, device=device, requires_grad=True)
    compiled = torch.compile(
        lambda x: binary_matmul(x, packed, bias=bias, step=step) * 2, fullgraph=True, backend="aot_eager"
    )
    for m in (6, 6, 21):
        x = integers(m, 40, dtype, device).requires_grad_(dtype in FLOATS)
        y = compiled(x)
        assert torch.equal(y.detach().cpu().double(), 2 * exact(x.detach(), packed, bias.detach(), step))
        bias.grad = None
        y.sum().backward()
        assert bias.grad.tolist() == [2.0 * m] * 9
        if dtype in FLOATS:
            column = 2 * (packed.scale[:, None] * signs(packed)).sum(0)
            assert torch.equal(x.grad, column.expand(m, 40))
    assert (kernels_on["binary_matmul"] == 3) == (mode == "on")


@pytest.mark.kernel
def test_off_means_the_definition(device, kernels_on):
    set_backend("off")
    x, packed = integers(4, 40, torch.float32, device), weights(9, 40, "binary", device)
    assert torch.equal(binary_matmul(x, packed).cpu().double(), exact(x, packed, None, None))
    assert not kernels_on


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(kernels_on):
    """Split over K, whose counters must be zero again at every replay."""
    packed = weights(64, 4096, "binary", "cuda")
    x = integers(1, 4096, torch.float16, "cuda")
    binary_matmul(x, packed, out_dtype=torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = binary_matmul(x, packed, out_dtype=torch.float32)
    for seed in range(3):
        x.copy_(integers(1, 4096, torch.float16, "cuda", seed))
        graph.replay()
        assert torch.equal(y.cpu().double(), exact(x, packed, None, None))


@pytest.mark.gpu
def test_split_sums_do_not_vary(kernels_on):
    packed = weights(64, 16384, "binary", "cuda")
    x = torch.randn(3, 16384, device="cuda")
    first = binary_matmul(x, packed)
    assert all(torch.equal(binary_matmul(x, packed), first) for _ in range(20))


@pytest.mark.kernel
def test_offsets_of_rows_beyond_2_31(device, kernels_on):
    """Rows 2^23 - 16 bytes apart. On Linux memory that is not touched costs nothing."""
    packed, small = weights(5, 16, "binary", device), integers(300, 16, torch.int8, device)
    x = torch.empty(300, 2**23 - 16, dtype=torch.int8, device=device)[:, :16].copy_(small)
    assert x.stride(0) * 299 > 2**31
    assert torch.equal(binary_matmul(x, packed, step=0.5).cpu().double(), exact(small, packed, None, 0.5))
    assert kernels_on["binary_matmul"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(2**19 + 5, 16, 4096), (2**27 + 5, 17, 16)])
def test_more_than_2_31_elements(m, n, k, kernels_on):
    """Of x in the first case, of y in the second. Too large for a test in the interpreter: the launcher passes row
    offsets as int64 products of the tile's first row, and nothing else grows with M."""
    packed = weights(n, k, "binary", "cuda")
    x = torch.zeros(m, k, dtype=torch.int8, device="cuda")
    x[-3:] = integers(3, k, torch.int8, "cuda")
    y = binary_matmul(x, packed, step=0.5, out_dtype=torch.float16)
    assert kernels_on["binary_matmul"] == 1
    assert torch.equal(y[-3:].cpu().double(), exact(x[-3:], packed, None, 0.5).half().double())
    assert not y[:-3].any()


def test_types_on_the_cpu_without_kernels():
    packed = pack(torch.ones(3, 8))
    assert binary_matmul(torch.ones(2, 8), packed).tolist() == [[8.0] * 3] * 2
    assert binary_matmul(torch.ones(2, 8, dtype=torch.uint8), packed, step=0.25).tolist() == [[2.0] * 3] * 2


def _packed(n=4, k=40):
    return pack(torch.ones(n, k))


@pytest.mark.parametrize(
    ("x", "packed", "options", "message"),
    [
        (torch.ones(2, 39), _packed(), {}, r"\(\.\.\., 40\) for weights of shape \(4, 40\), got \(2, 39\)"),
        (torch.ones(()), _packed(), {}, r"got \(\)"),
        (torch.ones(2, 40).double(), _packed(), {}, "got torch.float64"),
        (torch.ones(2, 40).int(), _packed(), {"step": 1.0}, "got torch.int32"),
        (torch.ones(2, 40, device="meta"), _packed(), {}, "x is on meta, packed is on cpu"),
        (torch.ones(2, 40), pack(torch.ones(4, 10, 2, 2)), {}, r"\(N, K\), got shape \(4, 10, 2, 2\)"),
        (torch.ones(2, 40), torch.ones(4, 40), {}, "got Tensor"),
        (torch.ones(2, 40), _packed(), {"step": 0.5}, "step=0.5 with x of torch.float32"),
        (torch.ones(2, 40).byte(), _packed(), {}, r"torch.uint8\) need a finite step > 0, got None"),
        (torch.ones(2, 40).byte(), _packed(), {"step": 0.0}, "got 0.0"),
        (torch.ones(2, 40).byte(), _packed(), {"step": float("nan")}, "got nan"),
        (torch.ones(2, 40), _packed(), {"bias": torch.ones(5)}, r"\(4,\) on cpu, got torch.float32 \(5,\)"),
        (torch.ones(2, 40), _packed(), {"bias": torch.ones(4).int()}, "got torch.int32"),
        (torch.ones(2, 40), _packed(), {"bias": torch.ones(4, device="meta")}, "on meta"),
        (torch.ones(2, 40), _packed(), {"out_dtype": torch.int32}, "got torch.int32"),
        (
            torch.ones(1, 2**18).byte(),
            PackedWeight(torch.zeros(1, 2**13, dtype=torch.int32), torch.ones(1), (1, 2**18)),
            {"step": 1.0},
            "up to 262143 for x of torch.uint8, got 262144",
        ),
        (
            torch.ones(2, 1),
            PackedWeight(torch.zeros(2**23, 1, dtype=torch.int32), torch.ones(1).expand(2**23), (2**23, 1)),
            {},
            "N can be up to 8388607, got 8388608",
        ),
    ],
)
def test_refusals(x, packed, options, message):
    with pytest.raises(ValueError, match=message):
        binary_matmul(x, packed, **options)
