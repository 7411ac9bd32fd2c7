"""What a checker of types sees of the public names: mypy, run once over the lines below, as a user would write them."""

import re
from pathlib import Path

import pytest

import empf

ROOT = Path(__file__).parents[1]
# Read are the library and what of torch it shows; the rest would take a minute.
CONFIG = """
[mypy]
mypy_path = {site}
follow_imports = skip
[mypy-empf.*,torch,torch._tensor,torch._C.*,torch.autograd.*,torch.nn.*,torch.types,torch.utils._contextlib]
follow_imports = silent
"""
# behind each line its type, or `!` and a part of the error
LINES = """
empf.resnet18(num_clases=3)                                     ! Unexpected keyword argument "num_clases"
empf.resnet19(num_classes="3")                                  ! "num_classes" has incompatible type "str"
empf.ModelConfig(num_clases=3)                                  ! Unexpected keyword argument "num_clases"
empf.online_backward(net, x, x, loss, stpes=[1])                ! Unexpected keyword argument "stpes"
empf.EMPFNeuron(4, 8, spike_bit=4)                              ! Unexpected keyword argument "spike_bit"
empf.load_packed("file", nett=net)                              ! Unexpected keyword argument "nett"
empf.resnet34(num_classes=3, image_size=(8, 16), spike_bits=4)  SpikingNetwork
empf.build(empf.ModelConfig("vgg_snn", T=2))                    SpikingNetwork
net.eval().to("cpu")                                            SpikingNetwork
net(x)                                                          Tensor
net(x, steps=1, past=2)                                         Tensor
empf.pack(net)                                                  PackedModel
empf.load_packed("file", net=net)                               PackedModel
packed(x)                                                       Tensor
packed.step(x)                                                  Tensor
packed.save("file")                                             None
empf.export_onnx(packed, "file", x)                             None
empf.load("run")                                                SpikingNetwork
empf.from_pretrained("name")                                    SpikingNetwork | PackedModel
empf.SpikingNetwork.from_pretrained("name")                     SpikingNetwork
empf.PackedModel.from_pretrained("name")                        PackedModel
net.save_pretrained("folder")                                   None
packed.save_pretrained("folder")                                None
net.push_to_hub("name", private=True)                           str
packed.push_to_hub("name")                                      str
empf.online_backward(net, x, x, loss, steps=[1])                tuple[Tensor, Tensor]
empf.draw_steps(4, 1, 0, 0)                                     list[int]
empf.time_steps(net)                                            int | None
empf.reset(net)                                                 None
empf.account(net, x)                                            dict[Any, Any]
empf.spike_account(net, [(x, x)])                               dict[Any, Any]
empf.EMPFNeuron(None)(x)                                        Tensor
empf.EMPFNeuron(4).v                                            Tensor | None
empf.EMPFNeuron(4).leak                                         Tensor
empf.LIFNeuron(4).threshold                                     Tensor
empf.BinaryConv2d(1, 2, 3, groups=1, bias=True)(x)              Tensor
empf.BinaryConv1d(1, 2, 3).weight                               Tensor
empf.BinaryLinear(1, 2, kind="ternary")(x)                      Tensor
empf.StepBatchNorm(2)(x)                                        Tensor
empf.SECA()(x)                                                  Tensor
empf.PerStep(torch.nn.BatchNorm2d(2))(x)                        Tensor
"""
HEAD = """import torch
import empf
x, loss, net = torch.zeros(1), torch.nn.functional.cross_entropy, empf.resnet18()
packed = empf.pack(net)
"""


def test_a_checker_sees_wrong_keywords_and_the_types_of_what_comes_back(tmp_path):
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    package = tmp_path / "site" / "empf"  # as it is installed
    package.mkdir(parents=True)
    for path in [*(ROOT / "empf").iterdir(), ROOT / "kernels"]:
        (package / path.name).symlink_to(path)
    lines = [re.split(r"\s{2,}|(?=! )", line, maxsplit=1) for line in LINES.strip().splitlines()]
    wanted = [part.strip() for _, part in lines]
    code = [f"reveal_type({line.strip()})" for line, _ in lines]
    (tmp_path / "lines.py").write_text(HEAD + "\n".join(code) + "\n")
    (tmp_path / "mypy.ini").write_text(CONFIG.format(site=package.parent))
    options = [f"--{name}={tmp_path / file}" for name, file in (("config-file", "mypy.ini"), ("cache-dir", "cache"))]
    out, err, _ = api.run([*options, "--hide-error-context", "--no-error-summary", str(tmp_path / "lines.py")])
    assert err == ""
    found = dict.fromkeys(range(len(wanted)), "")
    for line, kind, text in re.findall(r"lines\.py:(\d+): (\w+): (.*)", out):
        number = int(line) - 1 - HEAD.count("\n")
        if kind == "error" and "does not return a value" not in text:
            found[number] += f"! {text}"
        elif text.startswith("Revealed") and not found[number]:
            found[number] = re.sub(r"[a-z_]+\.", "", re.search('"(.*)"', text)[1])
    for number, want in enumerate(wanted):
        assert found[number] == want or want[0] == "!" and want[2:] in found[number], (code[number], found[number])


def test_what_a_checker_calls_wrong_is_an_error_when_it_runs_too():
    with pytest.raises(ValueError, match="unknown model setting num_clases: choose from "):
        empf.resnet18(num_clases=3)
    with pytest.raises(ValueError, match="num_classes must be int, got '3'"):
        empf.resnet19(num_classes="3")
    with pytest.raises(TypeError):
        empf.resnet18(10)


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "empf" / "py.typed").is_file()
    assert 'empf = ["py.typed", ' in (ROOT / "pyproject.toml").read_text()
