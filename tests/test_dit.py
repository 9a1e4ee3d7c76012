"""The diffusion transformer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import DiT, create_model, linear_schedule
from models.layers import gelu, patchify, scaled_dot_product_attention, sincos_positions, unpatchify

Make = Callable[..., nn.Module]


def inputs(model: nn.Module, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    config = model.config
    x = torch.randn(n, config.in_channels, config.image_size, config.image_size, generator=draws)
    return x, torch.rand(n, generator=draws), torch.randint(0, config.num_classes + 1, (n,), generator=draws)


def by_hand(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor, shortcuts: list[float] | None) -> Tensor:
    """The network written down once more, as a loop over the equation; without shortcuts' weights the plain x + f(x)."""
    size = x.shape[-1]
    h = model.patch_embed(patchify(x, model.config.patch_size)) + model.positions
    c = F.silu(model.time_embed(t) + model.label_embed(labels))
    per_block = model.modulation(c)[:, None].chunk(6 * len(model.blocks) + 2, dim=-1)
    stack = []
    for i, block in enumerate(model.blocks):
        if i >= len(model.blocks) // 2 and model.config.long_skips:
            h = h + block.skip(stack.pop())
        for j, (norm, branch) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
            shift, scale, gate = per_block[6 * i + 3 * j : 6 * i + 3 * j + 3]
            f = gate * branch(norm(h) * (1 + scale) + shift)
            h = h + f if shortcuts is None else shortcuts[2 * i + j] * h + f
        if i < len(model.blocks) // 2:
            stack.append(h)
    shift, scale = per_block[-2:]
    return unpatchify(model.head(model.norm(h) * (1 + scale) + shift), model.config.patch_size, size, size)


@pytest.mark.parametrize("long_skips", [True, False])
def test_alpha_one_is_the_plain_network_bit_for_bit(tiny_dit: Make, long_skips: bool) -> None:
    model = tiny_dit(alpha_min=1.0, long_skips=long_skips)
    arguments = inputs(model)
    assert torch.equal(model(*arguments), by_hand(model, *arguments, shortcuts=None))


@pytest.mark.parametrize("long_skips", [True, False])
@pytest.mark.parametrize("alpha_min", [0.9, 0.5])
def test_forward_is_the_equation(tiny_dit: Make, alpha_min: float, long_skips: bool) -> None:
    model = tiny_dit(alpha_min=alpha_min, long_skips=long_skips)
    arguments = inputs(model)
    expected = by_hand(model, *arguments, shortcuts=list(linear_schedule(8, alpha_min)))
    torch.testing.assert_close(model(*arguments), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(model(*arguments), by_hand(model, *arguments, shortcuts=None), atol=1e-3)


def test_gradients_are_those_of_the_equation(tiny_dit: Make) -> None:
    model = tiny_dit(alpha_min=0.5)
    arguments, parameters = inputs(model), list(model.parameters())
    found = torch.autograd.grad(model(*arguments).square().sum(), parameters)
    expected = torch.autograd.grad(by_hand(model, *arguments, shortcuts=list(model.alphas)).square().sum(), parameters)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4 * other.abs().max().item(), rtol=1e-4)


def test_alpha_adds_no_parameter(tiny_dit: Make) -> None:
    assert {name: p.shape for name, p in tiny_dit(alpha_min=1.0).named_parameters()} == {
        name: p.shape for name, p in tiny_dit(alpha_min=0.5).named_parameters()
    }


def test_a_fresh_network_predicts_zero() -> None:
    model = DiT(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, alpha_min=0.5)
    assert model(torch.randn(2, 3, 16, 16), torch.rand(2)).abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"long_skips": False}, {"num_classes": 0}, {"in_channels": 1, "image_size": 12, "patch_size": 3}])
def test_every_parameter_learns(tiny_dit: Make, options: dict) -> None:
    model = tiny_dit(alpha_min=0.6, **options)
    x, t, labels = inputs(model)
    model(x, t, labels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_no_label_is_the_last_row(tiny_dit: Make) -> None:
    model = tiny_dit()
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t), model(x, t, torch.full((5,), 3)))
    assert not torch.allclose(model(x, t), model(x, t, torch.zeros(5, dtype=torch.long)))


