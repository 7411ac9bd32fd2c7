"""Online-trained spiking neural networks with floating-point spikes and 1-bit synapses (arXiv 2410.07547)."""

from empf.accounting import account, spike_account
from empf.attention import SECA
from empf.calibration import calibrate
from empf.deploy import PackedModel, load_packed, pack, unpack
from empf.models import ModelConfig, SpikingNetwork, build, resnet18, resnet19, resnet34, vgg_snn
from empf.neuron import EMPFNeuron, LIFNeuron
from empf.online import draw_steps, freeze_norm, online_backward, reset, set_online
from empf.runs import load
from empf.separability import measure_separability
from empf.synapse import BinaryConv2d, BinaryLinear

__version__ = "0.1.0"
__all__ = [
    "SECA", "BinaryConv2d", "BinaryLinear", "EMPFNeuron", "LIFNeuron", "ModelConfig", "PackedModel", "SpikingNetwork",
    "account", "build", "calibrate", "draw_steps", "freeze_norm", "load", "load_packed",
    "measure_separability", "online_backward", "pack", "reset", "resnet18", "resnet19", "resnet34", "set_online",
    "spike_account", "unpack", "vgg_snn",
]  # fmt: skip
