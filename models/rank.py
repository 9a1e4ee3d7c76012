"""Effective rank of features: the paper's measure of how abstract a representation is (arXiv 2404.10947; Roy and Vetterli, 2007)."""

import numpy as np
import torch


def effective_rank(features: np.ndarray | torch.Tensor) -> float:
    """rho = -sum_i s_i log s_i over the singular values of the features, normalised to sum 1; natural logarithm.

    This is the paper's entropy, not its exponential. The features are not centred.

    Args:
        features: (N, D), any real type; computed in float64.

    Returns:
        Between 0 (rank one) and log(min(N, D)) (all singular values equal).

    Raises:
        ValueError: not a matrix, numbers that are not finite, nothing but zeros.
    """
    return spectral_entropy(singular_values(features))


def singular_values(features: np.ndarray | torch.Tensor) -> np.ndarray:
    """Of features (N, D), not centred, in float64, the largest first; raises as `effective_rank`."""
    features = np.asarray(features.detach().cpu() if isinstance(features, torch.Tensor) else features, np.float64)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(f"features have the shape {features.shape}; give (N, D)")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinite numbers")
    values = np.linalg.svd(features, compute_uv=False)
    if values[0] == 0:
        raise ValueError("all features are 0; their rank says nothing")
    return values


def spectral_entropy(values: np.ndarray) -> float:
    """rho of singular values."""
    shares = values[values > 0] / values.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))
