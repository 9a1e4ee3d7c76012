"""The U-Net."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models import create_model, linear_schedule
from models.unet import UNet, UNet2DModel


def tiny_unet(seed: int = 0, **options: object) -> UNet:
    """With random weights everywhere, the zero-initialised parts too."""
    torch.manual_seed(seed)
    sizes = dict(image_size=8, num_classes=3, channels=(8, 16), layers_per_block=1, attention_levels=(1,), head_dim=8, norm_groups=4)
    model = UNet(**{**sizes, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.eval()


def inputs(model: UNet, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    config = model.config
    x = torch.randn(n, config.in_channels, config.image_size, config.image_size, generator=draws)
    return x, torch.rand(n, generator=draws), torch.randint(0, config.num_classes + 1, (n,), generator=draws)


def undecayed(model: UNet) -> UNet2DModel:
    """diffusers' own network with the same weights."""
    config = {name: value for name, value in model.unet.config.items() if name != "decayed_shortcuts"}
    plain = UNet2DModel.from_config(config).eval()
    plain.load_state_dict(model.unet.state_dict())
    return plain


def fade(alpha: float, block: nn.Module, block_inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """y = P x + f(x) of a plain block -> alpha P x + f(x)."""
    x = block_inputs[0]
    return output + (alpha - 1) * (block.conv_shortcut(x) if getattr(block, "conv_shortcut", None) is not None else x)


@pytest.mark.parametrize("n", [1, 3])
def test_alpha_one_is_the_plain_network_bit_for_bit(n: int) -> None:
    model = tiny_unet(alpha_min=1.0)
    x, t, labels = inputs(model, n)
    plain = undecayed(model)
    expected = plain(x, 1000 * t, labels).sample
    assert torch.equal(model(x, t, labels), expected)
    model(x, t, labels).square().sum().backward()
    expected.square().sum().backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_in_bf16_it_is_diffusers_network_but_for_rounding() -> None:
    """There, on a CPU, attention is computed in another way."""
    model = tiny_unet(alpha_min=1.0)
    (x, t, labels), plain = inputs(model), undecayed(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x, t, labels), plain(x, 1000 * t, labels).sample
    assert 0 < (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("alpha_min", [0.9, 0.5])
def test_forward_is_the_equation(alpha_min: float) -> None:
    """Down: block, downsampling, block, attention; middle: block, attention, block; up: two blocks with attention, two without."""
    model = tiny_unet(alpha_min=alpha_min)
    plain = undecayed(model)
    down, middle, up = plain.down_blocks, plain.mid_block, plain.up_blocks
    attending = [step for pair in zip(up[0].resnets, up[0].attentions, strict=True) for step in pair]
    blocks = [down[0].resnets[0], down[1].resnets[0], down[1].attentions[0], middle.resnets[0], middle.attentions[0], middle.resnets[1]]
    blocks += [*attending, *up[1].resnets]
    assert len(blocks) == len(model.shortcuts)
    for alpha, block in zip(linear_schedule(len(blocks), alpha_min), blocks, strict=True):
        block.register_forward_hook(lambda *arguments, alpha=alpha: fade(alpha, *arguments))
    x, t, labels = inputs(model)
    expected = plain(x, 1000 * t, labels).sample
    torch.testing.assert_close(model(x, t, labels), expected, atol=2e-6 * expected.abs().max().item(), rtol=1e-5)
    assert not torch.allclose(model(x, t, labels), undecayed(model)(x, 1000 * t, labels).sample, atol=1e-3)


def test_a_fresh_network_predicts_zero_and_learns() -> None:
    torch.manual_seed(0)
    model = UNet(image_size=8, channels=(8, 16), layers_per_block=1, head_dim=8, norm_groups=4, attention_levels=(1,), alpha_min=0.5)
    x, t = torch.randn(4, 3, 8, 8), torch.rand(4)
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(20):
        loss = (model(x, t) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert UNet(**{**model.config, "zero_init": False})(x, t).abs().max() > 0


def test_alphas_run_down_middle_up() -> None:
    model = tiny_unet(alpha_min=0.5)
    assert model.alphas == linear_schedule(12, 0.5)
    assert "".join(shortcut.kind[0] for shortcut in model.shortcuts) == "m" + "ma" + "mam" + "mama" + "mm"
    placed = tiny_unet(alpha_min=0.5, shortcut_placement="attention")
    assert [alpha for alpha, shortcut in zip(placed.alphas, placed.shortcuts, strict=True) if shortcut.kind == "attention"][-1] == 0.5
    assert {alpha for alpha, shortcut in zip(placed.alphas, placed.shortcuts, strict=True) if shortcut.kind == "mlp"} == {1.0}


def test_no_label_is_the_last_row() -> None:
    model = tiny_unet()
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 3)))
    assert not torch.allclose(model(x, t), model(x, t, torch.zeros(3, dtype=torch.long)))
    unconditional = tiny_unet(num_classes=0)
    assert torch.equal(unconditional(x, t), unconditional(x, t, torch.zeros(3, dtype=torch.long)))


def test_time_is_scaled_for_its_sinusoids() -> None:
    flow, ddpm = tiny_unet(), tiny_unet(time_scale=1.0)
    x, _, labels = inputs(flow)
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(flow(x, timesteps / 1000, labels), ddpm(x, timesteps, labels), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(flow(x, torch.zeros(3), labels), flow(x, torch.ones(3), labels), atol=1e-2)


def test_features_are_the_outputs_of_all_stages() -> None:
    model = tiny_unet(alpha_min=0.7)
    arguments = inputs(model)
    output, features = model(*arguments, return_features=True)
    assert torch.equal(output, model(*arguments))
    assert [tuple(feature.shape) for feature in features] == [(3, 16, 8), (3, 16, 16), (3, 16, 16), (3, 64, 16), (3, 64, 8)]
    h = features[-1].transpose(1, 2).reshape(3, 8, 8, 8)
    tail = model.unet.conv_out(model.unet.conv_act(model.unet.conv_norm_out(h)))
    torch.testing.assert_close(tail, output)
    assert not any(stage._forward_hooks for stage in model.stages)


def test_copies_are_apart() -> None:
    """As the averaged weights are kept."""
    model = tiny_unet(alpha_min=0.6, learnable_alpha=True)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.shortcuts[3].alpha)
    assert model.shortcuts[3].alpha != 0
    assert not torch.equal(other(*inputs(model)), model(*inputs(model)))


def test_the_small_one_is_as_large_as_the_published() -> None:
    """DDPM for CIFAR-10 has 35.7 M parameters (arXiv 2006.11239, appendix B)."""
    with torch.device("meta"):
        model = create_model("unet", "S")
    assert model.num_parameters() / 1e6 == pytest.approx(35.7, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=9), r"resolution 9 cannot be halved 1 times; use a multiple of 2"),
        (dict(attention_levels=(2,)), r"attention_levels \(2,\) must lie in 0 to 1"),
        (dict(norm_groups=5), "norm_groups 5 does not divide"),
        (dict(head_dim=6), "head_dim 6 does not divide"),
        (dict(attention_levels=(0, 1), head_dim=16), "head_dim 16 does not divide"),
        (dict(alpha_min=0), r"\(0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_unet(**options)
