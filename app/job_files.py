"""What jobs are on disk: `job.json` of the page, and what trainings and evaluations write beside it."""

import math
import os
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from app import judging
from app.job_flags import OWN_OPTIONS
from app.libraries import load_libraries
from models.files import INDEX, read_json

JOB, LOG, CONFIG, PART = "job.json", "log.txt", "config.json", "progress.json"
QUEUED, RUNNING, STOPPING = ACTIVE = ("queued", "running", "stopping")
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
TRAINING, EVALUATION = "training", "evaluation"
MAX_POINTS = 500  # of a curve
LOOKS = {"fd", "probe_knn", "probe_linear"}  # of a line, where it is of a step that was looked at
LOG_BYTES, LOG_LINES = 64 * 1024, 40
REACHED = re.compile(r": step \d+ reached$")  # how the scripts take their leave
SIGNALLED = re.compile(r"^(SIGTERM|SIGINT): saving")


@dataclass(frozen=True)
class Job:
    """What `job.json` holds.

    Attributes:
        options: flags of the training script, without those that the page gives; of an evaluation see `app.judging`.
        queued_at: seconds since 1970, as all times here.
        resume: go on from the last checkpoint.
        pid, process_began: of the process, once there was one; a number alone may come to belong to another process.
        started_at: when it was started.
        log_begins: where in the log it starts to speak.
        stop_asked_at: when it was asked to stop, if it was.
        error: why it could not be started.
        kind: "training" or "evaluation".
    """

    options: dict[str, Any]
    queued_at: float
    resume: bool = False
    pid: int | None = None
    process_began: float | None = None
    started_at: float | None = None
    log_begins: int = 0
    stop_asked_at: float | None = None
    error: str | None = None
    kind: str = TRAINING

    @property
    def waits(self) -> bool:
        """For its turn: it was neither started nor cancelled."""
        return self.pid is None and self.stop_asked_at is None and not self.error


def state_of(run: Path, job: Job | None, lives: bool, outside: Callable[[], Container[Path]]) -> tuple[str, str]:
    """State and message.

    Args:
        lives: its process does.
        outside: folders of the runs that are trained without the page; asked for only if it matters.
    """
    if job and job.error:
        return FAILED, job.error
    if job and job.waits:
        return QUEUED, "waits for its turn"
    if lives and job:
        if job.kind == EVALUATION:
            return (RUNNING, "measures") if job.stop_asked_at is None else (STOPPING, "leaves")
        return (RUNNING, "trains") if job.stop_asked_at is None else (STOPPING, "saves, then leaves")
    if job and job.kind == EVALUATION:
        return _state_of_evaluation(run, job)
    step, of = saved_step(run), wanted_steps(run, job)
    if of and step >= of:
        return FINISHED, f"all {of:,} steps are done"
    if run in outside():
        return RUNNING, "started outside the page"
    log = log_of(run, job.log_begins, most=None) if job else ()
    if error := _error(log):
        return FAILED, error
    asked = job is not None and job.stop_asked_at is not None
    if any(map(REACHED.search, log)) and not asked and not any(map(SIGNALLED.search, log)):
        return FINISHED, f"its time is over after {step:,} steps"
    last = f"the last checkpoint is of step {step:,}" if step else "there is no checkpoint yet"
    why = "stopped" if asked else "its process ended early" if job else "does not run"
    return INTERRUPTED, f"{why}; {last}"


def _state_of_evaluation(folder: Path, job: Job) -> tuple[str, str]:
    if judging.is_done(folder):
        return FINISHED, "done"
    if job.stop_asked_at is not None:
        return INTERRUPTED, "stopped"
    return FAILED, _error(log_of(folder, job.log_begins, most=None)) or "its process ended early"


def _error(log: tuple[str, ...]) -> str | None:
    """The line of a log that says why the process ended."""
    told = [line.removeprefix("error: ") for line in log if line.startswith("error: ")]
    if told:
        return told[-1]
    tracebacks = [i for i, line in enumerate(log) if line.startswith("Traceback (most recent call last)")]
    return next((line for line in log[tracebacks[-1] + 1 :] if line and not line[0].isspace()), "it broke down") if tracebacks else None


