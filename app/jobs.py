"""Trainings as processes of their own: start, watch, stop, resume.

Nothing about them is kept in the page: a run's folder holds `job.json` (its flags, its place in the queue, its process) and `log.txt`
(what the process said), beside what the training writes. So a page may end, start again, or have a twin; the next look at the folder
finds everything. Looking is also what moves the queue on.

Clients give names; only the name of a folder that lies directly in the runs becomes a path.
"""

import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import psutil
from filelock import FileLock

from app.catalog import find
from models.files import INDEX, Parser, read_json, remove, write_json
from training.presets import MAE_PRESETS, PRESETS

# The training modules, and with them torch, load on first use: the page answers before. The scripts, which no module imports, are asked
# for by name, as a shell does it: their flags are the only truth about what can be trained.

ROOT = Path(__file__).resolve().parent.parent
JOB, LOG, CONFIG, LOCK = "job.json", "log.txt", "config.json", ".jobs.lock"
QUEUED, RUNNING, STOPPING = ACTIVE = ("queued", "running", "stopping")
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
SCRIPTS = {"diffusion": "train_diffusion", "mae": "train_mae"}  # task of the backbone -> module of training/
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
OWN_OPTIONS = ("output_dir", "resume_from_checkpoint")  # the page gives these
EMBEDDED = "openmoji"  # as training/data.py has it, which takes seconds to import
SAME_SPEED = ("backbone", "size", "resolution", "patch_size", "vae")  # runs that agree in these are about as fast
MAY_CHANGE = ("max_train_steps", "max_train_minutes")  # when a run goes on
MOST = {"resolution": 1024, "train_batch_size": 4096, "gradient_accumulation_steps": 4096}
MAX_QUEUED = 32
MAX_TEXT = 500  # characters of an option
MAX_POINTS = 500  # of a curve
LOG_BYTES, LOG_LINES = 64 * 1024, 40
KILL_AFTER_S = 5.0  # a second "stop" before that is a double click, after it an order
SAME_START_S = 2.0  # two readings of a process's start differ by less
LOCK_S = 30.0
REACHED = re.compile(r": step \d+ reached$")  # how the scripts take their leave
SIGNALLED = re.compile(r"^(SIGTERM|SIGINT): saving")


