"""Images that are read while a training goes on, for sets too large to be packed: `datasets` streams.

A step sees so many batches, and each of them has a stream of its own, with its own files: stream m gives batch m of every step,
whichever process works on it. So N processes repeat one with N times the accumulation here too, and every process reads only what
it needs. An epoch of a stream is every image of its files once; a resumed run reads past those that it has seen.
"""

import gc
import hashlib
import json
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from models.progress import progress_bar
from training.data import ImageData, Reader, Rows, TrainingData, in_unit_range, pixels
from training.images import EMBEDDED, decode_image, label_values, open_dataset, undecoded

ARROW_ENDS_S = 1.0  # a tenth of that was enough for those who reported the crash (apache/arrow#39862)


@dataclass(frozen=True)
class ImageStream(TrainingData):
    """A split that is read anew each epoch.

    Attributes:
        table: `datasets.IterableDataset` of undecoded images.
        image_column, label_column: of the table; the latter may be None.
        resolution: edge in pixels.
        shuffle_buffer: so many images of a stream are held, undecoded, and the next one is drawn from them.
    """

    table: Any
    image_column: str
    label_column: str | None
    resolution: int
    shuffle_buffer: int

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    @property
    def images_fingerprint(self) -> None:
        return None

    @property
    def extent(self) -> str:
        return "a stream of images"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.resolution, self.resolution

    def reader(self, seed: int, batches_a_step: int) -> "Streams":
        return Streams(self, seed, batches_a_step)

    def rows(self, indices: np.ndarray) -> Rows:
        raise TypeError("a stream has no indices")

    def samples(self, rows: Rows, device: torch.device, generator: torch.Generator | None, mirrored: Tensor | None) -> Tensor:
        """In [-1, 1]; nothing is drawn."""
        return in_unit_range(pixels(rows, device), mirrored)

    def some(self, count: int) -> Tensor:
        """Float (count, C, H, W) in [-1, 1], the first ones."""
        images = [self.decode(row) for row in self.table.take(count)]
        return self.samples(Rows(np.stack(images), None), torch.device("cpu"), None, None)

    def decode(self, row: dict[str, Any]) -> np.ndarray:
        """uint8 (H, W, 3); ValueError for an image that is broken."""
        return decode_image(row[self.image_column], f"an image of {self.name}", self.resolution)

    def numbered(self, values: list[Any]) -> np.ndarray:
        """Labels as they were read -> int64 in [0, num_classes); ValueError if one is missing."""
        if any(value is None or value == -1 for value in values):
            raise ValueError(f"an image of {self.name} has no {self.label_column}; label it or leave it out")
        if not hasattr(self.table.features[self.label_column], "names"):
            values = [self.class_names.index(str(value)) for value in values]
        return np.array(values, np.int64)


def at_hand(data: ImageData | ImageStream, flag: str) -> ImageData:
    """The images of a split, for what cannot do with a stream; ValueError, which names the flag that asked for it, if it is one."""
    if isinstance(data, ImageStream):
        raise ValueError(f"{flag} needs all images at hand, and --streaming does not keep them; leave one of the two away")
    return data


def open_stream(name: str, resolution: int, split: str, image_column: str, label_column: str | None, shuffle_buffer: int) -> ImageStream:
    """Open a data set to be read while training; see `training.packing.load_images` for what it may be.

    Labels that are no `ClassLabel` are numbered in sorted order, for which all of them are read once.

    Raises:
        ValueError: nothing there, columns that are not, or the embedded data, which are packed.
    """
    if name == EMBEDDED and not Path(name).is_dir():
        raise ValueError(f"the embedded {EMBEDDED} is drawn once and packed; leave --streaming away")
    table = open_dataset(name, split, streaming=True)
    if table.features is None:
        raise ValueError(f"{name} does not tell its columns before it is read; leave --streaming away")
    files = _files(name)
    table, label_column = undecoded(name, table, image_column, label_column)
    table = table.select_columns([image_column, *[label_column] * bool(label_column)])
    class_names = _class_names(name, table, label_column) if label_column else ()
    what = [name if not files else "", split, files, str(table.features), resolution, image_column, label_column]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    return ImageStream(
        labels=None,
        class_names=class_names,
        name=name,
        split=split,
        fingerprint=fingerprint,
        table=table,
        image_column=image_column,
        label_column=label_column,
        resolution=resolution,
        shuffle_buffer=shuffle_buffer,
    )


