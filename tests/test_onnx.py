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
        dict(arch="resnet19", weights="ternary", granularity="layer", shortcut="current"),
        dict(arch="vgg_snn", neuron="mem_bn", seca=2, spike_bits=4, parallel=0.5),
    ],
    ids=str,
)
def test_onnxruntime_gives_the_logits_of_the_packed_network(settings, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, x = shallow(monkeypatch, **settings, width=0.0625, T=2)  # x: digits
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
    assert "Conv" in operators and not {"BitShift", "BitwiseAnd", "Loop", "If"} & operators
    assert json.loads(session.get_modelmeta().custom_metadata_map["origin"])["classes"] == list("abcdefghij")
    if packed.config.arch != "vgg_snn":
        check_the_program_for_pictures(packed, tmp_path, monkeypatch, capsys)


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
