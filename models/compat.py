"""The one cure for a torch and a torchvision that were built for different devices.

diffusers, timm, torch-fidelity and the `accelerate` command import torchvision. The wheel on the package index is built against CUDA;
beside a CPU build of torch its extension does not load, and the import stops at "operator torchvision::nms does not exist" (then
`qnms`). None of them calls those operators here, so declaring their schemas is enough: for what imports `models` first, and, where
`install` was called, for every program of the environment.
"""

import importlib.abc
import importlib.util
import sys
import sysconfig
from pathlib import Path

HOOK = "fading_shortcuts_torchvision.pth"
# Python runs the line of a .pth file at every start; it must not fail where the project has been moved away.
LINE = 'import sys; exec("try:\\n import models.compat as c\\n c.watch()\\nexcept ImportError: pass")\n'
_declared: list[object] = []  # a library's schemas vanish with it


def declare_operators() -> bool:
    """Declare torchvision's operators if it is there and its extension cannot be loaded; returns whether that was so."""
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    folder = Path(found.origin).parent
    extension = next((path for pattern in ("_C*.so", "_C*.pyd") for path in folder.glob(pattern)), None)
    try:
        torch.ops.load_library(str(extension))
        return False
    except (OSError, RuntimeError):
        if not _declared:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
        return True


class _Watch(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision is imported, once."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()


def watch() -> None:
    """Cure torchvision just before it is looked for or imported, if it needs that. `models` calls this, and so does the hook."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def install() -> None:
    """Let this environment cure itself whenever torchvision is imported, if it needs that."""
    if declare_operators():
        Path(sysconfig.get_path("purelib"), HOOK).write_text(LINE)
        print("torchvision's extension does not fit this torch; its operators are declared whenever it is imported")
