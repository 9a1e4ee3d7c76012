"""Features of generated and of real images -> every number, each with its interval. Values equal torch-fidelity's."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import calc_cdist_full

from eval.frechet import frechet_infinity, frechet_influence, mean_and_covariance
from eval.intervals import Estimate, OfHalves, halves_of, share
from models.files import require_memory

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's
IS_SPLITS, IS_SEED = 10, 2020
NEIGHBOURS = 3
CHUNK = 2048  # rows of a kernel or of distances at once

HIGHER_IS_BETTER = {"IS", "precision", "recall"}
_INFLUENCE = "influence of each image (infinitesimal jackknife), reference fixed"


@dataclass(frozen=True)
class Reference:
    """Real images as the metrics see them: features (R, D), or their mean and covariance alone."""

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None

    def require_features(self) -> np.ndarray:
        """Those of its images, which `Judge` has asked for where a number needs them."""
        assert self.features is not None
        return self.features


def frechet(features: np.ndarray, reference: Reference) -> Estimate:
    """Fréchet distance at this number of images: the interval is of its mean over other samplings of as many."""
    value, influence = frechet_influence(features, reference.mu, reference.sigma)
    return Estimate(value, influence, how=_INFLUENCE, limits=(0, math.inf))


def extrapolated(features: np.ndarray, reference: Reference, at_n: Estimate) -> Estimate:
    """Fréchet distance of infinitely many images; varies as that of these, `at_n`, does, and with the fit."""
    value, fit = frechet_infinity(features, reference.mu, reference.sigma)
    return Estimate(value, at_n.spread, fit=fit, how=f"{_INFLUENCE}, and the fit over 1 / N")


def kernel_distance(features: np.ndarray, real: np.ndarray) -> tuple[Estimate, dict[str, float]]:
    """torch-fidelity's KID (arXiv 1801.01401), the mean over random subsets, which is unbiased; and how it was taken.

    The interval is of the distance over all pairs, by the jackknife of its U-statistic, and of the draw of the subsets.
    """
    size = min(KID_SUBSET_SIZE, len(features), len(real))
    if size < 3:
        raise ValueError(f"a kernel distance needs at least 3 images on both sides; here are {len(features)} and {len(real)}")
    both = (torch.from_numpy(np.asarray(side, np.float32)) for side in (features, real))
    found = kid_features_to_metric(*both, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    std = found[KEY_METRIC_KID_STD]
    influence = kernel_influence(features, real)
    how = f"jackknife over images, reference fixed; {KID_SUBSETS} subsets of {size}"
    estimate = Estimate(found[KEY_METRIC_KID_MEAN], influence, extra_se=std / KID_SUBSETS**0.5, how=how)
    return estimate, {"std": std, "subsets": KID_SUBSETS, "subset_size": size}


def kernel_influence(features: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(N,) jackknife pseudo-values, less their mean, of the unbiased squared MMD under the kernel (x.y / D + 1)^3."""
    num = len(features)
    among = _kernel_sums(features, features) - ((features.astype(np.float64) ** 2).mean(1) + 1) ** 3  # (N,) without x_i itself
    across = _kernel_sums(features, real) / len(real)  # (N,)

    total = among.sum() / (num * (num - 1)) - 2 * across.mean()
    without = (among.sum() - 2 * among) / ((num - 1) * (num - 2)) - 2 * (across.sum() - across) / (num - 1)  # (N,) without image i
    influence = num * total - (num - 1) * without
    return influence - influence.mean()


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """sum_j (x_i.y_j / D + 1)^3 -> (N,), in float64."""
    wide, sums = y.T.astype(np.float64) / x.shape[1], np.empty(len(x))
    for i in range(0, len(x), CHUNK):
        base = x[i : i + CHUNK] @ wide + 1
        sums[i : i + CHUNK] = np.einsum("ij,ij,ij->i", base, base, base)  # 14 times as fast as ** 3
    return sums


def inception_score(logits: np.ndarray) -> Estimate:
    """exp of the mean KL divergence of the classes of an image from those of its split (arXiv 1606.03498), over 10 splits.

    Raises:
        ValueError: fewer images than splits.
    """
    num = len(logits)
    if num < 2 * IS_SPLITS:
        raise ValueError(f"the Inception score is a mean over {IS_SPLITS} splits and needs at least {2 * IS_SPLITS} images; here are {num}")
    value = isc_features_to_metric(torch.from_numpy(logits), IS_SPLITS, True, IS_SEED)[KEY_METRIC_ISC_MEAN]
    order = np.random.RandomState(IS_SEED).permutation(num)  # theirs
    log_p = torch.from_numpy(logits).double().log_softmax(1).numpy()  # (N, classes)
    influence = np.empty(num)
    for split in range(IS_SPLITS):
        rows = order[split * num // IS_SPLITS : (split + 1) * num // IS_SPLITS]
        p = np.exp(log_p[rows])
        divergence = (p * (log_p[rows] - np.log(p.mean(0)))).sum(1)
        influence[rows] = np.exp(divergence.mean()) * (divergence - divergence.mean())
    return Estimate(value, influence, how="influence of each image (infinitesimal jackknife)")


def precision_recall(features: np.ndarray, real: np.ndarray) -> tuple[Estimate, Estimate]:
    """Share of generated images within a real image's ball, and of real images within a generated one's (arXiv 1904.06991).

    A ball reaches to the third nearest neighbour of its own kind, as torch-fidelity has it.

    Raises:
        ValueError: too few images, or distances that do not fit into memory.
    """
    num, num_real = len(features), len(real)
    if min(num // 2, num_real) < NEIGHBOURS + 1:
        raise ValueError(f"precision and recall need at least {2 * NEIGHBOURS + 2} images; here are {num} and {num_real}")
    require_memory(4 * (num**2 + num_real**2 + 2 * num * num_real), f"distances between {num:,} and {num_real:,} images")
    fake, true = (torch.from_numpy(np.asarray(side, np.float32)) for side in (features, real))
    within, across, of_real = (calc_cdist_full(*pair) for pair in ((fake, fake), (true, fake), (true, true)))
    across = across.T.contiguous()  # (N, R): halves of whole rows are copied fast

    inside = (across <= _radii(of_real)).any(1).numpy()  # (N,)
    precision = share(inside, how="Wilson's, over images, reference fixed")

    def recall_of(kept: np.ndarray) -> float:
        rows = torch.from_numpy(kept)
        radii = _radii(within.index_select(0, rows).index_select(1, rows))
        return (across[rows] <= radii[:, None]).any(0).float().mean().item()

    halves = np.array([recall_of(half) for half in halves_of(num)])
    how = "random halves of the images, reference fixed"
    return precision, OfHalves(recall_of(np.arange(num)), halves, how=how, limits=(0, 1))


def _radii(distances: torch.Tensor) -> torch.Tensor:
    """Of square distances (N, N), those to the third nearest other one (N,)."""
    return distances.topk(NEIGHBOURS + 1, largest=False).values[:, -1]  # kthvalue would take 8 times as long, and memory thrice


def statistics(features: np.ndarray) -> Reference:
    """A reference from its features."""
    return Reference(*mean_and_covariance(features), features)
