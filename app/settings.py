"""What is sampled: the settings that all sides of a comparison share, and those of their own. Checked here, whoever asks."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MAX_SIDES = 4
MAX_IMAGES = 64
MAX_STEPS = 250
MAX_GUIDANCE = 100.0
MAX_SEED = 2**53 - 1 - MAX_IMAGES  # browsers know no larger whole numbers
RANDOM_SEED = -1
OWN_SAMPLER = "own"
NO_LABEL = "no label"  # what widgets, programs and grids call none
MAX_TEXT = 200  # characters of a name


@dataclass(frozen=True)
class Settings:
    """How images are sampled.

    Attributes:
        label: name or number of a class; None samples without a label.
        seed: image i comes from noise seeded seed + i; `RANDOM_SEED` draws one.
        num_images: 1 to `MAX_IMAGES`.
        steps: of the sampler, 1 to `MAX_STEPS`.
        guidance_scale: classifier-free guidance, 0 to 100; 1 is none.
        sampler: one that suits the checkpoint (see `Pipeline.samplers`); `OWN_SAMPLER` is its own, Euler for a flow.

    Raises:
        ValueError: a value of another kind or out of range.
    """

    label: str | int | None = None
    seed: int = RANDOM_SEED
    num_images: int = 8
    steps: int = 20
    guidance_scale: float = 2.0
    sampler: str = OWN_SAMPLER

    def __post_init__(self) -> None:
        checked = {
            "seed": whole("seed", self.seed, RANDOM_SEED, MAX_SEED),
            "num_images": whole("the number of images", self.num_images, 1, MAX_IMAGES),
            "steps": whole("steps", self.steps, 1, MAX_STEPS),
            "guidance_scale": _number("guidance", self.guidance_scale, 0, MAX_GUIDANCE),
            "sampler": _word("sampler", self.sampler),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if isinstance(self.label, bool) or not isinstance(self.label, str | int | None):
            raise ValueError(f"the label must be the name or the number of a class, not {str(self.label)[:MAX_TEXT]}")
        if isinstance(self.label, str):
            _word("label", self.label)


SETTINGS = tuple(each.name for each in fields(Settings))
OWN = tuple(name for name in SETTINGS if name != "num_images")  # what one side may have of its own


@dataclass(frozen=True)
class Side:
    """A checkpoint of a comparison.

    Attributes:
        checkpoint: a name of the catalogue.
        own: settings that differ from the shared ones, by name.
    """

    checkpoint: str
    own: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _word("checkpoint", self.checkpoint)
        if unknown := set(self.own) - set(OWN):
            raise ValueError(f"{_short(sorted(map(str, unknown))[0])} cannot be set for one checkpoint alone; {', '.join(OWN)} can")


@dataclass(frozen=True)
class Comparison:
    """Checkpoints on the same noise.

    Raises:
        ValueError: fewer checkpoints than one or more than `MAX_SIDES`, or settings as in `Settings`.
    """

    shared: Settings
    sides: tuple[Side, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.sides) <= MAX_SIDES:
            raise ValueError(f"a comparison shows 1 to {MAX_SIDES} checkpoints, not {len(self.sides)}")
        for side in self.sides:
            self.of(side)

    @classmethod
    def of_names(cls, names: Sequence[str], **settings: Any) -> "Comparison":
        """The same settings for all."""
        return cls(Settings(**settings), tuple(map(Side, names)))

    def of(self, side: Side) -> Settings:
        """The settings of a side."""
        return Settings(**{**asdict(self.shared), **side.own})

    def settled(self) -> "Comparison":
        """With a seed drawn where one is to be drawn, and without the overrides that override nothing."""
        shared = _drawn(asdict(self.shared))
        sides = []
        for side in self.sides:
            own = {name: value for name, value in side.own.items() if value != getattr(self.shared, name)}  # -1 and -1 are one draw
            sides.append(Side(side.checkpoint, {name: value for name, value in _drawn(own).items() if value != shared[name]}))
        return Comparison(Settings(**shared), tuple(sides))

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**asdict(self.shared), "checkpoints": [{"name": side.checkpoint, "own": dict(side.own)} for side in self.sides]}

    @classmethod
    def from_json(cls, told: Any) -> "Comparison":
        """From `as_json`, or a recipe, which tells more; it may come from anywhere.

        Raises:
            ValueError: anything else.
        """
        sides = told.get("checkpoints") if isinstance(told, dict) else None
        if not isinstance(sides, list) or not all(isinstance(side, dict) and isinstance(side.get("own", {}), dict) for side in sides):
            raise ValueError("these are no settings of a comparison")
        shared = {name: told[name] for name in SETTINGS if name in told}
        return cls(Settings(**shared), tuple(Side(side.get("name"), side.get("own", {})) for side in sides))


def _drawn(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "seed": secrets.randbelow(2**31)} if settings.get("seed") == RANDOM_SEED else settings


def _short(value: Any) -> str:
    return str(value)[:MAX_TEXT]


def _wrong(value: Any) -> str:
    return "is missing" if value is None else f"cannot be {_short(repr(value))}"


def whole(what: str, value: Any, least: int, most: int) -> int:
    """A whole number in a range.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or not least <= value <= most:
        raise ValueError(f"{what} {_wrong(value)}; give a whole number from {least:,} to {most:,}")
    return int(value)


def steps_in_words(number: Any) -> str:
    """1 step, 2 steps."""
    return f"{number} step{'s' * (number != 1)}"


def _number(what: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{what} {_wrong(value)}; give a number from {least:g} to {most:g}")
    return float(value)


def _word(what: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
        raise ValueError(f"there is no {what} {_short(repr(value))}")
    return value
