"""Training that starts from weights that are there, and leaves some of them as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from empf.runs import read_config
from empf.terminal import shown

NAMED = 6  # of what was not taken


@torch.no_grad()
def take_weights(model: nn.Module, source: nn.Module, classes: Sequence[str]) -> str:
    """Give the model what `source` has under the same names in the same shapes; returns what was taken, for people.

    The head is taken only where `source` does not know its classes, or they are `classes`. A packed network has no
    latent weights, and folded norms: binary or ternary weights start from its signs, at the mean size of those of the
    model, norms and neurons anew. Raises ValueError where no weight fits.
    """
    packed, own = hasattr(source, "net"), model.state_dict()
    if packed:
        found, known = dict(source.net.state_dict()), source.origin.classes
        for part, module in source.net.named_modules():
            if hasattr(module, "bits") and (latent := own.get(f"{part}.weight")) is not None:
                found[f"{part}.weight"] = module.effective_weight().sign() * latent.abs().mean()
    else:
        found = source.state_dict()
        known = read_config(source.run).get("classes", ()) if hasattr(source, "run") else ()
    lacking = {}
    for name, tensor in own.items():
        if name not in found:
            lacking[name] = "not in it"
        elif found[name].shape != tensor.shape:
            there, here = ("x".join(map(str, t.shape)) or "1" for t in (found[name], tensor))
            lacking[name] = f"{there} in it, {here} here"
        elif name.startswith("head.") and known and list(known) != list(classes):
            lacking[name] = "other classes"
        else:
            tensor.copy_(found[name])
    taken = own.keys() - lacking
    if not any(name.endswith(".weight") and own[name].dim() > 1 for name in taken):
        raise ValueError(
            "no weight of --init-from fits this network: give the --arch and --width that it was trained with"
        )
    lacking |= {} if packed else dict.fromkeys((name for name in found if name not in own), "not here")
    words = [f"{name} ({why})" for name, why in lacking.items()]
    words[NAMED:] = [f"{len(words) - NAMED} more"] if len(words) > NAMED else []
    return shown(f"{len(taken)} of {len(own)} tensors" + (f"; not taken: {', '.join(words)}" if words else ""), 1000)


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
