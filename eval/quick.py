"""A quick look at features while they are learned: neighbours and rank, always of the same images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from eval.encoders import Encoder, block_features, block_shapes
from eval.knn import knn_accuracy
from eval.linear import held_out_parts
from eval.looking import fewer
from eval.measure import check_labels
from eval.rank import effective_rank
from training.checkpoint import averaged
from training.data import ImageData
from training.ema import EMA

IMAGES, FOLDS, K = 2500, 5, 20  # a fifth of the images votes on nothing and is judged
TIME = 0.7  # at which a diffusion model looks


class QuickProbe:
    """Judges a network by one block's mean token, on images of its own training set: to see features grow, not to publish.

    Args:
        data: of which at most `IMAGES` are looked at.
        encoder_of: network -> as probes see it.
        bottleneck: number of blocks -> which one.
        mixed_precision: of the network.

    Raises:
        ValueError: no labels, or labels that do not suffice.
    """

    def __init__(
        self, data: ImageData, encoder_of: Callable[[nn.Module], Encoder], bottleneck: Callable[[int], int], mixed_precision: str
    ) -> None:
        if data.labels is None:
            raise ValueError(f"{data.name} has no labels, and --probe_every needs them; leave it away, or make a subfolder for each class")
        check_labels(torch.from_numpy(data.labels), data.class_names)
        self.encoder_of, self.bottleneck, self.mixed_precision = encoder_of, bottleneck, mixed_precision
        self.data = fewer(data, IMAGES, seed=0)
        self.labels = torch.from_numpy(self.data.labels)
        (self.judged,) = held_out_parts(self.labels, FOLDS, parts=1)

    def __call__(self, run: Path, step: int, network: nn.Module, ema: EMA) -> dict[str, float]:
        """For the training's log, of the averaged weights: `probe_knn`, the accuracy of weighted neighbours in [0, 1], and `probe_rank`,
        the paper's entropy."""
        encoder = self.encoder_of(averaged(network, ema))
        block = self.bottleneck(len(block_shapes(encoder, self.data)))
        (x,) = block_features(encoder, self.data, (block,), ("mean",), mixed_precision=self.mixed_precision).values()
        train, judged = ~self.judged, self.judged
        knn = knn_accuracy(x[train], self.labels[train], x[judged], self.labels[judged], min(K, int(train.sum())))
        return {"probe_knn": round(knn, 4), "probe_rank": round(effective_rank(x), 4)}
