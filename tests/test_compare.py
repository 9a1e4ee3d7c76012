"""Comparisons: pairs on the same noise, sweeps, earlier numbers, and what is refused."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eval.extractors import LITE0
from models.dit import DiT
from models.pipeline import SAMPLERS, Pipeline
from training.objectives import DDPM

ROOT = Path(__file__).parent.parent
MODULE = runpy.run_path(str(ROOT / "eval" / "compare.py"), run_name="compare")  # a script: nothing imports it


def tiny(path: Path, seed: int, image_size: int = 8, ema: bool = False) -> Path:
    """A conditional model with random weights, saved as a checkpoint is."""
    torch.manual_seed(seed)
    model = DiT(image_size=image_size, patch_size=4, num_classes=2, depth=2, dim=32, num_heads=2, alpha_min=0.5)
    for layer in (model.modulation, model.head):
        nn.init.normal_(layer.weight, std=0.1)
    Pipeline(model, SAMPLERS["euler"](), ["cold", "warm"], {"steps": 5, "images_seen": 320, "data": "some"}).save_pretrained(path)
    if ema:
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        model.save_pretrained(path / "ema")
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return tiny(root / "one", 0, ema=True), tiny(root / "other", 1)


class ColourExtractor(nn.Module):
    """Features that need no network: mean colours, 4 x 4 of them; stands in for EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def get_name(self) -> str:
        return LITE0

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255,)


