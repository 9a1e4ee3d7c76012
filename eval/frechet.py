"""Fréchet distance between two Gaussians, the last step of FID and its kin (arXiv 1706.08500, equation 6)."""

import numpy as np
import torch
from scipy.linalg import lapack, solve_triangular

INFINITY_SAMPLES = 4  # for every feature, before a distance is extrapolated


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

    With sigma1 = L L^T the last trace is the sum of the roots of the eigenvalues of L^T sigma2 L, which is symmetric. L comes from a
    Cholesky decomposition whose pivots grade that matrix from large to small, and so its small eigenvalues come out exact too: a set
    is at 0 from itself to 1e-11 of its trace, also where N < D makes both covariances singular.

    Args:
        mu1, mu2: means (D,).
        sigma1, sigma2: covariances (D, D), symmetric and positive semidefinite.

    Returns:
        At least 0; in squared units of the features.

    Raises:
        ValueError: shapes that do not fit together, numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = _checked(mu1, sigma1, mu2, sigma2)
    inner = _inner(*_root(sigma1), sigma2)
    return _distance(mu1, np.trace(sigma1), mu2, np.trace(sigma2), _eigenvalues(inner))


def frechet_influence(features: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> tuple[float, np.ndarray]:
    """The distance of features to a fixed Gaussian, and how much every one of them moves it (its influence function, Hampel 1974).

    The distance is a smooth function of mean and covariance, so its derivative towards one sample x is, with c = x - mu1,
    2 (mu1 - mu2).c + c.(1 - T)c - mean, where T = sigma1^-1/2 (sigma1^1/2 sigma2 sigma1^1/2)^1/2 sigma1^-1/2 is the map that
    transports the first Gaussian to the second; any other root of sigma1, such as Cholesky's, gives the same T.

    Args:
        features: (N, D).
        mu2, sigma2: of the reference, taken as known.

    Returns:
        The distance; and the influences (N,), of mean 0, whose standard deviation over sqrt(N) is that of the distance (the
        infinitesimal jackknife, Efron 1982; where N is not far above D it is up to 1.6 times too wide).
    """
    mu1, sigma1, mu2, sigma2 = _checked(*mean_and_covariance(features), mu2, sigma2)
    factor, pivots, rank = _root(sigma1)
    found = torch.linalg.eigh(torch.from_numpy(_inner(factor, pivots, rank, sigma2)))
    squares, vectors = (part.numpy() for part in found)  # (R,), (R, R)
    value = _distance(mu1, np.trace(sigma1), mu2, np.trace(sigma2), squares)
    centred = np.asarray(features, np.float64) - mu1  # (N, D)
    kept = pivots[:rank]  # R features, of which the others follow
    whitened = solve_triangular(factor[:rank, :rank], centred[:, kept].T, lower=True).T @ vectors  # (N, R), of covariance 1
    influence = 2 * centred @ (mu1 - mu2) + (centred**2).sum(1) - whitened**2 @ np.sqrt(squares.clip(0))
    return value, influence - influence.mean()


def frechet_infinity(
    features: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, points: int = 15, seed: int = 0
) -> tuple[float, np.ndarray]:
    """The distance that infinitely many samples would have (arXiv 1911.07023): it falls as 1 / N, so follow that line to 0.

    It is a line where N is several times D, and steeper below: from 1.6 D samples on a spectrum as real features have, what it finds
    is too small by 6 standard errors. Hence the smallest subset is a half, and callers keep to N of at least `INFINITY_SAMPLES` D.

    Args:
        features: (N, D).
        mu2, sigma2: of the reference; what its own size adds stays.
        points: distances of so many random subsets, of sizes evenly spaced from N / 2 to N, make the line.
        seed: of the subsets.

    Returns:
        The extrapolated distance, which may be below 0, and the residuals (points,) of the fit, scaled so that their norm is its
        standard error: those of other features of as many samples come of the same subsets, so the norm of a difference is that of
        the difference of two fits.
    """
    num = len(features)
    _, _, mu2, sigma2 = _checked(mu2, sigma2, mu2, sigma2)
    features = np.asarray(features, np.float64)
    factor, pivots, rank = _root(sigma2)
    turned = features[:, pivots] @ factor[:, :rank]  # (N, R): its covariance is L^T sigma1 L
    random = np.random.default_rng(seed)
    inverse, distances = [], []
    for size in np.linspace(num // 2, num, points).astype(int):
        chosen = random.permutation(num)[:size]
        subset = features[chosen]
        squares = _eigenvalues(np.atleast_2d(np.cov(turned[chosen], rowvar=False)))
        inverse.append(1 / size)
        distances.append(_distance(subset.mean(0), subset.var(0, ddof=1).sum(), mu2, np.trace(sigma2), squares))
    line, covariance = np.polyfit(inverse, distances, 1, cov="unscaled")
    residuals = np.array(distances) - np.polyval(line, inverse)
    return float(line[1]), residuals * np.sqrt(covariance[1, 1] / (points - 2))


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


def _distance(mu1: np.ndarray, trace1: float, mu2: np.ndarray, trace2: float, squares: np.ndarray) -> float:
    """From the eigenvalues of sigma1 sigma2, of which rounding may leave some below 0."""
    difference = mu1 - mu2
    return max(0.0, float(difference @ difference + trace1 + trace2 - 2 * np.sqrt(squares.clip(0)).sum()))


def _root(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Lower triangle L (D, D), order of the features (D,) and rank R: L L^T is sigma in that order, and L is 0 right of column R."""
    factor, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    factor = np.asfortranarray(np.tril(factor))
    factor[:, rank:] = 0  # what is left is rounding
    return factor, pivots - 1, rank


def _inner(factor: np.ndarray, pivots: np.ndarray, rank: int, sigma: np.ndarray) -> np.ndarray:
    """L^T sigma L (R, R), of which the lower triangle is filled."""
    ordered = np.asfortranarray(sigma[np.ix_(pivots, pivots)])
    return lapack.dsygst(ordered, factor, itype=2, lower=1, overwrite_a=1)[0][:rank, :rank]


def _eigenvalues(inner: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix, of which the lower triangle is read."""
    return torch.linalg.eigvalsh(torch.from_numpy(inner)).numpy()
