"""1-bit and 2-bit weights: how they are stored, reordered and unpacked inside a kernel.

    w        (N, K) | (N, C, kh, kw)      float; K = C * kh * kw in torch's own order for four dimensions
    bits     (N, ceil(K/32))              int32, binary:  bit j of word q = weight 32q + j, 1 -> -1, 0 -> +1
             (N, ceil(K/16))              int32, ternary: bits 2j, 2j+1 of word q = weight 16q + j; low bit 1 -> not 0,
                                          high bit 1 -> minus (so 0 -> 0, 1 -> +1, 3 -> -1)
    scale    (N,)                         fp32; the weight is scale[n] * sign[n, k]
    words    (K'/32 or K'/16, N')         int32, what kernels read (`PackedWeight.operand`): the same bits in the order
                                          of the tensor-core operand, K' = K padded to a block, N' = N padded to 128

A 1 is minus, as in a floating-point number, and 0.0 and -0.0 are plus. Bits past K are written as 0 and never matter,
because kernels read zeros for x there. Only `bits`, `scale`, `shape` and `kind` are meant to be saved.

Order of the weights of one word in `words`, for weight e of the word (32 of them binary, 16 ternary):

    form     operand        binary bit              ternary bits (low one)       unpacked
    pair     fp16 | bf16    15 - e//2 + 16(e%2)     14 - 2(e//2) + 16(e%2)       +-1 | 0, +-2
    quad     int8            7 - e//4 +  8(e%4)      6 - 2(e//4) +  8(e%4)       +-64 | 0, +-64

With this order one shift and one logical operation per 32-bit register unpack two (pair) or four (quad) weights:
see `unpack_words` in products.py.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .dispatch import plain_tensors

KINDS = ("binary", "ternary")
FORMS = ("pair", "quad")
BLOCK = 256  # K of a matrix operand is padded to this, so kernels never mask the words
ROWS = 128  # N of an operand is padded to this, for the same reason


def weights_per_word(kind: str) -> int:
    """32 binary or 16 ternary weights in an int32."""
    return 32 if kind == "binary" else 16


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Packed weights of a linear layer or a convolution; see the table on top for `bits` and `scale`.

    `shape` is that of the dense weight, (N, K), (N, C, k) or (N, C, kh, kw); `kind` is 'binary' or 'ternary'. Raises
    ValueError where these do not fit together.

    >>> PackedWeight(torch.tensor([[0b10]], dtype=torch.int32), torch.tensor([0.5]), (1, 2), "binary").shape  # +, -
    (1, 2)
    """

    bits: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, ...]
    kind: str = "binary"
    _derived: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        shape = tuple(int(n) for n in self.shape)
        if len(shape) not in (2, 3, 4) or min(shape) < 1:
            raise ValueError(f"shape must be (N, K), (N, C, k) or (N, C, kh, kw) with sizes of at least 1, got {shape}")
        object.__setattr__(self, "shape", shape)
        want = (shape[0], -(-self.k // weights_per_word(self.kind)))
        if self.bits.dtype != torch.int32 or tuple(self.bits.shape) != want:
            raise ValueError(
                f"bits of a {self.kind} weight of shape {shape} must be int32 {want}, "
                f"got {self.bits.dtype} {tuple(self.bits.shape)}"
            )
        _check_scale(self.scale, shape[0])
        if self.scale.device != self.bits.device:
            raise ValueError(f"bits are on {self.bits.device}, scale is on {self.scale.device}")
        _refuse_wrapped(self.bits, self.scale)
        with plain_tensors():  # a copy of what inference mode made, which has no version and no part in autograd
            for name, tensor in (("bits", self.bits), ("scale", self.scale.contiguous())):  # kernels read stride 1
                object.__setattr__(self, name, tensor.clone() if tensor.is_inference() else tensor.detach())

    def __reduce__(self):  # derived buffers are neither pickled nor deep-copied
        return PackedWeight, (self.bits, self.scale, self.shape, self.kind)

    @property
    def n(self) -> int:
        """Output features or channels."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Weights per output: the product of the other dimensions."""
        return math.prod(self.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weights on `device`, with every derived buffer that has been built so far."""
        moved = PackedWeight(self.bits.to(device), self.scale.to(device), self.shape, self.kind)
        moved._derived.update(
            {key: (moved.bits._version, buffer.to(device)) for key, (version, buffer) in self._derived.items()
             if version == self.bits._version}
        )  # fmt: skip
        return moved

    def with_scale(self, scale: torch.Tensor) -> "PackedWeight":
        """The same signs with another scale (N,), for instance with a normalisation folded in; buffers are shared."""
        other = PackedWeight(self.bits, scale, self.shape, self.kind)
        object.__setattr__(other, "_derived", self._derived)
        return other

    def operand(self, form: str, *, block: int = BLOCK, taps: bool = False) -> torch.Tensor:
        """`words` in the order of a tensor-core operand, int32 (words, N padded to 128): built on first use, not saved.

        `form` is 'pair' for 16-bit or 'quad' for int8 operands, see the table on top. With `taps` the weights of a
        convolution are ordered (kh, kw, c) and the channels of each tap are padded to a multiple of `block`; without it
        K is in torch's order and padded to a multiple of `block`. Raises RuntimeError if a CUDA graph is being captured
        and the buffer does not exist yet: run the model once before, or call this. The same is needed before
        torch.compile(mode="reduce-overhead"), whose graphs overwrite what is built inside of them. After `bits` was
        written to (`copy_` and the like) the next eager call renews the buffer where it lies, so graphs read it too.
        """
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if block < 1 or block % 32:
            raise ValueError(f"block must be a positive multiple of 32, got {block}")
        if taps and len(self.shape) != 4:
            raise ValueError(f"the order (kh, kw, c) needs a weight of shape (N, C, kh, kw), got {self.shape}")
        return self._cached((form, block, taps), lambda: self._reorder(form, block, taps))

    def row_sums(self) -> torch.Tensor:
        """sum_k sign[n, k] as int32 (N,): what a constant added to all of x contributes. Cached like `operand`."""
        return self._cached(("row_sums",), lambda: signs(self).flatten(1).sum(1, dtype=torch.int32))

    def _cached(self, key, build):
        """What `build()` makes of the bits, and makes anew, in the same memory, after they were written to."""
        tracing = torch.compiler.is_compiling()  # torch.compile traces no streams and no versions
        version, buffer = self._derived.get(key, (None, None))
        if buffer is None or (not tracing and version != self.bits._version):
            on_cuda = self.bits.is_cuda and not tracing
            if on_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"derived weights {key} are not built yet: run once before the CUDA graph is captured"
                )
            with plain_tensors():
                buffer = build() if buffer is None else buffer.copy_(build())
            if on_cuda:  # once for each buffer, so that any stream may read it
                torch.cuda.current_stream(self.device).synchronize()
            self._derived[key] = None if tracing else self.bits._version, buffer
        return buffer

    def _reorder(self, form, block, taps):
        codes = _codes(self)  # N K
        if taps:
            n, c, kh, kw = self.shape
            codes = codes.view(n, c, kh * kw).transpose(1, 2)  # N taps C
        codes = F.pad(codes, (0, -codes.shape[-1] % block)).flatten(1)  # N K'
        words = _to_words(codes, form, self.kind)  # N words
        return F.pad(words, (0, 0, 0, -self.n % ROWS)).t().contiguous()  # words N'


def pack(w: torch.Tensor, kind: str = "binary", scale: torch.Tensor | None = None) -> PackedWeight:
    """Pack the signs of `w`, (N, K), (N, C, k) or (N, C, kh, kw); the formulas are per output n, over the rest.

    binary    sign = -1 where w < 0, else +1;                      scale = mean |w|
    ternary   sign = 0 where |w| <= 0.7 mean |w|, else as above;   scale = mean |w| over what is not 0

    `scale` (N,) replaces the scale of these formulas. The result shares no memory with `w`. Raises ValueError for
    another kind, number of dimensions, or dtype, NotImplementedError for a `w` that torch.func maps or differentiates.

    >>> packed = pack(torch.tensor([[1.0, -3.0], [2.0, 2.0]]))
    >>> packed.bits.tolist(), packed.scale.tolist()
    ([[2], [0]], [2.0, 2.0])
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not w.is_floating_point() or w.ndim not in (2, 3, 4) or w.numel() == 0:
        raise ValueError(
            f"w must be floating point, (N, K), (N, C, k) or (N, C, kh, kw), not empty; got {w.dtype} {tuple(w.shape)}"
        )
    _refuse_wrapped(w)
    with plain_tensors():
        return _pack(w.detach(), kind, scale)


def _pack(w, kind, scale):
    flat = w.flatten(1).float()  # N K
    size = flat.abs()
    if kind == "binary":
        codes, default = (flat < 0).int(), size.mean(1)
    else:
        keep = size > 0.7 * size.mean(1, keepdim=True)
        codes = torch.where(flat < 0, 3, 1).int() * keep
        default = (size * keep).sum(1) / keep.sum(1).clamp(min=1)
    if scale is None:
        scale = default
    else:
        _check_scale(scale, w.shape[0])
        scale = scale.detach().to(w.device)
    codes = F.pad(codes, (0, -flat.shape[1] % weights_per_word(kind)))
    return PackedWeight(_to_words(codes, "canonical", kind), scale, tuple(w.shape), kind)


def signs(packed: PackedWeight) -> torch.Tensor:
    """The signs as int8 in the shape of the dense weight: +-1, and 0 where a ternary weight is 0."""
    return _decode(_codes(packed), packed.kind).view(packed.shape)


def unpack(packed: PackedWeight) -> torch.Tensor:
    """The dense weight scale[n] * sign[n, ...], fp32, in its own shape.

    >>> unpack(pack(torch.tensor([[1.0, -3.0]])))
    tensor([[ 2., -2.]])
    """
    scale = packed.scale.view(-1, *[1] * (len(packed.shape) - 1))
    return scale * signs(packed)


def _refuse_wrapped(*tensors):
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise NotImplementedError("weights that torch.func maps or differentiates cannot be packed: pack them outside")


def _check_scale(scale, n):
    if scale.dtype != torch.float32 or tuple(scale.shape) != (n,):
        raise ValueError(f"scale must be torch.float32 ({n},), got {scale.dtype} {tuple(scale.shape)}")


def _shifts(form, kind, device):
    """Lowest bit of each weight of a word, in the order of the weights."""
    width = 1 if kind == "binary" else 2  # bits per weight
    e = torch.arange(weights_per_word(kind), dtype=torch.int32, device=device)
    if form == "canonical":
        return width * e
    lanes, lane = (2, 16) if form == "pair" else (4, 8)  # operand elements in a 32-bit register, and their width
    return lane - width - width * (e // lanes) + lane * (e % lanes)


def _to_words(codes, form, kind):
    """int32 codes (N, K), K a multiple of the weights per word, to int32 words (N, K / weights per word)."""
    codes = codes.unflatten(1, (-1, weights_per_word(kind)))
    return (codes << _shifts(form, kind, codes.device)).sum(-1, dtype=torch.int32)


def _codes(packed):
    """The stored codes as int32 (N, K): 0 | 1 binary, 0 | 1 | 3 ternary."""
    codes = packed.bits[:, :, None] >> _shifts("canonical", packed.kind, packed.device)
    codes = (codes & 1 if packed.kind == "binary" else codes & 3).flatten(1)[:, : packed.k]
    return codes if packed.kind == "binary" else codes * (codes & 1)  # minus zero is zero


def _decode(codes, kind):
    """Codes to int8 signs."""
    return ((1 - 2 * codes) if kind == "binary" else (codes & 1) - (codes & 2)).to(torch.int8)