def read_job(run: Path) -> Job | None:
    """None if the run was made without the page."""
    try:
        return Job(**read_json(run / JOB))
    except (OSError, ValueError, TypeError):
        return None


def queued_at(run: Path) -> tuple[float, str]:
    job = read_job(run)
    return (job.queued_at if job else 0.0), run.name


def json_of(path: Path) -> dict[str, Any]:
    """Empty if it is not there or damaged."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def options_of(run: Path, job: Job | None) -> dict[str, Any]:
    """A run's flags; of one that was made without the page all that its config tells."""
    told = job.options if job else json_of(run / CONFIG)
    return {option: value for option, value in told.items() if value is not None and option not in OWN_OPTIONS}


def saved_step(run: Path) -> int:
    training = json_of(run / INDEX).get("training")
    return training.get("steps", 0) if isinstance(training, dict) else 0


def wanted_steps(run: Path, job: Job | None) -> int | None:
    """The job's, as a run that goes on may go further than it was to at first; else as the config has it from the preset."""
    told = (job.options.get("max_train_steps") if job else None) or json_of(run / CONFIG).get("max_train_steps")
    return told if isinstance(told, int) else None  # files may say anything


def part_of(run: Path) -> dict[str, Any] | None:
    """What a process is at, as `models.progress` tells it: "part", "done", "of" and "seconds_left"; None between two parts."""
    told = json_of(run / PART)
    numbers = [told.get(key) for key in ("done", "of", "seconds_left")]
    fits = isinstance(told.get("part"), str) and numbers[0] is not None
    fits = fits and all(each is None or (isinstance(each, int | float) and math.isfinite(each)) for each in numbers)
    return told if fits else None


def log_of(run: Path, begins: int, most: int | None = LOG_LINES) -> tuple[str, ...]:
    """Last lines of a run's log, none before `begins`."""
    try:
        with (run / LOG).open("rb") as file:
            file.seek(max(begins, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(lines if most is None else lines[-most:])


def curve_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, `thinned`."""
    version = _version_of(run)
    return list(_curve_and_pace_of(run, version)[0]) if version else []


def pace_of(run: Path) -> tuple[int, float | None]:
    """The last step that was logged, and images a second of the last lines; kept of more runs than their curves are."""
    version = _version_of(run)
    return _pace_of(run, version) if version else (0, None)


def _version_of(run: Path) -> tuple[int, int] | None:
    """Changes when a line is logged."""
    try:
        stat = (run / "metrics.jsonl").stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=1024)
def _pace_of(run: Path, version: tuple[int, int]) -> tuple[int, float | None]:
    return _curve_and_pace_of(run, version)[1]


@lru_cache(maxsize=16)
def _curve_and_pace_of(run: Path, version: tuple[int, int]) -> tuple[list[dict[str, Any]], tuple[int, float | None]]:
    """All that is shown of the lines: those of a long training fill a hundred megabytes, so they are not kept."""
    load_libraries()
    from training.monitor import read_metrics

    lines = read_metrics(run)
    return thinned(lines), (lines[-1]["step"], rate_of(lines)) if lines else (0, None)


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_POINTS` of them, evenly spread, with the first and the last; and as many of those that tell of a quick look."""
    looks = [i for i, line in enumerate(lines) if not LOOKS.isdisjoint(line)]
    return [lines[i] for i in sorted({*_spread(range(len(lines))), *_spread(looks)})]


def _spread(numbers: Sequence[int]) -> Sequence[int]:
    if len(numbers) <= MAX_POINTS:
        return numbers
    return [numbers[round(i * (len(numbers) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def rate_of(lines: list[dict[str, Any]]) -> float | None:
    """Images a second, of the last lines."""
    return median(line["images_per_s"] for line in lines[-20:]) or None
