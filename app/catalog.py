"""Which checkpoints there are. Clients give names; only a name that this catalogue lists ever becomes a path."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from app.libraries import load_libraries
from models.files import AVERAGES_SAVED, INDEX, WEIGHTS_SAVED, has_averages, is_checkpoint, read_json, sha256

PRETRAINED = Path(__file__).parent.parent / "models" / "pretrained"
RUNS_PREFIX = "runs/"
NUMBERS = (
    *("value", "low", "high", "num_samples", "reference_num", "train_num", "test_num", "images_seen"),
    *("steps", "seed", "guidance_scale", "alpha_min", "alpha_eff"),
)  # of a result file
Version = tuple[tuple[str, int, int], ...]  # path, time of change in ns and size of each file
MAX_RESULT_BYTES = 8 * 2**20  # a larger file in eval/ is none of ours


@dataclass(frozen=True)
class Source:
    """The weights that a name stands for.

    Attributes:
        folder: the checkpoint's, which holds the index and what all its weights share.
        averaged: the averaged ones (EMA); else as trained.
        step: those of a checkpoint that the training left at that step; None: the newest.
    """

    folder: Path
    averaged: bool
    step: int | None = None

    @property
    def exported(self) -> Path:
        """The newest weights of that kind, with the config of the network."""
        return self.folder / ("ema" if self.averaged else "model")

    @property
    def snapshot(self) -> Path:
        """What the training left at `step`."""
        return self.folder / "checkpoints" / f"step-{self.step}"

    @property
    def is_newest(self) -> bool:
        """Whether they are what the checkpoint stands for: the newest, averaged where there are averages."""
        return self.step is None and self.averaged == has_averages(self.folder)

    @property
    def files(self) -> list[Path]:
        """All that decides what is sampled."""
        parts = [self.exported, self.folder / "scheduler", self.folder / "vae"]
        found = [self.folder / INDEX, *(file for part in parts if part.is_dir() for file in sorted(part.iterdir()))]
        if self.step is not None:
            found += [self.snapshot / name for name in ([AVERAGES_SAVED] if self.averaged else WEIGHTS_SAVED)]
        return [file for file in found if file.is_file()]

    @property
    def version(self) -> Version:
        """Changes when the files do."""
        return _version(self.files)

    @property
    def hash(self) -> str:
        """Of the contents of all files: 16 hexadecimal digits."""
        return hash_of_version(self.version)


@lru_cache(maxsize=4096)
def hash_of_version(version: Version) -> str:
    """See `Source.hash`; the files are read once, and again after a change.

    Raises:
        OSError: they have changed since they had that version.
    """
    found = hashlib.sha256("".join(sha256(Path(file)) for file, _, _ in version).encode()).hexdigest()[:16]
    if version != _version([Path(file) for file, _, _ in version]):
        raise OSError(f"{version[0][0]} and what belongs to it has just changed")
    return found


def _version(files: Sequence[Path]) -> Version:
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file in files for stat in [file.stat()])


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint without loading its weights.

    Attributes:
        name: as the catalogue lists it.
        source: its files.
        backbone: class of the network.
        config: arguments of that class.
        num_parameters: of the network.
        averaged: whether it samples with averaged weights (EMA).
        class_names: of its labels, in order; empty if it is unconditional.
        training: what the checkpoint went through: steps, images_seen, data, ...; keys may be missing.
    """

    name: str
    source: Source
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
        load_libraries()
        from models.shortcut import describe

        return describe(self._network().shortcuts) + ", learned" * bool(self.config.get("learnable_alpha"))

    @property
    def alphas(self) -> tuple[float, ...]:
        """Of the sub-layers, in the order of execution; where they are learned, as they started."""
        return self._network().alphas

    def _network(self) -> Any:
        """Without weights."""
        load_libraries()
        import torch

        from models.registry import backbone_class

        with torch.device("meta"):
            return backbone_class(self.backbone).from_config({**self.config, "learnable_alpha": False})

    @property
    def alpha_eff(self) -> float:
        """Share of the input that reaches the last layer by the shortcuts alone."""
        return math.prod(self.alphas)

    @property
    def family(self) -> tuple[Any, ...]:
        """Equal for checkpoints that differ in alpha and weights alone."""
        data = Path(str(self.training.get("data"))).name  # of a shipped one no more is known
        return self.backbone, sorted({**self.config, "alpha_min": None}.items()), self.class_names, data