@dataclass(frozen=True)
class Job:
    """What `job.json` holds.

    Attributes:
        options: flags of the training script, without those that the page gives.
        queued_at: seconds since 1970, as all times here.
        resume: go on from the last checkpoint.
        pid, process_began: of the process, once there was one; a number alone may come to belong to another process.
        started_at: when it was started.
        log_begins: where in the log it starts to speak.
        stop_asked_at: when it was asked to stop, if it was.
        error: why it could not be started.
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


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        name: of the run.
        state: "queued", "running", "stopping" (it saves), "finished", "failed" or "interrupted" (stopped, or its process died).
        message: one line for people; of a failed run the error.
        position: in the queue, from 1; 0 if it is not queued.
        options: flags of the training script.
        started_at: seconds since 1970; None if it never was, or was started without the page.
        log: of a failed run the last lines.
    """

    name: str
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
        curve: lines of metrics.jsonl ("step", "loss", "images_per_s", "block_norms", ...), evenly thinned to `MAX_POINTS`.
        sample: newest grid of samples.
        log: last lines.
    """

    step: int
    of: int | None
    images_per_s: float | None
    seconds_left: float | None
    curve: list[dict[str, Any]]
    sample: Path | None
    log: tuple[str, ...]


class Jobs:
    """The trainings in a folder of runs. Any number of threads and processes may use it at once.

    Args:
        runs: folder of the runs; made with the first.
        at_most: how many run at once.
        data: folder that images to train on must lie in; None allows every folder that the page's user may read.
    """

    def __init__(self, runs: Path, at_most: int = 1, data: Path | None = None) -> None:
        self.runs, self.at_most, self.data = runs.resolve(), at_most, data.resolve() if data else None

    def check(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """What `start` would say, without starting; returns the options as they will be stored.

        Raises:
            ValueError: a name that is taken or no plain word, or options that the training script refuses.
        """
        run, options = self._free(name), self._settled(options)
        values = _parse(options, run)
        return {option: values[option] for option in options}

    def start(self, name: str, options: dict[str, Any]) -> Status:
        """Queue a training; it starts at once if there is a place.

        Args:
            name: of the run; becomes the folder.
            options: names and values of the training script's flags, such as {"preset": "demo-decayed", "max_train_steps": 100}.
                A preset or backbone of the masked autoencoders chooses their script. `init_from` is a name of the catalogue.

        Raises:
            ValueError: as `check`, or the queue is full.
        """
        options = self.check(name, options)
        with self._locked():
            if sum(status.state == QUEUED for status in self._statuses()) >= MAX_QUEUED:
                raise ValueError(f"{MAX_QUEUED} trainings are queued already; wait, or take one out")
            write_json(self._free(name) / JOB, asdict(Job(options, time.time())))
            self._start_queued()
        return self.status(name)

    def all(self) -> list[Status]:
        """Every run: first those that run, then the queue in its order, then the others, the newest first."""
        statuses = self._statuses()
        if self._places(statuses) > 0 and any(status.state == QUEUED for status in statuses):
            with self._locked():
                self._start_queued()
            statuses = self._statuses()
        order = {RUNNING: 0, STOPPING: 0, QUEUED: 1}
        return sorted(statuses, key=lambda status: (order.get(status.state, 2), status.position, -(status.started_at or 0), status.name))

    def status(self, name: str) -> Status:
        """One run.

        Raises:
            ValueError: there is no such run; so do all methods that take a name.
        """
        for status in self.all():
            if status.name == name:
                return status
        raise ValueError(_no_run(name))

    def stop(self, name: str) -> Status:
        """Ask a run to save and leave, or take it out of the queue. Asked again after `KILL_AFTER_S` it is killed, unsaved.

        Raises:
            ValueError: it does not run, or was started without the page.
        """
        with self._locked():
            run = self._find(name)
            status, job = self._status(run), _read_job(run)
            if not status.active:
                raise ValueError(f"{name} does not run; it is {status.state}")
            process = _process(run, job) if job else None
            if process is None and status.state != QUEUED:
                raise ValueError(f"{name} was started outside the page; stop it there, with Ctrl-C")
            if status.state == STOPPING:
                if time.time() - job.stop_asked_at >= KILL_AFTER_S:
                    _kill(process)
            else:
                write_json(run / JOB, asdict(replace(job, stop_asked_at=time.time())))
                if process is not None:
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
        return self.status(name)

    def resume(self, name: str, changes: dict[str, Any] | None = None) -> Status:
        """Queue a run once more, with its flags, from its last whole checkpoint; from the beginning if there is none.

        Args:
            changes: other values of `MAY_CHANGE`, to train longer.

        Raises:
            ValueError: it runs, or its script refuses the flags.
        """
        from training.checkpoint import checkpoints

        changes = _plain(changes or {})
        if other := set(changes) - set(MAY_CHANGE):
            raise ValueError(f"{', '.join(sorted(other))} cannot change when a run goes on; only {' and '.join(MAY_CHANGE)} can")
        with self._locked():
            run = self._find(name)
            self._require_idle(run)
            options = {**_options(run, _read_job(run)), **changes}
            known = _flag_names(options)
            options = {option: value for option, value in options.items() if option in known}  # config.json tells more than flags
            values, before = _parse(options, run), _json(run / CONFIG)
            if values["max_train_steps"] is not None and _saved_step(run) >= values["max_train_steps"]:
                raise ValueError(f"{name} has taken all its {values['max_train_steps']:,} steps; give it more of them")
            if values["lr_scheduler"] == "cosine" and before.get("max_train_steps", values["max_train_steps"]) != values["max_train_steps"]:
                raise ValueError(
                    f"{name} lets its learning rate fall to 0 at step {before['max_train_steps']:,}, so its steps cannot change"
                )
            begins = (run / LOG).stat().st_size if (run / LOG).is_file() else 0  # what was said before is not about this time
            write_json(run / JOB, asdict(Job(options, time.time(), bool(checkpoints(run)), log_begins=begins)))
            self._start_queued()
        return self.status(name)

    def delete(self, name: str) -> None:
        """Delete a run with all its files.

        Raises:
            ValueError: it runs or is queued.
        """
        with self._locked():
            run = self._find(name)
            self._require_idle(run)
            gone = run.with_name(f".{name}.deleted")  # first out of sight: whatever happens, no half of a run remains
            remove(gone)
            run.rename(gone)
        remove(gone)

    def rename(self, name: str, new_name: str) -> Status:
        """Give a run another name.

        Raises:
            ValueError: it runs or is queued, or the new name is taken or no plain word.
        """
        with self._locked():
            run = self._find(name)
            self._require_idle(run)
            run.rename(self._free(new_name))
        return self.status(new_name)

    def progress(self, name: str) -> Progress:
        """How far a run is, and the curves, pictures and words that it left so far."""
        run = self._find(name)
        status, job, config = self.status(name), _read_job(run), _json(run / CONFIG)
        lines = _metrics(run)
        step, of = max(_saved_step(run), lines[-1]["step"] if lines else 0), _wanted_steps(run, job)
        rate = _rate(lines)
        left = []
        if status.state == RUNNING and of and rate and "images_a_step" in config:
            left.append((of - step) * config["images_a_step"] / rate)
        if status.state == RUNNING and status.started_at and (minutes := {**config, **status.options}.get("max_train_minutes")):
            left.append(max(0.0, 60 * minutes - (time.time() - status.started_at)))
        samples = {int(path.stem[5:]): path for path in (run / "samples").glob("step-*.png") if path.stem[5:].isdigit()}
        return Progress(
            step=step,
            of=of,
            images_per_s=rate,
            seconds_left=min(left, default=None),
            curve=_thinned(lines),
            sample=samples[max(samples)] if samples else None,
            log=_log(run, 0),
        )

    def estimate(self, options: dict[str, Any]) -> float | None:
        """About how many minutes a training will take here, after the newest run of the same network on images of the same size.

        Raises:
            ValueError: options that the training script refuses.
        """
        wanted = _parse(self._settled(options), self.runs / "estimate")
        minutes = [wanted["max_train_minutes"]] if wanted["max_train_minutes"] is not None else []
        alike = [run for run in self._runs() if all(_json(run / CONFIG).get(key) == wanted.get(key) for key in SAME_SPEED)]
        rates = {run: rate for run in alike if (rate := _rate(_metrics(run)))}
        if rates and wanted["max_train_steps"]:
            newest = max(rates, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)
            images = wanted["max_train_steps"] * wanted["train_batch_size"] * wanted["gradient_accumulation_steps"]
            minutes.append(images / rates[newest] / 60)
        return min(minutes, default=None)

    def _runs(self) -> list[Path]:
        if not self.runs.is_dir():
            return []
        folders = (folder for folder in self.runs.iterdir() if not folder.name.startswith(".") and folder.resolve().parent == self.runs)
        return [folder for folder in folders if (folder / JOB).is_file() or (folder / CONFIG).is_file()]

    def _find(self, name: Any) -> Path:
        for run in self._runs():
            if run.name == name:
                return run
        raise ValueError(_no_run(name))

    def _free(self, name: Any) -> Path:
        """The folder of a run to come."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError("the name of a run must be 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first")
        if os.path.lexists(self.runs / name):
            raise ValueError(f"there is a run or a file {name} already; choose another name")
        return self.runs / name

    def _require_idle(self, run: Path) -> None:
        if (state := self._status(run).state) in ACTIVE:
            raise ValueError(f"{run.name} is {state}; stop it first" + ", and let it save" * (state == STOPPING))

    def _settled(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options with folders as absolute paths, each of which the page may read."""
        options = _plain(options)
        if taken := [option for option in OWN_OPTIONS if option in options]:
            raise ValueError(f"--{taken[0]} is not for the form; the page gives it")
        for option, most in MOST.items():
            if _number(options.get(option)) > most:
                raise ValueError(f"--{option} is {options[option]}; the page starts trainings up to {most}")
        if "init_from" in options:
            options["init_from"] = str(find(options["init_from"], self.runs).resolve())
        if "train_data_dir" in options:
            options["train_data_dir"] = self._folder("train_data_dir", str(options["train_data_dir"]))
        for option in ("dataset_name", "vae"):  # names of the hub, or folders
            name = str(options.get(option, EMBEDDED))
            there = any((base / name).exists() for base in (ROOT, self.data or Path.cwd()))
            if name != EMBEDDED and (there or not HUB_NAME.fullmatch(name)):
                options[option] = self._folder(option, name)
        return options

    def _folder(self, option: str, name: str) -> str:
        folder = ((self.data or Path.cwd()) / name).resolve()
        if self.data and not folder.is_relative_to(self.data):
            raise ValueError(f"--{option} {name} lies outside of {self.data}; this page reads no other folders")
        if not folder.is_dir():
            raise ValueError(f"--{option} {name} is not a folder")
        return str(folder)

    def _statuses(self) -> list[Status]:
        """Of all runs, with places in the queue."""
        outside = cache(_trained_outside)  # looked for once, and only if a run needs it
        statuses = [self._status(run, outside) for run in self._runs()]
        queue = sorted((status for status in statuses if status.state == QUEUED), key=lambda status: _queued_at(self.runs / status.name))
        position = {status.name: i for i, status in enumerate(queue, 1)}
        return [replace(status, position=position.get(status.name, 0)) for status in statuses]

    def _status(self, run: Path, outside: Callable[[], Container[Path]] | None = None) -> Status:
        job = _read_job(run)
        state, message = _state(run, job, outside or _trained_outside)
        log = _log(run, job.log_begins) if state == FAILED and job else ()
        return Status(run.name, state, message, 0, _options(run, job), job and job.started_at, log)

    def _places(self, statuses: list[Status]) -> int:
        """Free ones; what was started without the page takes none."""
        return self.at_most - sum(status.state in (RUNNING, STOPPING) and status.started_at is not None for status in statuses)

    def _start_queued(self) -> None:
        """Start what waits, as far as there are places. Only with the lock."""
        statuses = self._statuses()
        queue = sorted((status for status in statuses if status.state == QUEUED), key=lambda status: status.position)
        for status in queue[: max(0, self._places(statuses))]:
            _launch(self.runs / status.name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all pages on these runs."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with FileLock(self.runs / LOCK, timeout=LOCK_S):
                yield
        except OSError as error:
            raise ValueError(f"the runs in {self.runs} cannot be changed ({error}); see that the folder is writable") from error


def _number(value: Any) -> float:
    """0 for what is none; the script tells that."""
    try:
        return float(value or 0)
    except ValueError:
        return 0.0


def _no_run(name: Any) -> str:
    return f"there is no run {str(name)[:MAX_TEXT]!r}"


# --------------------------------------------------------------------------------------------------------------- processes

_children: dict[int, subprocess.Popen] = {}  # of this page, to be reaped


def _launch(run: Path) -> None:
    """Start a queued run's process."""
    job = replace(_read_job(run), started_at=time.time())
    process = _trained_outside().get(run)  # a page that was killed right after the start did not write it down
    if process is None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            with (run / LOG).open("ab") as log:
                job = replace(job, log_begins=log.tell())
                child = subprocess.Popen(
                    [sys.executable, f"training/{SCRIPTS[_task(job.options)]}.py", *_arguments(job.options, run, job.resume)],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # what ends the page is not for the training
                )
        except (OSError, ValueError) as error:
            write_json(run / JOB, asdict(replace(job, error=f"it could not be started ({error})")))
            return
        _children[child.pid], process = child, psutil.Process(child.pid)
    write_json(run / JOB, asdict(replace(job, pid=process.pid, process_began=process.create_time())))


def _process(run: Path, job: Job) -> psutil.Process | None:
    """The process of a job while it lives: it began when the job says, or (the clock may have been set since) says itself whose it is."""
    if job.pid is None:
        return None
    child = _children.get(job.pid)
    if child and child.poll() is not None:
        _children.pop(job.pid, None)
    try:
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.process_began) < SAME_START_S or _output_dir(run) in process.cmdline()
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _kill(process: psutil.Process | None) -> None:
    """At once, with all that it started."""
    if process is not None:
        with suppress(psutil.Error):
            for each in (*process.children(recursive=True), process):
                with suppress(psutil.Error):
                    each.kill()


