"""The probe script on checkpoints, networks of timm and saved features: its numbers by hand, its protocol, and what it refuses."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from eval.encoders import TEST_SEEDS, DiffusionEncoder, MAEEncoder, Place, block_features, block_tokens, load_encoder, timm_encoder
from eval.finetune import LAYER_DECAY, WEIGHT_DECAY, finetune, layer_groups
from eval.knn import knn_accuracy
from eval.linear import held_out_parts, softmax_probe
from eval.looking import DataOptions, LookOptions, NetworkOptions, load_splits, look
from eval.measure import unpacked
from eval.pictures import principal_colours
from models import effective_alpha
from models.dit import DiT
from models.mae import MAE
from models.paths import interpolate
from models.pipeline import Pipeline
from tests.conftest import ROOT
from training.checkpoint import export_network
from training.ema import EMA
from training.openmoji import emoji_groups
from training.packing import load_images

PROTOCOL = (
    "metric value low high best baseline num_samples checkpoint dataset train_split test_split train_num test_num train_fingerprint "
    "test_fingerprint num_classes resolution crop times precision k temperature seed ema images_seen alpha_min alpha_eff backbone params "
    "wall_s features_s device versions results cka notes"
).split()
PICTURES = {"accuracy", "rank", "spectrum", "cka", "tsne", "patches"}
CLASSES = ("dots", "rows", "columns")


def picture(kind: str, random: np.random.Generator) -> Image.Image:
    """16 px of noise, with faint dots or stripes somewhere."""
    pixels, phase = random.integers(60, 200, (16, 16, 3)), random.integers(4)
    rows, columns = np.indices((16, 16)) % 4 == phase
    pixels[{"dots": rows & columns, "rows": rows, "columns": columns}[kind]] += 25
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 30 validation pictures in 3 classes."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, num in (("train", 20), ("validation", 10)):
        for kind in CLASSES:
            (folder / split / kind).mkdir(parents=True)
            for i in range(num):
                picture(kind, random).save(folder / split / kind / f"{i:02}.png")
    return folder


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    draws = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model.eval()


@pytest.fixture(scope="module")
def mae(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked autoencoder as a training writes it."""
    sizes = dict(image_size=16, patch_size=4, depth=2, dim=16, num_heads=2, decoder_depth=1, decoder_dim=8, decoder_num_heads=2)
    model = randomised(MAE(**sizes, alpha_min=0.6))
    run = tmp_path_factory.mktemp("runs") / "mae"
    export_network(
        run, model, EMA(model.parameters(), 0.0), CLASSES, {"steps": 3, "images_seen": 96, "data": str(data), "data_split": "train"}
    )
    return run


@pytest.fixture(scope="module")
def dit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomised(DiT(image_size=16, patch_size=4, num_classes=3, depth=2, dim=16, num_heads=2, alpha_min=0.5))
    run = tmp_path_factory.mktemp("runs") / "dit"
    training = {"steps": 5, "images_seen": 320, "data": str(data), "data_split": "all"}
    Pipeline(model, FlowMatchEulerDiscreteScheduler(), CLASSES, training).save_pretrained(run)
    return run


@pytest.fixture
def probe(run_here: Callable) -> Callable[..., tuple[int, str, str]]:
    """eval/probe.py: returns (exit code, stdout, stderr)."""
    return partial(run_here, "eval/probe.py")


# ----------------------------------------------------------------------------------------------------------------- features


def test_features_of_an_autoencoder_by_hand(mae: Path, data: Path) -> None:
    encoder, images = load_encoder(str(mae)), load_images(str(data), 16, "validation")
    assert isinstance(encoder, MAEEncoder) and encoder.poolings == ("mean", "patches", "class")
    found = block_features(encoder, images, batch_size=7)
    tokens = encoder.network.features(images.samples(images.rows(np.arange(30)), torch.device("cpu"), None, None))
    assert list(found) == [Place(None, block, pooling) for block in (0, 1) for pooling in encoder.poolings]
    for block in (0, 1):
        torch.testing.assert_close(found[Place(None, block, "mean")], tokens[block].mean(1))
        torch.testing.assert_close(found[Place(None, block, "patches")], tokens[block][:, 1:].mean(1))
        torch.testing.assert_close(found[Place(None, block, "class")], tokens[block][:, 0])
    assert list(block_features(encoder, images, (1,), ("class",))) == [Place(None, 1, "class")]
    torch.testing.assert_close(block_tokens(encoder, images, None, 1, batch_size=7), tokens[1])