@pytest.fixture
def script(run_here: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """eval/compare.py with a quick extractor: returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("eval.judge.create_extractor", lambda name, path=None, scores=False: ColourExtractor())
    return lambda *arguments: run_here("eval/compare.py", *arguments, "--feature_extractor", LITE0)


QUICK = ("--num_samples", 48, "--num_inference_steps", 2)


def test_pairs(pair: tuple[Path, Path], image_folder: Path, tmp_path: Path, script) -> None:
    one, other = pair
    output = tmp_path / "deep" / "comparison"
    code, out, err = script(one, other, one, f"{one}@raw", "--reference", image_folder, *QUICK, "--kid", "--prc", "--output", output)
    assert code == 0, err
    found = json.loads((output / "comparison.json").read_text())
    entries, rows = found["entries"], found["differences"]
    assert [entry["name"] for entry in entries] == [str(one), str(other), f"{one}@raw"]  # once each
    assert [entry["ema"] for entry in entries] == [True, False, False]
    assert entries[0]["labels"].startswith("as frequent as in the reference")
    assert {row["metric"] for row in rows} == {"FD", "FD_infinity", "KD", "precision", "recall"}
    for row in rows:
        by_name = {entry["name"]: entry["metrics"][row["metric"]]["value"] for entry in entries}
        assert row["difference"] == pytest.approx(by_name[row["contender"]] - by_name[row["against"]])
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["interval"].startswith("paired")
        assert f"{row['difference']:.4g}" in out
    assert {row["verdict"] for row in rows} <= {"better", "worse", "undecided"}
    page = (output / "comparison.html").read_text()
    assert page.count("data:image/png") == 3  # a strip each
    assert "another training seed" in page
    assert "trained on some" in out


def test_a_model_against_itself_is_undecided(pair: tuple[Path, Path], image_folder: Path, tmp_path: Path, script) -> None:
    copy = tiny(tmp_path / "copy", 1)
    code, _, err = script(pair[1], copy, "--reference", image_folder, *QUICK, "--output", tmp_path / "out")
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"]
    assert [(row["difference"], row["verdict"]) for row in rows] == [(0, "undecided")] * 2


def test_sweep(pair: tuple[Path, Path], image_folder: Path, tmp_path: Path, script) -> None:
    output = tmp_path / "sweep"
    flags = ["--sweep", "steps=1,3", "guidance=1,2", "--prc", "--num_samples", 16, "--output", output]
    code, out, err = script(*pair, "--reference", image_folder, *flags)
    assert code == 0, err
    entries = json.loads((output / "comparison.json").read_text())["entries"]
    assert [(entry["steps"], entry["guidance_scale"]) for entry in entries] == 2 * [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert '<img src="pareto.png"' in (output / "comparison.html").read_text()
    assert "steps 3, guidance 2" in out


def test_sweep_settings() -> None:
    settings = MODULE["sweep_settings"]
    assert settings([]) == [{}]
    assert settings(["steps=5,10", "guidance=1.5"]) == [
        {"num_inference_steps": 5, "guidance_scale": 1.5},
        {"num_inference_steps": 10, "guidance_scale": 1.5},
    ]
    for word in ("seeds=1", "steps=", "steps=1.5", "steps=0", "guidance=x", "guidance=nan", "steps"):
        with pytest.raises(ValueError, match="--sweep"):
            settings([word])


def test_pareto_front_and_cost() -> None:
    assert MODULE["pareto"]([10, 5, 20, 10, 40], [3, 7, 4, 2, 1]) == [1, 3, 4]
    cost = MODULE["evaluations"]
    base = {"guidance_scale": 1.0, "labels": "x", "sampler": "euler", "steps": 10, "guide": None}
    guided = {"guidance_scale": 2.0}
    changes = {10: {}, 20: guided, 19: {"sampler": "heun"}}
    assert [cost({**base, **change}) for change in changes.values()] == list(changes)
    assert cost({**base, **guided, "labels": None}) == 10
    assert cost({**base, **guided, "labels": None, "guide": "runs/weak"}) == 20  # a guide needs no label


def evaluation(path: Path, value: float, reach: float | None = 1.0, **change: Any) -> Path:
    """As eval/fid.py writes it; without `reach`, as it did before there were intervals."""
    found = {"value": value} if reach is None else {"value": value, "low": value - reach, "high": value + reach}
    result = {
        "metric": "FD", "num_samples": 100, "feature_extractor": LITE0, "feature_extractor_weights": "aa", "reference": "x",
        "reference_num": 50, "reference_fingerprint": "f", "steps": 20, **found, **change,
    }  # fmt: skip
    path.write_text(json.dumps(result if reach is None else {**result, "metrics": {"FD": found}}))
    return path


def test_earlier_numbers(tmp_path: Path, script) -> None:
    one, other = evaluation(tmp_path / "a.json", 10), evaluation(tmp_path / "b.json", 12, steps=50)
    code, out, _ = script(one, other)
    assert code == 0
    assert "2 [0.5858, 3.414]" in out and "worse" in out  # sqrt(2) wide: two independent numbers
    assert "steps 20 / 50" in out
    assert "undecided" in script(one, evaluation(tmp_path / "c.json", 11))[1]
    assert "undecided" in script(one, evaluation(tmp_path / "old.json", 90, reach=None))[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 200}, "num_samples 100 and 200"),
        ({"feature_extractor": "vgg16"}, "feature_extractor"),
        ({"feature_extractor_weights": "bb"}, "feature_extractor_weights aa and bb"),
        ({"reference": "y"}, "reference x and y"),
        ({"reference_fingerprint": "g"}, "reference_fingerprint"),
    ],
)
def test_numbers_of_different_protocols_are_refused(change: dict, message: str, tmp_path: Path, script) -> None:
    code, out, err = script(evaluation(tmp_path / "a.json", 10), evaluation(tmp_path / "b.json", 12, **change))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot stand in one column" in err and message in err


def test_bad_input(pair: tuple[Path, Path], image_folder: Path, tmp_path: Path, script) -> None:
    other_size = tiny(tmp_path / "large", 0, image_size=16)
    noise = tmp_path / "noise"
    Pipeline(Pipeline.from_pretrained(pair[0]).model, DDPM().scheduler).save_pretrained(noise)
    number = evaluation(tmp_path / "a.json", 1)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "part.json").write_text('{"metric": "FD", "value": 1, "num_samples": 9, "feature_extractor": "x", "reference": "y"}')
    odd = evaluation(tmp_path / "odd.json", 1, reach=None, metrics={"FD": 3})
    np.savez(tmp_path / "large.npz", np.zeros((4, 16, 16, 3), np.uint8))
    reference = ["--reference", image_folder]
    for arguments, message in [
        ([pair[0]], "--reference"),
        ([pair[0], tmp_path / "none"], "none does not exist"),
        ([pair[0], tmp_path / "none", *reference], "is not a checkpoint"),
        ([f"{pair[1]}@raw", *reference], "no averaged weights"),
        ([pair[0], other_size, *reference], "different shapes"),
        ([pair[0], "--reference", tmp_path / "large.npz"], "of 16 x 16"),
        ([pair[0], number, *reference], ".json files with .json files"),
        ([number, tmp_path / "list.json"], "no evaluation"),
        ([number, tmp_path / "torn.json"], "not valid JSON"),
        ([number, tmp_path / "part.json"], "protocol is missing"),
        ([number, odd], "have no values"),
        ([number, tmp_path / "none.json"], "none.json"),
        ([pair[0], *reference, "--output", number], "--output"),
        ([pair[0], *reference, "--sweep", "seeds=3"], "--sweep"),
        ([pair[0], *reference, "--guidance_to", 0.8, "--sweep", "steps=1,2"], "do nothing at --guidance_scale 1"),
        ([pair[0], *reference, "--guidance_from", 0.8, "--guidance_to", 0.2, "--guidance_scale", 2], "the smaller first"),
        ([pair[0], *reference, "--guide", other_size, "--guidance_scale", 2, "--sweep", "steps=1,2"], "has image_size 16"),
        ([noise, *reference, "--sweep", "steps=20,150"], "with ddim choose at most 100, 125"),
    ]:
        code, out, err = script(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (message, out, err)
        assert message in err
