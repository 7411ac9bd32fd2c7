"""Tensors of a packed network that are not computed yet: products that nobody has taken, spikes that are still codes.

    Product   y = scale * conv(x, sign) + bias, and what came behind it: a folded normalisation, a current to be added
    Spikes    code * step, code uint8; or bf16 numbers, with step 1

Any function of torch, and so any network, may be given one: it then reads `value`, which is computed once. Only what
knows better takes the parts: a packed synapse reads codes, a normalisation folds itself into a product that is not
taken, and a neuron takes convolution, normalisation, residual and its time steps in one launch where the kernels run.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# what is asked about a tensor without reading it
ABOUT = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "is_cuda", "is_cpu", "ndim", "layout")}
ABOUT |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
ABOUT |= {Tensor.requires_grad.__get__, Tensor.grad_fn.__get__, Tensor.is_meta.__get__, Tensor.is_complex}
FLATTEN, UNFLATTEN = {Tensor.flatten, torch.flatten}, {Tensor.unflatten, torch.unflatten}
RESHAPE = {Tensor.view, Tensor.reshape, torch.reshape}
MAKE = Tensor._make_wrapper_subclass
ADD = {Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add}


class Lazy(Tensor):
    """A tensor whose `value` is computed when it is read for the first time."""

    @property
    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._compute()
        return self._value

    def _compute(self) -> Tensor:
        raise NotImplementedError

    def _lazily(self, func: Callable, args: tuple, kwargs: dict) -> "Lazy | None":
        """The result as another lazy tensor, where it can be had without reading this one."""
        return None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for arg in args[:2]:
            if isinstance(arg, Lazy) and arg._value is None:
                found = arg._lazily(func, args, kwargs)
                if found is not None:
                    return found
        return func(*(plain(arg) for arg in args), **{name: plain(arg) for name, arg in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """For calls that did not come by way of `__torch_function__`."""
        return func(*(plain(arg) for arg in args), **{name: plain(arg) for name, arg in (kwargs or {}).items()})

    def __repr__(self) -> str:
        return repr(self.value)


def plain(x):
    """x with every lazy tensor in it replaced by its value."""
    if isinstance(x, Lazy):
        return x.value
    if type(x) in (list, tuple):
        return type(x)(map(plain, x))
    if type(x) is dict:
        return {name: plain(part) for name, part in x.items()}
    return x


class Spikes(Lazy):
    """Codes of value code * step (uint8, at most `top`), or numbers in bf16, which read as fp32."""

    @staticmethod
    def __new__(cls, codes: Tensor, step: float, top: int):
        return MAKE(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, step: float, top: int):
        self.codes, self.step, self.top = codes, step, top
        self._value: Tensor | None = None

    def _compute(self) -> Tensor:
        return self.codes.float() if self.in_bf16 else self.codes * self.step

    @property
    def in_bf16(self) -> bool:
        return self.codes.dtype == torch.bfloat16

    @property
    def unchanged(self) -> bool:
        """Whether the codes still say what the value does, which somebody may have written to."""
        return self._value is None or version(self._value) == 0

    def _lazily(self, func, args, kwargs) -> "Lazy | None":
        if func in FLATTEN or func in UNFLATTEN or func in RESHAPE:
            return Spikes(func(self.codes, *args[1:], **kwargs), self.step, self.top)
        if func is F.avg_pool2d and self.in_bf16:
            return Spikes(func(self.codes, *args[1:], **kwargs), self.step, self.top)
        if func is F.avg_pool2d and self.top * 4 < 256:
            codes = sums_of_four(self.codes, *args[1:], **kwargs)  # their average in units of step / 4
            return None if codes is None else Spikes(codes, self.step / 4, self.top * 4)
        return None


def sums_of_four(
    codes: Tensor, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Tensor | None:  # fmt: skip
    """2x2 sums of codes (..., H, W) where the average pooling of these arguments is over 2x2; else None."""
    two = ((2, 2), [2, 2], 2)
    if kernel_size not in two or stride not in (None, [], *two) or padding not in (0, (0, 0), [0, 0]):
        return None
    h, w = codes.shape[-2:]
    if divisor_override is not None or ceil_mode and (h % 2 or w % 2):
        return None
    return sum(codes[..., y : h // 2 * 2 : 2, x : w // 2 * 2 : 2] for y in (0, 1) for x in (0, 1))


class Product(Lazy):
    """What a packed synapse makes of x, normalised by `norm`, plus `residual`; nothing of it is computed yet.

    x (M, ...) folded, floats or codes of at most `top` with their `step` (1 for spikes in bf16); the output is
    (*lead, *rest), where `lead` makes M in all: it may be reshaped as long as the channels (`rest[0]`, of a linear
    layer the last dimension) stay where they are.
    """

    @staticmethod
    def __new__(cls, synapse, x, step, top, lead, rest, **parts):
        dtype = x.dtype if step is None else torch.float32
        return MAKE(cls, (*lead, *rest), dtype=dtype, device=x.device)

    def __init__(
        self, synapse, x: Tensor, step: float | None, top: float, lead: tuple, rest: tuple, norm=None, residual=None
    ):
        self.synapse, self.x, self.step, self.top, self.lead, self.rest = synapse, x, step, top, lead, rest
        self.norm, self.residual = norm, residual
        self.versions = version(x), version(residual)
        self.neuron = None  # which took this product without its sum
        self._value: Tensor | None = None

    @property
    def in_bf16(self) -> bool:
        """Whether x are spikes in bf16."""
        return self.step is not None and self.x.dtype == torch.bfloat16

    @property
    def bare(self) -> bool:
        """Whether this is the product alone, not taken yet."""
        return self._value is None and self.norm is None and self.residual is None

    @property
    def taken_by_neuron(self) -> bool:
        """Whether a neuron can have this together with its steps: a convolution of (k, N, C, H, W)."""
        return self._value is None and len(self.lead) == 2 and self.synapse.plane

    def normalised(self, norm, residual: Tensor | None = None) -> "Product":
        """What `norm` makes of this product, plus a residual."""
        self.check()
        return Product(self.synapse, self.x, self.step, self.top, self.lead, self.rest, norm=norm, residual=residual)

    def check(self) -> None:
        """Raise RuntimeError where the operands are no longer those of the call."""
        if self.versions != (version(self.x), version(self.residual)):
            raise RuntimeError(
                "the input of a packed layer was changed in place before its output was read: write x = x + y in "
                "place of x += y between them"
            )

    def _compute(self) -> Tensor:
        self.check()
        kernel = self.synapse.filter(self.norm)
        if self.neuron is not None:
            self.neuron.keeps = True  # next time it is not computed twice
        if self.neuron is not None and self.in_bf16:
            y = kernel.added_up(self)
        else:  # of spikes in bf16, what no neuron takes is computed in fp32
            x, step = (self.x.float(), None) if self.in_bf16 else (self.x, self.step)
            y = kernel(x, step, self.top).view(*self.lead, *self.rest)
            if self.residual is not None:
                y += plain(self.residual)
        self.settle(y)
        return y

    def settle(self, value: Tensor) -> None:
        """This is the value; the operands are no longer needed."""
        self._value, self.x, self.residual = value, None, None

    def _lazily(self, func, args, kwargs) -> "Lazy | None":
        if func in ADD and len(args) == 2 and not kwargs:
            return self.plus(args[1] if args[0] is self else args[0])
        if self.residual is None and (func in FLATTEN or func in UNFLATTEN or func in RESHAPE):
            lead = self.reshaped_lead(func, *args[1:], **kwargs)
            if lead is not None:
                self.check()
                return Product(self.synapse, self.x, self.step, self.top, lead, self.rest, norm=self.norm)
        return None

    def plus(self, other) -> "Product | None":
        free = isinstance(other, Tensor) and self.residual is None and other is not self
        alike = free and other.shape == (*self.lead, *self.rest) and other.dtype == self.dtype
        return self.normalised(self.norm, other) if alike else None

    def reshaped_lead(self, func, *args, **kwargs) -> tuple | None:
        lead, shape = self.lead, (*self.lead, *self.rest)
        if kwargs:
            return None
        if func in FLATTEN:
            start, stop = (args + (0, -1)[len(args) :])[:2]
            stop = stop % len(shape)
            if start < 0 or stop >= len(lead):
                return None
            count = 1
            for n in lead[start : stop + 1]:
                count *= n
            return (*lead[:start], count, *lead[stop + 1 :])
        if func in UNFLATTEN:
            at, sizes = args
            if not isinstance(at, int) or not 0 <= at < len(lead) or -1 in sizes:
                return None
            return (*lead[:at], *sizes, *lead[at + 1 :])
        sizes = tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else args
        split = len(sizes) - len(self.rest)
        if split < 1 or any(not isinstance(n, int) or n < 0 for n in sizes) or sizes[split:] != self.rest:
            return None
        count, wanted = 1, 1
        for n in lead:
            count *= n
        for n in sizes[:split]:
            wanted *= n
        return sizes[:split] if count == wanted else None


def version(x: Tensor | None) -> int | None:
    """A counter that a write in place moves; inference tensors have none, and lazy ones look after themselves."""
    return None if x is None or isinstance(x, Lazy) or x.is_inference() else x._version