def test_features_are_the_outputs_of_all_blocks(tiny_dit: Make) -> None:
    model = tiny_dit(alpha_min=0.7)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    output, features = model(*inputs(model), return_features=True)
    assert len(features) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, features, strict=True))
    assert torch.equal(output, model(*inputs(model)))


@pytest.mark.parametrize(("size", "published_millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_parameter_counts(size: str, published_millions: int) -> None:
    """Table 1 of DiT (arXiv 2212.09748): patch 2, 4 latent channels, 1,000 classes; no long skips there."""
    with torch.device("meta"):
        model = create_model("dit", size, image_size=32, patch_size=2, in_channels=4, num_classes=1000, long_skips=False)
    learned_variance = (model.config.dim + 1) * 2 * 2 * 4  # four more output channels
    frozen_positions = 256 * model.config.dim  # counted there, a buffer here
    assert (model.num_parameters() + learned_variance + frozen_positions) / 1e6 == pytest.approx(published_millions, rel=5e-3)


def test_saved_and_loaded_it_is_the_same(tiny_dit: Make, tmp_path: Path) -> None:
    model = tiny_dit(alpha_min=0.6)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path).eval()
    assert loaded.alphas == model.alphas
    assert torch.equal(loaded(*inputs(model)), model(*inputs(model)))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=30, patch_size=4), "not divisible by patch_size"),
        (dict(depth=5), "odd"),
        (dict(num_heads=3), "num_heads"),
        (dict(dim=34, num_heads=2), "divisible by 4"),
        (dict(alpha_min=0), r"\(0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**{**dict(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2), **options})


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no backbone 'vgg'.*dit"):
        create_model("vgg")
    with pytest.raises(ValueError, match=r"no size 'XXL'.*XS, S, B, L, XL"):
        create_model("dit", "XXL")


def test_patchify_orders_values_as_a_convolution() -> None:
    x, convolution = torch.randn(2, 3, 8, 12), nn.Conv2d(3, 7, 4, stride=4)
    expected = convolution(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(patchify(x, 4), convolution.weight.flatten(1), convolution.bias), expected)


def test_unpatchify_is_the_inverse_with_channels_last() -> None:
    x = torch.randn(2, 3, 8, 12)
    patches = patchify(x, 4).unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(patches, 4, 8, 12), x)


def test_positions_encode_column_then_row() -> None:
    positions = sincos_positions(8, 2, 3)
    assert positions.shape == (6, 8)
    assert torch.equal(positions[1, :4], positions[4, :4])  # same column
    assert torch.equal(positions[1, 4:], positions[2, 4:])  # same row
    torch.testing.assert_close(positions[2, :2], torch.tensor([2.0, 2.0 / 100]).sin())


@pytest.mark.parametrize(("tokens", "scale"), [(16, 1.0), (16, 4.5), (1025, 1.0)], ids=["small", "large scores", "many tokens"])
def test_attention_in_bf16_is_that_in_fp32_but_for_rounding(tokens: int, scale: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 8) for _ in range(3))
    inputs = [each.bfloat16().requires_grad_() for each in (scale * q, k, v)]
    exact = [each.detach().float().requires_grad_() for each in inputs]
    expected = F.scaled_dot_product_attention(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_dot_product_attention(*inputs)
    assert found.dtype == torch.bfloat16
    towards = torch.randn_like(expected)
    expected.backward(towards)
    found.backward(towards.bfloat16())
    for ours, theirs in [(found, expected), *((one.grad, other.grad) for one, other in zip(inputs, exact, strict=True))]:
        assert (ours.float() - theirs).norm() < 2e-2 * theirs.norm()  # bf16 itself rounds to 4e-3, and scores of 20 by 0.06


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_is_compiled_has_the_same_gelu(approximate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-9, 9, 1000, dtype=torch.float64)
    expected = F.gelu(x, approximate=approximate)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu(x, approximate), expected, rtol=1e-12, atol=1e-15)