def checkpoints(runs: Path) -> dict[str, Source]:
    """Name -> weights of everything that can be sampled: the shipped ones, then `runs/NAME`.

    Hidden folders (written aside) and links that lead out of their root are left out.
    """
    return {name: _newest(folder) for name, folder in folders(runs).items() if _samples(folder)}


def variants(runs: Path) -> dict[str, Source]:
    """`checkpoints`, each followed by its other weights: as trained, and those of earlier steps."""
    found = {}
    for name, source in checkpoints(runs).items():
        found[name] = source
        kinds = [kind for kind in (True, False) if (source.folder / ("ema" if kind else "model")).is_dir()]
        for step in (None, *_earlier_steps(source.folder)):
            for averaged in kinds:
                if (step, averaged) != (None, source.averaged):
                    words = [name, *[f"step {step}"] * (step is not None), *["raw"] * (source.averaged and not averaged)]
                    found.setdefault(" ".join(words), Source(source.folder, averaged, step))
    return found


def sources(runs: Path) -> dict[str, Source]:
    """Name -> weights of everything that can be judged: `variants`, and the masked autoencoders."""
    return {**variants(runs), **{name: _newest(folder) for name, folder in autoencoders(runs).items()}}


def autoencoders(runs: Path) -> dict[str, Path]:
    """Name -> folder of the masked autoencoders."""
    return {name: folder for name, folder in folders(runs).items() if _backbone(folder) == "MAE"}


def folders(runs: Path) -> dict[str, Path]:
    """Name -> folder of everything that has an index; see `checkpoints`."""
    return _folders(PRETRAINED, "") | _folders(runs, RUNS_PREFIX)


def _folders(root: Path, prefix: str) -> dict[str, Path]:
    if not root.is_dir():
        return {}
    inside = root.resolve()
    found = sorted(folder for folder in root.iterdir() if not folder.name.startswith(".") and is_checkpoint(folder))
    return {f"{prefix}{folder.name}": folder for folder in found if folder.resolve().parent == inside}


def _newest(folder: Path) -> Source:
    return Source(folder, has_averages(folder))


def _earlier_steps(folder: Path) -> list[int]:
    """Of the checkpoints that the training left, newest first, without the one that was exported."""
    names = (file.parent.name.removeprefix("step-") for file in folder.glob("checkpoints/step-*/manifest.json"))
    exported = _index(folder).get("training", {}).get("steps")
    return sorted((int(name) for name in names if name.isdecimal() and int(name) != exported), reverse=True)


def _index(folder: Path) -> dict[str, Any]:
    """Empty if it is damaged, which is told when the checkpoint is asked for."""
    try:
        return _index_of(folder, (folder / INDEX).stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=1024)
def _index_of(folder: Path, changed_ns: int) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    return index if isinstance(index, dict) else {}


def _backbone(folder: Path) -> str | None:
    kind = _index(folder).get("model")
    return kind[1] if isinstance(kind, list) and len(kind) == 2 else None


