"""Published weights. The numbers under "published code" come from the public repositories themselves.

How: the layouts below were filled by `filled`, loaded into the public classes (strictly, in evaluation mode, float32) and run on
the inputs below, on the CPU. willisma/SiT models.py and transport/, facebookresearch/DiT models.py and diffusion/,
xiao7199/decayed_Identity_shortcuts SiT/models.py and MAE/models_mae.py (torch's attention in place of flash-attn, which computes the
same), baofff/U-ViT libs/uvit.py, facebookresearch/mae models_mae.py, timm 1.0.31's VisionTransformer.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import DiT, Pipeline, from_official, to_official
from models.convert import AutoencoderKL, convert, main, pipeline_for, take_our_images
from models.layers import sincos_positions
from models.official import KINDS, UVIT_TIMES
from tests.conftest import ROOT, script_environment

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def block(name: str, dim: int, norms: bool = True, qkv_bias: bool = True) -> Shapes:
    return {
        **(norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim) if norms else {}),
        **linear(f"{name}.attn.qkv", 3 * dim, dim, qkv_bias),
        **linear(f"{name}.attn.proj", dim, dim),
        **linear(f"{name}.mlp.fc1", 4 * dim, dim),
        **linear(f"{name}.mlp.fc2", dim, 4 * dim),
    }


def dit_layout(
    decayed: bool = False, depth: int = 4, dim: int = 32, patch: int = 2, size: int = 8, channels: int = 4, rows: int = 11, outputs: int = 8
) -> Shapes:
    """SiT and DiT; `outputs` channels, twice `channels` with learn_sigma."""
    names = [f"blocks.{i}" for i in range(depth)]
    if decayed:
        names = [f"{half}_blocks.{i}" for half in ("enc", "dec") for i in range(depth // 2)]
    shapes = {
        "x_embedder.proj.weight": (dim, channels, patch, patch),
        "x_embedder.proj.bias": (dim,),
        "pos_embed": (1, (size // patch) ** 2, dim),
        **linear("t_embedder.mlp.0", dim, 256),
        **linear("t_embedder.mlp.2", dim, dim),
        "y_embedder.embedding_table.weight": (rows, dim),
        **linear("final_layer.linear", patch**2 * outputs, dim),
        **linear("final_layer.adaLN_modulation.1", 2 * dim, dim),
    }
    for name in names:
        shapes |= block(name, dim, norms=False) | linear(f"{name}.adaLN_modulation.1", 6 * dim, dim)
        shapes |= linear(f"{name}.skip", dim, dim) if name.startswith("dec") else {}
    return shapes


def uvit_layout(
    conv: bool = True, depth: int = 4, dim: int = 32, patch: int = 2, size: int = 8, channels: int = 4, rows: int = 11
) -> Shapes:
    shapes = {
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "pos_embed": (1, (2 if rows else 1) + (size // patch) ** 2, dim),
        **({"label_emb.weight": (rows, dim)} if rows else {}),
        **norm("norm", dim),
        **linear("decoder_pred", patch**2 * channels, dim),
        **({"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)} if conv else {}),
    }
    halves = [f"{half}_blocks.{i}" for half in ("in", "out") for i in range(depth // 2)]
    for name in ("mid_block", *halves):
        shapes |= block(name, dim, qkv_bias=False)
        shapes |= linear(f"{name}.skip_linear", dim, 2 * dim) if name.startswith("out") else {}
    return shapes


def mae_layout(
    form: str, depth: int = 6, dim: int = 32, patch: int = 4, size: int = 16, decoder_depth: int = 2, decoder_dim: int = 16
) -> Shapes:
    """form: "plain", "decayed" or "encoder"."""
    tokens = 1 + (size // patch) ** 2
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        shapes |= block(f"blocks.{i}", dim)
    if form != "decayed":
        shapes |= norm("norm", dim)
    if form == "encoder":
        return shapes
    shapes |= {"decoder_pos_embed": (1, tokens, decoder_dim), **norm("decoder_norm", decoder_dim)}
    shapes |= linear("decoder_pred", patch**2 * 3, decoder_dim)
    for i in range(decoder_depth):
        shapes |= block(f"decoder_blocks.{i}", decoder_dim)
    if form == "plain":
        return {**shapes, "mask_token": (1, 1, decoder_dim), **linear("decoder_embed", decoder_dim, dim)}
    shapes |= {"decoder_cls_token": (1, 1, decoder_dim), **linear("decoder_embed", decoder_dim, decoder_dim)}
    for i in range(depth // 2):
        shapes |= {f"skip.{i}.mask_token": (1, 1, dim), **linear(f"skip.{i}.fc.0", decoder_dim, decoder_dim + dim)}
        shapes |= linear(f"skip.{i}.fc.2", decoder_dim, decoder_dim)
    return shapes


def filled(shapes: Shapes, learned_positions: bool = False, scale: float = 0.1) -> dict[str, Tensor]:
    """Normal numbers everywhere, about 1 in weights of norms; NumPy keeps this stream for ever (NEP 19). Sine-cosine tables stay."""
    draws, weights = np.random.RandomState(0), {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("pos_embed") and not learned_positions:
            grid = int(shape[1] ** 0.5)
            table = sincos_positions(shape[2], grid, grid)
            weights[name] = torch.cat([torch.zeros(shape[1] - grid**2, shape[2]), table])[None]  # zeros for a class token
        else:
            about = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weights[name] = torch.from_numpy((about + scale * draws.standard_normal(shape)).astype(np.float32))
    return weights


def drawn(*shape: int, uniform: bool = False) -> Tensor:
    draws = np.random.RandomState(1)
    return torch.from_numpy((draws.uniform(size=shape) if uniform else draws.standard_normal(shape)).astype(np.float32))


def digest(x: Tensor) -> list[float]:
    """Three values from far apart, and the mean of all magnitudes."""
    flat = x.detach().flatten()
    return [*(flat[i].item() for i in (0, len(flat) // 2 + 3, -2)), flat.abs().mean().item()]


SMALL = dict(depth=3, patch=4, size=16, channels=3, rows=6, outputs=3)
DIFFUSION: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = {
    "sit": ("sit", filled(dit_layout()), {}),
    "sit, patch 4, RGB, no sigma": ("sit", filled(dit_layout(**SMALL)), {}),
    "dit": ("dit", filled(dit_layout()), {}),
    "decayed-sit": ("decayed-sit", filled(dit_layout(decayed=True)), {}),
    "decayed-sit, alpha .5": ("decayed-sit", filled(dit_layout(decayed=True, rows=1, outputs=4)), dict(alpha_min=0.5)),
    "uvit": ("uvit", filled(uvit_layout(), learned_positions=True), {}),
    "uvit, no conv, no labels": ("uvit", filled(uvit_layout(conv=False, rows=0, patch=4), learned_positions=True), {}),
}
MAES: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = {
    "mae": ("mae", filled(mae_layout("plain")), dict(norm_pixels=False)),
    "decayed-mae": ("decayed-mae", filled(mae_layout("decayed")), dict(alpha_min=0.7, norm_pixels=True)),
    "decayed-mae, deep decoder": (
        "decayed-mae",
        filled(mae_layout("decayed", depth=4, decoder_depth=4)),
        dict(alpha_min=0.6, norm_pixels=True),
    ),
}
HEADS = dict(num_heads=2)
BOTH_HEADS = dict(num_heads=2, decoder_num_heads=2)


def diffusion_inputs(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x, what the published network is fed as time, and labels."""
    kernel = weights["x_embedder.proj.weight"] if "x_embedder.proj.weight" in weights else weights["patch_embed.proj.weight"]
    size = 16 if kernel.shape[1] == 3 else 8
    table = next((value for name, value in weights.items() if "embedding_table" in name or "label_emb" in name), torch.zeros(1))
    return drawn(2, kernel.shape[1], size, size), torch.tensor([0.25, 1.0]), torch.tensor([0, len(table) - 1])


