"""Judge a checkpoint, or a folder of images, by the Fréchet distance of its images' features to those of real ones.

    python eval/fid.py --checkpoint runs/x --reference openmoji --num_samples 2048 --json runs/x/eval/fid.json
    python eval/fid.py --input1 generated/ --input2 real/ --feature_extractor efficientnet-lite0

It is called FID only where the features are Inception's, and FD with the extractor's name elsewhere. The features come from
torch-fidelity's extractors, and the numbers equal those of its own call.
"""

import argparse
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.extractors import EXTRACTORS, INCEPTION, INCEPTION_SHA256, create_extractor, weights_hash
from eval.features import ArrayImages, FolderImages, extract_features, reference_features
from eval.frechet import frechet_distance, mean_and_covariance
from eval.generate import SamplingOptions, check_sampling, generate, labels_rule
from models.files import Parser, one_line_errors, write_json
from models.pipeline import Pipeline
from models.registry import backbone_name
from models.shortcut import effective_alpha
from training.data import SPLITS, load_images
from training.options import add_options, option, read_options

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's


@dataclass(frozen=True)
class InputOptions:
    """Images: a checkpoint and a reference, or two folders."""

    checkpoint: str | None = option(None, "folder of a run or of a shipped checkpoint, to generate from")
    ema: bool = option(True, "generate from the averaged weights, where there are any")
    reference: str | None = option(None, 'real images: "openmoji", a folder of images or of parquet files, or a hub name')
    reference_split: str = option("train", "split of the reference", choices=SPLITS)
    input1: str | None = option(None, "folder of images to judge")
    input2: str | None = option(None, "folder of images to compare them with")
    resolution: int | None = option(None, "crop and resize the images of the two folders to this edge in pixels", least=1)


@dataclass(frozen=True)
class MetricOptions:
    """Metric."""

    feature_extractor: str = option(INCEPTION, "what to look through; efficientnet-lite0 needs no download", choices=EXTRACTORS)
    feature_extractor_weights_path: str | None = option(None, "its weights as a .pth; otherwise the package's, or Inception's downloaded")
    kid: bool = option(False, "also the kernel distance (KID), which is unbiased for few images")
    json: str | None = option(None, "write the number with its protocol to this file")


@dataclass(frozen=True)
class Judged:
    """Features of both sides (N, D) and (R, D), and how they came about."""

    features: np.ndarray
    reference: np.ndarray
    protocol: dict[str, Any]
    notes: list[str]


def parser() -> argparse.ArgumentParser:
    """Flags of the command line."""
    flags = Parser(description=__doc__)
    for group in (InputOptions, SamplingOptions, MetricOptions):
        add_options(flags, group)
    return flags


def judge_checkpoint(inputs: InputOptions, sampling: SamplingOptions, metric: MetricOptions) -> Judged:
    """Generate, and look at the images and at the reference; what is cheap to check comes first."""
    pipeline = Pipeline.from_pretrained(inputs.checkpoint, ema=inputs.ema)
    sampling = replace(sampling, sampler=sampling.sampler or pipeline.samplers[0])
    channels, resolution, _ = pipeline.image_shape
    if channels != 3:
        raise ValueError(f"{inputs.checkpoint} draws images of {channels} channels; the extractors look at 3")
    check_sampling(pipeline, sampling)
    extractor = create_extractor(metric.feature_extractor, metric.feature_extractor_weights_path)
    data = load_images(inputs.reference, resolution, inputs.reference_split)
    pipeline.to(next(extractor.parameters()).device)
    images = generate(pipeline, sampling)
    features = extract_features(ArrayImages(images), extractor, sampling.batch_size, "generated images")
    weights = weights_hash(metric.feature_extractor, metric.feature_extractor_weights_path)
    reference = reference_features(data, extractor, weights, sampling.batch_size)
    training = pipeline.config.training
    notes = []
    if training.get("data") != data.name:
        notes.append(f"the checkpoint was trained on {training.get('data')}, and the reference is {data.name}")
    elif training.get("data_split") == "all" and data.split == "validation":
        notes.append("the reference was part of the training data")
    protocol = {
        "checkpoint": inputs.checkpoint,
        "reference": data.name,
        "reference_split": data.split,
        "reference_fingerprint": data.fingerprint,
        "sampler": sampling.sampler,
        "steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "seed": sampling.seed,
        "labels": labels_rule(pipeline.num_classes, sampling),
        "precision": sampling.precision,
        "batch_size": sampling.batch_size,
        "ema": inputs.ema and (Path(inputs.checkpoint) / "ema").is_dir(),
        "images_seen": training.get("images_seen"),
        "training_data": training.get("data"),
        "alpha_min": min(pipeline.model.alphas),
        "alpha_eff": effective_alpha(pipeline.model.alphas),
        "backbone": backbone_name(pipeline.model),
        "params": pipeline.model.num_parameters(),
        "resolution": resolution,
    }
    return Judged(features, reference, protocol, notes)


