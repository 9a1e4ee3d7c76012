"""What is compared: our work and an opponent's."""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from eval.encoders import MAEEncoder, block_features
from eval.frechet import frechet_distance
from eval.knn import knn_predictions
from eval.linear import WEIGHT_DECAYS, held_out_parts, softmax_probe
from models import create_model
from models.precision import autocast, precision
from models.registry import BACKBONES
from tests.benchmarks.measure import Case, Work
from tests.benchmarks.peers import network_of
from tests.benchmarks.published import (
    CLASSES,
    PROBE_EPOCHS,
    SAMPLER_STEPS,
    endless,
    image_loader,
    published_mae_step,
    published_probe_epoch,
    published_step,
    write_folder,
)
from tests.benchmarks.sampling import BATCH as SAMPLED
from tests.benchmarks.sampling import LADDER, SAMPLER_PARTS, Sampling, quality_notes, search, taken
from tests.inception import write_inception
from training.augment import crop_and_resize, random_boxes, with_crops
from training.data import ImageData, Order, TrainingData, in_unit_range
from training.ema import EMA
from training.objectives import FlowMatching, MaskedAutoencoding

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
FEATURES = 2048  # Inception's


@dataclass
class Inputs:
    """What the command line gives to the cases.

    Attributes:
        images: of each side of `fid`.
        samples: of each side of `sampling`, by which its quality is judged.
        peer: checkout of the published code, in place of what is written down here.
        keep: enters a context that lasts as long as the case, and returns what it gives.
    """

    images: int
    samples: int
    peer: Path | None
    keep: Callable[[AbstractContextManager], Any]

    @property
    def theirs(self) -> str:
        """Words for the opponent of the whole steps."""
        return f"that of {self.peer.name}" if self.peer else "the published loop's"


def xs(backbone: str, **options: Any) -> nn.Module:
    """The XS network for images of 32 px, patches of 4 where there are any."""
    classes = {} if BACKBONES[backbone].task == "mae" else {"num_classes": CLASSES}
    return create_model(backbone, "XS", image_size=32, **classes, **options)


def step_of(backbone: str, alpha_min: float, **options: Any) -> Work:
    """A training step of the XS network at 32 px, batch 32, in the precision that pays here."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = xs(backbone, alpha_min=alpha_min, **options).to(device)
    return step_with(model, model, MaskedAutoencoding(model.num_patches) if backbone == "mae" else FlowMatching(CLASSES))


def step_with(model: nn.Module, network: Callable[..., torch.Tensor], objective: Callable) -> Work:
    """Forward, backward and AdamW; `network` calls the model as ours are called."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = {"images": torch.rand(BATCH, 3, 32, 32, device=device) * 2 - 1, "labels": torch.randint(CLASSES, (BATCH,), device=device)}
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        with autocast(device, precision("auto")):
            loss, _ = objective(network, batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def noise_images(count: int, size_px: int) -> ImageData:
    """Packed bytes in nine classes."""
    images = np.random.default_rng(0).integers(0, 256, (count, size_px, size_px, 3), np.uint8)
    return ImageData(images, labels=np.arange(count) % CLASSES, class_names=tuple("abcdefghi"), name="noise", split="train", fingerprint="")


def batches_of(data: TrainingData, batch_size: int) -> Callable[[], tuple[dict[str, torch.Tensor], torch.Generator]]:
    """The next batch each time, as our loop takes it."""
    order, taken = Order(len(data), seed=0), count()

    def batch() -> tuple[dict[str, torch.Tensor], torch.Generator]:
        number = next(taken)
        generator = torch.Generator().manual_seed(number)
        return data.batch(order.indices(number * batch_size, batch_size), torch.device("cpu"), generator, flip=True), generator

    return batch


def whole_step(model: nn.Module, data: TrainingData, objective: Callable, max_grad_norm: float, ema_decay: float) -> Work:
    """Everything that our loop does in a step: the next images of packed bytes, flips, the step itself, clipping, averages."""
    optimizer, ema = torch.optim.AdamW(model.parameters(), fused=True), EMA(model.parameters(), ema_decay)
    next_batch, steps = batches_of(data, BATCH), count(1)

    def step() -> None:
        batch, generator = next_batch()
        with autocast(torch.device("cpu"), precision("auto")):
            loss, _ = objective(model, batch, generator)
        loss.backward()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.parameters(), next(steps))

    return step


@contextmanager
def folder_of(data: ImageData) -> Iterator[Path]:
    """The images as PNG files, as long as the context lives."""
    with tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-") as name:
        write_folder(Path(name), data.images, data.labels)
        yield Path(name)


def compiled(case: Case, model: nn.Module) -> Case:
    """The same with our network compiled; how long that took stands apart."""
    model.compile(dynamic=False)
    began = time.perf_counter()
    case.ours()
    notes = (f"the first step, which compiles, took {time.perf_counter() - began:.0f} s",)
    return replace(case, about=f"{case.about}, ours compiled", notes=notes)


def loop(compile: bool, inputs: Inputs) -> Case:
    """A step of our whole loop against the published one: DiT-XS without long skips, 32 px, 576 images, on a CPU."""
    return _loop("dit", "DiT-XS", inputs, compile, long_skips=False)


