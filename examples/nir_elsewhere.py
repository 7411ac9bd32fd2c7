"""What empf.to_nir wrote, in snnTorch 1.0 or SpikingJelly 2.0, with equal spikes.

Both read a hard reset into NIR, which has no word for the soft one; so the neurons are set after the import.
Needs `pip install snntorch nirtorch` or `pip install spikingjelly nirtorch`. `graph`: nir.read(FILE).
"""

import torch
from torch import nn


def in_snntorch(graph) -> nn.Module:
    """For one step after the other: net(x (N, ...)) -> (output, state), then net(x, state)."""
    import snntorch
    from snntorch.import_nir import import_from_nir

    net = import_from_nir(graph)
    for module in net.modules():
        if isinstance(module, snntorch.Leaky):
            module.reset_mechanism, module.state_function = "subtract", module._base_sub
            module.mem_reset = torch.zeros_like  # one reset, in the step of the spike
        elif isinstance(module, nn.Flatten):
            module.start_dim = 1  # NIR counts without the samples
    return net


def in_spikingjelly(graph) -> nn.Module:
    """For one step after the other: net(x (N, ...), None) -> (output, state), then net(x, state)."""
    from spikingjelly.activation_based import neuron, nir_exchange

    net = nir_exchange.import_from_nir(graph)
    for module in net.modules():
        if isinstance(module, neuron.LIFNode):
            module.v_reset = None
    return net
