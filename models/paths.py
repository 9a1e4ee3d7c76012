"""Interpolation between noise and data, and what a network may predict on the way. The direction of time is stated here, once:

    t = 0 is noise, t = 1 is data.

diffusers counts the other way round: its flow schedulers' sigma is the share of noise, and a DDPM's timestep grows with it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Path(NamedTuple):
    """x_t = data_weight(t) * data + noise_weight(t) * noise, and the derivatives of the two weights."""

    data_weight: Callable[[Tensor], Tensor]
    noise_weight: Callable[[Tensor], Tensor]
    data_rate: Callable[[Tensor], Tensor]
    noise_rate: Callable[[Tensor], Tensor]


_QUARTER = math.pi / 2
PATHS: dict[str, Path] = {
    # rectified flow, arXiv 2209.03003; SiT, arXiv 2401.08740 section 2
    "linear": Path(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t)),
    # generalised variance preserving, arXiv 2209.15571; SiT
    "gvp": Path(
        lambda t: torch.sin(_QUARTER * t),
        lambda t: torch.cos(_QUARTER * t),
        lambda t: _QUARTER * torch.cos(_QUARTER * t),
        lambda t: -_QUARTER * torch.sin(_QUARTER * t),
    ),
}


def interpolate(data: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """x_t, the point of the path at time t; t is (N,) or has no dimensions."""
    t = _like(t, data)
    return PATHS[path].data_weight(t) * data + PATHS[path].noise_weight(t) * noise


def velocity(data: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """v = d x_t / d t; on the linear path data - noise, whatever t."""
    if path == "linear":
        return data - noise
    t = _like(t, data)
    return PATHS[path].data_rate(t) * data + PATHS[path].noise_rate(t) * noise


def split(x_t: Tensor, v: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """The data and the noise that a velocity points at: x_t and v are two equations for them."""
    t = _like(t, x_t)
    a, b, a_rate, b_rate = (weight(t) for weight in PATHS[path])
    determinant = a * b_rate - a_rate * b  # -1 on the linear path, -pi / 2 on gvp: never zero
    return (b_rate * x_t - b * v) / determinant, (a * v - a_rate * x_t) / determinant


def from_sigma(x: Tensor, sigma: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """A point (1 - sigma) * data + sigma * noise, where diffusers' flow schedulers are -> the point x_t with the same
    proportion of data and noise on our path, and its t. So every path is sampled by every solver of the linear one."""
    if path == "linear":
        return x, 1 - sigma
    t = torch.atan2(1 - sigma, sigma) / _QUARTER
    return x * (PATHS[path].data_weight(t) + PATHS[path].noise_weight(t)), t


def data_from_prediction(x: Tensor, prediction: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The data that a DDPM's network points at; x = sqrt(alpha_bar) * data + sqrt(1 - alpha_bar) * noise.

    Args:
        prediction: of the noise ("epsilon", arXiv 2006.11239 eq. 15), the data ("sample") or
            v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * data ("v_prediction", arXiv 2202.00512 appendix D).
        alpha_bar: product of 1 - beta up to this timestep.
    """
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (x - spread * prediction) / signal
    return signal * x - spread * prediction if prediction_type == "v_prediction" else prediction


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t
