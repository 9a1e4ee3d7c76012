"""The autoencoder of latent diffusion, an `AutoencoderKL` of diffusers: loading it, images <-> latents (arXiv 2112.10752).

Latents are (z - shift_factor) * scaling_factor of the autoencoder's z, so that they have about unit variance.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from torch import Tensor

from models.files import read_json

DECODED_PIXELS = 512**2  # of images that are decoded at once: small ones together are several times as fast, large ones fill the memory
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def load_vae(name: str | Path, torch_dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load an autoencoder for inference.

    Args:
        name: a folder or a repository of the Hugging Face hub; of an `AutoencoderKL`, or of a pipeline with one in `vae/`.
        torch_dtype: of the parameters.

    Raises:
        ValueError: nothing there, or nothing that is a whole AutoencoderKL for RGB images.
    """
    folder, what = Path(name), f"the autoencoder {name}"
    if folder.is_file():
        raise ValueError(f"{what} is a file; point to the folder of an AutoencoderKL, which holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS, f"vae/{CONFIG}", f"vae/{WEIGHTS}"]))
        except (OSError, ValueError):
            raise ValueError(
                f"{what}: there is no such folder, and nothing of that name could be loaded from the Hugging Face hub; "
                "check the name, or the network"
            ) from None
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    kind = read_json(folder / CONFIG).get("_class_name") if (folder / CONFIG).is_file() else None
    if kind != "AutoencoderKL":
        held = f"a {kind}" if kind else f"no {CONFIG} that names a model"
        raise ValueError(f"{what} holds {held}; it must be an AutoencoderKL of diffusers, or a pipeline with one in vae/")
    try:
        vae, loaded = AutoencoderKL.from_pretrained(folder, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise ValueError(f"{what} lacks weights ({', '.join(sorted(loaded['missing_keys'])[:3])}, ...); fetch or save it again")
    if vae.config.in_channels != 3:
        raise ValueError(f"{what} encodes images of {vae.config.in_channels} channels; choose one for RGB images, which have 3")
    return vae.eval().requires_grad_(False)


def factor(vae: AutoencoderKL) -> int:
    """Edge of an image over the edge of its latent: every level but the last halves it."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(C, H, W) of the latent of a square image.

    Raises:
        ValueError: the resolution is not a multiple of the autoencoder's factor.
    """
    smaller = factor(vae)
    if resolution % smaller:
        near = max(smaller, round(resolution / smaller) * smaller)
        raise ValueError(f"resolution {resolution} is not divisible by {smaller}, the factor of the autoencoder; choose {near}")
    return vae.config.latent_channels, resolution // smaller, resolution // smaller


@torch.inference_mode()
def to_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> mean and standard deviation of their latents, (N, 2, C, h, w)."""
    posterior = vae.encode(images).latent_dist
    return torch.stack([posterior.mean - _shift(vae), posterior.std], dim=1) * vae.config.scaling_factor


@torch.inference_mode()
def to_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> images, float32 (N, 3, H, W) in [-1, 1] but for overshoot."""
    z = (latents / vae.config.scaling_factor + _shift(vae)).to(vae.device, vae.dtype)
    at_once = max(1, DECODED_PIXELS // (z[0, 0].numel() * factor(vae) ** 2))
    rounds = torch.is_autocast_enabled(z.device.type) and torch.get_autocast_dtype(z.device.type) != torch.float16
    with torch.autocast(z.device.type, torch.bfloat16, enabled=rounds):  # in fp16 some decoders, such as SDXL's, overflow
        return torch.cat([vae.decode(part).sample.float() for part in z.split(at_once)])


@torch.inference_mode()
def colours(vae: AutoencoderKL) -> Tensor:
    """(C + 1, 3): the linear map from a latent cell, with a 1 behind it, to its colour that is nearest to the decoder.

    It is fitted to smooth random latents, and takes a decoding of two small images; see `to_small_images`.
    """
    noise = torch.randn(2, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(noise, scale_factor=4, mode="bicubic").to(vae.device)
    seen = F.avg_pool2d(to_images(vae, latents), factor(vae))
    return torch.linalg.lstsq(_cells(latents), seen.movedim(1, -1).flatten(0, 2)).solution


def to_small_images(latents: Tensor, colours: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> about their images, one pixel a cell, (N, 3, h, w); for previews, hundreds of times faster than decoding."""
    n, _, h, w = latents.shape
    return (_cells(latents) @ colours.to(latents.device)).view(n, h, w, 3).movedim(-1, 1)


def _cells(latents: Tensor) -> Tensor:
    cells = latents.float().movedim(1, -1).flatten(0, 2)
    return torch.cat([cells, cells.new_ones(len(cells), 1)], dim=1)  # (N * h * w, C + 1)


def _shift(vae: AutoencoderKL) -> float:
    return vae.config.shift_factor or 0.0
