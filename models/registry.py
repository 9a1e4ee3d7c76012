"""The one table of backbones and their sizes."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from torch import nn

from models.files import INDEX, has_averages, is_checkpoint, read_json
from models.shortcut import alpha_min_for


@dataclass(frozen=True)
class Backbone:
    """A row of the table.

    Attributes:
        module, class_name: where it lives; loaded on first use.
        task: "diffusion" (images and times -> a prediction of the same shape) or "mae" (masked autoencoder).
        sizes: name -> arguments of the class.
    """

    module: str
    class_name: str
    task: str
    sizes: dict[str, dict[str, Any]]

    def load(self) -> type[nn.Module]:
        """The class."""
        return getattr(import_module(self.module), self.class_name)


# What is loaded at most: far above every published network, and far below what would stop the machine.
LARGEST = {"depth": 256, "decoder_depth": 256, "layers_per_block": 64, "image_size": 8192, "num_classes": 10**6}
MOST, MOST_POSITIONS = 2**16, 2**28

# XS is for CPUs and 32 px; the others are those of DiT / SiT, U-ViT, DDPM (CIFAR-10) and MAE.
BACKBONES: dict[str, Backbone] = {
    "dit": Backbone(
        "models.dit",
        "DiT",
        "diffusion",
        {
            "XS": dict(depth=8, dim=192, num_heads=3, patch_size=4),
            "S": dict(depth=12, dim=384, num_heads=6),
            "B": dict(depth=12, dim=768, num_heads=12),
            "L": dict(depth=24, dim=1024, num_heads=16),
            "XL": dict(depth=28, dim=1152, num_heads=16),
        },
    ),
    "uvit": Backbone(
        "models.uvit",
        "UViT",
        "diffusion",
        {
            "XS": dict(depth=8, dim=192, num_heads=3, patch_size=4),
            "S": dict(depth=12, dim=512, num_heads=8),
            "M": dict(depth=16, dim=768, num_heads=12),
            "L": dict(depth=20, dim=1024, num_heads=16),
            "H": dict(depth=28, dim=1152, num_heads=16),
        },
    ),
    "unet": Backbone(
        "models.unet",
        "UNet",
        "diffusion",
        {
            "XS": dict(channels=(32, 64, 128), layers_per_block=2, attention_levels=(1, 2)),
            "S": dict(channels=(128, 256, 256, 256), layers_per_block=2, attention_levels=(1,), head_dim=256, norm_groups=32),
        },
    ),
    "mae": Backbone(
        "models.mae",
        "MAE",
        "mae",
        {
            "XS": dict(depth=6, dim=192, num_heads=3, decoder_depth=4, decoder_dim=128, decoder_num_heads=4, patch_size=4),
            "S": dict(depth=12, dim=384, num_heads=6, decoder_depth=8, decoder_dim=256, decoder_num_heads=8),
            "B": dict(depth=12, dim=768, num_heads=12, decoder_depth=8, decoder_dim=512, decoder_num_heads=16),
            "L": dict(depth=24, dim=1024, num_heads=16, decoder_depth=8, decoder_dim=512, decoder_num_heads=16),
            "H": dict(depth=32, dim=1280, num_heads=16, decoder_depth=8, decoder_dim=512, decoder_num_heads=16, patch_size=14),
        },
    ),
}


def names(task: str) -> tuple[str, ...]:
    """The backbones for a task."""
    return tuple(name for name, backbone in BACKBONES.items() if backbone.task == task)


def sizes(task: str) -> tuple[str, ...]:
    """The names of sizes that any backbone for a task has."""
    return tuple(dict.fromkeys(size for backbone in BACKBONES.values() if backbone.task == task for size in backbone.sizes))


def in_words(backbone: str, size: str, depth: int | None = None) -> str:
    """A network's name, such as "dit-XS"; with `depth`, where it has other blocks than its size, "dit-XS of 24 blocks"."""
    return f"{backbone}-{size}" + (f" of {depth} blocks" if depth else "")


def takes(backbone: str, option: str) -> bool:
    """Whether a backbone's class has that argument."""
    return option in inspect.signature(BACKBONES[backbone].load()).parameters


