"""The FID script, against torch-fidelity's own call; its extractors, its generator, and what it refuses."""

import json
import os
import runpy
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from torch import nn

from eval.extractors import INCEPTION, LITE0, create_extractor, packaged_weights, register, timm_names
from eval.features import ArrayImages, FolderImages, extract_features, reference_features
from eval.generate import SamplingOptions, class_labels, generate
from models.compat import import_torchvision
from models.dit import DiT
from models.pipeline import SAMPLERS, Pipeline
from training.data import load_images

import_torchvision()

import torch_fidelity  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

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
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Run eval/fid.py as `python eval/fid.py` would, in this process: returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval/fid.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "eval" / "fid.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


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


@pytest.mark.slow
def test_two_folders_equal_torch_fidelity(folders: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = folders
    target = tmp_path / "deep" / "fd.json"
    done = subprocess_script(
        "--input1", one, "--input2", two, "--feature_extractor", LITE0, "--kid", "--batch_size", 4, "--json", target
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text())
    theirs = their_call(one, two, LITE0, kid=True, kid_subset_size=7)
    assert result["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert result["value"] > 1
    assert result["kernel_distance"]["mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert result["metric"] == "FD"
    assert result["kernel_distance"]["metric"] == "KD"
    assert done.stdout.startswith(f"FD (efficientnet-lite0) {result['value']:.4g} | 7 samples against 9 of {two}")
    assert "FID" not in done.stdout
    assert "biased" in result["notes"][0] and result["notes"][0] in done.stdout
    assert set(PROTOCOL) <= set(result)
    assert (result["num_samples"], result["reference_num"], result["alpha_min"]) == (7, 9, None)


@pytest.mark.slow
def test_inception_from_a_weights_path(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script) -> None:
    """The right architecture with random weights: the file is what counts, and nothing is downloaded."""
    hub = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with monkeypatch.context() as patch:
        patch.setattr(hub, lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # so that the signal reaches the end
    weights = tmp_path / "inception.pth"
    torch.save(network.state_dict(), weights)

    one, two = (write_images(tmp_path / name, 4, seed) for name, seed in (("one", 3), ("two", 4)))
    target = tmp_path / "fid.json"
    code, out, err = script("--input1", one, "--input2", two, "--feature_extractor_weights_path", weights, "--json", target)
    assert code == 0, err
    result = json.loads(target.read_text())
    theirs = their_call(one, two, INCEPTION, feature_extractor_weights_path=str(weights))
    assert result["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert result["metric"] == "FID"
    assert out.startswith("FID ")
    assert "not torch-fidelity's" in out  # honest about weights that are not the known ones


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


# --------------------------------------------------------------------------------------------------------------- bad input


def test_a_bad_call_is_one_line_and_exit_code_2(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess_script("--checkpoint", folders[0], "--reference", "openmoji", "--json", tmp_path / "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "is not a checkpoint" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either"),
        ("--input1 {one} --reference openmoji", "give either"),
        ("--checkpoint {run} --reference openmoji --input1 {one}", "give either"),
        ("--checkpoint {run} --reference {tmp}/none", "no folder"),
        ("--checkpoint {run} --reference {one} --class_label 3", "0 to 2"),
        ("--checkpoint {run} --reference {one} --num_samples 1", "--num_samples"),
        ("--checkpoint {run} --reference {one} --num_samples 1000000000000", "memory"),
        ("--checkpoint {run} --reference {one} --seed 9223372036854775807", "--seed"),
        ("--checkpoint {run} --reference {one} --num_inference_steps 0", "--num_inference_steps"),
        ("--checkpoint {run} --reference {one} --resolution 8", "--resolution"),
        ("--input1 {one} --input2 {tmp}/none", "not a folder"),
        ("--input1 {one} --input2 {tmp}/empty", "0 images"),
        ("--input1 {one} --input2 {tmp}/corrupt", "cannot be read"),
        ("--input1 {one} --input2 {tmp}/mixed", "--resolution"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {tmp}/none.pth", "not a file"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {one}/00.png", "no plain PyTorch weights"),
        ("--input1 {one} --input2 {two} --feature_extractor_weights_path {tmp}/other.pth", "do not fit"),
        ("--input1 {one} --input2 {two} --json {tmp}", "--json"),
    ],
)
def test_bad_input(arguments: str, message: str, folders: tuple[Path, Path], checkpoint: Path, tmp_path: Path, script) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "corrupt", 2, seed=0)
    (tmp_path / "corrupt" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    write_images(tmp_path / "mixed", 2, seed=0)
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "01.png")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    filled = arguments.format(one=folders[0], two=folders[1], run=checkpoint, tmp=tmp_path)
    code, out, err = script("--feature_extractor", LITE0, *filled.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_help_names_defaults(script) -> None:
    code, out, _ = script("--help")
    assert code == 0
    assert "(default: inception-v3-compat)" in out and "(default: 2048)" in out
