"""Distances during a training: what is written, and that the training does not notice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from eval.spread import alone, own_batches
from eval.while_training import some_of
from models.files import read_json
from training.monitor import read_metrics
from training.packing import load_images
from training.train_diffusion import main


def train(folder: Path, run: Path, *flags: object) -> None:
    command = ["--train_data_dir", folder, "--resolution", 8, "--patch_size", 4, "--train_batch_size", 8, "--max_train_steps", 4]
    command += ["--logging_steps", 2, "--sample_steps", 2, "--report_to", "none", "--mixed_precision", "no", "--ema_decay", 0.9]
    main([*map(str, command), "--output_dir", str(run), *map(str, flags)])


@pytest.mark.slow
def test_small_distances_are_written_with_their_protocol_and_change_nothing(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    watched, other = tmp_path / "watched", tmp_path / "other"
    train(image_folder, watched, "--metrics_during_training", 2, "--metrics_samples", 6)  # as often as the samples are drawn
    said = capsys.readouterr().out
    train(image_folder, other, "--sample_steps", 0)

    found = [read_json(watched / "eval" / "during_training" / f"step-{step}.json") for step in (2, 4)]
    assert [each["images_seen"] for each in found] == [16, 32]
    expected = {
        "metric": "FD", "num_samples": 6, "reference": str(image_folder), "reference_num": 24, "reference_split": "train",
        "sampler": "euler", "steps": 20, "seed": 0, "ema": True, "training_data": str(image_folder),
        "feature_extractor": "efficientnet-lite0",
    }  # fmt: skip
    for each in found:
        assert {key: each[key] for key in expected} == expected
        assert each["low"] < each["value"] < each["high"]
        assert each["labels"].startswith("as frequent")
        assert f"FD (efficientnet-lite0) {each['value']:.4g} [" in said
    assert [line["fd"] for line in read_metrics(watched)] == [round(each["value"], 3) for each in found]
    assert read_json(watched / "config.json")["metrics_samples"] == 6
    assert not (other / "eval").exists()
    assert len(list((watched / "samples").iterdir())) == 2

    for part in ("model", "ema"):  # bit for bit the same
        weights, same = (load_file(run / part / "diffusion_pytorch_model.safetensors") for run in (watched, other))
        assert all((weights[name] == same[name]).all() for name in weights)
    assert [line["loss"] for line in read_metrics(watched)] == [line["loss"] for line in read_metrics(other)]


def test_an_unknown_extractor_is_told_before_the_training(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        train(image_folder, tmp_path / "run", "--metrics_during_training", 2, "--metrics_extractor", "nonsense")
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: there is no --metrics_extractor nonsense") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_of_many_images_some_from_all_over_are_looked_at(image_folder: Path) -> None:
    data = load_images(str(image_folder), 8)
    assert some_of(data, 24) is data
    few = some_of(data, 6)
    assert len(few) == len(few.labels) == 6 and set(few.labels) == {0, 1}
    assert np.array_equal(few.images[-1], data.images[-1])
    assert few.fingerprint not in (data.fingerprint, some_of(data, 7).fingerprint)
    assert some_of(replace(data, labels=None), 6).labels is None


def test_alone_a_process_takes_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Second:
        process_index, num_processes = 1, 2

    monkeypatch.setattr("eval.spread.processes", Second)
    assert own_batches(10, 4) == [(4, 8)]
    with alone():
        assert own_batches(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert own_batches(10, 4) == [(4, 8)]