def predicted(name: str) -> Tensor:
    """By our network, fed as theirs is."""
    kind, weights, sizes = DIFFUSION[name]
    model = from_official(kind, weights, **HEADS, **sizes)
    x, t, labels = diffusion_inputs(weights)
    t = 999 * t if kind in ("dit", "uvit") else t
    if kind == "uvit":
        t = (t - model.config.time_offset) / model.config.time_scale
    with torch.no_grad():
        output = model(x, t, labels if model.config.num_classes else None)
    return output if kind == "dit" else output[:, : x.shape[1]]  # SiT throws the second half away


# From the published code
PREDICTIONS = {
    "sit": [-1.525569, 1.046726, -1.017132, 0.4987598],
    "sit, patch 4, RGB, no sigma": [0.2196769, 0.6164538, -0.6138242, 0.4819431],
    "dit": [-1.013442, 0.988184, -0.593511, 0.4525768],
    "decayed-sit": [-0.6796491, 0.2827301, 0.6329057, 0.4049336],
    "decayed-sit, alpha .5": [0.003101808, -0.1442247, -0.6108806, 0.427141],
    "uvit": [-0.4380198, -0.361319, 0.499222, 0.2871538],
    "uvit, no conv, no labels": [0.7239485, -1.173719, 0.4573779, 0.4615224],
}
# the loss, and digests of the prediction, of the last block's output with the mask, and of the encoder's output without one
RECONSTRUCTIONS = {
    "mae": (
        1.206154,
        [0.4247677, -0.2911655, -0.1194446, 0.353266],
        [3.430137, -3.172202, -1.632164, 1.141249],
        [1.356515, -2.147094, -1.773046, 0.7873029],
    ),
    "decayed-mae": (
        1.154263,
        [0.1061283, 0.3419402, 0.2695079, 0.3506195],
        [0.5370975, -0.6539202, -1.181732, 0.3669387],
        [0.2938774, -0.1342049, -0.1350398, 0.3760804],
    ),
    "decayed-mae, deep decoder": (
        1.100779,
        [-0.1740348, -0.5978139, -0.1331108, 0.3044561],
        [-0.3354428, -0.05071262, 0.171414, 0.357122],
        [-0.1926797, -0.05822895, -0.110595, 0.3592469],
    ),
}
TIMM_FEATURES = [1.255647, -1.488312, -0.08265051, 0.8455145]
# labels 3 and 7, guidance 4: SiT's ODE in two Euler steps, DiT's p_sample_loop in four steps without clipping; the noise is ours
SAMPLES = {
    "sit": [-1.466792, -1.335567, -0.7768874, 0.9408256],
    "decayed-sit": [-1.307014, -1.153247, 0.2482776, 0.8810729],
    "dit": [-129.8798, -247.2959, 108.524, 139.9593],
}


