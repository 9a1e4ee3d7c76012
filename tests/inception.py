"""An Inception of random weights, for tests and benchmarks: the real ones have to be downloaded, and cost as much time."""

from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from eval.extractors import INCEPTION


def write_inception(path: Path) -> Path:
    """Write torch-fidelity's Inception as its weights file, with weights that carry the signal to the end; returns the path."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    unloaded = patch.object(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    with patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}), unloaded:
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3(INCEPTION, ["2048"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.8, 1.2)
            nn.init.normal_(layer.bias, std=0.1)
    torch.save(network.state_dict(), path)
    return path
