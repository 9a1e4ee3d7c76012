"""The masked autoencoder, plain and with long skips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import create_model, effective_alpha, linear_schedule
from models.layers import patchify, sincos_positions, unpatchify
from models.mae import MAE, MAEOutput
from training.monitor import feature_statistics

FORMS = pytest.mark.parametrize("long_skips", [True, False], ids=["skips", "plain"])
# More skips than decoder blocks, in ViT-L's proportion (block 1 hands nothing on), as many, and fewer.
DEPTHS = pytest.mark.parametrize(("depth", "decoder_depth"), [(6, 2), (4, 2), (2, 3)])


def tiny_mae(**options: object) -> nn.Module:
    """Random weights everywhere, the zero-initialised parts too: normal, in the order of the names."""
    sizes = dict(image_size=20, patch_size=4, depth=4, dim=32, num_heads=2, decoder_depth=3, decoder_dim=16, decoder_num_heads=4)
    model = MAE(**{**sizes, **options})
    draws = torch.Generator().manual_seed(7)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return model.eval()


def inputs(model: nn.Module, n: int = 2) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(n, model.config.in_channels, model.config.image_size, model.config.image_size, generator=draws)
    return images, torch.rand(n, model.num_patches, generator=draws)


def block_by_hand(block: nn.Module, x: Tensor, alphas: tuple[float, float] | None = None) -> Tensor:
    """The equation; without alphas the plain x + f(x)."""
    for i, (norm, branch) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
        x = x + branch(norm(x)) if alphas is None else alphas[i] * x + branch(norm(x))
    return x


def by_hand(model: nn.Module, image: Tensor, visible: list[int]) -> tuple[list[Tensor], Tensor]:
    """The encoder's features and the prediction for one image (C, H, W) whose patches `visible` are seen, written down once more."""
    config, t = model.config, model.num_patches
    grid = config.image_size // config.patch_size
    patches = patchify(image[None], config.patch_size)[0]
    seen = [model.patch_embed(patches[i]) + sincos_positions(config.dim, grid, grid)[i] for i in visible]
    x = torch.stack([model.cls_token[0, 0], *seen])[None]
    features = []
    for i, block in enumerate(model.blocks):
        x = block_by_hand(block, x, model.alphas[2 * i : 2 * i + 2])
        features.append(x)

    def whole(tokens: Tensor, mask_token: Tensor) -> Tensor:
        return torch.stack([tokens[0, 0]] + [tokens[0, 1 + visible.index(i)] if i in visible else mask_token[0, 0] for i in range(t)])[None]

    positions = sincos_positions(config.decoder_dim, grid, grid)
    if config.long_skips:
        x = model.decoder_embed(torch.cat([model.decoder_cls_token[0], positions]))[None]
    else:
        x = whole(model.decoder_embed(model.norm(x)), model.mask_token)
        x = x + torch.cat([torch.zeros(1, config.decoder_dim), positions])
    sources = [features[i] for i in range(config.depth) if i % 2 == 1] if config.long_skips else []
    for i, block in enumerate(model.decoder_blocks):
        if sources:
            skip = whole(sources.pop(), model.skip[i].mask_token)
            x = x + model.skip[i].fc(torch.cat([skip, x], dim=-1))
        x = block_by_hand(block, x)
    return features, model.decoder_pred(model.decoder_norm(x))[0, 1:]


