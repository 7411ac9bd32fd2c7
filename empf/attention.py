"""Channel attention of spiking networks."""

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from torch import Tensor, nn


class SECA(nn.Module):
    """Efficient channel attention on the post-synaptic current, one weight set for all time steps; k parameters.

        w = sigmoid(Conv1d_k(GAP(I)))      I <- w * I          (SECA-I; SECA-II is fed x + I)

    k = 5 neighbouring channels, zero padding; `bias`: of the Conv1d, one number more.    arXiv 2410.07547, sec. 4
    """

    __call__: Callable[..., Tensor]

    def __init__(self, kernel_size: int = 5, bias: bool = False):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"the kernel size of SECA must be odd and positive, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, current: Tensor, rest: Tensor | None = None) -> Tensor:
        """(..., C, H, W) with a leading dimension or more -> the same; `rest`, of that shape, is added to it."""
        mean = reduce(current, "... c h w -> ... c", "mean")
        gate = self.conv(mean.reshape(-1, 1, mean.shape[-1])).sigmoid()  # (T N) 1 C
        gate = rearrange(gate.view(mean.shape), "... c -> ... c 1 1")
        return current * gate if rest is None else torch.addcmul(rest, current, gate)
