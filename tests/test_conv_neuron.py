"""Fused convolution and neuron: exact on integers against the definition in float64, T, options, layouts, errors."""

import pytest
import torch

from empf.kernels import conv_neuron, set_backend
from empf.kernels.conv import binary_conv2d
from empf.kernels.conv_neuron import binary_conv2d_neuron, binary_conv2d_neuron_ref
from empf.kernels.conv_tiles import TILES, conv_operands, split_plan
from empf.kernels.neuron import neuron_update
from empf.kernels.pack import pack

pytestmark = pytest.mark.kernel

DTYPES = [
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter is wrong for bf16
    torch.uint8,
    torch.int8,
]
OPTIONAL = ("bias", "residual", "gain", "shift", "v")


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN (255 in integers), so an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(
    T, size=(2, 12, 5, 4), o=37, *, dtype=torch.float32, per_channel=True, kind="binary", stride=1, padding=1, kernel=3,
    without=(), device="cpu", **options,
):  # fmt: skip
    """Arguments by name, small multiples of powers of two: fp32 is exact on them, and ties of the quantiser happen."""
    g = torch.Generator().manual_seed(T)
    n, c, h, w = size

    def multiples(low, high, unit, *shape):
        return torch.randint(low, high, shape, generator=g) * unit

    low, high = {torch.uint8: (0, 256), torch.int8: (-128, 128)}.get(dtype, (-2, 3))
    oh, ow = ((s + 2 * padding - kernel) // stride + 1 for s in (h, w))
    of_neuron = (T, o) if per_channel else (T,)
    arguments = {
        "x": multiples(low, high, 1, T, *size).to(dtype),
        "packed": pack(torch.randn(o, c, kernel, kernel, generator=g), kind, scale=multiples(-3, 4, 1 / 8, o)),
        "v": multiples(-8, 3, 1 / 4, n, o, oh, ow),
        "leak": multiples(0, 3, 1 / 2, *of_neuron),
        "threshold": multiples(0, 9, 1 / 8, *of_neuron),
        "bias": multiples(-8, 9, 1 / 8, o),
        "residual": multiples(-4, 5, 1 / 4, T, n, o, oh, ow),
        "gain": multiples(1, 3, 1.0, T, o),
        "shift": multiples(-4, 5, 1 / 8, T, o),
    }
    arguments = {k: None if k in without else v.to(device) for k, v in arguments.items()}
    in_step = None if dtype.is_floating_point else 1 / 64
    return arguments | {"stride": stride, "padding": padding, "in_step": in_step, "return_current": True} | options


def exact(arguments):
    """The definition in float64: x times its step, and float64 parameters."""
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
    return binary_conv2d_neuron_ref(**wide)


def assert_exact(arguments, launches):
    """Spikes, v and current equal the definition; returns them."""
    got = binary_conv2d_neuron(**arguments)
    for name, result, want in zip(("spikes", "v", "current"), got, exact(arguments), strict=True):
        assert torch.equal(result.double(), want.double()), name
    assert launches == {"binary_conv2d_neuron": 1}
    return got


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(T, dtype, device, kernels_on):
    arguments = case(T, dtype=dtype, bits=4, codes=True, out_dtype=torch.float32, device=device)
    spikes, v, _ = assert_exact(arguments, kernels_on)
    assert spikes.dtype == torch.uint8 and v.dtype == torch.float32
    assert len(spikes.unique()) > 8  # the test would be weak if all neurons were silent or clipped


SHAPES = [  # N C H W, O, kernel, stride, padding
    ((1, 33, 6, 7), 65, 3, 2, 0),
    ((3, 96, 3, 5), 64, 1, 1, 0),
    ((1, 64, 7, 6), 130, 1, 2, 0),
    ((1, 40, 5, 4), 16, 5, 1, 2),
    ((1, 5, 2, 3), 8, 3, 1, 3),
]


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions(shape, kind, device, kernels_on):
    size, o, kernel, stride, padding = shape
    options = dict(kind=kind, kernel=kernel, stride=stride, padding=padding, device=device)
    assert_exact(case(2, size, o, dtype=torch.uint8, per_channel=False, **options), kernels_on)


OPTIONS = [
    dict(without=OPTIONAL, per_channel=False),
    dict(without=("residual", "v")),
    dict(without=("gain", "shift"), per_channel=False, bits=1),
    dict(without=("bias",), bits=8, codes=True),
    dict(without=("leak", "v"), parallel=True, bits=4),
    dict(without=("gain", "shift"), parallel=True),
    dict(return_current=False, bits=4),
    dict(return_v=False, bits=4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, dtype, device, kernels_on):
    arguments = case(4, dtype=dtype, device=device, **options)
    got, want = binary_conv2d_neuron(**arguments), exact(arguments)
    assert len(got) == len(want) == (3 if arguments["return_current"] else 2)
    assert torch.equal(got[0].double(), want[0].double())
    if options.get("parallel"):
        assert got[1] is arguments["v"]
    elif "return_v" in options:
        assert got[1] is want[1] is None
    else:
        assert torch.equal(got[1].double(), want[1])
    if arguments["return_current"]:
        assert torch.equal(got[2].double(), want[2])
    assert kernels_on == {"binary_conv2d_neuron": 1}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_layouts(layout, device, kernels_on):
    """Input, residual and v in any layout, parameters with any stride; results are channels_last."""
    arguments = case(2, (2, 34, 5, 6), 9, dtype=torch.float16, device=device)
    for name in ("x", "residual", "v"):
        x = arguments[name]
        if layout == "channels_last":
            arguments[name] = x.movedim(-3, -1).contiguous().movedim(-1, -3)
        elif layout == "neither":
            arguments[name] = x.repeat_interleave(2, -1)[..., ::2]
    if layout == "neither":
        for name in ("bias", "leak", "threshold", "gain", "shift"):
            arguments[name] = arguments[name].repeat_interleave(3, -1)[..., ::3]
    arguments["out_dtype"] = torch.float32
    for result in assert_exact(arguments, kernels_on):
        assert result.movedim(-3, -1).is_contiguous()


@pytest.mark.parametrize("tile", sorted({tile for tiles in TILES.values() for tile in tiles}), ids=str)
def test_every_tile(tile, device, kernels_on, monkeypatch):
    """One row and one pixel more than a tile holds of T = 4 steps."""
    monkeypatch.setattr(conv_neuron, "pick_tile", lambda *_: tile)
    dtype = torch.float32 if tile in TILES[4] else torch.int8
    size = (1, 160, 1, tile.columns // 4 + 1)
    assert_exact(case(4, size, tile.rows + 1, dtype=dtype, kernel=1, padding=0, device=device), kernels_on)


@pytest.mark.parametrize(("dtype", "T"), [(torch.float32, 4), (torch.uint8, 6)], ids=str)
def test_split_k(dtype, T, device, kernels_on, monkeypatch):
    """Many processors and few tiles; at T = 6 three groups of steps are parked and gathered."""
    monkeypatch.setattr(conv_neuron, "device_facts", lambda _: (64, False))
    arguments = case(T, (1, 80, 4, 5), 70, dtype=dtype, device=device, out_dtype=torch.float32)
    small, columns = TILES[dtype.itemsize][-1], 20 * (4 if T == 4 else 2)
    assert split_plan(small, dtype.itemsize, arguments["packed"].shape, columns, 64).splits > 2
    assert_exact(arguments, kernels_on)


def test_equals_the_two_kernels_it_fuses(device, kernels_on):
    a = case(4, dtype=torch.uint8, bits=4, codes=True, device=device)
    spikes, v, current = binary_conv2d_neuron(**a)
    folded = binary_conv2d(a["x"].flatten(0, 1), a["packed"], padding=1, bias=a["bias"], step=a["in_step"])
    unfused = folded.unflatten(0, (4, -1)) + a["residual"]
    assert torch.equal(current, unfused)
    parameters = {k: a[k] for k in ("gain", "shift", "bits", "codes")}
    separate = neuron_update(unfused, a["v"], a["leak"], a["threshold"], **parameters)
    for result, want in zip((spikes, v), separate, strict=True):
        assert torch.equal(result, want)


def test_steps_one_by_one_carry_v(device, kernels_on):
    a = case(3, device=device)
    whole = binary_conv2d_neuron(**a)
    v, parts = a["v"], []
    for t in range(3):
        of_t = {k: a[k][t : t + 1] for k in ("x", "leak", "threshold", "residual", "gain", "shift")}
        spikes, v, _ = binary_conv2d_neuron(**a | of_t | {"v": v})
        parts.append(spikes)
    assert torch.equal(torch.cat(parts), whole[0]) and torch.equal(v, whole[1])


@pytest.mark.parametrize("T", [4, 10])
def test_error_of_fp32(T, device, kernels_on):
    """Reals: the error of v and s is that of the sums, which leak and gain cannot amplify beyond the bound."""
    g = torch.Generator().manual_seed(5)
    a = {
        "x": torch.randn(T, 2, 20, 5, 5, generator=g),
        "packed": pack(torch.randn(18, 20, 3, 3, generator=g)),
        "v": torch.randn(2, 18, 5, 5, generator=g),
        "leak": torch.rand(T, 18, generator=g),
        "threshold": torch.rand(T, generator=g),
        "gain": 0.5 + 0.5 * torch.rand(T, 18, generator=g),
        "shift": torch.randn(T, 18, generator=g),
    }
    a = {k: v.to(device) for k, v in a.items()}
    got, want = binary_conv2d_neuron(**a, padding=1), exact(a | {"padding": 1})
    terms = 180 * a["packed"].scale.max() * a["x"].abs().max()
    for result, expected in zip(got, want, strict=True):
        assert ((result - expected).abs() <= 1e-6 * terms + 1e-6 * expected.abs()).all()
    assert kernels_on == {"binary_conv2d_neuron": 1}


def test_same_result_every_time(device, kernels_on):
    a = case(4, (2, 64, 5, 5), 70, dtype=torch.float16, device=device)
    a["x"] = torch.randn(a["x"].shape, generator=torch.Generator().manual_seed(0)).half().to(device)
    first = binary_conv2d_neuron(**a)
    for result, again in zip(first, binary_conv2d_neuron(**a), strict=True):
        assert torch.equal(result, again)


def test_nan_stays_nan(device, kernels_on):
    a = case(2, bits=4, out_dtype=torch.float32, without=("gain", "shift"), device=device)
    a["residual"][0, 1, 5, 2, 3] = float("nan")
    for result, want, count in zip(binary_conv2d_neuron(**a), exact(a), (2, 1, 1), strict=True):
        assert torch.equal(result.isnan(), want.isnan()) and want.isnan().sum() == count


def test_inference_only(device, kernels_on):
    a = case(2, device=device)
    for name in ("x", "bias", "leak", "residual"):
        with_grad = a | {name: a[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match="for inference and has no gradient"):
            binary_conv2d_neuron(**with_grad)
        with torch.no_grad():
            assert not binary_conv2d_neuron(**with_grad)[0].requires_grad


def test_compiles_without_graph_breaks(device, kernels_on):
    a = case(2, dtype=torch.uint8, bits=4, codes=True, out_dtype=torch.float16, device=device)

    def run(x, residual):
        spikes, v, current = binary_conv2d_neuron(**a | {"x": x, "residual": residual})
        return spikes + 1, v * 2, current.float()

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for eager, same in zip(run(a["x"], a["residual"]), compiled(a["x"], a["residual"]), strict=True):
        assert torch.equal(eager, same) and eager.stride() == same.stride()
    assert kernels_on["binary_conv2d_neuron"] == 2


@pytest.mark.parametrize("parallel", [False, True])
def test_operator_is_well_formed(parallel, device, kernels_on):
    a = case(2, device=device)
    words, sums = conv_operands(a["x"], a["packed"])
    args = (
        a["x"], words, a["packed"].scale, a["bias"], sums, a["residual"], a["v"], a["leak"], a["threshold"], a["gain"],
        a["shift"], 1.0, a["packed"].shape, False, 1, 1, 4, 0.25, parallel, parallel, not parallel, not parallel,
        torch.float16,
    )  # fmt: skip
    torch.library.opcheck(conv_neuron._conv2d_neuron_op, args, test_utils=("test_schema", "test_faketensor"))


def test_definition_runs_where_kernels_are_off(device, kernels_on):
    a = case(4, dtype=torch.uint8, bits=4, device=device)  # of codes the definition's sums are exact on any device
    set_backend("off")
    off = binary_conv2d_neuron(**a)
    assert not kernels_on
    set_backend("on")
    for result, want in zip(binary_conv2d_neuron(**a), off, strict=True):
        assert torch.equal(result, want)


BAD = {
    r"\(T, N, C, H, W\) with C = 12 .*got \(2, 12, 5, 4\)": dict(x=torch.ones(2, 12, 5, 4)),
    "at least one time step is needed .*, got": dict(x=torch.ones(0, 2, 12, 5, 4)),
    "leak may be None only for a parallel neuron": dict(leak=None),
    r"leak must be floating-point of shape \(2,\) or \(2, 37\), got \(3,\) torch.float32": dict(leak=torch.ones(3)),
    r"threshold must be floating-point .*\(2, 37\), got \(2, 36\) torch.float32": dict(threshold=torch.ones(2, 36)),
    "go together, got gain=True, shift=False": dict(shift=None),
    "go together, got gain=False, shift=True": dict(gain=None),
    r"gain must be floating-point of shape \(2, 37\), got": dict(gain=torch.ones(2)),
    "bits must be None or 1..8, got 9": dict(bits=9),
    "codes=True needs bits": dict(codes=True),
    "step must be positive and finite, got inf": dict(bits=4, step=float("inf")),
    r"v must be floating-point of shape \(2, 37, 5, 4\), .*got \(2, 37, 4, 4\) torch.float32": dict(
        v=torch.ones(2, 37, 4, 4)
    ),
    r"residual must be floating point \(2, 2, 37, 5, 4\), got torch.int64": dict(
        residual=torch.ones(2, 2, 37, 5, 4).long()
    ),
    "v is on meta, current on cpu": dict(v=torch.ones(2, 37, 5, 4, device="meta")),
    "step=0.5 with x of torch.float32": dict(in_step=0.5),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_values(message):
    with pytest.raises(ValueError, match=message):
        binary_conv2d_neuron(**case(2) | BAD[message])


@pytest.mark.gpu
@pytest.mark.parametrize("step", [0.1, 0.3])
def test_codes_at_ties_with_a_step_that_rounds(step, device, kernels_on):
    """Kernel and definition multiply and add in the same order, each rounded: a fused pair would flip a code."""
    codes = torch.randint(0, 16, (4, 8, 32, 16, 16), dtype=torch.uint8, device=device)
    packed = pack(torch.randn(64, 32, 3, 3), scale=torch.full((64,), 0.5 * step)).to(device)
    half = torch.full((4,), 0.5, device=device)
    options = dict(padding=1, in_step=step, step=step, bits=8, codes=True)
    got, v = binary_conv2d_neuron(codes, packed, None, half, half, **options)
    want, want_v = binary_conv2d_neuron_ref(codes, packed, None, half, half, **options)
    assert torch.equal(got, want) and torch.equal(v, want_v)
