"""What bench/kernels.py compares: one `Case` for each operation and size, with its contenders and their definition."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F

from empf.kernels import conv, conv_neuron, flip, matmul, neuron, norm_neuron
from empf.kernels.pack import pack, signs, unpack


@dataclass
class Case:
    """One operation at one size. `inputs` makes one random set; every contender maps a set to its result."""

    name: str
    inputs: Callable[[str], dict]
    contenders: dict[str, Callable[[dict], torch.Tensor]]  # ours first
    reference: Callable[[dict], torch.Tensor]
    tolerance: dict[str, float]  # of the largest error, relative to the largest value; without, it is not checked
    moved: dict[str, int]  # bytes that ours have to read and write
    operations: int = 0
    goals: list[tuple[str, str, float]] = field(default_factory=list)  # (ours, rival, speed-up asked for)
    share: float | None = None  # of the device's limit, asked of ours
    gradient: bool = False

    def floor(self, ceilings: dict, ours: str) -> float:
        """Least time in microseconds on a device with these ceilings."""
        unit = "int8" if "int8" in ours else "bf16"
        return 1e6 * max(self.moved[ours] / ceilings["copy"], self.operations / ceilings[unit])


def cases(small: bool = False) -> list[Case]:
    """What is measured. `small` keeps the operations and shrinks the sizes, so that they can be checked anywhere."""
    shrink = 64 if small else 1
    listed = []
    for m, n in ((1, 16384), (16, 16384), (64, 4096), (256, 4096), (4096, 4096)):
        listed.append(matmul_case(max(1, m // shrink), n // shrink))
    for c, size, images in ((64, 32, 64), (128, 16, 64), (256, 8, 64), (512, 4, 64), (512, 4, 1)):
        images, channels = max(1, images // shrink), max(8, c // shrink)
        listed.append(conv_case(4 * images, channels, size))
        listed.append(layer_case(4, images, channels, size))
    listed += [flip_case(c // shrink) for c in (64, 512)]
    shape = (4, 64 // shrink, max(8, 64 // shrink), 32, 32)
    return listed + [neuron_case(shape), training_case(shape), norm_case(shape, mem=False), norm_case(shape, mem=True)]


def matmul_case(m: int, n: int) -> Case:
    k = n

    def inputs(device):
        w = torch.randn(n, k, device=device)
        codes = torch.randint(0, 16, (m, k), device=device, dtype=torch.int8)
        packed = pack(w)
        dense = unpack(packed).bfloat16()
        rows = F.pad(codes, (0, 0, 0, -m % 32)) if m < 32 else codes  # torch._int_mm wants more than 16 rows
        return {"x": codes.bfloat16() / 4, "codes": codes, "packed": packed, "dense": dense, "rows": rows,
                "int8": signs(packed)}  # fmt: skip

    def int8_dense(z):
        return torch._int_mm(z["rows"], z["int8"].t())[:m] * (0.25 * z["packed"].scale)

    contenders = {
        "ours bf16": lambda z: matmul.binary_matmul(z["x"], z["packed"]),
        "ours int8": lambda z: matmul.binary_matmul(z["codes"], z["packed"], step=0.25, out_dtype=torch.bfloat16),
        "cuBLAS bf16": lambda z: z["x"] @ z["dense"].t(),
        "cuBLAS int8": int8_dense,
    }
    if importlib.util.find_spec("gemlite"):
        contenders["gemlite 1-bit"] = gemlite_product(n, k)
    goals = {1: [("ours int8", "cuBLAS bf16", 10.0)], 16: [("ours int8", "cuBLAS bf16", 8.0)]}
    goals[4096] = [("ours int8", "cuBLAS bf16", 1.4), ("ours bf16", "cuBLAS bf16", 0.9)]
    moved = {"ours bf16": n * k // 8 + 2 * m * (n + k), "ours int8": n * k // 8 + m * (2 * n + k)}
    if m in (1, 16):  # of bf16 the ten at M = 1 is out of reach, kernels/README.md says why; it stays to be seen
        goals[m].append(("ours bf16", "cuBLAS bf16", goals[m][0][2]))
    return Case(
        f"matmul {m}x{n}x{k}", inputs, contenders,
        lambda z: matmul.binary_matmul_ref(z["codes"], z["packed"], step=0.25),
        dict.fromkeys(contenders, 0.02), moved, 2 * m * n * k, goals=goals.get(m, []),
    )  # fmt: skip


def gemlite_product(n: int, k: int):
    """1-bit product of gemlite: (code - zero) * scale in groups of 128; a layer is made once per set of inputs."""
    layers = {}

    def run(z):
        from gemlite import DType, GemLiteLinear

        if id(z["packed"]) not in layers:
            layer = GemLiteLinear(
                1, group_size=128, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
            )
            scales = (2 * z["packed"].scale)[:, None].expand(n, k // 128).bfloat16().contiguous()
            codes = (signs(z["packed"]) > 0).to(torch.uint8)
            layer.pack(codes, scales, torch.full_like(scales, 0.5), None)
            layers[id(z["packed"])] = layer
        return layers[id(z["packed"])](z["x"])

    return run


def conv_case(images: int, c: int, size: int) -> Case:
    def inputs(device):
        codes = torch.randint(0, 16, (images, c, size, size), device=device, dtype=torch.int8)
        codes = codes.to(memory_format=torch.channels_last)
        packed = pack(torch.randn(c, c, 3, 3, device=device))
        dense = unpack(packed).bfloat16().to(memory_format=torch.channels_last)
        return {"x": codes.bfloat16() / 4, "codes": codes, "packed": packed, "dense": dense}

    contenders = {
        "ours bf16": lambda z: conv.binary_conv2d(z["x"], z["packed"], padding=1),
        "ours int8": lambda z: conv.binary_conv2d(
            z["codes"], z["packed"], padding=1, step=0.25, out_dtype=torch.bfloat16
        ),
        "cuDNN bf16": lambda z: F.conv2d(z["x"], z["dense"], padding=1),
    }
    numbers, weights = images * c * size * size, 9 * c * c // 8
    moved = {"ours bf16": 4 * numbers + weights, "ours int8": 3 * numbers + weights}
    return Case(
        f"conv3x3 {images}x{c}@{size}", inputs, contenders,
        lambda z: conv.binary_conv2d_ref(z["codes"], z["packed"], padding=1, step=0.25),
        dict.fromkeys(contenders, 0.02), moved, 18 * numbers * c,
        goals=[("ours int8", "cuDNN bf16", 1.3)] if images > 4 else [],
    )  # fmt: skip


def layer_case(t: int, n: int, c: int, size: int) -> Case:
    """Convolution, batch normalisation in evaluation, T steps of the neuron and 4-bit spikes."""

    def inputs(device):
        codes = torch.randint(0, 16, (t * n, c, size, size), device=device, dtype=torch.int8)
        codes = codes.to(memory_format=torch.channels_last)
        w = torch.randn(c, c, 3, 3, device=device)
        packed = pack(w, scale=torch.rand(c, device=device) / (3 * math.sqrt(c)))
        dense = unpack(packed).bfloat16().to(memory_format=torch.channels_last)
        z = {"codes": codes, "x": codes.bfloat16() / 4, "packed": packed, "dense": dense}
        z |= {"leak": torch.full((t,), 0.5, device=device), "threshold": torch.full((t,), 0.5, device=device)}
        z |= {"mean": torch.randn(c, device=device).bfloat16(), "var": torch.rand(c, device=device).bfloat16() + 0.5}
        return z | {"one": torch.ones_like(z["mean"]), "zero": torch.zeros_like(z["mean"])}

    def folded(z):
        rstd = torch.rsqrt(z["var"].float() + 1e-5)
        return z["packed"].with_scale(z["packed"].scale * rstd), -z["mean"].float() * rstd

    prepared = {}

    def ours(z, codes):
        if id(z["packed"]) not in prepared:
            prepared[id(z["packed"])] = folded(z)
        packed, bias = prepared[id(z["packed"])]
        x = z["codes" if codes else "x"].unflatten(0, (t, n))
        spikes, _ = conv_neuron.binary_conv2d_neuron(
            x, packed, None, z["leak"], z["threshold"], padding=1, bias=bias, bits=4,
            in_step=0.25 if codes else None, codes=codes, return_v=False,
        )  # fmt: skip
        return spikes

    def eager(z):
        y = F.conv2d(z["x"], z["dense"], padding=1)
        y = F.batch_norm(y, z["mean"], z["var"], z["one"], z["zero"], eps=1e-5)
        return neuron.neuron_update_ref(y.unflatten(0, (t, n)), None, z["leak"], z["threshold"], bits=4)[0]

    def reference(z):
        packed, bias = folded(z)
        return conv_neuron.binary_conv2d_neuron_ref(
            z["x"].float().unflatten(0, (t, n)), packed, None, z["leak"], z["threshold"], padding=1, bias=bias, bits=4
        )[0]

    contenders = {
        "ours int8": lambda z: ours(z, True),
        "ours bf16": lambda z: ours(z, False),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    numbers, weights = t * n * c * size * size, 9 * c * c // 8
    goals = [("ours int8", "eager", 4.0), ("ours int8", "torch.compile", 2.0)]
    # a rounding may flip a code, which is a whole step: the definition allows one step of 15
    return Case(
        f"conv+bn+neuron T={t} {n}x{c}@{size}", inputs, contenders, reference,
        {"ours int8": 0.08, "ours bf16": 0.08},
        {"ours int8": 2 * numbers + weights, "ours bf16": 4 * numbers + weights}, 18 * numbers * c, goals,
    )  # fmt: skip


def flip_case(c: int) -> Case:
    """Momentum and bits of a 3x3 convolution; nothing of the momentum is kept, so that each call gives the same."""
    n = 9 * c * c

    def inputs(device):
        z = {"grad": torch.randn(n, device=device), "bits": flip.bits_of(torch.randn(n, device=device) < 0)}
        z |= {"momentum": torch.zeros(n, dtype=torch.int8, device=device), "tau": torch.tensor(math.inf, device=device)}
        return z | {"scale": torch.zeros(-(-n // flip.BLOCK), device=device)}

    def ours(z):
        flip.flip_update(**z, rate=0.01, keep=0.0)
        return z["momentum"]

    def of(function):
        return lambda z: function(**z, rate=0.01, keep=0.0)[1]

    compiled = torch.compile(flip.flip_update_ref, dynamic=False)
    contenders = {"ours": ours, "eager": of(flip.flip_update_ref), "torch.compile": of(compiled)}
    moved = {"ours": 4 * n + 2 * (n + 4 * -(-n // 32) + 4 * -(-n // flip.BLOCK))}
    return Case(
        f"flip {c}x{c}x3x3", inputs, contenders, lambda z: contenders["eager"](z).float(), {"ours": 1e-6}, moved,
        share=0.85,
    )  # fmt: skip


def neuron_inputs(shape, form=""):
    """Current (channels_last steps), parameters per step, and what the normalised forms need."""
    t, n, c, *rest = shape

    def inputs(device):
        current = torch.randn(t, n, *rest, c, device=device).bfloat16().movedim(-1, 2)
        z = {"current": current.requires_grad_(), "leak": torch.full((t,), 0.5, device=device, requires_grad=True)}
        z["threshold"] = torch.full((t,), 0.5, device=device, requires_grad=True)
        if form:
            norm = (t, c) if form == "mem" else (c,)
            z |= {"weight": torch.ones(norm, device=device, requires_grad=True)}
            z |= {"bias": torch.zeros(norm, device=device, requires_grad=True)}
        if form == "mem":
            z |= {name: torch.full((t,), 0.5, device=device, requires_grad=True) for name in ("alpha", "beta")}
        return z | {"d_spikes": torch.randn_like(current)}

    return inputs


def forward_of(function, form="", *, backward):
    """The function as a contender: spikes, or with `backward` the gradient of the current (all are computed)."""
    order = ("leak", "threshold") + {"": (), "bn": ("weight", "bias"), "mem": ("alpha", "beta", "weight", "bias")}[form]

    def run(z):
        parameters = [z[name] for name in order]
        if not backward:
            with torch.no_grad():
                return function(z["current"], None, *parameters)[0]
        spikes = function(z["current"], None, *parameters)[0]
        return torch.autograd.grad(spikes, [z["current"], *parameters], z["d_spikes"])[0]

    return run


def in_float(function, form="", *, backward):
    """The definition on fp32 copies of the inputs."""
    run = forward_of(function, form, backward=backward)

    def reference(z):
        return run({name: p.detach().float().requires_grad_() for name, p in z.items()})

    return reference


def neuron_case(shape) -> Case:
    numbers = math.prod(shape)
    compiled = torch.compile(neuron.neuron_update_ref, dynamic=False)
    contenders = {
        "ours": forward_of(partial(neuron.neuron_update, return_v=False), backward=False),
        "ours with v": forward_of(neuron.neuron_update, backward=False),
        "eager": forward_of(neuron.neuron_update_ref, backward=False),
        "torch.compile": forward_of(compiled, backward=False),
    }
    return Case(
        f"neuron forward {'x'.join(map(str, shape))}", neuron_inputs(shape), contenders,
        in_float(neuron.neuron_update_ref, backward=False), {"ours": 0.01, "ours with v": 0.01},
        {"ours": 4 * numbers, "ours with v": 4 * numbers + 4 * numbers // shape[0]}, share=0.85,
    )  # fmt: skip


def training_case(shape) -> Case:
    numbers = math.prod(shape)
    compiled = torch.compile(neuron.neuron_update_ref, dynamic=False)
    contenders = {
        "ours": forward_of(partial(neuron.neuron_update, return_v=False), backward=True),
        "eager": forward_of(neuron.neuron_update_ref, backward=True),
        "torch.compile": forward_of(compiled, backward=True),
    }
    goals = []
    if importlib.util.find_spec("spikingjelly"):
        contenders["SpikingJelly LIF"] = spikingjelly_lif()
        goals = [("ours", "SpikingJelly LIF", 2.0)]
    return Case(
        f"neuron training {'x'.join(map(str, shape))}", neuron_inputs(shape), contenders,
        in_float(neuron.neuron_update_ref, backward=True), {"ours": 0.01}, {"ours": 10 * numbers}, goals=goals,
        gradient=True, share=0.85,
    )  # fmt: skip


def spikingjelly_lif():
    """Forward and backward of a binary LIF neuron: another neuron with the same traffic. It wants contiguous inputs."""
    made = {}

    def run(z):
        from spikingjelly.activation_based import functional
        from spikingjelly.activation_based import neuron as others

        if "node" not in made:  # version 2 has no choice of backend: on a GPU it is Triton
            choice = {"backend": "triton"} if "backend" in signature(others.LIFNode).parameters else {}
            made["node"] = others.LIFNode(v_reset=None, detach_reset=True, step_mode="m", **choice)
        if id(z["current"]) not in made:
            made[id(z["current"])] = z["current"].detach().contiguous().requires_grad_(), z["d_spikes"].contiguous()
        current, d_spikes = made[id(z["current"])]
        functional.reset_net(made["node"])
        return torch.autograd.grad(made["node"](current), current, d_spikes)[0]

    return run


def norm_case(shape, mem: bool) -> Case:
    form, numbers = "mem" if mem else "bn", math.prod(shape)
    fused = norm_neuron.mem_bn_neuron if mem else norm_neuron.bn_neuron
    ref = norm_neuron.mem_bn_neuron_ref if mem else norm_neuron.bn_neuron_ref
    contenders = {
        "ours": forward_of(fused, form, backward=True),
        "eager": forward_of(ref, form, backward=True),
        "torch.compile": forward_of(torch.compile(ref, dynamic=False), form, backward=True),
    }
    # forward: two reads, one write, and m once to memory and back; backward: input and gradient twice, one write
    moved = {"ours": 2 * numbers * (3 + 5 + (4 if mem else 0))}
    return Case(
        f"{'Mem-BN' if mem else 'BN'} + neuron training {'x'.join(map(str, shape))}", neuron_inputs(shape, form),
        contenders, in_float(ref, form, backward=True), {"ours": 0.02}, moved, gradient=True,
    )  # fmt: skip
