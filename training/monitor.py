"""What a training tells while it runs: `metrics.jsonl`, trackers, norms and rank of the blocks' outputs, sample grids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from models.files import written_aside
from models.rank import effective_rank

METRICS = "metrics.jsonl"
EXPLODED = 1e4  # root mean square of a block's output; below 4 in the trainings of `make demo`


class MetricsFile:
    """One line a logged step. Resuming drops the lines of steps that will be taken again."""

    def __init__(self, run: Path, accelerator: Accelerator, first_step: int) -> None:
        self.path = run / METRICS
        self.accelerator = accelerator
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(run) if line["step"] <= first_step]
            with written_aside(self.path) as aside:
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append a line with `step`, and hand its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        self.accelerator.log(numbers, step=line["step"])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    path = run / METRICS
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


@torch.no_grad()
def feature_statistics(
    model: nn.Module, arguments: tuple[Any, ...], bottleneck: Callable[[int], int], num_images: int = 64
) -> dict[str, list[float] | float | None]:
    """What a line tells of the blocks' outputs on the first images of a batch.

    Args:
        arguments: of the model; tensors are cut to `num_images`, or as many as there are.
        bottleneck: number of blocks -> which one's rank is told.

    Returns:
        block_norms: root mean square of every block's output: where shortcuts fade too fast it explodes.
        effective_rank: of the bottleneck's output, averaged over the tokens; at most log(num_images), so to be compared between
            trainings of equal batches. None where there is none, as the features are 0 or not finite.
    """
    few = (argument[:num_images] if isinstance(argument, Tensor) else argument for argument in arguments)
    _, features = model(*few, return_features=True)
    norms = torch.stack([block.float().square().mean().sqrt() for block in features]).tolist()
    pooled = features[bottleneck(len(features))].float().mean(dim=1)  # (N, D)
    rank = effective_rank(pooled) if pooled.isfinite().all() and pooled.any() else None
    return {
        "block_norms": [round(norm, 4) for norm in norms],
        "effective_rank": rank if rank is None else round(rank, 4),
    }


def save_grid(path: Path, images: np.ndarray, columns: int) -> None:
    """uint8 (N, H, W, C) -> one picture, row by row, on white."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    padded = np.full((rows * columns, height, width, channels), 255, np.uint8)
    padded[:n] = images
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    with written_aside(path) as aside:
        Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(aside, format="png")
