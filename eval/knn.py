"""Weighted nearest neighbours: how well features sort images without any training (arXiv 1805.01978, section 3.4)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIMILARITIES = 2**24  # held at once: 64 MiB


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
    train_x, test_x = torch.as_tensor(train_x), torch.as_tensor(test_x)
    device = train_x.device
    train_y, test_y = torch.as_tensor(train_y).to(device), torch.as_tensor(test_y).to(device)
    _check(train_x, train_y, "train")
    _check(test_x, test_y, "test")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"training features have {train_x.shape[1]} dimensions and test features {test_x.shape[1]}; use one network for both"
        )
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k is {k} and there are {len(train_x)} training images; choose 1 to {len(train_x)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")

    train_x = F.normalize(train_x.float(), dim=1)
    classes, train_y = train_y.unique(return_inverse=True)
    correct = 0
    rows = max(1, MAX_SIMILARITIES // len(train_x))
    for x, y in zip(test_x.split(rows), test_y.split(rows), strict=True):
        similarity = F.normalize(x.to(device).float(), dim=1) @ train_x.T  # (M', N)
        nearest, neighbours = similarity.topk(k, dim=1)  # (M', k)
        # one factor for all votes of an image changes nothing and keeps exp in range
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(x), len(classes)).scatter_add_(1, train_y[neighbours], weights)  # (M', classes)
        correct += (classes[votes.argmax(1)] == y).sum().item()
    return correct / len(test_x)


def _check(x: Tensor, y: Tensor, which: str) -> None:
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0:
        raise ValueError(f"{which}_x has the shape {tuple(x.shape)} and {which}_y {tuple(y.shape)}; give (N, D) and (N,), N at least 1")
    if y.is_floating_point():
        raise ValueError(f"{which}_y holds {y.dtype}; labels are integers")
    if not x.isfinite().all():
        raise ValueError(f"{which}_x holds NaN or infinite numbers")