# (loss, prediction[1, 5, :4], last block's output[1, 2, :4]) of facebookresearch/mae (efb2a80; plain) and of the authors'
# MAE/models_mae.py (5ab97ad; skips; its unused skip layers filled with NaN), run with the weights of `tiny_mae` and `inputs`.
PUBLISHED = {
    "plain": (
        dict(depth=5, decoder_depth=3, long_skips=False, norm_pixels=False),
        (1.096749, [-0.035624, 0.037172, -0.084944, -0.114255], [-0.656847, 0.179711, -1.560624, -0.683804]),
    ),
    "plain-24": (
        dict(depth=24, decoder_depth=8, long_skips=False, patch_size=7, image_size=28),
        (1.013337, [-0.079377, 0.206472, 0.199614, -0.084398], [0.455148, 0.08745, -2.527941, -1.584841]),
    ),
    "skips-12": (
        dict(depth=12, decoder_depth=8, alpha_min=0.6, patch_size=8, image_size=32),
        (1.006396, [-0.192381, -0.005661, -0.079656, -0.177958], [-0.31105, -0.061715, -0.1382, 0.131717]),
    ),
    "skips-24": (
        dict(depth=24, decoder_depth=8, alpha_min=0.8, norm_pixels=False),
        (1.091716, [0.038199, -0.312126, -0.025052, 0.14091], [0.040344, -0.418688, -0.248722, 0.14929]),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_code(name: str) -> None:
    options, expected = PUBLISHED[name]
    model = tiny_mae(**options)
    output, features = model(*inputs(model), return_features=True)
    for found, value in zip((output.loss, output.prediction[1, 5, :4], features[-1][1, 2, :4]), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(value), atol=1e-5, rtol=0)


@FORMS
@DEPTHS
def test_forward_is_the_equation(depth: int, decoder_depth: int, long_skips: bool) -> None:
    model = tiny_mae(depth=depth, decoder_depth=decoder_depth, long_skips=long_skips, alpha_min=0.5)
    images, noise = inputs(model)
    output, features = model(images, noise, mask_ratio=0.7, return_features=True)
    whole = model.features(images)
    for i, image in enumerate(images):
        expected, prediction = by_hand(model, image, noise[i].argsort()[:7].tolist())
        torch.testing.assert_close(output.prediction[i], prediction, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close([block[i] for block in features], [block[0] for block in expected], atol=1e-5, rtol=1e-5)
        expected, _ = by_hand(model, image, list(range(25)))
        expected[-1] = model.norm(expected[-1])  # of the plain form
        torch.testing.assert_close([block[i] for block in whole], [block[0] for block in expected], atol=1e-5, rtol=1e-5)


@FORMS
def test_alpha_one_is_the_plain_network_bit_for_bit(long_skips: bool) -> None:
    model = tiny_mae(long_skips=long_skips)
    _, features = model(*inputs(model), return_features=True)
    for block, before, after in zip(model.blocks[1:], features, features[1:], strict=False):
        assert torch.equal(block_by_hand(block, before), after)


@FORMS
def test_only_the_encoder_fades(long_skips: bool) -> None:
    model = tiny_mae(long_skips=long_skips, alpha_min=0.6)
    assert model.alphas == linear_schedule(8, 0.6)
    decoder = [shortcut.alpha for block in model.decoder_blocks for shortcut in (block.shortcut1, block.shortcut2)]
    assert decoder == [1.0] * 6
    assert effective_alpha(create_model("mae", "XS", alpha_eff=3e-3, image_size=32).alphas) == pytest.approx(3e-3)


@FORMS
@DEPTHS
@pytest.mark.parametrize("options", [{}, {"learnable_alpha": True}, {"in_channels": 1, "patch_size": 10, "norm_pixels": False}])
def test_every_parameter_learns(depth: int, decoder_depth: int, long_skips: bool, options: dict) -> None:
    model = tiny_mae(depth=depth, decoder_depth=decoder_depth, long_skips=long_skips, alpha_min=0.6, **options)
    model(*inputs(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_skip_layers_are_those_that_are_used() -> None:
    with torch.device("meta"):
        counts = [len(create_model("mae", size).skip) for size in ("S", "B", "L", "H")]
    assert counts == [6, 6, 8, 8]


@FORMS
def test_what_is_hidden_is_not_seen(long_skips: bool) -> None:
    model = tiny_mae(long_skips=long_skips)
    images, noise = inputs(model)
    before = model(images, noise)
    hidden = unpatchify(before.mask[..., None].expand(-1, -1, 48), 4, 20, 20)
    other = model(images + hidden * torch.randn(images.shape), noise)
    assert torch.equal(other.prediction, before.prediction)
    assert other.loss != before.loss
    assert not torch.allclose(model(images + 1 - hidden, noise).prediction, before.prediction, atol=1e-4)


@pytest.mark.parametrize(("mask_ratio", "num_visible"), [(0.75, 6), (0.5, 12), (0.9, 2)])
def test_the_smallest_noise_stays_visible(mask_ratio: float, num_visible: int) -> None:
    model = tiny_mae()
    images, noise = inputs(model)
    mask = model(images, noise, mask_ratio=mask_ratio).mask
    for row, values in zip(mask.tolist(), noise.tolist(), strict=True):
        threshold = sorted(values)[num_visible]
        assert row == [float(value >= threshold) for value in values]


def test_the_mask_comes_from_the_generator() -> None:
    model = tiny_mae()
    images, _ = inputs(model)
    drawn = model(images, generator=torch.Generator().manual_seed(3))
    given = model(images, torch.rand(2, 25, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(a, b) for a, b in zip(drawn, given, strict=True))
    assert not torch.equal(drawn.mask, model(images, generator=torch.Generator().manual_seed(4)).mask)
    assert not torch.equal(drawn.mask[0], drawn.mask[1])
    assert not any(output._is_view() for output in drawn), "FSDP2 warns of views: its hook is lost where one is changed in place"


def loss_by_hand(images: Tensor, output: MAEOutput, norm_pixels: bool = True) -> float:
    """For images of 20 px in patches of 4, patch by patch in float64."""
    errors = []
    for i, t in np.argwhere(output.mask.numpy() == 1):
        row, column = 4 * (t // 5), 4 * (t % 5)
        patch = images[i, :, row : row + 4, column : column + 4].permute(1, 2, 0).flatten().double().numpy()
        if norm_pixels:
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        errors.append(np.mean((output.prediction[i, t].detach().double().numpy() - patch) ** 2))
    assert len(errors) == 2 * 19
    return np.mean(errors)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_the_loss_is_that_of_the_hidden_patches(norm_pixels: bool) -> None:
    model = tiny_mae(norm_pixels=norm_pixels)
    images, noise = inputs(model)
    output = model(images, noise)
    assert output.loss.item() == pytest.approx(loss_by_hand(images, output, norm_pixels), abs=1e-6)


def test_a_flat_patch_has_a_finite_loss_and_gradient() -> None:
    model = tiny_mae()
    output = model(torch.full((1, 3, 20, 20), 0.3), inputs(model, 1)[1])
    output.loss.backward()
    assert output.loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@FORMS
def test_features_are_the_outputs_of_all_blocks(long_skips: bool) -> None:
    model = tiny_mae(long_skips=long_skips, alpha_min=0.7)
    images, noise = inputs(model)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    output, features = model(images, noise, return_features=True)
    assert [block.shape for block in features] == [(2, 1 + 6, 32)] * 4
    assert all(torch.equal(a, b) for a, b in zip(seen, features, strict=True))
    assert torch.equal(output.loss, model(images, noise).loss)
    norms = [block.square().mean().sqrt().item() for block in features]
    told = feature_statistics(model, (images, noise), lambda num_blocks: num_blocks - 1)
    assert told["block_norms"] == pytest.approx(norms, abs=1e-4)

    seen.clear()
    features = model.features(images)
    assert [block.shape for block in features] == [(2, 1 + 25, 32)] * 4
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], features[:-1], strict=True))
    assert torch.equal(features[-1], seen[-1] if long_skips else model.norm(seen[-1]))


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_reconstruct_paints_in_what_is_predicted(norm_pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mae(norm_pixels=norm_pixels)
    images, noise = inputs(model)
    mask = model(images, noise).mask
    hidden = unpatchify(mask[..., None].expand(-1, -1, 48), 4, 20, 20) > 0
    seen, painted = model.reconstruct(images, noise)
    assert torch.equal(painted[~hidden], images[~hidden]) and torch.equal(seen, images.masked_fill(hidden, 0))
    assert (painted - images)[hidden].abs().mean() > 0.1

    target = patchify(images, 4).unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
    if norm_pixels:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(model, "_decode", lambda features, places: target)  # a perfect decoder
    assert model(images, noise).loss < 1e-10
    torch.testing.assert_close(model.reconstruct(images, noise)[1], images)


@FORMS
@pytest.mark.parametrize("zero_init", [None, True, False])
def test_zero_init_is_as_the_form_does_it_unless_told(long_skips: bool, zero_init: bool | None) -> None:
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, decoder_depth=2, decoder_dim=16, decoder_num_heads=2)
    model = MAE(**sizes, alpha_min=0.6, long_skips=long_skips, zero_init=zero_init)
    images, noise = inputs(model)
    output, features = model(images, noise, return_features=True)
    if zero_init or (zero_init is None and long_skips):
        assert output.prediction.abs().max() == 0
        share = effective_alpha(model.alphas[2:])  # of the first block's output; the branches are silent
        torch.testing.assert_close(features[-1], share * features[0])
    else:
        assert output.prediction.std() > 0.1
        bound = (6 / (32 + 32)) ** 0.5  # Xavier's
        assert 0.9 * bound < model.blocks[0].attn.proj.weight.abs().max() <= bound


# Counted in facebookresearch/mae and in the authors' code, without the frozen positions and, in ViT-L, the 4,202,496 of skip layers 8
# to 11, which no forward pass there uses.
@pytest.mark.parametrize(
    ("size", "long_skips", "published"),
    [("B", False, 111_655_680), ("L", False, 329_239_296), ("H", False, 656_613_964), ("B", True, 117_038_848), ("L", True, 337_380_096)],
)
def test_sizes_have_the_published_parameter_counts(size: str, long_skips: bool, published: int) -> None:
    with torch.device("meta"):
        assert create_model("mae", size, long_skips=long_skips).num_parameters() == published


@FORMS
def test_saved_and_loaded_it_is_the_same(long_skips: bool, tmp_path: Path) -> None:
    model = tiny_mae(long_skips=long_skips, alpha_min=0.6)
    model.save_pretrained(tmp_path)
    loaded = MAE.from_pretrained(tmp_path).eval()
    assert loaded.alphas == model.alphas
    assert all(torch.equal(a, b) for a, b in zip(loaded(*inputs(model)), model(*inputs(model)), strict=True))


@FORMS
def test_low_precision_computes_the_loss_in_float32(long_skips: bool) -> None:
    model = tiny_mae(long_skips=long_skips, alpha_min=0.6, learnable_alpha=True)
    images, noise = inputs(model)
    expected = model(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise)
        _, painted = model.reconstruct(images, noise)
    output.loss.backward()
    half = model.to(torch.bfloat16)(images.bfloat16(), noise)
    for found, seen in ((output, images), (half, images.bfloat16())):
        assert found.prediction.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
        assert torch.equal(found.mask, expected.mask)
        torch.testing.assert_close(found.loss, expected.loss, atol=0.02, rtol=0)
        assert found.loss.item() == pytest.approx(loss_by_hand(seen, found), abs=1e-6)
    assert painted.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=30), "not divisible by patch_size"),
        (dict(depth=5), "depth 5 is odd"),
        (dict(decoder_depth=0), "at least 1"),
        (dict(num_heads=3), "^dim 32 .* num_heads 3"),
        (dict(decoder_num_heads=3), "decoder_dim 16 .* decoder_num_heads 3"),
        (dict(dim=34, num_heads=2), "divisible by 4"),
        (dict(alpha_min=0), r"\(0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mae(**options)


def test_arguments_that_do_not_fit_are_refused() -> None:
    model = tiny_mae()
    images, noise = inputs(model)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*\(3, 20, 20\)"):
        model(images[..., :16, :16])
    with pytest.raises(ValueError, match=r"\(2, 24\).*\(2, 25\)"):
        model(images, noise[:, :24])
    for mask_ratio in (0.0, 0.99, 1.0):
        with pytest.raises(ValueError, match="of 25 patches visible"):
            model(images, noise, mask_ratio=mask_ratio)
