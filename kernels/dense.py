"""Weights unpacked once, for the dense library: what many rows take in bf16, and what the tuner compares with."""

import torch

from .dispatch import LAUNCH, LAUNCHES, OPS, tl, triton
from .products import unpack_words


@triton.jit
def _unpack_kernel(
    words_ptr,  # K'/E N'
    scale_ptr,  # N or None
    w_ptr,  # N K
    N,
    K,
    stride_w,
    TERNARY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The dense weight, times its scale where one is given, in the type of w; int8 wants words of form 'quad'."""
    E: tl.constexpr = 16 if TERNARY else 32
    out_type: tl.constexpr = w_ptr.dtype.element_ty
    w_type: tl.constexpr = tl.bfloat16 if out_type == tl.float32 else out_type
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_k = tl.program_id(0) // blocks_n  # one axis: the others end at 65,535 programs
    rn = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    words_first = words_ptr + tl.cast(block_k * (BLOCK_K // E), tl.int64) * stride_w
    words = tl.load(words_first + tl.arange(0, BLOCK_K // E)[:, None] * stride_w + rn[None, :])
    w = unpack_words(words, w_type, TERNARY)
    w = w >> 6 if out_type == tl.int8 else w.to(tl.float32) * (0.5 if TERNARY else 1.0)
    if scale_ptr is not None:
        w *= tl.load(scale_ptr + rn, mask=rn < N, other=0.0)[:, None]
    w_ptrs = w_ptr + rn.to(tl.int64)[:, None] * K + rk[None, :]
    tl.store(w_ptrs, w.to(out_type), mask=(rn < N)[:, None] & (rk < K)[None, :])


def dense_is_precise(x_dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether the dense library, with the scale rounded to the type of x, is as precise as what is asked for."""
    return x_dtype == out_dtype == torch.bfloat16


def unpack_dense(words, scale, n, k, ternary, dtype):
    """The dense weight (N, K) in `dtype`, times `scale` where it is not None.

    The words are those of `packed.operand("quad")` for int8 and of `packed.operand("pair")` for other types.
    """
    w = torch.empty(n, k, dtype=dtype, device=words.device)
    LAUNCHES["binary_unpack"] += 1
    with torch.cuda.device_of(words):
        _unpack_kernel[(triton.cdiv(n, 64) * triton.cdiv(k, 128),)](
            words, scale, w, n, k, words.shape[1], TERNARY=ternary, BLOCK_N=64, BLOCK_K=128, num_warps=4, **LAUNCH
        )
    return w


@torch.library.custom_op(f"{OPS}::binary_unpack", mutates_args=())
def unpack_op(
    d_y: torch.Tensor, words: torch.Tensor, n: int, k: int, ternary: bool, dtype: torch.dtype
) -> torch.Tensor:
    """`unpack_dense` for the backward pass of torch.compile: taking d_y, it cannot be moved into the forward pass."""
    return unpack_dense(words, None, n, k, ternary, dtype)


@unpack_op.register_fake
def _(d_y, words, n, k, ternary, dtype):
    return words.new_empty(n, k, dtype=dtype)


def dense_product(x, words, scale, bias, sums, step, ternary, out_dtype):
    """Unpack once, then the dense library.

    The scale goes into the weights: in bf16 its rounding is no larger than that of a bf16 y. (In fp16 it could
    underflow there, and the sum could overflow without it.)
    """
    w = unpack_dense(words, scale, scale.shape[0], x.shape[1], ternary, x.dtype)
    return x @ w.t() if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())


def dense_product_of_codes(x, words, scale, bias, sums, step, ternary, out_dtype):
    """`dense_product` in int8, and the scale after the sum: exact, like the kernel."""
    w = unpack_dense(words, None, scale.shape[0], x.shape[1], ternary, torch.int8)
    total = torch._int_mm((x ^ 128 if x.dtype == torch.uint8 else x).view(torch.int8).contiguous(), w.t())
    if sums is not None:
        total += 128 * sums
    y = total.float() * (scale * step)
    return (y if bias is None else y + bias).to(out_dtype)