def _trained_outside() -> dict[Path, psutil.Process]:
    """Folders of runs -> the processes that train them, as the command lines tell; for what no job file knows."""
    found = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [part for word in process.info["cmdline"] or () for part in word.split("=", 1)]
        if {Path(word).name for word in words} & {f"{script}.py" for script in SCRIPTS.values()}:
            flags = dict(pairwise(words))
            folder = flags.get("--output_dir") or f"runs/{flags.get('--preset')}"
            found[(Path(process.info["cwd"] or ROOT) / folder).resolve()] = process
    return found


# ------------------------------------------------------------------------------------------------------------------ on disk


def _state(run: Path, job: Job | None, outside: Callable[[], Container[Path]]) -> tuple[str, str]:
    """State and message."""
    if job and job.error:
        return FAILED, job.error
    if job and job.pid is None and job.stop_asked_at is None:
        return QUEUED, "waits for its turn"
    if job and _process(run, job):
        return (RUNNING, "trains") if job.stop_asked_at is None else (STOPPING, "saves, then leaves")
    step, of = _saved_step(run), _wanted_steps(run, job)
    if of and step >= of:
        return FINISHED, f"all {of:,} steps are done"
    if run in outside():
        return RUNNING, "started outside the page"
    log = _log(run, job.log_begins, most=None) if job else ()
    if error := _error(log):
        return FAILED, error
    asked = job is not None and job.stop_asked_at is not None
    if any(map(REACHED.search, log)) and not asked and not any(map(SIGNALLED.search, log)):
        return FINISHED, f"its time is over after {step:,} steps"
    last = f"the last checkpoint is of step {step:,}" if step else "there is no checkpoint yet"
    why = "stopped" if asked else "its process ended early" if job else "does not run"
    return INTERRUPTED, f"{why}; {last}"


