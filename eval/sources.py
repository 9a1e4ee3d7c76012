"""What can be judged, or judged against, besides a checkpoint: a folder of images, an .npz, a data set."""

import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from eval.features import ArrayImages, FolderImages
from models.files import require_memory, sha256, written_aside
from training.data import ImageData
from training.images import EMBEDDED, IMAGE_SUFFIXES
from training.packing import load_images

# what numpy and zipfile raise for files that are torn, encrypted or packed by other means
UNREADABLE = (
    OSError, EOFError, KeyError, NotImplementedError, RuntimeError, UnicodeDecodeError, json.JSONDecodeError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
STATISTICS = ("mu", "sigma")  # as ADM's and pytorch-fid's files name them


@dataclass(frozen=True)
class Source:
    """Images, or the statistics that are left of them.

    Attributes:
        name: as the user wrote it.
        images: uint8 (3, H, W) one by one; None where there are only statistics or features.
        size: (width, height), where the images have one; of statistics, what they were taken of, if they say it.
        data: the data set that it is, with labels and a fingerprint.
        statistics: "mu" (D,), "sigma" (D, D) and, of our own files, "features" (R, D).
        about: what our own file says of itself.
        notes: what a reader should know.
    """

    name: str
    images: Dataset | None = None
    size: tuple[int, int] | None = None
    data: ImageData | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num(self) -> int | None:
        """How many images; None where statistics do not say."""
        return len(self.images) if self.images is not None else self.about.get("reference_num")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the images or the statistics: a name stays when what it names changes."""
        if self.data is not None:
            return self.data.fingerprint
        return self.images.fingerprint() if isinstance(self.images, FolderImages) else sha256(Path(self.name))[:16]


def open_source(
    name: str,
    resolution: int | None = None,
    data_resolution: int | None = None,
    split: str = "train",
    skip_broken: bool = False,
    as_data: bool = False,
) -> Source:
    """Find out what `name` is.

    Args:
        name: an .npz file, a folder of images, or a data set (training/packing.py).
        resolution: edge to crop and resize to, if asked for.
        data_resolution: the same for a data set, which needs one, if not.
        split: of a data set.
        skip_broken: leave out images that cannot be read.
        as_data: read a folder of images as a data set too.

    Raises:
        ValueError: nothing there, or nothing that can be read, with the remedy.
    """
    if name.endswith(".npz"):
        return _npz(name)
    if Path(name).is_dir() and not as_data and not _is_parquet(Path(name)):
        images = FolderImages(name, resolution, skip_broken)
        return Source(name, images, images.size, notes=_left_out(images.broken))
    edge = resolution or data_resolution
    if edge is None and (name == EMBEDDED or Path(name).is_dir()):
        raise ValueError(f"the data set {name} has no size of its own; give --resolution")
    if edge is None:
        raise ValueError(f"{name} is not a folder; give one with images, an .npz, or the name of a data set and --resolution")
    data = load_images(name, edge, split, skip_broken=skip_broken)
    return Source(name, ArrayImages(data.images), (edge, edge), data, notes=_left_out(data.left_out))


def _left_out(names: Iterable[str | Path]) -> tuple[str, ...]:
    return tuple(f"{name} could not be read and is left out" for name in names)


def require_one_size(name: str, size: tuple[int, int] | None, reference: Source) -> None:
    """Raise ValueError where images (width, height) and a reference's have different sizes: their sharpness would be judged."""
    if size is not None and reference.size is not None and size != reference.size:
        sizes = "{} x {} pixels, and {} of {} x {}".format(*size, reference.name, *reference.size)
        raise ValueError(f"{name} has images of {sizes}; name the real ones by --reference, which resizes folders and data sets")


def _is_parquet(folder: Path) -> bool:
    files = list(folder.rglob("*"))
    return any(path.suffix == ".parquet" for path in files) and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in files)


def export_reference(path: str, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write statistics of a reference, readable by ADM's evaluator and pytorch-fid (`mu`, `sigma`), and what they are of."""
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, about=np.array(json.dumps(about)))


def _npz(path: str) -> Source:
    """`arr_0` as images; `mu` and `sigma` as statistics. Nothing is unpickled."""
    try:
        arrays = _read_arrays(path, ("arr_0", *STATISTICS, "features", "about"))
        about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; check the path") from None
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as .npz ({type(error).__name__}); make it with numpy.savez") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: about is no JSON object; export the file again")
    statistics = {name: arrays[name] for name in (*STATISTICS, "features") if name in arrays}
    if statistics and not set(STATISTICS) <= set(statistics):
        raise ValueError(f"{path} holds only one of mu and sigma; both are needed")
    if statistics and any(array.dtype.kind != "f" for array in statistics.values()):
        raise ValueError(f"{path}: mu and sigma must be floating-point numbers")
    images = arrays.get("arr_0")
    if images is None and not statistics:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu and sigma)")
    if images is None:
        size = about.get("reference_size")
        size = tuple(size) if isinstance(size, list) and len(size) == 2 else None
        return Source(path, size=size, statistics=statistics, about=about)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)) or len(images) < 2:
        raise ValueError(f"{path}: arr_0 is {images.dtype} {images.shape}; images are uint8 (N, H, W, 3), at least 2")
    notes = (f"the images of {path} are grey; all three channels are the same",) if images.ndim == 3 or images.shape[-1] == 1 else ()
    return Source(path, ArrayImages(coloured(images)), images.shape[2:0:-1], statistics=statistics, about=about, notes=notes)


def coloured(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3) -> (N, H, W, 3): grey is shown in all three channels, without a copy."""
    images = images[..., None] if images.ndim == 3 else images
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _read_arrays(path: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of an .npz, whose headers are read first: no pickles, nothing larger than memory or than the file says."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        held = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        for name in names:
            if name not in held:
                continue
            with archive.open(held[name]) as file:
                shape, dtype = _header(file, f"{name} of {path}")
                num_bytes = math.prod(shape) * dtype.itemsize
                if not 0 <= num_bytes <= held[name].file_size:
                    raise ValueError(f"{name} of {path} is cut short: {shape} {dtype} do not fit into {held[name].file_size:,} bytes")
                require_memory(num_bytes, f"{name} of {path}")
            with archive.open(held[name]) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _header(file: Any, about: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise ValueError(f"{about} is no array ({str(error).splitlines()[0]})") from None
    if dtype.hasobject:
        raise ValueError(f"{about} holds pickled objects, which could run anything; save plain arrays")
    return shape, dtype
