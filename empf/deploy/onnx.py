"""Export of a packed network to ONNX, for people without this library: `pip install 'empf[onnx]'`.

images (N, C, H, W) or events (T, N, C, H, W), normalised float32  ->  logits (T, N, classes)
any other network: what it is called with, (T, N, ...)  ->  what it returns

Binary weights stand in the file eight to a byte, ternary ones five to a byte, as codes of rows in a small table: a
runtime that folds constants (ONNX Runtime does) has the dense weights once the file is loaded, and computes as with any
other; n-bit spikes meet them in int8. The T steps are unrolled, and N is free. The membrane potential
starts at 0 in each run; the prediction is the arg-max of the sum over T. Class names and normalisation are in the
file's metadata under `origin`, as JSON.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from empf.checks import given
from empf.deploy.layers import PackedSynapse
from empf.deploy.lazy import plain
from empf.deploy.pack import PackedModel
from empf.files import write_atomic
from empf.machine import installed
from empf.models import SpikingNetwork
from empf.online import reset

# what the bytes of packed weights stand for: 8 signs, or 5 digits of -1, 0, 1
TABLES = {
    8: (1 - 2 * (np.arange(256)[:, None] >> np.arange(8) & 1)).astype(np.int8),
    5: (np.arange(243)[:, None] // 3 ** np.arange(5) % 3 - 1).astype(np.int8),
}


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
def export_onnx(packed: PackedModel, path: str | Path, x: Tensor | None = None, *, int8: bool = True) -> None:
    """Write `packed` as an ONNX file with the input `x` and the output `logits`, see the module's docstring.

    `x`: an example input of all T steps with at least two samples; a network of `empf.models` needs none (it is then
    exported for images, one of two channels for events). `int8`: n-bit spikes are added up in integers, with which
    ONNX Runtime is faster, OpenVINO slower. Raises ValueError where an example is missing or the packages for it are
    not installed, OSError with one sentence where the disk refuses.

    >>> net = torch.nn.Sequential(empf.BinaryLinear(4, 2), empf.EMPFNeuron(1))
    >>> empf.export_onnx(empf.pack(net), "net.onnx", torch.zeros(1, 2, 4))
    """
    if missing := [name for name in ("onnx", "onnxscript") if installed(name) is None]:
        raise ValueError(f"the export needs {' and '.join(missing)}: pip install 'empf[onnx]'")
    builtin = isinstance(given(packed, PackedModel, "what is exported is what empf.pack returns").net, SpikingNetwork)
    if x is None:
        if not builtin:
            raise ValueError("a network of your own needs an example: export_onnx(packed, path, x), x (T, N, ...)")
        c = packed.net.config
        x = torch.zeros(*[c.T] * (c.in_channels == 2), 2, c.in_channels, *c.size)
    batch = x.dim() - 4 if builtin else 1
    whole, x = WholeSequence(packed).eval(), x.detach().cpu()
    whole(x)
    for synapse in (m for m in whole.modules() if isinstance(m, PackedSynapse)):
        synapse.unpack()  # now: otherwise the unpacking would become part of the graph
    with quiet():
        program = torch.onnx.export(
            whole, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["logits"],
            dynamic_shapes=({batch: torch.export.Dim("N", min=1)},),
        )  # fmt: skip
    proto = program.model_proto
    if int8:
        sum_codes(proto.graph)
    slice_strides(proto.graph)
    compact(proto.graph)
    proto.metadata_props.add(key="origin", value=json.dumps(asdict(packed.origin)))
    write_atomic(Path(path), proto.SerializeToString())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporter says of torchvision, which nobody needs, and of its own use of old names."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(before)


def sum_codes(graph) -> None:
    """Make integer products of matrices of the products that `products_of_codes` finds.

    codes (N, C, H, W)  ->  what each output reads (N, OH, OW, kh * kw * C)  ->  int32 sums  ->  float (N, O, OH, OW)

    ONNX Runtime (1.32) takes five times as long for ConvInteger as for Conv, and longer for smaller products of this
    kind than for those of floats; QLinearConv rounds the sums to 8 bits.
    """
    from onnx import TensorProto, helper, numpy_helper

    products, nodes, made = products_of_codes(graph), list(graph.node), set()
    graph.ClearField("node")

    def constant(value: np.ndarray | list[int], name: str | None = None) -> str:
        value = np.array(value)
        name = name or str(value.tolist())
        if name not in made:
            made.add(name)
            graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def put(kind: str, *inputs: str, output: str | None = None, **options) -> str:
        """The output of such a node, which is made where it is not there."""
        name = output or f"{kind}({', '.join(inputs)}; {options})"
        if name not in made:
            made.add(name)
            graph.node.append(helper.make_node(kind, inputs, [name], **options))
        return name

    for node in nodes:
        if node.output[0] not in products:
            graph.node.append(node)
            continue
        x, (channels, *sizes), signs = products[node.output[0]]
        output, dims, axes = node.output[0], len(sizes), range(2, signs.ndim)
        if dims:
            options = {option.name: helper.get_attribute_value(option) for option in node.attribute}
            pads = options["pads"]
            x = put("Transpose", x, perm=[0, *axes, 1])
            x = put("Pad", x, constant([0, *pads[:dims], 0, 0, *pads[dims:], 0])) if any(pads) else x
            x = put("Reshape", x, constant([0, -1, channels]))
            position = reduce(partial(put, "Add"), map(constant, places(sizes, signs.shape[2:], **options)))
            x = put("Gather", x, position, axis=1)
            x = put("Reshape", x, constant([0] * (1 + dims) + [-1]))
        weight = signs.transpose(*axes, 1, 0).reshape(-1, len(signs)).astype(np.int8)
        x = put("MatMulInteger", x, constant(weight, f"{node.input[1]}.int8"))
        x = put("Cast", x, to=TensorProto.FLOAT, output=None if dims else output)
        if dims:
            put("Transpose", x, perm=[0, 1 + dims, *range(1, 1 + dims)], output=output)


def products_of_codes(graph) -> dict[str, tuple[str, list[int], np.ndarray]]:
    """Products in which each output adds up 256 or more uint8 codes: output -> codes, (C, ...), signs (O, C, ...)."""
    from onnx import TensorProto, helper, numpy_helper

    makers = {name: node for node in graph.node for name in node.output}
    about = {value.name: value.type.tensor_type for value in graph.value_info}
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    found = {}
    for node in graph.node:
        transposed = "transB" in {option.name for option in node.attribute if helper.get_attribute_value(option)}
        if len(node.input) != 2 or not (node.op_type == "Conv" or node.op_type == "Gemm" and transposed):
            continue
        cast, signs = makers.get(node.input[0]), values.get(node.input[1])
        if signs is None or cast is None or cast.op_type != "Cast" or cast.input[0] not in about:
            continue
        codes, kind = cast.input[0], about[cast.input[0]]
        shape = [size.dim_value for size in kind.shape.dim][1:]
        whole = kind.elem_type == TensorProto.UINT8 and all(shape) and shape[0] == signs.shape[1]  # not in groups
        if whole and signs[0].size >= 256 and np.isin(signs, (-1, 0, 1)).all():
            found[node.output[0]] = codes, shape, signs
    return found


def places(sizes: list[int], kernel: tuple[int, ...], pads, strides, dilations, **others) -> list[np.ndarray]:
    """For each axis what (*outputs, *kernel) reads of it; their sum is the position in padded inputs laid flat."""
    dims, found = len(sizes), []
    padded = [size + pads[i] + pads[dims + i] for i, size in enumerate(sizes)]
    for i, (size, k, stride, dilation) in enumerate(zip(padded, kernel, strides, dilations, strict=True)):
        read = np.arange(0, size - dilation * (k - 1), stride)[:, None] + dilation * np.arange(k)
        shape = [1] * (2 * dims)
        shape[i], shape[dims + i] = read.shape
        found.append(read.reshape(shape) * math.prod(padded[i + 1 :]))
    return found


def slice_strides(graph) -> None:
    """Let convolutions of 1x1 with a stride read a slice: OpenVINO (2026.4) mistakes the shapes behind such strides."""
    from onnx import helper, numpy_helper

    nodes = list(graph.node)
    graph.ClearField("node")
    for node in nodes:
        options = {option.name: option.ints for option in node.attribute}
        if node.op_type == "Conv" and max(options["kernel_shape"]) == 1 < max(options["strides"]):
            strides, found = options["strides"], f"{node.output[0]}.slice"
            dims = len(strides)
            cut = {"start": [0] * dims, "end": [2**31 - 1] * dims, "axes": range(2, 2 + dims), "steps": strides}
            values = [numpy_helper.from_array(np.array(value), f"{found}.{name}") for name, value in cut.items()]
            graph.initializer.extend(values)
            graph.node.append(helper.make_node("Slice", [node.input[0], *(value.name for value in values)], [found]))
            node.input[0] = found
            strides[:] = [1] * dims
        graph.node.append(node)


def compact(graph) -> None:
    """Pack the weights of a graph and drop from it what only describes: names, traces, shapes."""
    from onnx import numpy_helper

    keep, made, tables = [], [], {}
    read = {name for node in graph.node for name in node.input}
    for weight in (value for value in graph.initializer if value.name in read):
        dense = numpy_helper.to_array(weight)
        weights = dense.ndim > 1 and dense.size >= 256 and dense.dtype in (np.float32, np.int8)
        parts = packed_weight(dense) if weights else None
        if parts is None:
            keep.append(weight)
            continue
        digits, codes, scale = parts
        tables[digits] = numpy_helper.from_array(TABLES[digits], f"table{digits}")
        made += unpacking(weight.name, digits, dense)
        values = {"codes": codes, "scale": scale, "shape": np.array(dense.shape), "size": np.array([dense.size])}
        values |= {"zero": np.array([0]), "flat": np.array([-1])}
        keep += [numpy_helper.from_array(value, f"{weight.name}.{name}") for name, value in values.items()]
    nodes = [*made, *graph.node]
    used = {name for node in nodes for name in node.input}
    keep = [value for value in (*keep, *tables.values()) if value.name in used]
    for field in ("node", "initializer", "value_info", "metadata_props"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.initializer.extend(keep)
    names = {"": "", **{value.name: value.name for value in (*graph.input, *graph.output)}}
    for part in (*graph.node, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("name")
        for listed in (node.input, node.output):
            listed[:] = [names.setdefault(name, f"t{len(names):x}") for name in listed]
    for value in graph.initializer:
        value.name = names[value.name]


def packed_weight(dense: np.ndarray) -> tuple[int, np.ndarray, np.ndarray] | None:
    """(digits to a byte, codes uint8, scale) of a weight of one size, or 0, per output; None for any other weight."""
    for axis in (0, dense.ndim - 1):  # a product of matrices has its outputs last
        sizes = np.abs(dense)
        scale = sizes.max(axis=tuple(i for i in range(dense.ndim) if i != axis), keepdims=True)
        if scale.size < dense.size and ((sizes == 0) | (sizes == scale)).all():
            break
    else:
        return None
    digits, base = (5, 3) if (dense == 0).any() else (8, 2)
    signs = np.sign(dense).astype(int).reshape(-1)
    values = signs + 1 if base == 3 else (signs < 0).astype(int)
    values = np.pad(values, (0, -len(values) % digits)).reshape(-1, digits)
    return digits, (values @ base ** np.arange(digits)).astype(np.uint8), scale.astype(np.float32)


def unpacking(name: str, digits: int, dense: np.ndarray) -> list:
    """The nodes that make the dense weight `name` of its codes, shape and scale; signs alone where it is in int8."""
    from onnx import TensorProto, helper

    codes, index, found = f"{name}.codes", f"{name}.index", f"{name}.rows"
    nodes = [
        helper.make_node("Cast", [codes], [index], to=TensorProto.INT32),
        helper.make_node("Gather", [f"table{digits}", index], [found]),
    ]
    if dense.size % digits:  # the last byte holds more than the weight
        line, found = f"{name}.line", f"{name}.cut"
        nodes += [
            helper.make_node("Reshape", [f"{name}.rows", f"{name}.flat"], [line]),
            helper.make_node("Slice", [line, f"{name}.zero", f"{name}.size"], [found]),
        ]
    if dense.dtype == np.int8:
        return nodes + [helper.make_node("Reshape", [found, f"{name}.shape"], [name])]
    return nodes + [
        helper.make_node("Reshape", [found, f"{name}.shape"], [f"{name}.signs"]),
        helper.make_node("Cast", [f"{name}.signs"], [f"{name}.floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.floats", f"{name}.scale"], [name]),
    ]
