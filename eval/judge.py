"""One feature pass over images -> every number that was asked for, with its protocol. What eval/fid.py and eval/compare.py share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from eval.extractors import EXTRACTORS, INCEPTION, INCEPTION_SHA256, FeatureExtractorBase, create_extractor, weights_hash
from eval.features import extract_features, extract_layers, reference_features
from eval.frechet import INFINITY_SAMPLES
from eval.generate import SamplingOptions, labels_rule
from eval.intervals import Estimate, of_repeats
from eval.metrics import Reference, extrapolated, frechet, inception_score, kernel_distance, precision_recall, statistics
from eval.sources import Source
from models.pipeline import Pipeline
from models.precision import device_name
from models.registry import backbone_name
from models.shortcut import effective_alpha
from training.options import option

# The fields that two numbers must share to stand in one column ...
COMPARABLE = (
    "num_samples",
    "feature_extractor",
    "feature_extractor_weights",
    "reference",
    "reference_split",
    "reference_fingerprint",
    "reference_num",
    "resolution",
)
# ... and those that say how a checkpoint sampled
SAMPLED = ("sampler", "steps", "guidance_scale", "guidance_interval", "guide", "labels", "precision")
_OF_CHECKPOINT = "checkpoint seed ema images_seen training_data alpha_min alpha_eff backbone params"
UNKNOWN = dict.fromkeys([*SAMPLED, *_OF_CHECKPOINT.split()])  # of images that no checkpoint made


@dataclass(frozen=True)
class MetricOptions:
    """Metrics: the Fréchet distance, and those asked for beside it; all from one pass."""

    feature_extractor: str = option(INCEPTION, "what to look through; efficientnet-lite0 needs no download", choices=EXTRACTORS)
    feature_extractor_weights_path: str | None = option(None, "its weights as a file; otherwise the package's, or downloaded")
    kid: bool = option(False, "also the kernel distance (KID), which is unbiased for few images")
    isc: bool = option(False, "also the Inception score")
    prc: bool = option(False, "also precision and recall")
    fd_infinity: bool = option(True, "also the distance extrapolated to infinitely many images, where there are 4 for every feature")


@dataclass(frozen=True)
class Measured:
    """Numbers by name, what was noticed, and how they were taken."""

    estimates: dict[str, Estimate]
    details: dict[str, dict[str, Any]]
    features: np.ndarray = field(repr=False)

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Value and interval of every number, and how it was taken."""
        return {name: {**estimate.as_json(), **self.details.get(name, {})} for name, estimate in self.estimates.items()}


