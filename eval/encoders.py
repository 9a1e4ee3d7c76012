"""Networks as probes see them: images -> the tokens of every block."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from models.files import has_averages, require_memory
from models.paths import from_sigma, interpolate
from models.pipeline import Pipeline
from models.precision import autocast, precision
from models.progress import progress_bar
from models.registry import backbone_name, load_backbone, read_index
from models.shortcut import effective_alpha
from training.data import ImageData
from training.latents import encode

Times = Sequence[float | None]
TEST_SEEDS = 2**31  # noise of test image i is seeded seed + TEST_SEEDS + i; torch takes the last 32 bits


class Encoder(ABC):
    """A network, and what a probe must know about it.

    Attributes:
        network: in evaluation mode.
        about: of the network, for protocols.
        resolution: edge in pixels of the images that it takes.
        times: flow times (0 = noise, 1 = data) at which it looks; (None,) if it takes clean images.
        num_extras: tokens before the patches; the first is the class token if `has_class_token`.
    """

    times: Times = (None,)
    num_extras = 0
    has_class_token = False

    def __init__(self, network: nn.Module, about: dict[str, Any], resolution: int) -> None:
        self.network, self.about, self.resolution = network.eval().requires_grad_(False), about, resolution

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def poolings(self) -> tuple[str, ...]:
        """Ways to make one vector of a block's tokens: the mean of all, the mean of the patches, the class token."""
        return ("mean", *(("patches",) * (self.num_extras > 0)), *(("class",) * self.has_class_token))

    def reader(self, data: ImageData) -> Callable[[np.ndarray], Tensor]:
        """Indices (N,) -> what the network sees of these images, float (N, C, H, W) on its device; nothing is drawn."""
        return lambda indices: data.samples(data.rows(indices), self.device, None, None)

    @abstractmethod
    def blocks(self, inputs: Tensor, seed: int, times: Times) -> Iterator[tuple[float | None, list[Tensor]]]:
        """Look at inputs (N, C, H, W): for every one of the times the tokens, one (N, T, D) for each block.

        Args:
            seed: input i is made noisy, where that is done, by a generator of its own, seeded seed + i.
        """


class MAEEncoder(Encoder):
    """The encoder of a masked autoencoder, which sees the whole image."""

    num_extras, has_class_token = 1, True

    def blocks(self, inputs: Tensor, seed: int, times: Times) -> Iterator[tuple[float | None, list[Tensor]]]:
        yield None, self.network.features(inputs)


