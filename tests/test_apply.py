"""Decayed shortcuts for networks of timm and diffusers."""

import copy
import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.training_utils import EMAModel
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

from models import apply, decay_shortcuts, effective_alpha, linear_schedule, restore_shortcuts
from models.apply import register_block, shortcuts_of
from models.shortcut import SCHEDULES, Shortcut

pytestmark = pytest.mark.filterwarnings("ignore:.*(depth rule|unstable training|shortcuts of the)")  # tiny networks are shallow


def vit(**options: object) -> VisionTransformer:
    """With layer scale, drop path and norms of queries and keys."""
    sizes = dict(
        img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5, init_values=0.5, drop_path_rate=0.3, qk_norm=True
    )
    return VisionTransformer(**{**sizes, **options})


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=3, sample_size=8, patch_size=4, num_embeds_ada_norm=10
    )


def unet(**options: object) -> UNet2DModel:
    """Channels that change, residual blocks that resample, a middle that divides by 1.5, scale-and-shift by the time."""
    sizes = dict(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        mid_block_scale_factor=1.5,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
    )
    return UNet2DModel(**{**sizes, **options})


def text_unet(**options: object) -> UNet2DConditionModel:
    sizes = dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=6,
        transformer_layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**{**sizes, **options})


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "dit": dit, "unet": unet, "text-unet": text_unet}
# a: attention, m: MLP or residual block, stage by stage. Down, middle and up; residual blocks resample behind the stages with attention.
# With text a stage's attention is two blocks of self-attention, cross-attention and feed-forward, and the outer shortcut: aam aam a.
KINDS = {
    "vit": "am am am",
    "dit": "am am am",
    "unet": "m mam m mam mm mamam mm",
    "text-unet": "maamaama m maamaamam mm maamaama maamaama",
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A tiny network whose weights are all random."""
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.3)
    return network.eval()


def run(network: nn.Module) -> Tensor:
    """Its output on fixed inputs."""
    draws = torch.Generator().manual_seed(1)
    x, t, labels = torch.randn(3, 3, 8, 8, generator=draws), torch.tensor([1, 5, 7]), torch.tensor([0, 4, 9])
    if isinstance(network, VisionTransformer):
        return network(x)
    if isinstance(network, DiTTransformer2DModel):
        return network(x, t, labels).sample
    return network(x, t, *([torch.randn(3, 4, 6, generator=draws)] if isinstance(network, UNet2DConditionModel) else [])).sample


def is_residual(module: nn.Module) -> bool:
    kinds = ResnetBlock2D, BasicTransformerBlock, Transformer2DModel
    return isinstance(module, kinds) or (isinstance(module, Attention) and module.residual_connection)


def transformer_block(block: nn.Module, alphas: list[float], x: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
    x = alphas[0] * x + block.attn1(block.norm1(x))
    x = alphas[1] * x + block.attn2(block.norm2(x), encoder_hidden_states=encoder_hidden_states)
    return alphas[2] * x + block.ff(block.norm3(x))


def unet_by_hand(network: nn.Module, alpha_min: float) -> Tensor:
    """A plain U-Net (changed) whose blocks' outputs y = (P x + f) / s get the decay on top: y + (alpha - 1) P x / s.

    The order in which the alphas go to the blocks is that in which they finish, as seen.
    """
    finished: list[nn.Module] = []
    blocks = [module for module in network.modules() if is_residual(module)]
    handles = [block.register_forward_hook(lambda module, *_: finished.append(module)) for block in blocks]
    run(network)
    for handle in handles:
        handle.remove()
    count = sum(3 if isinstance(block, BasicTransformerBlock) else 1 for block in finished)
    alphas = list(linear_schedule(count, alpha_min))
    for block in finished:
        if isinstance(block, BasicTransformerBlock):
            block.forward = partial(transformer_block, block, [alphas.pop(0) for _ in range(3)])
        else:
            block.register_forward_hook(partial(fade, alphas.pop(0)))
    return run(network)


def fade(alpha: float, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> Tensor | tuple[Tensor]:
    x, factor = inputs[0], 1.0
    if isinstance(block, ResnetBlock2D):
        for change in (block.upsample, block.downsample, block.conv_shortcut):
            x = x if change is None else change(x)
        factor = block.output_scale_factor
    elif isinstance(block, Attention):
        factor = block.rescale_output_factor
    faded = (output[0] if isinstance(output, tuple) else output) + (alpha - 1) * x / factor
    return (faded,) if isinstance(output, tuple) else faded


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_alpha_one_changes_no_bit(name: str, training: bool) -> None:
    network = make(name).train(training)
    torch.manual_seed(2)  # of drop path
    expected = run(network)
    expected.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    decay_shortcuts(network, alpha_min=1.0)
    torch.manual_seed(2)
    found = run(network)
    found.square().mean().backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(network.parameters(), gradients, strict=True))


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2, "pre_norm": True}])
def test_a_vit_is_the_equation(options: dict) -> None:
    torch.manual_seed(0)
    network = vit(**options).eval()
    x = torch.randn(3, 3, 8, 8)
    h = network.norm_pre(network._pos_embed(network.patch_embed(x)))
    alphas = linear_schedule(6, 0.5)
    for i, block in enumerate(network.blocks):
        h = alphas[2 * i] * h + block.ls1(block.attn(block.norm1(h)))
        h = alphas[2 * i + 1] * h + block.ls2(block.mlp(block.norm2(h)))
    expected = network.forward_head(network.norm(h))
    plain = network(x)
    torch.testing.assert_close(decay_shortcuts(network, 0.5)(x), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(network(x), plain, atol=1e-3)


def test_a_dit_is_the_equation() -> None:
    network, alphas = make("dit"), linear_schedule(6, 0.5)
    plain = run(network)
    for i, block in enumerate(network.transformer_blocks):

        def by_hand(x: Tensor, block: nn.Module = block, i: int = i, *, timestep: Tensor, class_labels: Tensor, **_: object) -> Tensor:
            c = block.norm1.linear(block.norm1.silu(block.norm1.emb(timestep, class_labels)))[:, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = c.chunk(6, dim=-1)
            x = alphas[2 * i] * x + gate1 * block.attn1(block.norm1.norm(x) * (1 + scale1) + shift1)
            return alphas[2 * i + 1] * x + gate2 * block.ff(block.norm3(x) * (1 + scale2) + shift2)

        block.forward = by_hand
    expected = run(network)
    for block in network.transformer_blocks:
        del block.forward
    found = run(decay_shortcuts(network, 0.5))
    torch.testing.assert_close(found, expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize("make_unet", [unet, partial(unet, downsample_type="conv", resnet_time_scale_shift="default"), text_unet])
def test_a_unet_is_the_equation(make_unet: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make_unet().eval()
    plain, expected = run(network), unet_by_hand(copy.deepcopy(network), 0.5)
    found = run(decay_shortcuts(network, 0.5))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_shortcuts_are_listed_in_the_order_of_execution(name: str) -> None:
    network, kinds = make(name), KINDS[name].replace(" ", "")
    assert shortcuts_of(network) == []
    assert [shortcut.alpha for shortcut in shortcuts_of(decay_shortcuts(network, 0.6))] == list(linear_schedule(len(kinds), 0.6))
    shortcuts = shortcuts_of(decay_shortcuts(network, 0.6, "constant"))  # all of them fade, so all are called
    called: list[nn.Module] = []
    for shortcut in shortcuts:
        shortcut.register_forward_hook(lambda module, *_: called.append(module))
    run(network)
    assert [id(shortcut) for shortcut in called] == [id(shortcut) for shortcut in shortcuts]
    assert "".join(shortcut.kind[0] for shortcut in shortcuts) == kinds
    assert effective_alpha([shortcut.alpha for shortcut in shortcuts]) == pytest.approx(0.6 ** len(kinds))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_reaches_the_branch_and_the_shortcut(schedule: str) -> None:
    """On attention whose branch is known: everything is the middle of the U-Net but its shortcut and branch."""
    alpha_min = 0.7 if SCHEDULES[schedule].takes_alpha_min else 1.0
    network = decay_shortcuts(make("unet"), alpha_min, schedule)
    attention, seen = network.mid_block.attentions[0], []
    attention.to_out[0].register_forward_hook(lambda module, inputs, output: seen.append(output))  # (N, H * W, D)
    attention.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    run(network)
    branch, x, output = seen
    shortcut = attention.shortcuts[0]
    expected = (shortcut.alpha * x + shortcut.branch_scale * branch.transpose(1, 2).reshape(x.shape)) / 1.5
    torch.testing.assert_close(output, expected)


def test_placement_chooses_the_sublayers() -> None:
    network = decay_shortcuts(make("unet"), 0.5, placement="attention")
    faded = [shortcut.kind for shortcut in shortcuts_of(network) if shortcut.alpha < 1]
    assert set(faded) == {"attention"}
    decay_shortcuts(network, 0.5, placement="mlp")
    assert {shortcut.kind for shortcut in shortcuts_of(network) if shortcut.alpha < 1} == {"mlp"}


@pytest.mark.parametrize("name", NETWORKS)
def test_once_more_replaces_and_restoring_undoes(name: str) -> None:
    network = make(name)
    before, keys = run(network), list(network.state_dict())
    classes = [type(module) for module in network.modules()]
    config = dict(getattr(network, "config", {}))
    once = run(decay_shortcuts(network, 0.8))
    assert list(network.state_dict()) == keys
    decay_shortcuts(network, 0.5)
    assert not torch.equal(run(network), once)
    assert torch.equal(run(decay_shortcuts(network, 0.8)), once)
    assert restore_shortcuts(restore_shortcuts(network)) is network
    assert torch.equal(run(network), before)
    assert [type(module) for module in network.modules()] == classes
    assert dict(getattr(network, "config", {})) == config


@pytest.mark.parametrize("name", NETWORKS)
def test_learnable_alphas_are_parameters_that_learn(name: str) -> None:
    network = make(name)
    keys = set(network.state_dict())
    run(decay_shortcuts(network, 0.6, learnable=True)).square().mean().backward()
    alphas = [shortcut.alpha for shortcut in shortcuts_of(network)]
    assert len(set(network.state_dict()) - keys) == len(alphas)
    assert all(alpha.grad.isfinite() and alpha.grad != 0 for alpha in alphas)
    assert set(restore_shortcuts(network).state_dict()) == keys


def test_learnable_alphas_follow_the_precision_of_the_weights() -> None:
    network = decay_shortcuts(make("vit").bfloat16(), 0.6, learnable=True)
    assert network(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_pickles_are_the_same_and_apart(name: str, learnable: bool) -> None:
    network = decay_shortcuts(make(name), 0.6, learnable=learnable)
    expected = run(network)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(other) is type(network)
        assert torch.equal(run(other), expected)
        decay_shortcuts(other, 0.9)
        assert torch.equal(run(network), expected)
        assert not torch.equal(run(other), expected)


@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("name", ["dit", "unet", "text-unet"])
def test_saved_and_loaded_it_is_decayed_the_same(name: str, learnable: bool, tmp_path: Path) -> None:
    network = decay_shortcuts(make(name), 0.6, "cosine", "both", learnable)
    if learnable:
        for shortcut in shortcuts_of(network):
            nn.init.uniform_(shortcut.alpha)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert type(loaded) is type(network)
    for shortcut, other in zip(shortcuts_of(network), shortcuts_of(loaded), strict=True):
        torch.testing.assert_close(other.alpha, shortcut.alpha, rtol=0, atol=0)
    assert torch.equal(run(loaded), run(network))


def test_the_plain_class_loads_the_plain_network_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = make("unet")
    expected = run(network)
    decay_shortcuts(network, 0.6).save_pretrained(tmp_path)
    logging.getLogger("diffusers").propagate = True
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert type(loaded) is UNet2DModel
    assert torch.equal(run(loaded), expected)
    assert "decayed_shortcuts" in caplog.text


def test_a_diffusers_pipeline_brings_it_back(tmp_path: Path) -> None:
    network = decay_shortcuts(make("unet"), 0.6)
    DDPMPipeline(network, DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(run(loaded.unet), run(network))
    assert len(loaded(num_inference_steps=1, batch_size=1).images) == 1


@pytest.mark.parametrize("name", ["vit", "unet"])
def test_it_compiles_in_one_graph(name: str) -> None:
    network = (
        make(name) if name == "vit" else unet(block_out_channels=(8,), down_block_types=["AttnDownBlock2D"], up_block_types=["UpBlock2D"])
    )
    decay_shortcuts(network.eval(), 0.6)
    expected = run(network)
    torch._dynamo.reset()
    network.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(network), expected)


def test_gradient_checkpoints_and_chunks_change_nothing() -> None:
    network = decay_shortcuts(make("text-unet"), 0.6).train()
    expected = run(network)
    network.enable_gradient_checkpointing()
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(16, dim=1)
    found = run(network)
    found.square().mean().backward()
    torch.testing.assert_close(found, expected)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = decay_shortcuts(unet(), 0.6, learnable=True)
    assert len(shortcuts_of(network)) == 17
    assert all(parameter.is_meta for parameter in network.parameters())


def test_an_autoencoder_has_such_blocks_too() -> None:
    """No network of the list, but made of the same blocks; its decoder runs the middle before the way up."""
    torch.manual_seed(0)
    network = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    expected = network(torch.ones(1, 3, 8, 8)).sample
    assert torch.equal(decay_shortcuts(network, 1.0)(torch.ones(1, 3, 8, 8)).sample, expected)
    assert [shortcut.kind[0] for shortcut in shortcuts_of(network)] == list("m mam mam mm".replace(" ", ""))


class OtherBlock(nn.Module):
    """A residual block that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class OtherRule:
    """How it runs with shortcuts."""

    def sublayers(self) -> tuple[str, ...]:
        return ("mlp",)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcuts[0](x, self.branch(x))


def test_other_blocks_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = nn.Sequential(OtherBlock(), OtherBlock()), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"Sequential holds no.*VisionTransformer.*UNet2DModel.*register_block"):
        decay_shortcuts(network)
    monkeypatch.setattr("models.apply._RULES", {})
    register_block(OtherBlock, OtherRule)
    decay_shortcuts(network, 0.5)
    assert isinstance(network[0].shortcuts[0], Shortcut)
    h = x + network[0].branch(x)
    torch.testing.assert_close(network(x), 0.5 * h + network[1].branch(h))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear holds no residual block"),
        (lambda: vit(block_fn=ParallelThingsBlock, qk_norm=False), "VisionTransformer holds no residual block"),
        (lambda: timm.create_model("resnet10t"), "ResNet holds no residual block"),
        (
            lambda: Transformer2DModel(2, 4, 3, patch_size=2, sample_size=4, norm_type="ada_norm_single", norm_elementwise_affine=False),
            "single",
        ),
        (
            lambda: unet(down_block_types=["SkipDownBlock2D"] * 3, up_block_types=["SkipUpBlock2D"] * 3, block_out_channels=[32] * 3),
            "SkipDownBlock2D has parts",
        ),
        (
            lambda: text_unet(
                down_block_types=["SimpleCrossAttnDownBlock2D"] * 2,
                up_block_types=["SimpleCrossAttnUpBlock2D"] * 2,
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            ),
            "AddedKV",
        ),
        (lambda: text_unet(attention_type="gated"), "GLIGEN"),
        (lambda: text_unet(dual_cross_attention=True), "DualTransformer2DModel"),
    ],
    ids=["linear", "parallel", "resnet", "pixart", "skip", "added-kv", "gligen", "dual"],
)
def test_what_is_not_known_is_refused(network: Callable[[], nn.Module], message: str) -> None:
    plain = network()
    classes = [type(module) for module in plain.modules()]
    with pytest.raises(ValueError, match=message):
        decay_shortcuts(plain)
    assert [type(module) for module in restore_shortcuts(plain).modules()] == classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha_min=0), r"\(0, 1\]"),
        (dict(schedule="steep"), "no shortcut schedule"),
        (dict(placement="both ends"), "no shortcut placement"),
        (dict(alpha_min=0.5, schedule="sqrt-half"), "has none"),
    ],
)
def test_arguments_that_do_not_fit_leave_it_as_it_was(options: dict, message: str) -> None:
    network = decay_shortcuts(make("vit"), 0.7)
    expected = run(network)
    with pytest.raises(ValueError, match=message):
        decay_shortcuts(network, **options)
    assert torch.equal(run(network), expected)


