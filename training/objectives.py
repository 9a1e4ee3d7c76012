"""Training objectives: `(model, batch, generator) -> loss`.

A batch is a dict of `images`, float in [-1, 1] (N, C, H, W) or latents, and `labels`, int64 (N,) or absent. All randomness comes
from the generator, so a step can be repeated. `inputs` draws what the model is given, its positional arguments first; `bottleneck`
says which of so many blocks is the most abstract.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from models.paths import interpolate, velocity

TIME_DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "uniform": torch.rand,
    "logit-normal": lambda *size, **options: torch.randn(*size, **options).sigmoid(),  # arXiv 2403.03206 eq. 19, m = 0, s = 1
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
DDPM_TIMESTEPS = 1000


class Diffusion:
    """What the two objectives for images share: labels that are dropped, and a regression.

    Args:
        num_classes: of the model; the label `num_classes` means "no label".
        class_dropout: share of labels replaced by "no label", for classifier-free guidance (arXiv 2207.12598).

    Attributes:
        path: of `models.paths.PATHS`, for the pipeline.
        scheduler: what the pipeline samples with.
    """

    path = "linear"
    scheduler: Any

    def __init__(self, num_classes: int = 0, class_dropout: float = 0.1) -> None:
        self.num_classes, self.class_dropout = num_classes, class_dropout

    def draw(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Noisy data (N, C, H, W), times (N,), target (N, C, H, W), and weights (N,) or None."""
        raise NotImplementedError

    def inputs(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
        """Draw times, noise and dropped labels; returns the model's arguments (x_t, t, labels), the target and the weights."""
        data = batch["images"]
        x_t, t, target, weights = self.draw(data, generator)
        if not self.num_classes:
            return (x_t, t), target, weights
        dropped = torch.rand(len(data), device=data.device, generator=generator) < self.class_dropout
        return (x_t, t, batch["labels"].masked_fill(dropped, self.num_classes)), target, weights

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        arguments, target, weights = self.inputs(batch, generator)
        prediction = model(*arguments)[:, : target.shape[1]]  # a learned variance is left to itself
        error = (prediction.float() - target).square()
        return error.mean() if weights is None else (weights * error.mean((1, 2, 3))).mean()

    @staticmethod
    def bottleneck(num_blocks: int) -> int:
        """The middle block; of an even number the last one of the encoder."""
        return (num_blocks - 1) // 2


class FlowMatching(Diffusion):
    """E || v(x_t, t) - d x_t / d t ||^2 (conditional flow matching, arXiv 2210.02747 eq. 9; SiT, arXiv 2401.08740).

    Args:
        path: "linear" or "gvp".
        time_distribution: of t in [0, 1]: "uniform" or "logit-normal".
        others: see `Diffusion`.
    """

    def __init__(self, num_classes: int = 0, class_dropout: float = 0.1, path: str = "linear", time_distribution: str = "uniform") -> None:
        super().__init__(num_classes, class_dropout)
        self.path, self.draw_times = path, TIME_DISTRIBUTIONS[time_distribution]
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def draw(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, None]:
        t = self.draw_times(len(data), device=data.device, generator=generator)
        noise = torch.randn(data.shape, device=data.device, generator=generator)
        return interpolate(data, noise, t, self.path), t, velocity(data, noise, t, self.path), None


class DDPM(Diffusion):
    """E w_t || prediction - target ||^2 over 1000 timesteps (arXiv 2006.11239 eq. 14: w = 1 for the noise).

    The network is given the timestep itself, 0 (data) to 999 (noise).

    Args:
        prediction_type: "epsilon" (the noise), "v_prediction" or "sample" (the data); see `data_from_prediction`.
        beta_schedule: of diffusers' `DDPMScheduler`: "linear" (DDPM, DiT), "scaled_linear" (Stable Diffusion, U-ViT) or
            "squaredcos_cap_v2" (arXiv 2102.09672 eq. 17).
        snr_gamma: weigh as min(SNR, gamma) would weigh the data (arXiv 2303.09556); None weighs all alike.
        clip: data lie in [-1, 1], so sampling may clip to it; latents do not.
        others: see `Diffusion`.
    """

    def __init__(
        self,
        num_classes: int = 0,
        class_dropout: float = 0.1,
        prediction_type: str = "epsilon",
        beta_schedule: str = "linear",
        snr_gamma: float | None = None,
        clip: bool = True,
    ) -> None:
        super().__init__(num_classes, class_dropout)
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma is {snr_gamma}; it must be above 0, such as 5")
        first, last = (0.00085, 0.012) if beta_schedule == "scaled_linear" else (1e-4, 0.02)
        if beta_schedule == "squaredcos_cap_v2" and prediction_type == "epsilon" and not clip:
            raise ValueError(
                "the last timestep of beta_schedule squaredcos_cap_v2 is all noise, from which an error in epsilon is blown up "
                "20,000 times, and latents cannot be clipped; take --prediction_type v_prediction, or another --beta_schedule"
            )
        self.noising = DDPMScheduler(
            # by name: diffusers forgets what is given by position when another scheduler is made from the config
            num_train_timesteps=DDPM_TIMESTEPS,
            beta_start=first,
            beta_end=last,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            clip_sample=clip,
            timestep_spacing="trailing",  # few steps begin where training did: at the last timestep (arXiv 2305.08891)
        )
        self.scheduler = DDIMScheduler.from_config(self.noising.config)
        self.prediction_type, self.snr_gamma = prediction_type, snr_gamma

    def draw(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        timesteps = torch.randint(DDPM_TIMESTEPS, (len(data),), device=data.device, generator=generator)
        noise = torch.randn(data.shape, device=data.device, generator=generator)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: data,
            "v_prediction": lambda: self.noising.get_velocity(data, noise, timesteps),
        }[self.prediction_type]()
        return self.noising.add_noise(data, noise, timesteps), timesteps, target, self.weights(timesteps)

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """min-SNR-gamma: min(SNR, gamma) on the data's error is this on the prediction's."""
        if self.snr_gamma is None:
            return None
        alpha_bar = self.noising.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        return snr.clamp(max=self.snr_gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[self.prediction_type]


class MaskedAutoencoding:
    """The error of hidden patches that are predicted from the visible ones (arXiv 2111.06377); the model computes it.

    Args:
        num_patches: of an image.
        mask_ratio: share of the patches that are hidden.
    """

    def __init__(self, num_patches: int, mask_ratio: float = 0.75) -> None:
        self.num_patches, self.mask_ratio = num_patches, mask_ratio

    def inputs(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[tuple[Tensor, Tensor, float]]:
        """Draw the noise (N, T) that decides the mask; returns the model's arguments (images, noise, mask_ratio)."""
        images = batch["images"]
        noise = torch.rand(len(images), self.num_patches, device=images.device, generator=generator)
        return ((images, noise, self.mask_ratio),)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        (arguments,) = self.inputs(batch, generator)
        return model(*arguments).loss

    @staticmethod
    def bottleneck(num_blocks: int) -> int:
        """The last block: features are those of the encoder alone."""
        return num_blocks - 1


OBJECTIVES: dict[str, type[Diffusion]] = {"flow": FlowMatching, "ddpm": DDPM}


def create_objective(name: str, **options: Any) -> Diffusion:
    """The objective of that name; options that are None are left to its defaults.

    Raises:
        ValueError: an option that the objective does not have.
    """
    given = {key: value for key, value in options.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(OBJECTIVES[name]).parameters)
    if unknown:
        raise ValueError(f"the objective {name} has no --{', --'.join(unknown)}; leave that away or choose another objective")
    return OBJECTIVES[name](**given)
