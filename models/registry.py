"""The one table of backbones and their sizes."""

from typing import Any

from torch import nn

from models.dit import DiT

# XS is for CPUs and 32 px; S to XL are DiT's and SiT's.
BACKBONES: dict[str, tuple[type[nn.Module], dict[str, dict[str, int]]]] = {
    "dit": (
        DiT,
        {
            "XS": dict(depth=8, dim=192, num_heads=3),
            "S": dict(depth=12, dim=384, num_heads=6),
            "B": dict(depth=12, dim=768, num_heads=12),
            "L": dict(depth=24, dim=1024, num_heads=16),
            "XL": dict(depth=28, dim=1152, num_heads=16),
        },
    ),
}
SIZES = tuple(dict.fromkeys(size for _, sizes in BACKBONES.values() for size in sizes))


def create_model(backbone: str, size: str | None = None, **options: Any) -> nn.Module:
    """Build a backbone by name.

    Args:
        backbone: a key of `BACKBONES`.
        size: one of its sizes, or None to give depth, dim and num_heads yourself.
        options: arguments of the backbone's class; they win over the size's.

    Raises:
        ValueError: an unknown name, with the known ones, or arguments that the backbone refuses.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"there is no backbone {backbone!r}; choose from {', '.join(BACKBONES)}")
    backbone_class, sizes = BACKBONES[backbone]
    if size is not None and size not in sizes:
        raise ValueError(f"{backbone} has no size {size!r}; choose from {', '.join(sizes)}")
    return backbone_class(**{**(sizes[size] if size else {}), **options})


def backbone_class(class_name: str) -> type[nn.Module]:
    """The backbone whose class has that name (as a checkpoint's index names it).

    Raises:
        ValueError: none has.
    """
    for candidate, _ in BACKBONES.values():
        if candidate.__name__ == class_name:
            return candidate
    raise ValueError(f"there is no backbone class {class_name!r}")
