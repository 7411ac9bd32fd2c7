"""Bit-packed matrix product and convolution, and the fused spiking neuron, in Triton. See README.md in this folder."""

from .dispatch import backend, set_backend

__all__ = ["backend", "set_backend"]
