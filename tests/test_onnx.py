"""The exported graph gives the logits of the packed network, in another runtime."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from deploy_tools import logits, shallow, trained

import empf
from bench.deploy import Compiled
from empf.deploy import onnx as empf_onnx
from empf.deploy.onnx import export_onnx
from empf.deploy.origin import Origin
from empf.deploy.pack import pack
from empf.deploy.predict import top_classes
from empf.machine import installed
from empf.synapse import QuantizedWeight


@pytest.mark.filterwarnings("ignore")  # of the exporter, about its own packages
@pytest.mark.parametrize(
    "settings",
    [
        dict(arch="resnet19", weights="ternary", granularity="layer", shortcut="current", width=0.0625),
        dict(arch="vgg_snn", neuron="mem_bn", seca=2, spike_bits=4, parallel=0.5, width=0.5),
    ],
    ids=str,
)
def test_onnxruntime_gives_the_logits_of_the_packed_network(settings, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, x = shallow(monkeypatch, **settings, T=2)  # x: digits
    packed = pack(model)
    packed.origin = Origin("drawn", tuple("abcdefghij"), (0.3,), (0.4,), resized=True)
    export_onnx(packed, tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for part in (x, x[..., :1, :, :, :]):  # batches of another size than the one that was traced
        found = torch.from_numpy(session.run(None, {"x": part.numpy()})[0])
        wanted = logits(packed, part)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
        if installed("openvino"):
            found = Compiled(tmp_path / "net.onnx")(part)
            assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    graph = onnx.load(tmp_path / "net.onnx").graph
    operators = {node.op_type for node in graph.node}
    largest = {"binary": 8, "ternary": 5}[packed.net.config.weights]
    sizes = [m.weight.numel() for m in model.modules() if isinstance(m, QuantizedWeight)]
    weights = sum(n for n in sizes if n >= 256)
    codes = [value for value in graph.initializer if value.data_type == onnx.TensorProto.UINT8]
    assert weights / largest <= sum(len(value.raw_data) for value in codes) <= weights / largest + len(codes)
    assert "ScatterElements" not in operators  # 15 times slower: writing one step into all of them
    assert ("MatMulInteger" in operators) == (model.config.spike_bits is not None)
    assert "Conv" in operators and not {"BitShift", "BitwiseAnd", "Loop", "If"} & operators
    assert json.loads(session.get_modelmeta().custom_metadata_map["origin"])["classes"] == list("abcdefghij")
    if packed.config.arch != "vgg_snn":
        check_the_program_for_pictures(packed, tmp_path, monkeypatch, capsys)


COUNTED = [  # shapes of codes and weights, what the convolution does, whether in integers
    ((2, 32, 5, 6), (4, 32, 3, 3), dict(padding=1), True),
    ((2, 32, 7, 8), (4, 32, 3, 3), dict(padding=(2, 0), stride=(2, 3), dilation=(1, 2)), True),
    ((2, 256, 4, 5), (3, 256, 1, 1), dict(stride=2), True),
    ((2, 64, 9), (5, 64, 4), dict(padding=1, stride=2), True),
    ((2, 300), (7, 300), {}, True),
    ((2, 28, 5, 6), (4, 28, 3, 3), dict(padding=1), False),  # 252 to add up
    ((2, 64, 5, 6), (4, 32, 3, 3), dict(groups=2), False),
]


@pytest.mark.parametrize("shape, weights, place, whether", COUNTED, ids=str)
@pytest.mark.parametrize("digits", [8, 5])
def test_products_of_codes_are_exact_in_integers(shape, weights, place, whether, digits, tmp_path):
    """And their weights packed in the file, dense in int8 once it is loaded."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    helper, kinds, dims = onnx.helper, onnx.TensorProto, len(shape) - 2
    x = torch.randint(0, 256, shape).float()
    signs = torch.randint(0, 2, weights) * 2 - 1 if digits == 8 else torch.randint(-1, 2, weights)
    kernel, options = (torch.conv1d, torch.conv2d)[dims - 1] if dims else torch.nn.functional.linear, {"transB": 1}
    if dims:
        each = {name: [n] * dims if isinstance(n := place.get(name, 1), int) else n for name in ("stride", "dilation")}
        pads = [place.get("padding", 0)] * dims if isinstance(place.get("padding", 0), int) else place["padding"]
        options = dict(kernel_shape=weights[2:], pads=[*pads, *pads], strides=each["stride"])
        options |= dict(dilations=each["dilation"], group=place.get("groups", 1))
    nodes = [
        helper.make_node("Cast", ["x"], ["codes"], to=kinds.UINT8),
        helper.make_node("Cast", ["codes"], ["floats"], to=kinds.FLOAT),
        helper.make_node("Conv" if dims else "Gemm", ["floats", "w"], ["y"], **options),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", kinds.FLOAT, ["N", *shape[1:]])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, None)],
        [onnx.numpy_helper.from_array(signs.float().numpy(), "w")],
        value_info=[helper.make_tensor_value_info("codes", kinds.UINT8, ["N", *shape[1:]])],
    )  # fmt: skip
    empf_onnx.sum_codes(graph)
    empf_onnx.compact(graph)
    operators = {node.op_type for node in graph.node}
    assert ("MatMulInteger" in operators) == whether
    assert bool({"Conv", "Gemm"} & operators) != whether
    packed = sum(len(value.raw_data) for value in graph.initializer if value.data_type == kinds.UINT8)
    assert packed == -(-signs.numel() // digits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    loaded = runtime.SessionOptions()
    loaded.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    session = runtime.InferenceSession(model.SerializeToString(), loaded, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert torch.equal(found, kernel(x, signs.float(), **place))
    graph = onnx.load(tmp_path / "loaded.onnx").graph
    dense = {tuple(value.dims) for value in graph.initializer if value.data_type == kinds.INT8}
    assert not whether or dense == {(signs[0].numel(), len(signs))}


@pytest.mark.filterwarnings("ignore")  # of the exporter, about its own packages
@pytest.mark.parametrize("int8", [True, False])
def test_integers_can_be_declined(int8, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    net = torch.nn.Sequential(torch.nn.Linear(4, 256), empf.EMPFNeuron(1, spike_bits=4), empf.BinaryLinear(256, 3))
    packed, x = pack(net.eval()), torch.randn(1, 2, 4)
    export_onnx(packed, tmp_path / "net.onnx", x, int8=int8)
    operators = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert ("MatMulInteger" in operators) == int8
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert torch.allclose(found, logits(packed, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel, pad, stride, slices", [(1, 0, 2, 1), (1, 0, 1, 0), (3, 1, 2, 0)])
def test_strides_of_small_kernels_become_slices(kernel, pad, stride, slices):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    floats = onnx.TensorProto.FLOAT
    options = dict(kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(4, 3, kernel, kernel)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"], **options)], "net",
        [onnx.helper.make_tensor_value_info("x", floats, ["N", 3, 5, 6])],
        [onnx.helper.make_tensor_value_info("y", floats, None)], [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )  # fmt: skip
    empf_onnx.slice_strides(graph)
    assert [node.op_type for node in graph.node] == ["Slice"] * slices + ["Conv"]
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert torch.allclose(found, torch.conv2d(x, weight, stride=stride, padding=pad), atol=1e-5)


@pytest.mark.parametrize("arch, channels, dims", [("vgg_snn", 1, 4), ("vgg_snn", 2, 5), ("resnet18", 2, 5)])
def test_networks_of_two_channels_are_exported_for_events(monkeypatch, tmp_path, arch, channels, dims):
    """Whatever the architecture; and others for images."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")

    class Asked(Exception):
        pass

    def export(whole, inputs, **options):
        raise Asked(inputs[0].dim())

    monkeypatch.setattr(torch.onnx, "export", export)
    packed = pack(empf.build(empf.ModelConfig(arch, in_channels=channels, image_size=16, width=0.0625, T=2)).eval())
    with pytest.raises(Asked, match=f"^{dims}$"):
        export_onnx(packed, tmp_path / "net.onnx")


def check_the_program_for_pictures(packed, folder, monkeypatch, said) -> None:
    """examples/classify_onnx.py says of a picture what `--image` says."""
    from PIL import Image

    image = Image.effect_noise((30, 20), 90)
    image.getexif()[0x0112] = 6  # turned
    image.save(folder / "a.jpg", exif=image.getexif())
    monkeypatch.setattr(sys, "argv", ["classify_onnx.py", str(folder / "net.onnx"), str(folder / "a.jpg")])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "classify_onnx.py"))
    wanted = top_classes(packed, folder / "a.jpg", k=3)
    assert said.readouterr().out.splitlines() == [f"{share:6.1%}  {name}" for name, share in wanted]


def test_without_the_packages_the_export_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(empf_onnx, "installed", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("needs onnx and onnxscript: pip install 'empf[onnx]'")):
        export_onnx(pack(trained()[0]), tmp_path / "net.onnx")
