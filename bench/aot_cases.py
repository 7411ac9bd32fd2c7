"""What bench/aot.py compiles of each kernel module: all that its launchers can choose, from their own tables.

`CASES[module]()` returns a list of tuples (name, kernel, types, constexprs, options):

    name         str, unique in the module, e.g. "bf16 128x128x64"; tests select by it
    kernel       the `@triton.jit` function
    types        {argument: Triton type}: "*bf16", "*i8", "*u8", "*i32", "*fp32", "i32", "i64", "fp32", ...;
                 None for a pointer argument that the launcher passes as None
    constexprs   {argument: value}; every argument of the kernel is in exactly one of the two
    options      {"num_warps": 8, "num_stages": 3}, or a function of the target's backend, "cuda" | "hip", that
                 returns this. Two more keys, both optional: "targets": a tuple that replaces all four, and "odd":
                 names of arguments that are not multiples of 16 (by default every pointer and integer is taken as
                 a multiple of 16, as the launcher would find it for friendly shapes)
"""

import torch

from empf.kernels import conv, conv_neuron, dense, flip, matmul, neuron, neuron_kernels, norm_kernels
from empf.kernels.conv_tiles import TILES, constants
from empf.kernels.dispatch import LAUNCH
from empf.kernels.matmul import CONFIGS
from empf.kernels.products import AMD_STAGES, Plan
from empf.kernels.steps import tile_elements, tiling

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def matmul_cases() -> list[tuple]:
    cases = []

    def add(x, config, ternary=False, ragged=False, targets=None):
        codes, split = x in ("u8", "i8"), config.block_m <= 16 or ragged
        types = dict(x_ptr=f"*{x}", words_ptr="*i32", scale_ptr="*fp32", bias_ptr="*fp32")
        types |= dict(sums_ptr="*i32" if x == "u8" else None, y_ptr="*fp32" if codes else f"*{x}")
        types |= dict(
            partial_ptr=("*i32" if codes else "*fp32") if split else None, arrived_ptr="*i32" if split else None
        )
        types |= dict(step="fp32", M="i32", N="i32", K="i32", stride_xm="i32", stride_w="i32")
        constexprs = dict(TERNARY=ternary, TERMS=3, EVEN_K=not ragged, SPLIT=split)
        constexprs |= dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k)
        tile = "x".join(map(str, config[:3]))
        name = f"{x} {'ternary' if ternary else 'binary'} {tile}{' ragged' if ragged else ''}"

        def options(backend):
            stages = config.stages if backend == "cuda" else AMD_STAGES
            odd = ("M", "N") if ragged else ("M",)
            return dict(num_warps=config.warps, num_stages=stages, odd=odd) | ({"targets": targets} if targets else {})

        cases.append((name, matmul._binary_matmul_kernel, types, constexprs, options))

    for x, itemsize in (("bf16", 2), ("i8", 1), ("fp32", 4)):
        for config in CONFIGS[itemsize]:
            add(x, config, targets=("sm_90",) if config.block_m > 128 else None)
        add({"bf16": "fp16", "i8": "u8"}.get(x, x), CONFIGS[itemsize][-1], ternary=True, ragged=True)
    for x, itemsize, ternary in (("bf16", 2, True), ("i8", 1, True), ("u8", 1, False)):
        add(x, CONFIGS[itemsize][2], ternary, targets=("sm_90",))
    for w, scale in (("bf16", "*fp32"), ("i8", None)):
        types = dict(words_ptr="*i32", scale_ptr=scale, w_ptr=f"*{w}", N="i32", K="i32", stride_w="i32")
        constexprs = dict(TERNARY=w == "i8", BLOCK_N=64, BLOCK_K=128)
        cases.append((f"unpack {w}", dense._unpack_kernel, types, constexprs, dict(num_warps=4)))
    return cases