def test_a_pipeline_is_not_a_network() -> None:
    with pytest.raises(ValueError, match="DDPMPipeline holds no residual block"):
        decay_shortcuts(DDPMPipeline(make("unet"), DDPMScheduler()))


def test_importing_it_imports_no_other_library() -> None:
    code = "import sys, models.apply; print({'timm', 'diffusers', 'torchvision'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_unknown_names_stay_unknown() -> None:
    import models.apply

    assert models.apply.DecayedUNet2DModel.plain is UNet2DModel
    for name in ("DecayedNothing", "DecayedDDPMScheduler", "UNet2DModel"):
        with pytest.raises(AttributeError, match=name):
            getattr(models.apply, name)


def test_advice_is_given_as_warnings() -> None:
    with pytest.warns(UserWarning, match=r"alpha falls to 0\.1; at 0\.4 and less") as told:
        decay_shortcuts(vit(depth=12), 0.1)
    assert len(told) == 2 and "alpha_eff" in str(told[1].message)  # too low for the depth rule as well
    with pytest.warns(UserWarning, match=r"6 shortcuts of the Sequential fade, in the order in which they are registered"):
        decay_shortcuts(nn.Sequential(*vit().blocks), 0.4)
    for network in (vit(depth=12), type("Mine", (VisionTransformer,), {})(depth=12, embed_dim=24, num_heads=2)):
        with warnings.catch_warnings(action="error"):
            decay_shortcuts(network, 0.6)
            copy.deepcopy(network)