def mae_loop(compile: bool, inputs: Inputs) -> Case:
    """The same of a masked autoencoder, with random-resized crops."""
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    torch.manual_seed(0)
    data, model = noise_images(576, 32), xs("mae", long_skips=False)
    ours = whole_step(model, with_crops(data, 0.2), MaskedAutoencoding(model.num_patches), max_grad_norm=0.0, ema_decay=0.0)
    crop = RandomResizedCrop(32, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    network = network_of(inputs.peer, "mae")
    theirs = published_mae_step(network, endless(inputs.keep(folder_of(data)), BATCH, crop))
    about = f"MAE-XS, 32 px, patch 4: whole step / {inputs.theirs}"
    case = Case(about, ours, theirs, goal=3, parameters=size_of(model), pairs=20, warm_ups=3, of_torch=False)
    return compiled(case, model) if compile else case


def uvit_loop(inputs: Inputs) -> Case:
    """The same of a U-ViT, against a checkout of it."""
    if inputs.peer is None:
        raise ValueError("uvit-loop needs a checkout of baofff/U-ViT; give it with --peer")
    return _loop("uvit", "U-ViT-XS", inputs, compile=False)


def _loop(backbone: str, title: str, inputs: Inputs, compile: bool, **options: Any) -> Case:
    """Whole steps of a diffusion model at an alpha_min of 0.5."""
    from torchvision.transforms import CenterCrop

    torch.manual_seed(0)
    data, model = noise_images(576, 32), xs(backbone, alpha_min=0.5, **options)
    ours = whole_step(model, data, FlowMatching(CLASSES), max_grad_norm=1.0, ema_decay=0.9999)
    network = network_of(inputs.peer, backbone)
    theirs = published_step(network, endless(inputs.keep(folder_of(data)), BATCH, CenterCrop(32)))
    about = f"{title}, 32 px, patch 4: whole step / {inputs.theirs}"
    case = Case(about, ours, theirs, goal=3, parameters=size_of(model), pairs=20, warm_ups=3, of_torch=False)
    return compiled(case, model) if compile else case


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
        return whole_step(xs("dit", alpha_min=0.5, long_skips=False), packed(count, folder), FlowMatching(CLASSES), 1.0, 0.9999)

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


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def diffusers(_: Inputs) -> Case:
    """Our training step against one of diffusers' DiT of the same size, both in the precision that pays here."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(num_attention_heads=3, attention_head_dim=64, num_layers=8, patch_size=4, sample_size=32)
    model = DiTTransformer2DModel(**sizes, in_channels=3, out_channels=3, num_embeds_ada_norm=CLASSES).to(device)
    network = lambda x, t, labels: model(x, timestep=1000 * t, class_labels=labels).sample  # noqa: E731
    ours, theirs = step_of("dit", 0.5, long_skips=False), step_with(model, network, FlowMatching(CLASSES))
    return Case("DiT-XS: our step / diffusers'", ours, theirs, goal=1.3, parameters=size_of(model), pairs=20)


def alpha(backbone: str, _: Inputs) -> Case:
    """What fading costs: a decayed training step against a plain one."""
    goal = 1 / 1.005
    return Case(f"{backbone}: decayed step / plain step", step_of(backbone, 0.5), step_of(backbone, 1.0), goal=goal)


def control(_: Inputs) -> Case:
    """The same work on both sides: how far from 1 a ratio may lie by chance or by the order of allocation."""
    return Case("dit: plain step / plain step", step_of("dit", 1.0), step_of("dit", 1.0))


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
    data, network = noise_images(1024, 32), xs("mae")
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
    sides = Sampling(inputs.samples)
    tried = search(LADDER, sides.judge, sides.passes)
    best, cuda = taken(tried), torch.cuda.is_available()
    if cuda:
        sides.ours.model.compile(dynamic=False, mode="reduce-overhead")

    def ours() -> None:
        sides.ours_of(best.options, SAMPLED)

    def theirs() -> None:
        sides.theirs_of(0, SAMPLED, SAMPLER_STEPS // SAMPLER_PARTS)
        if cuda:
            torch.cuda.synchronize()

    opponent = f"Euler, {SAMPLER_STEPS} guided steps, fp32, eager"
    return Case(
        f"{SAMPLED} images of 32 px, {best.quality}: {best.words}, {precision('auto')}{', compiled' if cuda else ''} / {opponent}",
        ours,
        theirs,
        goal=100 if cuda else 50,
        pairs=6,
        warm_ups=1,
        of_torch=False,
        theirs_times=SAMPLER_PARTS,
        notes=quality_notes(tried, sides.their_distance, inputs.samples),
        figures={"samples": inputs.samples, "their_distance": sides.their_distance.as_json(), "tried": [each.as_json() for each in tried]},
        valid=best.as_good,
    )


def places(_: Inputs) -> Case:
    """The features of 12 blocks in three poolings against those of one block in one: 64 images of 64 px through a ViT-S."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    data = ImageData(pixels, labels=None, class_names=(), name="noise", split="train", fingerprint="")
    encoder = MAEEncoder(create_model("mae", "S", image_size=64, patch_size=8), {"backbone": "mae"}, 64)
    features = partial(block_features, encoder, data, mixed_precision="auto")
    return Case("features of 36 places / of one", features, lambda: features((11,), ("mean",)), goal=1 / 1.3, pairs=10, of_torch=False)


def call(*command: object) -> None:
    """Run a script of the project in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


CASES: dict[str, Callable[[Inputs], Case]] = {
    **{f"alpha{end}": partial(alpha, end[1:] or "dit") for end in ("", "-uvit", "-unet", "-mae")}, "control": control,
    "loop": partial(loop, False), "loop-compiled": partial(loop, True), "mae-loop": partial(mae_loop, False),
    "mae-loop-compiled": partial(mae_loop, True), "uvit-loop": uvit_loop, "diffusers": diffusers, "feed": feed, "feed-crops": feed_crops,
    "growth": growth, "growth-feed": growth_feed, "sampling": sampling, "frechet": frechet, "fid": fid, "crops": crops,
    "neighbours": partial(neighbours, 20), "neighbours-200": partial(neighbours, 200), "linear-probe": linear_probe, "places": places,
}  # fmt: skip
