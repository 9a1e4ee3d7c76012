"""Masked-autoencoder pre-training: exact resumption, crops, presets, what is written, bad input."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import RandomResizedCrop

from eval.encoders import MAEEncoder, block_features, load_encoder
from eval.knn import knn_accuracy
from eval.linear import held_out_parts, softmax_probe
from eval.looking import fewer
from eval.quick import QuickProbe
from eval.rank import effective_rank
from models import Pipeline, create_model, effective_alpha
from models.files import read_json
from models.mae import MAE
from models.registry import load_backbone
from tests.conftest import ROOT, script_environment
from training import train_diffusion, train_mae
from training.augment import Boxes, _resize_each, _resize_together, crop_and_resize, random_boxes, with_crops
from training.command import parse
from training.data import ImageData, pixels
from training.ema import EMA
from training.loop_options import LoopOptions
from training.monitor import feature_statistics, read_metrics
from training.objectives import FlowMatching, MaskedAutoencoding
from training.packing import load_images
from training.presets import MAE_PRESETS, PRESETS
from training.train_mae import MAELoopOptions, main, parameter_groups, reconstructions

SCRIPT = "training/train_mae.py"
TINY = [
    "--resolution", "8", "--patch_size", "2", "--alpha_min", "0.6", "--train_batch_size", "4", "--base_learning_rate", "0.064",
    "--logging_steps", "2", "--sample_steps", "0", "--report_to", "none", "--mixed_precision", "no",
]  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def train(image_folder: Path) -> Callable:
    """train(run, *flags): a run on the image folder that must succeed."""

    def train(run: Path, *flags: object) -> None:
        AcceleratorState._reset_state(True)
        main(list(map(str, ["--train_data_dir", image_folder, "--output_dir", run, *TINY, *flags])))

    yield train
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def whole_run(train: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("mae") / "whole"
    train(run, "--max_train_steps", 8, "--checkpointing_steps", 4, "--sample_steps", 4, "--lr_warmup_steps", 3)
    return run


@pytest.fixture(scope="module")
def images(image_folder: Path) -> ImageData:
    return load_images(str(image_folder), 32)


def without_speed(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in read_metrics(run)]


def weights(run: Path, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / part / WEIGHTS)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def tiny_mae(**options: object) -> MAE:
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, decoder_depth=2, decoder_dim=16, decoder_num_heads=2)
    model = MAE(**{**sizes, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# -------------------------------------------------------------------------------------------------------------------- run


def test_a_run_on_disk(whole_run: Path, image_folder: Path) -> None:
    files = {str(path.relative_to(whole_run)) for path in whole_run.rglob("*") if path.is_file()}
    assert {"config.json", "metrics.jsonl", "model_index.json", "samples/step-4.png", "samples/step-8.png"} <= files
    assert {"model/config.json", f"model/{WEIGHTS}", "checkpoints/step-4/manifest.json"} <= files
    assert not (whole_run / "ema").exists(), "weights are not averaged unless asked for"
    index = read_json(whole_run / "model_index.json")
    assert index["model"] == ["models.mae", "MAE"] and index["class_names"] == ["cold", "warm"]
    assert index["training"]["images_seen"] == 32 and index["training"]["data"] == str(image_folder)
    config = read_json(whole_run / "config.json")
    assert (config["backbone"], config["crop_min_scale"], config["mask_ratio"], config["random_flip"]) == ("mae", 0.2, 0.75, True)
    assert config["learning_rate"] == pytest.approx(0.064 * 4 / 256)
    lines = read_metrics(whole_run)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert all(len(line["block_norms"]) == 6 and 0 <= line["effective_rank"] <= math.log(4) for line in lines)
    network = load_backbone(whole_run)
    assert isinstance(network, MAE) and not network.training and network.alphas[-1] == 0.6
    assert all(torch.equal(tensor, weights(whole_run)[name]) for name, tensor in network.state_dict().items())


def test_resuming_equals_not_having_stopped_bit_for_bit(train: Callable, whole_run: Path, tmp_path: Path) -> None:
    flags = ["--checkpointing_steps", 4, "--lr_warmup_steps", 3]
    train(tmp_path / "run", "--max_train_steps", 4, *flags)
    train(tmp_path / "run", "--max_train_steps", 8, *flags, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "run", whole_run)
    assert without_speed(tmp_path / "run") == without_speed(whole_run)


def test_looking_does_not_change_the_training_but_crops_and_masks_do(train: Callable, tmp_path: Path) -> None:
    changes = {
        "base": (),
        "logged": ("--logging_steps", 1, "--sample_steps", 1),
        "whole": ("--crop_min_scale", 1),
        "masked": ("--mask_ratio", 0.5),
        "unflipped": ("--no-random_flip",),
    }
    for name, flags in changes.items():
        train(tmp_path / name, "--max_train_steps", 3, *flags)
    assert_same_weights(tmp_path / "base", tmp_path / "logged")
    base, *others = (weights(tmp_path / name)["patch_embed.weight"] for name in changes if name != "logged")
    assert not any(torch.equal(base, other) for other in others)


@pytest.mark.parametrize("flags", [("--no-long_skips",), (), ("--learnable_alpha", "--shortcut_placement", "mlp")], ids=str)
def test_every_parameter_trains(flags: tuple[str, ...], train: Callable, tmp_path: Path) -> None:
    flags = (*flags, "--adam_weight_decay", "0")
    train(tmp_path / "first", "--max_train_steps", 1, *flags, "--base_learning_rate", 0)
    train(tmp_path / "last", "--max_train_steps", 4, *flags)
    first, last = weights(tmp_path / "first"), weights(tmp_path / "last")
    still = [name for name in first if torch.equal(first[name], last[name])]
    assert not still
    assert all(tensor.isfinite().all() for tensor in last.values())


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(train: Callable, image_folder: Path, tmp_path: Path) -> None:
    """And two such trainings on one machine do not meet."""
    train(tmp_path / "one", "--max_train_steps", 6, "--gradient_accumulation_steps", 2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", SCRIPT]
    launch += ["--train_data_dir", image_folder, *TINY, "--max_train_steps", 6]
    options = dict(cwd=ROOT, env=script_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pairs = [subprocess.Popen([*map(str, launch), "--output_dir", tmp_path / name], **options) for name in ("two", "too")]
    for pair in pairs:
        said, _ = pair.communicate(timeout=300)
        assert pair.returncode == 0, said
    one, two, too = (without_speed(tmp_path / name) for name in ("one", "two", "too"))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    assert [line["lr"] for line in one] == [line["lr"] for line in two] == [0.064 * 8 / 256] * 3
    assert two == too


def test_processes_on_cpus_of_several_machines_are_left_to_torchrun(run_script: Callable, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 2, "--machine_rank", 0]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", 29511]
    done = run_script(*launch, SCRIPT, *TINY, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    assert done.returncode and "error: accelerate launch --cpu begins processes on one machine; on several use torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_weights_are_averaged_where_asked_and_can_begin_another_run(train: Callable, tmp_path: Path) -> None:
    train(tmp_path / "run", "--max_train_steps", 2, "--ema_decay", 0.9)
    average, last = weights(tmp_path / "run", "ema"), weights(tmp_path / "run")
    for ema, expected in ((True, average), (False, last)):
        loaded = load_backbone(tmp_path / "run", ema=ema).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not torch.equal(average["decoder_pred.weight"], last["decoder_pred.weight"])
    train(tmp_path / "next", "--max_train_steps", 1, "--base_learning_rate", 0, "--init_from", tmp_path / "run")
    assert all(torch.equal(average[name], tensor) for name, tensor in weights(tmp_path / "next").items())
    assert read_json(tmp_path / "next/model_index.json")["training"]["images_seen"] == 12


def test_without_a_decay_no_average_is_kept() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], 0.0)
    parameter.data += 1
    ema.update([parameter], 1)
    ema.copy_to([parameter])
    assert ema.averages == [] and parameter.tolist() == [1, 1]


def test_runs_that_do_not_sample_and_folders_without_weights_are_told(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples no images"):
        Pipeline.from_pretrained(whole_run)
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"model": ["models.mae", "MAE"]}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha_min", "0"], "(0, 1]"),
        (["--alpha_eff", "1e-3"], "not both"),
        (["--patch_size", "3"], "not divisible"),
        (["--mask_ratio", "1"], "of 16 patches visible"),
        (["--mask_ratio", "0.99"], "of 16 patches visible"),
        (["--mask_ratio", "2"], "between 0 and 1"),
        (["--crop_min_scale", "nan"], "between 0 and 1"),
        (["--base_learning_rate", "-1"], "at least 0"),
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--dataset_name", "openmoji"], "give one of"),
        (["--backbone", "dit"], "mae"),
        (["--size", "XL"], "XS"),
        (["--preset", "openmoji-decayed"], "mae-openmoji-decayed"),
        (["--vae", "x"], "unrecognized"),
        (["--lr_scheduler", "linear"], "cosine"),
        (["--init_from", "nowhere"], "not a checkpoint"),
        (["--resume_from_checkpoint", "latest"], "no checkpoint to resume"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    flags: list[str], message: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 1]
    AcceleratorState._reset_state(True)
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, base), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_as_another(train: Callable, whole_run: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train(whole_run, "--max_train_steps", 20, "--resume_from_checkpoint", "latest", "--crop_min_scale", 0.5)
    assert "crop_min_scale was 0.2 and is 0.5" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ optimisation


def test_the_learning_rate_grows_with_the_images_of_a_step() -> None:
    assert MAELoopOptions(base_learning_rate=1.5e-4).settled(4096).learning_rate == pytest.approx(2.4e-3)
    assert MAELoopOptions(learning_rate=1e-3).settled(4096).learning_rate == 1e-3
    assert LoopOptions(learning_rate=1e-3).settled(4096).learning_rate == 1e-3


def test_biases_norms_and_alphas_do_not_decay() -> None:
    model = tiny_mae(learnable_alpha=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model))
    assert sorted(decayed + free) == sorted(names.values())
    assert all(name.endswith((".bias", "alpha")) or "norm" in name for name in free)
    assert all(name.endswith(("weight", "token")) and "norm" not in name for name in decayed)
    assert parameter_groups(model)[1]["weight_decay"] == 0 and "weight_decay" not in parameter_groups(model)[0]


def test_weight_decay_reaches_what_it_should(train: Callable, tmp_path: Path) -> None:
    for decay in (0, 0.5):
        train(tmp_path / str(decay), "--max_train_steps", 1, "--adam_weight_decay", decay)
    without, with_decay = (weights(tmp_path / name) for name in ("0", "0.5"))
    same = {name for name in without if torch.equal(without[name], with_decay[name])}
    assert {name for name in without if without[name].ndim == 1} <= same
    assert {"patch_embed.weight", "cls_token", "blocks.3.mlp.fc1.weight"}.isdisjoint(same)


def test_the_objective_hands_the_model_noise_of_its_own_and_the_ratio() -> None:
    model, objective = tiny_mae(), MaskedAutoencoding(16, 0.5)
    batch = {"images": torch.randn(3, 3, 16, 16)}
    ((images, noise, ratio),) = objective.inputs(batch, torch.Generator().manual_seed(3))
    output = model(images, noise, ratio)
    assert torch.equal(objective(model, batch, torch.Generator().manual_seed(3)), output.loss)
    assert (output.mask.sum(1) == 8).all() and noise.unique().numel() == noise.numel()


# ----------------------------------------------------------------------------------------------------------------- looking


def test_pictures_show_the_original_what_is_seen_and_what_is_made_of_it() -> None:
    model = tiny_mae()
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    pictures = reconstructions(model, images, 0.75)
    assert pictures.shape == (15, 16, 16, 3) and pictures.dtype == np.uint8
    original, seen, painted = pictures.reshape(5, 3, 16, 16, 3).swapaxes(0, 1).astype(int)
    assert abs(original / 127.5 - 1 - images.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 127.5 + 1e-6
    hidden = (seen == 128).all(-1)
    assert (hidden.reshape(5, 4, 4, 4, 4).swapaxes(2, 3).all((3, 4)).sum((1, 2)) == 12).all(), "whole patches are grey, 12 of 16"
    assert hidden.sum() == 5 * 12 * 16
    assert (seen == original)[~hidden].all() and (painted == original)[~hidden].all()
    assert (painted != original)[hidden].mean() > 0.5
    assert (reconstructions(model, images, 0.75) == pictures).all(), "the masks are the same each time"


def test_pictures_of_a_run(whole_run: Path) -> None:
    with Image.open(whole_run / "samples/step-8.png") as picture:
        assert picture.size == (3 * 4 * 8, 3 * 8)
        first = np.asarray(picture)[:8, :8]
    with Image.open(whole_run / "samples/step-4.png") as earlier:
        assert (np.asarray(earlier)[:8, :8] == first).all(), "the same images each time"


def test_the_rank_is_that_of_the_bottleneck(tiny_dit: Callable) -> None:
    images = torch.randn(6, 3, 16, 16)
    model, noise = tiny_mae(), torch.rand(6, 16)
    _, features = model(images, noise, 0.5, return_features=True)
    told = feature_statistics(model, (images, noise, 0.5), MaskedAutoencoding.bottleneck)
    assert told["effective_rank"] == pytest.approx(effective_rank(features[-1].mean(1)), abs=1e-4)
    assert told["block_norms"] == pytest.approx([block.square().mean().sqrt().item() for block in features], abs=1e-4)

    dit, t = tiny_dit(), torch.rand(6)
    _, features = dit(images, t, return_features=True)
    told = feature_statistics(dit, (images, t), FlowMatching.bottleneck, num_images=5)
    assert told["effective_rank"] == pytest.approx(effective_rank(features[1][:5].mean(1)), abs=1e-4), "the encoder's last of 4"
    assert [FlowMatching.bottleneck(n) for n in (7, 8, 9)] == [3, 3, 4]


def test_features_without_a_rank_do_not_stop_a_training() -> None:
    for value in (0.0, math.nan):
        told = feature_statistics(lambda x, return_features: (x, [x]), (torch.full((2, 3, 4), value),), lambda n: 0)
        assert told["effective_rank"] is None


def test_quick_probes_see_the_averaged_weights_and_change_nothing(train: Callable, tmp_path: Path, image_folder: Path) -> None:
    flags = ("--max_train_steps", 4, "--logging_steps", 3, "--ema_decay", 0.5)
    train(tmp_path / "base", *flags)
    train(tmp_path / "probed", *flags, "--probe_every", 2, "--probe_images", 16)
    assert_same_weights(tmp_path / "base", tmp_path / "probed")
    lines = read_metrics(tmp_path / "probed")
    assert [(line["step"], "probe_knn" in line) for line in lines] == [(2, True), (3, False), (4, True)]

    features = load_backbone(tmp_path / "probed").features  # averaged
    data = fewer(load_images(str(image_folder), 8), 16, seed=0)
    assert len(data) == 16
    with torch.no_grad():
        x = features(data.samples(data.rows(np.arange(16)), torch.device("cpu"), None, None))[-1].mean(1)
    y = torch.from_numpy(data.labels)
    judged, choosing, *_ = held_out_parts(y, 5, parts=5)
    assert lines[-1]["probe_rank"] == pytest.approx(effective_rank(x), abs=1e-4)
    knn = knn_accuracy(x[~judged], y[~judged], x[judged], y[judged], int((~judged).sum().clamp(max=20)))
    assert lines[-1]["probe_knn"] == pytest.approx(knn, abs=1e-4)
    linear = softmax_probe(x[~judged], y[~judged], x[judged], [choosing[~judged]]).predictions == y[judged]
    assert lines[-1]["probe_linear"] == pytest.approx(linear.double().mean().item(), abs=1e-4)


def test_quick_probes_fit_nothing_where_nothing_is_left_to_fit_to(tmp_path: Path) -> None:
    """Of two classes of two images one of each is judged, and the other would choose the penalty."""
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    data = ImageData(images, labels=np.array([0, 0, 1, 1]), class_names=("a", "b"), name="few", split="train", fingerprint="")
    torch.manual_seed(0)
    network = create_model("mae", size="XS", image_size=8, patch_size=4)
    look = QuickProbe(data, lambda model: MAEEncoder(model, {}, 8), lambda num: num - 1, "no", 2500)
    found = look(tmp_path, 1, network, EMA(network.parameters(), 0.0))
    assert set(found) == {"probe_knn", "probe_rank"}


def test_quick_probes_of_a_diffusion_model(image_folder: Path, tmp_path: Path) -> None:
    """As eval/probe.py would look at the middle block: noise of each image's own, no label."""
    AcceleratorState._reset_state(True)
    flags = ["--resolution", "8", "--patch_size", "4", "--train_batch_size", "4", "--logging_steps", "2", "--sample_steps", "0"]
    flags += ["--report_to", "none", "--mixed_precision", "no", "--max_train_steps", "2", "--probe_every", "2", "--learning_rate", "1e-3"]
    train_diffusion.main(["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "run"), *flags])
    (line,) = read_metrics(tmp_path / "run")
    encoder, data = load_encoder(str(tmp_path / "run"), times=(0.7,)), load_images(str(image_folder), 8)
    (x,) = block_features(encoder, data, (len(encoder.network.blocks) // 2 - 1,)).values()
    assert line["probe_rank"] == pytest.approx(effective_rank(x), abs=1e-3) and 0 <= line["probe_knn"] <= 1


def test_quick_probes_need_labels(train: Callable, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--max_train_steps", 2, "--probe_every", 1, "--train_data_dir", image_folder / "warm")
    assert "has no labels, and --probe_every needs them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_features_that_explode_stop_the_training(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("training.loop.EXPLODED", 0.01)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", "--max_train_steps", 4, "--checkpointing_steps", 1, "--probe_every", 2)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert "after step 2" in error and "--zero_init" in error and "the last checkpoint is of step 1" in error
    (line,) = read_metrics(tmp_path / "run")  # the line that tells it is kept
    assert "probe_knn" not in line, "there are no features to look at"
    told = read_json(tmp_path / "run/broke.json")
    assert "the features explode" in told["why"] and told["images_seen"] == 8
    monkeypatch.setattr("training.loop.EXPLODED", 1e4)
    again = (tmp_path / "run", "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    with pytest.raises(SystemExit, match="2"):
        train(*again, "--base_learning_rate", 1e-5)
    assert (tmp_path / "run/broke.json").exists(), "going on was refused"
    train(*again)
    assert not (tmp_path / "run/broke.json").exists(), "it goes on"


def test_features_that_are_no_numbers_explode_too(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loop.feature_statistics", lambda *_: {"block_norms": [1.0, math.nan, 2.0], "effective_rank": 1.0})
    with pytest.raises(SystemExit, match="1"):
        train(tmp_path / "run", "--max_train_steps", 4)
    assert "the features explode" in read_json(tmp_path / "run/broke.json")["why"]


# ------------------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("resize", [_resize_each, _resize_together])
@pytest.mark.parametrize("size", [8, 45])
def test_crops_equal_pillow(size: int, resize: Callable) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, size, size, 3), np.uint8)
    corners = torch.tensor([(0, 0, 1, 1), (size - 1, 2, 1, 5), (3, 1, 2, size - 1)]).T  # top, left, height, width
    drawn = random_boxes(37, size, 0.02, torch.Generator().manual_seed(1))
    boxes = Boxes(*(torch.cat(sides) for sides in zip(corners, drawn, strict=True)))
    found = resize(torch.from_numpy(pictures).permute(0, 3, 1, 2), boxes).permute(0, 2, 3, 1).numpy()
    for picture, crop, top, left, height, width in zip(pictures, found, *(side.tolist() for side in boxes), strict=True):
        part = Image.fromarray(picture).crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        difference = np.abs(crop.astype(int) - np.asarray(part))
        assert difference.max() <= 2 and (difference > 0).mean() < 0.05  # Pillow rounds its weights


def test_a_box_as_large_as_the_image_changes_nothing(images: ImageData) -> None:
    whole = pixels(images.rows(np.arange(4)), torch.device("cpu"))
    zeros, full = torch.zeros(4, dtype=torch.long), torch.full((4,), 32)
    assert torch.equal(crop_and_resize(whole, Boxes(zeros, zeros, full, full)), whole)
    assert torch.equal(_resize_together(whole, Boxes(zeros, zeros, full, full)), whole)
    assert with_crops(images, 1.0) is images


def test_boxes_are_distributed_as_in_torchvision() -> None:
    torch.manual_seed(0)
    ours = torch.stack(random_boxes(4000, 64, 0.2, torch.Generator().manual_seed(0)), 1)
    blank = torch.zeros(3, 64, 64)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    top, left, height, width = ours.T
    assert (ours[:, :2] >= 0).all() and (height > 0).all() and (top + height <= 64).all() and (left + width <= 64).all()
    assert len(top.unique()) > 30 and len(left.unique()) > 30

    def quantities(boxes: torch.Tensor) -> torch.Tensor:
        top, left, height, width = boxes.double().T
        return torch.stack([height * width / 64**2, (width / height).log(), top, left, height, width], 1)

    ours, theirs = quantities(ours), quantities(theirs)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * (ours.var(0) / 2000).sqrt()).all()
    shares = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    spread = theirs.quantile(0.95, dim=0) - theirs.quantile(0.05, dim=0)
    assert ((ours.quantile(shares, dim=0) - theirs.quantile(shares, dim=0)).abs() < 0.06 * spread).all()


@pytest.mark.parametrize("min_scale", [0.0, 0.01, 0.99])
def test_extreme_scales_have_boxes(min_scale: float) -> None:
    top, left, height, width = random_boxes(500, 8, min_scale, torch.Generator().manual_seed(0))
    assert (torch.minimum(height, width) > 0).all() and (torch.maximum(top + height, left + width) <= 8).all()
    assert (height * width >= min_scale * 64 - 8).all()
    if min_scale < 0.9:  # small ones reach every edge
        small = (height < 8) & (width < 8)
        assert all((edge[small] == at).any() for edge, at in ((top, 0), (left, 0), (top + height, 8), (left + width, 8)))


def test_batches_repeat_with_their_generator(images: ImageData) -> None:
    data = with_crops(images, 0.2)
    assert len(data) == len(images) and data.shape == images.shape and data.fingerprint == images.fingerprint

    def batch(seed: int, **options: bool) -> torch.Tensor:
        return data.batch(data.rows(np.arange(8)), torch.device("cpu"), torch.Generator().manual_seed(seed), **options)["images"]

    flipped = batch(0, flip=True)
    assert torch.equal(flipped, batch(0, flip=True)) and not torch.equal(flipped, batch(1, flip=True))
    assert flipped.shape == (8, 3, 32, 32) and flipped.abs().max() <= 1
    labels = data.batch(data.rows(np.arange(8)), torch.device("cpu"), torch.Generator(), flip=False)["labels"]
    assert labels.tolist() == images.labels[:8].tolist()


# ----------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", MAE_PRESETS)
def test_presets_are_whole(name: str) -> None:
    preset = MAE_PRESETS[name]
    fields = {field.name for group in train_mae.GROUPS for field in dataclasses.fields(group)}
    assert preset.flags.keys() <= fields
    found, (data, model, shortcuts, task, loop) = parse("", train_mae.GROUPS, MAE_PRESETS, ["--preset", name])
    assert found == name and loop.output_dir == f"runs/{name}" and loop.lr_scheduler == "cosine"
    assert 0 < loop.lr_warmup_steps < 0.2 * loop.max_train_steps
    with torch.device("meta"):
        network = train_mae.build(model, shortcuts, data.resolution)
        network(torch.empty(1, 3, data.resolution, data.resolution), mask_ratio=task.mask_ratio)
    assert network.config.long_skips == (not name.endswith("plain"))
    assert (network.alphas[-1] < 1) == name.endswith("decayed")


def test_depth_wins_over_the_sizes_and_counts_in_the_depth_rule() -> None:
    flags = ["--preset", "mae-32px-decayed", "--depth", "12", "--alpha_eff", "3e-3"]
    _, (data, model, shortcuts, *_) = parse("", train_mae.GROUPS, MAE_PRESETS, flags)
    network = train_mae.build(model, shortcuts, data.resolution)
    assert (len(network.blocks), len(network.decoder_blocks), network.config.dim) == (12, 4, 192)
    assert effective_alpha(network.alphas) == pytest.approx(3e-3) and 0.53 < network.alphas[-1] < 0.66


def test_presets_of_a_family_differ_in_their_form_alone() -> None:
    families = {name.rsplit("-", 1)[0] for name in MAE_PRESETS}
    assert families >= {"mae-openmoji", "mae-64px", "mae-imagenet"}
    for family in families:
        flags = [MAE_PRESETS[f"{family}-{form}"].flags for form in ("plain", "skips", "decayed")]
        same = [{key: value for key, value in each.items() if key not in ("alpha_min", "long_skips")} for each in flags]
        assert same[0] == same[1] == same[2]


def test_the_papers_preset_is_the_papers() -> None:
    _, (data, model, shortcuts, task, loop) = parse("", train_mae.GROUPS, MAE_PRESETS, ["--preset", "mae-imagenet-decayed"])
    images_a_step = 8 * loop.train_batch_size * loop.gradient_accumulation_steps
    assert (images_a_step, data.resolution, model.size, model.patch_size) == (4096, 224, "B", 16)
    assert loop.max_train_steps * images_a_step / 1_281_167 == pytest.approx(800, rel=1e-4)
    assert loop.lr_warmup_steps * images_a_step / 1_281_167 == pytest.approx(40, rel=1e-4)
    assert loop.settled(images_a_step).learning_rate == pytest.approx(2.4e-3)
    assert (loop.adam_beta1, loop.adam_beta2, loop.adam_weight_decay, task.mask_ratio) == (0.9, 0.95, 0.05, 0.75)
    assert (shortcuts.alpha_min, task.crop_min_scale, model.norm_pixels) == (0.6, 0.2, True)


def test_presets_of_diffusion_are_whole() -> None:
    fields = {field.name for group in train_diffusion.GROUPS for field in dataclasses.fields(group)}
    assert all(preset.flags.keys() <= fields for preset in PRESETS.values())


def test_help_lists_presets_and_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(name in text for name in MAE_PRESETS)
    assert "(default: 0.95)" in text and "--no-norm_pixels" in text
