"""Optimizer and schedule; with them SGD whose updates of matrices are orthogonal (Muon), for latent weights.

    M <- momentum * M + (1 - momentum) * G                  average of the gradients, G (out, in) or (out, in, kh, kw)
    D  = orthogonal((1 - momentum) * G + momentum * M)      nearest semi-orthogonal (out, in * kh * kw), approximately
    W <- W - lr * (D + weight_decay * W), cut to -limit..limit

Every direction of D has about the same length, so weights whose gradients are small flip their sign as often as
others. And every update has the same length, so latent weights would soon be beyond 1, where the straight-through
gradient is 0 and they stay for ever: hence the limit. `torch.optim.Muon` takes no convolutions, and its products are in
bf16, which few CPUs have.
Method: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from empf.synapse import FullConv2d, QuantizedWeight
from empf.training.config import TrainConfig
from empf.training.flip import Flipped, Flips

QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, again and again, takes singular values to 0.7..1.2
ITERATIONS = 5


@torch.no_grad()
def orthogonal(g: Tensor, bf16: bool | None = None) -> Tensor:
    """g (out, ...) with singular values close to 1, seen as a matrix (out, -1); zeros stay zeros.

    The products are in bf16 or in fp32; by default in bf16 on a GPU alone. Same shape, dtype and memory format as g.
    """
    x = g.movedim(1, -1).reshape(len(g), -1)  # without a copy from channels_last
    bf16 = x.is_cuda if bf16 is None else bf16
    x = x.to(torch.bfloat16 if bf16 else torch.promote_types(x.dtype, torch.float32))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-12)  # singular values of at most 1
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = (x.T if tall else x).to(g.dtype)
    return torch.empty_like(g).copy_(x.reshape(g.movedim(1, -1).shape).movedim(-1, 1))


class Muon(torch.optim.SGD):
    """`torch.optim.SGD`; groups with an `orthogonal_momentum` above 0 get orthogonal updates, with that momentum.

    Such a group should have no other momentum; it may have a `limit` of its weights, and `bf16` says in what its
    products are, see `orthogonal`. `step` leaves its orthogonal directions in `.grad`.
    """

    def __init__(self, params, **defaults):
        super().__init__(params, **defaults)
        for group in self.param_groups:
            group.setdefault("orthogonal_momentum", 0.0)
            group.setdefault("limit", math.inf)
            group.setdefault("bf16", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; `closure`, if any, computes the gradients and returns the loss, which is returned here."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            momentum = group["orthogonal_momentum"]
            for p in group["params"] if momentum else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"]
                average.lerp_(p.grad, 1 - momentum)
                p.grad.copy_(orthogonal(p.grad.lerp(average, momentum), group["bf16"]))
        super().step()
        for group in self.param_groups:
            if group["limit"] < math.inf:
                for p in group["params"]:
                    p.clamp_(-group["limit"], group["limit"])
        return loss


def flips_of(model: nn.Module, config: TrainConfig, notes: list[str]) -> Flips | None:
    """What --optimizer flip asks for, with a note on it; None with another optimizer."""
    if config.optimizer != "flip":
        return None
    flips = Flips(
        model, lr=config.lr, rate=config.flip_rate, threshold=config.flip_threshold, adaptive=config.flip_adaptive,
        momentum_bits=config.flip_bits,
    )  # fmt: skip
    count = sum(m.magnitude.numel() for m in flips.synapses.values())
    notes.append(
        f"{count} synapses hold 1 bit and {config.flip_bits} bits of momentum; weight decay is for the other parameters"
    )
    return flips


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on convolutions and linear layers, with --decay-all on everything. With
    --optimizer muon, hidden synapses get orthogonal updates at the same learning rate. What requires no gradient, and
    what flips, is left out.

    On a GPU torch updates all weights at once, if each gradient lies in memory as its weight does. Those of 1x1
    convolutions need not; so there `.grad` is made here, and `zero_grad(set_to_none=False)` keeps it.
    """
    flipped = {m.magnitude for m in model.modules() if isinstance(m, Flipped)}
    modules = [m for m in model.modules() if not isinstance(m, Flipped)]
    learning = [p for p in model.parameters() if p.requires_grad and p not in flipped]
    for p in learning:
        if p.device.type != "cpu":
            p.grad = torch.zeros_like(p)
    decayed = {m.weight for m in modules if isinstance(m, nn.Conv2d | nn.Linear)}
    hidden = {m.weight for m in modules if isinstance(m, QuantizedWeight | FullConv2d)}
    orthogonal = hidden if config.optimizer == "muon" else set()
    groups = [
        {"params": [p for p in learning if p in decayed - orthogonal], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p not in decayed], "weight_decay": config.weight_decay * config.decay_all},
    ]
    if not orthogonal:
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    groups.append(
        {
            "params": [p for p in learning if p in orthogonal], "weight_decay": config.weight_decay,
            "momentum": 0.0, "nesterov": False, "orthogonal_momentum": 0.95,
            "limit": math.inf if config.weights == "full" else 1.0,
            "bf16": config.mixed_precision == "bf16" or None,
        }
    )  # fmt: skip
    return Muon(groups, lr=config.lr, momentum=0.9, nesterov=True)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up from 0.01 lr, then cosine to 0 in all epochs, or constant; progress in epochs."""
    if progress < config.warmup_epochs:
        return config.lr * (0.01 + 0.99 * progress / config.warmup_epochs)
    if config.schedule == "constant":
        return config.lr
    rest = (progress - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))
