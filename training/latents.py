"""Images -> latents of a diffusers `AutoencoderKL`, encoded once, then memory-mapped (latent diffusion, arXiv 2112.10752)."""

import hashlib
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from models.files import require_disk, written_aside
from models.progress import progress_bar
from models.vae import AutoencoderKL, latent_shape, to_moments
from training.data import ImageData, ReadAhead, Reader, Rows, TrainingData, copied, fits, moved, taken
from training.packing import cache_dir, made_once

ENCODING = 1  # raise it when latents are computed or kept differently: cached ones are then made anew
# Of the encoder's batches: 4 images of 256 px take 0.7 GiB with Stable Diffusion's, and 32 of them on a GPU
PIXELS_AT_ONCE = {"cpu": 2**18, "cuda": 2**21}


@dataclass(frozen=True)
class LatentData(TrainingData):
    """A split as the encoder's Gaussians; every sample is drawn anew: mean + std * noise.

    Attributes:
        moments: float16 (N, 2, C, H, W), mean and standard deviation, see `models.vae.to_moments`.
        mirrored_moments: of the mirrored images, or None: a mirrored latent is not the latent of the mirrored image.
        of_images: their fingerprint.
        on_device: both once more, where a training computes; see `held`.
    """

    moments: np.ndarray
    mirrored_moments: np.ndarray | None
    of_images: str
    on_device: tuple[Tensor, ...] | None = None

    @property
    def images_fingerprint(self) -> str:
        return self.of_images

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.moments.shape[2:]

    def reader(self, seed: int, batches_a_step: int) -> Reader:
        return ReadAhead(self, seed) if self.on_device is None else Reader(self, seed)

    def rows(self, indices: np.ndarray) -> Rows:
        kept = self.on_device or self._kept
        return Rows(taken(kept[0], indices), self.labels_of(indices), *(taken(mirrored, indices) for mirrored in kept[1:]))

    def samples(self, rows: Rows, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        moments = moved(rows.samples, device)  # (N, 2, C, H, W)
        if mirrored is not None:
            assert rows.mirrored is not None, "encoded without flips"
            moments = torch.where(mirrored.view(-1, 1, 1, 1, 1), moved(rows.mirrored, device), moments)
        mean, std = moments.float().unbind(1)  # 2 x (N, C, H, W)
        return mean + std * torch.randn(mean.shape, device=device, generator=generator)

    def held(self, device: torch.device) -> Self:
        """With all latents on a GPU, if they fit there."""
        if not fits(sum(each.nbytes for each in self._kept), device):
            return self
        return replace(self, on_device=tuple(copied(each, device) for each in self._kept))

    @property
    def _kept(self) -> tuple[np.ndarray, ...]:
        return (self.moments,) if self.mirrored_moments is None else (self.moments, self.mirrored_moments)


def encode(data: ImageData, vae: AutoencoderKL, flips: bool) -> LatentData:
    """Read the latents of a split from the cache, or encode it where the autoencoder lies.

    Of the processes of a training one encodes, and the others wait for it.

    Args:
        flips: encode the mirrored images too.

    Raises:
        ValueError: a resolution that does not fit, too little room on the disk, latents that are not finite.
    """
    shape = latent_shape(vae, data.shape[-1])
    # the first covers pixels, resolution and labels; precision and device are not in it, they change the last digits only
    fingerprint = hashlib.sha256(f"{ENCODING} {data.fingerprint} {_identity(vae)}".encode()).hexdigest()[:16]
    moments = _cached(cache_dir() / "latents" / f"{fingerprint}.npy", data, vae, shape, mirrored=False)
    mirrored = _cached(cache_dir() / "latents" / f"{fingerprint}-mirrored.npy", data, vae, shape, mirrored=True) if flips else None
    about = {field.name: getattr(data, field.name) for field in fields(TrainingData)}
    return LatentData(moments, mirrored, data.fingerprint, **{**about, "fingerprint": fingerprint})


def _identity(vae: AutoencoderKL) -> str:
    """Hash of all that decides the latents; autoencoders that differ in their decoders only share it."""
    config = vae.config
    digest = hashlib.sha256(repr((config.act_fn, config.norm_num_groups, config.scaling_factor, config.shift_factor)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy())
    return digest.hexdigest()


def _cached(path: Path, data: ImageData, vae: AutoencoderKL, shape: tuple[int, int, int], mirrored: bool) -> np.ndarray:
    """The moments in the file `path`, made if needed: float16 (N, 2, *shape), mapped."""
    with made_once(path) as missing:
        if missing:
            _write_moments(path, data, vae, (len(data), 2, *shape), mirrored)
    return np.load(path, mmap_mode="r")


def _write_moments(path: Path, data: ImageData, vae: AutoencoderKL, shape: tuple[int, ...], mirrored: bool) -> None:
    require_disk(path.parent, 2 * math.prod(shape), f"the latents of {data.name}")
    batch_size = max(1, PIXELS_AT_ONCE.get(vae.device.type, PIXELS_AT_ONCE["cpu"]) // data.shape[-1] ** 2)
    what = f"encoding {data.name}{', mirrored' * mirrored}"
    with (
        written_aside(path) as aside,
        aside.open("wb") as file,  # a mapped file would kill the process when the disk is full
        progress_bar(total=len(data), desc=what, unit=" images") as bar,
    ):
        np.lib.format.write_array_header_2_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for start in range(0, len(data), batch_size):
            indices = np.arange(start, min(start + batch_size, len(data)))
            everyone = torch.full((len(indices),), mirrored, device=vae.device)
            moments = to_moments(vae, data.samples(data.rows(indices), vae.device, None, everyone)).half()  # (N, 2, C, H, W)
            if not moments.isfinite().all():
                raise ValueError(f"the autoencoder gives latents of {data.name} that are not finite in half precision; choose another")
            moments.cpu().numpy().tofile(file)
            bar.update(len(indices))
