"""Sampling several checkpoints from the same noise, step by step, so that all can be watched and stopped."""

import os
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.catalog import Card, Source, cards_of, label_index
from app.libraries import load_libraries
from app.settings import OWN_SAMPLER, Comparison, Settings

if TYPE_CHECKING:
    from models.pipeline import Pipeline, Step

MAX_PIPELINES = 4


@dataclass(frozen=True, eq=False)
class Frame:
    """The state of a comparison after a step.

    Attributes:
        images: uint8 (N, H, W, C) of each checkpoint: what the sampling points at, and in the last frame what it arrived at.
        step: network evaluations done, of the side that takes most.
        num_steps: network evaluations in all, of that side.
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

    @property
    def num_bytes(self) -> int:
        """Of the images."""
        return sum(images.nbytes for images in self.images)


Frames = Generator[Frame, None, None]  # closing it ends the sampling


class PipelineCache:
    """The pipelines that were used last, loaded anew when their files change."""

    def __init__(self, size: int = MAX_PIPELINES) -> None:
        self.size = size
        self._loaded: OrderedDict[Source, tuple[Any, Pipeline]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: Source) -> "Pipeline":
        """The pipeline of a checkpoint, on the GPU where there is one.

        Raises:
            ValueError: it cannot be loaded.
        """
        with self._lock:
            version = source.version
            kept = self._loaded.pop(source, None)
            pipeline = kept[1] if kept and kept[0] == version else _load(source)
            self._loaded[source] = version, pipeline
            while len(self._loaded) > self.size:
                self._loaded.popitem(last=False)
            return pipeline

    def let_go(self) -> None:
        """Of all, where there is a GPU, so that a training finds room on it; what is asked for again is loaded anew.

        It does not wait for a checkpoint that is being loaded: whoever starts trainings keeps others waiting.
        """
        if not self._loaded:
            return
        from models.precision import uses_gpu

        if uses_gpu() and self._lock.acquire(timeout=1):
            try:
                self._loaded.clear()
            finally:
                self._lock.release()
            _give_back()


def _load(source: Source) -> "Pipeline":
    load_libraries()
    from models.pipeline import Pipeline
    from models.precision import uses_gpu

    pipeline = Pipeline.from_pretrained(source.folder, ema=source.averaged)
    if source.step is not None:
        _put_weights(pipeline.model, source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if uses_gpu() else "cpu")


def _put_weights(model: Any, source: Source) -> None:
    """Those that a training left at an earlier step."""
    from safetensors import SafetensorError

    from training.checkpoint import averages_in, weights_in
    from training.ema import EMA

    try:
        if source.averaged:
            ema = EMA(model.parameters(), decay=1.0)
            ema.load_state_dict(averages_in(source.snapshot))
            ema.copy_to(model.parameters())
        else:
            model.load_state_dict(weights_in(source.snapshot))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source.snapshot.name} of {source.folder.name} is damaged and cannot be loaded") from error


loaded = PipelineCache()


def sample(comparison: Comparison, runs: Path, cache: PipelineCache = loaded, pipelines: "Sequence[Pipeline] | None" = None) -> Frames:
    """Sample the sides of a comparison; image i of each comes from noise seeded seed + i.

    All take a step at once, each on its part of the cores. Closing the iterator ends the sampling within a step.

    Args:
        comparison: what to sample; a random seed is drawn here, and told in the recipe.
        runs: folder of the runs.
        cache: where loaded pipelines are kept.
        pipelines: those of the sides, where somebody holds them already.

    Yields:
        A frame after each step, and a last one with `done`.

    Raises:
        ValueError: an unknown checkpoint, label or sampler.
    """
    try:
        yield from _sample(comparison, runs, cache, pipelines)
    finally:
        _give_back()  # when nothing of the sampling is held any more


def _sample(comparison: Comparison, runs: Path, cache: PipelineCache, pipelines: "Sequence[Pipeline] | None") -> Frames:
    comparison = comparison.settled()
    cards = cards_of([side.checkpoint for side in comparison.sides], runs)
    settings = [comparison.of(side) for side in comparison.sides]
    labels = [label_index(each, own.label) for each, own in zip(cards, settings, strict=True)]
    shared = [(each, label) for each, label, side in zip(cards, labels, comparison.sides, strict=True) if "label" not in side.own]
    if len(meant := {each.class_names[label] for each, label in shared if label is not None and each.class_names}) > 1:
        raise ValueError(f"label {comparison.shared.label} stands for {' and '.join(sorted(meant))} here; give the name of one")
    pipelines = pipelines or [cache.get(each.source) for each in cards]
    samplers = [
        pipeline.samplers[0] if own.sampler == OWN_SAMPLER else own.sampler for pipeline, own in zip(pipelines, settings, strict=True)
    ]
    recipe = comparison.as_json()
    for told, each, label, sampler in zip(recipe["checkpoints"], cards, labels, samplers, strict=True):
        told.update(_provenance(each, label, sampler))
    recipe |= _environment(pipelines, settings)

    streams = [_steps(*each) for each in zip(pipelines, labels, samplers, settings, strict=True)]
    states: list[Any] = [None] * len(streams)
    images: list[Any] = [None] * len(streams)
    started = time.perf_counter()
    with ThreadPoolExecutor(len(streams), initializer=_take_cores, initargs=(len(streams),)) as together:
        while True:
            going = [i for i, state in enumerate(states) if state is None or state.step < state.num_steps]
            for i, state in zip(going, together.map(next, [streams[i] for i in going]), strict=True):
                states[i] = state
                images[i] = _picture(pipelines[i], state)
            longest = max(states, key=lambda state: state.num_steps)
            done = all(state.step == state.num_steps for state in states)
            wall_s = time.perf_counter() - started
            yield Frame(tuple(images), longest.step, longest.num_steps, wall_s, {**recipe, "wall_s": round(wall_s, 3)}, done)
            if done:
                return


def _give_back() -> None:
    """What torch keeps of a GPU's memory for later: trainings are other processes, and may need it."""
    import torch

    torch.cuda.empty_cache()


