"""At the doors of networks: one sentence for what no layer can take."""

from collections.abc import Callable, Iterable
from operator import index

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_STEPS = 10**6


def check_input(x: object, weight: Tensor | None = None) -> None:
    """Raise TypeError unless x is a dense tensor of floating-point numbers, and where `weight` is as it is.

    Under autocast the types may differ.
    """
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided or x.dtype not in FLOATS:
        found = f"{x.dtype}, {'nested' if x.is_nested else x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"the input must be a dense tensor of floating-point numbers, normalised, got {found}")
    if weight is None:
        return
    cast = x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if x.device != weight.device or cast:
        raise TypeError(
            f"the input is {x.dtype} on {x.device} and the network {weight.dtype} on {weight.device}: use x.to(...)"
        )


def tensor(x: object) -> Tensor:
    """x. Raises TypeError unless it is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"a layer takes a tensor of currents, time first, got {type(x).__name__}")
    return x


def whole(what: str, values: Iterable) -> list[int]:
    """The values as whole numbers. Raises TypeError where they are none."""
    try:
        return [index(value) for value in values]
    except TypeError as error:
        raise TypeError(f"{what} must be whole numbers, got {values!r:.100}") from error


def compared(criterion: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: object) -> Tensor:
    """The loss `criterion(logits, target)`. Raises ValueError where they cannot be compared, or it is no number."""
    given = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
    where = f"criterion, given logits {tuple(logits.shape)} and the target {given}"
    try:
        loss = criterion(logits, target)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and (type(error) is not RuntimeError or "memory" in str(error)):
            raise  # a fault of the machine
        raise ValueError(f"{where}, says: {' '.join(str(error).split()):.300}") from error
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(f"{where}, must return a loss of one number, got {tuple(getattr(loss, 'shape', ())) or loss}")
    return loss


def check_padding(conv: nn.Conv1d | nn.Conv2d) -> None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"a convolution of this library is padded with zeros, and their number is given: padding_mode="
            f"{conv.padding_mode!r}, padding={conv.padding!r} are not supported; use F.pad before it"
        )
