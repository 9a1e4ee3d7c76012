"""Features of many places of a network -> a row of numbers for each: neighbours, probes, rank, similarity."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from eval.encoders import Place
from eval.intervals import share
from eval.knn import knn_predictions
from eval.linear import Probe, held_out_parts, ridge_probe, softmax_probe
from eval.rank import singular_values, spectral_entropy
from eval.similarity import cka_matrix, graph_alignment, neighbour_graph, silhouette
from models.progress import progress_bar

RANK_IMAGES, SIMILARITY_IMAGES = 10_000, 2_000  # for rank, spectrum and norm; for CKA and CKNNA
CKNNA_K = 10
FEW_SHOT_DRAWS, FEW_SHOT_FOLDS = 5, 5
WILSON = "Wilson, over the choice of test images"


@dataclass(frozen=True)
class Labelled:
    """Both splits' features and labels.

    Attributes:
        train, test: features (N, D) and (M, D) of every place, float32.
        train_y, test_y: int64 (N,) and (M,).
        class_names: of the labels 0, 1, ...
    """

    train: Mapping[Place, Tensor]
    test: Mapping[Place, Tensor]
    train_y: Tensor
    test_y: Tensor
    class_names: Sequence[str]


def check_labels(train_y: Tensor, class_names: Sequence[str]) -> None:
    """Raise ValueError for labels that no probe can learn from: fewer than two classes, or a class with one image."""
    classes, counts = train_y.unique(return_counts=True)
    names = [class_names[label] if label < len(class_names) else str(label) for label in classes.tolist()]
    if len(classes) < 2:
        raise ValueError(f"all training images are of one class ({names[0]}); probes tell classes apart, so there must be two or more")
    if counts.min() < 2:
        lone = names[int(counts.argmin())]
        raise ValueError(
            f"the class {lone} has one training image; of each, some are fitted to and some held out: add images, or leave it out"
        )


def measure(
    labelled: Labelled, ks: Sequence[int], temperature: float, seed: int, device: torch.device, reference: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """A row for every place, ready for JSON: accuracies with their intervals, rank, norm, spectrum, silhouette, alignment.

    Args:
        ks, temperature: of the neighbours' votes.
        seed: of what is held out.
        device: where it is computed.
        reference: features (M, E) of the test images at `spread_over(M, SIMILARITY_IMAGES)` through another network.

    Raises:
        ValueError: labels or features that do not fit, more neighbours than images.
    """
    check_labels(labelled.train_y, labelled.class_names)
    train_y, test_y = labelled.train_y.to(device), labelled.test_y.to(device)
    held_out = [part.to(device) for part in held_out_parts(labelled.train_y, seed=seed)]
    aligned = None if reference is None else neighbour_graph(torch.from_numpy(reference).to(device), CKNNA_K)
    rows = []
    for place in progress_bar(labelled.train, desc="probing", unit=" places"):
        try:
            x, z = (side[place].to(device) for side in (labelled.train, labelled.test))
            votes = knn_predictions(x, train_y, z, ks, temperature)
            rows.append(
                {
                    **place._asdict(),
                    "dim": x.shape[1],
                    "knn": {str(k): accuracy(predictions, test_y) for k, predictions in votes.items()},
                    "linear": _judged(softmax_probe(x, train_y, z, held_out), test_y, "weight_decay"),
                    "ridge": _judged(ridge_probe(x, train_y, z, held_out), test_y, "ridge"),
                    **_shape(x[spread_over(len(x), RANK_IMAGES)]),
                    "silhouette": _or_none(silhouette, z, test_y),
                    **({} if aligned is None else {"cknna": _or_none(_alignment, z, aligned)}),
                }
            )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return rows


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That whose linear probe is best on the held-out part of the training set."""
    return max(rows, key=lambda row: row["linear"]["held_out_accuracy"])