def test_noise_belongs_to_the_image_and_labels_are_not_seen(dit: Path, data: Path) -> None:
    encoder, images = load_encoder(str(dit), times=(0.2, 0.8)), load_images(str(data), 16, "validation")
    assert isinstance(encoder, DiffusionEncoder) and encoder.poolings == ("mean",)
    found = block_features(encoder, images, seed=5, batch_size=30)
    for place, x in block_features(encoder, images, seed=5, batch_size=7).items():
        torch.testing.assert_close(x, found[place], atol=1e-5, rtol=1e-4)
    x = images.samples(images.rows(np.arange(30)), torch.device("cpu"), None, None)
    noise = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5 + i)) for i in range(30)])
    t = torch.full((30,), 0.8)
    _, tokens = encoder.network(interpolate(x, noise, t), t, torch.full((30,), 3), return_features=True)  # 3: no label
    torch.testing.assert_close(found[Place(0.8, 1, "mean")], tokens[1].mean(1), atol=1e-5, rtol=1e-4)
    encoder.network.label_embed.weight.data[:3] += 100  # of the real classes
    for place, x in block_features(encoder, images, seed=5).items():
        torch.testing.assert_close(x, found[place], atol=1e-5, rtol=1e-4)


def test_every_kind_of_diffusion_gets_the_same_proportion_of_noise() -> None:
    """The linear path, another path, and a DDPM, asked for the same time, see multiples of the same noisy image."""
    model = DiT(image_size=8, patch_size=4, depth=2, dim=16, num_heads=2)
    draws = torch.Generator().manual_seed(0)
    data, noise = torch.randn(4, 3, 8, 8, generator=draws), torch.randn(4, 3, 8, 8, generator=draws)
    pipelines = {
        "linear": Pipeline(model, FlowMatchEulerDiscreteScheduler()),
        "gvp": Pipeline(model, FlowMatchEulerDiscreteScheduler(), path="gvp"),
        "ddpm": Pipeline(model, DDPMScheduler(1000, prediction_type="epsilon")),
    }
    for time_ in (0.3, 0.5, 0.9):
        seen = {name: DiffusionEncoder(pipeline, {}, (time_,)).noisy(data, noise, time_) for name, pipeline in pipelines.items()}
        x, t = seen["linear"]
        torch.testing.assert_close(x, time_ * data + (1 - time_) * noise)
        assert t.item() == pytest.approx(time_)
        x_gvp, t_gvp = seen["gvp"]
        torch.testing.assert_close(x_gvp, interpolate(data, noise, t_gvp, "gvp"))
        x_ddpm, timestep = seen["ddpm"]
        alpha_bar = pipelines["ddpm"].scheduler.alphas_cumprod[timestep]
        assert (alpha_bar / (1 - alpha_bar)).sqrt().item() == pytest.approx(time_ / (1 - time_), rel=0.02)
        for other in (x_gvp, x_ddpm):
            torch.testing.assert_close(other / other.norm(), x / x.norm(), atol=2e-3, rtol=0.01)
    encoder = DiffusionEncoder(pipelines["ddpm"], {}, (0.5,))
    assert (encoder.timestep(1.0), encoder.timestep(0.0)) == (0, 999)


