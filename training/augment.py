"""The random-resized crop (arXiv 1409.4842) of a batch of images, on its device: MAE's only augmentation beside the flip.

On a CPU torch's kernel for bytes resizes box by box: it is written for one image in the cache. On other devices a kernel for each
box would cost more to launch than to run, and a batch is resized at once.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import ImageData, Reader, Rows, TrainingData, in_unit_range, pixels
from training.stream import ImageStream

RATIO = (3 / 4, 4 / 3)  # width / height of a box
ATTEMPTS = 10


class Boxes(NamedTuple):
    """A part of every image, in whole pixels: four times int64 (N,)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_boxes(count: int, size_px: int, min_scale: float, generator: torch.Generator) -> Boxes:
    """Boxes in square images as torchvision's `RandomResizedCrop` draws them: area, then ratio, then place, each independent.

    Args:
        size_px: edge of the images.
        min_scale: an area is uniform between this share of the image's and all of it; a ratio is uniform in its logarithm.
        generator: its device is where the boxes are.
    """
    device = generator.device
    area, ratio, place = torch.rand(3, ATTEMPTS, count, device=device, generator=generator)  # 3 x (A, N)
    area = size_px**2 * (min_scale + (1 - min_scale) * area)
    ratio = torch.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * ratio)
    sizes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round().long()  # (2, A, N), height and width
    fits = ((sizes > 0) & (sizes <= size_px)).all(0)  # (A, N)
    first = fits.int().argmax(0).expand(2, 1, -1)  # attempt that is taken
    height, width = sizes.gather(1, first).squeeze(1).where(fits.any(0), size_px)  # 2 x (N,); the whole image where none fits
    top, left = place[0] * (size_px - height + 1), place[1] * (size_px - width + 1)  # floors are in [0, size - height]
    return Boxes(top.long(), left.long(), height, width)


def crop_and_resize(images: Tensor, boxes: Boxes) -> Tensor:
    """Blow a box of every image, uint8 (N, C, S, S), up to its size; uint8 again.

    Bicubic as in Pillow and in torchvision with antialias: Keys' kernel with a = -1/2, renormalised at the edges of the box. A box
    is never larger than the output, so there is nothing to guard against aliasing.
    """
    return (_resize_each if images.device.type == "cpu" else _resize_together)(images, boxes)


def _resize_each(images: Tensor, boxes: Boxes) -> Tensor:
    """Box by box; fastest where the channels of a pixel lie side by side."""
    resize = torch.ops.aten._upsample_bicubic2d_aa.out  # F.interpolate(..., antialias=True) into memory that is there: twice as fast
    size = images.shape[-2:]
    out = torch.empty_like(images, memory_format=torch.channels_last)
    for image, target, top, left, height, width in zip(images[:, None], out[:, None], *(sides.tolist() for sides in boxes), strict=True):
        resize(image[:, :, top : top + height, left : left + width], size, False, out=target)
    return out


def _resize_together(images: Tensor, boxes: Boxes) -> Tensor:
    """The whole batch: linear in the pixels and separable, so first columns are summed with weights, and then rows."""
    x = images.float()
    for start, length in ((boxes.left, boxes.width), (boxes.top, boxes.height)):
        x = _stretch(x.mT, start, length).round().clamp_(0, 255)  # bytes in between, too
    return x.to(torch.uint8)  # (N, C, S, S)


def _stretch(images: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Blow the rows [start, start + length) of every image, float (N, C, S, W), up to all of its rows.

    Every row of the output is a weighted sum of four rows of the input, which is what `embedding_bag` computes.
    """
    n, c, s, width = images.shape
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    out = torch.arange(s, device=images.device).view(1, -1, 1)
    near = torch.arange(-1, 3, device=images.device)  # the four rows that a row of the output sees
    centre = (2 * out + 1) * length - s  # (N, S, 1), its place in the box, in units of 1 / 2s rows
    rows = centre // (2 * s) + near  # (N, S, 4)
    d = (near - centre % (2 * s) / (2 * s)).abs()
    weights = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    weights = weights * ((rows >= 0) & (rows < length))
    weights = weights / weights.sum(-1, keepdim=True)

    rows = (start + rows).clamp(0, s - 1).unsqueeze(1)  # those outside weigh nothing
    rows = rows + s * torch.arange(n * c, device=images.device).view(n, c, 1, 1)  # (N, C, S, 4)
    weights = weights.unsqueeze(1).expand_as(rows).reshape(-1, 4)
    table = images.reshape(-1, width)  # (N * C * S, W)
    return F.embedding_bag(rows.view(-1, 4), table, per_sample_weights=weights, mode="sum").view(n, c, s, width)


@dataclass(frozen=True)
class CroppedData(TrainingData):
    """A split of which every sample is a random part, blown up to the size of the image.

    Attributes:
        whole: the images.
        min_scale: least share of an image's area.
    """

    whole: ImageData | ImageStream
    min_scale: float

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.whole.shape

    def held(self, device: torch.device) -> Self:
        return replace(self, whole=self.whole.held(device))

    @property
    def images_fingerprint(self) -> str | None:
        return self.whole.images_fingerprint

    def reader(self, seed: int, batches_a_step: int) -> Reader:
        return self.whole.reader(seed, batches_a_step)

    def rows(self, indices: np.ndarray) -> Rows:
        return self.whole.rows(indices)

    def samples(self, rows: Rows, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        boxes = random_boxes(len(rows), self.shape[-1], self.min_scale, generator)
        return in_unit_range(crop_and_resize(pixels(rows, device), boxes), mirrored)


def with_crops(data: ImageData | ImageStream, min_scale: float) -> TrainingData:
    """Random-resized crops of at least that share of an image's area; 1 leaves the images whole."""
    if min_scale == 1:
        return data
    return CroppedData(data, min_scale, **{field.name: getattr(data, field.name) for field in fields(TrainingData)})