@pytest.mark.parametrize("name", DIFFUSION)
def test_predicts_what_the_published_code_predicts(name: str) -> None:
    assert digest(predicted(name)) == pytest.approx(PREDICTIONS[name], abs=1e-5)


@pytest.mark.parametrize("name", MAES)
def test_reconstructs_what_the_published_code_reconstructs(name: str) -> None:
    kind, weights, sizes = MAES[name]
    model, images = from_official(kind, weights, **BOTH_HEADS, **sizes), drawn(2, 3, 16, 16)
    with torch.no_grad():
        output, features = model(images, noise=drawn(2, 16, uniform=True), return_features=True)
        whole = model.features(images)[-1]
    loss, *digests = RECONSTRUCTIONS[name]
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    for found, expected in zip((output.prediction, features[-1], whole), digests, strict=True):
        assert digest(found) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_alone_has_its_features_and_a_fresh_decoder() -> None:
    weights = filled(mae_layout("encoder"))
    model = from_official("timm-mae", weights, **BOTH_HEADS, decoder_dim=16, decoder_depth=3)
    assert digest(model.features(drawn(2, 3, 16, 16))[-1]) == pytest.approx(TIMM_FEATURES, abs=1e-5)
    assert len(model.decoder_blocks) == 3
    assert model.decoder_blocks[0].attn.qkv.weight.std() > 0
    assert to_official("timm-mae", model).keys() == weights.keys()


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_what_the_published_code_samples(kind: str) -> None:
    pipeline = pipeline_for(kind, from_official(kind, filled(dit_layout(decayed=kind == "decayed-sit")), **HEADS))
    steps = 4 if kind == "dit" else 2
    samples = pipeline(2, [3, 7], num_inference_steps=steps, guidance_scale=4, output_type="pt").images
    expected = SAMPLES[kind]
    assert digest(samples) == pytest.approx(expected, abs=1e-5 * max(map(abs, expected)) + 1e-5)


