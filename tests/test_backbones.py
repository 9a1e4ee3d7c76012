"""What every backbone does alike: schedules, ablations, training, sampling, saving."""

import itertools
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import DiT, Pipeline, create_model, effective_alpha
from models.registry import BACKBONES, backbone_class, check_config, names
from models.shortcut import PLACEMENTS, SCHEDULES
from training.objectives import DDPM, FlowMatching

TINY = {
    "dit": dict(image_size=8, patch_size=4, depth=2, dim=16, num_heads=2),
    "uvit": dict(image_size=8, patch_size=4, depth=2, dim=16, num_heads=2),
    "unet": dict(image_size=8, channels=(8, 8), layers_per_block=1, attention_levels=(1,), head_dim=4),
    "mae": dict(image_size=16, patch_size=4, depth=2, dim=16, num_heads=2, decoder_depth=2, decoder_dim=16, decoder_num_heads=2),
}
TRANSFORMERS = ("dit", "uvit", "mae")


def tiny(backbone: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    labels = {"num_classes": 3} if BACKBONES[backbone].task == "diffusion" else {}
    return create_model(backbone, **{**TINY[backbone], **labels, **options})


def loss_of(model: nn.Module, backbone: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(4, 3, model.config.image_size, model.config.image_size, generator=generator) * 2 - 1
    if backbone == "mae":
        return model(images, torch.rand(4, model.num_patches, generator=generator)).loss
    batch = {"images": images, "labels": torch.tensor([0, 1, 2, 0])}
    return FlowMatching(3)(model, batch, generator)


def alpha_min_of(schedule: str) -> float:
    return 0.6 if SCHEDULES[schedule].takes_alpha_min else 1.0


@pytest.mark.parametrize("learnable_alpha", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_schedule_trains(backbone: str, schedule: str, learnable_alpha: bool) -> None:
    model = tiny(backbone, alpha_min=alpha_min_of(schedule), shortcut_schedule=schedule, learnable_alpha=learnable_alpha)
    assert model.alphas == pytest.approx(SCHEDULES[schedule].alphas(len(model.shortcuts), alpha_min_of(schedule)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        loss = loss_of(model, backbone, step)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    learned = [isinstance(shortcut.alpha, nn.Parameter) and shortcut.alpha.grad != 0 for shortcut in model.shortcuts]
    assert all(learned) if learnable_alpha else not any(learned)


@pytest.mark.parametrize(("placement", "long_skips", "zero_init"), itertools.product(PLACEMENTS, (True, False), (True, False)))
@pytest.mark.parametrize("backbone", TRANSFORMERS)
def test_every_ablation_is_an_option(backbone: str, placement: str, long_skips: bool, zero_init: bool) -> None:
    model = tiny(backbone, alpha_min=0.5, shortcut_placement=placement, long_skips=long_skips, zero_init=zero_init)
    for shortcut in model.shortcuts:
        assert placement in ("both", shortcut.kind) or shortcut.value == 1
    assert min(model.alphas) == 0.5
    loss_of(model, backbone, 0).backward()
    gradients = [p.grad.abs().sum() for name, p in model.named_parameters() if p.grad is not None and "label" not in name]
    assert (sum(g == 0 for g in gradients) > 0) == zero_init  # behind a zero nothing learns in the first step


def gradients_and_kept(model: nn.Module, backbone: str) -> tuple[dict[str, Tensor], int]:
    """Of one training step, and how many numbers were kept for the way back beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, backbone, step=0)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients, sum(kept.values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(backbone: str) -> None:
    model = tiny(backbone, alpha_min=0.6, learnable_alpha=True, zero_init=False)
    gradients, kept = gradients_and_kept(model, backbone)
    model.enable_gradient_checkpointing()
    same_gradients, kept_less = gradients_and_kept(model, backbone)
    assert kept_less < kept / 2
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_bf16_it_learns_the_same(backbone: str) -> None:
    """By autocast, as trainings use it: what is predicted at first, and the loss after some steps."""
    losses, first = [], []
    for mixed in (False, True):
        model = tiny(backbone, alpha_min=0.6, zero_init=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            first.append(probed(model, backbone))
        losses.append([])
        for step in range(24):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = loss_of(model, backbone, step % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    exact, rounded = losses
    # of the tiny U-Net every channel is a group, whose norm blows rounding up
    assert (first[1] - first[0]).norm() < (2e-2 if backbone == "unet" else 1e-2) * first[0].norm()
    assert exact[-1] < 0.95 * exact[3], "it has learned, of the same batch"
    assert rounded[-1] == pytest.approx(exact[-1], rel=1e-2)


@torch.no_grad()
def probed(model: nn.Module, backbone: str) -> Tensor:
    """What it predicts, float32."""
    generator = torch.Generator().manual_seed(9)
    images = torch.randn(4, 3, model.config.image_size, model.config.image_size, generator=generator)
    output = model(images, torch.rand(4, model.num_patches if backbone == "mae" else 1, generator=generator).squeeze(1))
    return (output.prediction if backbone == "mae" else output).float()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_is_traced_as_one_graph_that_computes_the_same(backbone: str) -> None:
    """Forward and back as for --compile, without its generated code; under autocast, and with blocks that are recomputed."""
    gradients = []
    for traced in (False, True):
        model = tiny(backbone, alpha_min=0.6, zero_init=False)
        model.enable_gradient_checkpointing()
        if traced:
            model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, backbone, step=0)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("schedule", "placement"), [("linear", "both"), ("cosine", "both"), ("constant", "both"), ("linear", "attention")])
def test_a_schedule_can_be_asked_for_by_alpha_eff(backbone: str, schedule: str, placement: str) -> None:
    model = tiny(backbone, alpha_eff=0.1, shortcut_schedule=schedule, shortcut_placement=placement)
    assert effective_alpha(model.alphas) == pytest.approx(0.1)
    assert 0 < model.config.alpha_min < 1


@pytest.mark.parametrize("backbone", names("diffusion"))
@pytest.mark.parametrize("objective", [FlowMatching(3), FlowMatching(3, path="gvp"), DDPM(3)], ids=["flow", "gvp", "ddpm"])
def test_diffusion_backbones_sample_save_and_load(backbone: str, objective: FlowMatching | DDPM, tmp_path: Path) -> None:
    model = tiny(backbone, alpha_min=0.6, learnable_alpha=True).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    pipeline = Pipeline(model, objective.scheduler, path=objective.path)
    images = pipeline(2, 1, guidance_scale=2.0, num_inference_steps=3, output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    pipeline.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.model.alphas == model.alphas
    assert torch.equal(loaded(2, 1, guidance_scale=2.0, num_inference_steps=3, output_type="pt").images, images)


@pytest.mark.parametrize("backbone", names("diffusion"))
def test_features_come_with_every_block(backbone: str) -> None:
    model = tiny(backbone)
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2)
    prediction, features = model(*inputs, return_features=True)
    assert prediction.shape == (2, 3, 8, 8) and torch.equal(prediction, model(*inputs))
    assert len(features) > 1 and all(feature.ndim == 3 and len(feature) == 2 for feature in features)


@pytest.mark.parametrize(("long_skips", "expected"), [(False, 1), (True, 2)], ids=["plain", "skips"])
@pytest.mark.parametrize("backbone", ["dit", "uvit"])
def test_only_what_is_needed_is_kept_while_sampling(backbone: str, long_skips: bool, expected: int) -> None:
    """The last block finds its input and its own skip in memory, and no other block's output."""
    model, outputs, alive = tiny(backbone, depth=6, long_skips=long_skips), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(weakref.ref(output)))
    model.blocks[-1].register_forward_pre_hook(lambda _block, _inputs: alive.append(sum(output() is not None for output in outputs)))
    with torch.inference_mode():
        model(torch.randn(2, 3, 8, 8), torch.rand(2))
    assert len(outputs) == len(model.blocks) and alive == [expected]


@pytest.mark.parametrize("backbone", ["dit", "uvit"])
def test_long_skips_are_counted_where_memory_is_asked_for(backbone: str) -> None:
    plain, skips = (tiny(backbone, depth=6, long_skips=long_skips) for long_skips in (False, True))
    assert skips.numbers_held - plain.numbers_held == 3 * skips.positions.numel(), "three outputs of the encoder"


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", ["XS", "S"])
def test_sizes_exist_without_taking_memory(backbone: str, size: str) -> None:
    with torch.device("meta"):
        assert create_model(backbone, size, image_size=32).num_parameters() > 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(backbone="resnet"), "dit, uvit, unet, mae"),
        (dict(backbone="dit", size="XXL"), "XS, S, B, L, XL"),
        (dict(backbone="unet", patch_size=4), "no patch_size"),
        (dict(backbone="dit", size="XS", shortcut_schedule="square"), "linear, cosine, constant"),
        (dict(backbone="dit", size="XS", shortcut_placement="norm"), "both, attention, mlp"),
        (dict(backbone="dit", size="XS", shortcut_schedule="sqrt-half", alpha_min=0.5), "leave it away"),
        (dict(backbone="dit", size="XS", shortcut_schedule="sqrt-half", alpha_eff=0.01), "has no alpha_min"),
        (dict(backbone="dit", size="XS", alpha_min=0.5, alpha_eff=0.01), "not both"),
        (dict(backbone="dit", size="XS", alpha_eff=1.5), "alpha_eff"),
        (dict(backbone="dit", size="XS", depth=7), "odd"),
    ],
)
def test_bad_options_are_told(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**options)


def test_classes_are_found_by_name() -> None:
    for row in BACKBONES.values():
        assert backbone_class(row.class_name) is row.load()
    with pytest.raises(ValueError, match="no backbone class"):
        backbone_class("object")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_configs_of_our_networks_are_loaded(backbone: str) -> None:
    for size in BACKBONES[backbone].sizes:
        with torch.device("meta"):
            model = create_model(backbone, size, image_size=448 if backbone == "mae" else 64)
        check_config(type(model), json.loads(model.to_json_string()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(depth=10**9), "more than the 256"),
        (dict(dim=10**9), "more than the 65,536"),
        (dict(image_size=8192, patch_size=1), "more tokens"),
        (dict(patch_size=0), "more tokens"),
        (dict(num_heads=-(10**9)), "more than"),
        (dict(depth="12"), "must be a int"),
        (dict(depth=True), "must be a int"),
        (dict(alpha_min=float("nan")), "more than"),
        (dict(alpha_min=[0.5]), "must be a float"),
        (dict(shortcut_schedule=["linear"]), "must be a str"),
        (dict(long_skips=1), "must be a bool"),
    ],
)
def test_hostile_configs_are_refused_before_anything_is_built(
    changed: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pipeline(tiny("dit"), FlowMatching().scheduler).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, **changed}))
    monkeypatch.setattr(DiT, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tmp_path)


def test_a_hostile_scheduler_is_refused(tmp_path: Path) -> None:
    Pipeline(tiny("dit"), DDPM().scheduler).save_pretrained(tmp_path)
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 10**13}))
    with pytest.raises(ValueError, match="10000000000000 timesteps"):
        Pipeline.from_pretrained(tmp_path)


def test_configs_that_are_none_are_refused(tmp_path: Path) -> None:
    Pipeline(tiny("unet"), FlowMatching().scheduler).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model/config.json").read_text())
    for text, message in (("[]", "is a list"), ("{", "not valid JSON"), (json.dumps({**config, "channels": [8] * 10**4}), "a few numbers")):
        (tmp_path / "model/config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Pipeline.from_pretrained(tmp_path)
