"""Does a model copy? How near generated images come to training images, and how near new real ones do."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.intervals import Estimate, share
from models.files import written_aside

CHUNK = 2048
RARE = 0.01  # a generated image counts as a copy if it is nearer than this share of real ones
COLUMNS, GAP_PX = 16, 4


def nearest(queries: np.ndarray, train: np.ndarray, k: int = 1, skip_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Indices (N, k) of the training features nearest to each query, and their Euclidean distances (N, k), nearest first.

    Args:
        queries, train: (N, D) and (M, D).
        skip_self: the queries are the training features: leave each out of its own neighbours.
    """
    indices, distances = [], []
    whole = torch.from_numpy(np.asarray(train, np.float32))
    for start in range(0, len(queries), CHUNK):
        found = torch.cdist(torch.from_numpy(np.asarray(queries[start : start + CHUNK], np.float32)), whole)
        if skip_self:
            rows = torch.arange(len(found))
            found[rows, rows + start] = torch.inf
        near = found.topk(k, largest=False)
        indices.append(near.indices)
        distances.append(near.values)
    return torch.cat(indices).numpy(), torch.cat(distances).numpy().astype(np.float64)


def memorisation(generated: np.ndarray, train: np.ndarray, held_out: np.ndarray | None) -> dict[str, Any]:
    """Distances of generated images to their nearest training image, against those of real images that were not trained on.

    Args:
        generated, train, held_out: features (N, D), (M, D) and (H, D). Without held-out images each training image stands in for
            one, with the others as its training set.

    Returns:
        "closer": the chance that a generated image is nearer to the training set than a real new one is (ties count half): 1/2 for a
        model that draws from the distribution, 1 for one that copies. "copied": the share of generated images nearer than the
        nearest 1 % of real ones: 0.01 for the former; None where so many real images have an exact twin that no image could be
        nearer. Both with 95 % intervals over the generated images.
    """
    ours = nearest(generated, train)[1][:, 0]
    real = np.sort(nearest(train, train, skip_self=True)[1][:, 0] if held_out is None else nearest(held_out, train)[1][:, 0])
    beyond = (len(real) - (np.searchsorted(real, ours, "left") + np.searchsorted(real, ours, "right")) / 2) / len(real)  # (N,)
    threshold = float(np.quantile(real, RARE))

    def as_json(estimate: Estimate) -> dict[str, float]:
        return dict(zip(("value", "low", "high"), (estimate.value, *estimate.interval()), strict=True))

    return {
        "closer": as_json(Estimate(float(beyond.mean()), beyond - beyond.mean(), limits=(0, 1))),
        "copied": {**as_json(share(ours < threshold)), "expected": RARE} if threshold > 0 else None,
        "median_distance": float(np.median(ours)),
        "median_distance_real": float(np.median(real)),
        "against": "each training image among the others" if held_out is None else f"{len(held_out)} held-out images",
        "train_num": len(train),
    }


def save_neighbours(path: str, images: np.ndarray, features: np.ndarray, train_images: np.ndarray, train: np.ndarray) -> None:
    """A picture: generated images above their two nearest training images; first the nearest of all, then evenly down the ranks.

    Args:
        images, train_images: uint8 (N, H, W, 3), (M, H, W, 3).
        features, train: (N, D), (M, D).
    """
    indices, distances = nearest(features, train, k=min(2, len(train)))
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
