"""A run becomes a checkpoint that ships."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models import Pipeline
from models.files import write_json
from training.publish import publish


@pytest.fixture
def run(tiny_dit, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    training = {"steps": 10, "images_seen": 320, "data": "openmoji", "data_fingerprint": "abc"}
    Pipeline(tiny_dit(alpha_min=0.5), FlowMatchEulerDiscreteScheduler(), ["x", "y", "z"], training).save_pretrained(run)
    config = dict(
        backbone="dit", size="XS", patch_size=4, resolution=16, alpha_min=0.5, long_skips=True, ema_decay=0.9, images_a_step=32,
        seed=0, preset=None, precision="no", dataset_split="all", versions={"torch": "2"},
    )  # fmt: skip
    write_json(run / "config.json", config)
    (run / "metrics.jsonl").write_text(
        '{"step": 5, "images": 160, "images_per_s": 0.1}\n{"step": 10, "images": 320, "images_per_s": 0.1}\n'
    )
    return run


def test_it_samples_as_the_run_does_and_says_what_it_is(run: Path, tmp_path: Path) -> None:
    found = dict(
        metric="FD", feature_extractor="lite", value=12.34, num_samples=64, reference_num=100, reference="openmoji", reference_split="all",
        sampler="euler", steps=20, guidance_scale=1.0, seed=0, labels="0", precision="fp32", notes=["few"],
    )  # fmt: skip
    write_json(run / "eval/fd.json", found)
    publish(run, tmp_path / "out")
    shipped, original = Pipeline.from_pretrained(tmp_path / "out"), Pipeline.from_pretrained(run)
    for name, weight in original.model.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), shipped.model.state_dict()[name])
    assert shipped.config.class_names == ["x", "y", "z"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "CC BY-SA 4.0" in card
        and "320 images seen" in card
        and "0.9 hours" in card
        and "FD (lite) 12.3: 64 samples" in card
        and "few" in card
    )
    assert (tmp_path / "out/eval/fd.json").exists()
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["training"]["steps"] == 10
    assert all(path.stat().st_mode & 0o400 for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(ValueError, match="there already"):
        publish(run, tmp_path / "out")
    publish(run, tmp_path / "mine", "My photographs (CC BY 4.0).")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert 'split "all": My photographs (CC BY 4.0). Fingerprint abc' in card and "OpenMoji" not in card


def test_statistics_tell_no_split_and_perhaps_no_number(run: Path, tmp_path: Path) -> None:
    found = dict(
        metric="FID", feature_extractor="inception", value=1.0, num_samples=64, reference_num=None, reference="/data/stats.npz",
        sampler="euler", steps=20, guidance_scale=1.0, seed=0, labels=None, precision="fp32", notes=[],
    )  # fmt: skip
    write_json(run / "eval/fid.json", found)
    index = json.loads((run / "model_index.json").read_text())
    write_json(run / "model_index.json", {**index, "training": {**index["training"], "data": "/home/me/photographs"}})
    publish(run, tmp_path / "out")
    assert "64 samples against stats.npz, euler" in (tmp_path / "out" / "README.md").read_text()
    shipped = "".join(
        (tmp_path / "out" / name).read_text() for name in ("README.md", "model_index.json", "eval/fid.json", "ema/config.json")
    )
    assert "photographs" in shipped
    assert not any(folder in shipped for folder in ("/home", "/data", str(tmp_path))), "nobody's folders are published"


def test_nothing_is_left_of_a_publication_that_failed(run: Path, tmp_path: Path) -> None:
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        publish(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
