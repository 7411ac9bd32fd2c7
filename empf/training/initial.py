"""The weights with which a training begins, where they are not those with which torch makes a network."""

import torch
from torch import nn

from empf.models import SpikingNetwork
from empf.synapse import QuantizedWeight
from empf.training.config import TrainConfig

LARGEST = 0.001


@torch.no_grad()
def begun(model: SpikingNetwork, config: TrainConfig) -> SpikingNetwork:
    """A new network, with what `config` asks for drawn anew; where it asks for nothing, no number is drawn.

    latent_init "positive": latent weights uniform in 0..0.001, so that all signs are plus.
    stem_init "normal": standard deviation sqrt(2 / fan-out), Kaiming's for ReLU (arXiv 1502.01852).
    """
    if config.latent_init == "positive":
        for module in model.modules():
            if isinstance(module, QuantizedWeight):
                nn.init.uniform_(module.weight, 0.0, LARGEST)
    if config.stem_init == "normal":
        nn.init.kaiming_normal_(model.stem.conv.weight, mode="fan_out", nonlinearity="relu")
    return model