class Judge:
    """An extractor and a reference, seen once, for any number of image sets.

    Args:
        source: the real images, or their statistics.
        options: the metrics.
        batch_size: images at once.

    Raises:
        ValueError: a metric that the reference or the extractor cannot give, or weights that cannot be had.
    """

    def __init__(self, source: Source, options: MetricOptions, batch_size: int) -> None:
        self.source, self.options, self.batch_size = source, options, batch_size
        without_images = source.images is None and "features" not in source.statistics
        if without_images and (options.kid or options.prc):
            raise ValueError(f"{source.name} holds mean and covariance alone; leave --kid and --prc away, or give images")
        self.extractor: FeatureExtractorBase = create_extractor(
            options.feature_extractor, options.feature_extractor_weights_path, scores=options.isc
        )
        self.weights = weights_hash(self.extractor, options.feature_extractor_weights_path)
        ours = source.about.get("feature_extractor"), source.about.get("feature_extractor_weights")
        if source.about and ours != (options.feature_extractor, self.weights):
            asked = f"{options.feature_extractor} ({self.weights})"
            raise ValueError(
                f"{source.name} was made with {ours[0]} ({ours[1]}), and {asked} is asked for; give the same --feature_extractor"
            )

    @property
    def device(self) -> torch.device:
        return next(self.extractor.parameters()).device

    @property
    def is_inception(self) -> bool:
        return self.options.feature_extractor == INCEPTION

    @property
    def names(self) -> dict[str, str]:
        """What the numbers are called: FID and KID where the features are Inception's alone."""
        return {"frechet": "FID", "kernel": "KID"} if self.is_inception else {"frechet": "FD", "kernel": "KD"}

    @cached_property
    def reference(self) -> Reference:
        """The real side; a data set is computed once and then read from the cache."""
        stored, source = self.source.statistics, self.source
        if source.images is None or (self.has_both and not (self.options.kid or self.options.prc)):
            return Reference(stored["mu"], stored["sigma"], stored.get("features"))
        if source.data is not None:
            features = reference_features(source.data, self.extractor, self.weights, self.batch_size)
        else:
            features = extract_features(source.images, self.extractor, self.batch_size, source.name)
        if self.has_both:
            return Reference(stored["mu"], stored["sigma"], features)
        return statistics(features)

    @property
    def has_both(self) -> bool:
        """The reference is one of ADM's files: Inception's statistics of a whole training set beside some of its images."""
        return bool(self.source.statistics) and self.source.images is not None and self.weights == INCEPTION_SHA256

    @property
    def reference_num(self) -> int | None:
        """Images that the distance is to; None where statistics do not say."""
        return None if self.has_both else self.source.num

    def __call__(self, images: Dataset, about: str) -> Measured:
        """Look at uint8 images (3, H, W)."""
        features, *scores = extract_layers(images, self.extractor, self.batch_size, about)
        return self.measure(features, *scores)

    def measure(self, features: np.ndarray, scores: np.ndarray | None = None) -> Measured:
        """From features (N, D) and class scores (N, K)."""
        reference, names, details = self.reference, self.names, {}
        if reference.mu.shape != features.shape[1:]:
            dims = f"{reference.mu.shape} features, and {self.options.feature_extractor} gives {features.shape[1:]}"
            raise ValueError(f"{self.source.name} is about {dims}; give statistics of the same extractor")
        at_n = frechet(features, reference)
        estimates = {names["frechet"]: at_n}
        if self.options.fd_infinity and len(features) >= INFINITY_SAMPLES * features.shape[1]:
            estimates[f"{names['frechet']}_infinity"] = extrapolated(features, reference, at_n)
        if self.options.kid:
            estimates[names["kernel"]], details[names["kernel"]] = kernel_distance(features, reference.require_features())
        if self.options.isc:
            assert scores is not None  # the extractor was made to give them
            estimates["IS"] = inception_score(scores)
        if self.options.prc:
            estimates["precision"], estimates["recall"] = precision_recall(features, reference.require_features())
        return Measured(estimates, details, features)

    def protocol(self, measured: Measured) -> dict[str, Any]:
        """What the numbers are of, apart from how the images came about."""
        source = self.source
        about: dict[str, Any] = {
            "reference": source.name,
            "reference_num": self.reference_num,
            "reference_fingerprint": source.fingerprint,
        }
        if source.data is not None:
            about["reference_split"] = source.data.split
        if source.size is not None:
            about["reference_size"] = list(source.size)
        about |= {name: value for name, value in source.about.items() if name.startswith("reference")}
        num, dim = measured.features.shape
        return {
            "num_samples": num,
            "feature_extractor": self.options.feature_extractor,
            "feature_extractor_weights": self.weights,
            "feature_dim": dim,
            **about,
            "batch_size": self.batch_size,
            "device": device_name(),
            "versions": {name: version(name) for name in ("torch", "torch-fidelity", "diffusers", "timm", "numpy")},
        }

    def result(self, found: Sequence[Measured], made: dict[str, Any], notes: Sequence[str]) -> dict[str, Any]:
        """The numbers with their protocol, as every JSON of an evaluation holds them.

        Args:
            found: of one sampling; of several, the numbers are their means.
            made: how the images came about, such as `checkpoint_protocol` tells it.
            notes: what a reader should know of that.
        """
        metrics = found[0].as_json()
        if len(found) > 1:
            several = {name: [each.estimates[name] for each in found] for name in metrics}
            means = {name: of_repeats([each.value for each in those], those[0].limits) for name, those in several.items()}
            metrics = {name: {**found[0].details.get(name, {}), **mean} for name, mean in means.items()}
        name = self.names["frechet"]
        return {
            "metric": name,
            **{key: metrics[name][key] for key in ("value", "low", "high", "level", "interval")},
            "metrics": metrics,
            "repeats": len(found),
            **self.protocol(found[0]),
            **made,
            "notes": [*notes, *self.notes(found[0])],
        }

    def notes(self, measured: Measured) -> list[str]:
        """What a reader of the numbers should know."""
        notes = list(self.source.notes)
        num, dim = measured.features.shape
        nums = [num] + [self.reference_num] * (self.reference_num is not None)
        if min(nums) < dim:
            few = f"{' and '.join(f'{each:,}' for each in nums)} images are judged by {dim:,} features"
            notes.append(f"{few}: the distance is strongly biased, and comparable only at the same numbers")
        if self.is_inception and self.weights != INCEPTION_SHA256:
            known = f"({INCEPTION_SHA256}...): not comparable with other FIDs"
            notes.append(f"the Inception weights (sha256 {self.weights}...) are not torch-fidelity's {known}")
        if self.source.images is None and not self.source.about:
            notes.append(f"{self.source.name} does not say through which extractor, and of which images, its statistics were taken")
        if self.has_both:
            notes.append(f"the Fréchet distance is to mu and sigma of {self.source.name}, other numbers to its {self.source.num:,} images")
        return notes


