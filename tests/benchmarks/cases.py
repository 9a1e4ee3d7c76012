"""What is compared: our work and an opponent's."""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import nn
from torch._inductor.utils import fresh_cache

from eval.encoders import MAEEncoder, block_features
from eval.frechet import frechet_distance
from eval.knn import knn_predictions
from eval.linear import WEIGHT_DECAYS, held_out_parts, softmax_probe
from models import Pipeline, create_model
from models.precision import precision
from tests.benchmarks import beside, steps
from tests.benchmarks.inputs import CPU, DEVICE, Inputs, batches_of, folder_of, noise_images
from tests.benchmarks.measure import Case, Work
from tests.benchmarks.published import CLASSES, PROBE_EPOCHS, SAMPLER_STEPS, image_loader, published_probe_epoch
from tests.benchmarks.sampling import BATCH as SAMPLED
from tests.benchmarks.sampling import LADDER, SAMPLER_PARTS, Sampling, quality_notes, search, taken
from tests.benchmarks.steps import SMALL, whole_step
from tests.inception import write_inception
from training.augment import crop_and_resize, random_boxes, with_crops
from training.data import ImageData, in_unit_range
from training.objectives import FlowMatching

ROOT = Path(__file__).resolve().parents[2]
FEATURES = 2048  # Inception's


def feed(inputs: Inputs) -> Case:
    """20 batches of 256 images of 64 px, flipped: packed ones against ImageFolder and DataLoader with two workers."""
    return _feed("flips", 40, inputs, 1.0)


def feed_crops(inputs: Inputs) -> Case:
    """The same with random-resized crops."""
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    return _feed("crops and flips", 8, inputs, 0.2, RandomResizedCrop(64, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC))


def _feed(words: str, goal: float, inputs: Inputs, min_scale: float, *augment: Callable) -> Case:
    data = noise_images(20 * 256, 64)
    next_batch = batches_of(with_crops(data, min_scale), 256)
    loader = image_loader(inputs.keep(folder_of(data)), 256, *augment)

    def ours() -> None:
        for _ in range(20):
            next_batch()

    def theirs() -> None:
        for _ in loader:  # an epoch, after which the workers rest
            pass

    about = f"20 x 256 images of 64 px, {words}: packed / ImageFolder and DataLoader with 2 workers"
    return Case(about, ours, theirs, goal=goal, pairs=7, warm_ups=1, of_torch=False)


