"""Export of a packed network to ONNX, for people without this library: `pip install 'empf[onnx]'`.

images (N, C, H, W) or events (T, N, C, H, W), normalised float32  ->  logits (T, N, classes)
any other network: what it is called with, (T, N, ...)  ->  what it returns

The weights stand in the graph as dense float32 numbers, the T steps are unrolled, and N is free. The membrane potential
starts at 0 in each run; the prediction is the arg-max of the sum over T. Class names and normalisation are in the
file's metadata under `origin`, as JSON.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from empf.deploy.layers import PackedSynapse
from empf.deploy.lazy import plain
from empf.deploy.pack import PackedModel
from empf.files import write_atomic
from empf.machine import installed
from empf.models import SpikingNetwork
from empf.online import reset


class WholeSequence(nn.Module):
    """All T steps of a packed network as a function of the input alone."""

    def __init__(self, packed: PackedModel):
        super().__init__()
        self.net = copy.deepcopy(packed.net).cpu().eval()

    def forward(self, x: Tensor) -> Tensor:
        reset(self.net)
        y = plain(self.net(x))
        reset(self.net)
        return y


@torch.no_grad()
def export_onnx(packed: PackedModel, path: str | Path, x: Tensor | None = None) -> None:
    """Write `packed` as an ONNX file with the input `x` and the output `logits`, see the module's docstring.

    `x`: an example input of all T steps with at least two samples; a network of `empf.models` needs none (it is then
    exported for images, a VGG-SNN for events). Raises ValueError where an example is missing or the packages for it are
    not installed, OSError with one sentence where the disk refuses.

    >>> net = torch.nn.Sequential(empf.BinaryLinear(4, 2), empf.EMPFNeuron(1))
    >>> empf.export_onnx(empf.pack(net), "net.onnx", torch.zeros(1, 2, 4))
    """
    if missing := [name for name in ("onnx", "onnxscript") if installed(name) is None]:
        raise ValueError(f"the export needs {' and '.join(missing)}: pip install 'empf[onnx]'")
    builtin = isinstance(packed.net, SpikingNetwork)
    if x is None:
        if not builtin:
            raise ValueError("a network of your own needs an example: export_onnx(packed, path, x), x (T, N, ...)")
        c = packed.net.config
        x = torch.zeros(*[c.T] * (c.arch == "vgg_snn"), 2, c.in_channels, *c.size)
    batch = x.dim() - 4 if builtin else 1
    whole, x = WholeSequence(packed), x.detach().cpu()
    whole(x)
    for synapse in (m for m in whole.modules() if isinstance(m, PackedSynapse)):
        synapse.unpack()  # now: otherwise the unpacking would become part of the graph
    program = torch.onnx.export(
        whole, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["logits"],
        dynamic_shapes=({batch: torch.export.Dim("N", min=1)},),
    )  # fmt: skip
    proto = program.model_proto
    proto.metadata_props.add(key="origin", value=json.dumps(asdict(packed.origin)))
    write_atomic(Path(path), proto.SerializeToString())
