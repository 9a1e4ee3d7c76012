"""Sampling several checkpoints from the same noise, step by step, so that all can be watched and stopped."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.catalog import Card, card, find, label_index
from models.files import INDEX

# torch and diffusers take seconds to import: they load with the first checkpoint, after the page has answered
if TYPE_CHECKING:
    from models.pipeline import Pipeline, Step

MAX_IMAGES = 64
MAX_STEPS = 250
MAX_PIPELINES = 4
RANDOM_SEED = -1
OWN_SAMPLER = "own"


@dataclass(frozen=True)
class Frame:
    """The state of a comparison after a step.

    Attributes:
        images: uint8 (N, H, W, C) of each checkpoint: what the sampling points at, and in the last frame what it arrived at.
        step: network evaluations done.
        num_steps: network evaluations in all.
        wall_s: seconds of sampling, without loading.
        recipe: everything that decides the images.
        done: this is the last frame.
    """

    images: tuple[np.ndarray, ...]
    step: int
    num_steps: int
    wall_s: float
    recipe: dict[str, Any]
    done: bool


class PipelineCache:
    """The pipelines that were used last, loaded anew when their files change."""

    def __init__(self, size: int = MAX_PIPELINES) -> None:
        self.size = size
        self._loaded: OrderedDict[Path, tuple[Any, Pipeline]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, path: Path) -> bool:
        return path in self._loaded

    def get(self, path: Path) -> "Pipeline":
        """The pipeline of a checkpoint, on the GPU where there is one.

        Raises:
            ValueError: it cannot be loaded.
        """
        with self._lock:
            version = _version(path)
            kept = self._loaded.pop(path, None)
            pipeline = kept[1] if kept and kept[0] == version else _load(path)
            self._loaded[path] = version, pipeline
            while len(self._loaded) > self.size:
                self._loaded.popitem(last=False)
            return pipeline


def _version(path: Path) -> list[tuple[str, int, int]]:
    """Changes when the files that a pipeline is loaded from do."""
    folders = (path / part for part in ("model", "ema", "scheduler", "vae"))
    files = [path / INDEX, *(file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()))]
    return [(str(file), stat.st_mtime_ns, stat.st_size) for file in files if file.is_file() for stat in [file.stat()]]


def _load(path: Path) -> "Pipeline":
    import torch

    from models.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


_cache = PipelineCache()


def compare(
    names: Sequence[str],
    runs: Path,
    label: str | int | None = None,
    seed: int = RANDOM_SEED,
    num_images: int = 8,
    steps: int = 20,
    guidance_scale: float = 2.0,
    sampler: str = OWN_SAMPLER,
    cache: PipelineCache = _cache,
) -> Iterator[Frame]:
    """Sample checkpoints side by side; image i of each comes from noise seeded seed + i.

    The checkpoints take turns, one step each. Closing the iterator ends the sampling within a step.

    Args:
        names: checkpoints of the catalogue.
        runs: folder of the runs.
        label: name or number of a class that all of them know; None samples without a label.
        seed: `RANDOM_SEED` draws one; the recipe tells which.
        num_images: of each checkpoint, at most `MAX_IMAGES`.
        steps: of the sampler, at most `MAX_STEPS`.
        guidance_scale: classifier-free guidance; 1 is none.
        sampler: one that suits them all (see `Pipeline.samplers`); `OWN_SAMPLER` is each one's own, Euler for a flow.
        cache: where loaded pipelines are kept.

    Yields:
        A frame after each step, and a last one with `done`.

    Raises:
        ValueError: an unknown checkpoint or label, or a number out of range.
    """
    num_images, steps = _whole("the number of images", num_images, 1, MAX_IMAGES), _whole("steps", steps, 1, MAX_STEPS)
    seed = _whole("seed", seed, RANDOM_SEED, 2**63 - 1 - MAX_IMAGES)
    seed = secrets.randbelow(2**31) if seed == RANDOM_SEED else seed
    guidance_scale = _number("guidance", guidance_scale)
    chosen = [card(name, runs) for name in names]
    labels = [label_index(each, label) for each in chosen]
    call = dict(num_images=num_images, seed=seed, num_inference_steps=steps, guidance_scale=guidance_scale)

    pipelines = [cache.get(find(name, runs)) for name in names]
    samplers = [pipeline.samplers[0] if sampler == OWN_SAMPLER else str(sampler) for pipeline in pipelines]
    recipe = {
        "label": label,
        **call,
        "sampler": " and ".join(dict.fromkeys(samplers)),
        **_environment(pipelines),
        "checkpoints": [*map(_provenance, chosen, labels)],
    }
    streams = [
        _steps(pipeline, class_labels=number, sampler=own, **call)
        for pipeline, number, own in zip(pipelines, labels, samplers, strict=True)
    ]
    started = time.perf_counter()
    for states in zip(*streams, strict=True):
        step, num_steps = states[0].step, states[0].num_steps
        done = step == num_steps
        shown = (pipeline.decode(state.x) if done else _preview(pipeline, state) for pipeline, state in zip(pipelines, states, strict=True))
        images = tuple(map(_to_uint8, shown))
        wall_s = time.perf_counter() - started
        yield Frame(images, step, num_steps, wall_s, {**recipe, "wall_s": round(wall_s, 3)}, done)


def warm_up(names: Sequence[str], runs: Path) -> None:
    """Import, load and take a step, so that the first visitor does not wait for it."""
    for _ in compare(names, runs, seed=0, num_images=1, steps=1):
        pass


def _steps(pipeline: "Pipeline", **call: Any) -> "Iterator[Step]":
    """The pipeline's steps, in the precision that pays here."""
    from models.precision import autocast

    stream = pipeline.steps(**call)
    while True:
        with autocast(pipeline.device, _precision()):  # entered anew for each step: between steps other models take theirs
            state = next(stream, None)
        if state is None:
            return
        yield state


def _preview(pipeline: "Pipeline", state: "Step") -> Any:
    """Images, or three channels of latents: decoding them in every step would take longer than sampling."""
    return state.preview if pipeline.vae is None else state.preview[:, :3]


def _to_uint8(images: Any) -> np.ndarray:
    from models.pipeline import to_uint8

    return to_uint8(images)


def _precision() -> str:
    """ "bf16" where the machine computes in it, else "no"."""
    from models.precision import precision

    return precision("auto")


def _environment(pipelines: "Sequence[Pipeline]") -> dict[str, Any]:
    import diffusers
    import torch

    return {
        "same_noise": len({pipeline.image_shape for pipeline in pipelines}) == 1,  # noise of another shape is other noise
        "precision": "bf16 autocast" if _precision() == "bf16" else "fp32",
        "device": pipelines[0].device.type,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _provenance(card: Card, label: int | None) -> dict[str, Any]:
    return {"name": card.name, "label": label, "ema": card.averaged, "alpha_min": card.alpha_min, "training": card.training}


def _whole(what: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or not least <= value <= most:
        raise ValueError(f"{what} cannot be {value}; give a whole number from {least:,} to {most:,}")
    return int(value)


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} cannot be {value!r}; give a number")
    return float(value)