def _samples(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that paints: a masked autoencoder has no scheduler. A damaged one is told later."""
    index = _index(folder)
    return not index or "scheduler" in index


def find(name: str, runs: Path) -> Source:
    """The weights that a name stands for.

    Raises:
        ValueError: the catalogue has no such name.
    """
    return _in(variants(runs), name)


def _in(known: Mapping[str, Source], name: Any) -> Source:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"there is no checkpoint {str(name)[:100]!r}; " + (f"choose from {_few(known)}" if known else "none is there yet"))
    return known[name]


def _few(names: Any, most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def card(name: str, runs: Path) -> Card:
    """Read a checkpoint's card.

    Raises:
        ValueError: the catalogue has no such name, or its files are damaged.
    """
    return cards_of([name], runs)[0]


def cards_of(names: Iterable[str], runs: Path) -> list[Card]:
    """The cards of several checkpoints; the folders are looked through once.

    Raises:
        ValueError: as `card`.
    """
    known = variants(runs)
    return [_card(name, _in(known, name)) for name in names]


def card_if_whole(name: str, known: Mapping[str, Source]) -> Card | None:
    """The card of one of `variants`; None where it is not among them any more, or damaged."""
    try:
        return _card(name, known[name])
    except (KeyError, ValueError):
        return None


def _card(name: str, source: Source) -> Card:
    """Of weights that were found already."""
    try:
        index, config = read_json(source.folder / INDEX), read_json(source.exported / "config.json")
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        class_names = tuple(map(str, index.get("class_names", ()))) or tuple(map(str, range(config["num_classes"])))
        return Card(
            name=name,
            source=source,
            backbone=index["model"][1],
            config=config,
            num_parameters=_count_parameters(source.exported),
            averaged=source.averaged,
            class_names=class_names[: config["num_classes"]],
            training=_training(source, index.get("training", {})),
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint {name} is damaged ({type(error).__name__}: {error})") from error


def _training(source: Source, newest: dict[str, Any]) -> dict[str, Any]:
    """What the weights went through; of an earlier step less than the newest."""
    if source.step is None:
        return newest
    told = {key: value for key, value in newest.items() if key != "images_seen"} | {"steps": source.step}
    try:
        config = read_json(source.folder / "config.json")
        told["images_seen"] = config.get("images_before", 0) + source.step * config["images_a_step"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the run does not tell
    return told


def results(card: Card) -> list[dict[str, Any]]:
    """What a checkpoint's `eval/*.json` say: "metric", "value" and their protocol. None for other weights than the newest."""
    return _results(card.source.folder) if card.source.is_newest else []


def all_results(runs: Path) -> dict[str, list[dict[str, Any]]]:
    """The same of everything that has an index."""
    return {name: _results(folder) for name, folder in folders(runs).items()}


def _results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in sorted((folder / "eval").glob("*.json")):
        try:
            told = read_json(file) if file.stat().st_size <= MAX_RESULT_BYTES else None
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and isinstance(told.get("metric"), str):
            found += numbers_of(told)
    return found


def numbers_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every number of a result file, each with the protocol of all: FD, KD, precision, ... may come of one pass.

    What should be a number and is none is left out: the file may come from anywhere.
    """
    others = result.get("metrics")
    if isinstance(others, dict):
        shared = {key: value for key, value in result.items() if key not in ("metrics", "value", "low", "high")}
        found = [{**shared, "metric": name, **each} for name, each in others.items() if isinstance(each, dict)]
    else:
        found = [result]
    found = [{key: value for key, value in each.items() if key not in NUMBERS or _is_number(value)} for each in found]
    return [each for each in found if "value" in each]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    for name, source in checkpoints(runs).items():
        try:
            found[name] = _card(name, source)
        except ValueError as error:
            print(f"left out of the page: {error}", flush=True)
    return found


def default_pair(known: dict[str, Card]) -> tuple[str, str] | None:
    """A plain and a decayed checkpoint of one family, else the first two, else the only one twice; None if there is none.

    Of several the shipped ones, in their order, else those that have seen the most images, else those that are called most alike.
    """

    def rank(card: Card) -> tuple[bool, float]:
        shipped, seen = not card.name.startswith(RUNS_PREFIX), card.training.get("images_seen")
        return shipped, seen if not shipped and isinstance(seen, int | float) else 0

    for plain in sorted((card for card in known.values() if card.is_plain), key=rank, reverse=True):
        decayed = [card for card in known.values() if not card.is_plain and card.family == plain.family]
        if decayed:
            return plain.name, max(decayed, key=lambda card: (rank(card), SequenceMatcher(None, card.name, plain.name).ratio())).name
    names = list(known)[:2]
    return (names[0], names[-1]) if names else None


def shared_classes(*chosen: Card) -> list[str]:
    """Class names that all of them know, in the order of the first."""
    return [name for name in chosen[0].class_names if all(name in card.class_names for card in chosen)] if chosen else []


@overload
def label_index(card: Card, label: None) -> None: ...


@overload
def label_index(card: Card, label: str | int) -> int: ...


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
