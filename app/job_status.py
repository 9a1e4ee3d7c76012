"""Where a run stands and how far it is, read from its folder."""

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.job_files import (
    ACTIVE,
    CONFIG,
    FAILED,
    RUNNING,
    TRAINING,
    curve_of,
    json_of,
    log_of,
    options_of,
    pace_of,
    part_of,
    read_job,
    saved_step,
    state_of,
    wanted_steps,
)
from app.job_process import process_of, trained_outside


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        name: of the run; of an evaluation its number.
        kind: "training" or "evaluation".
        folder: where it is.
        state: "queued", "running", "stopping" (it saves), "finished", "failed" or "interrupted" (stopped, or its process died).
        message: one line for people; of a failed run the error.
        position: in the queue, from 1; 0 if it is not queued.
        options: flags of the training script; of an evaluation see `app.judging`.
        started_at: seconds since 1970; None if it never was, or was started without the page.
        log: of a failed run the last lines.
    """

    name: str
    kind: str
    folder: Path
    state: str
    message: str
    position: int
    options: dict[str, Any]
    started_at: float | None
    log: tuple[str, ...]

    @property
    def active(self) -> bool:
        """It runs or will; else it can be resumed or deleted."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: last one that was logged or saved.
        of: steps in all; None where minutes are counted.
        images_per_s: lately.
        seconds_left: of a running one, as far as that can be told.
        part: what it is at beside its steps, as `models.progress` tells it: an evaluation has only such parts.
        curve: lines of metrics.jsonl ("step", "loss", "images_per_s", "block_norms", ...), evenly thinned to `MAX_POINTS`.
        sample: newest grid of samples.
        log: last lines.
    """

    step: int
    of: int | None
    images_per_s: float | None
    seconds_left: float | None
    part: dict[str, Any] | None
    curve: list[dict[str, Any]]
    sample: Path | None
    log: tuple[str, ...]


def status_of(run: Path, outside: Callable[[], Container[Path]] = trained_outside) -> Status:
    """Of the run or evaluation in a folder; its place in the queue only all of them together tell.

    Args:
        outside: folders of the runs that were started without the page; asked only where it matters.
    """
    job = read_job(run)
    lives = job is not None and process_of(run, job) is not None
    state, message = state_of(run, job, lives, outside)
    log = log_of(run, job.log_begins) if state == FAILED and job else ()
    kind = job.kind if job else TRAINING
    return Status(run.name, kind, run, state, message, 0, options_of(run, job), job.started_at if job else None, log)


def progress_of(status: Status, brief: bool = False) -> Progress:
    """How far a run is, and the curves, pictures and words that it left so far.

    Args:
        brief: without the curves, pictures and words, for which many files are read.
    """
    run, job, config = status.folder, read_job(status.folder), json_of(status.folder / CONFIG)
    logged_step, rate = pace_of(run)
    step, of = max(saved_step(run), logged_step), wanted_steps(run, job)
    left = []
    if status.state == RUNNING and of and rate and "images_a_step" in config:
        left.append((of - step) * config["images_a_step"] / rate)
    if status.state == RUNNING and status.started_at and (minutes := {**config, **status.options}.get("max_train_minutes")):
        left.append(max(0.0, 60 * minutes - (time.time() - status.started_at)))
    part = part_of(run) if status.active and job and process_of(run, job) else None  # else of a process that was killed
    so_far = Progress(step, of, rate, min(left, default=None), part, curve=[], sample=None, log=())
    if brief:
        return so_far
    samples = {int(path.stem[5:]): path for path in (run / "samples").glob("step-*.png") if path.stem[5:].isdigit()}
    sample = samples[max(samples)] if samples else None
    return replace(so_far, curve=curve_of(run), sample=sample, log=log_of(run, 0))
