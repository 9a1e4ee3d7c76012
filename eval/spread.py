"""Work spread over the processes of `accelerate launch`: whole batches, so that every image has the same company however many there are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from models.precision import uses_gpu
from training.processes import PATIENCE


def processes() -> PartialState:
    """The processes of this launch; the first call finds them, and gives each its GPU."""
    return PartialState(cpu=not uses_gpu(), timeout=PATIENCE)


_by_themselves = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process does everything itself: the others are elsewhere, such as in a training that waits for this one."""
    global _by_themselves
    before, _by_themselves = _by_themselves, True
    try:
        yield
    finally:
        _by_themselves = before


def _place() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (0, 1) if _by_themselves else (processes().process_index, processes().num_processes)


def own_batches(num: int, batch_size: int) -> list[tuple[int, int]]:
    """Begin and end of the batches of range(num) that this process takes; it may be none."""
    index, count = _place()
    starts = range(index * batch_size, num, count * batch_size)
    return [(start, min(start + batch_size, num)) for start in starts]


def gathered(arrays: Sequence[np.ndarray], num: int, batch_size: int) -> list[np.ndarray]:
    """Arrays (N, ...) of which each process filled its own batches -> filled wholly, in every process."""
    if _place()[1] == 1:
        return list(arrays)
    parts = [(start, [array[start:stop] for array in arrays]) for start, stop in own_batches(num, batch_size)]
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    return [np.concatenate(pieces) for pieces in zip(*(pieces for _, pieces in parts), strict=True)]


def everywhere(here: bool) -> bool:
    """Whether it is so in every process: they must go the same way where they will meet again."""
    return here if _place()[1] == 1 else all(gather_object([here]))


def is_main() -> bool:
    """Whether this process speaks and writes."""
    return processes().is_main_process