def conv_cases() -> list[tuple]:
    of_codes, of_16_bits, (of_fp32,) = TILES[1], TILES[2], TILES[4]
    cases = [
        ("bf16 3x3 128x128", "bf16", (128, 256, 3, 3), False, 1, 1, Plan(of_16_bits[0])),
        ("bf16 3x3 64x128", "bf16", (64, 64, 3, 3), False, 1, 1, Plan(of_16_bits[1])),
        ("fp16 1x1 64x64 ternary", "fp16", (64, 256, 1, 1), True, 2, 0, Plan(of_16_bits[2])),
        ("bf16 3x3 64x64 split", "bf16", (512, 512, 3, 3), False, 1, 1, Plan(of_16_bits[2], 9)),
        ("i8 3x3 128x128", "i8", (128, 256, 3, 3), False, 1, 1, Plan(of_codes[0])),
        ("i8 3x3 64x64 ternary split", "i8", (512, 512, 3, 3), True, 1, 1, Plan(of_codes[2], 9)),
        ("u8 3x3 64x64 ragged", "u8", (64, 136, 3, 3), False, 2, 1, Plan(of_codes[2])),
        ("fp32 3x3 64x64", "fp32", (64, 256, 3, 3), False, 1, 1, Plan(of_fp32)),
    ]
    return [(name, conv._binary_conv2d_kernel, *_convolution(*rest)) for name, *rest in cases]


def conv_neuron_cases() -> list[tuple]:
    of_codes, of_16_bits, (of_fp32,) = TILES[1], TILES[2], TILES[4]
    vanilla = {"leak": 1, "gain": None, "residual": None, "current": None, "v": "*fp32"}
    folded = {"leak": 2, "gain": "*fp32", "residual": "*bf16", "current": "*bf16", "v": None}
    cases = [
        ("bf16 T=4 128x128", 4, 0, vanilla, "bf16", (128, 256, 3, 3), False, 1, 1, Plan(of_16_bits[0])),
        ("fp16 T=8 64x64 ternary", 8, 4, vanilla, "fp16", (64, 256, 1, 1), True, 2, 0, Plan(of_16_bits[2])),
        ("i8 T=4 128x128 folded", 4, 4, folded, "i8", (128, 256, 3, 3), False, 1, 1, Plan(of_codes[0])),
        ("i8 T=4 64x128 folded", 4, 4, folded, "i8", (64, 64, 3, 3), False, 1, 1, Plan(of_codes[1])),
        (
            "u8 T=10 64x64 folded",
            10,
            8,
            folded,
            "u8",
            (64, 128, 3, 3),
            False,
            1,
            1,
            Plan(of_codes[2]._replace(stages=3)),
        ),
        ("i8 T=4 64x64 split", 4, 4, vanilla, "i8", (512, 512, 3, 3), False, 1, 1, Plan(of_codes[2], 9)),
        ("fp32 T=1 64x64", 1, 0, vanilla, "fp32", (64, 256, 3, 3), False, 1, 1, Plan(of_fp32._replace(warps=8))),
    ]
    return [(name, conv_neuron._binary_conv2d_neuron_kernel, *_with_neuron(*rest)) for name, *rest in cases]


