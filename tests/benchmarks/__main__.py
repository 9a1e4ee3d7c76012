"""Time our work beside an opponent's, in turn: python -m tests.benchmarks [NAME ...] --json OUT"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from eval.encoders import MAEEncoder, block_features
from eval.frechet import frechet_distance
from eval.knn import knn_predictions
from models import create_model
from models.compat import import_torchvision
from models.files import Parser, one_line_errors, write_json
from models.precision import autocast, precision
from tests.benchmarks.published import CLASSES, published_loop, write_folder
from tests.inception import write_inception
from training.augment import crop_and_resize, random_boxes
from training.data import ImageData, Order, in_unit_range
from training.ema import EMA
from training.objectives import FlowMatching

Work = Callable[[], object]
ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
XS = dict(image_size=32, patch_size=4)
FEATURES = 2048  # Inception's


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        about: in words.
        ours, theirs: the work of both sides.
        pairs: timed runs of each, unless asked otherwise.
        warm_ups: runs of each that are not timed.
        of_torch: the work is torch's in this process, so that its memory can be told.
    """

    about: str
    ours: Work
    theirs: Work
    pairs: int = 40
    warm_ups: int = 2
    of_torch: bool = True


def training_step(alpha_min: float, **options: Any) -> Work:
    """A training step of DiT-XS at 32 px, patch 4, batch 32, in the precision that pays here."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model("dit", "XS", **XS, num_classes=CLASSES, alpha_min=alpha_min, **options).to(device)
    return step_of(model, model)


def step_of(model: nn.Module, network: Callable[..., torch.Tensor]) -> Work:
    """Forward, backward and AdamW; `network` calls the model as ours are called."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = {"images": torch.rand(BATCH, 3, 32, 32, device=device) * 2 - 1, "labels": torch.randint(CLASSES, (BATCH,), device=device)}
    generator, objective = torch.Generator(device).manual_seed(0), FlowMatching(CLASSES)

    def step() -> None:
        with autocast(device, precision("auto")):
            loss, _ = objective(network, batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def whole_step() -> tuple[Work, np.ndarray, np.ndarray]:
    """As `training_step`, with what else our loop does: the next images of 576 in packed bytes, flips, clipping, averages."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (576, 32, 32, 3), np.uint8), np.arange(576) % CLASSES
    data = ImageData(images, labels=labels, class_names=tuple("abcdefghi"), name="noise", split="train", fingerprint="")
    model = create_model("dit", "XS", **XS, num_classes=CLASSES, alpha_min=0.5, long_skips=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema, objective, order, device = EMA(model.parameters(), 0.9999), FlowMatching(CLASSES), Order(len(data), seed=0), torch.device("cpu")
    taken = count()

    def step() -> None:
        number = next(taken)
        generator = torch.Generator().manual_seed(number)
        batch = data.batch(order.indices(number * BATCH, BATCH), device, generator, flip=True)
        with autocast(device, precision("auto")):
            loss, _ = objective(model, batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.parameters(), number + 1)

    return step, images, labels


def loop(_: int) -> Case:
    """A step of our whole loop against the published one: DiT-XS without long skips, 32 px, 576 images, on a CPU."""
    temporary = tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-")
    ours, images, labels = whole_step()
    write_folder(Path(temporary.name), images, labels)
    theirs = published_loop(Path(temporary.name), BATCH, depth=8, dim=192, num_heads=3, **XS)
    return Case("whole step / the published loop's", ours, lambda kept=temporary: theirs(), pairs=20, warm_ups=3, of_torch=False)


def diffusers(_: int) -> Case:
    """Our training step against one of diffusers' DiT of the same size, both in the precision that pays here."""
    import_torchvision()
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(num_attention_heads=3, attention_head_dim=64, num_layers=8, patch_size=4, sample_size=32)
    model = DiTTransformer2DModel(**sizes, in_channels=3, out_channels=3, num_embeds_ada_norm=CLASSES).to(device)
    network = lambda x, t, labels: model(x, timestep=1000 * t, class_labels=labels).sample  # noqa: E731
    return Case("our step / diffusers' DiT", training_step(0.5, long_skips=False), step_of(model, network), pairs=20)


def alpha(_: int) -> Case:
    """What fading costs: a decayed training step against a plain one."""
    return Case("decayed step / plain step", training_step(0.5), training_step(1.0))


def control(_: int) -> Case:
    """The same work on both sides: how far from 1 a ratio may lie by chance or by the order of allocation."""
    return Case("plain step / plain step", training_step(1.0), training_step(1.0))


def frechet(_: int) -> Case:
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
        pairs=3,
        warm_ups=0,
        of_torch=False,
    )


