"""Fréchet distance between two Gaussians, the last step of FID and its kin (arXiv 1706.08500, equation 6)."""

import numpy as np
import torch


def mean_and_covariance(features: np.ndarray | torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: not a matrix, fewer than two rows, numbers that are not finite.
    """
    features = np.asarray(features.detach().cpu() if isinstance(features, torch.Tensor) else features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have the shape {features.shape}; a covariance needs (N, D) with N at least 2")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinite numbers")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^1/2), in float64.

    The last trace is the sum of the singular values of sigma1^1/2 sigma2^1/2 (Dowson and Landau, 1982), whose factors come from
    two symmetric eigenproblems. That needs no root of a matrix that is not symmetric, and keeps full precision where N < D makes
    both covariances singular.

    Args:
        mu1, mu2: means (D,).
        sigma1, sigma2: covariances (D, D), symmetric and positive semidefinite.

    Returns:
        At least 0; in squared units of the features.

    Raises:
        ValueError: shapes that do not fit together, numbers that are not finite.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(value, np.float64) for value in (mu1, mu2, sigma1, sigma2))
    dim = mu1.size
    if mu1.shape != (dim,) or mu2.shape != (dim,) or sigma1.shape != (dim, dim) or sigma2.shape != (dim, dim):
        shapes = f"{mu1.shape} {sigma1.shape} and {mu2.shape} {sigma2.shape}"
        raise ValueError(f"means and covariances have the shapes {shapes}; both sides need (D,) and (D, D) with the same D")
    if not all(np.isfinite(value).all() for value in (mu1, mu2, sigma1, sigma2)):
        raise ValueError("means or covariances hold NaN or infinite numbers")
    difference = mu1 - mu2
    trace_of_root = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    return max(0.0, float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root))


def _root(sigma: np.ndarray) -> np.ndarray:
    """(D, R) with root @ root.T = sigma, of its rank R: eigenvalues that are rounding errors are left out."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept])
