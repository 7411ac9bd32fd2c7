"""Training by CUDA graphs: `online_backward` is recorded once and then replayed, without Python between its kernels.

    backward = CapturedBackward(model, F.cross_entropy)
    for images, target in batches:
        loss, logits = backward(images, target, steps=[t])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

There is one graph for each choice of steps, shape of the batch and divisor, recorded when it first comes up; all share
their memory. The graph holds everything from the images to `.grad`, also the forming of the synapses and the moving of
the running statistics. What Python decides (train or eval, frozen norms, `layer.enabled`) is as it was when the
graph was recorded; `clear()` forgets the graphs.
"""

from collections.abc import Callable, Sequence
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor, nn

from empf.online import online_backward, reset

WARM_UP = 3  # ordinary runs before a recording: kernels are compiled and libraries set up there
MOST_GRAPHS = 64  # each takes seconds to record, and memory


def check_capture(device: torch.device, processes: int = 1, T: int = 1, steps_per_batch: int = 1) -> None:
    """Raise ValueError with one sentence unless training can be captured like this."""
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a GPU, and training is on {device.type}: leave --cuda-graphs out")
    if processes > 1:
        raise ValueError(
            f"CUDA graphs are for one process, and there are {processes}, whose exchange of gradients is not recorded: "
            "leave --cuda-graphs out"
        )
    if (graphs := comb(T, steps_per_batch)) > MOST_GRAPHS:
        raise ValueError(
            f"{steps_per_batch} of T = {T} steps can be drawn in {graphs} ways, more than {MOST_GRAPHS} CUDA graphs: "
            "leave --cuda-graphs out or lower --steps-per-batch"
        )


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    logits: Tensor


class CapturedBackward:
    """`online_backward(model, x, target, criterion, learning=learning, steps=steps)`, recorded and replayed.

    Called with images or events x, a target and the steps, it adds the gradients of loss / `divisor` to `.grad` and
    returns (loss, logits), detached and its caller's own. Whatever was in `.grad` before stays in the sum; the tensors
    in `.grad` are always the same ones, so that `zero_grad(set_to_none=False)` is the faster of the two.

    model: in training, on a GPU, not wrapped for data-parallel training; autocast may be part of its forward.
    Raises ValueError on another device, and what `online_backward` raises.
    """

    def __init__(
        self, model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], *, learning: str = "random"
    ):  # fmt: skip
        check_capture(next(model.parameters()).device)
        self.model, self.criterion, self.learning = model, criterion, learning
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.clear()

    def clear(self) -> None:
        """Forget all graphs."""
        self.graphs: dict[tuple, Recorded] = {}
        self.inputs: dict[tuple, tuple[Tensor, Tensor]] = {}  # where graphs read a batch of this shape
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, x: Tensor, target: Tensor, *, steps: Sequence[int] | None = None, divisor: int = 1
    ) -> tuple[Tensor, Tensor]:
        shape = tuple((b.shape, b.stride(), b.dtype) for b in (x, target))
        if shape not in self.inputs:
            self.inputs[shape] = x.clone(), target.clone()
        for held, given in zip(self.inputs[shape], (x, target), strict=True):
            held.copy_(given)
        self.own_gradients()
        key = tuple(steps or ()) if self.learning == "random" else (), shape, divisor
        if key not in self.graphs:
            self.graphs[key] = self.record(*self.inputs[shape], steps, divisor)
        graph, loss, logits = self.graphs[key]
        graph.replay()
        return loss.clone(), logits.clone()  # the next replay writes over them

    def own_gradients(self) -> None:
        """Let `.grad` be the tensors that the graphs add to, with the sums that it holds."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if p.grad is not gradient:
                gradient.zero_() if p.grad is None else gradient.copy_(p.grad)
                p.grad = gradient

    def record(self, x: Tensor, target: Tensor, steps: Sequence[int] | None, divisor: int) -> Recorded:
        """Run it `WARM_UP` times, put back what that has changed, and record it."""

        def run() -> tuple[Tensor, Tensor]:
            return online_backward(
                self.model, x, target, self.criterion, learning=self.learning, steps=steps,
                backward=lambda loss: (loss / divisor).backward(),
            )  # fmt: skip

        changed = [*self.gradients, *self.model.buffers()]
        before = [tensor.clone() for tensor in changed]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # weights that were cast before would be constants of the graph
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss, logits = run()
        torch.clear_autocast_cache()
        reset(self.model)  # synapses and potentials that it holds are the graph's
        return Recorded(graph, loss, logits)
