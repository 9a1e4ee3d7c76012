"""Seeds -> images, in batches."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from models.files import require_memory
from models.pipeline import MAX_SEED, SAMPLER_NAMES, Pipeline
from models.precision import autocast, precision
from training.options import option


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling: all that decides what a checkpoint draws."""

    num_samples: int = option(2048, "images to generate; at least the feature dimension, or the distance is strongly biased", least=2)
    seed: int = option(0, "image i comes from noise seeded seed + i, whatever the batch size", least=0)
    batch_size: int = option(64, "images at once", least=1)
    sampler: str | None = option(None, "solver; euler for flows and ddim for DDPMs unless given", choices=SAMPLER_NAMES)
    num_inference_steps: int = option(20, "steps of the sampler", least=1, most=1000)
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 is none", least=0, most=100)
    class_label: int | None = option(
        None, "draw this class only; otherwise image i is of class (seed + i) mod the number of classes", least=0
    )
    mixed_precision: str = option(
        "no", "no is fp32; auto is bf16 where the hardware has it; noted in the protocol", choices=("no", "auto", "bf16")
    )

    @property
    def precision(self) -> str:
        """Of the network: "fp32" or "bf16"."""
        return "fp32" if precision(self.mixed_precision) == "no" else "bf16"


def class_labels(num_classes: int, options: SamplingOptions) -> list[int] | None:
    """The label of every image: balanced over the classes, and dependent on seed + i alone; None if there are no classes.

    Raises:
        ValueError: --class_label is not a class.
    """
    if options.class_label is None:
        return [(options.seed + i) % num_classes for i in range(options.num_samples)] if num_classes else None
    if not num_classes:
        raise ValueError("this checkpoint is unconditional; leave --class_label away")
    if options.class_label >= num_classes:
        raise ValueError(f"--class_label is {options.class_label}; this checkpoint knows 0 to {num_classes - 1}")
    return [options.class_label] * options.num_samples


def labels_rule(num_classes: int, options: SamplingOptions) -> str | None:
    """In words, for the protocol, which class image i is of."""
    if not num_classes:
        return None
    return f"(seed + i) mod {num_classes}" if options.class_label is None else str(options.class_label)


def check_sampling(pipeline: Pipeline, options: SamplingOptions) -> None:
    """Raise ValueError, before anything is spent, for what `generate` could not do."""
    if options.seed > MAX_SEED - options.num_samples:
        raise ValueError(f"--seed is {options.seed}; choose 0 to {MAX_SEED - options.num_samples}")
    if options.sampler not in (None, *pipeline.samplers):
        raise ValueError(f"--sampler {options.sampler} does not suit this checkpoint; choose from {', '.join(pipeline.samplers)}")
    channels, height, width = pipeline.image_shape
    require_memory(options.num_samples * channels * height * width, f"{options.num_samples:,} images")
    class_labels(pipeline.num_classes, options)


def generate(pipeline: Pipeline, options: SamplingOptions) -> np.ndarray:
    """Sample uint8 images (N, H, W, C); image i depends on seed + i, not on the batch that it is in.

    Raises:
        ValueError: a label or seed out of range, more images than memory.
    """
    check_sampling(pipeline, options)
    labels = class_labels(pipeline.num_classes, options)
    channels, height, width = pipeline.image_shape
    images = np.empty((options.num_samples, height, width, channels), np.uint8)
    pipeline.set_progress_bar_config(disable=True)  # one bar for all batches instead
    context = autocast(pipeline.device, options.precision)
    with tqdm(total=options.num_samples, desc="generating", unit=" images", leave=False, disable=None) as bar, context:
        for start in range(0, options.num_samples, options.batch_size):
            stop = min(start + options.batch_size, options.num_samples)
            images[start:stop] = pipeline(
                stop - start,
                labels and labels[start:stop],
                seed=options.seed + start,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                sampler=options.sampler,
                output_type="np",
            ).images
            bar.update(stop - start)
    return images
