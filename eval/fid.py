r"""Judge images by the Fréchet distance of their features to those of real ones, and by what else is asked for.

    python eval/fid.py --checkpoint runs/x --reference openmoji --num_samples 2048 --json runs/x/eval/fid.json
    python eval/fid.py --input1 generated/ --input2 real/ --kid --isc --prc --feature_extractor efficientnet-lite0
    accelerate launch --num_cpu_threads_per_process 8 eval/fid.py --checkpoint runs/x --num_samples 50000 \
        --input2 VIRTUAL_imagenet256_labeled.npz

It is called FID only where the features are Inception's, and FD with the extractor's name elsewhere. The features come from
torch-fidelity's extractors, and the numbers equal those of its own call. An interval (95 %) is of the number's mean over other
samplings of as many images; the reference is taken as it is.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.features import ArrayImages, reference_features
from eval.generate import (
    SamplingOptions,
    all_images,
    check_guidance,
    check_sampling,
    generate,
    label_counts,
    load_guide,
    save_images,
    save_npz,
)
from eval.judge import (
    UNKNOWN,
    Judge,
    Measured,
    MetricOptions,
    checkpoint_protocol,
    numbers_words,
    reference_words,
    training_notes,
)
from eval.memorisation import memorisation, nearest, save_neighbours
from eval.sources import Source, coloured, export_reference, open_source, require_one_size
from eval.spread import is_main, processes
from models.files import Parser, has_averages, is_checkpoint, one_line_errors, require_writable, write_json
from models.pipeline import MAX_SEED, Pipeline
from training.data import ImageData
from training.images import SPLITS, NoSplit
from training.options import add_options, option, read_options
from training.packing import load_images
from training.processes import spread_over_cpu_processes


@dataclass(frozen=True)
class InputOptions:
    """Images: what to judge (--checkpoint or --input1), and real ones (--reference or --input2)."""

    checkpoint: str | None = option(None, "folder of a run or of a shipped checkpoint, to generate from")
    ema: bool = option(True, "generate from the averaged weights, where there are any")
    input1: str | None = option(
        None, "instead: a folder of images as they are, an .npz with arr_0, or a data set; a checkpoint will do too"
    )
    reference: str | None = option(None, 'real images: "openmoji", a folder of images or of parquet files, a hub name, or an .npz')
    reference_split: str = option("train", "split of the reference, if it is a data set", choices=SPLITS)
    input2: str | None = option(None, "instead: a folder of images as they are, or as --reference")
    resolution: int | None = option(None, "crop and resize the images of folders and data sets to this edge in pixels", least=1)
    skip_broken: bool = option(False, "leave out images that cannot be read, and name them in the notes")


@dataclass(frozen=True)
class OutputOptions:
    """Results."""

    repeats: int = option(1, "samplings from seeds seed, seed + N, ...; the numbers are their means", least=1)
    json: str | None = option(None, "write the numbers with their protocol to this file")
    save_images: str | None = option(None, "write the generated images as PNG files to this folder")
    save_npz: str | None = option(None, "write the generated images as ADM's evaluator reads them to this .npz")
    export_reference: str | None = option(None, "write the reference's statistics to this .npz, which --reference and ADM's evaluator read")
    memorisation: str | None = option(None, "compare with the training images too, and draw the nearest ones to this PNG")


def parser() -> argparse.ArgumentParser:
    """Flags of the command line."""
    flags = Parser(description=__doc__)
    for group in (InputOptions, SamplingOptions, MetricOptions, OutputOptions):
        add_options(flags, group)
    return flags


def judge_checkpoint(
    checkpoint: str, inputs: InputOptions, sampling: SamplingOptions, metric: MetricOptions, output: OutputOptions
) -> dict[str, Any]:
    """Generate, and look at the images and at the reference; what is cheap to check comes first."""
    pipeline = Pipeline.from_pretrained(checkpoint, ema=inputs.ema)
    sampling = replace(sampling, sampler=sampling.sampler or pipeline.samplers[0])
    channels, resolution, _ = pipeline.image_shape
    if channels not in (1, 3):
        raise ValueError(f"{checkpoint} draws images of {channels} channels; the extractors look at 3, or at 1 as grey")
    check_sampling(pipeline, sampling)
    check_guidance(sampling)
    if sampling.guide:
        load_guide(pipeline, sampling.guide)  # one that does not fit is told now
    if sampling.seed > MAX_SEED - output.repeats * sampling.num_samples:
        raise ValueError(f"--seed {sampling.seed} leaves no seeds for --repeats {output.repeats}; choose a smaller one")
    source = open_reference(inputs, resolution)
    require_one_size(checkpoint, (resolution, resolution), source)
    trained_on = training_data(pipeline, resolution) if output.memorisation else None
    judge = Judge(source, metric, sampling.batch_size)
    counts = label_counts(tuple(pipeline.config.class_names), sampling, source.data)
    pipeline.to(judge.device)

    found, images = [], np.empty(0)
    for repeat in range(output.repeats):
        each = replace(sampling, seed=sampling.seed + repeat * sampling.num_samples)
        images = coloured(generate(pipeline, each, counts))
        if output.save_images:
            save_images(output.save_images, images, each)
        found.append(judge(ArrayImages(images), "generated images"))
    if output.save_npz or trained_on:
        images = all_images(images, sampling)
        if output.save_npz and is_main():
            save_npz(output.save_npz, images)
    extra = {}
    if trained_on and output.memorisation:
        extra = {"memorisation": copying(judge, found[-1].features, images, trained_on, output.memorisation)}
    grey = ["the checkpoint draws grey images; all three channels are the same"] if channels == 1 else []
    changed = []
    if trained_on and has_changed(pipeline, trained_on[0]):
        changed = [f"memorisation: {trained_on[0].name} is not quite what the checkpoint was trained on; its images or labels have changed"]
    averaged = inputs.ema and has_averages(checkpoint)
    protocol = checkpoint_protocol(checkpoint, pipeline, sampling, averaged, counts)
    return as_result(judge, found, {**protocol, **extra}, [*training_notes(pipeline, source), *grey, *changed], output)


def judge_images(
    name: str, inputs: InputOptions, sampling: SamplingOptions, metric: MetricOptions, output: OutputOptions
) -> dict[str, Any]:
    """Look at images that are there already; the fields of a checkpoint stay None."""
    images = open_source(name, inputs.resolution, None, inputs.reference_split, inputs.skip_broken)
    if images.images is None or images.size is None:
        raise ValueError(f"{name} holds statistics alone; give it as --input2, and images as --input1")
    edge = images.size[0] if images.size[0] == images.size[1] else None
    source = open_reference(inputs, inputs.resolution or edge)
    require_one_size(name, images.size, source)
    judge = Judge(source, metric, sampling.batch_size)
    found = judge(images.images, images.name)
    return as_result(judge, [found], {**UNKNOWN, "input1": name, "resolution": edge}, images.notes, output)


def open_reference(inputs: InputOptions, resolution: int | None) -> Source:
    """The real side."""
    name = inputs.reference or inputs.input2
    assert name  # `check` asked for one of them
    if is_checkpoint(name):
        raise ValueError(f"{name} is a checkpoint; generate its images first (--save_images), and judge against those")
    as_data = inputs.reference is not None and resolution is not None
    return open_source(name, inputs.resolution, resolution, inputs.reference_split, inputs.skip_broken, as_data)


def training_data(pipeline: Pipeline, resolution: int) -> tuple[ImageData, ImageData | None]:
    """What a checkpoint was trained on, and what of the same data it was not."""
    training = pipeline.config.training
    name, split = training.get("data"), training.get("data_split", "train")
    columns = training.get("image_column", "image"), training.get("label_column")
    if name is None:
        raise ValueError("--memorisation needs the training data, and the checkpoint does not say what it was trained on")
    try:
        train = load_images(name, resolution, split, *columns)
    except ValueError as error:
        raise ValueError(f"--memorisation needs the training data, {name}: {error}") from None
    try:
        return train, load_images(name, resolution, "validation", *columns) if split == "train" else None
    except NoSplit:
        return train, None


def has_changed(pipeline: Pipeline, data: ImageData) -> bool:
    """Whether a checkpoint was trained on other images than these; streams, and older trainings on latents, do not tell."""
    training = pipeline.config.training
    trained_on = training.get("images_fingerprint", None if pipeline.vae else training.get("data_fingerprint"))
    return trained_on is not None and trained_on != data.fingerprint


def copying(judge: Judge, features: np.ndarray, images: np.ndarray, data: tuple[ImageData, ImageData | None], path: str) -> dict[str, Any]:
    """How much is copied; the nearest training images are drawn to `path`."""

    def features_of(each: ImageData) -> np.ndarray:
        return reference_features(each, judge.extractor, judge.weights, judge.batch_size)

    train, held_out = features_of(data[0]), None if data[1] is None else features_of(data[1])
    indices, distances = nearest(features, train, k=min(2, len(train)))
    if is_main():
        save_neighbours(path, images, data[0].images, indices, distances)
    return memorisation(distances[:, 0], train, held_out)


def as_result(judge: Judge, found: list[Measured], protocol: dict[str, Any], notes: Sequence[str], output: OutputOptions) -> dict[str, Any]:
    """The numbers with their protocol; the reference is exported where that is asked for."""
    result = judge.result(found, protocol, notes)
    if output.export_reference and is_main():
        arrays = {"mu": judge.reference.mu, "sigma": judge.reference.sigma}
        if judge.options.kid or judge.options.prc:
            arrays["features"] = judge.reference.require_features()
        about = {key: value for key, value in result.items() if key.startswith(("reference", "feature_extractor"))}
        export_reference(output.export_reference, arrays, about)
    return result


def describe(result: dict[str, Any]) -> str:
    """One line: the numbers and their protocol."""
    line = f"{numbers_words(result)} | {result['num_samples']:,} samples against {reference_words(result)}"
    if result["repeats"] > 1:
        line += f", mean of {result['repeats']} samplings"
    if "memorisation" in result:
        copies = result["memorisation"]
        closer, copied = copies["closer"], copies["copied"]
        line += f" | nearer to the training images than real ones ({copies['against']}): {closer['value']:.0%} "
        line += f"[{closer['low']:.0%}, {closer['high']:.0%}], 50% expected; median distance {copies['median_distance']:.3g}, "
        line += f"of real ones {copies['median_distance_real']:.3g}; copies: "
        if copied:
            low, high = copied["expected_low"], copied["expected_high"]
            line += f"{copied['value']:.1%}, {copied['expected']:.1%} [{low:.1%}, {high:.1%}] expected"
        else:
            line += "not to be told, as real images have exact twins"
    if result["sampler"]:
        line += f" | {result['sampler']}, {result['steps']} steps, {guidance_words(result)}, seed {result['seed']}"
        line += f", {result['precision']}{', EMA' if result['ema'] else ''}"
        line += f" | {result['images_seen'] or 0:,} images seen, alpha_min {result['alpha_min']:g}"
    return f"{line} | {result['wall_s']:.0f} s on {result['device']}"


def guidance_words(result: dict[str, Any]) -> str:
    """Scale, and what is not as usual about it."""
    words = f"guidance {result['guidance_scale']:g}"
    if result["guide"]:
        words += f" by {result['guide']}"
    return words if result["guidance_interval"] == "0 to 1" else f"{words} at times {result['guidance_interval']}"


def check(inputs: InputOptions, output: OutputOptions) -> tuple[str, bool]:
    """Raise ValueError for flags that do not go together; returns what is judged, and whether it is a checkpoint."""
    judged = inputs.checkpoint or inputs.input1
    if not judged or (inputs.checkpoint and inputs.input1) or bool(inputs.reference) == bool(inputs.input2):
        raise ValueError("give either --checkpoint or --input1, and either --reference or --input2")
    checkpoint = bool(inputs.checkpoint) or is_checkpoint(judged)
    if checkpoint and inputs.resolution:
        raise ValueError("--resolution is for folders and data sets; a checkpoint is judged at its own")
    if not checkpoint and (output.save_images or output.save_npz or output.memorisation or output.repeats > 1):
        raise ValueError("--save_images, --save_npz, --memorisation and --repeats are for a checkpoint, which generates images")
    if output.repeats > 1 and output.save_npz:
        raise ValueError("--save_npz holds one sampling; leave --repeats away")
    for flag in ("json", "save_npz", "export_reference", "memorisation"):
        target = getattr(output, flag)
        if target and Path(target).is_dir():
            raise ValueError(f"--{flag} {target} is a folder; give a file")
    for flag in ("json", "save_npz", "export_reference", "memorisation", "save_images"):
        if target := getattr(output, flag):
            require_writable(Path(target).parent, f"choose another --{flag}")
    for flag in ("save_npz", "export_reference"):
        target = getattr(output, flag)
        if target and not target.endswith(".npz"):
            raise ValueError(f"--{flag} {target}: give a name that ends with .npz, by which it is known when it is read")
    if output.save_images and Path(output.save_images).exists() and any(Path(output.save_images).iterdir()):
        raise ValueError(f"--save_images {output.save_images} is not empty; give a new folder")
    return judged, checkpoint


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parsed = parser().parse_args(arguments)
    with one_line_errors():
        inputs, sampling = read_options(parsed, InputOptions), read_options(parsed, SamplingOptions)
        metric, output = read_options(parsed, MetricOptions), read_options(parsed, OutputOptions)
        spread_over_cpu_processes()
        processes()
        judged, is_checkpoint = check(inputs, output)
        began = time.monotonic()
        judge = judge_checkpoint if is_checkpoint else judge_images
        result = judge(judged, inputs, sampling, metric, output)
        result["wall_s"] = round(time.monotonic() - began, 2)
        if not is_main():
            return
        print(describe(result), flush=True)
        for note in result["notes"]:
            print(f"note: {note}", flush=True)
        if output.json:
            write_json(output.json, result)


if __name__ == "__main__":
    main()
