"""Guidance: push a prediction away from a weaker one. Without a label, by a weaker checkpoint, and in a part of the time only."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Guidance:
    """v = v_weak + scale * (v - v_weak).

    Attributes:
        scale: 1 is none.
        interval: the times, 0 noise and 1 data, between which it acts (arXiv 2404.07724); elsewhere the network is asked alone.
        guide: a weaker network of the same kind, asked with the same label (autoguidance, arXiv 2406.02507); None asks the network
            itself without a label (classifier-free guidance, arXiv 2207.12598).
        channels: it moves the first so many channels alone; None moves all.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    guide: nn.Module | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= self.scale <= 100:
            raise ValueError(f"guidance_scale is {self.scale}; choose 0 to 100, 1 for none")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the guidance interval is {low} to {high}; choose two times in [0, 1], 0 noise and 1 data, the smaller first")

    def acts(self, time: float, labels: Tensor | None) -> bool:
        """Whether there is anything to do at this time."""
        return self.scale != 1 and self.interval[0] <= time <= self.interval[1] and (self.guide is not None or labels is not None)

    def __call__(self, model: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, time: float, num_classes: int) -> Tensor:
        """The guided output of a network, float32.

        Args:
            model: predicts from (x, t, labels); may predict more channels than x has (a learned variance), which follow the label.
            x, t, labels: (N, C, H, W), (N,) as the network takes it, (N,) or None.
            time: the same for all, in [0, 1].
            num_classes: the label that stands for none.
        """
        if not self.acts(time, labels):
            return model(x, t, labels).to(torch.float32, copy=True)  # what a CUDA graph gives is overwritten by its next run
        if self.guide is not None:
            strong, weak = model(x, t, labels).float(), self.guide(x.to(self.guide.dtype), t, labels).float()
        else:
            both = torch.cat([labels, torch.full_like(labels, num_classes)])  # in one batch
            strong, weak = model(x.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        moved = self.channels or x.shape[1]
        guided = weak[:, :moved] + self.scale * (strong[:, :moved] - weak[:, :moved])
        return guided if moved == strong.shape[1] else torch.cat([guided, strong[:, moved:]], dim=1)
