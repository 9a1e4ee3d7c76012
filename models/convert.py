"""A published checkpoint -> a folder that `Pipeline.from_pretrained` (or, of an MAE, `load_backbone`) loads.

    python -m models.convert sit SiT-XL-2-256x256.pt runs/sit-xl --vae stabilityai/sd-vae-ft-mse

The kinds, and what does not cross exactly as it is, stand in models/official.py. Published MAEs want images normalised by ImageNet's
statistics; these are folded into the patch embedding, so that what is written takes images in [-1, 1] as everything here does.
"""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.files import INDEX, Parser, one_line_errors, write_json, written_aside
from models.official import KINDS, UVIT_TIMES, find_kind, from_official
from models.paths import PATHS
from models.pipeline import DDPMScheduler, FlowMatchEulerDiscreteScheduler, Pipeline
from models.shortcut import describe
from models.vae import AutoencoderKL, load_vae

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # by which published MAEs want images in [0, 1] normalised


def weights_of(checkpoint: Mapping[str, Any], ema: bool = True) -> tuple[dict[str, Tensor], str]:
    """The weights in a training checkpoint {"model", "ema", "opt", "args"}, or the plain weights that it is; and "ema" or "model".

    Args:
        ema: prefer the averaged weights.
    """
    name = "ema" if ema and "ema" in checkpoint else "model"
    weights = checkpoint[name] if isinstance(checkpoint.get(name), Mapping) else checkpoint
    # what DistributedDataParallel and torch.compile put before every name
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}, name


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a .safetensors file holds, or a .pt / .pth file; of the latter tensors and plain values alone, never code.

    Raises:
        ValueError: it holds code, or is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the checkpoint's .pt, .pth or .safetensors")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); it is no .safetensors file, or a damaged one") from None
    try:
        # training scripts save their flags; torch warns of a file that it will refuse
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what is no such file makes the reader stumble in many ways
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            remedy = "only tensors and plain values are read. If you trust it, save its weights alone: torch.save(torch.load(IN, "
            remedy += "weights_only=False)['model'], OUT)"
            raise ValueError(f"{path} is refused, for it asks to run {code[1]}; {remedy}") from None
        raise ValueError(f"{path} cannot be read; it is no file of torch.save, or a damaged one") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, not named weights")
    return found


