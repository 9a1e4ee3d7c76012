"""A grid: checkpoints x the values of one setting, as one labelled picture."""

import csv
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from app.catalog import cards, cards_of, label_index, shared_classes
from app.sampler import Frame, Frames, sample
from app.settings import NO_LABEL, Comparison, Settings, Side, steps_in_words

SEED, STEPS, GUIDANCE, LABEL, ALPHA_MIN = AXES = ("seed", "steps", "guidance_scale", "label", "alpha_min")
MAX_COLUMNS = 12
MAX_VALUES = 300  # characters
CELL_PX = 96  # edges of enlarged images come near to that
GAP_PX, FONT_PX = 6, 15
INK, PAPER = (30, 41, 59), (255, 255, 255)


@dataclass(frozen=True)
class Plan:
    """What is sampled for a grid, and where it goes.

    Attributes:
        asked: the checkpoints and settings, without overrides.
        axis, values: what varies, as it was asked for.
        title: what all cells share.
        rows, columns: labels.
        comparisons: sampled one after another.
        cells: of every row, from left to right: which comparison, side and image; None stays empty.
        notes: what of that which was asked for is left out, a sentence each.
    """

    asked: Comparison
    axis: str
    values: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    cells: tuple[tuple[tuple[int, int, int] | None, ...], ...]
    notes: tuple[str, ...] = ()


def plan(comparison: Comparison, axis: str, values: str, runs: Path) -> Plan:
    """A grid of a comparison's checkpoints.

    Args:
        comparison: its shared settings hold for all cells, but for the one that varies; overrides are left out.
        axis: one of `AXES`. "alpha_min" takes the checkpoints that differ from the first one in alpha alone, and a row for each seed; of
            several with one alpha that which was chosen, else that which has seen most images.
        values: with commas between them, a name that has one itself in double quotes; of "seed" how many, of "label" names ("all" for
            each), of "alpha_min" how many seeds.

    Raises:
        ValueError: another axis, values that do not suit it, too many of them.
    """
    if axis not in AXES:
        raise ValueError(f"a grid has no axis {str(axis)[:50]!r}; choose from {', '.join(AXES)}")
    settled = comparison.settled()
    shared, names = settled.shared, tuple(side.checkpoint for side in settled.sides)
    asked = _all(names, shared), axis, values
    notes = ["Settings of a checkpoint's own are left out."] * any(side.own for side in settled.sides)
    if axis == ALPHA_MIN:
        return Plan(*asked, *_family_plan(shared, names, _count(values, "seeds"), runs, notes))
    title = _title(shared, axis)
    if axis == SEED:
        number = _count(values, "seeds")
        columns = tuple(f"seed {shared.seed + i}" for i in range(number))
        sampled: tuple[Comparison, ...] = (_all(names, shared, num_images=number),)
        cells = tuple(tuple((0, side, i) for i in range(number)) for side in range(len(names)))
        return Plan(*asked, title, names, columns, sampled, cells, tuple(notes))
    told = _labels(values, names, runs, notes) if axis == LABEL else [_number(word, axis) for word in words_of(values)]
    if not 1 <= len(told) <= MAX_COLUMNS:
        raise ValueError(f"a grid has 1 to {MAX_COLUMNS} columns, not {len(told)}; give their values with commas between them")
    sampled = tuple(_all(names, shared, num_images=1, **{axis: value}) for value in told)
    columns = tuple({STEPS: steps_in_words(value), GUIDANCE: f"guidance {value}", LABEL: str(value or NO_LABEL)}[axis] for value in told)
    cells = tuple(tuple((i, side, 0) for i in range(len(told))) for side in range(len(names)))
    return Plan(*asked, title, names, columns, sampled, cells, tuple(notes))


def _family_plan(shared: Settings, names: Sequence[str], seeds: int, runs: Path, notes: list[str]) -> tuple[Any, ...]:
    """What the plan needs beside what was asked: the columns are a family's alphas, the rows seeds."""
    chosen = cards_of(names, runs)
    by_images_seen = sorted(cards(runs).values(), key=lambda each: _number_in(each.training.get("images_seen")))
    alike = (each for each in (*by_images_seen, *reversed(chosen)) if each.family == chosen[0].family)
    by_alpha = {each.alpha_min: each.name for each in alike}  # of several with one alpha the last one stays
    family = dict(_first_of(sorted(by_alpha.items(), reverse=True), "values of alpha_min", notes))
    if len(family) < 2:
        raise ValueError(f"no other checkpoint differs from {names[0]} in alpha_min alone; train one, or choose another axis")
    columns = tuple(f"alpha_min {alpha:g}: {name}" for alpha, name in family.items())
    sampled = tuple(_all((member,), shared, num_images=seeds) for member in family.values())
    rows = tuple(f"seed {shared.seed + i}" for i in range(seeds))
    cells = tuple(tuple((column, 0, i) for column in range(len(columns))) for i in range(seeds))
    return _title(shared, SEED), rows, columns, sampled, cells, tuple(notes)


def _first_of(values: Sequence[Any], what: str, notes: list[str]) -> Sequence[Any]:
    """As many as a grid has columns; if that is not all, a note says so."""
    if len(values) > MAX_COLUMNS:
        notes.append(f"These are the first {MAX_COLUMNS} of {len(values)} {what}.")
    return values[:MAX_COLUMNS]


def _number_in(told: Any) -> float:
    return told if isinstance(told, int | float) else 0


def _all(names: Sequence[str], shared: Settings, **changes: Any) -> Comparison:
    return Comparison(Settings(**{**vars(shared), **changes}), tuple(map(Side, names)))