def _take_cores(num_streams: int) -> None:
    """Of a thread that steps one of so many models: threads of one model wait for each other, models do not."""
    import torch

    from models.precision import uses_gpu

    if not uses_gpu():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_streams))


def _steps(pipeline: "Pipeline", label: int | None, sampler: str, settings: Settings) -> "Iterator[Step]":
    """The pipeline's steps, in the precision that pays here."""
    from models.precision import autocast

    stream = pipeline.steps(settings.num_images, label, settings.seed, settings.steps, settings.guidance_scale, sampler)
    while True:
        with autocast(pipeline.device, _precision()):  # entered anew for each step, and in the thread that takes it
            state = next(stream, None)
        if state is None:
            return
        yield state


def _picture(pipeline: "Pipeline", state: "Step") -> np.ndarray:
    """uint8 (N, H, W, C): the images; on the way there what the network points at, of latents a small image (see `Pipeline.glance`)."""
    from models.pipeline import to_uint8

    if state.step == state.num_steps:
        return to_uint8(pipeline.decode(state.x))
    return to_uint8(pipeline.glance(state.preview))


def _precision() -> str:
    """ "bf16" where the machine computes in it, else "no"."""
    from models.precision import precision

    return precision("auto")


def _environment(pipelines: "Sequence[Pipeline]", settings: list[Settings]) -> dict[str, Any]:
    import diffusers
    import torch

    noises = {(pipeline.latent_shape, own.seed) for pipeline, own in zip(pipelines, settings, strict=True)}
    return {
        "same_noise": len(noises) == 1,  # noise of another shape is other noise
        "precision": "bf16 autocast" if _precision() == "bf16" else "fp32",
        "device": pipelines[0].device.type,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _provenance(card: Card, label: int | None, sampler: str) -> dict[str, Any]:
    return {
        "sha256": card.source.hash,
        "sampler": sampler,
        "label": label,
        "ema": card.averaged,
        "alpha_min": card.alpha_min,
        "training": card.training,
    }
