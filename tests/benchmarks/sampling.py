"""Sampling at equal quality: the cheapest of our settings whose distance is within 2 % of the published sampler's."""

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.extractors import LITE0, create_extractor, weights_hash
from eval.features import ArrayImages, extract_features, reference_features
from eval.generate import SamplingOptions, class_labels, generate, label_counts
from eval.intervals import Estimate, difference
from eval.metrics import frechet, statistics
from models.compiling import has_compiler
from models.files import sha256, written_aside
from models.pipeline import Pipeline, to_uint8
from models.precision import precision
from models.progress import progress_bar
from tests.benchmarks.published import SAMPLER_STEPS, published_sampler
from training.packing import cache_dir, load_images

CHECKPOINT = Path(__file__).resolve().parents[2] / "models/pretrained/openmoji-decayed"
TOLERANCE = 1.02
FEATURES = 1280  # the extractor's
BATCH = 32
SCREENED = 8  # a setting is ruled out, where that is clear, by one of so many parts of the images
GUIDANCE = 1.5  # at which DiT and SiT report their distances
SAMPLER_PARTS = 10  # one tenth of the published sampler's steps is timed, which are all alike
INTERVALS = ((0.0, 0.5), (0.0, 0.75), (0.0, 1.0))
# each sampler with few steps and more, guided in the first part of the time (which moves the distance) and in all of it
LADDER = tuple(
    SamplingOptions(
        batch_size=BATCH,
        sampler=sampler,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        guidance_from=low,
        guidance_to=high,
    )
    for steps in (4, 5, 6, 8, 10, 12, 16, 24)
    for low, high in INTERVALS
    for sampler in ("unipc", "dpm++", *["heun"] * (steps <= 6))
)


@dataclass(frozen=True)
class Tried:
    """One of our settings.

    Attributes:
        passes: of an image through the network; a guided step has two.
        num_images: that were looked at.
        distance: of its images, from the same noise and labels as the published sampler's.
        ratio, low, high: of the distance to theirs, and its 95 % interval, over pairs of images.
    """

    options: SamplingOptions
    passes: float
    num_images: int
    distance: float
    ratio: float
    low: float
    high: float

    @property
    def as_good(self) -> bool:
        return self.ratio <= TOLERANCE

    @property
    def quality(self) -> str:
        """What may be said of it: few images leave an interval that reaches beyond."""
        if not self.as_good:
            return "QUALITY NOT EQUAL"
        return "equal quality" if self.high <= TOLERANCE else "quality equal as far as these few images tell"

    @property
    def words(self) -> str:
        options = self.options
        return f"{options.sampler}, {options.num_inference_steps} steps, guided from {options.guidance_from:g} to {options.guidance_to:g}"

    def as_json(self) -> dict[str, Any]:
        names = ("sampler", "num_inference_steps", "guidance_from", "guidance_to")
        setting = {name: getattr(self.options, name) for name in names}
        return setting | {name: getattr(self, name) for name in ("passes", "num_images", "distance", "ratio", "low", "high", "as_good")}


def search(
    settings: Iterable[SamplingOptions], judge: Callable[[SamplingOptions], Tried], passes: Callable[[SamplingOptions], float]
) -> list[Tried]:
    """Try settings from the cheapest on, until one is as good; of equal cost in the order given."""
    tried = []
    for options in sorted(settings, key=passes):
        tried.append(judge(options))
        if tried[-1].as_good:
            break
    return tried


def taken(tried: list[Tried]) -> Tried:
    """The one that is as good, which comes last; or else the one that is nearest to it."""
    return tried[-1] if tried[-1].as_good else min(tried, key=lambda each: each.ratio)


def quality_notes(tried: list[Tried], theirs: Estimate, num_images: int) -> tuple[str, ...]:
    """What was tried, from the cheapest on, and how near it came: of settings alone that came nearer than all cheaper ones."""
    few = " (so few that it is strongly biased: look at the intervals)" if num_images < FEATURES else ""
    notes = [
        f"FD ({LITE0}) of {num_images:,} images{few}: {theirs.value:.1f} by {SAMPLER_STEPS} steps of Euler; by ours, "
        f"of {len(tried)} settings from the cheapest on, those that came nearer than all before:"
    ]
    for i, each in enumerate(tried):
        if i and each.ratio >= min(before.ratio for before in tried[:i]):
            continue
        word = "within 2 %" if each.as_good else "not within 2 %"
        ratio = f"{each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}] of it"
        part = f" ({each.num_images} images)" if each.num_images < num_images else ""
        notes.append(f"{each.words}, {each.passes:g} passes: {each.distance:.1f}, {ratio}{part}: {word}")
    return tuple(notes)


