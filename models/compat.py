"""The one cure for a torch and a torchvision that were built for different devices."""

import importlib
import sys

import torch

# The library must outlive the import: its schemas vanish when it is collected.
_schemas: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision even where its compiled operators cannot load.

    diffusers, timm and torch-fidelity import torchvision. The wheel on the package index is built against CUDA; beside a
    CPU build of torch its extension does not load, and the import stops at "operator torchvision::nms does not exist"
    (then `qnms`). Nothing here calls those operators, so declaring their schemas is enough. Where the import works, or where
    torchvision is not installed, this does nothing more.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
