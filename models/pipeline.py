"""Noise -> images: a diffusers pipeline over flow paths, with one seed for every image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.compat import import_torchvision

import_torchvision()

from diffusers import (  # noqa: E402
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    UniPCMultistepScheduler,
)

from models.files import INDEX, read_json, require_memory  # noqa: E402
from models.paths import data_from_velocity, noise_velocity, time_from_sigma  # noqa: E402
from models.registry import backbone_class  # noqa: E402

_FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
SAMPLERS: dict[str, Callable[[], Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,  # two network evaluations a step, one in the last
    "dpm++": lambda: DPMSolverMultistepScheduler(**_FLOW),
    "unipc": lambda: UniPCMultistepScheduler(**_FLOW),
}
MAX_SEED = 2**63 - 1


class Step(NamedTuple):
    """The state of a sampling after a network evaluation.

    Attributes:
        step: evaluations done, from 1.
        num_steps: evaluations in all.
        x: float (N, C, H, W); after the last step the images, in [-1, 1] but for overshoot.
        preview: float (N, C, H, W), the images that the velocity points at.
    """

    step: int
    num_steps: int
    x: Tensor
    preview: Tensor


class Pipeline(DiffusionPipeline):
    """Sample images from a velocity model.

    Args:
        model: predicts the velocity from (x, t, labels), such as `models.dit.DiT`.
        scheduler: a diffusers flow-matching scheduler; `sampler=` of a call replaces it for that call.
        class_names: names of the labels, in order.
        training: what the checkpoint went through (steps, images seen, data), for cards and protocols.
    """

    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        class_names: Sequence[str] = (),
        training: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names), training=training or {})
        self.set_progress_bar_config(leave=False, disable=None)

    @classmethod
    def from_pretrained(cls, path: str | Path, ema: bool = True, torch_dtype: torch.dtype = torch.float32) -> "Pipeline":
        """Load a run or a shipped checkpoint.

        Args:
            path: a folder with `model_index.json` beside `model/`, and `ema/` where there are averaged weights.
            ema: prefer the averaged weights.
            torch_dtype: of the parameters.

        Raises:
            ValueError: not such a folder, or its weights do not fit its config.
        """
        path = Path(path)
        if not (path / INDEX).is_file():
            hint = "; its first checkpoint is not written yet" if (path / "config.json").is_file() else ""
            raise ValueError(f"{path} is not a checkpoint: it holds no {INDEX}{hint}; give the folder of a run or of a shipped checkpoint")
        index = read_json(path / INDEX)
        folder = path / ("ema" if ema and (path / "ema").is_dir() else "model")
        try:
            model = backbone_class(index["model"][1]).from_pretrained(folder, torch_dtype=torch_dtype)
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the checkpoint {path} cannot be loaded: {error}") from error
        return cls(model.eval(), scheduler, index.get("class_names", ()), index.get("training"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        config = self.model.config
        return config.in_channels, config.image_size, config.image_size

    @property
    def num_classes(self) -> int:
        """How many labels the model knows; 0 if it is unconditional."""
        return self.model.config.num_classes

    def noise(self, num_images: int, seed: int) -> Tensor:
        """Starting noise (N, C, H, W); image i has a generator of its own, seeded seed + i, on the CPU whatever the device."""
        generators = (torch.Generator().manual_seed(seed + i) for i in range(num_images))
        return torch.stack([torch.randn(self.image_shape, generator=generator) for generator in generators])

    def __call__(
        self,
        num_images: int = 1,
        class_labels: int | Sequence[int] | None = None,
        seed: int = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["Pipeline", Step], None] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images. The first six arguments are those of `steps`.

        Args:
            output_type: "pil", "np" (uint8 (N, H, W, C)) or "pt" (float (N, C, H, W), in [-1, 1] but for overshoot).
            callback_on_step_end: called as f(pipeline, step) after every network evaluation; an exception raised in it ends the
                sampling.

        Raises:
            ValueError: an argument out of range, a label that the model does not know, more images than memory.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"there is no output_type {output_type!r}; choose pil, np or pt")
        with self.progress_bar(total=num_inference_steps) as bar:
            for state in self.steps(num_images, class_labels, seed, num_inference_steps, guidance_scale, sampler):
                bar.total = state.num_steps
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, state)
        images = state.x if output_type == "pt" else to_uint8(state.x)
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
    ) -> Iterator[Step]:
        """Sample step by step: whoever iterates may watch, take turns between models, or leave.

        Args:
            num_images: how many; all run in one batch.
            class_labels: one label for all, or one for each image; None samples without a label.
            seed: image i comes from noise seeded seed + i, whatever the number of images or the model.
            num_inference_steps: steps of the sampler (Heun evaluates the network twice a step).
            guidance_scale: classifier-free guidance v = v_0 + scale * (v_label - v_0); 1 is none.
            sampler: a key of `SAMPLERS`, or None for the pipeline's own scheduler.
        """
        labels = self._check(num_images, class_labels, seed, num_inference_steps, guidance_scale, sampler)
        # a scheduler has state: each sampling gets its own
        scheduler = SAMPLERS[sampler]() if sampler else type(self.scheduler).from_config(self.scheduler.config)
        _set_steps(scheduler, num_inference_steps)
        guided = guidance_scale != 1 and labels is not None
        if labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)]) if guided else labels
            labels = labels.to(self.device)

        x = self.noise(num_images, seed).to(self.device)
        for i, timestep in enumerate(scheduler.timesteps):
            # all four schedulers evaluate step i at sigmas[i]; some round `timesteps` to integers
            t = time_from_sigma(scheduler.sigmas[i]).to(self.device).expand(num_images)
            v = self._velocity(x.to(self.model.dtype), t, labels, guidance_scale if guided else 1.0).float()
            preview = data_from_velocity(x, v, t)
            x = scheduler.step(noise_velocity(v), timestep, x, return_dict=False)[0]
            yield Step(i + 1, len(scheduler.timesteps), x, preview)

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598), both passes in one batch."""
        if guidance_scale == 1:
            return self.model(x, t, labels)
        with_label, without = self.model(x.repeat(2, 1, 1, 1), t.repeat(2), labels).chunk(2)
        return without + guidance_scale * (with_label - without)

    def _check(
        self,
        num_images: int,
        class_labels: int | Sequence[int] | None,
        seed: int,
        steps: int,
        guidance_scale: float,
        sampler: str | None,
    ) -> Tensor | None:
        """Validate a call; returns the labels (N,) or None."""
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; ask for at least 1")
        if not 1 <= steps <= 1000:
            raise ValueError(f"num_inference_steps is {steps}; choose 1 to 1000")
        if not 0 <= seed <= MAX_SEED - num_images:
            raise ValueError(f"seed is {seed}; choose 0 to {MAX_SEED - num_images}")
        if not 0 <= guidance_scale <= 100:
            raise ValueError(f"guidance_scale is {guidance_scale}; choose 0 to 100, 1 for none")
        if sampler is not None and sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
        config = self.model.config
        if self.device.type == "cpu":  # which would swap where a GPU answers at once
            # activations of a block (about 16 widths a token, twice for guidance) and what the long skips keep
            tokens = (config.image_size // config.patch_size) ** 2
            require_memory(num_images * 2 * 4 * tokens * config.dim * (16 + config.depth), f"{num_images} images at once")
        if class_labels is None:
            return None
        if not self.num_classes:
            raise ValueError("this checkpoint is unconditional; leave the label away")
        labels = torch.tensor([class_labels] * num_images if isinstance(class_labels, int) else list(class_labels))
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
    else:
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)


def to_uint8(x: Tensor) -> np.ndarray:
    """Float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clipped."""
    return x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
