"""Where images are found, and how one is read: folders, tables and archives of the `datasets` library. Nothing here loads torch."""

import io
import logging
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

EMBEDDED = "openmoji"
SPLITS = ("train", "validation", "all")
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm".split())
TABLES = (".parquet", ".tar")  # of the `datasets` library, and WebDataset archives


class NoSplit(ValueError):
    """A data set without the split that is asked for."""


def holds_images(folder: Path) -> bool:
    """Whether a file in a folder, among its first 200,000, is one that `load_images` reads; what is wrong with it only reading tells."""
    files = (Path(file) for _, _, files in os.walk(folder) for file in files)
    return any(file.suffix in TABLES or file.suffix.lower() in IMAGE_SUFFIXES for file in islice(files, 200_000))


def label_values(name: str, table: Any, column: str, values: Iterable[Any]) -> list[Any]:
    """Labels that are no `ClassLabel`, each once, in the order in which they are numbered.

    Raises:
        ValueError: neither whole numbers nor words.
    """
    found = set()
    for value in values:
        if not isinstance(value, str | int):
            raise ValueError(
                f"the column {column!r} of {name} holds no labels but {table.features[column]}; labels are whole numbers or words"
            )
        found.add(value)
    return sorted(found)


def open_dataset(name: str, split: str, streaming: bool = False) -> Any:
    """The split as one `datasets.Dataset`, or `IterableDataset`.

    Raises:
        ValueError: nothing there.
        NoSplit: not this split.
    """
    import datasets

    datasets.disable_progress_bars()  # ours are shown
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt; what came of them is told below
    folder = Path(name)
    try:
        if folder.is_dir():
            files = [path for path in folder.rglob("*") if path.is_file()]
            if any(path.suffix in TABLES for path in files):
                splits = datasets.load_dataset(name, streaming=streaming)
            elif any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
                splits = datasets.load_dataset("imagefolder", data_dir=name, streaming=streaming)
            else:
                suffixes = " ".join(sorted(IMAGE_SUFFIXES))
                raise ValueError(
                    f"{name} holds no images ({suffixes}), parquet files or WebDataset archives (.tar); point to a folder that does"
                )
        elif folder.exists():
            raise ValueError(f"{name} is a file; point to the folder that holds the images")
        else:
            splits = datasets.load_dataset(name, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError):
        raise ValueError(
            f"there is no folder {name!r}, and no data set of that name could be loaded from the Hugging Face hub; "
            f"check the path, or use the embedded {EMBEDDED!r}"
        ) from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{name} could not be read: {error.__cause__ or error}") from None

    if split == "all":
        return datasets.concatenate_datasets(list(splits.values()))
    for candidate in ("validation", "val", "test") if split == "validation" else (split,):
        if candidate in splits:
            return splits[candidate]
    raise NoSplit(f"{name} has no split {split!r}, only {', '.join(splits)}; choose --split all to use what is there")


def undecoded(name: str, table: Any, image_column: str, label_column: str | None) -> tuple[Any, str | None]:
    """The table with its images as they are in their files, and the column of its labels, if it has one.

    Raises:
        ValueError: a column that is not there, or that holds no images.
    """
    import datasets

    if image_column not in table.column_names:
        raise ValueError(f"{name} has no column {image_column!r}; --image_column may be one of {', '.join(table.column_names)}")
    if label_column is not None and label_column not in table.column_names:
        raise ValueError(f"{name} has no column {label_column!r}; --label_column may be one of {', '.join(table.column_names)}")
    label_column = label_column or ("label" if "label" in table.column_names else None)
    try:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, NotImplementedError, ValueError):
        raise ValueError(
            f"the column {image_column!r} of {name} holds no images but {table.features[image_column]}; give another --image_column"
        ) from None
    return table, label_column


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, upright (EXIF), transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def centre_square(image: Image.Image, resolution: int) -> np.ndarray:
    """Centre crop and Lanczos resize in one step -> uint8 (resolution, resolution, 3)."""
    return np.asarray(ImageOps.fit(to_rgb(image), (resolution, resolution), Image.Resampling.LANCZOS))


def decode_image(row: dict[str, Any] | None, what: str, resolution: int) -> np.ndarray:
    """A file's bytes, or its path -> uint8 (resolution, resolution, 3); ValueError if it is broken, by its path or `what` it is."""
    if row is None:
        raise ValueError(f"{what} is missing; mend or remove it")
    what = row.get("path") or what
    try:
        with Image.open(io.BytesIO(row["bytes"]) if row["bytes"] else row["path"]) as image:
            return centre_square(image, resolution)
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = type(error).__name__ if what in str(error) else error
        raise ValueError(f"{what} cannot be read as an image ({reason}); mend or remove it") from None
