"""Packed convolution: exact on integers, bounds per element elsewhere, gradients against float64, layouts, errors."""

import pytest
import torch

from empf.kernels import conv, set_backend
from empf.kernels.conv import binary_conv2d, binary_conv2d_ref, dense_wins
from empf.kernels.conv_tiles import TILES, Plan, Tile, constants, pick_block, pick_tile, split_plan
from empf.kernels.pack import pack

pytestmark = pytest.mark.kernel

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter is wrong for bf16
    torch.uint8,
    torch.int8,
]
SHAPES = [  # N C H W, O kh kw, stride padding
    ((1, 12, 5, 5), (3, 3, 3), 1, 1),
    ((2, 31, 7, 6), (37, 3, 3), 2, 1),
    ((1, 33, 6, 7), (65, 3, 3), 2, 0),
    ((3, 96, 5, 5), (64, 1, 1), 1, 0),
    ((1, 64, 9, 8), (130, 1, 1), 2, 0),
    ((2, 5, 3, 4), (7, 1, 1), 1, 0),  # all weights of an output in one word
    ((1, 40, 5, 4), (16, 5, 5), 1, 2),
    ((1, 32, 3, 2), (8, 3, 3), 1, 3),  # outputs that see nothing but padding
    ((2, 9, 4, 9), (20, 1, 3), 3, 1),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN (255 in integers), so an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def weight(shape, kind="binary", device="cpu", seed=0):
    """Packed random weights whose scales are multiples of 1/4, some negative and one 0: products stay exact."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.randint(-8, 9, shape[:1], generator=g) / 4
    scale[-1] = 0
    return pack(torch.randn(shape, generator=g), kind, scale=scale).to(device)


def integers(shape, dtype, device="cpu", seed=0):
    """Every value of the codes, or small integers as floats; and the step that goes with them."""
    low, high = {torch.uint8: (0, 256), torch.int8: (-128, 128)}.get(dtype, (-4, 5))
    x = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    return x, None if dtype.is_floating_point else 0.25


def exact(x, packed, step=None, **options):
    """The definition in float64, rounded once."""
    options["out_dtype"] = options.get("out_dtype") or torch.float32
    return binary_conv2d_ref(x.double(), packed, step=step, **options)


def sizes(x, packed, **options):
    """Sum of the absolute terms of each output: what rounding errors are relative to."""
    return binary_conv2d_ref(x.double().abs(), absolute(packed), **options)


def absolute(packed):
    return pack(torch.ones(packed.shape, device=packed.device), scale=packed.scale.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_integers(shape, kind, dtype, device, kernels_on):
    size, (o, kh, kw), stride, padding = shape
    packed = weight((o, size[1], kh, kw), kind, device)
    x, step = integers(size, dtype, device)
    bias = torch.arange(-(o // 2), o - o // 2, device=device, dtype=torch.float32)
    options = dict(stride=stride, padding=padding, bias=bias, step=step, out_dtype=torch.float32)
    y = binary_conv2d(x, packed, **options)
    assert torch.equal(y, exact(x, packed, **options))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert kernels_on == {"binary_conv2d": 1}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_layouts(layout, device, kernels_on):
    packed = weight((5, 34, 3, 3), device=device)
    x, _ = integers((2, 34, 5, 6), torch.float16, device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "neither":
        x = x.repeat_interleave(2, 3)[..., ::2]
    y = binary_conv2d(x, packed, padding=1)
    assert torch.equal(y, exact(x, packed, padding=1, out_dtype=torch.float16)) and kernels_on["binary_conv2d"] == 1


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_every_bit(kind, dtype, device, kernels_on):
    """Row k has its only minus (or its only weight) at k, so it gives x[k]."""
    c, taps = 40, 9
    eye = torch.eye(c * taps).view(-1, c, 3, 3)
    packed = pack(1 - 2 * eye if kind == "binary" else -eye, kind, scale=torch.ones(c * taps)).to(device)
    x, step = integers((1, c, 3, 3), dtype, device)
    y = binary_conv2d(x, packed, step=step and 1.0, out_dtype=torch.float32)
    want = -x.flatten().float()
    assert torch.equal(y.flatten(), want if kind == "ternary" else x.float().sum() + 2 * want)
    assert kernels_on["binary_conv2d"] == 1


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0])
def test_signs_of_zero_and_constant_weights(value, device, kernels_on):
    packed = pack(torch.full((3, 33, 3, 3), value), scale=torch.ones(3)).to(device)
    x, step = integers((1, 33, 4, 3), torch.uint8, device)
    y = binary_conv2d(x, packed, padding=1, step=step)
    dense = torch.full((3, 33, 3, 3), -1.0 if value < 0 else 1.0, device=device)
    assert torch.equal(y, torch.nn.functional.conv2d(x.double() * step, dense.double(), padding=1).float())


@pytest.mark.parametrize("tile", sorted({tile for tiles in TILES.values() for tile in tiles}), ids=str)
def test_every_tile(tile, device, kernels_on, monkeypatch):
    """One row and column more than a tile; C of 32, 64 and 160 channels give loop steps of every length."""
    monkeypatch.setattr(conv, "pick_tile", lambda *_: tile)
    dtypes = [d for d in (torch.float32, torch.float16, torch.int8) if tile in TILES[d.itemsize]]
    for dtype, c in zip(dtypes, (64, 160), strict=False):
        packed = weight((tile.rows + 1, c, 1, 1), device=device)
        x, step = integers((1, c, 1, tile.columns + 1), dtype, device)
        y = binary_conv2d(x, packed, step=step, out_dtype=torch.float32)
        assert torch.equal(y, exact(x, packed, step=step))
    assert kernels_on["binary_conv2d"] == len(dtypes)


def test_choice_of_tile_and_block():
    """Expected values follow from the rule in words: a program for each of 128 multiprocessors, half a tile used."""
    large, wide, small = Tile(128, 128, 8, 3), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4)
    assert pick_tile(2, 512, 32 * 128) == large and pick_tile(2, 512, 31 * 128) == wide
    assert pick_tile(2, 512, 16 * 128) == wide and pick_tile(2, 512, 15 * 128) == small
    assert pick_tile(1, 32, 10**6) == small and pick_tile(1, 33, 10**6) == wide
    assert pick_tile(1, 64, 10**6) == wide and pick_tile(1, 65, 10**6) == large
    assert [pick_block(1, c) for c in (3, 33, 96, 128, 256)] == [32, 64, 32, 128, 128]
    assert [pick_block(2, c) for c in (32, 64, 128)] == [32, 64, 64] and pick_block(4, 128) == 32


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD has one number of stages")
@pytest.mark.parametrize(("shape", "stages"), [((64, 64, 3, 3), 4), ((64, 256, 1, 1), 3), ((64, 64, 1, 1), 2)])
def test_no_more_loads_in_flight_than_steps(shape, stages):
    """Four for a 1 x 1 convolution of 256 channels, four steps, spilled with Triton 3.6 for sm_89."""
    assert constants(2, shape, True, 1, 0, Plan(Tile(64, 64, 4, 4)))["num_stages"] == stages


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_error_of_fp32(kind, precision, device, kernels_on):
    """2^-17 (two terms) or nothing (three) of splitting x, and fp32 addition; half of the values span 12 decades."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 70, 6, 5, generator=g)
    x[1] *= 10 ** (12 * torch.rand(70, 6, 5, generator=g) - 6)
    packed = pack(torch.randn(33, 70, 3, 3, generator=g), kind)
    bias = torch.randn(33, generator=g)
    x, packed, bias = x.to(device), packed.to(device), bias.to(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        y = binary_conv2d(x, packed, padding=1, bias=bias)
    finally:
        torch.set_float32_matmul_precision(before)
    error = (y - exact(x, packed, padding=1, bias=bias, out_dtype=torch.float64)).abs()
    bound = {"highest": 1e-6, "high": 1e-6, "medium": 2**-17 + 1e-6}[precision] * sizes(
        x, packed, padding=1, bias=bias.abs()
    )
    assert (error <= bound).all() and kernels_on["binary_conv2d"] == 1


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_error_of_16_bits(dtype, device, kernels_on):
    """One rounding of the result, beside fp32 addition."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 48, 5, 5, generator=g).to(dtype).to(device)
    packed = pack(torch.randn(20, 48, 3, 3, generator=g), "ternary").to(device)
    y = binary_conv2d(x, packed, padding=1)
    want = exact(x, packed, padding=1, out_dtype=torch.float64)
    bound = torch.finfo(dtype).eps / 2 * want.abs() + 1e-6 * sizes(x, packed, padding=1)
    assert y.dtype == dtype and ((y - want).abs() <= bound).all() and kernels_on["binary_conv2d"] == 1


GRADIENTS = [
    (torch.float32, "binary", 3, 1),
    (torch.float32, "ternary", 10, 2),
    (torch.float16, "binary", 33, 2),
    pytest.param(torch.bfloat16, "binary", 3, 1, marks=pytest.mark.gpu),  # by cuDNN
    pytest.param(torch.bfloat16, "binary", 33, 1, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("dtype", "kind", "c", "stride"), GRADIENTS)
def test_gradient_against_float64(dtype, kind, c, stride, device, kernels_on, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    g = torch.Generator().manual_seed(3)
    packed = pack(torch.randn(7, c, 3, 3, generator=g), kind).to(device)
    x = torch.randn(2, c, 6, 5, generator=g).to(dtype).to(device).requires_grad_()
    bias = torch.randn(7, generator=g).to(dtype).to(device).requires_grad_()
    y = binary_conv2d(x, packed, stride=stride, padding=1, bias=bias)
    d_y = torch.randn(y.shape, generator=g).to(dtype).to(device)
    y.backward(d_y)
    assert kernels_on["binary_conv2d"] == (0 if dense_wins(x, packed, stride, 1) else 1)

    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    binary_conv2d_ref(x64, packed, stride=stride, padding=1, bias=bias64).backward(d_y.double())
    ones = torch.zeros_like(x64).requires_grad_()
    binary_conv2d_ref(ones, absolute(packed), stride=stride, padding=1).backward(d_y.double().abs())
    eps = max(1e-6, torch.finfo(dtype).eps)  # two roundings: of d_y * scale and of the result
    assert ((x.grad - x64.grad).abs() <= eps * ones.grad + 1e-30).all() and x.grad.dtype == dtype
    assert ((bias.grad - bias64.grad).abs() <= eps * d_y.double().abs().sum((0, 2, 3))).all()
    assert x64.grad.abs().max() > 0.1


def test_dense_route(device, kernels_on, monkeypatch):
    """bf16 with a few channels or many positions goes to cuDNN with unpacked weights; other types never do."""
    few, many = weight((4, 8, 3, 3), device=device), weight((4, 48, 3, 3), device=device)
    x, _ = integers((2, 48, 5, 5), torch.bfloat16, device)
    bias = torch.ones(4, device=device)
    y = binary_conv2d(x[:, :8], few, padding=1, bias=bias)
    assert torch.equal(y, exact(x[:, :8], few, padding=1, bias=bias, out_dtype=torch.bfloat16))
    assert y.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(conv, "DENSE_POSITIONS", 50)
    assert dense_wins(x, many, 1, 1) and not dense_wins(x, many, 1, 0)
    assert not any(dense_wins(x[:, :8].to(dtype), few, 1, 1) for dtype in (torch.float32, torch.float16, torch.uint8))
    y = binary_conv2d(x, many, padding=1, bias=bias)
    assert torch.equal(y, exact(x, many, padding=1, bias=bias, out_dtype=torch.bfloat16))
    assert kernels_on == {"binary_unpack": 2}
    thirds = few.with_scale(few.scale / 3)  # cuDNN would get them rounded to bf16, and the sums would keep that error
    y = binary_conv2d(x[:, :8], thirds, padding=1, out_dtype=torch.float32)
    assert kernels_on == {"binary_unpack": 2, "binary_conv2d": 1}
    torch.testing.assert_close(y, exact(x[:, :8], thirds, padding=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_split_k(kind, dtype, device, kernels_on, monkeypatch):
    """Many processors and few tiles; steps that the parts cannot share evenly; the bias is added once."""
    monkeypatch.setattr(conv, "device_facts", lambda _: (64, False))
    packed = weight((70, 20, 1, 11), kind, device)
    x, step = integers((1, 20, 4, 5), dtype, device)  # 14 x 5 output positions
    plan = split_plan(pick_tile(dtype.itemsize, 70, 70), dtype.itemsize, packed.shape, 70, 64)
    assert plan.splits == 4  # 3, 3, 3 and 2 of the 11 steps
    options = dict(padding=5, bias=torch.arange(70.0, device=device), step=step, out_dtype=torch.float32)
    y = binary_conv2d(x, packed, **options)
    assert torch.equal(y, exact(x, packed, **options)) and kernels_on == {"binary_conv2d": 1}


def test_choice_of_split():
    """512 channels, 4 x 4 maps, int8: 36 steps of 128 weights."""
    large, _, small = TILES[1]
    shape = (512, 512, 3, 3)
    assert split_plan(small, 1, shape, 16, 132) == Plan(small, 12)  # 8 tiles; of 16 parts of 3 steps 4 would be empty
    assert split_plan(small, 1, shape, 16 * 16, 132) == Plan(small, 8)  # 32 tiles: two programs per processor
    assert split_plan(large, 1, shape, 512 * 16, 132) == Plan(large, 1)  # 256 tiles
    assert split_plan(small, 1, (64, 64, 1, 1), 16, 132).splits == 1  # one step cannot be shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_compiles_without_graph_breaks(dtype, device, kernels_on):
    packed = weight((6, 10, 3, 3), device=device)
    x, step = integers((2, 10, 5, 4), dtype, device)
    x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.ones(6, device=device, requires_grad=True)

    def run(x, bias):
        return (binary_conv2d(2 * x if step is None else x, packed, padding=1, bias=bias, step=step) + 1).relu()

    if dtype.is_floating_point:
        x.requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for f in (run, compiled):
        y = f(x, bias)
        results.append((y.detach(), y.stride(), *torch.autograd.grad(y.sum(), [x, bias][x.is_floating_point() < 1 :])))
    for eager, same in zip(*results, strict=True):
        assert eager == same if isinstance(eager, tuple) else torch.equal(eager, same)
    assert kernels_on["binary_conv2d"] == 2


def test_operator_is_well_formed(device, kernels_on):
    packed = weight((6, 10, 3, 3), device=device)
    x = integers((1, 10, 5, 4), torch.float32, device)[0].requires_grad_()
    words, sums = conv.conv_operands(x, packed)
    args = (x, words, packed.operand("pair"), packed.scale, None, sums, 1.0, packed.shape, False, 2, 1, torch.float16)
    torch.library.opcheck(
        conv._conv2d_op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_definition_runs_where_kernels_are_off(device, kernels_on):
    packed = weight((6, 40, 3, 3), device=device)
    x, step = integers((1, 40, 5, 5), torch.uint8, device)
    set_backend("off")
    off = binary_conv2d(x, packed, step=step, padding=1)
    assert not kernels_on
    set_backend("on")
    assert torch.equal(off, binary_conv2d(x, packed, step=step, padding=1)) and kernels_on["binary_conv2d"] == 1


def test_definition_sums_codes_exactly(device):
    """Past 2^24, where fp32 holds no odd number: one rounding, at the end."""
    x = torch.randint(128, 256, (3, 200_000, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(torch.ones(1, *x.shape[1:]), scale=torch.ones(1)).to(device)
    y = binary_conv2d_ref(x.to(device), packed, step=1.0)
    assert torch.equal(y.cpu().flatten(), x.flatten(1).sum(1).float())


def test_empty_batch(device, kernels_on):
    y = binary_conv2d(torch.zeros(0, 40, 5, 5, device=device), weight((6, 40, 3, 3), device=device))
    assert y.shape == (0, 6, 3, 3)


def test_images_beyond_2_to_the_31(device, kernels_on, monkeypatch):
    """Three images of 2^30 values; of each the kernel reads one pixel, and on Linux the rest costs nothing."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    packed, pixels = weight((8, 32, 1, 1), device=device), integers((3, 32, 1, 1), torch.int8, device)[0]
    x = torch.empty(3, 4096, 8192, 32, dtype=torch.int8, device=device).movedim(-1, 1)
    x[:, :, :1, :1] = pixels
    y = binary_conv2d(x, packed, stride=8192, step=1.0)
    assert torch.equal(y, exact(pixels, packed, step=1.0)) and kernels_on == {"binary_conv2d": 1}


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    """Offsets beyond 2^31; the last image must come out as it does alone."""
    packed = weight((32, 64, 1, 1), device=device)
    x = torch.randint(0, 16, (33, 64, 1024, 1024), dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    y = binary_conv2d(x, packed, step=1.0, stride=2, out_dtype=torch.float16)
    assert torch.equal(y[-1:], binary_conv2d(x[-1:], packed, step=1.0, stride=2, out_dtype=torch.float16))
    assert torch.equal(y[-1:], exact(x[-1:], packed, step=1.0, stride=2, out_dtype=torch.float16))


BAD = {
    r"packed must be .*got \(4, 40\)": dict(packed=pack(torch.ones(4, 40))),
    "packed must be .*got Tensor": dict(packed=torch.ones(4, 10, 3, 3)),
    "float32, float16, bfloat16, uint8 or int8, got torch.float64": dict(x=torch.ones(2, 10, 5, 5).double()),
    r"C = 10 .*got \(2, 9, 5, 5\)": dict(x=torch.ones(2, 9, 5, 5)),
    r"\(N, C, H, W\) .*got \(10, 5, 5\)": dict(x=torch.ones(10, 5, 5)),
    "step=0.5 with x of torch.float32": dict(step=0.5),
    "need a finite step > 0, got None": dict(x=torch.ones(2, 10, 5, 5).byte()),
    "need a finite step > 0, got -1": dict(x=torch.ones(2, 10, 5, 5).byte(), step=-1.0),
    "got 0 and 1": dict(stride=0, padding=1),
    r"got \(1, 1\) and 0": dict(stride=(1, 1)),
    "got 1 and -1": dict(padding=-1),
    r"kernel of \(3, 3\) .*image of \(2, 5\) with padding 0": dict(x=torch.ones(2, 10, 2, 5)),
    "at most 31 x 31, got": dict(packed=pack(torch.ones(4, 10, 1, 32)), padding=16),
    "2.31 output positions": dict(x=torch.ones(1, 10, 5, 5).expand(2**30, -1, -1, -1)),
    "up to 262143 weights, got 294912": dict(
        x=torch.ones(1, 32768, 3, 3).byte(), step=1.0, packed=pack(torch.ones(1, 32768, 3, 3))
    ),
    "out_dtype must be .*got torch.int32": dict(out_dtype=torch.int32),
    r"bias must be floating point \(4,\), got torch.float32 \(5,\)": dict(bias=torch.ones(5)),
    "bias must be .*got torch.int64": dict(bias=torch.ones(4, dtype=torch.int64)),
    "x is on cpu, bias is on meta": dict(bias=torch.ones(4, device="meta")),
    "x is on meta, scale is on cpu": dict(x=torch.ones(2, 10, 5, 5, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_values(message):
    arguments = dict(x=torch.ones(2, 10, 5, 5), packed=pack(torch.ones(4, 10, 3, 3))) | BAD[message]
    with pytest.raises(ValueError, match=message):
        binary_conv2d(**arguments)
