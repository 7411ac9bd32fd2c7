"""Binary synapses without latent weights: what a gradient does to the momentum and to the bits.

    grad      (n,)               fp32 | fp16 | bf16, in the order of the bits
    bits      (ceil(n / 32),)    int32, bit j of word q = weight 32q + j, 1 -> -1, 0 -> +1
    momentum  (n,)               bf16, or int8 codes: m = scale * code
    scale     (ceil(n / 1024),)  fp32, of each 1024 codes; None with bf16
    tau       ()                 fp32, threshold; infinite: nothing flips

    m <- keep * m + rate * g;   where w * m > tau: w <- -w, m <- 0
    scale = max |m| / 127 of its 1024, code = floor(m / scale + 1/2)

A gradient that pushes against a weight has its sign. In fp32 throughout; bits past n are 0.
arXiv 1906.02107 (momentum and threshold), 2511.12502 (the same for spiking networks)
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import LAUNCH, LAUNCHES, plain_tensors, tl, triton, use_triton
from .products import _to_bf16

BLOCK = 1024  # codes that share a scale
AT_ONCE = 64 * BLOCK  # weights that the definition updates at a time: it needs some 30 bytes for each


@functools.cache
def _signs_of_a_byte(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256, 8)"""
    with plain_tensors():
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        return (1 - 2 * bits).to(dtype)


