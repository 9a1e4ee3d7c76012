"""The FID script, against torch-fidelity's own call; its extractors, its generator, and what it refuses."""

import io
import json
import os
import subprocess
import sys
import urllib.error
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch_fidelity.utils import create_feature_extractor

from eval import fid
from eval.extractors import INCEPTION, INCEPTION_SHA256, LITE0, create_extractor, packaged_weights, register, timm_names
from eval.features import ArrayImages, FolderImages, extract_features, reference_features
from eval.generate import SamplingOptions, class_labels, generate, label_counts
from eval.judge import Judge, MetricOptions
from eval.sources import open_source
from models.dit import DiT
from models.pipeline import SAMPLERS, Pipeline
from tests.inception import write_inception
from tests.processes import run_together
from training.packing import load_images

ROOT = Path(__file__).parent.parent
PROTOCOL = (
    "metric value num_samples feature_extractor reference reference_num sampler steps guidance_scale seed ema images_seen "
    "alpha_min alpha_eff backbone params wall_s device versions"
).split()


def write_images(folder: Path, num: int, seed: int, size: int = 20) -> Path:
    """Smooth random pictures: a few colours, enlarged."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(num):
        blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "one", 7, seed=1), write_images(root / "two", 9, seed=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny conditional model whose velocity is not 0, saved as a shipped checkpoint is."""
    torch.manual_seed(0)
    model = DiT(image_size=8, patch_size=4, num_classes=3, depth=2, dim=32, num_heads=2, alpha_min=0.5)
    for layer in (model.modulation, model.head):
        nn.init.normal_(layer.weight, std=0.1)
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    training = {"steps": 5, "images_seen": 320, "data": "some"}
    Pipeline(model, SAMPLERS["euler"](), ["a", "b", "c"], training).save_pretrained(path)
    return path


