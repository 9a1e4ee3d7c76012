"""Training objectives: `(model, batch, generator) -> loss, logs`.

A batch is a dict of `images`, float in [-1, 1] (N, C, H, W), and `labels`, int64 (N,) or absent. All randomness comes from the
generator, so a step can be repeated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.paths import interpolate, velocity


@dataclass(frozen=True)
class FlowMatching:
    """E || v(x_t, t) - (data - noise) ||^2 with t uniform in [0, 1] (arXiv 2210.02747 eq. 23; SiT).

    Attributes:
        num_classes: of the model; the label `num_classes` means "no label".
        class_dropout: share of labels replaced by "no label", for classifier-free guidance.
    """

    num_classes: int = 0
    class_dropout: float = 0.1

    def inputs(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        """Draw times, noise and dropped labels; returns the model's arguments (x_t, t, labels) and the target."""
        data = batch["images"]
        t = torch.rand(len(data), device=data.device, generator=generator)
        noise = torch.randn(data.shape, device=data.device, generator=generator)
        arguments = (interpolate(data, noise, t), t)
        if self.num_classes:
            dropped = torch.rand(len(data), device=data.device, generator=generator) < self.class_dropout
            arguments += (batch["labels"].masked_fill(dropped, self.num_classes),)
        return arguments, velocity(data, noise)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        arguments, target = self.inputs(batch, generator)
        loss = (model(*arguments).float() - target).square().mean()
        return loss, {"loss": loss.detach()}
