"""Images -> features through a torch-fidelity extractor, in batches."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval.extractors import FeatureExtractorBase
from models.files import require_memory, written_aside
from training.data import IMAGE_SUFFIXES, ImageData, cache_dir, centre_square, to_rgb


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

    Raises:
        ValueError: no folder, no images, an image that cannot be read, or different sizes without a `resolution`.
    """

    def __init__(self, folder: str, resolution: int | None = None) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder; give one with images")
        self.resolution = resolution
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if len(self.paths) < 2:
            raise ValueError(f"{folder} holds {len(self.paths)} images; a distance needs at least 2 ({' '.join(sorted(IMAGE_SUFFIXES))})")
        sizes = [self._open(path).size for path in self.paths]
        self.size = (resolution, resolution) if resolution else sizes[0]
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None and not resolution:
            width, height = sizes[other]
            raise ValueError(
                f"{self.paths[0]} has {self.size[0]} x {self.size[1]} pixels and {self.paths[other]} {width} x {height}; "
                "give --resolution to crop and resize all to one size"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        image = self._open(self.paths[i], decode=True)
        pixels = centre_square(image, self.resolution) if self.resolution else np.array(to_rgb(image))
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    @staticmethod
    def _open(path: Path, decode: bool = False) -> Image.Image:
        try:
            with Image.open(path) as image:
                if decode:
                    image.load()
                return image
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}); mend or remove it") from None


@torch.inference_mode()
def extract_features(images: Dataset, extractor: FeatureExtractorBase, batch_size: int, about: str) -> np.ndarray:
    """Features (N, D) float32 of uint8 images, in their order; one batch of images is held at a time.

    Args:
        images: yields uint8 (3, H, W), all of one size.
        extractor: with one feature layer; see eval/extractors.py.
        about: for the progress bar.
    """
    device = next(extractor.parameters()).device
    features: np.ndarray | None = None
    done = 0
    with tqdm(total=len(images), desc=f"features of {about}", unit=" images", leave=False, disable=None) as bar:
        for batch in DataLoader(images, batch_size):
            (found,) = extractor(batch.to(device))  # (B, D)
            if features is None:
                require_memory(4 * len(images) * found.shape[1], f"features of {len(images):,} images")
                features = np.empty((len(images), found.shape[1]), np.float32)
            features[done : done + len(batch)] = found.cpu().numpy()
            done += len(batch)
            bar.update(len(batch))
    return features


def reference_features(data: ImageData, extractor: FeatureExtractorBase, weights: str, batch_size: int) -> np.ndarray:
    """As `extract_features`, of a data set: computed once, then read from the cache.

    Args:
        weights: hash of the extractor's weights; another hash, another data fingerprint or another torch is computed anew.
    """
    code = Path(__file__).with_name("extractors.py").read_text(encoding="utf-8")
    key = "\n".join((data.fingerprint, extractor.get_name(), weights, torch.__version__, code))
    path = cache_dir() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path)
    features = extract_features(ArrayImages(data.images), extractor, batch_size, data.name)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, features)
    return features
