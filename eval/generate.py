"""Seeds -> images, in batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from eval.spread import gathered, own_batches
from models.compiling import require_compiler
from models.files import require_memory, written_aside
from models.guidance import Guidance
from models.pipeline import SAMPLER_NAMES, Pipeline
from models.precision import autocast, precision
from models.progress import progress_bar
from training.data import TrainingData
from training.options import option

LABELS = ("reference", "balanced")


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling: all that decides what a checkpoint draws."""

    num_samples: int = option(2048, "images to generate; at least the feature dimension, or the distance is strongly biased", least=2)
    seed: int = option(0, "image i comes from noise seeded seed + i, whatever the batch size", least=0)
    batch_size: int = option(64, "images at once", least=1)
    sampler: str | None = option(None, "solver; euler for flows and ddim for DDPMs unless given", choices=SAMPLER_NAMES)
    num_inference_steps: int = option(20, "steps of the sampler", least=1, most=1000)
    guidance_scale: float = option(1.0, "classifier-free guidance, or by --guide; 1 is none", least=0, most=100)
    guidance_from: float = option(0.0, "time from which guidance acts, 0 noise and 1 data (arXiv 2404.07724)", least=0, most=1)
    guidance_to: float = option(1.0, "time up to which guidance acts", least=0, most=1)
    guide: str | None = option(None, "weaker checkpoint to guide by, instead of by the missing label (autoguidance, arXiv 2406.02507)")
    labels: str | None = option(
        None,
        "classes as frequent as in the reference (the default where it has the checkpoint's classes), or balanced",
        choices=LABELS,
    )
    class_label: int | None = option(None, "draw this class only", least=0)
    mixed_precision: str = option(
        "no", "no is fp32; auto is bf16 where the hardware has it; noted in the protocol", choices=("no", "auto", "bf16")
    )
    compile: bool = option(
        False, "torch.compile the network (not a --guide): a minute or so at the start, then faster batches; other last digits"
    )

    @property
    def precision(self) -> str:
        """Of the network: "fp32" or "bf16"."""
        return "fp32" if precision(self.mixed_precision) == "no" else "bf16"


def label_counts(class_names: tuple[str, ...], options: SamplingOptions, data: TrainingData | None) -> np.ndarray | None:
    """How often the reference has each of the checkpoint's classes (K,); None where labels shall be balanced.

    Raises:
        ValueError: --labels reference, and the reference has other classes or none.
    """
    if options.labels == "balanced" or options.class_label is not None or not class_names:
        return None
    if data is not None and data.labels is not None and tuple(data.class_names) == tuple(class_names):
        return np.bincount(data.labels, minlength=len(class_names))
    if options.labels == "reference":
        raise ValueError("--labels reference needs a reference with the checkpoint's classes; leave it away to balance them")
    return None


def class_labels(num_classes: int, options: SamplingOptions, counts: np.ndarray | None = None) -> list[int] | None:
    """The label of every image, dependent on seed + i alone; None if there are no classes.

    Balanced, it is (seed + i) mod K. After `counts` (K,), it is the class at the share u of the list of classes, with
    u = the fraction of (seed + i) times the golden ratio: of any images in a row each class has its part, to within a few.

    Raises:
        ValueError: --class_label is not a class.
    """
    if options.class_label is not None:
        if not num_classes:
            raise ValueError("this checkpoint is unconditional; leave --class_label away")
        if options.class_label >= num_classes:
            raise ValueError(f"--class_label is {options.class_label}; this checkpoint knows 0 to {num_classes - 1}")
        return [options.class_label] * options.num_samples
    if not num_classes:
        return None
    seeds = range(options.seed, options.seed + options.num_samples)
    if counts is None:
        return [seed % num_classes for seed in seeds]
    shares = np.array([(seed * 0x9E3779B97F4A7C15 % 2**64) / 2**64 for seed in seeds])  # 2^64 / golden ratio: whole numbers stay exact
    return np.searchsorted(counts.cumsum() / counts.sum(), shares, side="right").clip(max=num_classes - 1).tolist()


def labels_rule(num_classes: int, options: SamplingOptions, counts: np.ndarray | None = None) -> str | None:
    """In words, for the protocol, which class image i is of."""
    if not num_classes:
        return None
    if options.class_label is not None:
        return str(options.class_label)
    return f"(seed + i) mod {num_classes}" if counts is None else "as frequent as in the reference, by (seed + i) * golden ratio mod 1"