@pytest.mark.parametrize(("times", "k"), [("continuous", 0), ("continuous", 499), ("continuous", 999), ("discrete", 0), ("discrete", 999)])
def test_uvit_has_the_noise_levels_and_times_of_its_training(times: str, k: int) -> None:
    """sde.py's VPSDE, cum_alpha = exp(-(.1 t + 9.95 t^2)) and a network fed 999 t; Stable Diffusion's betas and n = k + 1."""
    weights = filled(uvit_layout(conv=times == "continuous"), learned_positions=True)
    model = from_official("uvit", weights, **HEADS)
    t = (k + 1) / 1000
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = np.exp(-(0.1 * t + 9.95 * t**2)) if times == "continuous" else np.prod(1 - betas[: k + 1])
    scheduler = pipeline_for("uvit", model).scheduler
    assert scheduler.alphas_cumprod[k].item() == pytest.approx(expected, rel=1e-5)
    assert model.config.time_scale * k + model.config.time_offset == pytest.approx(999 * t if times == "continuous" else k + 1)
    assert (model.config.time_scale, model.config.time_offset) == UVIT_TIMES[times][0]


@pytest.mark.parametrize("name", [*DIFFUSION, *MAES])
def test_there_and_back_again(name: str) -> None:
    kind, weights, sizes = (DIFFUSION | MAES)[name]
    heads = BOTH_HEADS if name in MAES else HEADS
    back = to_official(kind, from_official(kind, weights, **heads, **sizes))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}
    differ = {key for key, value in back.items() if not torch.equal(value, weights[key])}
    if name == "decayed-mae":  # three skip layers, of which two decoder blocks use two
        assert {key.rsplit(".", 1)[0] for key in differ} == {"skip.2", "skip.2.fc.0", "skip.2.fc.2"}
        assert all(back[key].abs().max() == 0 for key in differ)
    elif name == "decayed-sit, alpha .5":  # unconditional: the constant label is in a bias now
        assert differ == {"y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"}
        again = to_official(kind, from_official(kind, back, **heads, **sizes))
        assert all(torch.equal(again[key], back[key]) for key in back)
    else:
        assert not differ


def test_converted_weights_are_copies() -> None:
    weights = filled(dit_layout())
    model = from_official("sit", weights, **HEADS)
    before = {name: value.clone() for name, value in weights.items()}
    back = to_official("sit", model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], weights[name]) and torch.equal(before[name], back[name]) for name in weights)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "weights", "expected"),
    [
        ("sit", filled(dit_layout(depth=24)), dict(depth=24, image_size=8, patch_size=2, in_channels=4, num_classes=10, learn_sigma=True)),
        ("dit", filled(dit_layout(**SMALL)), dict(depth=3, image_size=16, patch_size=4, in_channels=3, num_classes=5, learn_sigma=False)),
        ("decayed-sit", filled(dit_layout(decayed=True)), dict(depth=4, alpha_min=0.8, long_skips=True)),
        ("uvit", filled(uvit_layout(depth=6, rows=0), True), dict(depth=6, image_size=8, num_classes=0, conv=True, time_scale=0.999)),
        ("mae", filled(mae_layout("plain", size=32)), dict(depth=6, image_size=32, decoder_depth=2, decoder_dim=16, long_skips=False)),
    ],
)
def test_sizes_are_read_off_the_weights(kind: str, weights: dict[str, Tensor], expected: dict) -> None:
    model = from_official(kind, weights, **(BOTH_HEADS if kind == "mae" else HEADS))
    assert {name: model.config[name] for name in expected} == expected


