"""Networks and data, as probes are asked for them -> labelled features of both splits, and how they came about."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.encoders import TEST_SEEDS, DiffusionEncoder, Encoder, Place, block_features, block_shapes, load_encoder, timm_encoder
from eval.extractors import LITE0, create_extractor, weights_hash
from eval.features import reference_features
from eval.linear import held_out_parts
from eval.measure import SIMILARITY_IMAGES, Labelled, check_labels, draw_share, spread_over
from models.files import require_memory
from models.precision import precision, uses_gpu
from training.data import ImageData
from training.images import EMBEDDED, NoSplit
from training.options import option
from training.packing import load_images

POOLINGS = ("all", "mean", "patches", "class")
Require = Callable[[Encoder, ImageData, ImageData], None]  # raises ValueError for a network with training and test images
TEST_SHARE = 0.2  # of images that have no validation split


@dataclass(frozen=True)
class NetworkOptions:
    """Network: one of --checkpoint, --timm and --features."""

    checkpoint: str | None = option(None, "folder of a run or of a shipped checkpoint")
    ema: bool = option(True, "the averaged weights, where there are any")
    timm: str | None = option(None, "a network of timm, by its name")
    timm_weights: str | None = option(None, "its weights, as a file; the word pretrained downloads timm's; at random unless given")
    resolution: int | None = option(None, "timm: edge of the images in pixels; that of its own training unless given", least=1)
    features: str | None = option(
        None, "an .npz with train_x (N, D), train_y, test_x and test_y; or a folder of such files, one for each layer"
    )


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    dataset: str | None = option(None, 'images with labels: "openmoji", a folder of images or of parquet files, or a hub name')
    image_column: str = option("image", "column of the images")
    label_column: str | None = option(None, 'column of the labels; "label" is found by itself')
    test_share: float | None = option(
        None,
        f"test on this share of the training images; unless given on the validation split, and where there is none on {TEST_SHARE:g}",
        least=0.01,
        most=0.5,
    )
    max_train_images: int | None = option(None, "use about so many of the training images, drawn from every class", least=2)
    max_test_images: int | None = option(None, "use about so many of the test images, drawn from every class", least=2)


@dataclass(frozen=True)
class LookOptions:
    """Features."""

    blocks: str = option("all", 'which: "all", "last", or numbers from 0, such as 3,7')
    pooling: str = option("all", "how tokens become one vector: the mean of all, of the patches, the class token", choices=POOLINGS)
    times: str = option("0.5,0.7,0.9", "diffusion: where to look, 0 = noise, 1 = data; DDPMs at the same proportion of noise")
    seed: int = option(0, "of the noise, of what is held out and of what is drawn", least=0)
    batch_size: int = option(64, "images at once", least=1)
    mixed_precision: str = option(
        "no", "no is fp32; auto is bf16 where the hardware has it; noted in the protocol", choices=("no", "auto", "bf16")
    )


@dataclass(frozen=True)
class Looked:
    """Features, and how they came about."""

    labelled: Labelled
    protocol: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class LookedThrough(Looked):
    """Features of images, and the network through which they were looked at; features from files have neither."""

    encoder: Encoder
    train: ImageData
    test: ImageData


def numbers(text: str, kind: type, flag: str) -> tuple[Any, ...]:
    """Those of a list with commas; ValueError names the flag."""
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag} is {text!r}; give numbers with commas between them") from None


def load_splits(options: DataOptions, resolution: int, seed: int) -> tuple[ImageData, ImageData, dict[str, Any] | None]:
    """Images to fit to and images to test on, with labels; and what, beside their labels, tells which were drawn: None if all are there.

    Raises:
        ValueError: no labels, labels that do not suffice, or what `load_images` raises.
    """

    name = options.dataset
    assert name  # eval/probe.py asked for it

    def load(split: str) -> ImageData:
        data = load_images(name, resolution, split, options.image_column, options.label_column)
        if data.labels is None:
            raise ValueError(f"{data.name} has no labels, and probes need them; give --label_column, or a subfolder for each class")
        return data

    train, share = load("train"), options.test_share
    check_labels(torch.from_numpy(train.labels), train.class_names)
    if share is None:
        try:
            test = load("validation")
        except NoSplit:
            share = TEST_SHARE
        else:
            if test.class_names != train.class_names:
                raise ValueError(f"the classes of {train.name} differ between its splits; both need the same ones")
    if share is not None:
        held = torch.stack(held_out_parts(torch.from_numpy(train.labels), 100, round(100 * share), seed)).any(0)
        test = part_of(train, held.nonzero()[:, 0].numpy())
        train = part_of(train, (~held).nonzero()[:, 0].numpy())
        check_labels(torch.from_numpy(train.labels), train.class_names)
    few_train, few_test = fewer(train, options.max_train_images, seed), fewer(test, options.max_test_images, seed)
    all_there = share is None and few_train is train and few_test is test
    return few_train, few_test, None if all_there else {"test_share": share, "seed": seed}


def fewer(data: ImageData, most: int | None, seed: int) -> ImageData:
    """About so many of the images, at random from every class, which keeps 2 at least."""
    if most is None or most >= len(data):
        return data
    return part_of(data, draw_share(torch.from_numpy(data.labels), most / len(data), seed).numpy())


def part_of(data: ImageData, indices: np.ndarray) -> ImageData:
    """Some of the images, in memory; their fingerprint tells which. ValueError if they do not fit."""
    require_memory(len(indices) * data.images[0].nbytes, f"{len(indices):,} images of {data.name}")
    fingerprint = hashlib.sha256(data.fingerprint.encode() + indices.tobytes()).hexdigest()[:16]
    return replace(data, images=data.images[indices], labels=data.labels_of(indices), fingerprint=fingerprint)


def check_neighbours(ks: Sequence[int], num: int) -> None:
    """Raise ValueError if not as many training images can vote."""
    if not all(1 <= k <= num for k in ks):
        raise ValueError(f"--k is {','.join(map(str, ks))} and there are {num} training images; choose numbers from 1 to {num}")


def look(
    network: NetworkOptions, data: DataOptions, options: LookOptions, ks: Sequence[int] = (), require: Require = lambda *_: None
) -> LookedThrough:
    """The features of both splits through a network.

    Args:
        ks: numbers of neighbours.
        require: raises ValueError for a network or images that will not do, before features are taken.

    Raises:
        ValueError: fewer training images than neighbours; or as `load_encoder`, `timm_encoder`, `load_splits` and `require`.
    """
    times = numbers(options.times, float, "--times")
    if not all(0 <= time <= 1 for time in times):
        raise ValueError(f"--times is {options.times}; times lie between 0 (noise) and 1 (data)")
    if network.checkpoint:
        encoder = load_encoder(network.checkpoint, network.ema, times)
    else:
        assert network.timm  # eval/probe.py asked for one of the two
        encoder = timm_encoder(network.timm, network.timm_weights, network.resolution)
    train, test, drawn = load_splits(data, encoder.resolution, options.seed)
    check_neighbours(ks, len(train))
    encoder.network.to("cuda" if uses_gpu() else "cpu")
    require(encoder, train, test)
    num_blocks = len(block_shapes(encoder, test))
    blocks = {"all": range(num_blocks), "last": (num_blocks - 1,)}.get(options.blocks) or numbers(options.blocks, int, "--blocks")
    poolings = None if options.pooling == "all" else (options.pooling,)
    began = time.monotonic()
    train_x, test_x = (
        block_features(encoder, side, blocks, poolings, seed, options.batch_size, options.mixed_precision)
        for side, seed in ((train, options.seed), (test, options.seed + TEST_SEEDS))
    )
    features_s = time.monotonic() - began
    protocol = {
        **encoder.about,
        "dataset": train.name,
        "resolution": encoder.resolution,
        "train_split": train.split,
        "train_num": len(train),
        "train_fingerprint": train.fingerprint,
        "test_split": test.split,
        "test_num": len(test),
        "test_fingerprint": test.fingerprint,
        "drawn": drawn,
        "num_classes": train.num_classes,
        "crop": "centre",
        "blocks": options.blocks,
        "pooling": options.pooling,
        "times": None if encoder.times == (None,) else list(encoder.times),
        "timesteps": _timesteps(encoder),
        "precision": "fp32" if precision(options.mixed_precision) == "no" else "bf16",
        "features_s": round(features_s, 2),
        "images_per_s": round((len(train) + len(test)) * len(encoder.times) / features_s, 1),
    }
    labelled = Labelled(train_x, test_x, torch.from_numpy(train.labels), torch.from_numpy(test.labels), train.class_names)
    return LookedThrough(labelled, protocol, _notes(encoder, train, test), encoder, train, test)


def _timesteps(encoder: Encoder) -> list[int] | None:
    """What a DDPM was given for the times."""
    if not isinstance(encoder, DiffusionEncoder) or encoder.pipeline.is_flow:
        return None
    return [encoder.timestep(time) for time in encoder.times]


def _notes(encoder: Encoder, train: ImageData, test: ImageData) -> list[str]:
    """What a reader of the numbers should know."""
    about, notes = encoder.about, []
    if about.get("timm_weights") == "random":
        notes.append("the network has random weights; give --timm_weights to judge trained ones")
    at_home = bool(about.get("training_data")) and os.path.realpath(about["training_data"]) == os.path.realpath(train.name)
    if "checkpoint" in about and not at_home:
        notes.append(f"the network was trained on {about['training_data']}, and is judged on {train.name}")
    if at_home and about["training_split"] in ("all", test.split):  # which is a part of the training split where one was drawn
        notes.append("the network has seen the test images in its training")
    if isinstance(encoder, DiffusionEncoder) and encoder.pipeline.num_classes and at_home:
        notes.append("the network was trained with these labels as a condition; here it is told none")
    if train.name == EMBEDDED:
        notes.append("emoji come in variants of a motif (392 test images of 154); over motifs an accuracy's interval is twice as wide")
    return notes


def read_features(path: str) -> Looked:
    """Features that somebody saved: an .npz, or a folder of them.

    Raises:
        ValueError: nothing there, arrays that are missing or do not fit, other labels from file to file.
    """
    files = sorted(Path(path).glob("*.npz")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise ValueError(f"--features {path} is no .npz and no folder with some; save train_x, train_y, test_x and test_y with numpy.savez")
    train: dict[Place, Tensor] = {}
    test: dict[Place, Tensor] = {}
    labels: list[Tensor] = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                train_x, train_y, test_x, test_y = (arrays[name] for name in ("train_x", "train_y", "test_x", "test_y"))
        except (KeyError, OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} holds no train_x, train_y, test_x and test_y ({error}); save them with numpy.savez") from None
        found = []
        for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
            if x.ndim != 2 or y.shape != x.shape[:1] or not len(x) or not np.issubdtype(y.dtype, np.integer):
                raise ValueError(f"{file}: {name}_x is {x.shape} and {name}_y {y.shape}, {y.dtype}; give (N, D) and whole (N,)")
            found.append(torch.from_numpy(y.astype(np.int64)))
        if train_x.shape[1] != test_x.shape[1]:
            raise ValueError(f"{file}: train_x has {train_x.shape[1]} dimensions and test_x {test_x.shape[1]}; use one network for both")
        if labels and not all(torch.equal(one, other) for one, other in zip(labels, found, strict=True)):
            raise ValueError(f"{file} has other labels than {files[0]}; all layers must be of the same images")
        labels, place = found, Place(None, file.stem, "given")
        train[place], test[place] = (torch.from_numpy(x.astype(np.float32)) for x in (train_x, test_x))
    names = [str(label) for label in range(int(max(side.max() for side in labels)) + 1)]
    unknown = "ema images_seen alpha_min alpha_eff backbone params dataset resolution times precision".split()
    protocol = {
        **dict.fromkeys(unknown),
        "features": path,
        "train_num": len(labels[0]),
        "test_num": len(labels[1]),
        "num_classes": len(labels[0].unique()),
    }
    return Looked(Labelled(train, test, labels[0], labels[1], names), protocol, [])


def reference_of(name: str, weights: str | None, data: DataOptions, looked: LookedThrough, options: LookOptions) -> np.ndarray:
    """Features (M, E) of the test images that similarities are measured on, through a reference network."""
    chosen = spread_over(len(looked.test), SIMILARITY_IMAGES)
    if name == LITE0:
        extractor = create_extractor(LITE0, weights)
        return reference_features(part_of(looked.test, chosen), extractor, weights_hash(extractor, weights), options.batch_size)
    encoder = timm_encoder(name, weights or "pretrained")
    encoder.network.to(looked.encoder.device)
    _, test, _ = load_splits(data, encoder.resolution, options.seed)  # the same images, at its resolution
    test = part_of(test, chosen)
    last = len(block_shapes(encoder, test)) - 1
    (features,) = block_features(encoder, test, (last,), ("mean",), 0, options.batch_size, options.mixed_precision).values()
    return features.numpy()