def shown_k(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the numbers of neighbours that were asked for the one that tables and pictures show."""
    return "20" if "20" in rows[0]["knn"] else next(iter(rows[0]["knn"]))


def similarities(labelled: Labelled, time: float | None, pooling: str) -> dict[str, Any] | None:
    """Linear CKA of all blocks at one time and pooling, on test images; None where features are all the same."""
    places = [place for place in labelled.test if (place.time, place.pooling) == (time, pooling)]
    chosen = spread_over(len(labelled.test_y), SIMILARITY_IMAGES)
    matrix = _or_none(cka_matrix, [labelled.test[place][chosen] for place in places])
    if matrix is None:
        return None
    return {"time": time, "pooling": pooling, "blocks": [place.block for place in places], "images": len(chosen), "matrix": matrix.tolist()}


def few_shot(labelled: Labelled, place: Place, shares: Sequence[float], seed: int, device: torch.device) -> list[dict[str, Any]]:
    """The linear probe fitted to a share of every class (2 images at least), for several draws; the penalty by cross-validation in it.

    Returns:
        For every share the number of images, and mean and standard deviation of the accuracy over the draws.
    """
    x, z = (side[place].to(device) for side in (labelled.train, labelled.test))
    train_y, test_y = labelled.train_y, labelled.test_y.to(device)
    found = []
    for each in shares:
        accuracies = []
        for draw in range(FEW_SHOT_DRAWS):
            rows = draw_share(train_y, each, seed + draw)
            parts = [part.to(device) for part in held_out_parts(train_y[rows], FEW_SHOT_FOLDS, FEW_SHOT_FOLDS, seed + draw)]
            probe = softmax_probe(x[rows.to(device)], train_y[rows].to(device), z, [part for part in parts if part.any()])
            accuracies.append((probe.predictions == test_y).double().mean().item())
        found.append(
            {
                "share": each,
                "images": len(rows),
                "place": "chosen with all labels",
                "value": float(np.mean(accuracies)),
                "std": float(np.std(accuracies, ddof=1)),
                "draws": accuracies,
            }
        )
    return found


def draw_share(labels: Tensor, part: float, seed: int) -> Tensor:
    """Indices of a share of every class, 2 images at least, at random; in order, so that neighbours stay neighbours."""
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    counts = [max(2, round(part * len(each))) for each in members]
    drawn = [each[torch.randperm(len(each), generator=generator)[:count]] for each, count in zip(members, counts, strict=True)]
    return torch.cat(drawn).sort().values


def baseline(labelled: Labelled) -> float:
    """Accuracy of an answer that is always the most frequent class."""
    return (labelled.test_y == labelled.train_y.mode().values).double().mean().item()


def accuracy(predictions: Tensor, labels: Tensor) -> dict[str, Any]:
    """Share of right ones with its 95 % interval, and which they are, for comparisons in pairs."""
    hits = (predictions == labels).cpu().numpy()
    return {**share(hits, WILSON).as_json(), "hits": packed(hits)}


def packed(hits: np.ndarray) -> str:
    """bool (M,) -> hexadecimal, eight to a byte."""
    return np.packbits(hits).tobytes().hex()


def unpacked(text: str, num: int) -> np.ndarray:
    """The `num` booleans of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=num).astype(bool)


def drop_hits(row: dict[str, Any]) -> None:
    """Forget which images were right: of a place that no comparison asks for."""
    for found in (*row["knn"].values(), row["linear"], row["ridge"]):
        del found["hits"]


def hash_of(labels: Tensor) -> str:
    """Of labels (N,) in their order, in hexadecimal."""
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]


def spread_over(num: int, most: int) -> np.ndarray:
    """At most so many indices of range(num), evenly spaced: data are often in the order of their classes."""
    return np.linspace(0, num - 1, min(num, most)).round().astype(np.int64)


def _judged(probe: Probe, labels: Tensor, name: str) -> dict[str, Any]:
    return {**accuracy(probe.predictions, labels), name: probe.chosen, "held_out_accuracy": probe.held_out_accuracy}


def _shape(x: Tensor) -> dict[str, Any]:
    """Rank, spectrum and norm of features (N, D), not centred."""
    values = _or_none(singular_values, x)
    entropy = None if values is None else spectral_entropy(values)
    return {
        "rank_entropy": entropy,
        "rank_exponential": None if entropy is None else float(np.exp(entropy)),
        "norm": x.norm(dim=1).mean().item(),
        "spectrum": None if values is None else [float(f"{value:.5g}") for value in values],
    }


def _alignment(z: Tensor, other: csr_array) -> float:
    """CKNNA of test features (M, D) with the neighbours in another network's."""
    return graph_alignment(neighbour_graph(z[spread_over(len(z), SIMILARITY_IMAGES)], CKNNA_K), other)


def _or_none(number: Callable[..., Any], *of: Any) -> Any:
    """None where a number has no meaning: features that are all zero or all the same, as of an untrained class token."""
    try:
        return number(*of)
    except ValueError:
        return None
