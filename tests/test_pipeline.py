"""Paths, samplers, guidance, seeds, saving."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from eval.generate import SamplingOptions, generate
from models import Pipeline
from models.guidance import Guidance
from models.paths import PATHS, data_from_prediction, from_sigma, interpolate, split, velocity
from models.pipeline import DDPM_SAMPLERS, MAX_SEED, SAMPLERS, Step, _set_steps, to_uint8
from training.objectives import DDPM, PREDICTION_TYPES

Make = Callable[..., nn.Module]


@pytest.fixture
def pipeline(tiny_dit: Make) -> Pipeline:
    pipeline = Pipeline(tiny_dit(alpha_min=0.6), FlowMatchEulerDiscreteScheduler(), ["a", "b", "c"], {"images_seen": 7})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class PointMass(nn.Module):
    """The exact velocity when all data are one image: v(x, t) = (data - x) / (1 - t)."""

    dtype, device, numbers_held = torch.float32, torch.device("cpu"), 1

    def __init__(self, config: object, data: Tensor) -> None:
        super().__init__()
        self.config, self.data, self.evaluations = config, nn.Parameter(data), 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        return (self.data - x) / (1 - t).view(-1, 1, 1, 1)


class Gaussian(PointMass):
    """The exact velocity when data are N(0, spread^2): linear in x, so the map from noise to data is noise * spread."""

    spread = 0.5

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        variance = t**2 * self.spread**2 + (1 - t) ** 2
        return (t * self.spread**2 - (1 - t)) / variance * x


@pytest.mark.parametrize("path", PATHS)
def test_path_runs_from_noise_to_data(path: str) -> None:
    data, noise, t = (draw.double() for draw in (torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 0.25, 0.5, 1])))
    x, v = interpolate(data, noise, t, path), velocity(data, noise, t, path)
    torch.testing.assert_close(x[0], noise[0])
    torch.testing.assert_close(x[3], data[3])
    for found, expected in zip(split(x, v, t, path), (data, noise), strict=True):
        torch.testing.assert_close(found, expected)
    later, earlier = (interpolate(data, noise, t + step, path) for step in (1e-6, -1e-6))
    torch.testing.assert_close((later - earlier) / 2e-6, v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.1])
def test_diffusers_sigma_is_a_point_of_every_path(path: str, sigma: float) -> None:
    data, noise, sigma = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.tensor(sigma)
    x_t, t = from_sigma((1 - sigma) * data + sigma * noise, sigma, path)
    torch.testing.assert_close(x_t, interpolate(data, noise, t, path))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions_point_at_the_data(prediction_type: str) -> None:
    data, generator = torch.randn(5, 3, 2, 2), torch.Generator().manual_seed(0)
    objective = DDPM(prediction_type=prediction_type)
    x, timesteps, target, _ = objective.draw(data, generator)
    alpha_bar = objective.noising.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(data_from_prediction(x, target, alpha_bar, prediction_type), data, atol=2e-3, rtol=2e-3)


class DDPMPointMass(PointMass):
    """The exact prediction of a DDPM when all data are one image."""

    def __init__(self, config: object, data: Tensor, objective: DDPM) -> None:
        super().__init__(config, data)
        self.objective = objective

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        alpha_bar = self.objective.noising.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        noise = (x - alpha_bar.sqrt() * self.data) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.data
        return {"epsilon": noise, "sample": self.data.expand_as(x), "v_prediction": v}[self.objective.prediction_type]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", DDPM_SAMPLERS)
def test_ddpm_samplers_reach_a_point_mass(pipeline: Pipeline, sampler: str, prediction_type: str) -> None:
    data = torch.rand(3, 16, 16) * 2 - 1
    objective = DDPM(prediction_type=prediction_type)
    exact = Pipeline(DDPMPointMass(pipeline.model.config, data, objective), objective.scheduler)
    previews = []
    images = exact(
        2, num_inference_steps=8, sampler=sampler, output_type="pt", callback_on_step_end=lambda _, state: previews.append(state.preview)
    ).images
    torch.testing.assert_close(images, data.expand(2, -1, -1, -1), atol=2e-2, rtol=0)
    torch.testing.assert_close(previews[3], data.expand(2, -1, -1, -1), atol=2e-2, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_velocity_of_another_path_reaches_the_same_data(pipeline: Pipeline, sampler: str) -> None:
    class Exact(PointMass):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            weight, rate = (f(t).view(-1, 1, 1, 1) for f in (PATHS["gvp"].data_weight, PATHS["gvp"].noise_weight))
            return velocity(self.data.expand_as(x), (x - weight * self.data) / rate, t, "gvp")

    data = torch.rand(3, 16, 16) * 2 - 1
    exact = Pipeline(Exact(pipeline.model.config, data), FlowMatchEulerDiscreteScheduler(), path="gvp")
    images = exact(2, num_inference_steps=7, sampler=sampler, output_type="pt").images
    torch.testing.assert_close(images, data.expand(2, -1, -1, -1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_samplers_reach_a_point_mass(pipeline: Pipeline, sampler: str, steps: int) -> None:
    data = torch.rand(3, 16, 16) * 2 - 1
    exact = Pipeline(PointMass(pipeline.model.config, data), FlowMatchEulerDiscreteScheduler())
    images = exact(2, num_inference_steps=steps, sampler=sampler, output_type="pt").images
    torch.testing.assert_close(images, data.expand(2, -1, -1, -1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("sampler", "error"), [("euler", 0.03), ("heun", 3e-3), ("dpm++", 5e-3), ("unipc", 5e-3)])
def test_samplers_solve_an_equation_with_a_known_answer(pipeline: Pipeline, sampler: str, error: float) -> None:
    exact = Pipeline(Gaussian(pipeline.model.config, torch.zeros(1)), FlowMatchEulerDiscreteScheduler())
    images = exact(2, seed=3, num_inference_steps=40, sampler=sampler, output_type="pt").images
    torch.testing.assert_close(images, exact.noise(2, 3) * Gaussian.spread, atol=error * 4, rtol=0)  # noise reaches about 4


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_no_step_is_spent_on_nothing(pipeline: Pipeline, sampler: str) -> None:
    scheduler = pipeline._scheduler(sampler)
    _set_steps(scheduler, 4)
    assert sorted(set(scheduler.sigmas.tolist()), reverse=True) == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-6)


def test_images_as_tensors_are_for_any_use(pipeline: Pipeline) -> None:
    images = pipeline(2, np.int64(1), num_inference_steps=1, output_type="pt").images
    weight = torch.ones(1, requires_grad=True)
    (images * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(images, pipeline(2, [1, 1], num_inference_steps=1, output_type="pt").images)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 10), ("heun", 19), ("dpm++", 10), ("unipc", 10)])
def test_every_step_is_announced_once(pipeline: Pipeline, sampler: str, evaluations: int) -> None:
    seen = []
    pipeline(2, 1, num_inference_steps=10, sampler=sampler, callback_on_step_end=lambda _, state: seen.append(state))
    assert [state.step for state in seen] == list(range(1, evaluations + 1))
    assert all(state.num_steps == evaluations and state.preview.shape == (2, 3, 16, 16) for state in seen)


def test_the_last_euler_preview_is_the_image(pipeline: Pipeline) -> None:
    previews = []
    images = pipeline(
        2, num_inference_steps=5, output_type="pt", callback_on_step_end=lambda _, state: previews.append(state.preview)
    ).images
    torch.testing.assert_close(previews[-1], images, atol=1e-5, rtol=1e-5)


def test_compiled_it_draws_the_same_in_one_shape_and_its_double(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SamplingOptions(
        num_samples=6, batch_size=4, num_inference_steps=4, sampler="unipc", guidance_scale=2.0, guidance_to=0.5, labels="balanced"
    )
    expected = generate(pipeline, options)
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def traced(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=traced))
    found = generate(pipeline, replace(options, compile=True))
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len(graphs) == 2, "the last batch, of 2 images, begins earlier"
    assert np.array_equal(generate(pipeline, replace(options, compile=True)), found)
    assert np.array_equal(generate(pipeline, options), expected), "not asked for, it is not used"
    last = replace(options, seed=MAX_SEED - 6, compile=True)
    assert generate(pipeline, last).shape == (6, 16, 16, 3) and len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_what_a_network_gave_may_be_overwritten_by_its_next_call(prediction_type: str, tiny_dit: Make) -> None:
    """As a CUDA graph does."""
    objective = DDPM(3, prediction_type=prediction_type)
    images = []
    for overwrites in (False, True):
        model, kept = tiny_dit(), {}

        def same_memory(_module: nn.Module, _inputs: tuple, output: Tensor, kept: dict = kept) -> Tensor:
            return kept.setdefault("output", torch.empty_like(output)).copy_(output)

        if overwrites:
            model.register_forward_hook(same_memory)
        pipeline = Pipeline(model, objective.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        previews = [step.preview for step in pipeline.steps(2, 1, num_inference_steps=5, sampler="dpm++")]
        images.append(torch.stack(previews))
    assert torch.equal(*images)


def test_an_exception_in_the_callback_stops_sampling(pipeline: Pipeline) -> None:
    def stop(pipeline: Pipeline, state: Step) -> None:
        if state.step == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        pipeline(1, num_inference_steps=10, callback_on_step_end=stop)


def test_samplings_that_take_turns_do_not_disturb_each_other(pipeline: Pipeline) -> None:
    options = dict(num_inference_steps=4, sampler="dpm++")
    together = list(zip(pipeline.steps(1, seed=1, **options), pipeline.steps(1, seed=2, **options), strict=True))[-1]
    for seed, state in enumerate(together, start=1):
        assert torch.equal(state.x, pipeline(1, seed=seed, output_type="pt", **options).images)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_i_depends_on_seed_plus_i_alone(pipeline: Pipeline, sampler: str) -> None:
    options = dict(guidance_scale=2.0, num_inference_steps=4, sampler=sampler, output_type="pt")
    together = pipeline(5, [0, 1, 2, 0, 1], seed=10, **options).images
    for i, label in enumerate([0, 1, 2, 0, 1]):
        alone = pipeline(1, label, seed=10 + i, **options).images
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)
    assert torch.equal(pipeline(5, [0, 1, 2, 0, 1], seed=10, **options).images, together)


def test_noise_is_the_same_for_every_model(tiny_dit: Make, pipeline: Pipeline) -> None:
    plain = Pipeline(tiny_dit(alpha_min=1.0, depth=2), FlowMatchEulerDiscreteScheduler())
    assert torch.equal(plain.noise(3, 5), pipeline.noise(3, 5))
    assert torch.equal(pipeline.noise(3, 5)[1], pipeline.noise(1, 6)[0])


def test_guidance_is_the_formula(pipeline: Pipeline) -> None:
    x, t, labels = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 2])
    with_label, without = pipeline.model(x, t, labels), pipeline.model(x, t)
    guided = Guidance(2.5)(pipeline.model, x, t, labels, 0.5, num_classes=3)
    torch.testing.assert_close(guided, without + 2.5 * (with_label - without), atol=1e-4, rtol=1e-4)


def test_guidance_of_some_channels_leaves_the_others_to_the_label(tiny_dit: Make) -> None:
    pipeline = Pipeline(tiny_dit(learn_sigma=True), FlowMatchEulerDiscreteScheduler(), guidance_channels=2)
    x, t, labels = torch.randn(1, 3, 16, 16), torch.rand(1), torch.tensor([1])
    with_label, without = pipeline.model(x, t, labels), pipeline.model(x, t)
    guided = Guidance(2.5, channels=2)(pipeline.model, x, t, labels, 0.5, num_classes=3)
    torch.testing.assert_close(guided[:, :2], (without + 2.5 * (with_label - without))[:, :2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided[:, 2:], with_label[:, 2:], atol=1e-4, rtol=1e-4)


def test_latents_are_decoded(tiny_dit: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=2, scaling_factor=0.5)  # fmt: skip
    pipeline = Pipeline(
        tiny_dit(in_channels=4), FlowMatchEulerDiscreteScheduler(), vae=vae.eval().requires_grad_(False)
    )  # as `load_vae` gives it
    assert pipeline.latent_shape == (4, 16, 16) and pipeline.image_shape == (3, 32, 32)
    latents = list(pipeline.steps(2, num_inference_steps=2))[-1].x
    images = pipeline(2, num_inference_steps=2, output_type="pt").images
    with torch.no_grad():
        torch.testing.assert_close(images, vae.decode(latents / 0.5).sample, atol=1e-5, rtol=1e-5)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(Pipeline.from_pretrained(tmp_path)(2, num_inference_steps=2, output_type="pt").images, images)


def test_scheduler_state_does_not_leak_between_calls(pipeline: Pipeline) -> None:
    first = pipeline(1, num_inference_steps=6, output_type="pt").images
    pipeline(1, num_inference_steps=3)
    assert torch.equal(pipeline(1, num_inference_steps=6, output_type="pt").images, first)


def test_output_types(pipeline: Pipeline) -> None:
    array = pipeline(2, num_inference_steps=2, output_type="np").images
    assert array.dtype == np.uint8 and array.shape == (2, 16, 16, 3)
    pictures = pipeline(2, num_inference_steps=2).images
    assert np.array_equal(np.asarray(pictures[1]), array[1])
    assert to_uint8(torch.tensor([-2.0, -1, 0, 1, 9]).view(1, 1, 1, 5)).ravel().tolist() == [0, 0, 128, 255, 255]


def test_saved_and_loaded_it_samples_the_same(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.config.class_names == ["a", "b", "c"]
    assert loaded.config.training == {"images_seen": 7}
    expected = pipeline(2, 1, guidance_scale=3.0, num_inference_steps=3, output_type="pt").images
    assert torch.equal(loaded(2, 1, guidance_scale=3.0, num_inference_steps=3, output_type="pt").images, expected)
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_images=0), "at least 1"),
        (dict(num_images=10**9), "GiB"),
        (dict(class_labels=3), "0 to 2"),
        (dict(class_labels=-1), "0 to 2"),
        (dict(class_labels=[0, 1]), "2 labels for 1 images"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**63), "seed"),
        (dict(num_inference_steps=0), "num_inference_steps"),
        (dict(guidance_scale=float("nan")), "guidance_scale"),
        (dict(sampler="ddim"), "euler, heun"),
        (dict(output_type="gif"), "pil, np or pt"),
    ],
)
def test_arguments_out_of_range_are_refused(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**options)


def test_an_unconditional_model_refuses_labels(tiny_dit: Make) -> None:
    pipeline = Pipeline(tiny_dit(num_classes=0), FlowMatchEulerDiscreteScheduler())
    assert len(pipeline(2, num_inference_steps=2, guidance_scale=3.0).images) == 2
    with pytest.raises(ValueError, match="unconditional"):
        pipeline(1, 0)


def test_bf16_weights_sample(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    rounded = Pipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    images = rounded(2, 1, num_inference_steps=4, output_type="pt").images
    exact = pipeline(2, 1, num_inference_steps=4, output_type="pt").images
    assert (images - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_folders_that_are_no_checkpoints_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a checkpoint"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="first checkpoint is not written yet"):
        Pipeline.from_pretrained(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pipeline.save_pretrained(whole)
    pipeline.save_pretrained(broken)
    weights = broken / "model/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        Pipeline.from_pretrained(broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "model": ["os", "system"]}))
    with pytest.raises(ValueError, match="no backbone class 'system'"):
        Pipeline.from_pretrained(broken)
    config = json.loads((whole / "model/config.json").read_text())
    for file, content, told in (
        ("model_index.json", "7", "holds a int, not names and values"),
        ("scheduler/scheduler_config.json", "[]", "cannot be loaded"),
        ("model/config.json", json.dumps({**config, "num_heads": 0}), "cannot be loaded"),
    ):
        damaged = shutil.copytree(whole, tmp_path / file.replace("/", "-"))
        (damaged / file).write_text(content)
        with pytest.raises(ValueError, match=told):
            Pipeline.from_pretrained(damaged)


def test_ddim_refuses_numbers_of_steps_that_it_would_round(pipeline: Pipeline) -> None:
    ddpm = Pipeline(pipeline.model, DDPM().scheduler)
    assert ddpm.samplers[0] == "ddim"
    for sampler in (None, "ddim"):
        with pytest.raises(ValueError, match="125, 200, 250"):
            ddpm(1, num_inference_steps=300, sampler=sampler)


def test_latents_are_no_pictures(tiny_dit: Make) -> None:
    pipeline = Pipeline(tiny_dit(in_channels=4), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="give the pipeline a VAE"):
        pipeline(1, num_inference_steps=1)
    assert pipeline(1, num_inference_steps=1, output_type="pt").images.shape == (1, 4, 16, 16)


@pytest.mark.parametrize("sampler", DDPM_SAMPLERS)
def test_a_ddpms_image_i_depends_on_seed_plus_i_alone(pipeline: Pipeline, sampler: str) -> None:
    ddpm = Pipeline(pipeline.model, DDPM().scheduler)
    options = dict(num_inference_steps=3, sampler=sampler, output_type="pt")
    together = ddpm(3, 1, seed=4, **options).images
    torch.testing.assert_close(ddpm(1, 1, seed=6, **options).images[0], together[2], atol=1e-3, rtol=1e-3)
