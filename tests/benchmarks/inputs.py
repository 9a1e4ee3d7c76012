"""What the cases work on."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.published import CLASSES, write_folder
from training.data import ImageData, TrainingData

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")


@dataclass
class Inputs:
    """What the command line gives to the cases.

    Attributes:
        images: of each side of `fid`.
        samples: of each side of `sampling`, by which its quality is judged.
        peer: checkout of the published code, in place of what is written down here.
        keep: enters a context that lasts as long as the case, and returns what it gives.
    """

    images: int
    samples: int
    peer: Path | None
    keep: Callable[[AbstractContextManager], Any]

    @property
    def peer_name(self) -> str:
        """Of the checkout; nothing where there is none."""
        return self.peer.name if self.peer else ""

    @property
    def theirs(self) -> str:
        """Words for the opponent of the whole steps."""
        return f"that of {self.peer_name}, in fp32" if self.peer else "that of the published loop, rewritten, in fp32"


def noise_images(count: int, size_px: int) -> ImageData:
    """Packed bytes in nine classes."""
    images = np.random.default_rng(0).integers(0, 256, (count, size_px, size_px, 3), np.uint8)
    return ImageData(images, labels=np.arange(count) % CLASSES, class_names=tuple("abcdefghi"), name="noise", split="train", fingerprint="")


def batches_of(data: TrainingData, batch_size: int, device: torch.device = CPU) -> Callable[[], tuple[dict[str, Any], torch.Generator]]:
    """The next batch each time, as our loop takes it."""
    data = data.held(device)
    reader, taken = data.reader(seed=0, batches_a_step=1), count()

    def batch() -> tuple[dict[str, Any], torch.Generator]:
        number = next(taken)
        generator = torch.Generator(device).manual_seed(number)
        return data.batch(reader.rows(number * batch_size, batch_size), device, generator, flip=True), generator

    return batch


@contextmanager
def folder_of(data: ImageData) -> Iterator[Path]:
    """The images as PNG files, as long as the context lives."""
    with tempfile.TemporaryDirectory(prefix="fading-shortcuts-benchmark-") as name:
        write_folder(Path(name), data.images, data.labels)
        yield Path(name)
