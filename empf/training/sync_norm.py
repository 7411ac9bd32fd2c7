"""Batch norms whose statistics are those of the joined batch of all processes.

    mean, var over N, H, W of all processes      y = weight * (x - mean) / sqrt(var + eps) + bias

One sum over the processes forward and one backward, each of 2 C numbers; every process needs as many images as the
others. `x` (N, C, ...) is one time step; half precision is normalised in fp32.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from empf.kernels.neuron_cpu import per_channel
from empf.layer import StepBatchNorm
from empf.neuron import EMPFNeuron


def joint_mean(values: Tensor) -> Tensor:
    """The mean of the values of all processes, in place."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


class SyncBatchNormFn(torch.autograd.Function):
    """(y, mean, var); mean and var (C,) of the joined batch, var biased, neither with a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, eps: float):
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        near = wide - per_channel(offset, x.dim())  # squares of numbers around 0 lose no digits
        moments = joint_mean(torch.stack([near.mean(dims), near.square().mean(dims)]))
        var = (moments[1] - moments[0].square()).clamp(min=0)
        mean, rstd = offset + moments[0], torch.rsqrt(var + eps)
        gain = weight * rstd
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, var)
        y = wide * per_channel(gain, x.dim()) + per_channel(bias - mean * gain, x.dim())
        return y.to(x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, d_mean, d_var):
        x, weight, mean, rstd = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        d_y = d_y.to(mean.dtype)
        hat = (x.to(mean.dtype) - per_channel(mean, x.dim())) * per_channel(rstd, x.dim())
        d_bias, d_weight = d_y.sum(dims), (d_y * hat).sum(dims)  # of this process: DDP takes the mean
        count = x.numel() // x.shape[1]
        common = joint_mean(torch.stack([d_bias, d_weight]) / count)
        d_hat = d_y - per_channel(common[0], x.dim()) - hat * per_channel(common[1], x.dim())
        return (d_hat * per_channel(weight * rstd, x.dim())).to(x.dtype), None, d_weight, d_bias, None


def sync_batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *, training: bool = True,
    momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    """`F.batch_norm` in training, on the joined batch. The running statistics have to agree between the processes."""
    y, mean, var = SyncBatchNormFn.apply(x, running_mean.clone(), weight, bias, eps)
    count = x.numel() // x.shape[1] * dist.get_world_size()
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * count / max(count - 1, 1)).to(running_var.dtype), momentum)
    return y


def sync_norms(model: nn.Module) -> None:
    """Let the norms of a model share their statistics between processes; its state dict stays as it is."""
    for module in model.modules():
        if isinstance(module, StepBatchNorm | EMPFNeuron):
            module.batch_norm = sync_batch_norm