def growth(inputs: Inputs) -> Case:
    """A step of our whole loop over 100,000 packed images against one over 10,000; and what an epoch from a stream of them holds."""
    few, many = 10_000, 100_000
    folder = Path(inputs.keep(tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-")))
    peaks = {
        count: streaming_peak(write_shards(folder / str(count), count), folder / f"run-{count}", count // 256) for count in (few, many)
    }
    found = " and ".join(f"{peak / 2**20:,.0f} MiB of {count:,} images" for count, peak in peaks.items())
    notes = (f"memory of a training that streams for an epoch (its process's peak): {found}, {peaks[many] / peaks[few]:.3f} times as much",)

    def step(count: int) -> Work:
        torch.manual_seed(0)
        model = SMALL.create("dit", alpha_min=0.5, long_skips=False)
        return whole_step(model, packed(count, folder), FlowMatching(CLASSES), 1.0, 0.9999, SMALL.batch_size)

    about = f"DiT-XS, 32 px: whole step over {many:,} images / over {few:,}"
    figures = {"streaming_peak_bytes": peaks}
    return Case(about, step(many), step(few), goal=1 / 1.05, warm_ups=3, of_torch=False, notes=notes, figures=figures)


def growth_feed(inputs: Inputs) -> Case:
    """The feeding of these steps alone: 20 batches of 256 images."""
    few, many = 10_000, 100_000
    folder = Path(inputs.keep(tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-")))

    def feeding(count: int) -> Work:
        batch = batches_of(packed(count, folder), 256)
        return lambda: [batch() for _ in range(20)]

    about = f"20 x 256 images of 32 px, flips: of {many:,} packed images / of {few:,}"
    return Case(about, feeding(many), feeding(few), goal=1 / 1.05, warm_ups=20, of_torch=False)


def packed(count: int, folder: Path) -> ImageData:
    """Images of 32 px in a memory-mapped file, as a cache holds them."""
    data, path = noise_images(count, 32), folder / f"{count}.npy"
    np.save(path, data.images)
    return replace(data, images=np.load(path, mmap_mode="r"))


def write_shards(folder: Path, count: int, in_each: int = 1000) -> Path:
    """Parquet files of `in_each` images of 32 px; all are one file under many names, which no reader can tell. Returns the folder."""
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir()
    data, rows = noise_images(in_each, 32), []
    for image in data.images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(data.class_names))})
    first, shards = folder / "train-00000.parquet", count // in_each
    datasets.Dataset.from_dict({"image": rows, "label": data.labels}, features=columns).to_parquet(first)
    for shard in range(1, shards):
        (folder / f"train-{shard:05}.parquet").hardlink_to(first)
    return folder


def streaming_peak(folder: Path, run: Path, steps: int) -> int:
    """Bytes that a training which streams these files holds at its peak: the resident set of its process."""
    sizes = ["--resolution", 32, "--size", "XS", "--patch_size", 8, "--train_batch_size", 256, "--max_train_steps", steps]
    quiet = ["--sample_steps", 0, "--report_to", "none", "--output_dir", run]
    command = [sys.executable, "training/train_diffusion.py", "--train_data_dir", folder, "--streaming", *sizes, *quiet]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    training = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(training.pid, 0)
    training.returncode = os.waitstatus_to_exitcode(status)
    if training.returncode:
        raise subprocess.CalledProcessError(training.returncode, command)
    return usage.ru_maxrss * 1024  # Linux counts KiB


def frechet(_: Inputs) -> Case:
    """The Fréchet distance of two covariances of 2,048 features against the matrix root that it is defined by."""
    random = np.random.default_rng(0)
    scales = np.exp(-np.linspace(0, 9, FEATURES) / 2)  # spectra of features fall about so
    mixing = random.normal(size=(FEATURES, FEATURES)) / FEATURES**0.5
    sigmas = [np.cov(random.normal(size=(2 * FEATURES, FEATURES)) * scales @ mixing, rowvar=False) for _ in range(2)]
    zeros = np.zeros(FEATURES)
    return Case(
        f"Fréchet distance / scipy's sqrtm, {FEATURES:,} features",
        lambda: frechet_distance(zeros, sigmas[0], zeros, sigmas[1]),
        lambda: np.trace(scipy.linalg.sqrtm(sigmas[0] @ sigmas[1])),
        goal=10,
        pairs=3,
        warm_ups=0,
        of_torch=False,
    )


def fid(inputs: Inputs) -> Case:
    """The whole way from two sets of images in memory to their FID, against torch-fidelity's command, which reads PNG files.

    Both are processes of their own, with the same Inception of random weights, which cost as much as real ones.
    """
    num_images, folder = inputs.images, Path(inputs.keep(tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-")))
    weights = write_inception(folder / "inception.pth")
    sides = {}
    for name in ("one", "two"):
        colours = torch.from_numpy(np.random.default_rng(len(sides)).integers(0, 256, (num_images, 3, 8, 8), dtype=np.uint8)).float()
        images = nn.functional.interpolate(colours, size=(64, 64), mode="bicubic").clamp(0, 255).byte()
        sides[name] = images.permute(0, 2, 3, 1).contiguous().numpy()

    def ours() -> None:
        for name, images in sides.items():
            np.savez(folder / f"{name}.npz", images)
        paths = ["--input1", folder / "one.npz", "--input2", folder / "two.npz"]
        call("eval/fid.py", *paths, "--feature_extractor_weights_path", weights)

    def theirs() -> None:
        for name, images in sides.items():
            (folder / name).mkdir(exist_ok=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / name / f"{i:06}.png")
        device = ["--gpu", "0"] if torch.cuda.is_available() else ["--cpu"]
        paths = ["--input1", folder / "one", "--input2", folder / "two", "--no-cache", "--silent"]
        call("-m", "torch_fidelity.fidelity", "--fid", *paths, *device, "--feature-extractor-weights-path", weights)

    about = f"eval/fid.py / torch-fidelity's command, FID of {num_images:,} against {num_images:,} images of 64 px"
    return Case(about, ours, theirs, goal=1.5, pairs=1, warm_ups=0, of_torch=False)


def crops(_: Inputs) -> Case:
    """Random-resized crops of 64 images of 224 px, from bytes to floats, against torchvision's one by one."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    images = torch.randint(256, (64, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes = random_boxes(64, 224, 0.2, torch.Generator().manual_seed(0))
    floats, places = images.float().contiguous() / 127.5 - 1, torch.stack(boxes, 1).tolist()

    def theirs() -> object:
        size, way = [224, 224], InterpolationMode.BICUBIC
        return torch.stack([resized_crop(image, *place, size, way, antialias=True) for image, place in zip(floats, places, strict=True)])

    return Case("crops / torchvision's", lambda: in_unit_range(crop_and_resize(images, boxes), None), theirs, pairs=10, of_torch=False)


def neighbours(k: int, _: Inputs) -> Case:
    """The votes of k neighbours among 10,000 images with 384 features, for 2,000 others, against scikit-learn's brute force."""
    from sklearn.neighbors import KNeighborsClassifier

    x, z, y = torch.randn(10_000, 384), torch.randn(2000, 384), torch.randint(10, (10_000,))
    brute = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07))
    brute.fit(x.numpy(), y.numpy())
    ours = partial(knn_predictions, x, y, z, (k,))
    return Case(f"votes of {k} neighbours / scikit-learn's", ours, lambda: brute.predict(z.numpy()), goal=3, pairs=10, of_torch=False)


def linear_probe(inputs: Inputs) -> Case:
    """A linear probe of an MAE: features once, then every penalty and held-out part; against 90 epochs through the encoder.

    The published way is timed for one of its epochs, and of one learning rate, as if the best were known.
    """
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    torch.manual_seed(0)
    data, network = noise_images(1024, 32), SMALL.create("mae")
    encoder, last, labels = MAEEncoder(network, {"backbone": "mae"}, 32), len(network.blocks) - 1, torch.from_numpy(data.labels)

    def ours() -> None:
        (x,) = block_features(encoder, data, (last,), ("class",), mixed_precision="auto").values()
        softmax_probe(x, labels, x, held_out_parts(labels))

    crop = RandomResizedCrop(32, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    loader = image_loader(inputs.keep(folder_of(data)), 256, crop)
    theirs = published_probe_epoch(lambda images: network.features(images)[-1][:, 0], network.config.dim, loader)
    ways = (
        f"{precision('auto')}, packed, {len(WEIGHT_DECAYS)} penalties / {PROBE_EPOCHS} x an epoch of one learning rate, fp32, files, crops"
    )
    about = f"linear probe of an MAE-XS, 1,024 images: {ways}"
    return Case(about, ours, theirs, goal=50, pairs=6, warm_ups=1, of_torch=False, theirs_times=PROBE_EPOCHS)


def sampling(inputs: Inputs) -> Case:
    """Sampling at equal quality against 250 steps of Euler, all guided: DiT-XS, 32 px, the shipped weights."""
    sides, began = Sampling(inputs.samples), time.perf_counter()
    with fresh_cache():  # what an earlier run compiled would be taken
        sides.ours_of(LADDER[0], SAMPLED)
    compiling = f"the first batch, which compiles, took {time.perf_counter() - began:.0f} s"
    tried = search(LADDER, sides.judge, sides.passes)
    best = taken(tried)

    def ours() -> None:
        sides.ours_of(best.options, SAMPLED)

    def theirs() -> None:
        sides.theirs_of(0, SAMPLED, SAMPLER_STEPS // SAMPLER_PARTS)

    opponent = f"Euler, {SAMPLER_STEPS} guided steps, fp32, eager"
    return Case(
        f"{SAMPLED} images of 32 px, {best.quality}: {best.words}, {precision('auto')}{', compiled' * sides.compiles} / {opponent}",
        ours,
        theirs,
        goal=50 if DEVICE == CPU else 100,
        pairs=6,
        warm_ups=1,
        of_torch=False,
        theirs_times=SAMPLER_PARTS,
        notes=(*[compiling] * sides.compiles, *quality_notes(tried, sides.their_distance, inputs.samples)),
        figures={"samples": inputs.samples, "their_distance": sides.their_distance.as_json(), "tried": [each.as_json() for each in tried]},
        valid=best.as_good,
    )


def pipeline(_: Inputs) -> Case:
    """32 images by 20 guided steps of DPM-Solver++: our pipeline against diffusers' DiTPipeline, networks of one size, one VAE."""
    from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler

    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision("auto") == "bf16" else torch.float32
    # of latents; with 1,000 classes, since theirs takes the label 1,000 for none
    model = steps.HERE.create("dit", alpha_min=0.5, long_skips=False, zero_init=False, in_channels=4, num_classes=1000)
    transformer = steps.diffusers_dit(in_channels=4, out_channels=4, num_embeds_ada_norm=1000)
    vae, scheduler = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8), DDPMScheduler()
    for network in (model, transformer, vae):
        nn.Module.to(network, DEVICE, dtype).eval()  # diffusers' own warns of modules that none of them has
    ours = Pipeline(model, scheduler, vae=vae)
    theirs = DiTPipeline(transformer, vae, DPMSolverMultistepScheduler.from_config(scheduler.config))
    for each in (ours, theirs):
        each.set_progress_bar_config(disable=True)
    labels, guided = list(range(SAMPLED)), dict(guidance_scale=4.0, num_inference_steps=20, output_type="np")
    return Case(
        f"{SAMPLED} images, 20 guided steps of DPM-Solver++, {precision('auto')}: our pipeline / diffusers' DiTPipeline",
        lambda: ours(SAMPLED, labels, sampler="dpm++", **guided),
        lambda: theirs(labels, **guided),
        pairs=10,
        warm_ups=1,
    )


def places(_: Inputs) -> Case:
    """The features of 12 blocks in three poolings against those of one block in one: 64 images of 64 px through a ViT-S."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    data = ImageData(pixels, labels=None, class_names=(), name="noise", split="train", fingerprint="")
    encoder = MAEEncoder(create_model("mae", "S", image_size=64, patch_size=8), {"backbone": "mae"}, 64)
    features = partial(block_features, encoder, data, mixed_precision="auto")
    about = "features of 36 places (12 blocks x 3 poolings) / of one"
    return Case(about, features, lambda: features((11,), ("mean",)), goal=1 / 1.3, pairs=10, of_torch=False)


def call(*command: object) -> None:
    """Run a script of the project in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


CASES: dict[str, Callable[[Inputs], Case]] = {
    **{f"alpha{end}": partial(steps.alpha, end[1:] or "dit") for end in ("", "-uvit", "-unet", "-mae")}, "control": steps.control,
    "loop": partial(steps.loop, False), "loop-compiled": partial(steps.loop, True), "mae-loop": partial(steps.mae_loop, False),
    "mae-loop-compiled": partial(steps.mae_loop, True), "uvit-loop": steps.uvit_loop, "tuned": partial(steps.tuned, steps.HERE),
    "tuned-xl": partial(steps.tuned, steps.LARGE), "diffusers": steps.diffusers, "feed": feed, "feed-crops": feed_crops,
    "growth": growth, "growth-feed": growth_feed, "sampling": sampling, "pipeline": pipeline, "frechet": frechet, "fid": fid,
    "crops": crops, "neighbours": partial(neighbours, 20), "neighbours-200": partial(neighbours, 200), "linear-probe": linear_probe,
    "places": places, "beside": beside.beside,
}  # fmt: skip
