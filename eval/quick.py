"""A quick look at features while they are learned: neighbours, a linear probe and rank, always of the same images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from eval.encoders import Encoder, block_features, block_shapes
from eval.knn import knn_accuracy
from eval.linear import held_out_parts, softmax_probe
from eval.looking import fewer
from eval.measure import check_labels
from eval.rank import effective_rank
from training.checkpoint import averaged
from training.data import ImageData
from training.ema import EMA

FOLDS, K = 5, 20  # a fifth of the images is only judged; another one chooses the linear probe's penalty
TIME = 0.7  # at which a diffusion model looks


class QuickProbe:
    """Judges a network by one block's mean token, on images of its own training set: to see features grow, not to publish.

    Args:
        data: of which some are looked at.
        encoder_of: network -> as probes see it.
        bottleneck: number of blocks -> which one.
        mixed_precision: of the network.
        images: about how many are looked at; two of a class at least.

    Raises:
        ValueError: no labels, or labels that do not suffice.
    """

    def __init__(
        self,
        data: ImageData,
        encoder_of: Callable[[nn.Module], Encoder],
        bottleneck: Callable[[int], int],
        mixed_precision: str,
        images: int,
    ) -> None:
        if data.labels is None:
            raise ValueError(f"{data.name} has no labels, and --probe_every needs them; leave it away, or make a subfolder for each class")
        check_labels(torch.from_numpy(data.labels), data.class_names)
        self.encoder_of, self.bottleneck, self.mixed_precision = encoder_of, bottleneck, mixed_precision
        self.data = fewer(data, images, seed=0)
        self.labels = torch.from_numpy(self.data.labels)
        self.judged, *others = held_out_parts(self.labels, FOLDS, FOLDS)
        fitted = [(part, ~(self.judged | part)) for part in others if part.any()]
        self.choosing = next((part for part, rest in fitted if len(self.labels[rest].unique()) == len(self.labels.unique())), None)

    def __call__(self, run: Path, step: int, network: nn.Module, ema: EMA) -> dict[str, float]:
        """For the training's log, of the averaged weights: the accuracies of weighted neighbours, `probe_knn`, and of the linear probe,
        `probe_linear`, in [0, 1]; and `probe_rank`, the paper's entropy. A class of two images has none left for a linear probe."""
        encoder = self.encoder_of(averaged(network, ema))
        block = self.bottleneck(len(block_shapes(encoder, self.data)))
        (x,) = block_features(encoder, self.data, (block,), ("mean",), mixed_precision=self.mixed_precision).values()
        train, judged = ~self.judged, self.judged
        knn = knn_accuracy(x[train], self.labels[train], x[judged], self.labels[judged], min(K, int(train.sum())))
        found = {"probe_knn": round(knn, 4), "probe_rank": round(effective_rank(x), 4)}
        if self.choosing is not None:
            x, y, chosen_by = x.to(encoder.device), self.labels.to(encoder.device), self.choosing[train].to(encoder.device)
            predictions = softmax_probe(x[train], y[train], x[judged], [chosen_by]).predictions
            found["probe_linear"] = round((predictions == y[judged]).double().mean().item(), 4)
        return found