@pytest.mark.parametrize(("dim", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_published_widths_have_the_published_heads(dim: int, heads: int) -> None:
    weights = {name: torch.zeros(shape) for name, shape in dit_layout(depth=1, dim=dim, rows=2).items() if name != "pos_embed"}
    assert from_official("dit", weights, image_size=8).config.num_heads == heads


@pytest.mark.parametrize(
    ("rows", "given", "num_classes", "rows_after"),
    [(11, None, 10, 11), (1001, None, 1000, 1001), (1000, None, 1000, 1001), (1000, 999, 999, 1000), (10, 10, 10, 11), (10, None, 9, 10)],
)
def test_label_tables_with_and_without_a_row_for_no_label(rows: int, given: int | None, num_classes: int, rows_after: int) -> None:
    weights = filled(uvit_layout(rows=rows), learned_positions=True)
    model = from_official("uvit", weights, **HEADS, num_classes=given)
    table = model.label_embed.weight
    assert (model.config.num_classes, len(table)) == (num_classes, rows_after)
    assert torch.equal(table[:rows], weights["label_emb.weight"])
    if rows_after > rows:
        torch.testing.assert_close(table[-1], weights["label_emb.weight"].mean(dim=0))
    back = to_official("uvit", model, empty_row=rows_after == rows)
    assert torch.equal(back["label_emb.weight"], weights["label_emb.weight"])


def test_half_precision_and_averaged_positions_are_taken() -> None:
    weights = {name: value.half() for name, value in filled(dit_layout()).items()}
    weights["pos_embed"] = weights["pos_embed"] + 2e-3
    model = from_official("sit", weights, **HEADS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, weights["final_layer.linear.weight"].float())


def changed(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in {**weights, **changes}.items() if value is not None}


SIT = DIFFUSION["sit"][1]
DECAYED = MAES["decayed-mae"][1]


@pytest.mark.parametrize(
    ("kind", "weights", "sizes", "message"),
    [
        ("vit", SIT, {}, r"no kind 'vit'.*sit, dit, decayed-sit"),
        ("sit", DIFFUSION["decayed-sit"][1], {}, r"do not fit the kind sit .*blocks\.0.* is missing; they look like decayed-sit"),
        ("decayed-sit", SIT, {}, r"they look like sit or dit"),
        ("uvit", SIT, {}, r"do not fit the kind uvit \(baofff/U-ViT.*they look like sit or dit"),
        ("mae", DECAYED, {}, r"mask_token is missing; they look like decayed-mae"),
        ("timm-mae", MAES["mae"][1], HEADS, r"decoder_blocks.* is unknown there.*they look like mae"),
        ("decayed-mae", DECAYED, BOTH_HEADS, r"alpha_min is not in the weights; give the min_decay"),
        ("sit", {}, {}, r"is missing"),
        ("sit", {"model": SIT, "ema": SIT, "args": None}, {}, r"model, ema, args are no tensors.*its 'ema' or its 'model'"),
        ("sit", SIT, {}, r"no published model has dim 32; give num_heads"),
        ("sit", SIT, dict(num_heads=3), r"not divisible by num_heads 3"),
        ("sit", SIT, dict(num_heads=2, alpha_min=0.5), r"alpha_min is 0.5, but these weights of the kind sit have 1"),
        ("uvit", DIFFUSION["uvit"][1], dict(num_heads=2, alpha_min=0.5), r"alpha_min is 0.5, but these weights of the kind uvit have 1"),
        ("sit", SIT, dict(num_heads=2, image_size=16), r"image_size is 16, but these weights .* have 8"),
        ("sit", SIT, dict(num_heads=2, num_classes=7), r"num_classes is 7, but these weights .* have 10"),
        ("sit", SIT, dict(num_heads=2, decoder_dim=7), r"the kind sit has no decoder_dim"),
        ("sit", changed(SIT, pos_embed=None), HEADS, r"no positions to read the image_size from"),
        ("sit", changed(SIT, pos_embed=torch.zeros(1, 15, 32)), HEADS, r"15 patches, which make no square"),
        ("sit", changed(SIT, pos_embed=torch.zeros(1, 16, 32)), HEADS, r"pos_embed is 1 away from the sine-cosine table"),
        ("sit", changed(SIT, **{"blocks.3.mlp.fc1.bias": None}), HEADS, r"blocks\.3\.mlp\.fc1\.bias is missing"),
        ("sit", changed(SIT, extra=torch.zeros(3)), HEADS, r"extra is unknown there"),
        ("sit", changed(SIT, **{"final_layer.linear.bias": torch.zeros(7)}), HEADS, r"bias is \(7,\) instead of \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(kind: str, weights: dict, sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_official(kind, weights, **sizes)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sit", {}, "long_skips True.* stands for False"),
        ("sit", dict(long_skips=False, alpha_min=0.5), "alpha_min 0.5.* stands for 1"),
        ("decayed-sit", dict(alpha_min=0.5, shortcut_schedule="cosine"), "cosine.* stands for linear"),
        ("decayed-sit", dict(alpha_min=0.5, learnable_alpha=True), "learnable_alpha True"),
        ("uvit", {}, "a UViT, not a DiT"),
    ],
)
def test_models_that_the_published_class_cannot_be_are_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_official(kind, DiT(image_size=8, depth=2, dim=32, num_heads=2, num_classes=3, **options))


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_an_mae_for_our_images_sees_the_same(norm_pixels: bool) -> None:
    """Images in [-1, 1] into the changed model, against the same ones normalised by ImageNet's statistics into the published one."""
    weights, noise = MAES["mae"][1], drawn(2, 16, uniform=True)
    published = from_official("mae", weights, **BOTH_HEADS, norm_pixels=norm_pixels)
    model = from_official("mae", weights, **BOTH_HEADS, norm_pixels=norm_pixels)
    take_our_images(model)
    images = drawn(2, 3, 16, 16).clamp(-1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = ((images + 1) / 2 - mean) / std
    for found, expected in zip(model.features(images), published.features(theirs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if not norm_pixels:
        expected = (published.reconstruct(theirs, noise)[1] * std + mean) * 2 - 1
        torch.testing.assert_close(model.reconstruct(images, noise)[1], expected, atol=1e-5, rtol=1e-5)


class Code:
    """A pickle that runs a command when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["models.convert", *map(str, words)])
    main()


def test_a_training_checkpoint_becomes_a_folder_that_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With the averaged weights, with alpha_min and the path from its flags, and with a VAE."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    AutoencoderKL(latent_channels=4, block_out_channels=(4, 8), norm_num_groups=2, **blocks).save_pretrained(tmp_path / "vae")
    weights, flags = DIFFUSION["decayed-sit"][1], argparse.Namespace(min_sigma=0.6, path_type="GVP", prediction="velocity")
    others = {f"module.{name}": value if name == "pos_embed" else value + 1 for name, value in weights.items()}
    checkpoint = dict(
        model=others, ema=weights, opt={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}, args=flags
    )
    torch.save(checkpoint, tmp_path / "0400000.pt")
    command(monkeypatch, "decayed-sit", tmp_path / "0400000.pt", tmp_path / "run", "--num_heads", 2, "--vae", tmp_path / "vae")
    assert "alpha 1 -> 0.6" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"ema", "scheduler", "vae", "model_index.json"}

    pipeline = Pipeline.from_pretrained(tmp_path / "run")
    expected = pipeline_for("decayed-sit", from_official("decayed-sit", weights, num_heads=2, alpha_min=0.6), path="gvp")
    assert (pipeline.config.path, pipeline.config.guidance_channels) == ("gvp", 3)
    arguments = dict(num_images=2, class_labels=4, num_inference_steps=3, guidance_scale=2)
    *_, found = pipeline.steps(**arguments)
    *_, step = expected.steps(**arguments)
    assert torch.equal(found.x, step.x)
    assert pipeline(**arguments, output_type="np").images.shape == (2, 16, 16, 3)

    words = ("--num_heads", 2, "--no-ema", "--alpha_min", 0.9, "--path", "linear")
    command(monkeypatch, "decayed-sit", tmp_path / "0400000.pt", tmp_path / "plain", *words)
    pipeline = Pipeline.from_pretrained(tmp_path / "plain")
    model = pipeline.model
    assert (pipeline.config.path, model.config.alpha_min) == ("linear", 0.9)
    assert torch.equal(model.head.weight, weights["final_layer.linear.weight"] + 1)


def test_plain_weights_of_every_kind_are_written(tmp_path: Path) -> None:
    """Files of both sorts; the MAE's folder says what it is."""
    save_file(DIFFUSION["dit"][1], tmp_path / "dit.safetensors")
    convert("dit", tmp_path / "dit.safetensors", tmp_path / "dit", num_heads=2)
    pipeline = Pipeline.from_pretrained(tmp_path / "dit")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    for sampler in (None, *pipeline.samplers):
        images = pipeline(1, 3, num_inference_steps=3, guidance_scale=2, sampler=sampler, output_type="pt").images
        assert images.isfinite().all()

    torch.save(DIFFUSION["uvit"][1], tmp_path / "uvit.pth")
    convert("uvit", tmp_path / "uvit.pth", tmp_path / "uvit", num_heads=2, times="discrete")
    assert Pipeline.from_pretrained(tmp_path / "uvit").scheduler.config.beta_schedule == "scaled_linear"

    torch.save({"model": DECAYED, "args": argparse.Namespace(min_decay=0.7, norm_pix_loss=False)}, tmp_path / "mae.pth")
    model = convert("decayed-mae", tmp_path / "mae.pth", tmp_path / "mae", **BOTH_HEADS)
    assert (model.config.alpha_min, model.config.norm_pixels) == (0.7, False)
    index = json.loads((tmp_path / "mae" / "model_index.json").read_text())
    assert index["model"] == ["models.mae", "MAE"]
    loaded = type(model).from_pretrained(tmp_path / "mae" / "model")
    assert torch.equal(loaded.features(torch.zeros(1, 3, 16, 16))[-1], model.features(torch.zeros(1, 3, 16, 16))[-1])


def test_a_pickle_with_code_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"ema": SIT, "more": Code(tmp_path / "trace")}, tmp_path / "evil.pt")
    words = [sys.executable, "-m", "models.convert", "sit", tmp_path / "evil.pt", tmp_path / "run"]
    result = subprocess.run(words, cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "refused" in result.stderr and "system" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"evil.pt"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.pt", b"hello there", "no file of torch.save"),
        ("empty.pth", b"", "no file of torch.save"),
        ("plain.pt", pickle.dumps({"x": Code(Path("/nowhere"))}), "no file of torch.save"),
        ("short.safetensors", b"123", "no .safetensors file"),
    ],
)
def test_files_that_are_none_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read.*{message}"):
        convert("sit", tmp_path / name, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "options", "flags", "message"),
    [
        ("dit", dict(path="gvp"), {}, "--path says nothing of the kind dit"),
        ("sit", dict(times="discrete"), {}, "--times says nothing of the kind sit"),
        ("sit", HEADS, dict(prediction="noise"), "predicts the noise"),
        ("sit", HEADS, dict(path_type="VP"), "on the path vp"),
    ],
)
def test_trainings_that_cannot_be_sampled_are_refused(kind: str, options: dict, flags: dict, message: str, tmp_path: Path) -> None:
    torch.save({"ema": SIT, "args": argparse.Namespace(**flags)}, tmp_path / "sit.pt")
    with pytest.raises(ValueError, match=message):
        convert(kind, tmp_path / "sit.pt", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_every_kind_is_in_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert all(kind in text for kind in KINDS)