def fid(num_images: int) -> Case:
    """The whole way from two sets of images in memory to their FID, against torch-fidelity's command, which reads PNG files.

    Both are processes of their own, with the same Inception of random weights, which cost as much as real ones.
    """
    temporary = tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-")  # goes when the work below does
    folder = Path(temporary.name)
    weights = write_inception(folder / "inception.pth")
    sides = {}
    for name in ("one", "two"):
        colours = torch.from_numpy(np.random.default_rng(len(sides)).integers(0, 256, (num_images, 3, 8, 8), dtype=np.uint8)).float()
        images = nn.functional.interpolate(colours, size=(64, 64), mode="bicubic").clamp(0, 255).byte()
        sides[name] = images.permute(0, 2, 3, 1).contiguous().numpy()

    def ours() -> None:
        for name, images in sides.items():
            np.savez(Path(temporary.name) / f"{name}.npz", images)
        inputs = ["--input1", folder / "one.npz", "--input2", folder / "two.npz"]
        call("eval/fid.py", *inputs, "--feature_extractor_weights_path", weights)

    def theirs() -> None:
        for name, images in sides.items():
            (folder / name).mkdir(exist_ok=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / name / f"{i:06}.png")
        device = ["--gpu", "0"] if torch.cuda.is_available() else ["--cpu"]
        inputs = ["--input1", folder / "one", "--input2", folder / "two", "--no-cache", "--silent"]
        call("-m", "torch_fidelity.fidelity", "--fid", *inputs, *device, "--feature-extractor-weights-path", weights)

    about = f"eval/fid.py / torch-fidelity's command, FID of {num_images:,} against {num_images:,} images of 64 px"
    return Case(about, ours, theirs, pairs=1, warm_ups=0, of_torch=False)


def crops(_: int) -> Case:
    """Random-resized crops of 64 images of 224 px, from bytes to floats, against torchvision's one by one."""
    import_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    images = torch.randint(256, (64, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes = random_boxes(64, 224, 0.2, torch.Generator().manual_seed(0))
    floats, places = images.float().contiguous() / 127.5 - 1, torch.stack(boxes, 1).tolist()

    def theirs() -> object:
        size, way = [224, 224], InterpolationMode.BICUBIC
        return torch.stack([resized_crop(image, *place, size, way, antialias=True) for image, place in zip(floats, places, strict=True)])

    return Case("crops / torchvision's", lambda: in_unit_range(crop_and_resize(images, boxes), None), theirs, pairs=10, of_torch=False)


def neighbours(_: int) -> Case:
    """The votes of 20 neighbours among 10,000 images with 384 features, for 2,000 others, against scikit-learn's brute force."""
    from sklearn.neighbors import KNeighborsClassifier

    x, z, y = torch.randn(10_000, 384), torch.randn(2000, 384), torch.randint(10, (10_000,))
    brute = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07))
    brute.fit(x.numpy(), y.numpy())
    ours = partial(knn_predictions, x, y, z, (20,))
    return Case("neighbours / scikit-learn's", ours, lambda: brute.predict(z.numpy()), pairs=10, of_torch=False)


def places(_: int) -> Case:
    """The features of 12 blocks in three poolings against those of one block in one: 64 images of 64 px through a ViT-S."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    data = ImageData(pixels, labels=None, class_names=(), name="noise", split="train", fingerprint="")
    encoder = MAEEncoder(create_model("mae", "S", image_size=64, patch_size=8), {"backbone": "mae"}, 64)
    features = partial(block_features, encoder, data, mixed_precision="auto")
    return Case("features of 36 places / of one", features, lambda: features((11,), ("mean",)), pairs=10, of_torch=False)


def call(*command: object) -> None:
    """Run a script of the project in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


