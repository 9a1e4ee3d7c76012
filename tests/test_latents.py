"""Latents: what is encoded, what is drawn, what is cached; batches of images."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.vae import latent_shape
from tests.test_vae import SCALE, SHIFT, make_vae
from training import latents
from training.data import ImageData, ReadAhead
from training.latents import LatentData, encode
from training.packing import cache_dir, load_images

CPU = torch.device("cpu")


@pytest.fixture
def vae() -> AutoencoderKL:
    return make_vae().eval().requires_grad_(False)


@pytest.fixture
def data(image_folder: Path) -> ImageData:
    return load_images(str(image_folder), 16)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: ImageData) -> Path:
    """An empty folder of latents (`data` is mapped already)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_dir() / "latents"


@pytest.fixture
def encoder_calls(vae: AutoencoderKL) -> list[int]:
    """Grows by the size of every batch that the encoder sees."""
    sizes: list[int] = []
    vae.encoder.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    return sizes


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """All but the locks, and what changes when one is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir() if path.suffix != ".lock"}


def floats(data: ImageData) -> torch.Tensor:
    return torch.from_numpy(data.images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_batches_of_images(data: ImageData, flip: bool, labelled: bool) -> None:
    data = data if labelled else dataclasses.replace(data, labels=None)
    indices = np.array([5, 0, 23, 5, 7, 11, 2, 8])
    generator, ours = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    batch = data.batch(data.rows(indices), CPU, generator, flip)

    expected = torch.from_numpy(data.images[indices]).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
    if flip:  # the first draw of the generator
        mirrored = torch.rand(8, generator=ours) < 0.5
        assert 0 < mirrored.sum() < 8
        expected = torch.stack([image.flip(2) if mirror else image for image, mirror in zip(expected, mirrored, strict=True)])
    assert torch.equal(batch["images"], expected)
    assert batch["images"].shape[1:] == data.shape == (3, 16, 16)
    assert torch.equal(generator.get_state(), ours.get_state()), "more was drawn"
    assert set(batch) == ({"images", "labels"} if labelled else {"images"})
    if labelled:
        assert batch["labels"].tolist() == data.labels[indices].tolist()


def test_moments_are_those_of_the_encoder(
    data: ImageData, vae: AutoencoderKL, encoder_calls: list[int], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "PIXELS_AT_ONCE", {"cpu": 10 * 16**2})
    encoded = encode(data, vae, flips=True)
    assert encoder_calls == [10, 10, 4] * 2
    assert encoded.moments.shape == encoded.mirrored_moments.shape == (24, 2, 4, 8, 8)
    for moments, images in ((encoded.moments, floats(data)), (encoded.mirrored_moments, floats(data).flip(3))):
        posterior = vae.encode(images).latent_dist
        expected = torch.stack([(posterior.mean - SHIFT) * SCALE, posterior.std * SCALE], 1)
        torch.testing.assert_close(torch.from_numpy(moments.astype(np.float32)), expected, rtol=1e-3, atol=1e-4)
    # what diffusers' pipelines do before they decode
    means = torch.from_numpy(encoded.moments[:, 0].astype(np.float32))
    torch.testing.assert_close(means / SCALE + SHIFT, vae.encode(floats(data)).latent_dist.mean, rtol=1e-3, atol=1e-3)
    apart = np.abs(encoded.mirrored_moments[:, 0] - encoded.moments[:, 0, :, :, ::-1]).mean()
    assert apart > 0.01, "mirrored latents would have done"


def test_an_autoencoder_without_a_shift(data: ImageData, fresh_cache: Path) -> None:
    plain = make_vae(shift_factor=None).eval()
    expected = plain.encode(floats(data)).latent_dist.mean * SCALE
    torch.testing.assert_close(
        torch.from_numpy(encode(data, plain, flips=False).moments[:, 0].astype(np.float32)), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("flips", [False, True])
def test_batches_are_the_same_from_a_copy_on_the_device(
    flips: bool, data: ImageData, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(data, vae, flips)
    assert encoded.held(CPU) is encoded, "in memory already"
    monkeypatch.setattr(latents, "fits", lambda num_bytes, _: num_bytes == (1 + flips) * encoded.moments.nbytes)
    held = encoded.held(CPU)
    assert held.on_device is not None
    assert [isinstance(each.reader(0, 1), ReadAhead) for each in (encoded, held)] == [True, False]
    emptied = dataclasses.replace(held, moments=np.zeros_like(encoded.moments))
    one, other = (each.batch(each.rows(np.array([7, 0, 23])), CPU, torch.Generator().manual_seed(0), flips) for each in (encoded, emptied))
    assert all(torch.equal(one[name], other[name]) for name in ("images", "labels"))


def test_samples_are_drawn_from_the_gaussians(data: ImageData, vae: AutoencoderKL) -> None:
    encoded = encode(data, vae, flips=True)
    indices = np.array([5, 0, 23, 5, 7, 11, 2, 8])
    batch = encoded.batch(encoded.rows(indices), CPU, torch.Generator().manual_seed(3), flip=True)
    generator = torch.Generator().manual_seed(3)
    mirrored = (torch.rand(8, generator=generator) < 0.5).tolist()
    assert any(mirrored) and not all(mirrored)
    moments = [(encoded.mirrored_moments if mirror else encoded.moments)[i] for i, mirror in zip(indices, mirrored, strict=True)]
    mean, std = torch.from_numpy(np.stack(moments)).float().unbind(1)
    assert torch.equal(batch["images"], mean + std * torch.randn(8, 4, 8, 8, generator=generator))
    assert batch["labels"].tolist() == data.labels[indices].tolist()

    drawn = encoded.batch(encoded.rows(np.full(4000, 3)), CPU, torch.Generator().manual_seed(0), flip=False)["images"]
    mean, std = torch.from_numpy(encoded.moments[3].astype(np.float32))
    assert ((drawn.mean(0) - mean) / std).abs().max() < 5 / 4000**0.5
    assert (drawn.std(0) / std - 1).abs().max() < 5 / 8000**0.5


def test_latents_are_as_the_split_they_come_from(data: ImageData, vae: AutoencoderKL) -> None:
    encoded = encode(data, vae, flips=False)
    assert len(encoded) == len(data) == 24
    assert encoded.shape == latent_shape(vae, 16) == (4, 8, 8)
    assert encoded.num_classes == 2
    for name in ("labels", "class_names", "name", "split"):
        assert getattr(encoded, name) is getattr(data, name)


def test_encoded_once(data: ImageData, vae: AutoencoderKL, encoder_calls: list[int], fresh_cache: Path) -> None:
    first, one_file = encode(data, vae, flips=False), files_in(fresh_cache)
    assert len(one_file) == 1 and sum(encoder_calls) == 24
    again = encode(data, vae, flips=False)
    assert files_in(fresh_cache) == one_file and sum(encoder_calls) == 24
    assert np.array_equal(first.moments, again.moments) and first.fingerprint == again.fingerprint

    with_flips, two_files = encode(data, vae, flips=True), files_in(fresh_cache)
    assert len(two_files) == 2 and one_file.items() < two_files.items() and sum(encoder_calls) == 48
    assert with_flips.fingerprint == first.fingerprint


def test_fingerprints_cover_the_data_and_the_encoder(data: ImageData, image_folder: Path, vae: AutoencoderKL) -> None:
    def fingerprint(of: ImageData = data, **options: object) -> str:
        other = make_vae(**options)
        other.load_state_dict(vae.state_dict())
        return encode(of, other.eval(), flips=False).fingerprint

    same = fingerprint()
    assert same == encode(data, vae, flips=False).fingerprint != data.fingerprint
    other_data = dataclasses.replace(data, images=255 - data.images, fingerprint="another")
    others = [fingerprint(load_images(str(image_folder), 12)), fingerprint(other_data), fingerprint(scaling_factor=1.0)]
    others += [fingerprint(shift_factor=0.0), fingerprint(act_fn="relu")]
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    assert encode(data, vae, flips=False).fingerprint == same, "the decoder does not count"
    vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert len({same, *others, encode(data, vae, flips=False).fingerprint}) == 7


def test_of_many_one_encodes_and_the_others_wait(data: ImageData, vae: AutoencoderKL, encoder_calls: list[int], fresh_cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:  # the lock treats threads as it does processes
        encoded = list(pool.map(lambda _: encode(data, vae, flips=False), range(4)))
    assert sum(encoder_calls) == 24
    assert all(np.array_equal(one.moments, encoded[0].moments) for one in encoded)


def test_nothing_half_written_stays(data: ImageData, vae: AutoencoderKL, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "PIXELS_AT_ONCE", {"cpu": 10 * 16**2})
    batches: list[object] = []

    def stop_at_the_second(*_: object) -> None:
        batches.append(None)
        if len(batches) == 2:
            raise KeyboardInterrupt

    hook = vae.encoder.register_forward_hook(stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        encode(data, vae, flips=False)
    hook.remove()
    assert len(batches) == 2 and not files_in(fresh_cache)

    path = Path(encode(data, vae, flips=False).moments.filename)
    path.unlink()
    left = path.with_name(f".{path.name}.partial-1")  # as by a process that was killed
    left.touch()
    encode(data, vae, flips=False)
    assert path.exists() and not left.exists()


def test_faults_of_encoding_are_told(data: ImageData, image_folder: Path, vae: AutoencoderKL, fresh_cache: Path) -> None:
    with pytest.raises(ValueError, match="resolution 15 is not divisible by 2, the factor of the autoencoder; choose 16"):
        encode(load_images(str(image_folder), 15), vae, flips=False)
    endless = dataclasses.replace(data, images=np.broadcast_to(data.images[:1], (10**12, 16, 16, 3)))
    with pytest.raises(ValueError, match=r"the latents of .* take 953,674\.3 GiB, and .* make room"):
        encode(endless, vae, flips=False)
    vae.encoder.conv_out.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        encode(data, vae, flips=False)
    assert not files_in(fresh_cache)


def test_latents_are_read_from_the_disk(data: ImageData, vae: AutoencoderKL) -> None:
    encoded = encode(data, vae, flips=False)
    assert isinstance(encoded, LatentData) and isinstance(encoded.moments, np.memmap)
    with pytest.raises(AssertionError, match="without flips"):
        encoded.batch(encoded.rows(np.arange(24)), CPU, torch.Generator().manual_seed(0), flip=True)
