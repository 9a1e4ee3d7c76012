"""U-ViT: equal to the published network where it is plain, and the equation where it decays."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from models import Pipeline, create_model, linear_schedule
from models.layers import patchify, unpatchify
from models.uvit import UViT

SIZES = dict(image_size=16, patch_size=4, depth=4, dim=32, num_heads=2, num_classes=3)
VARIANTS = [{}, {"long_skips": False}, {"num_classes": 0, "in_channels": 1}, {"mlp_time_embed": True, "conv": False, "image_size": 12}]


def uvit(filled: bool = True, seed: int = 0, **options: object) -> UViT:
    """A small U-ViT; `filled` with normal weights, in the order of their names, so that nothing is zero."""
    model = UViT(**{**SIZES, **options})
    draws = torch.Generator().manual_seed(seed)
    if filled:
        for _, parameter in sorted(model.named_parameters()):
            nn.init.normal_(parameter, std=0.3, generator=draws)
    return model.eval()


def inputs(model: UViT, n: int = 5) -> tuple[Tensor, Tensor, Tensor | None]:
    draws, config = torch.Generator().manual_seed(1), model.config
    x = torch.randn(n, config.in_channels, config.image_size, config.image_size, generator=draws)
    t = torch.rand(n, generator=draws)
    return x, t, torch.randint(0, config.num_classes + 1, (n,), generator=draws) if config.num_classes else None


def by_hand(model: UViT, x: Tensor, t: Tensor, labels: Tensor | None, alphas: list[float] | None) -> Tensor:
    """The network written down once more; without alphas the plain x + f(x)."""
    size, p, half = x.shape[-1], model.config.patch_size, model.config.depth // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(model.config.dim // 2) / (model.config.dim // 2))
    angles = (1000 * t)[:, None] * frequencies
    time = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    if model.config.mlp_time_embed:
        first, _, last = model.time_embed
        time = last(F.silu(first(time)))
    tokens = [time[:, None], model.patch_embed(patchify(x, p))]
    if model.config.num_classes:
        tokens = [model.label_embed.weight[labels][:, None], *tokens]
    h, stack = torch.cat(tokens, dim=1) + model.positions, []
    for i, block in enumerate(model.blocks):
        if i > half and model.config.long_skips:
            h = block.skip(torch.cat([h, stack.pop()], dim=-1))
        for j, (norm, branch) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
            f = branch(norm(h))
            h = h + f if alphas is None else alphas[2 * i + j] * h + f
        if i < half:
            stack.append(h)
    image = unpatchify(model.head(model.norm(h)[:, -((size // p) ** 2) :]), p, size, size)
    return model.final_conv(image) if model.config.conv else image


@pytest.mark.parametrize("options", VARIANTS)
def test_alpha_one_is_the_plain_network_bit_for_bit(options: dict) -> None:
    model = uvit(**options)
    arguments = inputs(model)
    assert torch.equal(model(*arguments), by_hand(model, *arguments, alphas=None))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("learnable", [False, True])
def test_forward_is_the_equation(options: dict, learnable: bool) -> None:
    model = uvit(alpha_min=0.5, **options)
    if learnable:
        twin = uvit(filled=False, alpha_min=0.5, learnable_alpha=True, **options)
        missing = twin.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert len(missing) == 10 and all(name.endswith(".alpha") for name in missing)  # these stay at the schedule
        model = twin
    arguments, alphas = inputs(model), list(linear_schedule(10, 0.5))
    assert model.alphas == pytest.approx(alphas)
    torch.testing.assert_close(model(*arguments), by_hand(model, *arguments, alphas=alphas), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(*arguments), by_hand(model, *arguments, alphas=None), atol=1e-3)


@pytest.mark.parametrize(("placement", "first", "other"), [("attention", 0, 1), ("mlp", 1, 0)])
def test_placement_chooses_every_second_sublayer(placement: str, first: int, other: int) -> None:
    model, alphas = uvit(alpha_min=0.5, shortcut_placement=placement), [1.0] * 10
    alphas[first::2] = linear_schedule(5, 0.5)
    arguments = inputs(model)
    torch.testing.assert_close(model(*arguments), by_hand(model, *arguments, alphas=alphas), atol=1e-5, rtol=1e-5)
    assert model.alphas[other::2] == (1.0,) * 5


def test_gradients_are_those_of_the_equation() -> None:
    model = uvit(alpha_min=0.5)
    arguments, parameters = inputs(model), list(model.parameters())
    found = torch.autograd.grad(model(*arguments).square().sum(), parameters)
    expected = torch.autograd.grad(by_hand(model, *arguments, alphas=list(model.alphas)).square().sum(), parameters)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4 * other.abs().max().item(), rtol=1e-4)


# Pixel (5, 7) of what baofff/U-ViT (libs/uvit.py, March 2023) makes of inputs(model, n=3) with the weights of uvit(**options), fed with
# the numbers 1, 500.5 and 1000, or 0.999 times that, which stand for the timesteps 0, 499.5 and 999.
PUBLISHED = [
    (
        dict(time_scale=1.0, time_offset=1.0),
        [[-0.644599, 2.148124, 0.658788], [-0.733778, 2.194371, 0.172317], [0.326713, 1.943549, 0.421284]],
    ),
    (
        dict(time_scale=0.999, time_offset=0.999, num_classes=0, depth=24),
        [[-0.548899, -1.281228, 0.40632], [-0.039146, -1.645641, 0.50997], [0.037606, -3.691411, 0.342608]],
    ),
    (
        dict(time_scale=1.0, time_offset=1.0, mlp_time_embed=True, conv=False, in_channels=4, patch_size=2),
        [[-0.609838, 0.18975, 0.91308, 0.033155], [0.00338, 0.13586, -0.353333, -0.286085], [-0.391656, 0.219519, 0.02606, -0.325777]],
    ),
]


@pytest.mark.parametrize(("options", "expected"), PUBLISHED)
def test_it_answers_as_the_published_network(options: dict, expected: list[list[float]]) -> None:
    model = uvit(**options)
    x, _, labels = inputs(model, n=3)
    output = model(x, torch.tensor([0, 499.5, 999]), labels)
    torch.testing.assert_close(output[:, :, 5, 7], torch.tensor(expected), atol=1e-4, rtol=0)


def test_norms_are_as_published() -> None:
    assert {module.eps for module in uvit().modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize(("size", "published_millions"), [("S", 44), ("M", 131), ("L", 287), ("H", 501)])
def test_sizes_have_the_published_parameter_counts(size: str, published_millions: int) -> None:
    """Table 1 of U-ViT (arXiv 2209.12152), which counts them on the data of each size."""
    with torch.device("meta"):
        data = dict(num_classes=0) if size == "S" else dict(num_classes=1000, in_channels=4)
        model = create_model("uvit", size, image_size=32, patch_size=2, **data)
    assert len(model.blocks) == model.config.depth + 1
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.num_parameters() / 1e6 == pytest.approx(published_millions, abs=0.6)


def test_a_fresh_network_predicts_zero_and_leaves_zero() -> None:
    model = uvit(filled=False, alpha_min=0.5)
    x, t, labels = inputs(model)
    assert model(x, t, labels).abs().max() == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):  # the head moves first, then what lies before it
        optimizer.zero_grad()
        (model(x, t, labels) - x).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad.abs().max() > 0, name


def test_fresh_branches_are_silent() -> None:
    model = uvit(filled=False, alpha_min=0.5, long_skips=False)
    _, features = model(*inputs(model), return_features=True)
    torch.testing.assert_close(features[-1], math.prod(model.alphas[2:]) * features[0])


def test_without_zero_init_every_linear_starts_as_published() -> None:
    model = uvit(filled=False, zero_init=False, dim=128, mlp_time_embed=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "patch_embed"}
    assert "blocks.3.skip" in linears and "blocks.0.attn.qkv" in linears and "time_embed.2" in linears
    for name, linear in linears.items():
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        assert linear.bias is None or linear.bias.abs().max() == 0, name
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_learns(options: dict) -> None:
    model = uvit(alpha_min=0.6, **options)
    model(*inputs(model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_no_label_is_the_last_row() -> None:
    model = uvit()
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t), model(x, t, torch.full((5,), 3)))
    assert not torch.allclose(model(x, t), model(x, t, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_features_are_the_patches_of_all_blocks(num_classes: int) -> None:
    model, seen = uvit(alpha_min=0.7, num_classes=num_classes), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    output, features = model(*inputs(model), return_features=True)
    assert [feature.shape for feature in features] == [(5, 16, 32)] * 5
    assert all(torch.equal(whole[:, -16:], patches) for whole, patches in zip(seen, features, strict=True))
    assert torch.equal(output, model(*inputs(model)))


def test_timesteps_are_scaled_then_shifted() -> None:
    x, t, labels = inputs(uvit())
    torch.testing.assert_close(
        uvit(time_scale=20.0, time_offset=3.0)(x, t, labels), uvit(time_scale=1.0)(x, 20 * t + 3, labels), atol=1e-4, rtol=0
    )


def test_timesteps_reach_the_numbers_of_the_published_weights() -> None:
    raw, discrete, continuous, flow = (
        uvit(time_scale=scale, time_offset=offset) for scale, offset in ((1.0, 0.0), (1.0, 1.0), (0.999, 0.999), (1000.0, 0.0))
    )
    x, _, labels = inputs(raw, n=3)
    timesteps = torch.tensor([0, 499, 999])  # integers, as schedulers have them
    assert torch.equal(discrete(x, timesteps, labels), raw(x, timesteps + 1, labels))
    torch.testing.assert_close(continuous(x, timesteps, labels), raw(x, 999 * (timesteps + 1) / 1000, labels), atol=1e-4, rtol=0)
    torch.testing.assert_close(flow(x, timesteps / 1000, labels), raw(x, timesteps, labels), atol=1e-4, rtol=0)
    assert (raw(x, timesteps, labels) - raw(x, timesteps + 1, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(("scheduler", "time_scale"), [(FlowMatchEulerDiscreteScheduler(), 1000.0), (DDIMScheduler(), 1.0)])
def test_the_pipeline_samples_from_it(scheduler: object, time_scale: float, guidance_scale: float) -> None:
    pipeline = Pipeline(uvit(alpha_min=0.6, time_scale=time_scale), scheduler, ["a", "b", "c"])
    pipeline.set_progress_bar_config(disable=True)
    options = dict(seed=3, num_inference_steps=3, guidance_scale=guidance_scale, output_type="pt")
    three = pipeline(3, class_labels=[0, 1, 2], **options).images
    one = pipeline(1, class_labels=0, **options).images
    assert three.shape == (3, 3, 16, 16) and three.isfinite().all()
    torch.testing.assert_close(three[:1], one, atol=1e-5, rtol=0)


def test_alpha_eff_counts_the_middle_block() -> None:
    model = create_model("uvit", alpha_eff=3e-3, **{**SIZES, "depth": 12})
    assert len(model.alphas) == 26 and math.prod(model.alphas) == pytest.approx(3e-3)


@pytest.mark.parametrize("learnable", [False, True])
def test_bf16_is_near_float32(learnable: bool) -> None:
    model = uvit(alpha_min=0.6, learnable_alpha=learnable)
    arguments = inputs(model)
    expected = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*arguments)
    x, t, labels = arguments
    halved = model.to(torch.bfloat16)(x.bfloat16(), t, labels)
    assert halved.dtype == torch.bfloat16
    for output in (mixed, halved):
        assert (output.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=30), "not divisible by patch_size"),
        (dict(depth=5), "odd"),
        (dict(depth=5, long_skips=False), "odd"),
        (dict(num_heads=3), "num_heads"),
        (dict(dim=33, num_heads=3), "even"),
        (dict(alpha_min=0), r"\(0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uvit(**options)
