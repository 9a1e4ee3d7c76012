"""What a training reads: samples as batches, in a random order that a seed decides."""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

HELD_SHARE = 1 / 8  # of a GPU's free memory: the rest is for the network


@dataclass(frozen=True)
class Rows:
    """What was read for a batch.

    Attributes:
        samples: as the data keep them, such as images, uint8 (N, H, W, 3); where the data lie on a device, there.
        labels: int64 (N,), or None.
        mirrored: the same of the mirrored images, where the data keep them.
    """

    samples: np.ndarray | Tensor
    labels: np.ndarray | None
    mirrored: np.ndarray | Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)


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

    def reader(self, seed: int, batches_a_step: int) -> "Reader":
        """What gives a training its rows."""
        return ReadAhead(self, seed)

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """int64 (N,), or None without labels."""
        return None if self.labels is None else self.labels[indices]

    @abstractmethod
    def rows(self, indices: np.ndarray) -> Rows:
        """What lies at these indices, read into memory."""

    def held(self, device: torch.device) -> Self:
        """The same; what fits lies on the device from now on, so that batches need not travel."""
        return self

    @abstractmethod
    def samples(self, rows: Rows, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """Float (N, C, H, W); those of `mirrored`, bool (N,), are of the mirrored image."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batch(self, rows: Rows, device: torch.device, generator: torch.Generator, flip: bool) -> dict[str, Tensor]:
        """What an objective takes (training/objectives.py): samples as "images" and, where there are labels, "labels".

        Args:
            rows: of the `reader`, or from anywhere.
            generator: on the device; all that is random comes from it.
            flip: mirror half of the images.
        """
        mirrored = torch.rand(len(rows), device=device, generator=generator) < 0.5 if flip else None
        batch = {"images": self.samples(rows, device, generator, mirrored)}
        if rows.labels is not None:
            batch["labels"] = moved(rows.labels, device)
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

    def reader(self, seed: int, batches_a_step: int) -> "Reader":
        return ReadAhead(self, seed) if self.on_device is None else Reader(self, seed)

    def rows(self, indices: np.ndarray) -> Rows:
        return Rows(taken(self.images if self.on_device is None else self.on_device, indices), self.labels_of(indices))

    def samples(self, rows: Rows, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """In [-1, 1]; nothing is drawn."""
        return in_unit_range(pixels(rows, device), mirrored)

    def some(self, count: int) -> Tensor:
        """Float (count, C, H, W) in [-1, 1] from all over the split; fewer where it has fewer."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return self.samples(self.rows(indices), torch.device("cpu"), None, None)

    def held(self, device: torch.device) -> Self:
        """With all images on a GPU, if they fit there."""
        return replace(self, on_device=copied(self.images, device)) if fits(self.images.nbytes, device) else self


def pixels(rows: Rows, device: torch.device) -> Tensor:
    """Images -> uint8 (N, C, H, W), the channels of a pixel side by side."""
    return moved(rows.samples, device).permute(0, 3, 1, 2)


def taken(array: np.ndarray | Tensor, indices: np.ndarray) -> np.ndarray | Tensor:
    """Rows of an array, which may be mapped, or of what lies on a device."""
    if isinstance(array, Tensor):
        return array[moved(indices, array.device)]
    return np.asarray(array).take(indices, axis=0)  # as fast as brackets, and other threads may work meanwhile


def moved(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array on the device. Neither waits for the other: steps are sent to a GPU while it is busy with earlier ones."""
    if isinstance(array, Tensor):
        return array.to(device)
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a GPU has room for data, beside what it computes."""
    return device.type == "cuda" and num_bytes <= HELD_SHARE * torch.cuda.mem_get_info(device)[0]


def copied(array: np.ndarray, device: torch.device) -> Tensor:
    """All of it on the device, read part by part: a mapped file need not fit into memory."""
    copy = torch.from_numpy(np.empty(0, array.dtype)).new_empty(array.shape, device=device)
    for start in range(0, len(array), 4096):
        copy[start : start + 4096] = torch.from_numpy(np.array(array[start : start + 4096]))
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


class Reader:
    """Rows in the order in which a training sees them."""

    def __init__(self, data: TrainingData, seed: int) -> None:
        self.data, self.order = data, Order(len(data), seed)

    def rows(self, position: int, count: int) -> Rows:
        """Those at positions [position, position + count), epochs joined end to end."""
        return self.data.rows(self.order.indices(position, count))

    def close(self) -> None:
        """To be called when no more are asked for."""


class ReadAhead(Reader):
    """A thread reads the next rows, which may come from a disk, while the step runs.

    Which are the next is guessed: as far on as these are from those before.
    """

    def __init__(self, data: TrainingData, seed: int) -> None:
        super().__init__(data, seed)
        self.thread = ThreadPoolExecutor(1)
        self.position: int | None = None
        self.ahead: dict[tuple[int, int], Future[Rows]] = {}

    def rows(self, position: int, count: int) -> Rows:
        """As of any reader; those after them are being read when this returns."""
        rows = self.ahead.pop((position, count), None) or self.thread.submit(super().rows, position, count)
        following = position + (count if self.position is None else position - self.position), count
        self.ahead = {following: self.thread.submit(super().rows, *following)}
        self.position = position
        return rows.result()

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers, unlike those of neighbouring numbers. Zeros at the end do not count."""
    return int(np.random.SeedSequence(parts).generate_state(2, np.uint32).view(np.uint64)[0] >> np.uint64(1))
