"""Exponential moving average of parameters."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.sharding import copy_whole, gathered, local


class EMA:
    """theta_ema <- d * theta_ema + (1 - d) * theta, with warm-up d = min(decay, (1 + step) / (10 + step)).

    All tensors at once (foreach), in float32, beside the model, and sharded as it is. With a decay of 0 nothing is kept: the average
    is the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.averages = [parameter.detach().clone().float() for parameter in parameters] if decay else []

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """Take in the parameters after optimizer step `step` (counted from 1)."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        parts = [local(parameter.detach()).float() for parameter in parameters]
        torch._foreach_lerp_([local(average) for average in self.averages], parts, 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite parameters with the averages."""
        if not self.decay:
            return
        for parameter, average in zip(parameters, self.averages, strict=True):
            parameter.copy_(average)

    def whole(self, keep: bool) -> "EMA":
        """The same with whole averages, which only those processes get that keep them; every process calls this."""
        same = EMA([], self.decay)
        same.averages = [gathered(average, keep) for average in self.averages]
        return same

    def state_dict(self) -> dict[str, Any]:
        keep = not dist.is_initialized() or dist.get_rank() == 0  # the process that writes them
        return {"averages": self.whole(keep).averages}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            copy_whole(average, saved)
