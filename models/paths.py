"""Interpolation between noise and data. The direction of time is stated here, once:

    t = 0 is noise, t = 1 is data.

diffusers counts the other way round: its sigma is the share of noise, sigma = 1 - t.
"""

from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t * data + (1 - t) * noise, the linear path (rectified flow, arXiv 2209.03003; SiT, arXiv 2401.08740 eq. 1)."""
    t = _like(t, data)
    return t * data + (1 - t) * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """v = d x_t / d t = data - noise."""
    return data - noise


def data_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data that a velocity points at: x_t + (1 - t) * v."""
    return x_t + (1 - _like(t, x_t)) * v


def time_from_sigma(sigma: Tensor) -> Tensor:
    """Our time for a diffusers sigma."""
    return 1 - sigma


def noise_velocity(v: Tensor) -> Tensor:
    """Our velocity in the direction in which diffusers' schedulers integrate: d x / d sigma = noise - data."""
    return -v


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t