@pytest.fixture
def script(run_here: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """eval/fid.py with a cache of its own: returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return partial(run_here, "eval/fid.py")


def subprocess_script(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "eval/fid.py", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def their_call(one: Path, two: Path, extractor: str, **options: object) -> dict[str, float]:
    """torch-fidelity on two folders."""
    register()
    return torch_fidelity.calculate_metrics(
        input1=str(one), input2=str(two), feature_extractor=extractor, fid=True, cuda=torch.cuda.is_available(), cache=False,
        save_cpu_ram=True, verbose=False, **options,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- two folders


THEIR_NAMES = {
    "FD": "frechet_inception_distance", "FID": "frechet_inception_distance", "KD": "kernel_inception_distance_mean",
    "KID": "kernel_inception_distance_mean", "IS": "inception_score_mean", "precision": "precision", "recall": "recall",
}  # fmt: skip


def assert_theirs(result: dict, one: Path, two: Path, extractor: str, num: int, **options: object) -> None:
    """Every number of a result equals torch-fidelity's, called with all metrics at once."""
    theirs = their_call(one, two, extractor, kid=True, isc=True, prc=True, kid_subset_size=num, samples_find_deep=True, **options)
    for name, found in result["metrics"].items():
        assert found["value"] == pytest.approx(theirs[THEIR_NAMES[name]], rel=1e-4, abs=1e-6), name
        assert found["low"] <= found["value"] <= found["high"], name


@pytest.fixture(scope="module")
def more_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("more")
    return write_images(root / "one", 20, seed=1), write_images(root / "two", 22, seed=2)


@pytest.mark.slow
def test_all_metrics_equal_torch_fidelity(more_images: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = more_images
    target = tmp_path / "deep" / "fd.json"
    flags = ["--kid", "--isc", "--prc", "--batch_size", 8, "--json", target]
    done = subprocess_script("--input1", one, "--input2", two, "--feature_extractor", LITE0, *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text())
    assert list(result["metrics"]) == ["FD", "KD", "IS", "precision", "recall"]
    assert_theirs(result, one, two, LITE0, num=20)
    assert result["value"] == result["metrics"]["FD"]["value"] > 1
    assert (result["low"], result["high"]) == (result["metrics"]["FD"]["low"], result["metrics"]["FD"]["high"])
    assert done.stdout.startswith(f"FD (efficientnet-lite0) {result['value']:.4g} [")
    assert f"| 20 samples against 22 of {two}" in done.stdout
    assert "FID" not in done.stdout
    assert "biased" in result["notes"][0] and result["notes"][0] in done.stdout
    assert set(PROTOCOL) <= set(result)
    assert (result["metric"], result["num_samples"], result["reference_num"], result["alpha_min"]) == ("FD", 20, 22, None)


@pytest.mark.slow
def test_inception_from_a_weights_path(more_images: tuple[Path, Path], tmp_path: Path, script) -> None:
    """The right architecture with random weights: the file is what counts, and nothing is downloaded."""
    weights = write_inception(tmp_path / "inception.pth")
    one, two = more_images
    target = tmp_path / "fid.json"
    flags = ["--kid", "--isc", "--prc", "--feature_extractor_weights_path", weights, "--json", target]
    code, out, err = script("--input1", one, "--input2", two, *flags)
    assert code == 0, err
    result = json.loads(target.read_text())
    assert list(result["metrics"]) == ["FID", "KID", "IS", "precision", "recall"]
    assert_theirs(result, one, two, INCEPTION, num=20, feature_extractor_weights_path=str(weights))
    assert out.startswith("FID ")
    assert "not torch-fidelity's" in out  # honest about weights that are not the known ones


@pytest.mark.slow
def test_fused_inception_has_the_features_of_torch_fidelity(tmp_path: Path) -> None:
    weights = str(write_inception(tmp_path / "inception.pth"))
    ours = create_extractor(INCEPTION, weights, scores=True)
    theirs = create_feature_extractor(INCEPTION, ours.features_list, cuda=False, feature_extractor_weights_path=weights, verbose=False)
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for found, expected in zip(ours.cpu()(images), theirs(images), strict=True):
            assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("extractor", ["vgg16", "clip-vit-b-32", "dinov2-vit-s-14", INCEPTION])
def test_no_network_is_one_line(extractor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded before
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(ValueError, match=f"{extractor} could not be downloaded.*{LITE0}"):
        create_extractor(extractor)


def test_inception_without_network_names_both_ways_out(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded before
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    code, out, err = script("--input1", folders[0], "--input2", folders[1])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--feature_extractor_weights_path" in err
    assert "--feature_extractor efficientnet-lite0" in err


# -------------------------------------------------------------------------------------------------------------- checkpoint


@pytest.mark.slow
def test_checkpoint_whatever_the_batch_size(checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, script) -> None:
    results = []
    for batch_size in (3, 10):
        target = tmp_path / f"{batch_size}.json"
        code, out, err = script(
            "--checkpoint", checkpoint, "--reference", folders[0], "--num_samples", 10, "--feature_extractor", LITE0, "--seed", 5,
            "--num_inference_steps", 3, "--guidance_scale", 1.5, "--sampler", "heun", "--batch_size", batch_size, "--json", target,
        )  # fmt: skip
        assert code == 0, err
        results.append(json.loads(target.read_text()))
    small, large = results
    assert small["value"] == pytest.approx(large["value"], rel=1e-3)
    assert set(PROTOCOL) <= set(small)
    expected = {
        "metric": "FD", "num_samples": 10, "feature_extractor": LITE0, "reference": str(folders[0]), "reference_num": 7, "sampler": "heun",
        "steps": 3, "guidance_scale": 1.5, "seed": 5, "labels": "(seed + i) mod 3", "ema": False, "images_seen": 320, "alpha_min": 0.5,
        "alpha_eff": pytest.approx((5 / 6) * (2 / 3) * 0.5), "backbone": "dit", "precision": "fp32",
    }  # fmt: skip
    assert {key: small[key] for key in expected} == expected
    assert small["params"] == Pipeline.from_pretrained(checkpoint).model.num_parameters()
    assert any("trained on some" in note for note in small["notes"])
    assert "images seen" in out


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_image_depends_on_its_seed_alone(checkpoint: Path, guidance_scale: float) -> None:
    pipeline = Pipeline.from_pretrained(checkpoint)
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    images = generate(pipeline, SamplingOptions(num_samples=9, seed=4, batch_size=9, **options)).astype(int)
    other = generate(pipeline, SamplingOptions(num_samples=5, seed=6, batch_size=2, **options)).astype(int)
    assert images.shape == (9, 8, 8, 3)
    assert np.abs(images[2:7] - other).max() <= 1  # another batch size may round another way
    assert np.abs(images[0] - images[1]).max() > 50


def test_labels_are_balanced_and_follow_the_seed() -> None:
    assert class_labels(3, SamplingOptions(num_samples=7, seed=4)) == [1, 2, 0, 1, 2, 0, 1]
    assert class_labels(3, SamplingOptions(num_samples=3, class_label=2)) == [2, 2, 2]
    assert class_labels(0, SamplingOptions(num_samples=3)) is None


@pytest.mark.parametrize("seed", [0, 12345, 2**62])
def test_labels_as_frequent_as_in_the_reference(seed: int) -> None:
    """Any images in a row have the shares to within two images, and image i's label depends on seed + i alone."""
    counts = np.array([57, 0, 1, 42])
    labels = class_labels(4, SamplingOptions(num_samples=1000, seed=seed), counts)
    for start, stop in ((0, 1000), (100, 300), (500, 600)):
        found = np.bincount(labels[start:stop], minlength=4)
        assert np.abs(found - counts / 100 * (stop - start)).max() <= 3
    assert class_labels(4, SamplingOptions(num_samples=10, seed=seed + 90), counts) == labels[90:100]
    assert 1 not in labels


def test_label_counts_follow_the_flag(image_folder: Path) -> None:
    data = load_images(str(image_folder), 8)
    assert label_counts(("cold", "warm"), SamplingOptions(), data).tolist() == [12, 12]
    assert label_counts(("cold", "warm"), SamplingOptions(labels="balanced"), data) is None
    assert label_counts(("cold", "warm"), SamplingOptions(class_label=1), data) is None
    assert label_counts(("warm", "cold"), SamplingOptions(), data) is None  # other classes
    assert label_counts((), SamplingOptions(), data) is None
    with pytest.raises(ValueError, match="--labels reference"):
        label_counts(("a", "b"), SamplingOptions(labels="reference"), data)


# -------------------------------------------------------------------------------------------------------------- extractors


def test_lite0_recognises_photographs() -> None:
    """A Chinese palace and a daisy, classes 698 and 985 of ImageNet: the weights are in their places, the preprocessing fits."""
    register()
    register()  # once more is no error
    network = torch_fidelity.utils.create_feature_extractor(LITE0, ["1280", "logits"], cuda=False, verbose=False)
    photographs = sklearn.datasets.load_sample_images().images  # uint8 (427, 640, 3)
    squares = torch.stack([torch.from_numpy(image[:, 106:533].copy()).permute(2, 0, 1) for image in photographs])
    features, logits = network(squares)
    assert logits.argmax(1).tolist() == [698, 985]
    assert features.shape == (2, 1280)
    assert features.min() >= 0 and features.std() > 0.1


def test_every_packaged_weight_is_renamed(tmp_path: Path) -> None:
    weights = torch.load(packaged_weights(), weights_only=True)
    renamed = timm_names(weights)
    assert len(renamed) == len(weights) == 296
    assert not any(name.startswith("_") for name in renamed)
    weights.pop("_conv_stem.weight")
    torch.save(weights, tmp_path / "incomplete.pth")
    with pytest.raises(ValueError, match="do not fit"):
        create_extractor(LITE0, str(tmp_path / "incomplete.pth"))


class CountingExtractor(nn.Module):
    """Mean colours; counts the images that it looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = 0

    def get_name(self) -> str:
        return "counting"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        self.seen += len(images)
        return (images.float().mean((2, 3)),)


def test_features_keep_order_and_a_reference_is_computed_once(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = load_images(str(folders[1]), 20)
    extractor = CountingExtractor()
    expected = data.images.mean((1, 2))
    np.testing.assert_allclose(extract_features(ArrayImages(data.images), extractor, 4, "test"), expected, rtol=1e-5)
    np.testing.assert_allclose(extract_features(FolderImages(str(folders[1])), extractor, 4, "test"), expected, rtol=1e-5)
    assert extractor.seen == 18
    for _ in range(2):
        np.testing.assert_allclose(reference_features(data, extractor, "w1", 4), expected, rtol=1e-5)
    assert extractor.seen == 27
    reference_features(data, extractor, "w2", 4)  # other weights
    assert extractor.seen == 36
    monkeypatch.setattr("eval.features.version", lambda name: f"another {name}")
    reference_features(data, extractor, "w1", 4)
    assert extractor.seen == 45


def test_processes_read_the_cache_together_or_not_at_all(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that comes between the looks of two processes would send one to the batches, and leave it waiting there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data, extractor = load_images(str(folders[1]), 20), CountingExtractor()
    reference_features(data, extractor, "w1", 4)

    class First:
        process_index, num_processes, is_main_process = 0, 2, True

    monkeypatch.setattr("eval.spread.processes", First)
    monkeypatch.setattr("eval.features.gathered", lambda layers, *_: list(layers))
    for other, seen in ((True, 9), (False, 9 + 5)):  # 5 of the 9 are in this process's batches
        monkeypatch.setattr("eval.spread.gather_object", lambda found, other=other: [*found, other])
        reference_features(data, extractor, "w1", 4)
        assert extractor.seen == seen


# ----------------------------------------------------------------------------------------------------------------- sources


class ColourExtractor(nn.Module):
    """Features that need no network: mean colours, 4 x 4 of them; stands in for EfficientNet."""

    def __init__(self, scores: bool) -> None:
        super().__init__()
        self.weight, self.scores = nn.Parameter(torch.ones(())), scores

    def get_name(self) -> str:
        return LITE0

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255  # (N, 12)
        return (features, 4 * features[:, :5]) if self.scores else (features,)


@pytest.fixture
def quick(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`script` with the quick extractor: returns the JSON's content, or the one line of the error."""
    monkeypatch.setattr("eval.judge.create_extractor", lambda name, path=None, scores=False: ColourExtractor(scores))

    def run(*arguments: object) -> dict | str:
        target = tmp_path / "result.json"
        code, _, err = script("--feature_extractor", LITE0, "--json", target, *arguments)
        assert (code == 0) == (err == "") or "it/s" in err, err
        return json.loads(target.read_text()) if code == 0 else err

    return run


def test_images_reach_the_metrics_by_every_way(quick, checkpoint: Path, more_images: tuple[Path, Path], tmp_path: Path) -> None:
    """A checkpoint, its saved PNGs, and its ADM .npz, against a folder, its .npz and its exported statistics: one number."""
    real, small = more_images[1], tmp_path / "real"
    sampling = ["--num_samples", 48, "--num_inference_steps", 2, "--kid", "--prc", "--isc", "--batch_size", 8]
    paths = {"--save_images": tmp_path / "png", "--save_npz": tmp_path / "x.npz", "--export_reference": tmp_path / "real.npz"}
    whole = quick("--checkpoint", checkpoint, "--reference", real, *sampling, *(word for pair in paths.items() for word in pair))
    assert set(whole["metrics"]) == {"FD", "FD_infinity", "KD", "IS", "precision", "recall"}

    with np.load(tmp_path / "x.npz") as saved:
        assert saved.files == ["arr_0"] and saved["arr_0"].shape == (48, 8, 8, 3) and saved["arr_0"].dtype == np.uint8
        images = saved["arr_0"]
    assert sorted(path.name for path in (tmp_path / "png").iterdir())[::47] == ["000000.png", "000047.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000007.png")), images[7])

    small.mkdir()
    data = load_images(str(real), 8)
    for i, image in enumerate(data.images):
        Image.fromarray(image).save(small / f"{i:03}.png")
    np.savez(tmp_path / "both.npz", data.images)
    asked = ["--kid", "--prc", "--isc", "--batch_size", 8]
    for one in (tmp_path / "png", tmp_path / "x.npz"):
        for two in (small, tmp_path / "both.npz", tmp_path / "real.npz"):
            again = quick("--input1", one, "--input2", two, *asked)
            for name, found in whole["metrics"].items():
                assert again["metrics"][name]["value"] == pytest.approx(found["value"], rel=1e-5, abs=1e-7), (one, two, name)
    assert again["reference"] == str(real) and again["reference_fingerprint"] == whole["reference_fingerprint"]
    assert again["resolution"] == whole["resolution"] == 8 and again["reference_size"] == [8, 8]
    large = write_images(tmp_path / "large", 9, seed=3)
    assert "of 8 x 8" in quick("--input1", large, "--input2", tmp_path / "real.npz")  # statistics know their images' size
    by_name = quick("--input1", tmp_path / "png", "--reference", real, *asked)  # a data set takes the size of the images
    assert by_name["value"] == pytest.approx(whole["value"], rel=1e-5)
    as_input = quick("--input1", checkpoint, "--input2", small, *sampling)
    assert as_input["value"] == pytest.approx(whole["value"], rel=1e-5)


def test_repeats_are_samplings_of_their_own(quick, checkpoint: Path, more_images: tuple[Path, Path]) -> None:
    flags = ["--checkpoint", checkpoint, "--reference", more_images[0], "--num_samples", 20, "--num_inference_steps", 2]
    repeated = quick(*flags, "--repeats", 3, "--seed", 7, "--kid", "--prc")
    single = [quick(*flags, "--seed", seed)["value"] for seed in (7, 27, 47)]
    found = repeated["metrics"]["FD"]
    assert found["repeats"] == pytest.approx(single)
    assert repeated["value"] == pytest.approx(np.mean(single))
    assert found["low"] < min(single) and found["high"] > max(single)  # t with two degrees of freedom reaches far
    assert "3 sampling seeds" in found["interval"]
    assert (repeated["metrics"]["KD"]["subsets"], repeated["metrics"]["KD"]["subset_size"]) == (100, 20)
    assert all(0 <= repeated["metrics"][name][end] <= 1 for name in ("precision", "recall") for end in ("low", "high"))


def test_memorisation_is_drawn_and_told(quick, checkpoint: Path, more_images: tuple[Path, Path], tmp_path: Path) -> None:
    copier = tmp_path / "copier"
    pipeline = Pipeline.from_pretrained(checkpoint)
    training = {"data": str(more_images[0]), "data_split": "train", "data_fingerprint": "of others"}
    Pipeline(pipeline.model, pipeline.scheduler, ["a", "b", "c"], training).save_pretrained(copier)
    picture = tmp_path / "deep" / "near.png"
    result = quick("--checkpoint", copier, "--reference", more_images[0], "--num_samples", 20, "--memorisation", picture)
    assert result["memorisation"]["train_num"] == 20
    assert 0 <= result["memorisation"]["closer"]["low"] <= result["memorisation"]["closer"]["value"] <= 1
    assert result["memorisation"]["against"] == "each training image among the others"
    assert Image.open(picture).size == (16 * 8, 2 * 3 * 8 + 4)
    assert any("not quite what the checkpoint was trained on" in note for note in result["notes"])


def test_images_are_those_of_the_training_or_others(checkpoint: Path, image_folder: Path) -> None:
    pipeline, images = Pipeline.from_pretrained(checkpoint), load_images(str(image_folder), 16)
    for training, changed in (
        ({}, False),
        ({"data_fingerprint": images.fingerprint}, False),
        ({"data_fingerprint": "of others"}, True),
        ({"data_fingerprint": "of their latents", "images_fingerprint": images.fingerprint}, False),
        ({"data_fingerprint": "of a stream", "images_fingerprint": None}, False),
        ({"images_fingerprint": "of others"}, True),
    ):
        pipeline.register_to_config(training=training)
        assert fid.has_changed(pipeline, images) is changed, training


def test_grey_images_and_broken_ones(quick, more_images: tuple[Path, Path], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (20, 20, 20), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", grey)
    np.savez(tmp_path / "grey1.npz", grey[..., None])
    np.savez(tmp_path / "colour.npz", np.stack([grey] * 3, -1))
    values = [quick("--input1", tmp_path / name, "--input2", more_images[0]) for name in ("grey.npz", "grey1.npz", "colour.npz")]
    assert values[0]["value"] == values[1]["value"] == values[2]["value"]
    assert "grey" in values[0]["notes"][0] and "grey" not in " ".join(values[2]["notes"])

    broken = write_images(tmp_path / "broken", 6, seed=0)
    (broken / "03.png").write_bytes(b"nothing")
    assert "03.png cannot be read" in quick("--input1", broken, "--input2", more_images[0])
    result = quick("--input1", broken, "--input2", more_images[0], "--skip_broken")
    assert result["num_samples"] == 5
    assert "03.png" in result["notes"][0]

    assert "03.png cannot be read" in quick("--input1", more_images[0], "--reference", broken)  # as a data set too
    result = quick("--input1", more_images[0], "--reference", broken, "--skip_broken")
    assert result["reference_num"] == 5 and "03.png" in result["notes"][-2]


def test_npz_that_are_hostile_or_of_something_else(quick, more_images: tuple[Path, Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "exploded",)

    np.savez(tmp_path / "bomb.npz", np.array([Bomb()], dtype=object))
    np.savez(tmp_path / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "half.npz", mu=np.zeros(12))
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    np.savez(tmp_path / "nothing.npz", x=np.zeros(3))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    (tmp_path / "text.npz").write_text("no zip")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())
    expected = {
        "bomb": "pickled objects", "floats": "uint8", "half": "only one of mu and sigma", "other": "same extractor", 
        "nothing": "neither images",
        "text": "cannot be read as .npz", "huge": "cut short", "none": "there is no file",
    }  # fmt: skip
    for name, message in expected.items():
        answer = quick("--input1", more_images[0], "--input2", tmp_path / f"{name}.npz")
        assert isinstance(answer, str) and message in answer and answer.count("\n") == 1, answer
    assert not (tmp_path / "exploded").exists()
    assert "leave --kid and --prc away" in quick("--input1", more_images[0], "--input2", tmp_path / "statistics.npz", "--kid")
    assert "holds statistics alone" in quick("--input1", tmp_path / "statistics.npz", "--input2", more_images[0])
    result = quick("--input1", more_images[0], "--input2", tmp_path / "statistics.npz")
    assert result["reference_num"] is None
    assert any("does not say through which extractor" in note for note in result["notes"])


def test_a_reference_is_known_by_what_it_holds(quick, more_images: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder or a file of the same name and number of images is another reference once its content changes."""
    folder, file = write_images(tmp_path / "folder", 6, seed=5), tmp_path / "file.npz"

    def fingerprints() -> list[str]:
        np.savez(file, np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]))
        return [quick("--input1", more_images[0], "--input2", each)["reference_fingerprint"] for each in (folder, file)]

    before, again = fingerprints(), fingerprints()
    Image.new("RGB", (20, 20)).save(folder / "03.png")
    after = fingerprints()
    assert before == again and len({*before, *after}) == 4


@pytest.mark.parametrize("own_weights", [False, True])
def test_an_adm_reference_has_statistics_of_the_known_inception(
    own_weights: bool, more_images: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mu and sigma are of 50,000 images through the known weights: through others its own images are what is comparable."""
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(more_images[1].iterdir())])
    np.savez(tmp_path / "adm.npz", images, mu=np.full(12, 0.5), sigma=np.eye(12))
    monkeypatch.setattr("eval.judge.create_extractor", lambda *_, scores: ColourExtractor(scores))
    monkeypatch.setattr("eval.judge.weights_hash", lambda *_: "other" if own_weights else INCEPTION_SHA256)
    judge = Judge(open_source(str(tmp_path / "adm.npz")), MetricOptions(feature_extractor=INCEPTION, kid=True), 8)
    measured = judge(FolderImages(str(more_images[0])), "test")
    own = np.cov(judge.reference.features, rowvar=False)
    np.testing.assert_allclose(judge.reference.sigma, own if own_weights else np.eye(12))
    assert judge.protocol(measured)["reference_num"] == (22 if own_weights else None)
    assert any("to mu and sigma" in note for note in judge.notes(measured)) != own_weights


def test_an_npz_that_is_damaged_anywhere_is_one_line(tmp_path: Path) -> None:
    """Compressed data, headers and directory, byte by byte: whatever zlib, zipfile and numpy raise for them."""
    random, path = np.random.default_rng(0), tmp_path / "x.npz"
    np.savez_compressed(path, random.integers(0, 40, (8, 6, 6, 3), dtype=np.uint8))
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ random.integers(1, 256)]) + whole[place + 1 :])
        try:
            open_source(str(path))
        except ValueError as error:
            told += str(path) in str(error)
    assert told > len(whole) // 4


