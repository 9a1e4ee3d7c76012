"""Decayed residual shortcuts, backbones that use them, and the pipeline that samples. Names load on first use."""

from importlib import import_module
from typing import Any

from models.compat import watch

watch()  # diffusers, timm and torch-fidelity, which may import torchvision, come later

_HOMES = {
    "decayed_add": "shortcut",
    "linear_schedule": "shortcut",
    "effective_alpha": "shortcut",
    "alpha_min_for": "shortcut",
    "alpha_window": "shortcut",
    "decay_shortcuts": "apply",
    "restore_shortcuts": "apply",
    "create_model": "registry",
    "DiT": "dit",
    "UViT": "uvit",
    "UNet": "unet",
    "MAE": "mae",
    "Pipeline": "pipeline",
    "from_official": "official",
    "to_official": "official",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(import_module(f"models.{_HOMES[name]}"), name)