def signs_of(bits: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The n signs as +-1 (n,) of bits (ceil(n / 32),), without larger tensors on the way."""
    return F.embedding(bits.view(torch.uint8).int(), _signs_of_a_byte(bits.device, dtype)).view(-1)[:n]


def bits_of(minus: Tensor) -> Tensor:
    """Where weights (n,) are -1, as bits (ceil(n / 32),)."""
    lanes = F.pad(minus.flatten(), (0, -minus.numel() % 32)).view(-1, 32).int()
    return (lanes << torch.arange(32, dtype=torch.int32, device=minus.device)).sum(-1, dtype=torch.int32)


def flip_update_ref(
    grad: Tensor, bits: Tensor, momentum: Tensor, scale: Tensor | None, tau: Tensor, keep: float, rate: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The definition of `flip_update`: (bits, momentum, scale, sums of grad^2 of each block), nothing in place.

    >>> bits, m, zero = bits_of(torch.tensor([False, True])), torch.zeros(2, dtype=torch.bfloat16), torch.tensor(0.0)
    >>> flipped = flip_update_ref(torch.ones(2), bits, m, None, zero, keep=0.9, rate=0.1)[0]
    >>> signs_of(flipped, 2)  # the gradient pushes both down: +1 turns
    tensor([-1., -1.])
    """
    n = grad.numel()
    blocks = lambda x: F.pad(x.float(), (0, -n % BLOCK)).view(-1, BLOCK)  # noqa: E731
    g, m, w = blocks(grad), blocks(momentum), blocks(signs_of(bits, n))
    m = keep * (m if scale is None else m * scale[:, None]) + rate * g
    flip = w * m > tau
    m = torch.where(flip, 0.0, m)
    bits = bits ^ bits_of(flip.flatten()[:n])
    squares = (g * g).sum(1)
    if scale is None:
        return bits, m.flatten()[:n].to(momentum.dtype), None, squares
    largest = m.abs().amax(1, keepdim=True)
    up = torch.full_like(largest, 127.0) / largest  # not 127 / largest, which torch rounds twice
    codes = torch.floor(m * torch.where(largest > 0, up, 0.0) + 0.5).nan_to_num_(0.0)
    return bits, codes.flatten()[:n].to(torch.int8), largest[:, 0] / 127, squares


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _flip_kernel(
    grad_ptr,  # n
    bits_ptr,  # n/32, read and written
    momentum_ptr,  # n, read and written
    scale_ptr,  # n/1024 or None, read and written
    squares_ptr,  # n/1024, written
    tau_ptr,  # 1
    n,
    keep,
    rate,
    WORDS: tl.constexpr,
):
    """A program for each block of 32 * WORDS weights, seen as (WORDS, 32)."""
    block = tl.cast(tl.program_id(0), tl.int64)
    word = block * WORDS + tl.arange(0, WORDS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    at = word * 32 + lane
    g = tl.load(grad_ptr + at, mask=at < n, other=0).to(tl.float32)
    m = tl.load(momentum_ptr + at, mask=at < n, other=0).to(tl.float32)
    words = tl.load(bits_ptr + word, mask=word * 32 < n, other=0)
    keep, rate = tl.cast(keep, tl.float32), tl.cast(rate, tl.float32)
    if scale_ptr is not None:
        m *= tl.load(scale_ptr + block)
    m = keep * m + rate * g
    flip = tl.where((words >> lane) & 1 != 0, -m, m) > tl.load(tau_ptr)
    m = tl.where(flip, 0.0, m)
    flipped = tl.sum(flip.to(tl.int32) << lane, axis=1, keep_dims=True)
    tl.store(bits_ptr + word, words ^ flipped, mask=word * 32 < n)
    tl.store(squares_ptr + block, tl.sum(tl.sum(g * g, axis=1), axis=0))
    if scale_ptr is None:
        tl.store(momentum_ptr + at, _to_bf16(m), mask=at < n)
    else:
        largest = tl.reduce(tl.reduce(tl.abs(m), 1, _larger), 0, _larger)
        up = tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)
        codes = tl.floor(m * up + 0.5)
        codes = tl.where(codes == codes, codes, 0.0)
        tl.store(momentum_ptr + at, codes.to(tl.int8), mask=at < n)
        tl.store(scale_ptr + block, tl.div_rn(largest, 127.0))


def flip_update(
    grad: Tensor, bits: Tensor, momentum: Tensor, scale: Tensor | None, tau: Tensor, *, rate: float, keep: float
) -> Tensor:  # fmt: skip
    """Move the momentum and flip what it pushes against, both in place; returns the sum of grad^2, fp32 ().

    Shapes and formula: see the table on top. `keep` is 1 - rate in the first of several calls whose gradients belong
    together, and 1 in the others. Not for use inside of `torch.compile` or autograd. Raises ValueError where shapes,
    dtypes or devices do not fit, or a tensor is not contiguous.

    >>> bits, m, scale = bits_of(torch.tensor([False, True])), torch.zeros(2, dtype=torch.int8), torch.zeros(1)
    >>> flip_update(torch.ones(2), bits, m, scale, torch.tensor(0.0), rate=0.1, keep=0.9), signs_of(bits, 2).tolist()
    (tensor(2.), [-1.0, -1.0])
    """
    n = grad.numel()
    sizes = {"bits": (bits, torch.int32, -(-n // 32)), "momentum": (momentum, torch.bfloat16, n)}
    if scale is not None:
        sizes |= {"momentum": (momentum, torch.int8, n), "scale": (scale, torch.float32, -(-n // BLOCK))}
    for name, (tensor, dtype, size) in {**sizes, "tau": (tau, torch.float32, 1)}.items():
        if (tensor.dtype, tensor.numel(), tensor.device) != (dtype, size, grad.device) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of {n} weights must be contiguous {dtype} of {size} numbers on {grad.device}, got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if not (grad.is_floating_point() and grad.is_contiguous() and n):
        raise ValueError(f"grad must be contiguous, floating point, not empty; got {grad.dtype} {tuple(grad.shape)}")
    grad, momentum = grad.view(-1), momentum.view(-1)
    squares = torch.empty(-(-n // BLOCK), device=grad.device)
    if grad.dtype != torch.float64 and use_triton(grad):
        LAUNCHES["flip_update"] += 1
        with torch.cuda.device_of(grad):
            _flip_kernel[(len(squares),)](
                grad, bits, momentum, scale, squares, tau, n, keep, rate, WORDS=BLOCK // 32, num_warps=4, **LAUNCH
            )
        return squares.sum()
    for i in range(0, n, AT_ONCE):  # blocks know nothing of each other
        part = slice(i, i + AT_ONCE)
        state = [bits[i // 32 : (i + AT_ONCE) // 32], momentum[part]]
        state.append(None if scale is None else scale[i // BLOCK : (i + AT_ONCE) // BLOCK])
        *made, squares[i // BLOCK : (i + AT_ONCE) // BLOCK] = flip_update_ref(grad[part], *state, tau, keep, rate)
        for old, new in zip(state, made, strict=True):
            None if old is None else old.copy_(new)
    return squares.sum()