class Sampling:
    """Both sides, with the same weights, noise and labels.

    Theirs is the published way in fp32; ours is the pipeline, in the precision that pays here.

    Args:
        num_images: by which the sides are judged.
        checkpoint: a flow of images with classes.
        data: what its images are compared with.
    """

    def __init__(self, num_images: int, checkpoint: Path = CHECKPOINT, data: str = "openmoji", split: str = "all") -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if precision("auto") == "bf16" else torch.float32
        self.num_images, self.checkpoint, self.compiles = num_images, checkpoint, has_compiler()
        self.theirs = Pipeline.from_pretrained(checkpoint).to(device)
        self.ours = Pipeline.from_pretrained(checkpoint, torch_dtype=dtype).to(device)
        self.data = load_images(data, self.theirs.image_shape[1], split)
        self.counts = label_counts(tuple(self.theirs.config.class_names), SamplingOptions(), self.data)
        self.extractor = create_extractor(LITE0)
        self.weights = weights_hash(self.extractor)

    def labels(self, start: int, count: int) -> list[int]:
        """Of the images that come from the noise seeded `start` and above."""
        return class_labels(self.theirs.num_classes, SamplingOptions(num_samples=count, seed=start), self.counts)

    def theirs_of(self, start: int, count: int, steps: int = SAMPLER_STEPS) -> torch.Tensor:
        """Their images, or the state after some of the steps."""
        device = self.theirs.device
        labels = torch.tensor(self.labels(start, count), device=device)
        noise = self.theirs.noise(count, start).to(device)
        return published_sampler(self.theirs.model, noise, labels, GUIDANCE, self.theirs.num_classes, steps)

    def ours_of(self, options: SamplingOptions, num_images: int) -> np.ndarray:
        """Our images, uint8 (N, H, W, 3)."""
        return generate(self.ours, replace(options, num_samples=num_images, compile=self.compiles), self.counts)

    def passes(self, options: SamplingOptions) -> float:
        """Of an image through the network, counted."""
        seen = []
        counter = self.ours.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        generate(self.ours, replace(options, num_samples=2), self.counts)  # not compiled, as the hook would be too
        counter.remove()
        return sum(seen) / 2

    def judge(self, options: SamplingOptions) -> Tried:
        """Look at our images beside theirs: at a part first, and at all if that does not rule the setting out.

        The distance of few images is biased upwards on both sides, which moves the ratio towards 1: what a part rules out is out.
        """
        passes, part = self.passes(options), max(self.num_images // SCREENED, BATCH)
        first = self._look(options, passes, part)
        return first if first.low > TOLERANCE or part >= self.num_images else self._look(options, passes, self.num_images)

    def _look(self, options: SamplingOptions, passes: float, num_images: int) -> Tried:
        images = ArrayImages(self.ours_of(options, num_images))
        ours, theirs = self._distance(extract_features(images, self.extractor, BATCH, "ours")), self.theirs_at(num_images)
        low, high = difference(ours, theirs).interval()
        ratio = ours.value / theirs.value
        return Tried(options, passes, num_images, ours.value, ratio, 1 + low / theirs.value, 1 + high / theirs.value)

    @property
    def their_distance(self) -> Estimate:
        """Of all images."""
        return self.theirs_at(self.num_images)

    def theirs_at(self, num_images: int) -> Estimate:
        """Of the first ones."""
        return self._distance(self._features_of_theirs[:num_images])

    @cached_property
    def _features_of_theirs(self) -> np.ndarray:
        starts = progress_bar(range(0, self.num_images, BATCH), "images of the published sampler", unit=" batches")
        return np.concatenate([self._their_features(start, min(BATCH, self.num_images - start)) for start in starts])

    def _their_features(self, start: int, count: int) -> np.ndarray:
        """Of a batch of their images (count, D): drawn once, which takes long, then read from the cache."""
        files = sorted(self.checkpoint.rglob("*.safetensors"))
        code = inspect.getsource(published_sampler)
        key = "\n".join([*map(sha256, files), code, self.weights, str(self.labels(start, count)), f"{GUIDANCE} {start}", torch.__version__])
        path = cache_dir() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if not path.is_file():
            features = extract_features(ArrayImages(to_uint8(self.theirs_of(start, count))), self.extractor, BATCH, "theirs")
            with written_aside(path) as aside, aside.open("wb") as file:
                np.save(file, features)
        return np.load(path)

    def _distance(self, features: np.ndarray) -> Estimate:
        return frechet(features, self._reference)

    @cached_property
    def _reference(self) -> Any:
        return statistics(reference_features(self.data, self.extractor, self.weights, BATCH))
