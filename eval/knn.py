"""Weighted nearest neighbours: how well features sort images without any training (arXiv 1805.01978, section 3.4)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.nearest import Nearest

MAX_SIMILARITIES = 2**24  # at once: 64 MiB in float32, and about as much for what is nearly as near as the nearest


@torch.no_grad()
def knn_accuracy(
    train_x: np.ndarray | Tensor,
    train_y: np.ndarray | Tensor,
    test_x: np.ndarray | Tensor,
    test_y: np.ndarray | Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the test images that their k nearest training images vote for correctly.

    Neighbours are nearest by cosine similarity and vote with weight exp(similarity / temperature). The search is exact.

    Args:
        train_x, test_x: features (N, D) and (M, D); computed in float32, on the device of `train_x`.
        train_y, test_y: integer labels (N,) and (M,).
        k: neighbours, 1 to N.
        temperature: above 0; the smaller, the more the nearest counts.

    Returns:
        In [0, 1].

    Raises:
        ValueError: shapes that do not fit together, numbers that are not finite, more neighbours than training images.
    """
    test_y = torch.as_tensor(test_y)
    check_features(torch.as_tensor(test_x), test_y, "test")
    predictions = knn_predictions(train_x, train_y, test_x, (k,), temperature)[k]
    return (predictions == test_y.to(predictions.device)).double().mean().item()


@torch.no_grad()
def knn_predictions(
    train_x: np.ndarray | Tensor,
    train_y: np.ndarray | Tensor,
    test_x: np.ndarray | Tensor,
    ks: Sequence[int] = (10, 20, 200),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """For every k the labels (M,) that the k nearest training images vote for; all from one search. Arguments as above."""
    train_x, test_x = torch.as_tensor(train_x), torch.as_tensor(test_x)
    device = train_x.device
    train_y = torch.as_tensor(train_y).to(device)
    check_features(train_x, train_y, "train")
    check_features(test_x, None, "test")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"training features have {train_x.shape[1]} dimensions and test features {test_x.shape[1]}; use one network for both"
        )
    for k in ks:
        if not 1 <= k <= len(train_x):
            raise ValueError(f"k is {k} and there are {len(train_x)} training images; choose 1 to {len(train_x)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")

    nearest_of = Nearest(F.normalize(train_x.float(), dim=1), max(ks))
    classes, train_y = train_y.unique(return_inverse=True)
    found: dict[int, list[Tensor]] = {k: [] for k in sorted(ks)}
    for x in test_x.split(max(1, MAX_SIMILARITIES // len(train_x))):
        nearest, neighbours = nearest_of(F.normalize(x.to(device).float(), dim=1))  # (M', K), the nearest first
        # one factor for all votes of an image changes nothing and keeps exp in range
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes, voted = weights.new_zeros(len(x), len(classes)), 0  # (M', classes)
        for k, predictions in found.items():
            votes.scatter_add_(1, train_y[neighbours[:, voted:k]], weights[:, voted:k])
            voted = k
            predictions.append(classes[votes.argmax(1)])
    return {k: torch.cat(predictions) for k, predictions in found.items()}


def check_features(x: Tensor, y: Tensor | None, which: str) -> None:
    """Raise ValueError unless x is (N, D) and finite and y, where given, are N integers."""
    if x.ndim != 2 or len(x) == 0 or (y is not None and y.shape != x.shape[:1]):
        labels = "" if y is None else f" and {which}_y {tuple(y.shape)}"
        raise ValueError(f"{which}_x has the shape {tuple(x.shape)}{labels}; give (N, D) and (N,), N at least 1")
    if y is not None and y.is_floating_point():
        raise ValueError(f"{which}_y holds {y.dtype}; labels are integers")
    if not x.isfinite().all():
        raise ValueError(f"{which}_x holds NaN or infinite numbers")