def told_by_flags(kind: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags in an official training checkpoint say that its weights do not.

    Raises:
        ValueError: a training that our pipeline cannot sample from.
    """
    row = KINDS[kind]
    if row.backbone == "mae":
        return {"alpha_min": flags.get("min_decay") if row.needed else None, "norm_pixels": flags.get("norm_pix_loss")}
    if kind == "dit" or row.backbone != "dit":
        return {}
    prediction, path = flags.get("prediction", "velocity"), flags.get("path_type", "Linear").lower()
    if prediction != "velocity" or path not in PATHS:
        raise ValueError(f"the model predicts the {prediction} on the path {path}; only velocities on {' or '.join(PATHS)} can be sampled")
    return {"alpha_min": flags.get("min_sigma") if row.defaults else None, "path": path}


def pipeline_for(kind: str, model: nn.Module, path: str = "linear", vae: AutoencoderKL | None = None, **training: Any) -> Pipeline:
    """The pipeline that samples as the published code does.

    Args:
        path: of sit and decayed-sit.
        training: what is known of the weights.
    """
    betas: dict[str, Any] = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    if kind == "uvit":
        times = (model.config.time_scale, model.config.time_offset)
        betas = next((betas for known, betas in UVIT_TIMES.values() if known == times), {})
        if not betas:
            raise ValueError(f"no betas are known for a U-ViT with time_scale and time_offset {times}; choose from {list(UVIT_TIMES)}")
    if kind in ("dit", "uvit"):
        learned = model.config.get("learn_sigma", False)
        variance = "learned_range" if learned else "fixed_large" if kind == "dit" else "fixed_small"
        # DiT takes its steps from 999 to 0 (diffusion/respace.py), and clips nothing
        scheduler = DDPMScheduler(**betas, variance_type=variance, clip_sample=False, timestep_spacing="linspace")
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
    # forward_with_cfg of DiT and SiT moves three channels, whatever their number
    return Pipeline(model, scheduler, (), training, path, None if kind == "uvit" else 3, vae)


@torch.no_grad()
def take_our_images(model: nn.Module) -> None:
    """Let a published MAE, made for images in [0, 1] normalised by ImageNet's statistics, take ours in [-1, 1]: same features.

    With `norm_pixels` off the prediction becomes one of our pixels, exactly. With it on it stays one of pixels that were normalised
    over the patch after ImageNet's statistics, so `reconstruct` is a little off in colour, and the loss too.
    """
    if model.config.in_channels != 3:
        raise ValueError(f"the weights are for {model.config.in_channels} channels; ImageNet's statistics, which they need, are for 3")
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    scale, shift = 0.5 / std, (0.5 - mean) / std  # their value of a channel is scale * ours + shift
    kernels = model.patch_embed.weight.view(model.config.dim, 3, -1)  # (D, C, p * p)
    model.patch_embed.bias += (kernels * shift[:, None]).sum(dim=(1, 2))
    kernels *= scale[:, None]
    if not model.config.norm_pixels:
        model.decoder_pred.weight.view(-1, 3, model.config.decoder_dim).div_(scale[:, None])
        model.decoder_pred.bias.view(-1, 3).sub_(shift).div_(scale)


def convert(
    kind: str,
    source: Path,
    target: Path,
    ema: bool = True,
    path: str | None = None,
    times: str | None = None,
    vae: str | None = None,
    **sizes: Any,
) -> nn.Module:
    """Write `target`, whole or not at all: `ema/` or `model/`, and what a pipeline needs beside it; returns the model.

    An MAE is written so that it takes images in [-1, 1], see `take_our_images`.

    Args:
        source: .pt, .pth or .safetensors.
        ema: of a training checkpoint take the averaged weights.
        path: of sit and decayed-sit, a key of `models.paths.PATHS`; None takes what the checkpoint's flags say, else "linear".
        times: of uvit, a key of `UVIT_TIMES`.
        vae: folder or hub name of the AutoencoderKL whose latents the model samples.
        sizes: see `from_official`.

    Raises:
        ValueError: a file that cannot be read or is refused, weights that do not fit, a `target` that is there already.
    """
    row = find_kind(kind)
    if target.exists():
        raise ValueError(f"{target} is there already; delete it or choose another folder")
    sampled = [name for name, row in KINDS.items() if row.backbone != "mae"]
    for name, value, fits in (("path", path, ["sit", "decayed-sit"]), ("times", times, ["uvit"]), ("vae", vae, sampled)):
        if value is not None and kind not in fits:
            raise ValueError(f"--{name} says nothing of the kind {kind}; leave it away")
    checkpoint = read_checkpoint(source)
    weights, part = weights_of(checkpoint, ema)
    flags = checkpoint.get("args")
    told = told_by_flags(kind, vars(flags) if isinstance(flags, argparse.Namespace) else {})
    told_path = told.pop("path", "linear")
    if times is not None:
        sizes |= dict(zip(("time_scale", "time_offset"), UVIT_TIMES[times][0], strict=True))
    decoder = load_vae(vae) if vae else None
    model = from_official(kind, weights, **{**told, **{name: value for name, value in sizes.items() if value is not None}})
    if decoder is not None and decoder.config.latent_channels != model.config.in_channels:
        raise ValueError(
            f"the VAE {vae} has {decoder.config.latent_channels} channels, the model {model.config.in_channels}; choose another"
        )
    training = dict(converted_from=f"{kind} ({row.source})", file=source.name)
    if row.backbone == "mae":
        take_our_images(model)
    with written_aside(target) as aside:
        model.save_pretrained(aside / part)
        if row.backbone == "mae":
            write_json(aside / INDEX, {"model": [type(model).__module__, type(model).__name__], "training": training})
        else:
            pipeline = pipeline_for(kind, model, path or told_path, decoder, **training)
            pipeline.scheduler.save_pretrained(aside / "scheduler")
            if decoder is not None:
                decoder.save_pretrained(aside / "vae")
            write_json(aside / INDEX, dict(pipeline.config))
    return model


def main() -> None:
    """The command line."""
    flags = Parser(description=__doc__)
    flags.add_argument("kind", choices=KINDS, metavar="kind", help=f"whose weights: {', '.join(KINDS)}")
    flags.add_argument("source", type=Path, help=".pt, .pth or .safetensors")
    flags.add_argument("target", type=Path, help="folder to write")
    flags.add_argument("--image_size", type=int, help="edge of the input (of latents, where it has latents), if positions are missing")
    flags.add_argument("--num_classes", type=int, help="real classes, if the label table has no row for 'no label'")
    flags.add_argument("--num_heads", type=int, help="attention heads, if the width is not a published one")
    flags.add_argument("--decoder_num_heads", type=int, help="the same, of an MAE's decoder")
    flags.add_argument("--alpha_min", type=float, help="of decayed-sit (default: .8) and decayed-mae (no default)")
    flags.add_argument("--norm_pixels", action=argparse.BooleanOptionalAction, help="an MAE's loss was on normalised pixels (default)")
    flags.add_argument("--path", choices=PATHS, help="path that a SiT was trained on (default: what the checkpoint says, else linear)")
    flags.add_argument("--times", choices=UVIT_TIMES, help="how a U-ViT counted time (default: discrete without a last convolution)")
    flags.add_argument("--vae", help="folder or hub name of the VAE, such as stabilityai/sd-vae-ft-mse")
    flags.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="the averaged weights, where there are some")
    parsed = flags.parse_args()
    with one_line_errors():
        model = convert(**vars(parsed))
        config = model.config
        classes = f", {config.num_classes} classes" if "num_classes" in config else ""
        print(
            f"{parsed.target}: {type(model).__name__}, {model.num_parameters():,} parameters, depth {config.depth}, width {config.dim}, "
            f"{config.num_heads} heads, {config.in_channels} x {config.image_size} x {config.image_size}, patch {config.patch_size}"
            f"{classes}, {describe(model.shortcuts)}"
        )
        if KINDS[parsed.kind].fresh:
            print("there was no decoder in it: the one written is untrained, so use the features and not the predictions")
        elif config.in_channels == 4 and not parsed.vae:
            print("4 channels are latents: give --vae to get images (the published models use stabilityai/sd-vae-ft-mse)")


if __name__ == "__main__":
    main()
