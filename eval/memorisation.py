"""Does a model copy? How near generated images come to training images, and how near new real ones do."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import betabinom

from eval.intervals import LEVEL, Estimate, share
from models.files import written_aside

MAX_NUMBERS = 2**24  # distances or coordinates at once
RARE = 0.01  # a generated image counts as a copy if it is nearer than this share of real ones
ROUNDING = 1e-4  # of the median distance: features of one picture differ by less, from batch to batch
COLUMNS, GAP_PX = 16, 4


def nearest(queries: np.ndarray, train: np.ndarray, k: int = 1, skip_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Indices (N, k) of the training features nearest to each query, and their Euclidean distances (N, k), nearest first.

    Args:
        queries, train: (N, D) and (M, D).
        skip_self: the queries are the training features: leave each out of its own neighbours.
    """
    indices, distances = [], []
    x, y = (torch.from_numpy(np.asarray(side, np.float32)) for side in (queries, train))
    rows = max(1, MAX_NUMBERS // max(len(y), k * y.shape[1]))
    for i, part in enumerate(x.split(rows)):
        found = torch.cdist(part, y)  # (B, M)
        if skip_self:
            own = torch.arange(len(part))
            found[own, own + i * rows] = torch.inf
        near = found.topk(k, largest=False).indices  # (B, k)
        exact = (part[:, None].double() - y[near].double()).norm(dim=2)  # cdist's matrix product leaves equal images apart
        order = exact.argsort(1)
        indices.append(near.gather(1, order))
        distances.append(exact.gather(1, order))
    return torch.cat(indices).numpy(), torch.cat(distances).numpy()


def memorisation(distances: np.ndarray, train: np.ndarray, held_out: np.ndarray | None) -> dict[str, Any]:
    """How near generated images are to training images, against real images that were not trained on.

    Args:
        distances: (N,) of each generated image to its nearest training image.
        train, held_out: features (M, D), (H, D). Without held-out images each training image stands in for one, with the others as
            its training set.

    Returns:
        "closer": the chance that a generated image is nearer to the training set than a real new one is (ties count half): 1/2 for a
        model that draws from the distribution, 1 for one that copies; its interval is over generated and real images (DeLong's).
        "copied": the share of generated images nearer than the nearest 1 % of real ones, and what is expected of a model that does
        not copy: the mean and, since few real images decide, the range of 95 % of such models ("expected_low", "expected_high";
        exact with held-out images). None where so many real images have an exact twin that no image could be nearer.
    """
    real = nearest(train, train, skip_self=True)[1][:, 0] if held_out is None else nearest(held_out, train)[1][:, 0]
    floor = ROUNDING * np.median(real)
    ours, real = (np.sort(np.where(side < floor, 0, side)) for side in (distances, real))
    beyond, before = 1 - _share_below(real, ours), _share_below(ours, real)  # (N,), (H,); both of mean "closer"
    closer = Estimate(float(beyond.mean()), beyond - beyond.mean(), extra_se=before.std(ddof=1) / len(real) ** 0.5, limits=(0, 1))

    rank = max(1, round(RARE * (len(real) + 1)))
    threshold, of_honest = real[rank - 1], betabinom(len(ours), rank, len(real) + 1 - rank)
    range_of_honest = of_honest.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2]) / len(ours)
    expected = dict(zip(("expected", "expected_low", "expected_high"), (rank / (len(real) + 1), *map(float, range_of_honest)), strict=True))
    return {
        "closer": _as_json(closer),
        "copied": {**_as_json(share(ours < threshold)), **expected} if threshold > 0 else None,
        "median_distance": float(np.median(ours)),
        "median_distance_real": float(np.median(real)),
        "against": "each training image among the others" if held_out is None else f"{len(held_out)} held-out images",
        "train_num": len(train),
    }


def _share_below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The share of `ordered` below each of the values; ties count half."""
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2 / len(ordered)


def _as_json(estimate: Estimate) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), (estimate.value, *estimate.interval()), strict=True))


def save_neighbours(path: str, images: np.ndarray, train_images: np.ndarray, indices: np.ndarray, distances: np.ndarray) -> None:
    """A picture: generated images above their nearest training images; first the nearest of all, then evenly down the ranks.

    Args:
        images, train_images: uint8 (N, H, W, 3), (M, H, W, 3).
        indices, distances: (N, k), as `nearest` finds them.
    """
    order = distances[:, 0].argsort()
    spread = order[np.linspace(0, len(order) - 1, min(COLUMNS, len(order))).astype(int)]
    blocks = []
    for chosen in (order[:COLUMNS], spread):
        rows = [images[chosen], *(np.asarray(train_images)[indices[chosen, j]] for j in range(indices.shape[1]))]
        blocks.append(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))  # (3 H, columns W, 3)
    gap = np.full((GAP_PX, blocks[0].shape[1], 3), 255, np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        Image.fromarray(np.concatenate([blocks[0], gap, blocks[1]])).save(aside, format="png")
