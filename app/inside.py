"""Looking inside networks: features of a generated image while it is denoised, and what masked autoencoders make of an image."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.linalg import eigh

from app.catalog import autoencoders, find
from app.libraries import load_libraries
from app.sampler import Frame, Frames, PipelineCache, loaded, sample
from app.settings import Comparison
from models.files import INDEX

MAX_BLOCKS, MAX_MOMENTS = 8, 6  # that are shown
MAX_PIXELS = 50_000_000  # of an uploaded picture
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def sample_features(comparison: Comparison, runs: Path, cache: PipelineCache = loaded) -> Frames:
    """Sample one image of each side, and look at the features of some blocks at some moments of the way.

    The features of a block become colours by their three principal components over all moments together, so a colour means the same
    from the noise to the image; it means nothing across blocks or checkpoints.

    Yields:
        A frame after each step; before it, whenever one more block is looked at, one with what there was, so that closing does not wait
        for all blocks. Its images are, side by side after the other, the previews (M, H, W, C) and for each block the patches as colours
        (M, h, w, 3), all uint8, of the moments so far; its recipe tells "moments" (evaluations done) and "blocks" (of each side, their
        numbers). Colours shift until the last moment is there.

    Raises:
        ValueError: as `sample`.
    """
    load_libraries()
    pipelines = [cache.get(find(side.checkpoint, runs)) for side in comparison.sides]
    asked: dict[int, list[tuple]] = {id(pipeline.model): [] for pipeline in pipelines}
    hooks = [
        model.register_forward_pre_hook(lambda model, arguments: asked[id(model)].append(arguments))
        for model in {id(pipeline.model): pipeline.model for pipeline in pipelines}.values()
    ]
    moments: list[int] = []
    previews: list[list[np.ndarray]] = [[] for _ in pipelines]
    kept: list[list[list[np.ndarray]]] = [[] for _ in pipelines]
    images: tuple[np.ndarray, ...] = ()
    blocks: list[list[int]] = []
    frames = sample(comparison, runs, cache, pipelines)
    try:
        with closing(frames):
            for frame in frames:
                wanted = {round(i * (frame.num_steps - 1) / (MAX_MOMENTS - 1)) + 1 for i in range(MAX_MOMENTS)}
                if frame.step in wanted and frame.step not in moments:
                    for i, pipeline in enumerate(pipelines):
                        previews[i].append(frame.images[i][0])
                        kept[i].append(_features(pipeline.model, asked[id(pipeline.model)][-1], hooks))
                    shown, blocks = [], [_spread(len(of_side[0]), MAX_BLOCKS) for of_side in kept]
                    for row in itertools.chain.from_iterable(map(_rows, previews, kept, blocks)):
                        shown.append(row)
                        yield _with(replace(frame, done=False), images, moments, blocks)
                    moments, images = [*moments, frame.step], tuple(shown)
                for calls in asked.values():
                    calls.clear()
                yield _with(frame, images, moments, blocks)
    finally:
        for hook in hooks:
            hook.remove()


def _with(frame: Frame, images: tuple[np.ndarray, ...], moments: Sequence[int], blocks: list[list[int]]) -> Frame:
    return replace(frame, images=images, recipe={**frame.recipe, "moments": tuple(moments), "blocks": blocks})


def _rows(pictures: list[np.ndarray], features: list[list[np.ndarray]], blocks: list[int]) -> Iterator[np.ndarray]:
    """Of one side: its previews, then the features of each block as colours."""
    yield _of_one_size(pictures)
    for block in blocks:
        yield colours(np.stack([moment[block] for moment in features]))


def _features(model: Any, arguments: tuple, hooks: Sequence[Any]) -> list[np.ndarray]:
    """(T, D) of every block, of the first image of a call."""
    import torch

    first = tuple(None if argument is None else argument[:1] for argument in arguments)
    with torch.inference_mode():
        _, features = model(*first, return_features=True)
    return [block[0].float().cpu().numpy() for block in features]


def colours(tokens: np.ndarray) -> np.ndarray:
    """Patches (M, T, D) -> uint8 (M, h, w, 3): their three principal components; T that is no square becomes a row."""
    moments, number, width = tokens.shape
    flat = tokens.reshape(-1, width).astype(np.float64)
    flat -= flat.mean(axis=0)
    axes = eigh(flat.T @ flat, subset_by_index=[max(0, width - 3), width - 1])[1][:, ::-1]  # all of wide blocks would take seconds
    axes *= np.where(axes.sum(axis=0) < 0, -1, 1)  # the sign of a component is arbitrary
    found = flat @ axes
    low, high = np.percentile(found, [1, 99], axis=0)
    scaled = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    scaled = np.pad(scaled, ((0, 0), (0, 3 - scaled.shape[1])))
    edge = round(number**0.5)
    height = edge if edge * edge == number else 1
    return (255 * scaled).round().astype(np.uint8).reshape(moments, height, number // height, 3)


def _of_one_size(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (M, H, W, C): what is seen of latents on the way has one pixel a cell, and becomes as large as the image."""
    edge = max(len(picture) for picture in pictures)
    return np.stack([picture.repeat(edge // len(picture), 0).repeat(edge // len(picture), 1) for picture in pictures])


def _spread(number: int, most: int) -> list[int]:
    """At most so many of 0 .. number - 1, evenly, with both ends."""
    most = min(number, most)
    return sorted({round(i * (number - 1) / max(1, most - 1)) for i in range(most)})


# ---------------------------------------------------------------------------------------------------- masked autoencoders


def reconstruct(names: Sequence[str], runs: Path, picture: Path, mask_ratio: float, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    """What masked autoencoders see of a picture, and what they make of it; the same patches are hidden from all of one patch grid.

    Args:
        names: of the catalogue's autoencoders.
        picture: a file from anywhere.
        mask_ratio: share of the patches that are hidden.
        seed: of the mask.

    Returns:
        For each its name and uint8 (3, H, W, 3): the picture, what is visible, and the reconstruction. Where pixels are normalised,
        brightness and contrast of each hidden patch are the picture's own.

    Raises:
        ValueError: another name, a file that is no picture, a mask that hides nothing or everything.
    """
    load_libraries()
    import torch

    from models.pipeline import to_uint8

    if not isinstance(mask_ratio, int | float) or not 0 < mask_ratio < 1:
        raise ValueError(f"the share of hidden patches cannot be {str(mask_ratio)[:50]}; give a number between 0 and 1")
    known, found = autoencoders(runs), []
    for name in names:
        if name not in known:
            listed = f"choose from {', '.join(known)}" if known else "train one first"
            raise ValueError(f"there is no masked autoencoder {str(name)[:100]!r}; {listed}")
        model = _autoencoder(known[name], (known[name] / INDEX).stat().st_mtime_ns)
        pixels = torch.from_numpy(_square(picture, model.config.image_size)).permute(2, 0, 1).float().div(127.5).sub(1)[None]
        with torch.inference_mode():
            seen, painted = model.reconstruct(pixels, mask_ratio=mask_ratio, generator=torch.Generator().manual_seed(seed))
        found.append((name, to_uint8(torch.cat([pixels, seen, painted]))))
    return found


@lru_cache(maxsize=4)
def _autoencoder(folder: Path, changed_ns: int) -> Any:
    from models.registry import load_backbone

    return load_backbone(folder)


def _square(picture: Path, edge: int) -> np.ndarray:
    """uint8 (edge, edge, 3): the middle of a picture, resized as those that were trained on."""
    from training.images import centre_square

    try:
        with Image.open(picture, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"this picture has more than {MAX_PIXELS // 10**6} million pixels; make it smaller")
            return centre_square(image, edge).copy()
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, of what a camera wrote beside the pixels too
        raise ValueError("this file is no picture that can be read; give a PNG or a JPEG") from error