class DiffusionEncoder(Encoder):
    """A diffusion model that looks at noisy images; it is never told a label.

    Args:
        pipeline: of the model.
        times: shares of data in the input, on the linear path: time t is t * data + (1 - t) * noise. A model of another path, or a
            DDPM, is given the point of its own with the same proportion of data and noise.
    """

    times: tuple[float, ...]

    def __init__(self, pipeline: Pipeline, about: dict[str, Any], times: Sequence[float]) -> None:
        super().__init__(pipeline.model, about, pipeline.image_shape[-1])
        self.pipeline, self.times = pipeline, tuple(times)

    def reader(self, data: ImageData) -> Callable[[np.ndarray], Tensor]:
        if self.pipeline.vae is None:
            return super().reader(data)
        latents = encode(data, self.pipeline.vae.to(self.device), flips=False)
        return lambda indices: torch.from_numpy(latents.moments[indices, 0]).to(self.device).float()  # the means

    def blocks(self, inputs: Tensor, seed: int, times: Times) -> Iterator[tuple[float | None, list[Tensor]]]:
        noise = self.pipeline.noise(len(inputs), seed).to(inputs.device)  # one for all times
        for time in times:
            assert time is not None  # only of clean images
            x_t, t = self.noisy(inputs, noise, time)
            dtype = self.network.dtype
            yield time, self.network(x_t.to(dtype), t.expand(len(inputs)), labels=None, return_features=True)[1]

    def noisy(self, data: Tensor, noise: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """What the network is given for data (N, C, H, W): the noisy input, and the number () that stands for the time."""
        if self.pipeline.is_flow:
            t = torch.tensor(time, device=data.device)
            return from_sigma(interpolate(data, noise, t), 1 - t, self.pipeline.config.path)
        timestep = self.timestep(time)
        alpha_bar = self.pipeline.scheduler.alphas_cumprod[timestep].to(data.device)
        return alpha_bar.sqrt() * data + (1 - alpha_bar).sqrt() * noise, torch.tensor(timestep, device=data.device)

    def timestep(self, time: float) -> int:
        """Of a DDPM: where sqrt(alpha_bar) : sqrt(1 - alpha_bar) comes nearest to time : 1 - time."""
        alpha_bar = self.pipeline.scheduler.alphas_cumprod
        angles = torch.atan2(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        return int((angles - torch.atan2(torch.tensor(time), torch.tensor(1 - time))).abs().argmin())


class TimmEncoder(Encoder):
    """Any network of timm that tells its intermediate features; its blocks are theirs, its last block is its output before pooling."""

    def __init__(self, network: nn.Module, about: dict[str, Any], resolution: int) -> None:
        super().__init__(network, about, resolution)
        self.num_extras = getattr(network, "num_prefix_tokens", 0)
        self.has_class_token = bool(self.num_extras and getattr(network, "has_class_token", True))
        mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        self.shift, self.scale = 2 * mean - 1, 2 * std  # of pixels in [-1, 1]

    def blocks(self, inputs: Tensor, seed: int, times: Times) -> Iterator[tuple[float | None, list[Tensor]]]:
        x = (inputs - self.shift.to(inputs)) / self.scale.to(inputs)
        extras = {"return_prefix_tokens": True} if self.num_extras else {}
        last, blocks = self.network.forward_intermediates(x, **extras)
        tokens = [torch.cat([block[1], _tokens(block[0])], dim=1) if isinstance(block, tuple) else _tokens(block) for block in blocks]
        last = last if last.ndim == 3 else _tokens(last, self.network.num_features)
        # of a transformer the output is the last block's, normalised; a convolutional network may widen it once more
        yield None, [*tokens[:-1], last] if last.shape == tokens[-1].shape else [*tokens, last]


def _tokens(x: Tensor, channels: int | None = None) -> Tensor:
    """A map (N, D, H, W), or (N, H, W, D) if D = `channels` is there alone, -> (N, H * W, D)."""
    if channels not in (None, x.shape[1]):
        x = x.permute(0, 3, 1, 2)
    return x.flatten(2).transpose(1, 2)


def load_encoder(path: str, ema: bool = True, times: Sequence[float] = (0.5, 0.7, 0.9)) -> Encoder:
    """A run or a shipped checkpoint.

    Args:
        path: its folder.
        ema: prefer the averaged weights.
        times: where a diffusion model looks, in [0, 1].

    Raises:
        ValueError: not a checkpoint, or one that cannot be loaded.
    """
    index = read_index(path)
    pipeline = Pipeline.from_pretrained(path, ema) if "scheduler" in index else None
    network = pipeline.model if pipeline else load_backbone(path, ema)
    training = index.get("training") or {}
    about = {
        "checkpoint": path,
        "ema": ema and has_averages(path),
        "images_seen": training.get("images_seen"),
        "training_data": training.get("data"),
        "training_split": training.get("data_split"),
        "alpha_min": min(network.alphas),
        "alpha_eff": effective_alpha(network.alphas),
        "backbone": backbone_name(network),
        "params": network.num_parameters(),
    }
    return DiffusionEncoder(pipeline, about, times) if pipeline else MAEEncoder(network, about, network.config.image_size)


def timm_encoder(name: str, weights: str | None = None, resolution: int | None = None) -> Encoder:
    """A network of timm.

    Args:
        name: timm's.
        weights: a .pth or .safetensors; "pretrained" downloads those that timm knows; None leaves it at random.
        resolution: edge in pixels of the images; None takes the one that its weights were made for.

    Raises:
        ValueError: a name that timm does not know, or weights that cannot be had or do not fit.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:4])
        raise ValueError(f"timm has no model {name!r}{f'; it has {near}, ...' if near else '; timm.list_models() names all'}")
    if weights not in (None, "pretrained") and not Path(weights).is_file():
        raise ValueError(f"--timm_weights {weights} is not a file; give a .pth or .safetensors, or the word pretrained")
    options = {"pretrained": weights == "pretrained", "checkpoint_path": weights if weights not in (None, "pretrained") else ""}
    try:
        try:
            network = timm.create_model(name, **options, **({"img_size": resolution} if resolution else {}))
        except TypeError:  # most networks take images of any size, and have no such argument
            network = timm.create_model(name, **options)
    except Exception as error:  # of the hub, of torch, of timm: many kinds
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"the weights {weights} of {name} cannot be loaded ({reason}); give a file that fits with --timm_weights"
        ) from None
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"timm's {name} does not tell its intermediate features; choose another network, or save features and use --features"
        )
    about = {
        **dict.fromkeys(["ema", "images_seen", "alpha_min", "alpha_eff"]),
        "timm_weights": weights or "random",
        "backbone": name,
        "params": sum(parameter.numel() for parameter in network.parameters()),
    }
    return TimmEncoder(network, about, resolution or network.pretrained_cfg["input_size"][-1])


# ----------------------------------------------------------------------------------------------------------------- features


class Place(NamedTuple):
    """Where features come from.

    Attributes:
        time: flow time of the noisy input; None where the network takes clean images.
        block: its number, from 0; or the name of features that came from a file.
        pooling: see `Encoder.poolings`.
    """

    time: float | None
    block: int | str
    pooling: str

    def __str__(self) -> str:
        return f"block {self.block}, {self.pooling}" + ("" if self.time is None else f", t = {self.time:g}")


@torch.no_grad()
def block_shapes(encoder: Encoder, data: ImageData) -> list[tuple[int, int]]:
    """(T, D) of every block's tokens, found by a look at one image."""
    _, blocks = next(encoder.blocks(encoder.reader(data)(np.arange(1)), 0, encoder.times))
    return [tuple(tokens.shape[1:]) for tokens in blocks]


def block_features(
    encoder: Encoder,
    data: ImageData,
    blocks: Sequence[int] | None = None,
    poolings: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    mixed_precision: str = "no",
) -> dict[Place, Tensor]:
    """Pooled features (N, D) of every place, float32 on the CPU, in one pass over the data.

    Args:
        blocks, poolings: which; None takes all.
        seed: image i is made noisy, where that is done, by a generator seeded seed + i, whatever the batch size and the time.
        mixed_precision: of the network: "no" (fp32), "bf16", or "auto" for bf16 where it pays.

    Raises:
        ValueError: a block or a pooling that the network has not, features that are not finite, or more than memory can hold.
    """
    shapes = block_shapes(encoder, data)
    blocks, poolings = range(len(shapes)) if blocks is None else blocks, poolings or encoder.poolings
    for block in blocks:
        if not 0 <= block < len(shapes):
            raise ValueError(f"there is no block {block}; {encoder.about['backbone']} has {len(shapes)}, 0 to {len(shapes) - 1}")
    for pooling in poolings:
        if pooling not in encoder.poolings:
            raise ValueError(f"{encoder.about['backbone']} has no pooling {pooling!r}; choose from {', '.join(encoder.poolings)}")
    places = [Place(time, block, pooling) for time in encoder.times for block in blocks for pooling in poolings]
    require_memory(
        4 * len(data) * sum(shapes[place.block][1] for place in places), f"features of {len(data):,} images at {len(places)} places"
    )
    features = {place: torch.empty(len(data), shapes[place.block][1]) for place in places}
    for rows, time, tokens in _look(encoder, data, seed, batch_size, mixed_precision):
        for block in blocks:
            for pooling in poolings:
                features[Place(time, block, pooling)][rows] = pool(tokens[block], pooling, encoder.num_extras).cpu()
    for place, x in features.items():
        if not x.isfinite().all():
            raise ValueError(f"the features of {place} hold NaN or infinite numbers; the network broke down, or wants another precision")
    return features


def require_tokens(encoder: Encoder, *sides: ImageData) -> None:
    """Raise ValueError where all tokens of even the smallest block have no place in memory."""
    num = sum(map(len, sides))
    require_memory(4 * num * min(map(math.prod, block_shapes(encoder, sides[0]))), f"all tokens of {num:,} images")


def block_tokens(
    encoder: Encoder, data: ImageData, time: float | None, block: int, seed: int = 0, batch_size: int = 64, mixed_precision: str = "no"
) -> Tensor:
    """Tokens (N, T, D) of one block at one time, float32 on the CPU; the other arguments are those of `block_features`."""
    shape = len(data), *block_shapes(encoder, data)[block]
    require_memory(4 * math.prod(shape), f"all tokens of {len(data):,} images")
    found = torch.empty(shape)
    for rows, _, tokens in _look(encoder, data, seed, batch_size, mixed_precision, (time,)):
        found[rows] = tokens[block].float().cpu()
    return found


def pool(tokens: Tensor, pooling: str, num_extras: int) -> Tensor:
    """Tokens (N, T, D) -> float32 (N, D): the mean of all, the mean of the patches, or the class token."""
    if pooling == "class":
        return tokens[:, 0].float()
    return (tokens[:, num_extras:] if pooling == "patches" else tokens).mean(dim=1, dtype=torch.float32)


@torch.no_grad()
def _look(
    encoder: Encoder, data: ImageData, seed: int, batch_size: int, mixed_precision: str, times: Times | None = None
) -> Iterator[tuple[slice, float | None, list[Tensor]]]:
    """Batch by batch and time by time: which rows, which time, and the tokens of every block."""
    read = encoder.reader(data)
    what = f"looking at {data.name} ({data.split})"
    with (
        progress_bar(total=len(data), desc=what, unit=" images") as bar,
        autocast(encoder.device, precision(mixed_precision)),
    ):
        for start in range(0, len(data), batch_size):
            rows = slice(start, min(start + batch_size, len(data)))
            inputs = read(np.arange(rows.start, rows.stop))
            for time, tokens in encoder.blocks(inputs, seed + start, times or encoder.times):
                yield rows, time, tokens
            bar.update(rows.stop - start)
