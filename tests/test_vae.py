"""The autoencoder: where it is found, what is refused, latents and images."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from models import Pipeline
from models.vae import CONFIG, WEIGHTS, colours, latent_shape, load_vae, to_images, to_moments, to_small_images

SCALE, SHIFT = 0.4, -0.3


def make_vae(**options: object) -> AutoencoderKL:
    """A tiny autoencoder with random weights that halves the edge."""
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = dict(block_out_channels=(8, 16), down_block_types=down, up_block_types=up, norm_num_groups=4, sample_size=16)
    return AutoencoderKL(**{**sizes, "scaling_factor": SCALE, "shift_factor": SHIFT, **options})


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


def test_there_and_back() -> None:
    """As diffusers' pipelines scale them."""
    vae, images = make_vae().eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    moments, posterior = to_moments(vae, images), vae.encode(images).latent_dist
    torch.testing.assert_close(moments[:, 0], (posterior.mean - SHIFT) * SCALE)
    torch.testing.assert_close(moments[:, 1], posterior.std * SCALE)
    torch.testing.assert_close(to_images(vae, moments[:, 0]), vae.decode(posterior.mean).sample, rtol=1e-4, atol=1e-5)
    assert moments.shape[2:] == latent_shape(vae, 16) == (4, 8, 8)
    with pytest.raises(ValueError, match="resolution 15 is not divisible by 2, the factor of the autoencoder; choose 16"):
        latent_shape(vae, 15)


@pytest.mark.parametrize(("pixels", "expected"), [(1, [1, 1, 1, 1, 1]), (2 * 16**2, [2, 2, 1]), (512**2, [5])])
def test_so_many_images_are_decoded_at_once(pixels: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents, seen = make_vae().eval(), torch.randn(5, 4, 8, 8), []
    whole = to_images(vae, latents)
    monkeypatch.setattr("models.vae.DECODED_PIXELS", pixels)
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(to_images(vae, latents), whole, rtol=1e-4, atol=1e-5)
    assert seen == expected


def test_small_images_have_the_colours_of_the_decoder() -> None:
    """Exactly, where the decoder does nothing but colour each cell by a linear map."""
    matrix, latents = torch.randn(3, 4), torch.randn(2, 4, 5, 6)

    def decode(z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=F.interpolate(torch.einsum("dc,nchw->ndhw", matrix, z) + 0.1, scale_factor=2))

    config = SimpleNamespace(scaling_factor=SCALE, shift_factor=SHIFT, block_out_channels=(4, 4), latent_channels=4)
    linear = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32, decode=decode)
    expected = F.avg_pool2d(to_images(linear, latents), 2)
    torch.testing.assert_close(to_small_images(latents, colours(linear)), expected, rtol=1e-3, atol=1e-4)


def test_a_pipeline_glances_at_latents(tiny_dit: Callable) -> None:
    pipeline = Pipeline(tiny_dit(in_channels=4), FlowMatchEulerDiscreteScheduler(), vae=make_vae().eval())
    assert pipeline.image_shape == (3, 32, 32)
    for state in pipeline.steps(2, num_inference_steps=2):
        glance = pipeline.glance(state.preview)
    assert glance.shape == (2, 3, 16, 16) and pipeline.decode(state.x).shape == (2, 3, 32, 32)
    plain = Pipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler())
    images = torch.rand(1, 3, 16, 16)
    assert plain.glance(images) is images


def test_where_autoencoders_are_found(vae_folder: Path, tmp_path: Path) -> None:
    make_vae().half().save_pretrained(tmp_path / "pipeline/vae")
    vae = load_vae(str(tmp_path / "pipeline"))
    assert vae.dtype == torch.float32 and not vae.training and not any(weight.requires_grad for weight in vae.parameters())
    # a repository of the hub that was fetched before: the network is not needed
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--someone--latents"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots/0123abc").symlink_to(vae_folder)
    weights, expected = load_vae("someone/latents").state_dict(), make_vae().state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def without_weights(folder: Path) -> None:
    make_vae().save_pretrained(folder)
    (folder / WEIGHTS).unlink()


def with_damaged_weights(folder: Path) -> None:
    make_vae().save_pretrained(folder)
    (folder / WEIGHTS).write_bytes(b"no weights")


def with_a_missing_tensor(folder: Path) -> None:
    make_vae().save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS)


def of_other_sizes(folder: Path) -> None:
    make_vae().save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "latent_channels": 8}))


def of_grey_images(folder: Path) -> None:
    make_vae(in_channels=1).save_pretrained(folder)


def a_unet(folder: Path) -> None:
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(8, 16))
    UNet2DModel(**blocks, norm_num_groups=4).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, r"holds no config\.json .*must be an AutoencoderKL"),
        (Path.touch, "is a file; point to the folder"),
        (a_unet, "holds a UNet2DModel; it must be an AutoencoderKL"),
        (without_weights, "cannot be loaded: .*no file named"),
        (with_damaged_weights, "cannot be loaded"),
        (with_a_missing_tensor, r"lacks weights \(encoder.conv_in.weight"),
        (of_other_sizes, "cannot be loaded: .*shape"),
        (of_grey_images, "images of 1 channels"),
        (lambda folder: None, "no such folder, and nothing of that name could be loaded from the Hugging Face hub"),
    ],
)
def test_what_is_no_autoencoder_is_told(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "given")
    with pytest.raises(ValueError, match=message):
        load_vae(str(tmp_path / "given"))


def test_a_hub_name_without_a_network() -> None:
    with pytest.raises(ValueError, match=r"the autoencoder someone/elsewhere: there is no such folder.* check the name, or the network"):
        load_vae("someone/elsewhere")
