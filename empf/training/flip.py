"""Learning without latent weights: a binary synapse is its bits, and a momentum flips them.

    w = a * sign            a: the scale that the synapse had when it was converted, mean|W| of each output channel
                            (of a new network 1/2 of 1/sqrt(fan-in), about); it is stored, and never learned: batch
                            norm learns the gain behind it
    m <- (1 - c) m + c g    momentum of each synapse, in 8 bits (or bf16), from the gradient g of w
    w <- -w, m <- 0         where m pushes against w, sign(m) = sign(w), and |m| > tau
    tau = threshold * r * (peak learning rate / learning rate)        so it rises with the schedule, and warms up
    r   root mean square of the gradient of the layer: of its first update (fixed), or averaged as m is (adaptive)

Bits, momentum and r are updated within the backward pass, layer by layer, and then the gradient is let go: only one
layer's gradient is alive. The weight is formed from its bits where it is needed and is not kept for backward. Weight
decay, clipping of gradients and the rest of an optimizer never see these synapses.

One rule where several backward passes make one update (`Flips.gathering`): each of them moves the momentum, the first
one also decays it, and weights flip in the last one. So they are one pass with the sum of the gradients, but for the
rounding of the momentum in between; r takes the sum of their mean squares.

Several processes average each gradient before it is used, so all flip the same weights.
arXiv 1906.02107 (Bop), 2511.12502 (BSO, and T-BSO with an adaptive threshold); 2110.02861 (8-bit momentum)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakMethod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from empf.kernels.convolution import conv2d_backward
from empf.kernels.flip import BLOCK, bits_of, flip_update, signs_of
from empf.synapse import BinaryConv1d, BinaryConv2d, BinaryLinear, quantize_weight


class FlippedFn(Function):
    """`synapse.run(x, w)` that keeps x alone for backward, where w is formed anew."""

    @staticmethod
    def forward(ctx, synapse: "Flipped", x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.synapse = synapse
        return synapse.run(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        return None, *ctx.synapse.run_backward(d_y, *ctx.saved_tensors, *ctx.needs_input_grad[1:])


class Flipped:
    """Mixin: a binary synapse that holds `bits` and `magnitude`, the parameter that stands for the weight.

    `magnitude` has the shape of the weight with its channels last, the layout of the bits, and its value a > 0 lies in
    memory once per output channel; its gradient is that of the weight. `weight` is formed from both at each look. In
    checkpoints stands that weight, so they are those of a network with latent weights.
    """

    bits: Tensor
    magnitude: nn.Parameter
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The effective weight +-a, without gradient, formed anew."""
        return self.effective_weight()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        a = self.magnitude
        signs = signs_of(self.bits, a.numel(), a.dtype).view(a.shape)
        return signs.mul_(a).movedim(-1, 1)

    def learned(self) -> Tensor:
        """`magnitude` in the shape of the weight: it stands for the weight, of which it has the gradient."""
        return self.magnitude.movedim(-1, 1)

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Become the effective weight of a latent weight, or this weight itself where it is one of +-a."""
        size, learns = weight.abs().flatten(1), weight.requires_grad
        if not (size == size[:, :1]).all():
            weight = quantize_weight(weight, self.kind, self.granularity)
        last = weight.movedim(1, -1)
        a = last.flatten(1)[:, 0].abs().view(-1, *[1] * (weight.dim() - 1)).expand(last.shape)
        if "magnitude" not in self._parameters:
            self.magnitude = nn.Parameter(a, requires_grad=learns)
            self.register_buffer("bits", bits_of(last < 0))
        else:
            self.magnitude.data = a.to(self.magnitude)
            self.bits.copy_(bits_of(last < 0))

    def __getstate__(self) -> dict:  # a copy is flipped by nobody
        return {**super().__getstate__(), "owner": None}

    def forward(self, x: Tensor) -> Tensor:
        y = FlippedFn.apply(self, x, self.learned())
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (self.magnitude.dim() - 2)).to(y.dtype)

    def run(self, x: Tensor, w: Tensor) -> Tensor:
        """The synapse without its bias; w, what `learned` returned, only says what has the gradient."""
        return self.product(x, self.effective_weight())

    def run_backward(self, d_y: Tensor, x: Tensor, w: Tensor, for_x: bool, for_w: bool):
        """The gradients of x and w; the weight is gone when that of w is made."""
        d_x = self.product_backward(d_y, x, self.effective_weight(), True, False)[0] if for_x else None
        return d_x, self.product_backward(d_y, x, w, False, True)[1] if for_w else None

    def product_backward(self, d_y: Tensor, x: Tensor, w: Tensor, for_x: bool, for_w: bool):
        return conv2d_backward(d_y, x, w, self.stride, self.padding, self.dilation, self.groups, for_x, for_w)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.effective_weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        for name, take in (("weight", self.take), ("bias", lambda found: self.bias.data.copy_(found))):
            own, found = getattr(self, name), state.get(f"{prefix}{name}")
            if own is None or found is None:
                missing += [f"{prefix}{name}"] if own is not None and strict else []
            elif own.shape != found.shape:
                errors.append(f"{prefix}{name} has shape {tuple(found.shape)}, here {tuple(own.shape)}")
            else:
                take(found.to(own))


class FlippedConv2d(Flipped, BinaryConv2d):
    made_again = property(lambda self: "forward" not in vars(self) and self.bias is None)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return BinaryConv2d.run(self, x, w)


class FlippedConv1d(Flipped, BinaryConv1d):
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(x, w, None, self.stride, self.padding, self.dilation, self.groups)


class FlippedLinear(Flipped, BinaryLinear):
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def product_backward(self, d_y: Tensor, x: Tensor, w: Tensor, for_x: bool, for_w: bool):
        d_x = d_y @ w.to(d_y.dtype) if for_x else None
        return d_x, (d_y.flatten(0, -2).T @ x.flatten(0, -2).to(d_y.dtype)).to(w.dtype) if for_w else None


FLIPPED = {BinaryConv2d: FlippedConv2d, BinaryConv1d: FlippedConv1d, BinaryLinear: FlippedLinear}


def convert(model: nn.Module) -> list[str]:
    """Let the binary synapses of a model hold bits and no latent weights, in place; the names of those with a gradient.

    The model computes what it did before. A frozen synapse stays frozen. Call it when the model is on its device, and
    before it is wrapped. Raises ValueError where a synapse is not binary, or there is none.
    """
    found = {name: m for name, m in model.named_modules() if type(m) in FLIPPED}
    wrong = [name for name, m in found.items() if m.kind != "binary"]
    if wrong or not found:
        raise ValueError(
            f"only binary synapses flip, and {f'{wrong[0]} is ternary' if wrong else 'the network has none'}: use "
            "weights='binary', or another optimizer"
        )
    for module in found.values():
        weight = module._parameters.pop("weight")
        module.__class__ = FLIPPED[type(module)]
        module.take(weight)
    return [name for name, m in found.items() if m.magnitude.requires_grad]


class Flips:
    """Flips the bits of a model's binary synapses in its backward passes, from now on; see on top.

        flips = Flips(model, lr=0.1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p not in flips], lr=0.1)
        loss.backward()             weights flip
        optimizer.step()            the other parameters
        flips.lr = 0.05             as the optimizer's, where there is a schedule

    rate: c; threshold, `adaptive`: of tau; lr: peak learning rate; momentum_bits: 8 | 16 (bf16). The model is converted
    in place, see `convert`; wrap it for several processes afterwards. Raises ValueError as `convert`, and for a rate
    outside (0, 1], a threshold below 0, or other momentum_bits.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, rate: float = 0.03, threshold: float = 0.05, adaptive: bool = True,
        momentum_bits: int = 8,
    ):  # fmt: skip
        if not (0 < rate <= 1 and threshold >= 0 and momentum_bits in (8, 16)):
            raise ValueError(
                "rate must lie in (0, 1], threshold be at least 0 and momentum_bits 8 or 16, got "
                f"{rate}, {threshold} and {momentum_bits}"
            )
        names = convert(model)
        self.lr = self.peak = lr
        self.rate, self.threshold, self.adaptive = rate, threshold, adaptive
        self.last = True  # is the next backward pass the last one of its update?
        self.synapses = {name: model.get_submodule(name) for name in names}
        self.states = {name: new_state(m.magnitude, momentum_bits) for name, m in self.synapses.items()}
        self.gathered: dict[str, Tensor] = {}  # mean squares of the passes of an update that goes on
        self.parameters = {m.magnitude: name for name, m in self.synapses.items()}
        update = WeakMethod(self.update)  # the garbage collector does not see what a hook holds
        for module in self.synapses.values():
            module.owner = self
            module.magnitude.register_post_accumulate_grad_hook(lambda parameter: update()(parameter))
        every = [f"{name}.magnitude" for name, m in model.named_modules() if isinstance(m, Flipped)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, every)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.parameters

    @contextmanager
    def gathering(self, inside: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
        """Context of the backward passes of an update but for the last one; `inside`: another context to be in."""
        before, self.last = self.last, False
        try:
            with inside():
                yield
        finally:
            self.last = before

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """The hook: use the gradient of one synapse and let it go."""
        name, grad, parameter.grad = self.parameters[parameter], parameter.grad.contiguous(), None
        synapse, state = self.synapses[name], self.states[name]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        factor = self.threshold * self.peak / self.lr if self.last and self.lr > 0 else math.inf
        square = state["square"]
        tau = torch.where(square > 0, square.sqrt() * factor, math.inf)
        keep = 1.0 if name in self.gathered else 1 - self.rate
        new = flip_update(grad, synapse.bits, state["momentum"], state.get("scale"), tau, rate=self.rate, keep=keep)
        new = self.gathered.pop(name, 0.0) + new / grad.numel()
        if not self.last:
            self.gathered[name] = new
        else:
            square.copy_(torch.where(square > 0, torch.lerp(square, new, self.rate * self.adaptive), new))

    def memory(self) -> dict[str, int]:
        """Bytes of the synapses: bits and scales, the largest gradient (there is one at a time), the states."""
        synapses = self.synapses.values()
        return {
            "parameters": sum(t.untyped_storage().nbytes() for m in synapses for t in (m.bits, m.magnitude)),
            "gradients": max(m.magnitude.nbytes for m in synapses),
            "optimizer": sum(tensor.nbytes for state in self.states.values() for tensor in state.values()),
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Of each synapse momentum, its scale where it has 8 bits, and the mean square r^2; the model has the bits."""
        return self.states

    def load_state_dict(self, states: dict[str, dict[str, Tensor]]) -> None:
        for name, state in self.states.items():
            for part, tensor in state.items():
                tensor.copy_(states[name][part])


def new_state(parameter: Tensor, momentum_bits: int) -> dict[str, Tensor]:
    n, device = parameter.numel(), parameter.device
    state = {"square": torch.zeros((), device=device)}
    if momentum_bits == 16:
        return state | {"momentum": torch.zeros(n, dtype=torch.bfloat16, device=device)}
    scale = torch.zeros(-(-n // BLOCK), device=device)
    return state | {"momentum": torch.zeros(n, dtype=torch.int8, device=device), "scale": scale}