def test_schedules_without_alpha_min_need_none() -> None:
    with warnings.catch_warnings(action="ignore"):
        assert {shortcut.value for shortcut in shortcuts_of(decay_shortcuts(vit(), schedule="sqrt-half"))} == {0.5**0.5}
        assert shortcuts_of(decay_shortcuts(vit()))[-1].value == 0.6


def test_an_averaged_network_comes_back_as_diffusers_loads_it(tmp_path: Path) -> None:
    network = decay_shortcuts(unet(), 0.7)
    EMAModel(network.parameters(), model_cls=type(network), model_config=network.config).save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(network))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.shadow_params, network.parameters(), strict=True))


@pytest.mark.parametrize("alpha_min", ["0.5", True])
def test_an_alpha_min_that_is_no_number_is_told(alpha_min: object) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        decay_shortcuts(vit(), alpha_min)


def test_rules_that_are_none_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_RULES", dict(apply._RULES))
    with pytest.raises(ValueError, match="is no rule"):
        register_block(nn.Linear, object)
    register_block(nn.Linear, type("Rule", (), {"sublayers": lambda self: ("attn",)}))
    with pytest.raises(ValueError, match=r"Rule says that Linear has sub-layers attn; the kinds are"):
        decay_shortcuts(nn.Sequential(nn.Linear(2, 2)))