def _files(name: str) -> list[tuple[str, int]]:
    """Names and sizes of a folder's files; none of a set on the hub."""
    paths = sorted(path for path in Path(name).rglob("*") if path.is_file())
    return [(path.relative_to(name).as_posix(), path.stat().st_size) for path in paths]


def _class_names(name: str, table: Any, column: str) -> tuple[str, ...]:
    feature = table.features[column]
    if hasattr(feature, "names"):
        return tuple(feature.names)
    rows = progress_bar(table.select_columns([column]), f"reading the labels of {name}", unit=" images")
    return tuple(str(value) for value in label_values(name, table, column, (row[column] for row in rows)))


class Streams(Reader):
    """The streams of a training, of which a process opens those that it is asked for. Knows where they stand, for checkpoints.

    Args:
        data: what is read.
        seed: of the order of files and images, with the epoch.
        count: number of streams, which is that of the batches of a step.
    """

    data: ImageStream

    def __init__(self, data: ImageStream, seed: int, count: int) -> None:
        import datasets.config

        # seconds after every epoch of every stream, lest a process that ends then crash; `close` sees to that once
        datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
        self.data, self.seed, self.count = data, seed, count
        self.opened: dict[int, _Stream] = {}
        self.places: dict[int, tuple[int, int]] = {}  # where a resumed run begins
        self.thread = ThreadPoolExecutor(1)  # prepares the next batch while the step runs
        self.decoders = ThreadPoolExecutor()

    def rows(self, position: int, count: int) -> Rows:
        """The next `count` images of the stream whose turn it is at this position of the training."""
        number = position // count % self.count
        if number not in self.opened:
            self.opened[number] = _Stream(self, number, self.places.get(number, (0, 0)))
        return self.opened[number].next(count)

    def part(self, number: int) -> Any:
        """The images of one stream: whole files where there are enough of them, else every so-many-th image."""
        from datasets.distributed import split_dataset_by_node

        table = self.data.table
        if table.num_shards < self.count:
            table = table.reshard()  # parquet files have parts
        if table.num_shards < self.count:
            part = split_dataset_by_node(table, number, self.count, strategy="examples")
        else:
            part = table.shard(self.count, number, contiguous=False)
        return part.shuffle(seed=self.seed, buffer_size=self.data.shuffle_buffer)

    def state_dict(self) -> dict[str, Any]:
        """Where every stream of every process stands. Every process calls this."""
        opened = [(number, stream.place) for number, stream in self.opened.items()]
        return {"places": self.places | dict(gather_object(opened))}  # where a resumed run began, all processes know alike

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.places, self.opened = dict(state["places"]), {}

    def close(self) -> None:
        """Let go of all that is open, before the process ends: Arrow's threads crash if they outlive Python (apache/arrow#45214)."""
        self.thread.shutdown(cancel_futures=True)
        self.decoders.shutdown()
        for stream in self.opened.values():
            stream.rows.close()  # even if the traceback of an error holds the stream
        self.opened.clear()
        gc.collect()
        time.sleep(ARROW_ENDS_S)


class _Stream:
    """One stream from a place on: `place` is (epoch, images of it that were given)."""

    def __init__(self, streams: Streams, number: int, place: tuple[int, int]) -> None:
        self.streams, self.data, self.place = streams, streams.data, place
        self.rows = self._rows(streams.part(number), *place)
        self.ahead: Future[tuple[Rows, tuple[int, int]]] | None = None

    def next(self, count: int) -> Rows:
        """The next images; those after them are being read when this returns."""
        ahead = self.ahead or self.streams.thread.submit(self._take, count)
        rows, self.place = ahead.result()
        self.ahead = self.streams.thread.submit(self._take, count)
        return rows

    def _take(self, count: int) -> tuple[Rows, tuple[int, int]]:
        places, rows = zip(*islice(self.rows, count), strict=True)
        images = np.stack(list(self.streams.decoders.map(self.data.decode, rows)))
        column = self.data.label_column
        return Rows(images, self.data.numbered([row[column] for row in rows]) if column else None), places[-1]

    def _rows(self, table: Any, epoch: int, given: int) -> Generator[tuple[tuple[int, int], dict[str, Any]]]:
        """Epochs joined end to end, each row with the place behind it."""
        while True:
            table.set_epoch(epoch)
            before = given
            for row in islice(table, before, None):
                given += 1
                yield (epoch, given), row
            if not given:
                raise ValueError(f"{self.data.name} has no images for one of {self.streams.count} streams; train with fewer batches a step")
            epoch, given = epoch + 1, 0