CASES: dict[str, Callable[[int], Case]] = {
    "alpha": alpha, "control": control, "loop": loop, "diffusers": diffusers,
    "frechet": frechet, "fid": fid, "crops": crops, "neighbours": neighbours, "places": places,
}  # fmt: skip


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """Seconds of both in turn, the order swapped from pair to pair, and the ratios ours / theirs pair by pair.

    Elapsed ones, and those that the processors worked: other work on the machine moves the former more.
    """
    for work in (case.ours, case.theirs) * case.warm_ups:
        work()
    seconds: tuple[list[float], list[float]] = [], []
    worked: tuple[list[float], list[float]] = [], []
    for i in range(pairs):
        for which in (0, 1) if i % 2 else (1, 0):
            began, busy = time.perf_counter(), processor_s()
            (case.ours, case.theirs)[which]()
            seconds[which].append(time.perf_counter() - began)
            worked[which].append(processor_s() - busy)
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    # a 95 % interval of the median from order statistics (binomial, normal approximation); of fewer than six there is none
    reach = 0.98 * len(ratios) ** 0.5
    ends = max(0, int(len(ratios) / 2 - reach)), min(len(ratios) - 1, int(len(ratios) / 2 + reach))
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_interval_95": [ratios[end] for end in ends] if len(ratios) >= 6 else None,
        "ours_s_median": statistics.median(seconds[0]),
        "theirs_s_median": statistics.median(seconds[1]),
        "processor_ratio_median": statistics.median(a / b for a, b in zip(*worked, strict=True)),
        "ours_processor_s_median": statistics.median(worked[0]),
        "theirs_processor_s_median": statistics.median(worked[1]),
        "pairs": pairs,
    }


def processor_s() -> float:
    """Seconds that processors worked for this process and for those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_of(work: Work) -> int:
    """Bytes that the work holds at its peak, beyond what was held before: the tensors that autograd allocates."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    """The command line."""
    flags = Parser(prog="python -m tests.benchmarks", description=__doc__)
    flags.add_argument("cases", nargs="*", metavar="NAME", help=f"{', '.join(CASES)} (default: all)")
    flags.add_argument("--pairs", type=int, help="timed runs of each side (default: 40, of the slow ones fewer)")
    flags.add_argument("--images", type=int, default=2000, help="of each side of the case fid (default: %(default)s)")
    flags.add_argument("--json", help="write the results to this file")
    parsed = flags.parse_args()
    with one_line_errors():
        if unknown := set(parsed.cases) - set(CASES):
            raise ValueError(f"there is no benchmark {unknown.pop()!r}; choose from {', '.join(CASES)}")
        if parsed.images < 2 or (parsed.pairs is not None and parsed.pairs < 1):
            raise ValueError("--images must be at least 2, and --pairs at least 1")
        results = {}
        for name in parsed.cases or CASES:
            case = CASES[name](parsed.images)
            found = measure(case, parsed.pairs or case.pairs)
            if case.of_torch and not torch.cuda.is_available():
                found |= {"ours_peak_bytes": peak_of(case.ours), "theirs_peak_bytes": peak_of(case.theirs)}
            results[name] = {"about": case.about, **found}
            interval = " [{:.3f}, {:.3f}]".format(*found["ratio_interval_95"]) if found["ratio_interval_95"] else ""
            more = f", of processor time {found['processor_ratio_median']:.3f}"
            if "ours_peak_bytes" in found:
                more += f", of peak memory {found['ours_peak_bytes'] / found['theirs_peak_bytes']:.3f}"
            print(f"{name:10} {case.about}: {found['ratio_median']:.3f}{interval}{more}", flush=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{psutil.cpu_count()} CPU threads, {platform.machine()}"
        machine = {"device": device, "precision": precision("auto"), "versions": {"torch": version("torch")}}
        if parsed.json:
            write_json(parsed.json, {"machine": machine, "cases": results})


if __name__ == "__main__":
    main()
