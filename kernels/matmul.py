"""Packed matrix product: y[m, n] = scale[n] * sum_k x[m, k] * sign[n, k] + bias[n].

    x        (..., K)     fp32 | fp16 | bf16, or codes: uint8 (0..255) | int8 (-128..127) that stand for code * step
    packed   (N, K)       PackedWeight, binary or ternary: see pack.py
    bias     (N,)         fp32 | fp16 | bf16, optional
    y        (..., N)     dtype of x (fp32 for codes) or `out_dtype`                        arXiv 2410.07547, sec. 4

    x              product                      accumulated    error of the sum
    fp16 | bf16    16-bit tensor cores          fp32           that of fp32 addition
    codes          int8 tensor cores            int32          none
    fp32           bf16 tensor cores, x split   fp32           that of fp32 addition with three terms; 7.6e-6 with
                   in 3 or 2 bf16 terms                        two, if torch.get_float32_matmul_precision() is 'medium'

The kernel computes y^T = sign x^T: as the left operand the unpacked weights stay in registers. Few rows: K is split.
Many rows: a persistent grid. From `DENSE_ROWS` rows on, bf16 x with a bf16 y takes the dense library, with weights
(scale included) unpacked to bf16 once per call. The fast x has rows of a multiple of 16 elements and bytes; others are
copied into such rows first. int8 saves uint8's passage through registers: codes that fit in 7 bits are faster as
`codes.view(torch.int8)`.
"""

from functools import partial
from typing import NamedTuple

import torch

from . import tune
from .dense import dense_is_precise, dense_product, dense_product_of_codes, unpack_dense, unpack_op
from .dispatch import (
    LAUNCH,
    LAUNCHES,
    OPS,
    device_facts,
    own_precision,
    plain_tensors,
    tl,
    transformed,
    triton,
    use_triton,
)
from .pack import PackedWeight, signs
from .products import (
    CODES,
    FLOATS,
    MAX_K_CODES,
    Plan,
    ProductFn,
    d_of_bias,
    dot_signs,
    fp32_terms,
    gather,
    is_last,
    occupied,
    park,
    scaled,
    split_buffers,
    split_steps_of_k,
    stages_for_device,
    unpack_words,
)

MAX_K = MAX_N = 2**23 - 1  # offsets within a tile of 256 rows stay below 2^31
MAX_M = 2**31 - 2**8  # so do rows up to the end of the last tile
DENSE_ROWS = 2048  # from here on unpacking (7.8 us for 4096 x 4096 on an H200) is noise beside the product (87 us)
PERSISTENT_ROWS = 2048


class Config(NamedTuple):
    """A tile of y is block_m rows of x by block_n outputs; each step takes block_k of K."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# By bytes per element of x: first for at most 16 rows, where K may be split; then from the largest tile to the
# smallest. Wide tiles share each unpacked weight among more columns of the tensor core; for 256 rows see `_fits`.
CONFIGS = {
    1: (
        Config(16, 128, 256, 8, 4),
        Config(256, 128, 128, 8, 3),
        Config(128, 128, 128, 8, 3),
        Config(128, 64, 128, 4, 3),
        Config(64, 64, 128, 4, 3),
    ),
    2: (
        Config(16, 128, 128, 4, 6),
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
    ),
    4: (Config(16, 128, 64, 4, 6), Config(64, 128, 32, 8, 3)),
}


@own_precision
def binary_matmul_ref(
    x: torch.Tensor,
    packed: PackedWeight,
    *,
    bias: torch.Tensor | None = None,
    step: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The definition of `binary_matmul` in plain torch: the sum in fp32 or wider, and exact for codes.

    >>> binary_matmul_ref(torch.ones(1, 2), pack(torch.tensor([[1.0, -3.0], [2.0, 2.0]])))
    tensor([[0., 4.]])
    """
    codes = x.dtype in CODES
    wide = torch.float64 if codes else torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ signs(packed).to(wide).t()
    y = y.float() * (packed.scale * step) if codes else y * packed.scale
    if bias is not None:
        y = y + bias
    return y.to(out_dtype or (torch.float32 if codes else x.dtype))


