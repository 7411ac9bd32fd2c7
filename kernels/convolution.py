"""Dense convolution with a backward pass that can be called by itself; `stride`, ... as in `F.conv2d`, as pairs.

The backward pass takes those of `F.conv1d` as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    """`F.conv2d`; on a CPU, a 1x1 convolution with a stride is given only the pixels that it looks at.

    Given all of them, oneDNN (torch 2.13) writes the weight gradient beyond the end of its memory, if fewer than 8
    channels lie in channels_last.
    """
    if strided_1x1(x, weight, padding):
        x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def strided_1x1(x: Tensor, weight: Tensor, padding) -> bool:
    return x.device.type == "cpu" and weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0)


def conv2d_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups, for_x: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and weight of `conv2d`, each where it is asked for; where autocast ran it, in half precision."""
    seen, one = x, stride
    if strided_1x1(x, weight, padding):
        seen, one = x[..., :: stride[0], :: stride[1]], (1, 1)
    d_seen, d_weight, _ = torch.ops.aten.convolution_backward(
        d_y, seen.to(d_y.dtype), weight.to(d_y.dtype), None, one, padding, dilation, False, (0,) * len(one), groups,
        (for_x, for_weight, False),
    )  # fmt: skip
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    if d_seen is None or seen.shape == x.shape:
        return d_seen, d_weight
    d_x = d_seen.new_zeros(x.shape)
    d_x[..., :: stride[0], :: stride[1]] = d_seen
    return d_x, d_weight
