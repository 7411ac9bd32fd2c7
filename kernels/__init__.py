"""Bit-packed matrix product and convolution, and the fused spiking neuron, in Triton. See README.md in this folder."""

from .conv import binary_conv2d, binary_conv2d_ref
from .conv_neuron import binary_conv2d_neuron, binary_conv2d_neuron_ref
from .dispatch import backend, set_backend
from .flip import flip_update, flip_update_ref
from .matmul import binary_matmul, binary_matmul_ref
from .neuron import neuron_update, neuron_update_ref, quantize_spikes
from .norm_neuron import bn_neuron, bn_neuron_ref, mem_bn_neuron, mem_bn_neuron_ref
from .pack import PackedWeight, pack, unpack
from .tune import set_tuning

__all__ = [
    "PackedWeight", "backend", "binary_conv2d", "binary_conv2d_neuron", "binary_conv2d_neuron_ref", "binary_conv2d_ref",
    "binary_matmul", "binary_matmul_ref", "bn_neuron", "bn_neuron_ref", "flip_update", "flip_update_ref",
    "mem_bn_neuron", "mem_bn_neuron_ref", "neuron_update", "neuron_update_ref", "pack", "quantize_spikes",
    "set_backend", "set_tuning", "unpack",
]  # fmt: skip
