"""A small Fréchet distance every so many steps of a training, from the averaged weights, with its protocol."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from models.files import read_json, write_json
from models.pipeline import Pipeline
from training.checkpoint import CONFIG, averaged
from training.data import ImageData
from training.ema import EMA
from training.options import option

# The judge, and with it torch-fidelity, takes seconds to import; a training that asks for no metrics does without.

REFERENCE_IMAGES = 5000  # of the training data, at most: the features of all of a large set would take longer than the training


@dataclass(frozen=True)
class WatchOptions:
    """Metrics during training."""

    metrics_during_training: int = option(
        0,
        "steps between Fréchet distances, to images trained on, of some drawn with the averaged weights (eval/during_training/); 0: none",
        least=0,
    )
    metrics_samples: int = option(256, "images to draw for each", least=2)
    metrics_extractor: str | None = option(None, "as --feature_extractor of eval/fid.py; unless given the one that needs no download")


def small_distance(
    options: WatchOptions, data: ImageData, class_names: Sequence[str], pipeline_of: Callable[[nn.Module, dict[str, Any]], Pipeline]
) -> Callable[[Path, int, nn.Module, EMA], dict[str, float]]:
    """What the loop calls every `metrics_during_training` steps: it prints the number, gives it to the log as "fd", and
    writes it to `eval/during_training/` as eval/fid.py does.

    Sampling is eval/fid.py's unless told otherwise: Euler, 20 steps, no guidance, the same seeds each time, labels as frequent as in
    the reference, which are up to `REFERENCE_IMAGES` of those trained on. All processes look at these here, before the training
    begins; later the main one works alone.

    Args:
        data: what is trained on, as images.
        class_names: that the model knows.
        pipeline_of: makes a pipeline of a network and of what its training went through.

    Raises:
        ValueError: an extractor or weights that cannot be had.
    """
    from eval.extractors import EXTRACTORS, LITE0
    from eval.features import ArrayImages
    from eval.generate import SamplingOptions, generate, label_counts
    from eval.judge import Judge, MetricOptions, checkpoint_protocol, numbers_words, reference_words, training_notes
    from eval.sources import Source, coloured
    from eval.spread import alone

    extractor = options.metrics_extractor or LITE0
    if extractor not in EXTRACTORS:
        raise ValueError(f"there is no --metrics_extractor {extractor}; choose from {', '.join(EXTRACTORS)}")
    few = some_of(data, REFERENCE_IMAGES)
    source = Source(data.name, ArrayImages(few.images), few.images.shape[2:0:-1], few)
    sampling = SamplingOptions(num_samples=options.metrics_samples, mixed_precision="auto")
    judge = Judge(source, MetricOptions(feature_extractor=extractor), sampling.batch_size)
    counts = label_counts(tuple(class_names), sampling, few)
    judge.reference  # noqa: B018 -- looks at it now

    def measure(run: Path, step: int, network: nn.Module, ema: EMA) -> dict[str, float]:
        began, config = time.monotonic(), read_json(run / CONFIG)
        went_through = {
            "images_seen": config.get("images_before", 0) + step * config["images_a_step"],
            "data": data.name,
            "data_split": data.split,
        }
        pipeline = pipeline_of(averaged(network, ema), went_through)
        settled = replace(sampling, sampler=pipeline.samplers[0])
        with alone():
            found = judge(ArrayImages(coloured(generate(pipeline, settled, counts))), f"step {step}")
        made = checkpoint_protocol(str(run), pipeline, settled, bool(ema.decay), counts)
        result = judge.result([found], {"step": step, **made}, training_notes(pipeline, source))
        result["wall_s"] = round(time.monotonic() - began, 2)
        write_json(run / "eval" / "during_training" / f"step-{step}.json", result)
        print(f"step {step}: {numbers_words(result)}, {result['num_samples']:,} samples against {reference_words(result)}", flush=True)
        return {"fd": round(result["value"], 3)}

    return measure


def some_of(data: ImageData, most: int) -> ImageData:
    """All of the images, or so many from all over the data set, with a fingerprint of their own."""
    if len(data) <= most:
        return data
    chosen = np.linspace(0, len(data) - 1, most).astype(int)
    labels = None if data.labels is None else data.labels[chosen]
    return replace(data, images=data.images[chosen], labels=labels, fingerprint=f"{data.fingerprint}-{most}")