def check_sampling(pipeline: Pipeline, options: SamplingOptions) -> None:
    """Raise ValueError, before anything is spent, for what `generate` could not do."""
    channels, height, width = pipeline.image_shape
    require_memory(options.num_samples * channels * height * width, f"{options.num_samples:,} images")  # first: labels take some, too
    if options.compile:
        require_compiler()
    labels = class_labels(pipeline.num_classes, options)
    pipeline.check(options.num_samples, labels, options.seed, options.num_inference_steps, options.sampler)
    Guidance(options.guidance_scale, (options.guidance_from, options.guidance_to))


def check_guidance(options: SamplingOptions) -> None:
    """Raise ValueError for flags of guidance where there is none."""
    if options.guidance_scale == 1 and (options.guide or (options.guidance_from, options.guidance_to) != (0, 1)):
        raise ValueError("--guide, --guidance_from and --guidance_to do nothing at --guidance_scale 1; give a larger one, such as 2")


def generate(pipeline: Pipeline, options: SamplingOptions, counts: np.ndarray | None = None) -> np.ndarray:
    """Sample uint8 images (N, H, W, C); image i depends on seed + i, not on the batch that it is in.

    Of several processes each fills its own batches (eval/spread.py) and leaves the others empty.

    Args:
        counts: how frequent the classes shall be; see `label_counts`.

    Raises:
        ValueError: a label or seed out of range, more images than memory.
    """
    check_sampling(pipeline, options)
    labels = class_labels(pipeline.num_classes, options, counts)
    channels, height, width = pipeline.image_shape
    images = np.empty((options.num_samples, height, width, channels), np.uint8)
    pipeline.set_progress_bar_config(disable=True)  # one bar for all batches instead
    guide = load_guide(pipeline, options.guide) if options.guide else None
    if options.compile:
        pipeline.compile()
    stance = "default" if options.compile else "force_eager"  # it may have been compiled before
    context = autocast(pipeline.device, options.precision)
    batches = own_batches(options.num_samples, options.batch_size)
    with (
        progress_bar(total=sum(stop - start for start, stop in batches), desc="generating", unit=" images") as bar,
        context,
        torch.compiler.set_stance(stance),
    ):
        for start, stop in batches:
            # what is compiled is so for one number of images: the last batch begins earlier, and draws some images once more
            first = max(0, stop - options.batch_size) if options.compile else start
            images[first:stop] = pipeline(
                stop - first,
                labels and labels[first:stop],
                seed=options.seed + first,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                sampler=options.sampler,
                guidance_interval=(options.guidance_from, options.guidance_to),
                guide=guide,
                output_type="np",
                return_dict=False,
            )[0]
            bar.update(stop - start)
    return images


def load_guide(pipeline: Pipeline, checkpoint: str) -> nn.Module:
    """The network of a checkpoint, where the pipeline's is.

    Raises:
        ValueError: it takes other inputs than the pipeline's, or predicts something else.
    """
    guide = Pipeline.from_pretrained(checkpoint)
    for name, theirs in _meaning(guide).items():
        if theirs != (ours := _meaning(pipeline).get(name)):
            raise ValueError(
                f"--guide {checkpoint} has {name} {theirs}, and the checkpoint that it shall guide {ours}; guide by one of its kind"
            )
    return guide.model.to(pipeline.device)


def _meaning(pipeline: Pipeline) -> dict[str, Any]:
    """What the inputs and the output of a pipeline's network are."""
    network = {name: pipeline.model.config.get(name) for name in ("in_channels", "image_size", "num_classes")}
    if pipeline.is_flow:
        return {**network, "objective": "flow", "path": pipeline.config.path}
    noising = {name: pipeline.scheduler.config.get(name) for name in ("prediction_type", "beta_schedule", "beta_start", "beta_end")}
    return {**network, "objective": "ddpm", **noising}


def save_images(folder: str, images: np.ndarray, options: SamplingOptions) -> None:
    """Those of this process as PNG files, named by their seeds."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for start, stop in own_batches(len(images), options.batch_size):
        for i in range(start, stop):
            with written_aside(Path(folder) / f"{options.seed + i:06}.png") as aside:
                Image.fromarray(images[i].squeeze()).save(aside, format="png")


def save_npz(path: str, images: np.ndarray) -> None:
    """As ADM's evaluator (openai/guided-diffusion, evaluations/) reads them: uint8 (N, H, W, 3) as `arr_0`."""
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, images)


def all_images(images: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """The images of all processes."""
    return gathered([images], len(images), options.batch_size)[0]
