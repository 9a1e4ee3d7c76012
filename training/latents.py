"""Images -> latents of a diffusers `AutoencoderKL`, encoded once, then memory-mapped (latent diffusion, arXiv 2112.10752)."""

import hashlib
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from torch import Tensor
from tqdm import tqdm

from models.compat import import_torchvision

import_torchvision()

from diffusers import AutoencoderKL  # noqa: E402

from models.files import read_json, remove, written_aside  # noqa: E402
from training.data import ImageData, TrainingData, cache_dir  # noqa: E402

ENCODING = 1  # raise it when latents are computed or kept differently: cached ones are then made anew
PIXELS_AT_ONCE = 2**18  # of the encoder's batches: 4 images of 256 px, for which Stable Diffusion's takes 0.7 GiB
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class LatentData(TrainingData):
    """A split as the encoder's Gaussians; every sample is drawn anew: mean + std * noise.

    Attributes:
        moments: float16 (N, 2, C, H, W), mean and standard deviation, scaled as `encode` tells.
        mirrored_moments: of the mirrored images, or None: a mirrored latent is not the latent of the mirrored image.
    """

    moments: np.ndarray
    mirrored_moments: np.ndarray | None

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.moments.shape[2:]

    def samples(self, indices: np.ndarray, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        moments = self.moments[indices]
        if mirrored is not None:
            assert self.mirrored_moments is not None, "encoded without flips"
            where = mirrored.cpu().numpy()
            moments[where] = self.mirrored_moments[indices[where]]
        mean, std = torch.from_numpy(moments).to(device).float().unbind(1)  # 2 x (N, C, H, W)
        return mean + std * torch.randn(mean.shape, device=device, generator=generator)


def load_vae(name: str) -> AutoencoderKL:
    """Load an autoencoder for inference, in fp32.

    Args:
        name: a folder or a repository of the Hugging Face hub; of an `AutoencoderKL`, or of a pipeline with one in `vae/`.

    Raises:
        ValueError: nothing there, or nothing that is a whole AutoencoderKL for RGB images.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"--vae {name} is a file; point to the folder of an AutoencoderKL, which holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, f"vae/{CONFIG}", f"vae/{WEIGHTS}"]))
        except (OSError, ValueError):
            raise ValueError(
                f"--vae {name}: there is no such folder, and nothing of that name could be loaded from the Hugging Face hub; "
                "check the name, or the network"
            ) from None
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    kind = read_json(folder / CONFIG).get("_class_name") if (folder / CONFIG).is_file() else None
    if kind != "AutoencoderKL":
        held = f"a {kind}" if kind else f"no {CONFIG} that names a model"
        raise ValueError(f"--vae {name} holds {held}; it must be an AutoencoderKL of diffusers, or a pipeline with one in vae/")
    try:
        vae, loaded = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--vae {name} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise ValueError(f"--vae {name} lacks weights ({', '.join(sorted(loaded['missing_keys'])[:3])}, ...); fetch or save it again")
    if vae.config.in_channels != 3:
        raise ValueError(f"--vae {name} encodes images of {vae.config.in_channels} channels; choose one for RGB images, which have 3")
    return vae.eval().requires_grad_(False)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of the latent of a square image.

    Raises:
        ValueError: the resolution is not a multiple of the autoencoder's factor.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # every level but the last halves the edge
    if resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise ValueError(f"--resolution {resolution} is not divisible by {factor}, the factor of the autoencoder; choose {near}")
    return vae.config.latent_channels, resolution // factor, resolution // factor


def encode(data: ImageData, vae: AutoencoderKL, flips: bool) -> LatentData:
    """Read the latents of a split from the cache, or encode it where the autoencoder lies.

    Means are (z - shift_factor) * scaling_factor, standard deviations scaled alike; so z = latents / scaling_factor + shift_factor.

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
    return LatentData(moments, mirrored, **{**about, "fingerprint": fingerprint})


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # of several processes one encodes, and the others wait
        if not path.exists():
            for stale in path.parent.glob(f".{path.name}.partial-*"):  # of a process that was killed
                remove(stale)
            _write_moments(path, data, vae, (len(data), 2, *shape), mirrored)
    return np.load(path, mmap_mode="r")


@torch.inference_mode()
def _write_moments(path: Path, data: ImageData, vae: AutoencoderKL, shape: tuple[int, ...], mirrored: bool) -> None:
    need, free = 2 * int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(path.parent).free
    if need > free:
        sizes = f"{need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
        raise ValueError(f"the latents of {data.name} take {sizes} in {path.parent}; make room, or set XDG_CACHE_HOME to another disk")
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    batch_size = max(1, PIXELS_AT_ONCE // data.shape[-1] ** 2)
    what = f"encoding {data.name}{', mirrored' * mirrored}"
    with (
        written_aside(path) as aside,
        aside.open("wb") as file,  # a mapped file would kill the process when the disk is full
        tqdm(total=len(data), desc=what, unit=" images", leave=False, disable=None) as bar,
    ):
        np.lib.format.write_array_header_2_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for start in range(0, len(data), batch_size):
            indices = np.arange(start, min(start + batch_size, len(data)))
            everyone = torch.full((len(indices),), mirrored, device=vae.device)
            posterior = vae.encode(data.samples(indices, vae.device, None, everyone)).latent_dist
            moments = torch.stack([(posterior.mean - shift) * scale, posterior.std * scale], 1).half()  # (N, 2, C, H, W)
            if not moments.isfinite().all():
                raise ValueError(f"the autoencoder gives latents of {data.name} that are not finite in half precision; choose another")
            moments.cpu().numpy().tofile(file)
            bar.update(len(indices))
