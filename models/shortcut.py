"""Decayed residual shortcuts: the equation, its schedule and the depth rule (arXiv 2404.10947).

    x_{l+1} = alpha_l * x_l + f_l(x_l),      alpha_eff = prod_l alpha_l

One alpha for every sub-layer, in the order of execution: attention of block 0, MLP of block 0, attention of block 1, ...
Only the identity path is scaled, never the branch f.
"""

import math

import torch
from torch import Tensor

# Section "depth rule" of the paper: the share of the input that should reach the last layer, and below which alpha_min
# training was unstable whatever the depth.
ALPHA_EFF_WINDOW = (1e-3, 1e-2)
UNSTABLE_BELOW = 0.4


def decayed_add(x: Tensor, branch: Tensor, alpha: float) -> Tensor:
    """x_{l+1} = alpha_l * x_l + f_l(x_l) in one kernel.

    Args:
        x: the shortcut, any shape.
        branch: f_l(x_l), same shape.
        alpha: share of x that is kept; 1 is the plain residual, bit for bit.
    """
    return torch.add(branch, x, alpha=alpha)


def linear_schedule(num_sublayers: int, alpha_min: float) -> tuple[float, ...]:
    """alpha_l = 1 - delta * l, from exactly 1 in the first sub-layer to exactly alpha_min in the last.

    Args:
        num_sublayers: how many shortcuts there are (2 for each transformer block), at least 1.
        alpha_min: in (0, 1].

    Raises:
        ValueError: a count below 1 or an alpha_min outside (0, 1].
    """
    _check(num_sublayers)
    if not 0 < alpha_min <= 1:
        raise ValueError(f"alpha_min is {alpha_min}; it must lie in (0, 1], and 1 is the plain network")
    if num_sublayers == 1:
        return (float(alpha_min),)
    delta = (1 - alpha_min) / (num_sublayers - 1)
    return (*(1 - delta * layer for layer in range(num_sublayers - 1)), float(alpha_min))


def effective_alpha(alphas: tuple[float, ...]) -> float:
    """alpha_eff = prod_l alpha_l, the share of the input that reaches the last layer."""
    return math.prod(alphas)


def alpha_min_for(num_sublayers: int, effective: float = 3e-3) -> float:
    """The alpha_min whose linear schedule over `num_sublayers` has alpha_eff = `effective`.

    Raises:
        ValueError: fewer than 2 sub-layers (the first one always has alpha = 1) or `effective` outside (0, 1].
    """
    _check(num_sublayers, least=2)
    if not 0 < effective <= 1:
        raise ValueError(f"alpha_eff is {effective}; it must lie in (0, 1]")
    low, high = 0.0, 1.0  # alpha_eff rises with alpha_min: bisect down to the last bit
    while low < (middle := (low + high) / 2) < high:
        if effective_alpha(linear_schedule(num_sublayers, middle)) < effective:
            low = middle
        else:
            high = middle
    return high


def alpha_window(num_sublayers: int) -> tuple[float, float]:
    """The range of alpha_min that the depth rule advises: alpha_eff in [1e-3, 1e-2)."""
    low, high = ALPHA_EFF_WINDOW
    return alpha_min_for(num_sublayers, low), alpha_min_for(num_sublayers, high)


def _check(num_sublayers: int, least: int = 1) -> None:
    if num_sublayers < least:
        raise ValueError(f"num_sublayers is {num_sublayers}; the schedule needs at least {least}")
