"""Training that starts from weights that are there, and leaves some of them as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from empf.runs import read_config
from empf.terminal import shown

NAMED = 6  # of what was not taken


@torch.no_grad()
def take_weights(model: nn.Module, source: nn.Module, classes: Sequence[str], name: str = "it") -> str:
    """Give the model what `source` has under the same names in the same shapes; returns a line that says what it lacks.

    The head is taken only where `source` does not know its classes or knows these, in this order. A packed network has
    no latent weights and folded norms: those that are binary or ternary start from the signs, at the mean size of those
    of the model, norms and neurons anew. `name`: of the source, for people. Raises ValueError where no weight fits.
    """
    own, found = model.state_dict(), dict(getattr(source, "net", source).state_dict())
    for part, module in getattr(source, "net", source).named_modules():
        if hasattr(module, "bits") and (latent := own.get(f"{part}.weight")) is not None:
            found[f"{part}.weight"] = module.effective_weight().sign() * latent.abs().mean()
    if hasattr(source, "net"):
        known = source.origin.classes
    else:
        known = read_config(source.run).get("classes", ()) if hasattr(source, "run") else ()
    lacking = {}
    for at, tensor in own.items():
        if at not in found:
            lacking[at] = "not in it"
        elif found[at].shape != tensor.shape:
            there, here = ("x".join(map(str, t.shape)) or "1" for t in (found[at], tensor))
            lacking[at] = f"{there} in it, {here} here"
        elif at.startswith("head.") and known and list(known) != list(classes):
            lacking[at] = "other classes"
        else:
            tensor.copy_(found[at])
    if not any(at.endswith(".weight") and tensor.dim() > 1 for at, tensor in own.items() if at not in lacking):
        raise ValueError(
            f"no weight of {name} fits this network: give the --arch, --width and --T that it was trained with"
        )
    words = [f"{at} ({why})" for at, why in lacking.items()]
    more = [f"{len(words) - NAMED} more"] if len(words) > NAMED else []
    anew = f"; new: {', '.join(words[:NAMED] + more)}" if words else ""
    return shown(f"started from {name}, {len(own) - len(lacking)} of {len(own)} tensors{anew}", 1000)


def freeze(model: nn.Module, patterns: str | None) -> set[str]:
    """Take the parameters whose names fit one of the patterns (`stem*,blocks.0.*`) out of the training; their names.

    A norm or neuron all of whose parameters are frozen keeps its running statistics and uses them. Raises ValueError
    for a pattern that fits nothing, and where nothing is left to train.
    """
    names, frozen = [name for name, _ in model.named_parameters()], set()
    weights = [name for name in names if name.endswith(".weight")]
    some = ", ".join(weights[at * (len(weights) - 1) // 4] for at in range(5))
    for pattern in (patterns or "").split(",") if patterns is not None else ():
        fitting = [name for name in names if fnmatchcase(name, pattern.strip())]
        if not fitting:
            raise ValueError(f"--freeze {pattern.strip()!r} fits no parameter; some of their names: {some}")
        frozen.update(fitting)
    if len(frozen) == len(names):
        raise ValueError(f"--freeze {patterns!r} leaves nothing to train; some of the names: {some}")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if hasattr(module, "frozen_norm") and own and not any(p.requires_grad for p in own):
            module.frozen_norm = True
    return frozen