@triton.jit(do_not_specialize=["M"])
def _binary_matmul_kernel(
    x_ptr,  # M K
    words_ptr,  # K'/E N'
    scale_ptr,  # N
    bias_ptr,  # N or None
    sums_ptr,  # N, row sums of the signs, or None where x is not uint8
    y_ptr,  # M N
    partial_ptr,  # tiles, splits, BLOCK_N, BLOCK_M or None
    arrived_ptr,  # tiles, zero, or None
    step,
    M,
    N,
    K,
    stride_xm,
    stride_w,
    TERNARY: tl.constexpr,
    TERMS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    x_type: tl.constexpr = x_ptr.dtype.element_ty
    INTEGER: tl.constexpr = x_type == tl.uint8 or x_type == tl.int8
    w_type: tl.constexpr = tl.int8 if INTEGER else (tl.bfloat16 if x_type == tl.float32 else x_type)
    ZERO: tl.constexpr = 128 if x_type == tl.uint8 else 0
    E: tl.constexpr = 16 if TERNARY else 32
    UNIT: tl.constexpr = 0.5 if TERNARY and x_type != tl.float32 else 1.0  # see `dot_signs`
    GROUP: tl.constexpr = 8  # tiles of x that share the words in L2

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    k_first = 0
    k_last = K
    if SPLIT:
        share = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        k_first = tl.program_id(1) * share
        k_last = tl.minimum(K, k_first + share)
    rk = tl.arange(0, BLOCK_K)
    rw = tl.arange(0, BLOCK_K // E)

    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = tile // (GROUP * tiles_n) * GROUP
        rows_m = tl.minimum(tiles_m - first_m, GROUP)
        tile_m = first_m + tile % (GROUP * tiles_n) % rows_m
        tile_n = tile % (GROUP * tiles_n) // rows_m
        rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

        # The tile's first row and word in int64, for M * K may pass 2^31; within the tile int32 is enough.
        x_first = x_ptr + tl.cast(tile_m * BLOCK_M, tl.int64) * stride_xm + k_first
        words_first = words_ptr + tl.cast(k_first // E, tl.int64) * stride_w
        x_at = (tl.minimum(rm, M - 1) - tile_m * BLOCK_M)[None, :] * stride_xm + rk[:, None]
        words_at = rw[:, None] * stride_w + rn[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
        for k in range(k_first, k_last, BLOCK_K):
            if BLOCK_M <= 16 and EVEN_K:  # rows past M would cost traffic here, where it is the limit
                x = tl.load(x_first + x_at, mask=(rm < M)[None, :], other=ZERO)
            elif BLOCK_M <= 16:
                x = tl.load(x_first + x_at, mask=(rm < M)[None, :] & (rk < K - k)[:, None], other=ZERO)
            elif EVEN_K:
                x = tl.load(x_first + x_at)
            else:
                x = tl.load(x_first + x_at, mask=(rk < K - k)[:, None], other=ZERO)
            if x_type == tl.uint8:
                x = (x ^ 128).to(tl.int8, bitcast=True)  # code - 128, which the row sums undo
            w = unpack_words(tl.load(words_first + words_at), w_type, TERNARY, stride_w)  # BLOCK_N BLOCK_K
            acc = dot_signs(w, x, acc, TERNARY, TERMS)
            x_first += BLOCK_K
            words_first += BLOCK_K // E * stride_w

        if SPLIT:
            park(acc, partial_ptr, tile)
            if is_last(arrived_ptr, tile):
                acc = gather(partial_ptr, tile, BLOCK_N, BLOCK_M)
                _store_tile(acc, tile_m, tile_n, scale_ptr, bias_ptr, sums_ptr, y_ptr, step, M, N, UNIT)
        else:
            _store_tile(acc, tile_m, tile_n, scale_ptr, bias_ptr, sums_ptr, y_ptr, step, M, N, UNIT)


@triton.jit
def _store_tile(acc, tile_m, tile_n, scale_ptr, bias_ptr, sums_ptr, y_ptr, step, M, N, UNIT: tl.constexpr):
    """Scale and bias of acc (BLOCK_N, BLOCK_M), then one store with n running fastest."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + rn, mask=rn < N, other=0.0) * tl.cast(step, tl.float32)
    if acc.dtype == tl.int32:
        acc = acc >> 6  # exact: every term is a multiple of 64
        if sums_ptr is not None:
            acc += 128 * tl.load(sums_ptr + rn, mask=rn < N, other=0)[:, None]
        y = acc.to(tl.float32) * scale[:, None]
    else:
        y = acc * (scale * UNIT)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    y_ptrs = y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(y_ptrs, tl.trans(y.to(y_ptr.dtype.element_ty)), mask=(rm < M)[:, None] & (rn < N)[None, :])


def _choose(m: int, n: int, k: int, itemsize: int, processors: int, hopper: bool) -> Plan:
    """The largest tile that occupies nearly every processor, and the number of parts that K is split into.

    For few rows two programs per processor are wanted, to have enough words in flight from memory.
    """
    few, *tiles = CONFIGS[itemsize]
    wanted = (2 if m <= few.block_m else 1) * processors
    for config in [few] if m <= few.block_m else tiles:
        programs = _tiles(m, n, config)
        if occupied(programs, wanted) and _fits(config, n, k, hopper):
            return Plan(config)
    return Plan(config, split_steps_of_k(triton.cdiv(k, config.block_k), programs, processors))


def _fits(config, n, k, hopper):
    """Whether the accumulators of a tile and the offsets of its edges fit the registers."""
    return config.block_m <= 128 or (hopper and n % 16 == 0 and k % config.block_k == 0)


def _tiles(m, n, config):
    return triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)


def _candidates(
    m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, processors: int, hopper: bool
) -> list[Plan]:
    """What `tune` may try: each tile whole and as split as it can be, and the dense library where it takes x."""
    plans = []
    for config in CONFIGS[dtype.itemsize]:
        if config.block_m <= max(64, m) and _fits(config, n, k, hopper):
            splits = split_steps_of_k(triton.cdiv(k, config.block_k), _tiles(m, n, config), processors)
            plans += [Plan(config, s) for s in sorted({1, splits})]
    library_takes_codes = m > 16 and n % 8 == 0 and k % 8 == 0  # torch._int_mm on CUDA
    if dense_is_precise(dtype, out_dtype) or (dtype in CODES and library_takes_codes):
        plans.append(Plan(None))
    return plans


def _aligned(x):
    """x as the kernel reads it, in vectors of 16 bytes: x itself, or a copy padded with what counts as 0."""
    k = x.shape[1]
    aligned = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if aligned and k % 16 == 0 and x.stride(0) <= MAX_K:
        return x
    return torch.nn.functional.pad(x, (0, -k % 16), value=128 if x.dtype == torch.uint8 else 0).contiguous()


def _launch(x, words, scale, bias, sums, step, ternary, out_dtype):
    """x (M, K) -> y (M, N)."""
    (m, k), n = x.shape, scale.shape[0]
    if m == 0:
        return x.new_empty(m, n, dtype=out_dtype)
    processors, hopper = device_facts(x.device)
    if dense_is_precise(x.dtype, out_dtype) and m >= DENSE_ROWS:
        plan = Plan(None)
    else:
        plan = _choose(m, n, k, x.element_size(), processors, hopper)
    run = partial(_run, x, words, scale, bias, sums, step, ternary, out_dtype)
    if tune.enabled():
        sizes = (triton.next_power_of_2(m), n, k, x.dtype, out_dtype)
        plans = partial(_candidates, *sizes, processors, hopper)
        plan = tune.fastest(("binary_matmul", *sizes, ternary), x.device, plans, run, plan)
    return run(plan)


def _run(x, words, scale, bias, sums, step, ternary, out_dtype, plan):
    """The product as `plan` says."""
    if plan.tile is None:
        dense = dense_product_of_codes if x.dtype in CODES else dense_product
        return dense(x, words, scale, bias, sums, step, ternary, out_dtype)
    config, splits = plan
    x = _aligned(x)
    (m, k), n = x.shape, scale.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    tiles = programs = _tiles(m, n, config)
    parts, arrived = split_buffers(splits, tiles, config.block_m * config.block_n, x)
    if m >= PERSISTENT_ROWS and splits == 1:  # as many as fit at a time, by their accumulators
        processors, _ = device_facts(x.device)
        programs = min(tiles, processors * max(1, 128 * 128 // (config.block_m * config.block_n)))
    LAUNCHES["binary_matmul"] += 1
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors are on
        _binary_matmul_kernel[(programs, splits)](
            x, words, scale, None if bias is None else bias.contiguous(), sums, y, parts, arrived, step, m, n, k,
            x.stride(0), words.shape[1], TERNARY=ternary, TERMS=fp32_terms(), EVEN_K=k % config.block_k == 0,
            SPLIT=splits > 1, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=stages_for_device(config.stages), **LAUNCH,
        )  # fmt: skip
    return y


@torch.library.custom_op(f"{OPS}::binary_matmul", mutates_args=())
def _matmul_op(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    sums: torch.Tensor | None,
    step: float,
    ternary: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return _launch(x, words, scale, bias, sums, step, ternary, out_dtype)


@_matmul_op.register_fake
def _(x, words, scale, bias, sums, step, ternary, out_dtype):
    return x.new_empty(x.shape[0], scale.shape[0], dtype=out_dtype)


def _setup_context(ctx, inputs, output):
    x, words, scale, bias, _, _, ctx.ternary, _ = inputs
    ctx.save_for_backward(words, scale)
    ctx.k, ctx.x_dtype, ctx.bias_dtype = x.shape[1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, d_y):
    words, scale = ctx.saved_tensors
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        w = unpack_op(d_y.detach(), words, scale.shape[0], ctx.k, ctx.ternary, ctx.x_dtype)
        d_x = _transposed(scaled(d_y, scale, ctx.x_dtype), w)
    if ctx.needs_input_grad[3]:
        d_bias = d_of_bias(d_y, ctx.bias_dtype)
    return d_x, None, None, d_bias, None, None, None, None


@own_precision
def _transposed(d_y, w):
    """sum_n d_y[m, n] * w[n, k], by the dense library, because both factors are dense here."""
    return d_y @ w


_matmul_op.register_autograd(_backward, setup_context=_setup_context)


@own_precision
def binary_matmul(
    x: torch.Tensor,
    packed: PackedWeight,
    *,
    bias: torch.Tensor | None = None,
    step: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y[..., n] = scale[n] * sum_k x[..., k] * sign[n, k] + bias[n]; the tables on top give shapes, types and errors.

    Codes (uint8, int8) need `step`, the value of code 1, and their sum is exact: y = fp32(sum) * (scale * step) + bias.
    Gradients go to `x` and `bias`, backward (of first order within torch.compile, else of any), forward and under
    torch.func; `packed` is a constant. Autocast changes nothing: the type of x decides. CUDA tensors take the kernel,
    others `binary_matmul_ref`, unless `set_backend` says otherwise. Results do not vary from call to call. Raises
    ValueError where shapes, types, devices or `step` do not fit.

    >>> binary_matmul(torch.tensor([[4, 1]], dtype=torch.uint8), pack(torch.tensor([[1.0, -3.0]])), step=0.25)
    tensor([[1.5000]])
    """
    out_dtype = _check(x, packed, bias, step, out_dtype)
    step = None if step is None else float(step)
    if not use_triton(x):
        return binary_matmul_ref(x, packed, bias=bias, step=step, out_dtype=out_dtype)
    flat = x.reshape(-1, packed.k)  # M K
    product = _Product(packed, step)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling():
        y = _matmul_op(*product.arguments(flat, bias, out_dtype))
    elif wants_grad or transformed():
        y = ProductFn.apply(flat, bias, product, out_dtype)
    else:  # without the microseconds that autograd costs
        y = product.run(flat, bias, out_dtype)
    return y.view(*x.shape[:-1], packed.n)


class _Product(NamedTuple):
    """What `ProductFn` differentiates."""

    packed: PackedWeight
    step: float | None

    def arguments(self, x, bias, out_dtype):
        """Those of `_launch`."""
        packed = self.packed
        words = packed.operand("quad" if x.dtype in CODES else "pair")
        sums = packed.row_sums() if x.dtype == torch.uint8 else None
        return x, words, packed.scale, bias, sums, self.step or 1.0, packed.kind == "ternary", out_dtype

    def run(self, x, bias, out_dtype):
        return _launch(*self.arguments(x, bias, out_dtype))

    def transposed(self, d_y, size):
        packed = self.packed
        with plain_tensors():
            w = unpack_dense(packed.operand("pair"), None, packed.n, packed.k, packed.kind == "ternary", d_y.dtype)
        return _transposed(d_y, w)


def _check(x, packed, bias, step, out_dtype):
    if not isinstance(packed, PackedWeight) or len(packed.shape) != 2:
        what = f"shape {packed.shape}" if isinstance(packed, PackedWeight) else type(packed).__name__
        raise ValueError(f"packed must be a PackedWeight of shape (N, K), got {what}")
    if x.dtype not in FLOATS + CODES:
        raise ValueError(f"x must be float32, float16, bfloat16, uint8 or int8, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != packed.k:
        raise ValueError(f"x must be (..., {packed.k}) for weights of shape {packed.shape}, got {tuple(x.shape)}")
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, packed is on {packed.device}")
    if x.dtype not in CODES and step is not None:
        raise ValueError(f"step is for uint8 and int8 codes, got step={step} with x of {x.dtype}")
    if x.dtype in CODES and (step is None or not 0 < step < float("inf")):
        raise ValueError(f"codes ({x.dtype}) need a finite step > 0, got {step}")
    if packed.k > (limit := MAX_K_CODES if x.dtype in CODES else MAX_K):
        raise ValueError(f"K can be up to {limit} for x of {x.dtype}, got {packed.k}")
    if packed.n > MAX_N:
        raise ValueError(f"N can be up to {MAX_N}, got {packed.n}")
    if x.numel() // packed.k >= MAX_M:
        raise ValueError(f"x {tuple(x.shape)} has about 2^31 rows or more: split the batch")
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (packed.n,) or bias.device != x.device):
        raise ValueError(
            f"bias must be floating point ({packed.n},) on {x.device}, "
            f"got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )
    if out_dtype not in (None, *FLOATS):
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    return out_dtype or (torch.float32 if x.dtype in CODES else x.dtype)