def _error(log: tuple[str, ...]) -> str | None:
    """The line of a log that says why the process ended."""
    told = [line.removeprefix("error: ") for line in log if line.startswith("error: ")]
    if told:
        return told[-1]
    tracebacks = [i for i, line in enumerate(log) if line.startswith("Traceback (most recent call last)")]
    return next((line for line in log[tracebacks[-1] + 1 :] if line and not line[0].isspace()), "it broke down") if tracebacks else None


def _read_job(run: Path) -> Job | None:
    """None if the run was made without the page."""
    try:
        return Job(**read_json(run / JOB))
    except (OSError, ValueError, TypeError):
        return None


def _queued_at(run: Path) -> tuple[float, str]:
    job = _read_job(run)
    return (job.queued_at if job else 0.0), run.name


def _json(path: Path) -> dict[str, Any]:
    """Empty if it is not there or damaged."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _options(run: Path, job: Job | None) -> dict[str, Any]:
    """A run's flags; of one that was made without the page all that its config tells."""
    told = job.options if job else _json(run / CONFIG)
    return {option: value for option, value in told.items() if value is not None and option not in OWN_OPTIONS}


def _saved_step(run: Path) -> int:
    training = _json(run / INDEX).get("training")
    return training.get("steps", 0) if isinstance(training, dict) else 0