def judge_folders(inputs: InputOptions, sampling: SamplingOptions, metric: MetricOptions) -> Judged:
    """Look at two folders; the fields of a checkpoint stay None."""
    folders = [FolderImages(folder, inputs.resolution) for folder in (inputs.input1, inputs.input2)]
    extractor = create_extractor(metric.feature_extractor, metric.feature_extractor_weights_path)
    features, reference = (extract_features(folder, extractor, sampling.batch_size, "images") for folder in folders)
    notes = []
    if folders[0].size != folders[1].size:
        sizes = " and ".join(f"{width} x {height}" for width, height in (folder.size for folder in folders))
        notes.append(f"the two folders hold images of {sizes} pixels; part of the distance is their sharpness")
    unknown = (
        "checkpoint sampler steps guidance_scale seed labels precision ema images_seen training_data alpha_min alpha_eff backbone params"
    )
    protocol = {
        **dict.fromkeys(unknown.split()),
        "input1": inputs.input1,
        "reference": inputs.input2,
        "batch_size": sampling.batch_size,
        "resolution": inputs.resolution,
    }
    return Judged(features, reference, protocol, notes)


def kernel_distance(features: np.ndarray, reference: np.ndarray, inception: bool) -> dict[str, Any]:
    """torch-fidelity's KID (arXiv 1801.01401): mean and standard deviation over random subsets. Named as the Fréchet distance is."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    both = (torch.from_numpy(side) for side in (features, reference))
    found = kid_features_to_metric(*both, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    return {
        "metric": "KID" if inception else "KD",
        "mean": found[KEY_METRIC_KID_MEAN],
        "std": found[KEY_METRIC_KID_STD],
        "subsets": KID_SUBSETS,
        "subset_size": size,
    }


def evaluate(inputs: InputOptions, sampling: SamplingOptions, metric: MetricOptions) -> dict[str, Any]:
    """The number and its protocol, as the JSON holds them."""
    began = time.monotonic()
    judged = (judge_checkpoint if inputs.checkpoint else judge_folders)(inputs, sampling, metric)
    inception = metric.feature_extractor == INCEPTION
    weights = weights_hash(metric.feature_extractor, metric.feature_extractor_weights_path)
    value = frechet_distance(*mean_and_covariance(judged.features), *mean_and_covariance(judged.reference))
    num_samples, dim = judged.features.shape
    notes = list(judged.notes)
    if min(num_samples, len(judged.reference)) < dim:
        few = f"{num_samples:,} and {len(judged.reference):,} images are judged by {dim:,} features"
        notes.append(f"{few}: the distance is strongly biased, and comparable only at the same numbers")
    if inception and weights != INCEPTION_SHA256:
        notes.append(
            f"the Inception weights (sha256 {weights}...) are not torch-fidelity's ({INCEPTION_SHA256}...): not comparable with other FIDs"
        )
    extra = {"kernel_distance": kernel_distance(judged.features, judged.reference, inception)} if metric.kid else {}
    return {
        "metric": "FID" if inception else "FD",
        "value": value,
        **extra,
        "num_samples": num_samples,
        "feature_extractor": metric.feature_extractor,
        "feature_extractor_weights": weights,
        "feature_dim": dim,
        "reference_num": len(judged.reference),
        **judged.protocol,
        "notes": notes,
        "wall_s": round(time.monotonic() - began, 2),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "diffusers", "timm", "numpy")},
    }


def describe(result: dict[str, Any]) -> str:
    """One line: the number and its protocol."""
    extractor = "" if result["metric"] == "FID" else f" ({result['feature_extractor']})"
    split = f" ({result['reference_split']})" if "reference_split" in result else ""
    line = f"{result['metric']}{extractor} {result['value']:.4g} | {result['num_samples']:,} samples against "
    line += f"{result['reference_num']:,} of {result['reference']}{split}"
    if "kernel_distance" in result:
        kernel = result["kernel_distance"]
        line += (
            f" | {kernel['metric']}{extractor} {kernel['mean']:.4g} ± {kernel['std']:.2g}, {kernel['subsets']} x {kernel['subset_size']}"
        )
    if result["sampler"]:
        line += f" | {result['sampler']}, {result['steps']} steps, guidance {result['guidance_scale']:g}, seed {result['seed']}"
        line += f", {result['precision']}{', EMA' if result['ema'] else ''}"
        line += f" | {result['images_seen'] or 0:,} images seen, alpha_min {result['alpha_min']:g}"
    return f"{line} | {result['wall_s']:.0f} s on {result['device']}"


def check(inputs: InputOptions, metric: MetricOptions) -> None:
    """Raise ValueError for flags that do not go together."""
    of_checkpoint, of_folders = (inputs.checkpoint, inputs.reference), (inputs.input1, inputs.input2)
    if (all(of_checkpoint), any(of_folders)) != (True, False) and (any(of_checkpoint), all(of_folders)) != (False, True):
        raise ValueError("give either --checkpoint and --reference, or --input1 and --input2")
    if inputs.checkpoint and inputs.resolution:
        raise ValueError("--resolution is for two folders; a checkpoint is judged at its own")
    if metric.json and Path(metric.json).is_dir():
        raise ValueError(f"--json {metric.json} is a folder; give a file")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parsed = parser().parse_args(arguments)
    with one_line_errors():
        inputs, sampling, metric = (read_options(parsed, group) for group in (InputOptions, SamplingOptions, MetricOptions))
        check(inputs, metric)
        result = evaluate(inputs, sampling, metric)
        print(describe(result), flush=True)
        for note in result["notes"]:
            print(f"note: {note}", flush=True)
        if metric.json:
            write_json(metric.json, result)


if __name__ == "__main__":
    main()