def test_a_photograph_that_is_stored_lying_is_told(quick, more_images: tuple[Path, Path], tmp_path: Path) -> None:
    folder, turned = tmp_path / "photographs", Image.Exif()
    turned[0x0112] = 6
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (30, 20), (60 * i, 0, 0)).save(folder / f"{i}.jpg", exif=turned if i == 2 else Image.Exif())
    answer = quick("--input1", folder, "--input2", folder)
    assert "0.jpg has 30 x 20 pixels" in answer and "2.jpg 20 x 30; give --resolution" in answer
    for i in range(4):
        Image.new("RGB", (30, 20), (60 * i, 0, 0)).save(folder / f"{i}.jpg", exif=turned)
    assert FolderImages(str(folder)).size == (20, 30)
    assert FolderImages(str(folder))[0].shape == (3, 30, 20)


def test_too_few_images(quick, tmp_path: Path) -> None:
    few, more = write_images(tmp_path / "few", 2, seed=0), write_images(tmp_path / "more", 9, seed=1)
    assert "at least 3 images" in quick("--input1", few, "--input2", more, "--kid")
    assert "at least 8 images" in quick("--input1", few, "--input2", more, "--prc")
    assert "at least 20 images" in quick("--input1", few, "--input2", more, "--isc")


@pytest.mark.slow
def test_the_same_images_whatever_the_number_of_processes(checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, script) -> None:
    flags = ["--checkpoint", checkpoint, "--reference", folders[0], "--num_samples", 11, "--batch_size", 4, "--num_inference_steps", 2]
    flags += ["--feature_extractor", LITE0]
    outputs = {num: ["--json", tmp_path / f"{num}.json", "--save_npz", tmp_path / f"{num}.npz"] for num in (1, 2)}
    assert script(*flags, *outputs[1])[0] == 0

    done = run_together(2, "eval/fid.py", *flags, *outputs[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples against") == 1
    with np.load(tmp_path / "1.npz") as alone, np.load(tmp_path / "2.npz") as together:
        assert np.array_equal(alone["arr_0"], together["arr_0"])
    values = [json.loads((tmp_path / f"{num}.json").read_text())["value"] for num in (1, 2)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either"),
        ("--checkpoint {one} --reference openmoji --json {tmp}/x.json", "is not a checkpoint"),
        ("--input1 {one}", "give either"),
        ("--input1 {one} --input2 {two} --json /proc/nothing/x.json", "/proc cannot be written"),
        ("--input1 {one} --input2 {two} --reference openmoji", "give either"),
        ("--input1 {one} --input2 {run}", "is a checkpoint"),
        ("--input1 openmoji --input2 {one}", "give --resolution"),
        ("--input1 {one} --input2 {two} --repeats 2", "for a checkpoint"),
        ("--input1 {one} --input2 {two} --feature_extractor vgg16 --isc", "tells no classes apart"),
        ("--checkpoint {run} --reference {one} --labels reference", "--labels reference"),
        ("--checkpoint {run} --reference {one} --save_images {one}", "not empty"),
        ("--checkpoint {run} --reference {one} --memorisation {tmp}/x.png", "needs the training data"),
        ("--checkpoint {run} --reference openmoji --input1 {one}", "give either"),
        ("--checkpoint {run} --reference {tmp}/none", "no folder"),
        ("--checkpoint {run} --reference {one} --class_label 3", "0 to 2"),
        ("--checkpoint {run} --reference {one} --num_samples 1", "--num_samples"),
        ("--checkpoint {run} --reference {one} --num_samples 1000000000000", "memory"),
        ("--checkpoint {run} --reference {one} --seed 9223372036854775807", "seed is 92"),
        ("--checkpoint {run} --reference {one} --num_inference_steps 0", "--num_inference_steps"),
        ("--checkpoint {run} --reference {one} --resolution 8", "--resolution"),
        ("--input1 {one} --input2 {tmp}/none", "no folder"),
        ("--input1 {one} --input2 {tmp}/empty", "0 images"),
        ("--input1 {one} --input2 {tmp}/corrupt", "cannot be read"),
        ("--input1 {one} --input2 {tmp}/mixed", "--resolution"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {tmp}/none.pth", "not a file"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {one}/00.png", "no plain PyTorch weights"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {tmp}/other.pth", "do not fit"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {tmp}/tensor.pth", "no plain PyTorch weights"),
        ("--input1 {one} --input2 {two} --json {tmp}", "--json"),
        ("--input1 {one} --input2 {two} --export_reference {tmp}/statistics", "ends with .npz"),
        ("--input1 {one} --input2 {tmp}/larger", "20 x 20 pixels, and {tmp}/larger of 24 x 24"),
        ("--checkpoint {run} --input2 {one}", "8 x 8 pixels"),
    ],
)
def test_bad_input(arguments: str, message: str, folders: tuple[Path, Path], checkpoint: Path, tmp_path: Path, script) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "corrupt", 2, seed=0)
    (tmp_path / "corrupt" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    write_images(tmp_path / "mixed", 2, seed=0)
    write_images(tmp_path / "larger", 2, seed=0, size=24)
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "01.png")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    filled = arguments.format(one=folders[0], two=folders[1], run=checkpoint, tmp=tmp_path)
    code, out, err = script("--feature_extractor", LITE0, *filled.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err
    assert not (tmp_path / "x.json").exists()


def test_help_names_defaults(script) -> None:
    code, out, _ = script("--help")
    assert code == 0
    assert "(default: inception-v3-compat)" in out and "(default: 2048)" in out


def test_guidance_that_does_nothing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    flags = ["--checkpoint", str(ROOT / "models/pretrained/openmoji-plain"), "--reference", "openmoji", "--guidance_to", "0.8"]
    monkeypatch.setattr(sys, "argv", ["fid", *flags])
    with pytest.raises(SystemExit, match="2"):
        fid.main()
    assert "do nothing at --guidance_scale 1" in capsys.readouterr().err


def test_guidance_is_told_in_words() -> None:
    plain = dict(guidance_scale=2.0, guide=None, guidance_interval="0 to 1")
    assert fid.guidance_words(plain) == "guidance 2"
    assert (
        fid.guidance_words({**plain, "guide": "runs/weak", "guidance_interval": "0.2 to 0.8"})
        == "guidance 2 by runs/weak at times 0.2 to 0.8"
    )
