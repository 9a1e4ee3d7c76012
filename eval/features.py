"""Images -> features through a torch-fidelity extractor, in batches."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from eval.extractors import FeatureExtractorBase
from eval.spread import everywhere, gathered, is_main, own_batches
from models.files import require_memory, sha256, written_aside
from models.progress import progress_bar
from training.data import ImageData
from training.images import IMAGE_SUFFIXES, centre_square, to_rgb
from training.packing import cache_dir

MOST_READERS = 8  # threads


class ArrayImages(Dataset):
    """uint8 (N, H, W, 3) as torch-fidelity wants it: uint8 (3, H, W) one by one."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[i])).permute(2, 0, 1)


class FolderImages(Dataset):
    """Images of a folder and its subfolders in the order of their paths, decoded when asked for.

    Args:
        folder: where they are.
        resolution: crop the centre square and resize it to this edge; None leaves the pixels as they are.
        skip_broken: leave out images that cannot be read, and name them in `broken`.

    Raises:
        ValueError: no folder, no images, an image that cannot be read, or different sizes without a `resolution`.
    """

    def __init__(self, folder: str, resolution: int | None = None, skip_broken: bool = False) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder; give one with images")
        self.resolution = resolution
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        self.broken = [path for path in self.paths if skip_broken and not self._readable(path)]
        self.paths = [path for path in self.paths if path not in set(self.broken)]
        if len(self.paths) < 2:
            raise ValueError(f"{folder} holds {len(self.paths)} images; a distance needs at least 2 ({' '.join(sorted(IMAGE_SUFFIXES))})")
        sizes = [self._open(path).size for path in self.paths]
        self.size = (resolution, resolution) if resolution else to_rgb(self._open(self.paths[0], decode=True)).size  # upright
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None and not resolution:
            raise self._of_another_size(other, sizes[other], sizes[0])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        image = self._open(self.paths[i], decode=True)
        pixels = centre_square(image, self.resolution) if self.resolution else np.array(to_rgb(image))
        if pixels.shape[1::-1] != self.size:  # one that is stored lying, and turned as its EXIF says
            raise self._of_another_size(i, pixels.shape[1::-1], self.size)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def fingerprint(self) -> str:
        """Hash of names, files and resolution."""
        digest = hashlib.sha256(str(self.resolution).encode())
        for path in self.paths:
            digest.update(f"\n{path.name} {sha256(path)}".encode())
        return digest.hexdigest()[:16]

    def _of_another_size(self, i: int, size: tuple[int, int], first: tuple[int, int]) -> ValueError:
        sizes = "{} has {} x {} pixels and {} {} x {}".format(self.paths[0], *first, self.paths[i], *size)
        return ValueError(f"{sizes}; give --resolution to crop and resize all to one size")

    @classmethod
    def _readable(cls, path: Path) -> bool:
        try:
            cls._open(path, decode=True)
        except ValueError:
            return False
        return True

    @staticmethod
    def _open(path: Path, decode: bool = False) -> Image.Image:
        try:
            with Image.open(path) as image:
                if decode:
                    image.load()
                return image
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(
                f"{path} cannot be read as an image ({type(error).__name__}); mend or remove it, or give --skip_broken"
            ) from None


@torch.inference_mode()
def extract_layers(images: Dataset, extractor: FeatureExtractorBase, batch_size: int, about: str) -> tuple[np.ndarray, ...]:
    """Features (N, D) float32 of uint8 images for each layer of the extractor, in their order; two batches of images are held at a time.

    Several processes take turns at the batches, which stay the same, and all get everything.

    Args:
        images: yields uint8 (3, H, W), all of one size.
        extractor: see eval/extractors.py.
        about: for the progress bar.
    """
    device = next(extractor.parameters()).device
    layers: tuple[np.ndarray, ...] = ()
    batches = own_batches(len(images), batch_size)
    with progress_bar(total=sum(stop - start for start, stop in batches), desc=f"features of {about}", unit=" images") as bar:
        for (start, stop), batch in zip(batches, _read(images, batches), strict=True):
            found = extractor(batch.to(device))  # a (B, D) for each layer
            if not layers:
                require_memory(4 * len(images) * sum(layer.shape[1] for layer in found), f"features of {len(images):,} images")
                layers = tuple(np.empty((len(images), layer.shape[1]), np.float32) for layer in found)
            for layer, part in zip(layers, found, strict=True):
                layer[start:stop] = part.cpu().numpy()
            bar.update(stop - start)
    return tuple(gathered(layers, len(images), batch_size))


def _read(images: Dataset, batches: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Batches uint8 (B, 3, H, W), by threads that read the next one while the last is worked on: decoders let go of Python's lock."""
    readers = ThreadPoolExecutor(min(MOST_READERS, len(os.sched_getaffinity(0))))
    reading: list[Future[Tensor]] = []
    try:
        for batch in [*batches, (0, 0)]:
            coming = [readers.submit(images.__getitem__, i) for i in range(*batch)]
            ready = torch.stack([each.result() for each in reading]) if reading else None
            reading = coming
            if ready is not None:
                yield ready
    finally:
        readers.shutdown(cancel_futures=True)


def extract_features(images: Dataset, extractor: FeatureExtractorBase, batch_size: int, about: str) -> np.ndarray:
    """As `extract_layers`, of the first layer."""
    return extract_layers(images, extractor, batch_size, about)[0]


def reference_features(data: ImageData, extractor: FeatureExtractorBase, weights: str, batch_size: int) -> np.ndarray:
    """As `extract_features`, of a data set: computed once, then read from the cache.

    Args:
        weights: hash of the extractor's weights; another hash, another data fingerprint or another version of a library is
            computed anew.
    """
    code = Path(__file__).with_name("extractors.py").read_text(encoding="utf-8")
    device = next(extractor.parameters()).device.type  # a GPU rounds otherwise
    libraries = [version(name) for name in ("torch", "torch-fidelity", "timm")]
    key = "\n".join((data.fingerprint, extractor.get_name(), weights, *libraries, code, device))
    path = cache_dir() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if everywhere(path.is_file()):  # another evaluation may write it between the looks of two processes
        return np.load(path)
    features = extract_features(ArrayImages(data.images), extractor, batch_size, data.name)
    if is_main():
        with written_aside(path) as aside, aside.open("wb") as file:
            np.save(file, features)
    return features
