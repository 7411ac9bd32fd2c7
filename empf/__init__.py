"""Online-trained spiking neural networks with floating-point spikes and 1-bit synapses (arXiv 2410.07547)."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch loads: on a busy machine, long spinning crawls
if not (Path(__file__).parent / "kernels").is_dir():  # a checkout, where `kernels/` lies beside this folder
    __path__.append(str(Path(__file__).parents[1]))  # an installed package holds it itself

from empf.accounting import account, spike_account
from empf.attention import SECA
from empf.deploy.hub import from_pretrained
from empf.deploy.nir import to_nir
from empf.deploy.onnx import export_onnx
from empf.deploy.pack import PackedModel, load_packed, pack
from empf.diagnose.separability import measure_separability
from empf.evaluate import calibrate
from empf.layer import StepBatchNorm
from empf.machine import VERSION
from empf.models import ModelConfig, SpikingNetwork, build, resnet18, resnet19, resnet34, vgg_snn
from empf.neuron import EMPFNeuron, LIFNeuron
from empf.norms import PerStep, freeze_norm
from empf.online import draw_steps, online_backward, reset, set_online, time_steps
from empf.runs import load
from empf.synapse import BinaryConv1d, BinaryConv2d, BinaryLinear

__version__ = VERSION
__all__ = [
    "BinaryConv1d", "BinaryConv2d", "BinaryLinear", "EMPFNeuron", "LIFNeuron", "ModelConfig", "PackedModel",
    "PerStep", "SECA", "SpikingNetwork", "StepBatchNorm", "account", "build", "calibrate", "draw_steps",
    "export_onnx", "freeze_norm", "from_pretrained", "load", "load_packed", "measure_separability", "online_backward",
    "pack", "reset", "resnet18", "resnet19", "resnet34", "set_online", "spike_account", "time_steps", "to_nir",
    "vgg_snn",
]  # fmt: skip