def create_model(backbone: str, size: str | None = None, alpha_eff: float | None = None, **options: Any) -> nn.Module:
    """Build a backbone by name.

    Args:
        backbone: a key of `BACKBONES`.
        size: one of its sizes, or None to give depth, dim and num_heads yourself.
        alpha_eff: ask for a schedule by the share of the input that reaches the last layer, instead of by alpha_min.
        options: arguments of the backbone's class; they win over the size's, and None stands for the class's own default.

    Raises:
        ValueError: an unknown name, with the known ones, or arguments that the backbone refuses.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"there is no backbone {backbone!r}; choose from {', '.join(BACKBONES)}")
    row = BACKBONES[backbone]
    if size is not None and size not in row.sizes:
        raise ValueError(f"{backbone} has no size {size!r}; choose from {', '.join(row.sizes)}")
    kind = row.load()
    options = {**(row.sizes[size] if size else {}), **{name: value for name, value in options.items() if value is not None}}
    unknown = [name for name in options if not takes(backbone, name)]
    if unknown:
        raise ValueError(f"the backbone {backbone} has no {', '.join(unknown)}; leave that away or choose another backbone")
    if alpha_eff is not None:
        if options.get("alpha_min", 1.0) != 1:
            raise ValueError("give alpha_min or alpha_eff, not both")
        with torch.device("meta"):
            kinds = [shortcut.kind for shortcut in kind(**options).shortcuts]
        chosen = [each for each in kinds if options.get("shortcut_placement", "both") in ("both", each)]
        options["alpha_min"] = alpha_min_for(len(chosen), alpha_eff, options.get("shortcut_schedule", "linear"))
    return kind(**options)


def backbone_class(class_name: str) -> type[nn.Module]:
    """The backbone whose class has that name (as a checkpoint's index names it).

    Raises:
        ValueError: none has.
    """
    for backbone in BACKBONES.values():
        if backbone.class_name == class_name:
            return backbone.load()
    raise ValueError(f"there is no backbone class {class_name!r}")


def read_index(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its network as "model": [module, class], "class_names", "training", ...

    Raises:
        ValueError: not the folder of a checkpoint.
    """
    path = Path(path)
    if not is_checkpoint(path):
        hint = "; its first checkpoint is not written yet" if (path / "config.json").is_file() else ""
        raise ValueError(f"{path} is not a checkpoint: it holds no {INDEX}{hint}; give the folder of a run or of a shipped checkpoint")
    index = read_json(path / INDEX)
    if not isinstance(index, dict):
        raise ValueError(f"{path / INDEX} holds a {type(index).__name__}, not names and values; take the file from the original")
    return index


def check_config(kind: type[nn.Module], config: Any) -> None:
    """Look through what a file says of a network, before time and memory are taken for it.

    Raises:
        ValueError: not what its arguments are, or larger than any network of ours.
    """
    if not isinstance(config, dict):
        raise ValueError(f"its config is a {type(config).__name__}, not names and values")
    for name, hint in get_type_hints(kind.__init__).items():
        value = tuple(config[name]) if isinstance(config.get(name), list) else config.get(name)
        if name not in config:
            continue
        allowed = {float: int | float, Sequence: tuple}.get(get_origin(hint) or hint, hint)
        if not isinstance(value, allowed) or (isinstance(value, bool) and hint in (int, float)):
            raise ValueError(f"{name} is {str(value)[:50]!r} in its config, and must be a {getattr(hint, '__name__', hint)}")
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, int | float)]
        if isinstance(value, tuple) and (len(numbers) < len(value) or len(value) > LARGEST["depth"]):
            raise ValueError(f"{name} is {str(value)[:50]} in its config, and must be a few numbers")
        if any(not abs(number) <= LARGEST.get(name, MOST) for number in numbers):
            raise ValueError(f"{name} is {str(value)[:50]} in its config, more than the {LARGEST.get(name, MOST):,} that are loaded")
    patch, widths = config.get("patch_size", 1), (config.get("dim", 1), config.get("decoder_dim", 1))
    if patch < 1 or (config.get("image_size", 1) / patch) ** 2 * max(widths) > MOST_POSITIONS:
        raise ValueError(f"image_size {config.get('image_size')} in patches of {patch} makes more tokens than are loaded")


def load_backbone(path: str | Path, ema: bool = True, torch_dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of a run or of a shipped checkpoint, whatever its task, in evaluation mode.

    Args:
        path: a folder with `model_index.json` beside `model/`, or `ema/` where there are averaged weights.
        ema: prefer the averaged weights.
        torch_dtype: of the parameters.

    Raises:
        ValueError: not such a folder, or its weights do not fit its config.
    """
    path, index = Path(path), read_index(path)
    folder = path / ("ema" if ema and has_averages(path) else "model")
    try:
        kind = backbone_class(index["model"][1])
        check_config(kind, read_json(folder / "config.json"))
        return kind.from_pretrained(folder, torch_dtype=torch_dtype).eval()
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"the checkpoint {path} cannot be loaded: {error}") from error


def backbone_name(model: nn.Module) -> str:
    """The key under which a model's class stands in the table."""
    return next(name for name, backbone in BACKBONES.items() if backbone.class_name == type(model).__name__)
