"""Random calls of the public functions of `kernels/` against their definitions in float64.

    python tests/fuzz_kernels.py --cases 3000                       all functions; on the interpreter without a GPU
    python tests/fuzz_kernels.py --functions conv --first 1234 --cases 1    one case again

Shapes, strides, layouts, dtypes, kinds, bits, T, options and biases are drawn; case i of a function is the same on
every machine. What can be exact (integers, codes, the neuron on a grid of binary fractions) has to be equal to the bit;
elsewhere the error of each element is held against the sum of the absolute terms behind it. bf16 is drawn on GPUs only:
Triton's interpreter computes it wrongly.
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path

import torch
from interpreter import hasten

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # counts only if set before the kernels are imported

from empf.kernels import (
    binary_conv2d,
    binary_conv2d_neuron,
    binary_conv2d_neuron_ref,
    binary_conv2d_ref,
    binary_matmul,
    binary_matmul_ref,
    bn_neuron,
    bn_neuron_ref,
    flip_update,
    flip_update_ref,
    mem_bn_neuron,
    mem_bn_neuron_ref,
    neuron_update,
    neuron_update_ref,
    pack,
    quantize_spikes,
    set_backend,
    unpack,
)
from empf.kernels.dispatch import HAVE_TRITON
from empf.kernels.pack import signs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
CODES = {torch.uint8: (0, 256), torch.int8: (-128, 128)}
SMALL = 33  # channels and rows: two words of a packed weight, the second with one bit
EPS = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Draw(random.Random):
    """Random choices, and tensors made of them; `small` ones take one program of a kernel, or few."""

    small = False

    def size(self, *usual: int, most: int) -> int:
        if self.small:
            usual, most = [n for n in usual if n <= SMALL], min(most, SMALL)
        return self.choice(usual) if self.random() < 0.5 else self.randint(1, most)

    def steps(self, *usual: int) -> int:
        return self.choice(usual[:2] if self.small else usual)

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.getrandbits(40)))

    def integers(self, low, high, *shape) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(self.getrandbits(40)))

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """The same numbers on the device at other strides: permuted, within a larger tensor, off an aligned address."""
        x = x.to(DEVICE)
        form = self.choice(("contiguous", "channels_last", "permuted", "sliced", "shifted", "strided"))
        if form == "channels_last" and x.dim() >= 4:
            return x.movedim(-3, -1).contiguous().movedim(-1, -3)
        if form == "permuted":
            order = self.sample(range(x.dim()), x.dim())
            return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
        if form in ("sliced", "strided"):
            axis, by = self.randrange(x.dim()), 2
            size = list(x.shape)
            size[axis] = by * size[axis] + 1
            wide = x.new_zeros(size)
            part = (slice(1, 1 + x.shape[axis]) if form == "sliced" else slice(1, None, by),)
            view = wide[(slice(None),) * axis + part]
            return view.copy_(x)
        if form == "shifted":
            return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
        return x

    def weights(self, *shape):
        """A packed weight with scales that are powers of two, so that products of integers are exact."""
        w = self.normal(*shape)
        if self.random() < 0.2:
            w[self.randrange(shape[0])] = self.choice((0.0, -0.0, 1.0, -1.0))
        scale = 2.0 ** self.integers(-3, 3, shape[0]).float() * (self.random() < 0.95)
        return pack(w, self.choice(("binary", "ternary")), scale).to(DEVICE)

    def signal(self, *shape):
        """(x, step, exact): codes, integers as floats, or random numbers."""
        kind = self.choice(("codes", "integers", "random"))
        if kind == "codes":
            dtype = self.choice(list(CODES))
            return self.laid_out(self.integers(*CODES[dtype], *shape).to(dtype)), self.choice((0.25, 0.5, 2.0)), True
        dtype = self.choice(FLOATS)
        x = self.integers(-4, 5, *shape) if kind == "integers" else self.normal(*shape)
        return self.laid_out(x.to(dtype)), None, kind == "integers"

    def bias(self, n):
        if self.random() < 0.5:
            return None
        return self.laid_out(self.integers(-4, 5, n).to(self.choice(FLOATS)))


def equal(got, want, what="result"):
    if not torch.equal(got.double(), want.to(got.dtype).double()):
        raise AssertionError(f"{what} differs by {(got.double() - want.double()).abs().max().item()}, should be exact")


def near(got, want, size, what="result"):
    """|got - want| <= the rounding of the type of `got`, and of fp32 sums, on numbers as large as `size`."""
    excess = (got.double() - want.double()).abs() - (EPS[got.dtype] * want.double().abs() + 4e-7 * size.double() + 1e-7)
    if not (excess <= 0).all():
        raise AssertionError(f"{what}: error {excess.max().item():.2e} beyond what rounding explains")


def fuzz_pack(draw: Draw) -> None:
    n, k = draw.size(1, 31, 32, 33, 128, 129, most=150), draw.size(1, 15, 16, 17, 31, 32, 33, 256, 257, most=300)
    kind = draw.choice(("binary", "ternary"))
    shape = (n, k) if draw.random() < 0.6 else (n, draw.randint(1, 9), draw.randint(1, 4), draw.randint(1, 4))
    w = draw.normal(*shape) * (draw.integers(0, 4, *shape) > 0)
    packed = pack(draw.laid_out(w), kind)
    wide = w.double().flatten(1)
    size = wide.abs()
    keep = torch.ones_like(size) if kind == "binary" else (size > 0.7 * size.mean(1, keepdim=True)).double()
    sign = torch.where(wide < 0, -1.0, 1.0) * keep
    borderline = (size - 0.7 * size.mean(1, keepdim=True)).abs() < 1e-6
    if kind == "ternary" and borderline.any():
        return  # fp32 may decide either way
    equal(signs(packed).cpu().flatten(1), sign, "signs")
    scale = (size * keep).sum(1) / keep.sum(1).clamp(min=1)
    near(packed.scale.cpu(), scale, size.mean(1), "scale")
    near(unpack(packed).cpu().flatten(1), scale[:, None] * sign, scale[:, None].expand_as(sign), "unpacked")


def fuzz_matmul(draw: Draw) -> None:
    m, n = draw.size(0, 1, 15, 16, 17, 64, most=80), draw.size(1, 16, 127, 128, 129, most=140)
    k = draw.size(1, 31, 32, 33, 64, 255, 256, 257, 520, most=300)
    x, step, exact = draw.signal(m, k)
    if draw.random() < 0.2:
        x = x.unflatten(0, (1, m)) if draw.random() < 0.5 or m % 2 else x.unflatten(0, (m // 2, 2))
    packed, bias = draw.weights(n, k), draw.bias(n)
    out_dtype = torch.float32 if exact else draw.choice((None, torch.float32))
    y = binary_matmul(x, packed, bias=bias, step=step, out_dtype=out_dtype)
    wide = x.double() * (step or 1.0)
    want = wide @ unpack(packed).double().T + (0 if bias is None else bias.double())
    if exact:
        return equal(y, want)
    near(y, want, wide.abs() @ unpack(packed).double().abs().T + (0 if bias is None else bias.double().abs()))


def _convolution(draw: Draw):
    """Sizes that fit: (C, H, W), (O, C, kh, kw), stride, padding."""
    c, o = draw.size(1, 3, 31, 32, 33, 64, most=70), draw.size(1, 8, 63, 64, 65, most=80)
    kh, kw = draw.choice(((1, 1), (3, 3), (3, 3), (1, 3), (2, 5), (5, 5))[: 4 if draw.small else 6])
    stride, padding, most = draw.randint(1, 3), draw.randint(0, 3), 4 if draw.small else 9
    h, w = draw.randint(max(1, kh - 2 * padding), most), draw.randint(max(1, kw - 2 * padding), most)
    return (c, h, w), (o, c, kh, kw), stride, padding


def fuzz_conv(draw: Draw) -> None:
    image, shape, stride, padding = _convolution(draw)
    x, step, exact = draw.signal(draw.size(0, 1, 2, most=3), *image)
    packed, bias = draw.weights(*shape), draw.bias(shape[0])
    y = binary_conv2d(
        x, packed, stride=stride, padding=padding, bias=bias, step=step, out_dtype=torch.float32 if exact else None
    )
    wide, options = x.double() * (step or 1.0), {"stride": stride, "padding": padding}
    want = torch.nn.functional.conv2d(wide, unpack(packed).double(), None if bias is None else bias.double(), **options)
    if exact:
        return equal(y, want)
    size = torch.nn.functional.conv2d(wide.abs(), unpack(packed).double().abs(), **options)
    near(y, want, size + (0 if bias is None else bias.double().abs()[:, None, None]))


def fuzz_gradients(draw: Draw) -> None:
    """Of both products: backward of x and bias, against the definition."""
    conv = draw.random() < 0.5
    image, shape, stride, padding = _convolution(draw)
    dtype = draw.choice(FLOATS)
    x = draw.normal(2, *image) if conv else draw.normal(draw.randint(1, 20), image[0])
    packed = draw.weights(*(shape if conv else shape[:2]))
    bias = draw.normal(shape[0]).to(DEVICE).requires_grad_()
    options = {"stride": stride, "padding": padding} if conv else {}
    x = draw.laid_out(x.to(dtype)).detach().requires_grad_()
    y = (binary_conv2d if conv else binary_matmul)(x, packed, bias=bias, **options)
    d_y = draw.integers(-2, 3, *y.shape).to(DEVICE)
    got = torch.autograd.grad(y, (x, bias), d_y.to(y.dtype))
    wide, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    z = (binary_conv2d_ref if conv else binary_matmul_ref)(wide, packed, bias=wide_bias, **options)
    want = torch.autograd.grad(z, (wide, wide_bias), d_y.double(), retain_graph=True)
    for a, b in zip(got, want, strict=True):
        near(a, b, b.abs().max().expand_as(b), "gradient")


def _neuron(draw: Draw, t: int, c: int):
    """Arguments on a grid of binary fractions, so that T steps are exact in fp32; fp16 where that holds them."""

    def grid(low, high, unit, *shape):
        return draw.integers(low, high, *shape).float() * unit

    def per_step(p):
        return p[:, :1].flatten() if draw.random() < 0.5 else p

    leak, threshold = per_step(grid(0, 3, 0.5, t, c)), per_step(grid(-1, 5, 0.25, t, c))
    folded = draw.random() < 0.3
    gain, shift = (grid(1, 3, 0.5, t, c), grid(-2, 3, 0.25, t, c)) if folded else (None, None)
    bits = draw.choice((None, 1, 2, 4, 8))
    options = {"bits": bits, "step": draw.choice((0.25, 0.5)), "codes": bits is not None and draw.random() < 0.5}
    options |= {"parallel": draw.random() < 0.2}
    on_device = [None if p is None else draw.laid_out(p) for p in (leak, threshold, gain, shift)]
    return on_device[:2], dict(zip(("gain", "shift"), on_device[2:], strict=True)) | options


def fuzz_neuron(draw: Draw) -> None:
    t, n, c = draw.steps(1, 2, 3, 4, 5, 6), draw.randint(1, 3), draw.size(1, 2, 16, 17, 128, most=20)
    rest = [draw.randint(1, 3 if draw.small else 7) for _ in range(draw.randint(0, 3))]
    current = draw.integers(-32, 64, t, n, c, *rest).to(draw.choice(FLOATS)) / 16
    v = draw.laid_out(draw.integers(-8, 9, n, c, *rest).float() / 8) if draw.random() < 0.5 else None
    parameters, options = _neuron(draw, t, c)
    options |= {"detach": draw.random() < 0.5, "clipped": draw.random() < 0.5}
    current = draw.laid_out(current)
    differentiable = not options["codes"] and not options["parallel"]
    wide = [None if p is None else p.detach().double() for p in (current, v, *parameters)]
    ours = [None if p is None else p.detach() for p in (current, v, *parameters)]
    if differentiable:
        wide, ours = ([None if p is None else p.requires_grad_() for p in side] for side in (wide, ours))
    wide_options = options | {k: None if options[k] is None else options[k].double() for k in ("gain", "shift")}
    got, got_v = neuron_update(*ours, **options)
    want, want_v = neuron_update_ref(*wide, **wide_options)
    equal(got, want, "spikes")
    if not options["parallel"]:
        equal(got_v, want_v, "potential")
    if not differentiable:
        return
    d = draw.integers(-2, 3, *got.shape).to(DEVICE)
    leaves = [
        [p for i, p in enumerate(side) if p is not None and (i != 1 or not options["detach"])] for side in (ours, wide)
    ]
    grads = torch.autograd.grad(got, leaves[0], d.to(got.dtype), allow_unused=True)
    wanted = torch.autograd.grad(want, leaves[1], d.double(), allow_unused=True)
    for a, b in zip(grads, wanted, strict=True):
        if b is not None and a is not None:
            near(a, b, b.abs().max().expand_as(b) + d.numel(), "gradient")
        elif (a if b is None else b) is not None and (a if b is None else b).abs().max() > 0:
            raise AssertionError("a gradient is missing")


def fuzz_quantizer(draw: Draw) -> None:
    bits, step = draw.choice((1, 2, 3, 4, 8)), draw.choice((0.25, 0.5, 1.0))
    s = draw.laid_out(draw.integers(-40, 400, draw.randint(1, 50)).float() / 8).requires_grad_()
    clipped = draw.choice((False, True))
    q = quantize_spikes(s, bits, step, clipped)
    want = (s.detach().double() / step + 0.5).floor().clamp(0, 2**bits - 1) * step
    equal(q.detach(), want)
    q.sum().backward()
    inside = (s >= 0) & (s <= (2**bits - 1) * step)
    equal(s.grad, (inside if clipped else torch.ones_like(s)).double(), "gradient")


def fuzz_conv_neuron(draw: Draw) -> None:
    (c, h, w), shape, stride, padding = _convolution(draw)
    t, n = draw.steps(1, 2, 3, 4, 6, 8), draw.randint(1, 2)
    x, in_step, exact = draw.signal(t, n, c, h, w)
    if not exact:
        x = x.round()
    packed, bias = draw.weights(*shape), draw.bias(shape[0])
    packed = packed.with_scale(packed.scale / 64)
    oh, ow = ((a + 2 * padding - k) // stride + 1 for a, k in zip((h, w), shape[2:], strict=True))
    v = draw.laid_out(draw.integers(-8, 9, n, shape[0], oh, ow).float() / 8) if draw.random() < 0.5 else None
    residual = draw.laid_out(draw.integers(-8, 9, t, n, shape[0], oh, ow).float() / 8) if draw.random() < 0.3 else None
    parameters, options = _neuron(draw, t, shape[0])
    options |= {"stride": stride, "padding": padding, "bias": bias, "residual": residual, "in_step": in_step}
    options |= {"return_current": draw.random() < 0.5, "out_dtype": torch.float32}
    with torch.no_grad():
        got = binary_conv2d_neuron(x, packed, v, *parameters, **options)
        options |= {name: p.double() for name in ("gain", "shift") if (p := options[name]) is not None}
        wide = x if in_step else x.double()
        want = binary_conv2d_neuron_ref(wide, packed, v, *(p.double() for p in parameters), **options)
    for name, a, b in zip(("spikes", "potential", "current"), got, want, strict=False):
        if a is not None and b is not None:
            equal(a, b, name)


def fuzz_norm(draw: Draw) -> None:
    """Both normalised neurons: spikes, potential, statistics and gradients."""
    mem, t, n, c = draw.random() < 0.5, draw.steps(1, 2, 3, 4, 5), draw.randint(2, 4), draw.size(1, 2, 16, 17, most=20)
    rest = [draw.randint(1, 3 if draw.small else 6) for _ in range(draw.randint(0, 2))]
    x = draw.laid_out((draw.normal(t, n, c, *rest) * 2 + draw.choice((0, 0, 100))).to(draw.choice(FLOATS)))
    per_step = [draw.integers(1, 4, t).float() / 4 for _ in range(4 if mem else 2)]
    affine = [draw.normal(t, c) + 1, draw.normal(t, c)] if mem else [draw.normal(c) + 1, draw.normal(c)]
    v = draw.laid_out(draw.normal(n, c, *rest)) if draw.random() < 0.5 else None
    ours = [x, v, *(p.to(DEVICE) for p in per_step + affine)]
    detach = draw.random() < 0.5
    ours = [None if p is None else p.detach().requires_grad_() for p in ours]
    wide = [None if p is None else p.detach().double().requires_grad_() for p in ours]
    got = (mem_bn_neuron if mem else bn_neuron)(*ours, detach=detach)
    want = (mem_bn_neuron_ref if mem else bn_neuron_ref)(*wide, detach=detach)
    count = n * max(1, torch.Size(rest).numel())
    conditioning = 10 / (want[3].min().item() + 1e-5) ** 0.5 * (1 + wide[0].abs().max().item())
    for name, a, b in zip(("spikes", "potential", "mean", "variance"), got, want, strict=True):
        near(a.float() if name != "spikes" else a, b, (b.abs() + b.abs().max() + 1) * conditioning, name)
    if want[3].min() < 1e-3 or conditioning > 200 or count < 4:
        return  # statistics of nearly equal numbers: gradients have no digits to compare
    d = draw.integers(-2, 3, *got[0].shape).to(DEVICE)
    grads = torch.autograd.grad(got[0], [p for p in ours if p is not None], d.to(got[0].dtype), allow_unused=True)
    wanted = torch.autograd.grad(want[0], [p for p in wide if p is not None], d.double(), allow_unused=True)
    close_to_kink = ((want[0] > 0) != (got[0] > 0)).any()
    for a, b in zip(grads, wanted, strict=True):
        if a is not None and b is not None and not close_to_kink:
            near(a, b, (b.abs().max() + 1).expand_as(b) * conditioning * d.numel() ** 0.5, "gradient")


def fuzz_flip(draw: Draw) -> None:
    """One or two updates in place; the definition computes in fp32, as the kernel has to, to the bit."""
    n = draw.size(1, 31, 32, 33, 1023, 1024, 1025, 5000, most=1100)
    bits = draw.integers(-(2**31), 2**31, -(-n // 32)).to(torch.int32)
    scale = draw.normal(-(-n // 1024)).abs() if draw.random() < 0.6 else None
    momentum = draw.normal(n).bfloat16() if scale is None else draw.integers(-127, 128, n).to(torch.int8)
    state = [None if part is None else part.to(DEVICE) for part in (bits, momentum, scale)]
    for _ in range(draw.randint(1, 2)):
        grad = draw.normal(n) * 10.0 ** draw.randint(-20, 15) * (draw.random() < 0.9)
        grad = grad.to(DEVICE, draw.choice((torch.float32, torch.bfloat16)))
        tau = torch.tensor(draw.choice((0.0, 0.1, 1.0, float("inf"))), device=DEVICE)
        keep, rate = draw.choice(((0.9, 0.1), (1.0, 0.1), (0.0, 1.0)))
        *want, squares = flip_update_ref(grad, *state, tau, keep, rate)
        got = flip_update(grad, *state, tau, rate=rate, keep=keep)
        for name, part, wanted in zip(("bits", "momentum", "scale"), state, want, strict=True):
            None if part is None else equal(part, wanted, name)
        near(got, squares.sum(), squares.sum(), "squares")


FUNCTIONS = {
    "pack": fuzz_pack, "matmul": fuzz_matmul, "conv": fuzz_conv, "gradients": fuzz_gradients, "neuron": fuzz_neuron,
    "quantizer": fuzz_quantizer, "conv_neuron": fuzz_conv_neuron, "norm": fuzz_norm,
    "flip": fuzz_flip,
}  # fmt: skip


def run(name: str, cases: int, first: int = 0, small: bool = False) -> list[str]:
    """What went wrong in cases first .. first + cases - 1 of a function, one line each; `small` ones are others."""
    found = []
    for case in range(first, first + cases):
        draw = Draw(f"{name} {case}")
        draw.small = small
        try:
            FUNCTIONS[name](draw)
        except Exception as problem:  # whatever it is, it is a finding
            found.append(f"{name} {case}: {type(problem).__name__}: {problem}"[:300])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Random calls of the kernels against float64.")
    parser.add_argument("--cases", type=int, default=3000, help="per function")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    options = parser.parse_args()
    set_backend("on")
    if HAVE_TRITON:
        hasten()
    findings, end = 0, options.first + options.cases
    for name in options.functions:
        start, of_this = time.time(), 0
        for first in range(options.first, end, 100):
            found = run(name, min(100, end - first), first)
            of_this += len(found)
            print(f"{name:12} cases {options.first} to {min(first + 100, end) - 1}, {of_this} findings, "
                  f"{time.time() - start:.0f} s", *found, sep="\n  ", flush=True)  # fmt: skip
        findings += of_this
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
