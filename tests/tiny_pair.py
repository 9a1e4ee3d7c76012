"""A plain and a decayed checkpoint that sample in milliseconds, for the tests of the page."""

from pathlib import Path

import torch

from models import DiT, Pipeline
from models.pipeline import SAMPLERS

PLAIN, DECAYED = PAIR = "runs/tiny-plain", "runs/tiny-decayed"
CLASSES = ("circles", "squares", "<b>{{odd}} & ${names}</b>")


def write_pair(runs: Path) -> Path:
    """Write them, with random weights everywhere; returns the folder of runs."""
    for name, alpha_min in (("tiny-plain", 1.0), ("tiny-decayed", 0.6)):
        torch.manual_seed(0)
        model = DiT(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, num_classes=3, alpha_min=alpha_min)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        training = {"steps": 7, "images_seen": 1234, "data": "shapes"}
        Pipeline(model, SAMPLERS["euler"](), CLASSES, training).save_pretrained(runs / name)
    return runs
