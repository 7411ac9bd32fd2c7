"""What a forward pass leaves in memory for the backward pass, counted."""

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from empf.evaluate import restored
from empf.neuron import StatefulNeuron
from empf.online import reset


class Storages(TorchDispatchMode):
    """Notes the storage of every tensor that is made while it is active, without keeping any alive."""

    def __init__(self):
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}  # reference -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self) -> dict[StorageWeakRef, int]:
        return {ref: size for ref, size in self.made.items() if not ref.expired()}


def saved_for_backward(model: nn.Module, x: Tensor, *, past: int = 0, steps: int = 1) -> dict[str, int]:
    """Run `model(x, steps=steps, past=past)` on a reset model and count what is alive after it.

    Returns {"bytes", "tensors"}: size and number of distinct storages that exist only for the backward pass, and
    {"potentials"}: bytes of the membrane potentials that the neurons hold for the next step, which are not among them.
    Not counted: the input, the logits, parameters, buffers, and the synapses' effective weights. How a tensor is held
    does not matter, so any implementation is counted the same way. The model is left reset, otherwise as it was.
    """
    reset(model)
    with restored(model):
        with Storages() as made:
            logits = model(x, steps=steps, past=past)
        neurons = [m for m in model.modules() if isinstance(m, StatefulNeuron)]
        kept = {StorageWeakRef(t.untyped_storage()) for t in [x, logits, *model.parameters(), *model.buffers()]}
        kept |= {StorageWeakRef(m._formed[1].untyped_storage()) for m in model.modules() if getattr(m, "_formed", None)}
        held = {StorageWeakRef(n.v.untyped_storage()) for n in neurons if n.v is not None}
        alive = made.alive()
    potentials = sum(size for ref, size in alive.items() if ref in held)
    saved = {ref: size for ref, size in alive.items() if ref not in held and ref not in kept}
    return {"bytes": sum(saved.values()), "potentials": potentials, "tensors": len(saved)}
