"""Export of a packed network to ONNX, for people without this library: `pip install 'empf[onnx]'`.

images (N, C, H, W) or events (T, N, C, H, W), normalised float32  ->  logits (T, N, classes)

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

from empf.deploy.layers import PackedSynapse, Span
from empf.deploy.pack import PackedModel
from empf.files import write_atomic
from empf.machine import installed


class WholeSequence(nn.Module):
    """All T steps of a packed network as a function of the input alone."""

    def __init__(self, packed: PackedModel, events: bool):
        super().__init__()
        self.packed, self.events = packed, events

    def forward(self, x: Tensor) -> Tensor:
        span = Span(slice(0, self.packed.config.T), [None] * self.packed.neurons, last=True)
        return self.packed.compute(x if self.events else x.unsqueeze(0), span)


@torch.no_grad()
def export_onnx(packed: PackedModel, path: str | Path, *, events: bool | None = None) -> None:
    """Write `packed` as an ONNX file with the input `x` and the output `logits`, see the module's docstring.

    `events`: whether x has frames of T steps; by default where the network is a VGG-SNN. Raises ValueError where the
    packages for it are not installed, OSError with one sentence where the disk refuses.
    """
    if missing := [name for name in ("onnx", "onnxscript") if installed(name) is None]:
        raise ValueError(f"the export needs {' and '.join(missing)}: pip install 'empf[onnx]'")
    c = packed.config
    events = c.arch == "vgg_snn" if events is None else events
    whole = WholeSequence(copy.deepcopy(packed).cpu(), events).eval()
    x = torch.zeros(*[c.T] * events, 2, c.in_channels, c.image_size, c.image_size)
    for synapse in (m for m in whole.modules() if isinstance(m, PackedSynapse)):
        for dtype in (torch.float32, torch.uint8):  # now: otherwise the unpacking would become part of the graph
            synapse.dense(dtype)
    program = torch.onnx.export(
        whole, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["logits"],
        dynamic_shapes=({int(events): torch.export.Dim("N", min=1)},),
    )  # fmt: skip
    proto = program.model_proto
    proto.metadata_props.add(key="origin", value=json.dumps(asdict(packed.origin)))
    write_atomic(Path(path), proto.SerializeToString())
