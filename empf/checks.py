"""At the doors of networks: one sentence for what no layer can take."""

from collections.abc import Callable, Iterable
from functools import wraps
from operator import index
from typing import TypeVar

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_STEPS = 10**6
Kind = TypeVar("Kind")


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


def frames(x: Tensor, wanted: tuple[int, ...], T: int, t: int, past: int, steps: int) -> Tensor:
    """What a network at time t of T reads in past + steps more steps: (k, N, *wanted); k = 1 of images (N, *wanted).

    Events are (T, N, *wanted), or just those of these steps. Raises ValueError for other shapes, and for steps past T.
    """
    total = past + steps
    if steps < 1 or past < 0 or t + total > T:
        raise ValueError(
            f"{past} + {steps} more steps asked after step {t} of T = {T}: call empf.reset(model) before a new batch, "
            "or ask for fewer steps"
        )
    if x.dim() not in (4, 5) or tuple(x.shape[-3:]) != wanted:
        raise ValueError(
            f"the input must be images (N, {', '.join(map(str, wanted))}) or events (T, N, ...), "
            f"got shape {tuple(x.shape)}"
        )
    if x.dim() == 4:
        return x.unsqueeze(0)
    if len(x) not in (total, T):
        raise ValueError(f"{total} steps to run with T = {T}, but the input has {len(x)} frames")
    return x if len(x) == total else x[t : t + total]


def explained(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward(layer, x)` of a synapse: where torch refuses x, a sentence says why. A call that works pays nothing."""

    @wraps(forward)
    def or_sentence(layer: nn.Module, x: Tensor) -> Tensor:
        try:
            return forward(layer, x)
        except Exception:
            check_fits(layer, x)
            raise

    return or_sentence


def check_fits(layer: nn.Module, x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is what a convolution or a linear layer takes."""
    check_input(x, layer.weight)
    if isinstance(layer, nn.Linear):
        fits, wanted = x.shape[-1:] == (layer.in_features,), f"(..., {layer.in_features})"
    else:
        sides = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
        least = [max(1, dilation * (kernel - 1) + 1 - 2 * padding) for kernel, padding, dilation in sides]
        channels, *found = x.shape[-1 - len(least) :] or [0]
        fits = x.dim() - len(least) in (1, 2) and channels == layer.in_channels
        fits = fits and all(side >= bound for side, bound in zip(found, least, strict=True))
        wanted = f"(N, {layer.in_channels}, {', '.join(f'{bound} or more' for bound in least)})"
    if not fits:
        raise ValueError(f"{type(layer).__name__} takes numbers of shape {wanted}, got {tuple(x.shape)}")


def check_conv(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Raise ValueError for another padding than zeros and their number, and for sizes that no convolution has."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"a convolution of this library is padded with zeros, and their number is given: padding_mode="
            f"{conv.padding_mode!r}, padding={conv.padding!r} are not supported; use F.pad before it"
        )
    dims = 1 if isinstance(conv, nn.Conv1d) else 2
    sizes = {name: getattr(conv, name) for name in ("kernel_size", "stride", "dilation", "padding")}
    for name, values in sizes.items():
        least = int(name != "padding")
        if len(values) != dims or min(whole(name, values)) < least:
            numbers = f"{dims} whole numbers of at least {least}"
            raise ValueError(f"{name} of a {type(conv).__name__} must be one or {numbers}, got {values}")


def network(net: object) -> nn.Module:
    """net. Raises TypeError unless it is a module of torch."""
    return given(net, nn.Module, "a network is needed, a torch.nn.Module")


def given(value: object, kind: type[Kind], what: str) -> Kind:
    """value. Raises TypeError unless it is of that kind; `what`: is needed."""
    if not isinstance(value, kind):
        raise TypeError(f"{what}, got {type(value).__name__}")
    return value


def check_device(device: object, called: str = "the device") -> None:
    """Raise ValueError with one sentence unless torch can use the device, with numbers (meta has none)."""
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"cannot use {called} {device!s:.40} ({reason}): leave it out or use cpu") from error


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
