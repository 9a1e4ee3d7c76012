"""Recipes in PNG files: what an image was made with travels with it, and brings it back.

A file may come from anywhere. Its pixels are never decoded here, and nothing in its text is used before it is checked.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from app.catalog import Source, find, variants
from app.sampler import Frame
from app.settings import Comparison, Side

KEY = "fading-shortcuts"  # of the text in the PNG
VERSION = 1
MAX_BYTES = 32 * 2**20  # of a PNG
MAX_RECIPE = 64 * 1024  # characters


def to_png(image: np.ndarray | Image.Image, recipe: dict[str, Any] | None = None) -> bytes:
    """A PNG that carries its recipe.

    Args:
        image: uint8 (H, W, C), or a picture.
        recipe: of JSON; None leaves it away.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    text = PngImagePlugin.PngInfo()
    if recipe is not None:
        text.add_text(KEY, json.dumps({"version": VERSION, **recipe}))
    file = io.BytesIO()
    image.save(file, format="png", pnginfo=text)
    return file.getvalue()


def of_image(recipe: dict[str, Any], side: int, index: int) -> dict[str, Any]:
    """The recipe of one image of a comparison; the time that it took is no part of it."""
    recipe = {name: value for name, value in recipe.items() if name != "wall_s"}
    own = recipe["checkpoints"][side].get("own", {})
    return {**recipe, "image": {"side": side, "index": index, "seed": own.get("seed", recipe["seed"]) + index}}


def from_png(path: Path) -> dict[str, Any]:
    """The recipe in a PNG, unchecked but for being a table.

    Raises:
        ValueError: no PNG, or none of this page's.
    """
    foreign = "this PNG holds no recipe; drop one that was downloaded here"
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("this file is too large for a PNG of this page")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEY)  # what stands before the pixels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError("this file is no PNG that can be read") from error
    if not isinstance(text, str):
        raise ValueError(foreign)
    if len(text) > MAX_RECIPE:
        raise ValueError("the recipe in this PNG is too long to be one of this page")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("the recipe in this PNG is damaged") from None
    if not isinstance(recipe, dict) or recipe.get("version") != VERSION:
        raise ValueError(foreign)
    return recipe


def comparison(recipe: dict[str, Any], runs: Path) -> tuple[Comparison, list[str]]:
    """What a recipe asks for, and what has changed here since, one line each.

    Raises:
        ValueError: no recipe, values out of range, or a checkpoint that is not here.
    """
    asked = Comparison.from_json(recipe)
    known = variants(runs)
    sides, changed = [], []
    for side, told in zip(asked.sides, recipe["checkpoints"], strict=True):
        renamed = None if side.checkpoint in known else _with_hash(told.get("sha256"), known)
        if renamed:
            changed.append(f"{side.checkpoint} is called {renamed} now")
            side = Side(renamed, side.own)
        elif "sha256" in told and told["sha256"] != find(side.checkpoint, runs).hash:
            changed.append(f"{side.checkpoint} has other weights now, so the images will differ")
        sides.append(side)
    return Comparison(asked.shared, tuple(sides)), changed


def _with_hash(hash: Any, known: dict[str, Source]) -> str | None:
    """The name of the weights that have it."""
    for name, source in known.items() if isinstance(hash, str) else ():
        with contextlib.suppress(OSError):  # damaged, or on its way
            if source.hash == hash:
                return name
    return None


def same_pixels(path: Path, frame: Frame) -> bool:
    """Whether the image in a PNG is, bit for bit, the one of a frame that its recipe names.

    Raises:
        ValueError: it names none.
    """
    place = from_png(path).get("image", {})
    try:
        image = frame.images[place["side"]][place["index"]]
    except (TypeError, KeyError, IndexError):
        raise ValueError("the recipe names no image") from None
    with Image.open(path, formats=["PNG"]) as dropped:
        if dropped.size != image.shape[1::-1]:  # before a pixel is decoded
            return False
        try:
            return np.array_equal(np.asarray(dropped).reshape(image.shape), image)
        except (OSError, SyntaxError) as error:  # its recipe could be read, its pixels cannot
            raise ValueError("this file is no PNG that can be read") from error
