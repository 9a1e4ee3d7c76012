"""What a training reads: samples as batches, in a random order that a seed decides."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingData(ABC):
    """What a training reads: a split as batches of samples, which are images, or latents of images (training/latents.py).

    Attributes:
        labels: int64 (N,) in [0, len(class_names)), or None.
        class_names: in the order of the labels; empty without labels.
        name: as the user wrote it.
        split: "train", "validation" or "all".
        fingerprint: hash of all that decides the samples, labels and class names; equal wherever the data are.
    """

    labels: np.ndarray | None
    class_names: tuple[str, ...]
    name: str
    split: str
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""

    @property
    def images_fingerprint(self) -> str | None:
        """That of the same images as `load_images` packs them; None where they are not packed."""
        return self.fingerprint

    @property
    def extent(self) -> str:
        """How much there is, in words."""
        return f"{len(self):,} images"

    def order(self, seed: int, batches_a_step: int) -> "Order":
        """In which order a training sees the samples."""
        return Order(len(self), seed)

    def labels_of(self, indices: Any) -> np.ndarray | None:
        """int64 (N,), or None without labels."""
        return None if self.labels is None else self.labels[indices]

    def held(self, device: torch.device) -> Self:
        """The same; what fits lies on the device from now on, so that batches need not travel."""
        return self

    @abstractmethod
    def samples(self, indices: Any, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """Float (N, C, H, W); those of `mirrored`, bool (N,), are of the mirrored image."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batch(self, indices: Any, device: torch.device, generator: torch.Generator, flip: bool) -> dict[str, Tensor]:
        """What an objective takes (training/objectives.py): samples as "images" and, where there are labels, "labels".

        Args:
            indices: what the `order` gave.
            generator: on the device; all that is random comes from it.
            flip: mirror half of the images.
        """
        mirrored = torch.rand(len(indices), device=device, generator=generator) < 0.5 if flip else None
        batch = {"images": self.samples(indices, device, generator, mirrored)}
        labels = self.labels_of(indices)
        if labels is not None:
            batch["labels"] = moved(labels, device)
        return batch


@dataclass(frozen=True)
class ImageData(TrainingData):
    """A split in memory (or mapped from the cache).

    Attributes:
        images: uint8 (N, H, W, 3).
        left_out: names of images that could not be read.
        on_device: the images once more, where a training computes; see `held`.
    """

    images: np.ndarray
    left_out: tuple[str, ...] = ()
    on_device: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def samples(self, indices: np.ndarray, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """In [-1, 1]; nothing is drawn."""
        return in_unit_range(self.pixels(indices, device), mirrored)

    def some(self, count: int) -> Tensor:
        """Float (count, C, H, W) in [-1, 1] from all over the split; fewer where it has fewer."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return self.samples(indices, torch.device("cpu"), None, None)

    def held(self, device: torch.device) -> Self:
        """With all images on a GPU, if they take at most an eighth of what is free there."""
        if device.type != "cuda" or 8 * self.images.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, on_device=copied(self.images, device))

    def pixels(self, indices: np.ndarray, device: torch.device) -> Tensor:
        """uint8 (N, C, H, W), the channels of a pixel side by side."""
        chosen = moved(self.images[indices], device) if self.on_device is None else self.on_device[moved(indices, device)]
        return chosen.permute(0, 3, 1, 2)


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device. Neither waits for the other: steps are sent to a GPU while it is busy with earlier ones."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copied(images: np.ndarray, device: torch.device) -> Tensor:
    """All images on the device, read part by part: a mapped file need not fit into memory."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 4096):
        copy[start : start + 4096] = torch.from_numpy(np.array(images[start : start + 4096]))
    return copy


def in_unit_range(pixels: Tensor, mirrored: Tensor | None) -> Tensor:
    """uint8 (N, C, H, W) -> contiguous float in [-1, 1]; those of `mirrored`, bool (N,), are turned round."""
    on_cpu = pixels.device.type == "cpu"
    if on_cpu:  # what is moved is moved as bytes, a fourth of what floats take
        pixels = pixels.contiguous()
        pixels = pixels if mirrored is None else _turned_round(pixels, mirrored)
    images = torch.empty(pixels.shape, device=pixels.device).copy_(pixels).div_(127.5).sub_(1)
    if on_cpu or mirrored is None:
        return images
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)  # to know which ones, the host would wait for the device


def _turned_round(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """With `index_select`, which takes a tenth of the time that indices in brackets take."""
    which = mirrored.nonzero().squeeze(1)
    places = torch.arange(len(pixels))
    places[which] = len(pixels) + torch.arange(len(which))
    return torch.cat([pixels, pixels.index_select(0, which).flip(3)]).index_select(0, places)


class Order:
    """The infinite sequence of image indices: a new permutation each epoch, a pure function of seed and position."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def indices(self, position: int, count: int) -> np.ndarray:
        """Those at positions [position, position + count), epochs joined end to end."""
        found = []
        while count > 0:
            epoch, offset = divmod(position, self.num_images)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                self.epoch, self.permutation = epoch, torch.randperm(self.num_images, generator=generator)
            part = self.permutation[offset : offset + count]
            found.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(found).numpy()

    def close(self) -> None:
        """To be called when no more are asked for."""


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers, unlike those of neighbouring numbers. Zeros at the end do not count."""
    return int(np.random.SeedSequence(parts).generate_state(2, np.uint32).view(np.uint64)[0] >> np.uint64(1))