@pytest.mark.parametrize(
    ("name", "poolings"),
    [("test_vit", ("mean", "patches", "class")), ("test_resnet", ("mean",)), ("test_efficientnet", ("mean",))],
)
def test_networks_of_timm(name: str, poolings: tuple[str, ...], data: Path) -> None:
    """The last block is the network's output before pooling; images arrive normalised as its own training did it."""
    torch.manual_seed(0)
    encoder, images = timm_encoder(name, resolution=32), load_images(str(data), 32, "validation")
    assert encoder.poolings == poolings
    found = block_features(encoder, images, batch_size=8)
    mean, std = (torch.tensor(encoder.network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.from_numpy(images.images.copy()).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        last = encoder.network.forward_features((pixels - mean) / std)  # (N, T, D) or (N, D, H, W)
    expected = last.mean(1) if last.ndim == 3 else last.mean((2, 3))
    place = list(found)[-len(poolings)]
    torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=1e-3)
    if last.ndim == 3:
        torch.testing.assert_close(found[Place(None, place.block, "class")], last[:, 0], atol=1e-4, rtol=1e-3)


def test_principal_colours_tell_halves_apart() -> None:
    tokens = torch.zeros(2, 16, 5)
    tokens[:, 8:] = torch.tensor([1.0, 2.0, 0.0, 0.0, -1.0])  # the lower half of both pictures
    colours = principal_colours(tokens)
    assert colours.shape == (2, 4, 4, 3)
    assert abs(colours[:, :2, :, 0].mean() - colours[:, 2:, :, 0].mean()) == pytest.approx(1)
    assert np.ptp(colours[:, :2, :, 0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["mae", "dit"])
def test_fine_tuning_changes_a_copy(kind: str, data: Path, request: pytest.FixtureRequest) -> None:
    """The pictures' classes are hard to see in random features, and easy to learn."""
    encoder = load_encoder(str(request.getfixturevalue(kind)), times=(1.0,))
    train, test = load_images(str(data), 16, "train"), load_images(str(data), 16, "validation")
    before = {name: tensor.clone() for name, tensor in encoder.network.state_dict().items()}
    predictions = finetune(encoder, train, test, encoder.times[0], block=1, epochs=40, learning_rate=2e-2, batch_size=20)
    assert (predictions.numpy() == test.labels).mean() > 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.network.state_dict().items())
    again = finetune(encoder, train, test, encoder.times[0], block=1, epochs=1, learning_rate=0.0, batch_size=20)
    assert len(again) == 30 and set(again.tolist()) <= {0, 1, 2}


def test_the_block_that_is_read_learns_at_the_full_rate() -> None:
    model = DiT(image_size=16, patch_size=4, num_classes=3, depth=4, dim=16, num_heads=2, alpha_min=0.5, learnable_alpha=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, 1.0, unused=1)  # block 2 is read
    found = {names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for block, rate in enumerate((LAYER_DECAY**2, LAYER_DECAY, 1.0)):
        assert found[f"blocks.{block}.mlp.fc1.weight"] == (rate, WEIGHT_DECAY) and found[f"blocks.{block}.mlp.fc1.bias"] == (rate, 0)
    assert found["patch_embed.weight"][0] == LAYER_DECAY**3
    assert {decay for name, (_, decay) in found.items() if name.endswith("alpha")} == {0}

    for name in ("convnext_atto", "efficientnet_lite0"):  # whose blocks are numbered anew in each stage
        assert {group["lr"] for group in layer_groups(timm.create_model(name), 1.0)} == {1.0}, name


# ------------------------------------------------------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def mae_result(mae: Path, data: Path, run_script: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """All of it on the autoencoder, as a user runs it."""
    done = run_script(
        "eval/probe.py", "--checkpoint", mae, "--dataset", data, "--k", "5,10", "--attentive", "--few_shot", "0.2,0.5", "--finetune", 2,
        "--reference_network", "efficientnet-lite0", "--batch_size", 16,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((mae / "eval" / "probe.json").read_text()), done.stdout


def test_protocol_and_pictures(mae_result: tuple[dict, str], mae: Path, data: Path) -> None:
    result, out = mae_result
    assert set(PROTOCOL) <= set(result)
    expected = {
        "dataset": str(data), "train_num": 60, "test_num": 30, "num_samples": 30, "num_classes": 3, "resolution": 16, "times": None,
        "k": [5, 10], "temperature": 0.07, "ema": False, "images_seen": 96, "alpha_min": pytest.approx(0.6), "backbone": "mae",
        "alpha_eff": pytest.approx(effective_alpha(load_encoder(str(mae)).network.alphas)), "precision": "fp32", "crop": "centre",
        "train_fingerprint": load_images(str(data), 16, "train").fingerprint, "notes": [],
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert [(row["block"], row["pooling"]) for row in result["results"]] == [
        (block, pooling) for block in (0, 1) for pooling in ("mean", "patches", "class")
    ]
    assert {path.name for path in (mae / "eval").iterdir()} == {"probe.json"} | {
        f"probe-{name}.png" for name in PICTURES | {"reconstructions"}
    }
    for path in (mae / "eval").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 200
    best = result["best"]
    assert f"block {best['block']}, {best['pooling']}" in out and f"linear probe {100 * result['value']:.1f} %" in out
    assert "the most frequent class alone 33.3 %" in out


def test_numbers_are_those_of_the_features(mae_result: tuple[dict, str], mae: Path, data: Path) -> None:
    result, _ = mae_result
    encoder = load_encoder(str(mae))
    train, test = load_images(str(data), 16, "train"), load_images(str(data), 16, "validation")
    x, z = (block_features(encoder, side) for side in (train, test))
    y, labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    for row in result["results"]:
        place = Place(row["time"], row["block"], row["pooling"])
        for k in (5, 10):
            assert row["knn"][str(k)]["value"] == pytest.approx(knn_accuracy(x[place], y, z[place], labels, k))
        linear = softmax_probe(x[place], y, z[place], held_out_parts(y))
        assert row["linear"]["value"] == pytest.approx((linear.predictions == labels).double().mean().item())
        assert row["linear"]["low"] <= row["linear"]["value"] <= row["linear"]["high"]
        assert (row["linear"]["weight_decay"], row["linear"]["held_out_accuracy"]) == (linear.chosen, linear.held_out_accuracy)
        assert row["rank_exponential"] == pytest.approx(np.exp(row["rank_entropy"]))
        assert row["norm"] == pytest.approx(x[place].norm(dim=1).mean().item(), rel=1e-4)
        assert len(row["spectrum"]) == row["dim"] == 16
        assert -1 <= row["silhouette"] <= 1 and -0.5 < row["cknna"] < 1
    best = max(result["results"], key=lambda row: row["linear"]["held_out_accuracy"])
    assert (result["value"], result["best"]["block"]) == (best["linear"]["value"], best["block"])  # not by the test images
    kept = [row for row in result["results"] if "hits" in row["linear"]]
    assert kept == [best] and unpacked(best["linear"]["hits"], 30).mean() == pytest.approx(best["linear"]["value"])
    assert np.allclose(np.diag(result["cka"]["matrix"]), 1)
    assert [row["images"] for row in result["few_shot"]] == [12, 30]
    assert len(result["few_shot"][0]["draws"]) == 5
    assert (result["finetune"]["block"], result["finetune"]["epochs"]) == (1, 2)
    assert result["attentive"]["block"] == best["block"] and 0 <= result["attentive"]["value"] <= 1


def test_diffusion_at_several_times_whatever_the_batch_size(dit: Path, data: Path, tmp_path: Path, probe: Callable) -> None:
    results = []
    for batch_size in (7, 64):
        target = tmp_path / f"{batch_size}.json"
        arguments = ("--times", "0.9,0.4", "--k", 10, "--batch_size", batch_size, "--output", tmp_path / "out", "--json", target)
        code, out, err = probe("--checkpoint", dit, "--dataset", data, *arguments)
        assert code == 0, err
        results.append(json.loads(target.read_text()))
        assert "the network has seen the test images" in out and "it is told none" in out
    one, other = results
    assert one["times"] == [0.9, 0.4]
    assert [(row["time"], row["block"]) for row in one["results"]] == [(0.9, 0), (0.9, 1), (0.4, 0), (0.4, 1)]
    for row, same in zip(one["results"], other["results"], strict=True):
        assert row["rank_entropy"] == pytest.approx(same["rank_entropy"], abs=1e-4)
        assert row["knn"]["10"]["value"] == pytest.approx(same["knn"]["10"]["value"], abs=1 / 30 + 1e-9)
        assert row["linear"]["value"] == pytest.approx(same["linear"]["value"], abs=2 / 30 + 1e-9)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"probe-{name}.png" for name in PICTURES}
    # test images have noise of their own
    assert not torch.equal(*(torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in (0, TEST_SEEDS)))


def test_splits_that_are_drawn(dit: Path, data: Path, tmp_path: Path, probe: Callable) -> None:
    common = ("--checkpoint", dit, "--times", "1", "--k", 3, "--blocks", "last", "--no-pictures", "--output", tmp_path)
    code, _, err = probe(*common, "--dataset", data, "--max_train_images", 31, "--max_test_images", 12)
    assert code == 0, err
    result = json.loads((tmp_path / "probe.json").read_text())
    assert (result["train_num"], result["test_num"]) == (30, 12)
    assert [row["block"] for row in result["results"]] == [1]
    code, _, err = probe(*common, "--dataset", data / "train")  # which has no validation split
    assert code == 0, err
    result = json.loads((tmp_path / "probe.json").read_text())
    assert (result["train_num"], result["test_num"], result["drawn"]) == (48, 12, {"test_share": 0.2, "seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]


def test_a_network_of_timm_with_weights_from_a_file(data: Path, tmp_path: Path, probe: Callable) -> None:
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "vit.safetensors")
    arguments = ("--timm", "test_vit", "--resolution", 32, "--dataset", data, "--k", 5, "--pooling", "class")
    code, out, err = probe(*arguments, "--timm_weights", tmp_path / "vit.safetensors", "--json", tmp_path / "vit.json")
    assert code == 0, err
    result = json.loads((tmp_path / "vit.json").read_text())
    assert (result["backbone"], result["resolution"], result["alpha_min"]) == ("test_vit", 32, None)
    assert {row["pooling"] for row in result["results"]} == {"class"} and "random weights" not in out
    code, out, err = probe(*arguments, "--json", tmp_path / "random.json")
    assert code == 0 and "random weights" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["random.json", "vit.json", "vit.safetensors"]


def test_saved_features(tmp_path: Path, probe: Callable) -> None:
    random = np.random.default_rng(0)
    y, labels = random.integers(3, size=90), random.integers(3, size=40)
    layers = tmp_path / "layers"
    layers.mkdir()
    for name, strength in (("1-vague", 0.3), ("2-clear", 3.0)):
        x, z = (strength * np.eye(3, 8)[each] + random.normal(size=(len(each), 8)) for each in (y, labels))
        np.savez(layers / name, train_x=x, train_y=y, test_x=z, test_y=labels)
    code, out, err = probe("--features", layers, "--k", "5,20", "--output", tmp_path / "out", "--few_shot", 0.3)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [row["block"] for row in result["results"]] == ["1-vague", "2-clear"]
    assert result["best"]["block"] == "2-clear" and result["value"] > 0.85
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"probe-{name}.png" for name in PICTURES - {"patches"}}
    code, out, err = probe("--features", layers / "2-clear.npz", "--json", tmp_path / "clear.json")
    assert code == 0 and "2-clear" in out and "1-vague" not in out
    assert json.loads((tmp_path / "clear.json").read_text())["k"] == [10, 20], "200 of 90 images cannot vote"
    np.savez(tmp_path / "few", train_x=x[:6], train_y=[0, 0, 1, 1, 2, 2], test_x=z, test_y=labels)
    code, _, err = probe("--features", tmp_path / "few.npz", "--json", tmp_path / "few.json")
    assert code == 0 and json.loads((tmp_path / "few.json").read_text())["k"] == [6], err


def test_images_that_the_network_was_trained_on_are_told(mae: Path, data: Path) -> None:
    network, options = NetworkOptions(checkpoint=str(mae)), LookOptions(blocks="last")
    aside = look(network, DataOptions(dataset=os.path.relpath(data), test_share=0.2), options, (3,))
    assert aside.notes == ["the network has seen the test images in its training"], "they are a part of the training split"
    assert aside.protocol["drawn"] == {"test_share": 0.2, "seed": 0}
    validation = look(network, DataOptions(dataset=str(data)), options, (3,))
    assert validation.notes == [] and validation.protocol["drawn"] is None


@pytest.mark.parametrize(("asked", "told"), [("--attentive", "all tokens of 90 images would take"), ("--finetune", "looks at latents")])
def test_what_could_not_be_done_in_the_end_is_refused_at_once(
    asked: str, told: str, mae: Path, data: Path, probe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(num_bytes: int, what: str, free: int | None = None) -> None:
        assert num_bytes >= 90 * 4 * 32
        raise ValueError(f"{what} would take more than there is")

    def refuse_latents(*_: object) -> None:
        raise ValueError("this network looks at latents")

    monkeypatch.setattr("eval.encoders.require_memory", refuse)
    monkeypatch.setattr("eval.finetune.require_pixels", refuse_latents)
    monkeypatch.setattr("eval.looking.block_features", lambda *_: pytest.fail("features were taken"))
    code, _, error = probe("--checkpoint", mae, "--dataset", data, "--k", 3, asked, *([2] if asked == "--finetune" else []))
    assert code == 2 and told in error


@pytest.mark.parametrize("share", [0.05, 0.3, 0.35, 0.4, 0.5])
def test_a_test_share_is_what_was_asked_for(share: float, data: Path) -> None:
    train, test, _ = load_splits(DataOptions(dataset=str(data), test_share=share), 16, seed=0)
    assert (len(train), len(test)) == (60 - round(60 * share), round(60 * share))
    assert np.bincount(test.labels, minlength=3).tolist() == [round(20 * share)] * 3


def test_what_was_drawn_follows_from_labels_share_and_seed(data: Path) -> None:
    def drawn(seed: int, **options: float) -> tuple:
        _, test, drawn = load_splits(DataOptions(dataset=str(data), **options), 16, seed)
        return test.labels.tolist(), drawn, test.fingerprint

    assert drawn(0, max_test_images=12) == drawn(0, max_test_images=12)
    one, other = drawn(0, max_test_images=12), drawn(1, max_test_images=12)
    assert one[0] == other[0] and one[1] != other[1] and one[2] != other[2]
    assert drawn(0, max_test_images=1000)[1] is None


@pytest.mark.slow
def test_a_shipped_checkpoint(tmp_path: Path, probe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block 4 of a model that has learned to draw emoji sorts a quarter of them better than the most frequent class alone."""
    few = {name: members[::4] for name, members in emoji_groups().items()}  # all take long to draw
    monkeypatch.setattr("training.openmoji.emoji_groups", lambda: few)
    code, _, err = probe(
        "--checkpoint", ROOT / "models" / "pretrained" / "openmoji-decayed", "--dataset", "openmoji", "--times", 0.7, "--blocks", 4,
        "--k", 20, "--json", tmp_path / "probe.json", "--no-pictures", "--mixed_precision", "auto",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "probe.json").read_text())
    (row,) = result["results"]
    assert row["linear"]["low"] > result["baseline"]["value"] and row["knn"]["20"]["value"] > result["baseline"]["value"]
    assert result["images_seen"] >= 192_000 and result["alpha_min"] == 0.5


@pytest.mark.parametrize(
    ("during", "left"),
    [("eval.encoders.pool", set()), ("eval.pictures.draw_spectra", {"probe.json", "probe-accuracy.png", "probe-rank.png"})],
)
def test_an_interrupted_probe_leaves_whole_files(
    during: str, left: set[str], dit: Path, data: Path, tmp_path: Path, probe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the features, and in the middle of the pictures."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(during, interrupted)
    code, _, err = probe("--checkpoint", dit, "--dataset", data, "--k", 5, "--times", 0.5, "--output", tmp_path)
    assert code == 130 and err.strip().endswith("interrupted")
    assert {path.name for path in tmp_path.iterdir()} == left


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give one of --checkpoint"),
        ("--checkpoint {data} --dataset {data}", "is not a checkpoint"),
        ("--checkpoint {dit} --timm test_vit --dataset {data}", "give one of --checkpoint"),
        ("--checkpoint {dit}", "give --dataset"),
        ("--features {tmp}/good.npz --dataset {data}", "leave --dataset away"),
        ("--features {tmp}/good.npz --attentive --k 1", "need the images"),
        ("--features {tmp}/none.npz", "no .npz"),
        ("--features {tmp}/data", "no .npz"),
        ("--features {tmp}/shape.npz --k 1", "give (N, D)"),
        ("--features {tmp}/missing.npz --k 1", "test_y"),
        ("--features {tmp}/nan.npz --k 1", "NaN"),
        ("--features {tmp}/one-class.npz --k 1", "one class"),
        ("--features {tmp}/lone.npz --k 1", "one training image"),
        ("--features {tmp}/good.npz --k 7", "6 training images"),
        ("--features {tmp}/good.npz --k 0", "choose numbers from 1"),
        ("--features {tmp}/good.npz --k many", "commas"),
        ("--features {tmp}/good.npz --k 1 --few_shot 2", "between 0 and 1"),
        ("--features {tmp}/good.npz --temperature 0", "--temperature"),
        ("--checkpoint {dit} --dataset {data} --resolution 8", "--timm"),
        ("--checkpoint {dit} --dataset {data} --k 61", "60 training images"),
        ("--checkpoint {dit} --dataset {data} --k 5 --blocks 2", "has 2, 0 to 1"),
        ("--checkpoint {dit} --dataset {data} --k 5 --blocks middle", "commas"),
        ("--checkpoint {dit} --dataset {data} --k 5 --pooling class", "has no pooling"),
        ("--checkpoint {dit} --dataset {data} --times 1.5", "between 0"),
        ("--checkpoint {dit} --dataset {flat}", "has no label"),
        ("--checkpoint {dit} --dataset {data}/train/dots", "no labels"),
        ("--checkpoint {dit} --dataset {tmp}/nowhere", "no folder"),
        ("--checkpoint {broken} --dataset {data} --k 5", "broke down"),
        ("--timm test_vit_of_mine --dataset {data}", "no model"),
        ("--timm test_vit --timm_weights {tmp}/none.pth --dataset {data}", "not a file"),
        ("--timm test_vit --timm_weights {tmp}/good.npz --dataset {data}", "cannot be loaded"),
        ("--checkpoint {dit} --dataset {data} --json {tmp}", "is a folder"),
    ],
)
def test_bad_input(arguments: str, message: str, dit: Path, data: Path, tmp_path: Path, probe: Callable) -> None:
    x, y = np.random.default_rng(0).normal(size=(6, 2)), np.array([0, 1, 0, 1, 0, 1])
    good = dict(train_x=x, train_y=y, test_x=x, test_y=y)
    changes = {
        "good": {}, "shape": {"train_x": x[:, 0]}, "nan": {"test_x": x * np.nan}, "one-class": {"train_y": 0 * y},
        "lone": {"train_y": np.array([0, 1, 0, 1, 0, 2])},
    }  # fmt: skip
    for name, change in changes.items():
        np.savez(tmp_path / name, **{**good, **change})
    np.savez(tmp_path / "missing", train_x=x, train_y=y, test_x=x)
    (tmp_path / "data").mkdir()
    flat, broken = tmp_path / "flat", tmp_path / "broken"
    for i, split in enumerate(("train", "validation")):
        (flat / split).mkdir(parents=True)
        picture("dots", np.random.default_rng(i)).save(flat / split / "0.png")
    if "{broken}" in arguments:
        pipeline = Pipeline.from_pretrained(dit)
        pipeline.model.patch_embed.bias.data[0] = torch.nan
        pipeline.save_pretrained(broken)
    code, out, err = probe(*arguments.format(dit=dit, data=data, tmp=tmp_path, flat=flat, broken=broken).split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.strip().count("\n") == 0, err
    assert message in err


def test_help_names_defaults(probe: Callable) -> None:
    code, out, _ = probe("--help")
    assert code == 0
    assert "10,20,200 unless given" in " ".join(out.split()) and "(default: 0.5,0.7,0.9)" in out
