"""Which checkpoints there are. Clients give names; only a name that this catalogue lists ever becomes a path."""

import math
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from models.files import INDEX, read_json

PRETRAINED = Path(__file__).parent.parent / "models" / "pretrained"
RUNS_PREFIX = "runs/"


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint without loading its weights.

    Attributes:
        name: as the catalogue lists it.
        backbone: class of the network.
        config: arguments of that class.
        num_parameters: of the network.
        averaged: whether it samples with averaged weights (EMA).
        class_names: of its labels, in order; empty if it is unconditional.
        training: what the checkpoint went through: steps, images_seen, data, ...; keys may be missing.
    """

    name: str
    backbone: str
    config: dict[str, Any]
    num_parameters: int
    averaged: bool
    class_names: tuple[str, ...]
    training: dict[str, Any]

    @property
    def alpha_min(self) -> float:
        """The schedule's; 1 is the plain network."""
        return self.config["alpha_min"]

    @property
    def is_plain(self) -> bool:
        """Every shortcut keeps all of its input; told without torch, so another schedule counts as another network."""
        return self.alpha_min == 1 and self.config.get("shortcut_schedule", "linear") == "linear" and not self.config.get("learnable_alpha")

    @property
    def shortcuts(self) -> str:
        """How the shortcuts fade, in words."""
        from models.shortcut import describe

        return describe(self._network().shortcuts) + ", learned" * bool(self.config.get("learnable_alpha"))

    @property
    def alphas(self) -> tuple[float, ...]:
        """Of the sub-layers, in the order of execution; where they are learned, as they started."""
        return self._network().alphas

    def _network(self) -> Any:
        """Without weights."""
        import torch  # later than the page's first answer

        from models.registry import backbone_class

        with torch.device("meta"):
            return backbone_class(self.backbone).from_config({**self.config, "learnable_alpha": False})

    @property
    def alpha_eff(self) -> float:
        """Share of the input that reaches the last layer."""
        return math.prod(self.alphas)

    @property
    def family(self) -> tuple[Any, ...]:
        """Equal for checkpoints that differ in alpha and weights alone."""
        return self.backbone, sorted({**self.config, "alpha_min": None}.items()), self.class_names, self.training.get("data")


def checkpoints(runs: Path) -> dict[str, Path]:
    """Name -> folder of everything that can be loaded: the shipped ones, then `runs/NAME`.

    Hidden folders (written aside) and links that lead out of their root are left out.
    """
    return _folders(PRETRAINED, "") | _folders(runs, RUNS_PREFIX)


def _folders(root: Path, prefix: str) -> dict[str, Path]:
    if not root.is_dir():
        return {}
    inside = root.resolve()
    folders = sorted(folder for folder in root.iterdir() if not folder.name.startswith(".") and _samples(folder))
    return {f"{prefix}{folder.name}": folder for folder in folders if folder.resolve().parent == inside}


def _samples(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that paints: a masked autoencoder has no scheduler. A damaged one is told later."""
    try:
        return (folder / INDEX).is_file() and "scheduler" in read_json(folder / INDEX)
    except ValueError:
        return True


def find(name: str, runs: Path) -> Path:
    """The folder of a checkpoint.

    Raises:
        ValueError: the catalogue has no such name.
    """
    known = checkpoints(runs)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"there is no checkpoint {name!r}; " + (f"choose from {', '.join(known)}" if known else "none is there yet"))
    return known[name]


def card(name: str, runs: Path) -> Card:
    """Read a checkpoint's card.

    Raises:
        ValueError: the catalogue has no such name, or its files are damaged.
    """
    path = find(name, runs)
    weights = path / ("ema" if (path / "ema").is_dir() else "model")
    try:
        index, config = read_json(path / INDEX), read_json(weights / "config.json")
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        class_names = tuple(map(str, index.get("class_names", ()))) or tuple(map(str, range(config["num_classes"])))
        return Card(
            name=name,
            backbone=index["model"][1],
            config=config,
            num_parameters=_count_parameters(weights),
            averaged=weights.name == "ema",
            class_names=class_names[: config["num_classes"]],
            training=index.get("training", {}),
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint {name} is damaged ({type(error).__name__}: {error})") from error


def _count_parameters(weights: Path) -> int:
    """From the headers of the weight files."""
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for file in weights.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error
    return total


def cards(runs: Path) -> dict[str, Card]:
    """The cards of all checkpoints that can be read."""
    found = {}
    for name in checkpoints(runs):
        try:
            found[name] = card(name, runs)
        except ValueError as error:
            print(f"left out of the page: {error}", flush=True)
    return found


def default_pair(known: dict[str, Card]) -> tuple[str, str] | None:
    """A plain and a decayed checkpoint of one family, else the first two, else the only one twice; None if there is none."""
    for plain in (card for card in known.values() if card.is_plain):
        decayed = [card for card in known.values() if not card.is_plain and card.family == plain.family]
        if decayed:  # of several, the one that is called most alike
            return plain.name, max(decayed, key=lambda card: SequenceMatcher(None, card.name, plain.name).ratio()).name
    names = list(known)[:2]
    return (names[0], names[-1]) if names else None


def shared_classes(*chosen: Card) -> list[str]:
    """Class names that all of them know, in the order of the first."""
    return [name for name in chosen[0].class_names if all(name in card.class_names for card in chosen)] if chosen else []


def label_index(card: Card, label: str | int | None) -> int | None:
    """The number of a label that is given by name or by number; None stands for "no label".

    Raises:
        ValueError: the checkpoint does not know it.
    """
    if label is None:
        return None
    if label in card.class_names:
        return card.class_names.index(label)
    if not card.class_names:
        raise ValueError(f"{card.name} was trained without labels; choose no label")
    try:
        number = int(label)
    except (TypeError, ValueError):
        raise ValueError(f"{card.name} has no label {label!r}; choose from {', '.join(card.class_names)}") from None
    if not 0 <= number < len(card.class_names):
        raise ValueError(f"label {number} is out of range; {card.name} knows 0 to {len(card.class_names) - 1}")
    return number
