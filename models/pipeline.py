"""Noise -> images: a diffusers pipeline over flow paths and DDPMs, with one seed for every image."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor, nn

from models.compiling import require_compiler
from models.files import INDEX, read_json, require_memory
from models.guidance import Guidance
from models.paths import PATHS, data_from_prediction, from_sigma, split
from models.registry import load_backbone, read_index
from models.vae import AutoencoderKL, colours, factor, load_vae, to_images, to_small_images

_FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
# For models that predict a velocity ...
SAMPLERS: dict[str, Callable[[], Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,  # two network evaluations a step, one in the last
    "dpm++": lambda: DPMSolverMultistepScheduler(**_FLOW),
    "unipc": lambda: UniPCMultistepScheduler(**_FLOW),
}
# ... and for DDPMs, made from the config that they were trained with
DDPM_SAMPLERS: dict[str, Callable[[Any], Any]] = {
    # goes 1000 // n timesteps down each time, whatever the spacing
    "ddim": lambda config: DDIMScheduler.from_config(config, timestep_spacing="trailing"),
    "ddpm": DDPMScheduler.from_config,
    "dpm++": lambda config: DPMSolverMultistepScheduler.from_config(config, variance_type=None),
    "unipc": UniPCMultistepScheduler.from_config,
}
SAMPLER_NAMES = tuple(dict.fromkeys([*SAMPLERS, *DDPM_SAMPLERS]))
_STORED = {each.__name__: each for each in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, DDPMScheduler, DDIMScheduler)}
MAX_SEED = 2**63 - 1
MAX_TIMESTEPS = 100_000
COMPILED_SHAPES = 64  # of all networks of a class; torch's own limit of 8 would be met by four checkpoints


class Step(NamedTuple):
    """The state of a sampling after a network evaluation.

    Attributes:
        step: evaluations done, from 1.
        num_steps: evaluations in all.
        x: float (N, C, H, W); after the last step the images, in [-1, 1] but for overshoot (or latents: see `Pipeline.decode`).
        preview: float (N, C, H, W), the images that the network points at.
    """

    step: int
    num_steps: int
    x: Tensor
    preview: Tensor


class Pipeline(DiffusionPipeline):
    """Sample images from a model of velocities, or from a DDPM.

    Args:
        model: predicts from (x, t, labels), such as `models.dit.DiT`.
        scheduler: a diffusers scheduler; `sampler=` of a call replaces it for that call. A flow-matching one says that the model
            predicts a velocity at t in [0, 1]; any other that it predicts what `prediction_type` says at an integer timestep.
        class_names: names of the labels, in order.
        training: what the checkpoint went through (steps, images seen, data), for cards and protocols.
        path: that a velocity belongs to, a key of `models.paths.PATHS`.
        guidance_channels: guidance moves the first so many channels alone, as the published DiT and SiT do; None: all.
        vae: decodes latents into images.
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components: ClassVar = ["vae"]

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        class_names: Sequence[str] = (),
        training: dict[str, Any] | None = None,
        path: str = "linear",
        guidance_channels: int | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        if path not in PATHS:
            raise ValueError(f"there is no path {path!r}; choose from {', '.join(PATHS)}")
        self.register_modules(model=model, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=list(class_names), training=training or {}, path=path, guidance_channels=guidance_channels)
        self.set_progress_bar_config(leave=False, disable=None)

    @classmethod
    def from_pretrained(cls, path: str | Path, ema: bool = True, torch_dtype: torch.dtype = torch.float32) -> "Pipeline":
        """Load a run or a shipped checkpoint.

        Args:
            path: a folder with `model_index.json` beside `model/`, and `ema/` where there are averaged weights.
            ema: prefer the averaged weights.
            torch_dtype: of the parameters.

        Raises:
            ValueError: not such a folder, a network that does not sample (a masked autoencoder), or weights that do not fit its config.
        """
        path, index = Path(path), read_index(path)
        if "scheduler" not in index:
            raise ValueError(f"{path} samples no images: its {INDEX} names no scheduler; judge its features with eval/probe.py")
        model = load_backbone(path, ema, torch_dtype)
        try:
            timesteps = read_json(path / "scheduler" / "scheduler_config.json").get("num_train_timesteps", 1000)
            if not isinstance(timesteps, int) or not 1 <= timesteps <= MAX_TIMESTEPS:
                raise ValueError(f"its scheduler has {timesteps} timesteps; 1 to {MAX_TIMESTEPS:,} are loaded")
            scheduler = _STORED[index["scheduler"][1]].from_pretrained(path / "scheduler")
            vae = load_vae(path / "vae", torch_dtype) if (path / "vae").is_dir() else None
            options = {name: index[name] for name in ("path", "guidance_channels") if name in index}
            return cls(model, scheduler, index.get("class_names", ()), index.get("training"), **options, vae=vae)
        except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"the checkpoint {path} cannot be loaded: {error}") from error

    def compile(self) -> None:
        """Compile the network: each batch size, and its double for guidance without a label, once and at length, then faster.

        On a GPU its passes are CUDA graphs. Images differ in their last digits.

        Raises:
            ValueError: there is no C++ compiler.
        """
        require_compiler()
        if self.model._compiled_call_impl is None:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
            self.model.compile(dynamic=False, mode="reduce-overhead" if self.device.type == "cuda" else None)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the model samples: an image, or what the VAE makes one of."""
        config = self.model.config
        return config.in_channels, config.image_size, config.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        if self.vae is None:
            return self.latent_shape
        edge = self.model.config.image_size * factor(self.vae)
        return self.vae.config.out_channels, edge, edge

    @property
    def is_flow(self) -> bool:
        """The model predicts a velocity; else it is a DDPM."""
        return isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler) or (
            self.scheduler.config.get("prediction_type") == "flow_prediction"
        )

    @property
    def samplers(self) -> tuple[str, ...]:
        """What `sampler` may be; the first is the pipeline's own."""
        own = {DDPMScheduler: "ddpm", FlowMatchHeunDiscreteScheduler: "heun"}.get(type(self.scheduler))
        return tuple(sorted(SAMPLERS if self.is_flow else DDPM_SAMPLERS, key=lambda name: name != own))

    @property
    def num_classes(self) -> int:
        """How many labels the model knows; 0 if it is unconditional."""
        return self.model.config.num_classes

    def noise(self, num_images: int, seed: int) -> Tensor:
        """Starting noise (N, C, H, W); image i has a generator of its own, seeded seed + i, on the CPU whatever the device."""
        return self._draw(self._generators(num_images, seed))

    def _generators(self, num_images: int, seed: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + i) for i in range(num_images)]

    def _draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])

    def decode(self, x: Tensor) -> Tensor:
        """What was sampled (N, C, H, W) -> images, float (N, C, H, W) in [-1, 1] but for overshoot; without a VAE they are the same."""
        return x if self.vae is None else to_images(self.vae, x)

    def glance(self, x: Tensor) -> Tensor:
        """As `decode`, but at once: latents become small images, one pixel a cell, in about the right colours."""
        return x if self.vae is None else to_small_images(x, self._colours)

    @cached_property
    def _colours(self) -> Tensor:
        return colours(self.vae)

    def __call__(
        self,
        num_images: int = 1,
        class_labels: int | Sequence[int] | None = None,
        seed: int = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guide: nn.Module | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["Pipeline", Step], None] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images. The first eight arguments are those of `steps`.

        Args:
            output_type: "pil", "np" (uint8 (N, H, W, C)) or "pt" (float (N, C, H, W), in [-1, 1] but for overshoot).
            callback_on_step_end: called as f(pipeline, step) after every network evaluation; an exception raised in it ends the
                sampling.

        Raises:
            ValueError: an argument out of range, a label that the model does not know, more images than memory.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"there is no output_type {output_type!r}; choose pil, np or pt")
        if output_type != "pt" and self.image_shape[0] not in (1, 3):
            raise ValueError(f"{self.image_shape[0]} channels are no picture but latents; give the pipeline a VAE, or take output_type pt")
        with self.progress_bar(total=num_inference_steps) as bar:
            for state in self.steps(num_images, class_labels, seed, num_inference_steps, guidance_scale, sampler, guidance_interval, guide):
                bar.total = state.num_steps
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, state)
        images = self.decode(state.x)
        images = images.clone() if output_type == "pt" else to_uint8(images)  # outside of inference mode: a tensor for any use
        if output_type == "pil":
            images = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.inference_mode()
    def steps(
        self,
        num_images: int = 1,
        class_labels: int | Sequence[int] | None = None,
        seed: int = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guide: nn.Module | None = None,
    ) -> Iterator[Step]:
        """Sample step by step: whoever iterates may watch, take turns between models, or leave.

        Args:
            num_images: how many; all run in one batch.
            class_labels: one label for all, or one for each image; None samples without a label.
            seed: image i comes from noise seeded seed + i, whatever the number of images or the model.
            num_inference_steps: steps of the sampler (Heun evaluates the network twice a step).
            guidance_scale: classifier-free guidance v = v_0 + scale * (v_label - v_0); 1 is none.
            sampler: one of `samplers`, or None for the pipeline's own scheduler.
            guidance_interval, guide: the times at which guidance acts, and a weaker network to guide by; see `models.guidance`.
        """
        labels = self.check(num_images, class_labels, seed, num_inference_steps, sampler)
        if self.device.type == "cpu":  # which would swap where a GPU answers at once; twice for guidance, 4 bytes a number
            require_memory(num_images * 2 * 4 * self.model.numbers_held, f"{num_images} images at once")
        guidance = Guidance(guidance_scale, guidance_interval, guide, self.config.guidance_channels)
        scheduler = self._scheduler(sampler)  # it has state: each sampling gets its own
        _set_steps(scheduler, num_inference_steps)
        predict = self._predict_flow if self.is_flow else self._predict_ddpm
        labels = labels if labels is None else labels.to(self.device)
        generators = self._generators(num_images, seed)
        options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}  # solvers that add noise
        x = self._draw(generators).to(self.device)
        for i, timestep in enumerate(scheduler.timesteps):
            output, preview = predict(x, i, scheduler, labels, guidance)
            x = scheduler.step(output, timestep, x, **options, return_dict=False)[0]
            yield Step(i + 1, len(scheduler.timesteps), x, preview)

    def _scheduler(self, sampler: str | None) -> Any:
        if sampler is None:
            return type(self.scheduler).from_config(self.scheduler.config)
        return SAMPLERS[sampler]() if self.is_flow else DDPM_SAMPLERS[sampler](self.scheduler.config)

    def _predict_flow(self, x: Tensor, i: int, scheduler: Any, labels: Tensor | None, guidance: Guidance) -> tuple[Tensor, Tensor]:
        """What the scheduler wants in step i, noise - data = d x / d sigma, and the preview."""
        path = self.config.path
        # all four schedulers evaluate step i at sigmas[i]; some round `timesteps` to integers
        sigma = scheduler.sigmas[i]  # on the host, as t is at first: nothing waits for a GPU
        x_t, t = from_sigma(x, sigma, path)
        time = t.item()
        t = torch.full((len(x),), time, dtype=t.dtype, device=x.device)
        output = guidance(self.model, x_t.to(self.model.dtype), t, labels, time, self.num_classes)
        data, noise = split(x_t, output[:, : x.shape[1]], t, path)
        return noise - data, data

    def _predict_ddpm(self, x: Tensor, i: int, scheduler: Any, labels: Tensor | None, guidance: Guidance) -> tuple[Tensor, Tensor]:
        """What the scheduler wants in step i, the network's own output, and the preview."""
        timestep = scheduler.timesteps[i]
        time = 1 - timestep.item() / scheduler.config.num_train_timesteps
        t = torch.full((len(x),), timestep.item(), dtype=timestep.dtype, device=x.device)
        output = guidance(self.model, x.to(self.model.dtype), t, labels, time, self.num_classes)
        prediction = output[:, : x.shape[1]]
        # the others keep the word in their config, and take no variance
        learned = isinstance(scheduler, DDPMScheduler) and "learned" in scheduler.config.variance_type
        alpha_bar = scheduler.alphas_cumprod[timestep.long().cpu()]
        preview = data_from_prediction(x, prediction, alpha_bar, scheduler.config.prediction_type)
        return output if learned else prediction, preview

    def check(self, num_images: int, class_labels: int | Sequence[int] | None, seed: int, steps: int, sampler: str | None) -> Tensor | None:
        """Validate what `steps` is to do; returns the labels (N,) or None. ValueError says what is wrong."""
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; ask for at least 1")
        if not 1 <= steps <= 1000:
            raise ValueError(f"num_inference_steps is {steps}; choose 1 to 1000")
        if not 0 <= seed <= MAX_SEED - num_images:
            raise ValueError(f"seed is {seed}; choose 0 to {MAX_SEED - num_images}")
        if sampler is not None and sampler not in self.samplers:
            raise ValueError(f"there is no sampler {sampler!r} for this checkpoint; choose from {', '.join(self.samplers)}")
        ddim = sampler == "ddim" or (sampler is None and isinstance(self.scheduler, DDIMScheduler))
        if ddim and steps > 100 and 1000 % steps:  # its steps are whole timesteps, and many rounded ones end far from the data
            raise ValueError(f"num_inference_steps is {steps}; with ddim choose at most 100, 125, 200, 250, 500 or 1000, or take dpm++")
        if class_labels is None:
            return None
        if not self.num_classes:
            raise ValueError("this checkpoint is unconditional; leave the label away")
        labels = torch.as_tensor(class_labels)
        labels = labels.expand(num_images) if labels.ndim == 0 else labels
        if len(labels) != num_images:
            raise ValueError(f"there are {len(labels)} labels for {num_images} images; give one, or one for each image")
        unknown = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(unknown):
            raise ValueError(f"label {unknown[0].item()} is out of range; this checkpoint knows 0 to {self.num_classes - 1}")
        return labels


def _set_steps(scheduler: Any, steps: int) -> None:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # its own spacing ends at sigma = 0.001 and spends the last step on nothing
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        scheduler.sigma_min = scheduler.sigma_max / steps  # as above
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # so that it does not search for the timestep, on the host, in every step


def to_uint8(x: Tensor) -> np.ndarray:
    """Float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clipped."""
    return x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