def checkpoint_protocol(
    checkpoint: str, pipeline: Pipeline, sampling: SamplingOptions, averaged: bool, counts: np.ndarray | None
) -> dict[str, Any]:
    """How a checkpoint's images came about; `averaged` says that its weights are (EMA), `counts` is `label_counts`'."""
    training = pipeline.config.training
    return {
        "checkpoint": checkpoint,
        "sampler": sampling.sampler or pipeline.samplers[0],
        "steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": f"{sampling.guidance_from:g} to {sampling.guidance_to:g}",
        "guide": sampling.guide,
        "seed": sampling.seed,
        "labels": labels_rule(pipeline.num_classes, sampling, counts),
        "precision": sampling.precision + ", compiled" * sampling.compile,
        "ema": averaged,
        "images_seen": training.get("images_seen"),
        "training_data": training.get("data"),
        "alpha_min": min(pipeline.model.alphas),
        "alpha_eff": effective_alpha(pipeline.model.alphas),
        "backbone": backbone_name(pipeline.model),
        "params": pipeline.model.num_parameters(),
        "resolution": pipeline.image_shape[1],
    }


def training_notes(pipeline: Pipeline, source: Source) -> list[str]:
    """What the checkpoint's training data mean for a number against this reference."""
    training, data = pipeline.config.training, source.data
    name = data.name if data is not None else source.about.get("reference", source.name)
    split = data.split if data is not None else source.about.get("reference_split")
    if os.path.realpath(training.get("data") or "") != os.path.realpath(name or ""):  # one folder has many names
        return [f"the checkpoint was trained on {training.get('data')}, and the reference is {name}"]
    if training.get("data_split") == "all" and split == "validation":
        return ["the reference was part of the training data"]
    return []


def numbers_words(result: dict[str, Any]) -> str:
    """The numbers with their intervals, and the extractor in brackets where a name does not say it."""

    def words(name: str, found: dict[str, Any]) -> str:
        extractor = "" if name.startswith(("FID", "KID")) else f" ({result['feature_extractor']})"
        return f"{name}{extractor} {found['value']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"

    return ", ".join(words(name, found) for name, found in result["metrics"].items())


def reference_words(result: dict[str, Any]) -> str:
    """Number and name of the reference."""
    num = f"{result['reference_num']:,} of " if result["reference_num"] else ""
    return f"{num}{result['reference']}" + (f" ({result['reference_split']})" if "reference_split" in result else "")
