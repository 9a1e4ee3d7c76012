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
    mu1, sigma1, mu2, sigma2 = _checked(mu1, sigma1, mu2, sigma2)
    singular_values = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False)
    return _distance(mu1, np.trace(sigma1), mu2, np.trace(sigma2), singular_values.sum())


def frechet_influence(features: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> tuple[float, np.ndarray]:
    """The distance of features to a fixed Gaussian, and how much every one of them moves it (its influence function, Hampel 1974).

    The distance is a smooth function of mean and covariance, so its derivative towards one sample x is, with c = x - mu1,
    2 (mu1 - mu2).c + c.(1 - T)c - mean, where T = sigma1^-1/2 (sigma1^1/2 sigma2 sigma1^1/2)^1/2 sigma1^-1/2 is the map that
    transports the first Gaussian to the second.

    Args:
        features: (N, D).
        mu2, sigma2: of the reference, taken as known.

    Returns:
        The distance; and the influences (N,), of mean 0, whose standard deviation over sqrt(N) is that of the distance (the
        infinitesimal jackknife, Efron 1982; where N is not far above D it is up to 1.6 times too wide).
    """
    mu1, sigma1, mu2, sigma2 = _checked(*mean_and_covariance(features), mu2, sigma2)
    values, vectors = _eigenpairs(sigma1)
    turned, singular_values, _ = np.linalg.svd((vectors * np.sqrt(values)).T @ _root(sigma2), full_matrices=False)
    value = _distance(mu1, np.trace(sigma1), mu2, np.trace(sigma2), singular_values.sum())
    centred = np.asarray(features, np.float64) - mu1  # (N, D)
    whitened = centred @ (vectors / np.sqrt(values)) @ turned  # (N, R): c.T c = sum of singular values * whitened^2
    influence = 2 * centred @ (mu1 - mu2) + (centred**2).sum(1) - whitened**2 @ singular_values
    return value, influence - influence.mean()


def frechet_infinity(
    features: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, points: int = 15, least: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """The distance that infinitely many samples would have (arXiv 1911.07023): it falls as 1 / N, so follow that line to 0.

    Args:
        features: (N, D), N above D.
        mu2, sigma2: of the reference; what its own size adds stays.
        points: distances of so many random subsets, of sizes evenly spaced up to N, make the line.
        least: size of the smallest; N / 4, but at least D, unless given.
        seed: of the subsets.

    Returns:
        The extrapolated distance, which may be below 0, and the standard error of the fit.
    """
    num, dim = features.shape
    least = least or max(num // 4, min(dim, num // 2))
    _, _, mu2, sigma2 = _checked(mu2, sigma2, mu2, sigma2)
    root, random = _root(sigma2), np.random.default_rng(seed)
    inverse, distances = [], []
    for size in np.linspace(least, num, points).astype(int):
        mu, sigma = mean_and_covariance(features[random.permutation(num)[:size]])
        squares = np.linalg.eigvalsh(root.T @ sigma @ root)  # of the singular values above: less exact near 0, and three times as fast
        inverse.append(1 / size)
        distances.append(_distance(mu, np.trace(sigma), mu2, np.trace(sigma2), np.sqrt(squares.clip(0)).sum()))
    (_, intercept), covariance = np.polyfit(inverse, distances, 1, cov=True)
    return float(intercept), float(np.sqrt(covariance[1, 1]))


def _checked(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> list[np.ndarray]:
    """All in float64, or ValueError."""
    checked = [np.asarray(value, np.float64) for value in (mu1, sigma1, mu2, sigma2)]
    shapes, dim = [value.shape for value in checked], checked[0].size
    if shapes != [(dim,), (dim, dim)] * 2:
        listed = "{} {} and {} {}".format(*shapes)
        raise ValueError(f"means and covariances have the shapes {listed}; both sides need (D,) and (D, D) with the same D")
    if not all(np.isfinite(value).all() for value in checked):
        raise ValueError("means or covariances hold NaN or infinite numbers")
    return checked


def _distance(mu1: np.ndarray, trace1: float, mu2: np.ndarray, trace2: float, trace_of_root: float) -> float:
    difference = mu1 - mu2
    return max(0.0, float(difference @ difference + trace1 + trace2 - 2 * trace_of_root))


def _root(sigma: np.ndarray) -> np.ndarray:
    """(D, R) with root @ root.T = sigma, of its rank R."""
    values, vectors = _eigenpairs(sigma)
    return vectors * np.sqrt(values)


def _eigenpairs(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (R,) and eigenvectors (D, R); eigenvalues that are rounding errors are left out."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return values[kept], vectors[:, kept]