def _wanted_steps(run: Path, job: Job | None) -> int | None:
    """The job's, as a run that goes on may go further than it was to at first; else as the config has it from the preset."""
    return (job.options.get("max_train_steps") if job else None) or _json(run / CONFIG).get("max_train_steps")


def _log(run: Path, begins: int, most: int | None = LOG_LINES) -> tuple[str, ...]:
    """Last lines of a run's log, none before `begins`."""
    try:
        with (run / LOG).open("rb") as file:
            file.seek(max(begins, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(lines if most is None else lines[-most:])


def _metrics(run: Path) -> list[dict[str, Any]]:
    try:
        stat = (run / "metrics.jsonl").stat()
    except OSError:
        return []
    return _metrics_of(run, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _metrics_of(run: Path, changed_ns: int, num_bytes: int) -> list[dict[str, Any]]:
    from training.monitor import read_metrics

    return read_metrics(run)


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_POINTS` of them, evenly spread, with the first and the last."""
    if len(lines) <= MAX_POINTS:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _rate(lines: list[dict[str, Any]]) -> float | None:
    """Images a second, of the last lines."""
    return median(line["images_per_s"] for line in lines[-20:]) or None if lines else None


# -------------------------------------------------------------------------------------------------------------------- flags


class _Flags(Parser):
    """Tells a bad flag instead of ending the page."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _plain(options: Any) -> dict[str, Any]:
    """Without those that are None.

    Raises:
        ValueError: not names with texts, numbers or yes and no.
    """
    if not isinstance(options, dict) or not all(isinstance(option, str) for option in options):
        raise ValueError("options must be names with values")
    for option, value in options.items():
        if isinstance(value, str) and not (len(value) <= MAX_TEXT and value.isprintable()):
            raise ValueError(f"the option {option[:MAX_TEXT]!r} must be printable text of at most {MAX_TEXT} characters")
        if not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) >= 2**63):
            raise ValueError(f"the option {option[:MAX_TEXT]!r} must be a text, a number below 2^63, or yes or no")
    return {option: value for option, value in options.items() if value is not None}


def _task(options: dict[str, Any]) -> str:
    """Which script the options are for."""
    from models.registry import names

    preset = {**PRESETS, **MAE_PRESETS}.get(options.get("preset"))
    backbone = options.get("backbone") or (preset.flags.get("backbone") if preset else None)
    return "mae" if backbone in names("mae") else "diffusion"


def _groups(options: dict[str, Any]) -> tuple[type, ...]:
    """The groups of options that the script takes."""
    return importlib.import_module(f"training.{SCRIPTS[_task(options)]}").GROUPS


def _flag_names(options: dict[str, Any]) -> set[str]:
    """Names of the flags that the script takes."""
    return {"preset", *(field.name for group in _groups(options) for field in fields(group))}


def _output_dir(run: Path) -> str:
    return f"--output_dir={run}"


def _arguments(options: dict[str, Any], run: Path, resume: bool = False) -> list[str]:
    """The command line. Every value shares a word with its flag, so none can pass for another flag."""
    words = [_output_dir(run), *["--resume_from_checkpoint=latest"] * resume]
    for option, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words.append(f"--{option}={value}")
    return words


def _parse(options: dict[str, Any], run: Path) -> dict[str, Any]:
    """All flags of the script with their values, after the script's own checks of flags and sizes.

    What only the data can tell comes out as a failed run.

    Raises:
        ValueError: options that the script refuses.
    """
    import torch

    from models.registry import create_model
    from training.command import DataOptions, ShortcutOptions, parse
    from training.loop import LoopOptions, check
    from training.objectives import create_objective

    if unknown := sorted(set(options) - _flag_names(options)):
        raise ValueError(f"there is no option {unknown[0][:MAX_TEXT]!r} for this training")
    presets = MAE_PRESETS if _task(options) == "mae" else PRESETS
    preset, groups = parse("", _groups(options), presets, _arguments(options, run), _Flags)
    values = {"preset": preset, **{option: value for group in groups for option, value in asdict(group).items()}}
    for group in groups:
        if isinstance(group, DataOptions):
            group.source()
        if isinstance(group, LoopOptions):
            check(replace(group, resume_from_checkpoint="latest"))  # whether a run is there already was asked before
        if isinstance(group, ShortcutOptions) and values.get("vae") is None:  # of latents the size is not known here
            with torch.device("meta"):
                sizes = dict(image_size=values["resolution"], patch_size=values["patch_size"])
                create_model(values["backbone"], values["size"], **asdict(group), **sizes)
        if hasattr(group, "objective"):
            given = asdict(group)
            create_objective(given.pop("objective"), num_classes=0, **given)
    return values