def _convolution(x, shape, ternary, stride, padding, plan):
    """(types, constexprs, options) of a convolution."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}.get(x, 1)
    types = {"x_ptr": f"*{x}", "words_ptr": "*i32", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "step": "fp32"}
    types |= {"sums_ptr": "*i32" if x == "u8" else None, "y_ptr": "*bf16" if size == 1 else f"*{x}"}
    types |= dict.fromkeys(("partial_ptr", "arrived_ptr"))
    if plan.splits > 1:
        types |= {"partial_ptr": "*i32" if size == 1 else "*fp32", "arrived_ptr": "*i32"}
    types |= dict.fromkeys(("OUT", "P", "H", "W", "OH", "OW", "stride_w"), "i32")
    constexprs = constants(size, shape, ternary, stride, padding, plan)
    constexprs = {name: value for name, value in constexprs.items() if name not in LAUNCH}
    warps, stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")

    def options(backend):
        odd = ("P", "H", "W", "OH", "OW")
        return {"num_warps": warps, "num_stages": stages if backend == "cuda" else AMD_STAGES, "odd": odd}

    return types, constexprs, options


def _with_neuron(t, bits, form, *convolution):
    """The same with t steps of a neuron behind it."""
    types, constexprs, options = _convolution(*convolution)
    y = types.pop("y_ptr")
    gain, per_step = form["gain"], torch.empty((t,) * form["leak"])
    types |= {"spikes_ptr": "*u8" if bits else y, "v_ptr": form["v"], "v_out_ptr": "*fp32", "gain_ptr": gain}
    types |= {"shift_ptr": gain, "residual_ptr": form["residual"], "current_ptr": form["current"], "N": "i32"}
    types |= {"leak_ptr": "*fp32", "threshold_ptr": "*fp32", "inv_step": "fp32", "in_step": "fp32"}
    neuron_of_t = conv_neuron.neuron_constants(t, per_step, per_step, bits, bits > 0, False)
    return types, constexprs | neuron_of_t, options


def _activation(T, dtype, channels_last):
    x = torch.empty((T, 64, 64, 32, 32), dtype=dtype, device="meta")
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else x


def neuron_cases() -> list[tuple]:
    cases = []
    for dtype, T, per_channel, last, folded, has_v, bits, parallel, backward in (
        (torch.bfloat16, 4, False, False, False, False, 0, False, "online"),
        (torch.bfloat16, 1, False, False, False, True, 4, False, "online"),
        (torch.float32, 4, True, False, True, False, 0, True, "online"),
        (torch.float16, 4, True, True, False, True, 0, False, "through time"),
        (torch.bfloat16, 4, True, True, True, True, 4, False, None),
        (torch.float32, neuron.MAX_STEPS, True, False, True, True, 8, False, "through time"),
    ):
        x = _activation(T, dtype, last)
        p = torch.empty((T, 64) if per_channel else (T,), device="meta")
        name = f"{str(dtype)[6:]} T={T}" + " (T, C)" * per_channel + " channels_last" * last + " gain" * folded
        name += " parallel" * parallel
        element, codes = POINTERS[dtype], backward is None
        types = dict.fromkeys("ACB", "i32") | {"stride_t": "i64", "current_ptr": element}
        types |= dict.fromkeys(("leak_ptr", "threshold_ptr"), "*fp32") | {"v_ptr": "*fp32" if has_v else None}
        types |= dict.fromkeys(("gain_ptr", "shift_ptr"), "*fp32" if folded else None)
        flags = neuron._flags(x, p, p, parallel)
        _, tile, _ = tiling(x, per_channel, tile_elements(x, 1))
        more = {"spikes_ptr": "*u8" if codes else element, "v_out_ptr": "*fp32", "inv_step": "fp32", "step": "fp32"}
        options = {"targets": ("sm_90",)} if T in (1, neuron.MAX_STEPS) else {}
        constants_of = flags | {"BITS": bits} | tile | {"CODES": codes}
        label = f"forward {name}" + f" {bits} bits" * (bits > 0)
        cases.append((label, neuron_kernels._neuron_forward_kernel, types | more, constants_of, options))
        if codes:
            continue
        detach = backward == "online"
        _, tile, _ = tiling(x, per_channel, tile_elements(x, 4 if folded else 2))
        more = dict.fromkeys(("d_spikes_ptr", "d_current_ptr"), element) | {"partial_ptr": "*fp32", "tiles": "i32"}
        more |= dict.fromkeys(("d_v_out_ptr", "d_v_ptr"), None if detach else "*fp32")
        more |= {"stride_dt": "i64", "top": "fp32" if bits else None}
        constants_of = flags | tile | {"DETACH": detach, "PARAMETERS": True}
        label = f"backward {name} {backward}" + " clipped" * (bits > 0)
        cases.append((label, neuron_kernels._neuron_backward_kernel, types | more, constants_of, options))
    return cases


def norm_cases() -> list[tuple]:
    cases = []
    sizes = dict.fromkeys("ACB", "i32")
    for dtype, T, last, bits, mem, detach in (
        (torch.bfloat16, 1, True, 4, False, True),
        (torch.bfloat16, 1, True, 0, True, True),
        (torch.float16, 4, False, 0, False, False),
        (torch.float32, norm_kernels.MAX_STEPS, True, 0, True, True),
    ):
        options = {"targets": ("sm_90",)} if T > 1 else {}
        x, element = _activation(T, dtype, last), POINTERS[dtype]
        name = f"{'mem_bn' if mem else 'bn'} {str(dtype)[6:]} T={T}" + " channels_last" * last
        forward = name + f" {bits} bits" * (bits > 0)
        common = sizes | dict.fromkeys(("p_ptr", "mean_ptr", "var_ptr"), "*fp32") | {"eps": "fp32"}
        fire = common | dict.fromkeys(("v_ptr", "v_out_ptr"), "*fp32") | {"spikes_ptr": element}
        fire |= {"inv_step": "fp32", "step": "fp32"}
        if mem:
            _, tile, *_ = norm_kernels._tiles(x[:1], 24)
            types = fire | dict.fromkeys(("m_ptr", "m_out_ptr", "partial_ptr"), "*fp32")
            types |= {"current_ptr": element, "tiles": "i32", "t": "i32"}
            constants_of = tile | {"T": T, "BITS": bits}
            cases.append(
                (f"step {forward}", norm_kernels._mem_step_kernel, types, constants_of, options | {"odd": ("t",)})
            )
        else:
            _, tile, *_ = norm_kernels._statistics_tiles(x)
            types = sizes | {"x_ptr": element, "partial_ptr": "*fp32", "tiles": "i32", "stride_t": "i64"}
            cases.append((f"statistics {name}", norm_kernels._statistics_kernel, types, tile | {"T": T}, options))
            _, tile, *_ = norm_kernels._tiles(x, 1)
            types = fire | {"x_ptr": element, "stride_t": "i64"}
            constants_of = tile | {"T": T, "BITS": bits}
            cases.append((f"fire {forward}", norm_kernels._bn_fire_kernel, types, constants_of, options))
        for apply in (False, True):
            _, tile, *_ = norm_kernels._tiles(x, 4)
            types = common | dict.fromkeys(("d_spikes_ptr", "x_ptr"), element)
            types |= {"v_ptr": "*fp32", "partial_ptr": "*fp32", "tiles": "i32"}
            types |= {"means_ptr": "*fp32" if apply else None, "d_x_ptr": element if apply else None}
            types |= {"d_v_out_ptr": None if detach else "*fp32", "d_v_ptr": None if detach or not apply else "*fp32"}
            types |= {"stride_t": "i64", "stride_dt": "i64", "top": "fp32" if bits else None}
            constants_of = tile | {"T": T, "MEM": mem, "DETACH": detach, "APPLY": apply}
            label = f"backward {name} {'apply' if apply else 'sums'}" + " clipped" * (bits > 0)
            cases.append(
                (label, norm_kernels._norm_backward_kernel, types, constants_of, options | {"enable_fp_fusion": True})
            )
    types = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), "*fp32")
    types |= dict.fromkeys(("rows", "C"), "i32") | {"count": "fp32"}
    finish = {"T": 1, "ROWS": norm_kernels.FINISH[0], "BLOCK": norm_kernels.FINISH[1]}
    cases.append(("finish", norm_kernels._finish_kernel, types, finish, {}))
    return cases


def flip_cases() -> list[tuple]:
    cases = []
    for grad, momentum in (("fp32", "i8"), ("bf16", "i8"), ("fp16", "bf16"), ("fp32", "bf16")):
        types = dict(grad_ptr=f"*{grad}", bits_ptr="*i32", momentum_ptr=f"*{momentum}", tau_ptr="*fp32")
        types |= dict(scale_ptr="*fp32" if momentum == "i8" else None, squares_ptr="*fp32")
        types |= dict(n="i32", keep="fp32", rate="fp32")
        cases.append((f"{grad} momentum {momentum}", flip._flip_kernel, types, {"WORDS": flip.BLOCK // 32}, {}))
    return cases


CASES = {
    "matmul": matmul_cases, "conv": conv_cases, "conv_neuron": conv_neuron_cases, "neuron": neuron_cases,
    "norm_kernels": norm_cases, "flip": flip_cases,
}  # fmt: skip