def _title(shared: Settings, varies: str) -> str:
    facts = {
        LABEL: NO_LABEL if shared.label is None else str(shared.label),
        SEED: f"seed {shared.seed}",
        STEPS: steps_in_words(shared.steps),
        GUIDANCE: f"guidance {shared.guidance_scale:g}",
    }
    return ", ".join(text for name, text in facts.items() if name != varies)


def words_of(values: str) -> list[str]:
    """Between commas; a name that has one itself stands in double quotes."""
    try:
        split = next(csv.reader([" ".join(str(values).split())], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise ValueError('a name that begins with a " must end with one, and a comma follow it') from None
    return [word.strip() for word in split if word.strip()]


def _count(values: str, what: str) -> int:
    words = words_of(values)
    if len(words) != 1 or not words[0].isdecimal() or not 1 <= int(words[0]) <= MAX_COLUMNS:
        raise ValueError(f"give the number of {what}, from 1 to {MAX_COLUMNS}")
    return int(words[0])


def _number(word: str, axis: str) -> int | float:
    try:
        value = float(word)
    except ValueError:
        raise ValueError(f"{word[:50]!r} is no number; give values such as {'5, 10, 20' if axis == STEPS else '1, 2, 4'}") from None
    return int(value) if value.is_integer() else value


def _labels(values: str, names: Sequence[str], runs: Path, notes: list[str]) -> Sequence[str | None]:
    chosen = cards_of(names, runs)
    if values.strip() in ("all", ""):
        if not (shared := shared_classes(*chosen)):
            raise ValueError(f"{' and '.join(dict.fromkeys(names))} share no label; choose checkpoints that do, or another axis")
        return _first_of(shared, "labels", notes)
    words = [None if word == NO_LABEL else word for word in words_of(values)]
    for each in chosen:
        for word in words:
            label_index(each, word)  # what a checkpoint does not know is told now
    return words


def sample_grid(grid: Plan, runs: Path) -> Frames:
    """The frames of its comparisons, one after another; step, images and recipe are those of the whole grid."""
    done: list[Frame] = []
    for comparison in grid.comparisons:
        with closing(sample(comparison, runs)) as frames:
            for frame in frames:
                finished = [*done, frame]
                share = frame.num_steps * len(grid.comparisons)
                step = frame.num_steps * len(done) + frame.step
                last = frame.done and len(finished) == len(grid.comparisons)
                recipe = _recipe(grid, finished)
                wall_s = sum(each.wall_s for each in finished)
                images = tuple(images for each in finished for images in each.images)
                yield Frame(images, step, share, wall_s, {**recipe, "wall_s": round(wall_s, 3)}, last)
        done.append(frame)


def _recipe(grid: Plan, frames: Sequence[Frame]) -> dict[str, Any]:
    """What the grid is drawn with once more: the settings as they were asked for; and which checkpoints drew it."""
    known = {side["name"]: {**side, "own": {}} for frame in frames for side in frame.recipe["checkpoints"]}
    asked = grid.asked.as_json()
    checkpoints = [known.get(side["name"], side) for side in asked["checkpoints"]]
    drawn = [{"name": name, "sha256": side.get("sha256")} for name, side in known.items()]
    return {**frames[0].recipe, **asked, "checkpoints": checkpoints, "grid": {"axis": grid.axis, "values": grid.values, "drawn": drawn}}


def varying(recipe: dict[str, Any]) -> tuple[str, str]:
    """What varies in the grid of a recipe, and its values.

    Raises:
        ValueError: it tells of no such grid.
    """
    told = recipe["grid"] if isinstance(recipe["grid"], dict) else {}
    axis, values = told.get("axis"), told.get("values")
    if axis not in AXES or not isinstance(values, str) or len(values) > MAX_VALUES:
        raise ValueError("the recipe tells of a grid that this page does not draw")
    return axis, values


def draw(grid: Plan, frame: Frame) -> Image.Image:
    """The picture; cells that are not sampled yet stay empty."""
    starts = np.cumsum([0, *(len(each.sides) for each in grid.comparisons)])
    edge = max(images.shape[1] for images in frame.images)
    scale = max(1, CELL_PX // edge)
    cell = scale * edge
    font = ImageFont.load_default(FONT_PX)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    head = max(int(measure.textlength(row, font)) for row in grid.rows) + 2 * GAP_PX
    wide = max(cell, *(int(measure.textlength(column, font)) for column in grid.columns)) + GAP_PX
    line = FONT_PX + 2 * GAP_PX
    size = head + wide * len(grid.columns), 2 * line + (cell + GAP_PX) * len(grid.rows)
    size = max(size[0], int(measure.textlength(grid.title, font)) + 2 * GAP_PX), size[1]
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP_PX, GAP_PX), grid.title, INK, font)
    for i, column in enumerate(grid.columns):
        pen.text((head + wide * i, line + GAP_PX), column, INK, font)
    for j, row in enumerate(grid.rows):
        top = 2 * line + (cell + GAP_PX) * j
        pen.text((GAP_PX, top + (cell - FONT_PX) // 2), row, INK, font)
        for i, place in enumerate(grid.cells[j]):
            if place is None or starts[place[0]] + place[1] >= len(frame.images):
                continue
            image = frame.images[starts[place[0]] + place[1]][place[2]]
            enlarged = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
            factor = max(1, cell // image.shape[0])
            enlarged = enlarged.resize((image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.NEAREST)
            picture.paste(enlarged, (head + wide * i, top))
    return picture
