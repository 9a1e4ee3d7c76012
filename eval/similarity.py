"""How alike two representations of the same images are, and how well a representation keeps classes apart."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from eval.knn import MAX_SIMILARITIES, check_features


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment |Xc^T Yc|^2 / (|Xc^T Xc| |Yc^T Yc|), Frobenius norms (arXiv 1905.00414 eq. 5).

    1 for features that differ by a rotation, a scale and a shift. With fewer images than dimensions it is high for anything.

    Args:
        x, y: features (N, D) and (N, E) of the same images; computed in float64.

    Raises:
        ValueError: features of different images, numbers that are not finite, features that are all the same.
    """
    return cka_matrix([x, y])[0, 1].item()


def cka_matrix(features: list[Tensor]) -> np.ndarray:
    """`linear_cka` of every pair: (L, L), symmetric, 1 on the diagonal; raises as that."""
    for x in features:
        _check(features[0], x)
    centred = [x.double() - x.double().mean(0) for x in features]
    products = np.zeros((len(features), len(features)))
    for i, x in enumerate(centred):
        for j, y in enumerate(centred[: i + 1]):
            products[i, j] = products[j, i] = _cross(x, y)
    norms = np.sqrt(np.diag(products))
    return products / np.outer(norms, norms)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """|X^T Y|^2, by the smaller way round: over dimensions (D, E), or over images (N, N)."""
    if len(x) > max(x.shape[1], y.shape[1]):
        return (x.T @ y).square().sum()
    return ((x @ x.T) * (y @ y.T)).sum()


def neighbour_graph(x: Tensor, k: int = 10) -> csr_array:
    """Every image's k nearest others by cosine similarity: a sparse (N, N) with the similarities, float64."""
    _check(x)
    if not 2 <= k < len(x):
        raise ValueError(f"k is {k} and there are {len(x)} images; choose 2 to {len(x) - 1}")
    x = F.normalize(x.float(), dim=1)
    similarities, neighbours = [], []
    rows = max(1, MAX_SIMILARITIES // len(x))
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows] @ x.T  # (N', N)
        own = torch.arange(len(chunk), device=x.device)
        chunk[own, start + own] = -torch.inf
        nearest, where = chunk.topk(k, dim=1)
        similarities.append(nearest.double().cpu())
        neighbours.append(where.cpu())
    starts = np.arange(0, k * len(x) + 1, k)
    return csr_array((torch.cat(similarities).flatten().numpy(), torch.cat(neighbours).flatten().numpy(), starts), shape=(len(x),) * 2)


def cknna(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Alignment of two kernels over the neighbours that both agree on (arXiv 2405.07987 appendix A, as REPA uses it).

    Args:
        x, y: features (N, D) and (N, E) of the same images; kernels are cosine similarities.
        k: nearest neighbours of each image.

    Returns:
        1 for the same neighbourhoods; about 0 for unrelated ones.
    """
    _check(x, y)
    return graph_alignment(neighbour_graph(x, k), neighbour_graph(y, k))


def graph_alignment(x: csr_array, y: csr_array) -> float:
    """CKNNA of two graphs of `neighbour_graph`: HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)), each over the edges that both have."""
    shared_x, shared_y = x * _edges(y), y * _edges(x)
    own = _hsic(x, x) * _hsic(y, y)
    if not own > 0:
        raise ValueError(f"{x.shape[0]} images are too few to align their neighbourhoods; use more")
    return float(_hsic(shared_x, shared_y) / np.sqrt(own))


def _edges(graph: csr_array) -> csr_array:
    """1 at every edge, also at one of similarity 0."""
    return csr_array((np.ones_like(graph.data), graph.indices, graph.indptr), shape=graph.shape)


def _hsic(k: csr_array, l: csr_array) -> float:  # noqa: E741
    """Unbiased Hilbert-Schmidt independence criterion of kernels without diagonals (Song et al., 2012, eq. 5), but for a factor."""
    n = k.shape[0]
    both = (k * l.T).sum()
    return both + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(1))


def silhouette(x: Tensor, labels: Tensor) -> float:
    """Mean silhouette of the classes by cosine distance (Rousseeuw, 1987): (b - a) / max(a, b) for each image.

    a is the mean distance to the others of its class, b that to the nearest other class. An image that is alone in its class
    counts 0. The mean distance to a class is that to the mean of its unit vectors, so it costs N D C and not N^2 D.

    Args:
        x: features (N, D).
        labels: integers (N,).

    Returns:
        In [-1, 1].

    Raises:
        ValueError: fewer than two classes, features that are all the same.
    """
    check_features(x, labels, "x")
    _check(x)
    classes, y = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"the labels hold {len(classes)} class; a silhouette needs at least 2")
    x = F.normalize(x.double(), dim=1)
    members = F.one_hot(y, len(classes)).double()  # (N, C)
    counts = members.sum(0)
    distances = 1 - x @ (members.T @ x / counts[:, None]).T  # (N, C)
    own = counts[y]
    within = distances.gather(1, y[:, None])[:, 0] * own / (own - 1).clamp(min=1)  # its distance to itself is 0
    across = distances.scatter(1, y[:, None], torch.inf).amin(1)
    scores = (across - within) / torch.maximum(within, across).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(own > 1, scores, 0.0).mean().item()


def _check(x: Tensor, y: Tensor | None = None) -> None:
    """Raise ValueError unless these are features, finite and not all the same, of as many images."""
    for side, name in ((x, "x"), (y, "y")):
        if side is None:
            continue
        check_features(side, None, name)
        wide = side.double()
        if (wide - wide.mean(0)).norm() <= 1e-5 * wide.norm():  # but for rounding
            raise ValueError("all images have the same features, which are like anything and like nothing")
    if y is not None and len(x) != len(y):
        raise ValueError(f"there are features of {len(x)} images and of {len(y)}; compare those of the same images")
