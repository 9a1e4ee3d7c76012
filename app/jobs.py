"""Trainings and evaluations as processes of their own: start, watch, stop, resume.

Nothing about them is kept in the page: a run's folder holds `job.json` (its flags, its place in the queue, its process) and `log.txt`
(what the process said), beside what the training writes. So a page may end, start again, or have a twin; the next look at the folder
finds everything. Looking also moves the queue on.

Clients give names; only the name of a folder that lies directly in the runs becomes a path.
"""

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from app import judging
from app.catalog import PRETRAINED, sources
from app.job_files import (
    ACTIVE,
    CONFIG,
    EVALUATION,
    FINISHED,
    JOB,
    LOG,
    QUEUED,
    RUNNING,
    STOPPING,
    Job,
    json_of,
    options_of,
    pace_of,
    queued_at,
    read_job,
    saved_step,
)
from app.job_flags import MAX_TEXT, flag_names, parse, plain
from app.job_process import ask_to_stop, kill, launch, process_of, trained_outside
from app.job_request import folder_of_images, pair_of, settled
from app.job_status import Status, status_of
from app.libraries import load_libraries
from models.files import remove, write_json
from training.images import EMBEDDED

LOCK, EVALUATIONS, ARCHIVE = ".jobs.lock", ".evaluations", ".archive"  # in the folder of runs; runs have no dot
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSIONS = "unread_versions"  # of the weights that an evaluation is about, until somebody has read them
SAME_SPEED = ("backbone", "size", "depth", "resolution", "patch_size", "vae")  # runs that agree in these are about as fast
MAY_CHANGE = ("max_train_steps", "max_train_minutes")  # when a run goes on
MAX_QUEUED = 32
KILL_AFTER_S = 5.0  # a second "stop" before that is a double click, after it an order
LOCK_S = 30.0
MOVE_S = 5.0  # how often the queue is looked at


class Jobs:
    """The trainings in a folder of runs, and evaluations of what is there. Any number of threads and processes may use it at once.

    Args:
        runs: folder of the runs; made with the first.
        at_most: how many run at once.
        data: folder that images to train on must lie in; None allows every folder that the page's user may read.
        num_processes: of each training, one for each GPU.
        nice: how far jobs on CPUs stand back, see `give_way`.
    """

    def __init__(self, runs: Path, at_most: int = 1, data: Path | None = None, num_processes: int = 1, nice: int = 0) -> None:
        self.runs, self.at_most, self.data = runs.resolve(), at_most, data.resolve() if data else None
        self.num_processes, self.nice = num_processes, nice
        self._reads = threading.Lock()  # held while weights are read

    def check(self, name: str, options: dict[str, Any], pair: bool = False) -> dict[str, dict[str, Any]]:
        """What `start` would queue, or `start_pair`, without doing it: names of runs, and their options as they will be stored.

        Raises:
            ValueError: a name that is taken or no plain word, options that the training script refuses, or a pair of two plain ones.
        """
        checked = {}
        for each, given in pair_of(name, options, self.runs, self.data) if pair else [(name, options)]:
            run, asked = self._new(each), settled(given, self.runs, self.data)
            values = parse(asked, run)
            checked[each] = {option: values[option] for option in asked}
        return checked

    def warm_up(self) -> None:
        """Import the training scripts, so that the first check does not wait for it."""
        parse({"preset": "demo-plain"}, self.runs / "warm-up")

    def start(self, name: str, options: dict[str, Any]) -> Status:
        """Queue a training; it starts at once if there is a place.

        Args:
            name: of the run; becomes the folder.
            options: names and values of the training script's flags, such as {"preset": "demo-decayed", "max_train_steps": 100}.
                A preset or backbone of the masked autoencoders chooses their script. `init_from` is a name of the catalogue.

        Raises:
            ValueError: as `check`, or the queue is full.
        """
        return self._queue(self.check(name, options))[0]

    def start_pair(self, name: str, options: dict[str, Any]) -> list[Status]:
        """Queue a plain training NAME-plain and a decayed one NAME-decayed with everything else equal.

        Args:
            options: as `start`; `alpha_min` or `alpha_eff` is the decayed one's.

        Raises:
            ValueError: as `start`, or the decayed one would be plain, too.
        """
        return self._queue(self.check(name, options, pair=True))

    def _queue(self, checked: dict[str, dict[str, Any]]) -> list[Status]:
        """All of them, or none if one cannot be."""
        with self._locked_then_started():
            self._require_place(len(checked))
            folders = [self._free(name) for name in checked]
            for folder, options in zip(folders, checked.values(), strict=True):
                write_json(folder / JOB, asdict(Job(options, time.time())))
        return [self.status(name) for name in checked]

    def judge(self, options: dict[str, Any]) -> Status:
        """Queue an evaluation.

        Args:
            options: see `judging.checked`.

        Raises:
            ValueError: as `judging.checked`, or the queue is full, or the same is on its way.
        """
        options = judging.checked(options, self.runs)
        if options["reference"] != EMBEDDED:
            options["reference"] = folder_of_images("reference", options["reference"], self.data)
        weights = judging.weights_of(options["checkpoints"], sources(self.runs))  # read before the others have to wait
        with self._locked_then_started():
            if any(status.active and _is_about(status.options, options, weights) for status in self._statuses()):
                raise ValueError(f"{judging.title(options)} is on its way already; its result appears when it is done")
            self._require_place(1)
            folder = self.runs / EVALUATIONS / secrets.token_hex(4)
            write_json(folder / JOB, asdict(Job(options, time.time(), kind=EVALUATION)))
        return self.status(folder.name)

    def evaluations(self, statuses: Sequence[Status] | None = None) -> list[Status]:
        """Finished ones, the newest first; `judging.read_results` tells what they found.

        Args:
            statuses: of all jobs, where they are known already.
        """
        known = self._statuses() if statuses is None else statuses
        finished = (status for status in known if status.kind == EVALUATION and status.state == FINISHED)
        return sorted(finished, key=lambda status: -(status.started_at or 0))

    def all(self) -> list[Status]:
        """Every run: first those that run, then the queue in its order, then the others, the newest first."""
        statuses = self._statuses()
        if self._places(statuses) > 0 and any(status.state == QUEUED for status in statuses):
            with self._locked_then_started():
                pass
            statuses = self._statuses()
        elif any(VERSIONS in status.options for status in statuses):
            self._read_weights()
            statuses = self._statuses()
        order = {RUNNING: 0, STOPPING: 0, QUEUED: 1}
        return sorted(statuses, key=lambda status: (order.get(status.state, 2), status.position, -(status.started_at or 0), status.name))

    def keep_moving(self) -> None:
        """Start what waits as soon as there is a place, whether or not somebody looks."""

        def move() -> None:
            told = ""
            while True:
                try:
                    jobs = filter(None, map(read_job, (*self._runs(), *self._evaluations())))
                    if any(job.waits or job.options.get(VERSIONS) for job in jobs):
                        self.all()
                except Exception as error:  # whatever it is: as soon as it is mended the queue moves again
                    if told != (told := f"the queue cannot move: {type(error).__name__}: {error}"):
                        print(told, flush=True)
                time.sleep(MOVE_S)

        threading.Thread(target=move, daemon=True, name="queue").start()

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
            status, job = status_of(run), read_job(run)
            if not status.active:
                raise ValueError(f"{name} does not run; it is {status.state}")
            process = process_of(run, job) if job else None
            if job is None or (process is None and status.state != QUEUED):
                raise ValueError(f"{name} was started outside the page; stop it there, with Ctrl-C")
            if job.stop_asked_at is not None:
                if time.time() - job.stop_asked_at >= KILL_AFTER_S:
                    kill(process)
            else:
                write_json(run / JOB, asdict(replace(job, stop_asked_at=time.time())))
                if process is not None:
                    ask_to_stop(run, process)
        return self.status(name)

    def stop_all(self, wait_s: float = 100) -> None:
        """Ask all that run to save and leave, and wait until they have, at most so long; those that are queued stay so from now on."""
        with contextlib.suppress(ValueError), self._locked():  # nothing is being started meanwhile
            self.at_most = 0
        self.at_most = 0  # where there is no lock nothing starts, either
        for status in self._statuses():
            if status.state == RUNNING:
                with contextlib.suppress(ValueError):  # it has just ended, or was started elsewhere
                    self.stop(status.name)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(status.state == STOPPING for status in self._statuses()):
            time.sleep(0.2)

    def resume(self, name: str, changes: dict[str, Any] | None = None) -> Status:
        """Queue a run once more, with its flags, from its last whole checkpoint; from the beginning if there is none.

        Args:
            changes: other values of `MAY_CHANGE`, to train longer.

        Raises:
            ValueError: it runs, or its script refuses the flags.
        """
        load_libraries()
        from training.checkpoint import checkpoints

        changes = plain(changes or {})
        if other := set(changes) - set(MAY_CHANGE):
            raise ValueError(f"{', '.join(sorted(other))} cannot change when a run goes on; only {' and '.join(MAY_CHANGE)} can")
        with self._locked_then_started():
            run = self._find(name)
            self._require_idle(run)
            self._require_training(run)
            options = {**options_of(run, read_job(run)), **changes}
            known = flag_names(options)
            options = {option: value for option, value in options.items() if option in known}  # config.json tells more than flags
            values, before = parse(options, run), json_of(run / CONFIG)
            options |= {option: values[option] for option in changes}  # as the script reads them
            if values["max_train_steps"] is not None and saved_step(run) >= values["max_train_steps"]:
                raise ValueError(f"{name} has taken {saved_step(run):,} steps already; give it more than these")
            if values["lr_scheduler"] == "cosine" and before.get("max_train_steps", values["max_train_steps"]) != values["max_train_steps"]:
                raise ValueError(
                    f"{name} lets its learning rate fall to 0 at step {before['max_train_steps']:,}, so its steps cannot change"
                )
            begins = (run / LOG).stat().st_size if (run / LOG).is_file() else 0  # what was said before is not about this time
            write_json(run / JOB, asdict(Job(options, time.time(), bool(checkpoints(run)), log_begins=begins)))
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
            self._require_training(run)
            run.rename(self._new(new_name))
        return self.status(new_name)

    def archive(self, name: str) -> None:
        """Put a run out of sight, with all its files.

        Raises:
            ValueError: it runs or is queued, or the archive has one of that name.
        """
        with self._locked():
            run = self._find(name)
            self._require_idle(run)
            self._require_training(run)
            place = self.runs / ARCHIVE / name
            if os.path.lexists(place):
                raise ValueError(f"the archive has a run {name} already; rename this one first")
            place.parent.mkdir(exist_ok=True)
            run.rename(place)

    def archived(self) -> list[str]:
        """Names of the runs in the archive."""
        folder = self.runs / ARCHIVE
        return sorted(run.name for run in folder.iterdir() if run.is_dir() and not run.is_symlink()) if folder.is_dir() else []

    def unarchive(self, name: str) -> Status:
        """Bring a run back from the archive.

        Raises:
            ValueError: it is not there, or its name was taken meanwhile.
        """
        with self._locked():
            if name not in self.archived():
                raise ValueError(f"the archive has no run {str(name)[:MAX_TEXT]!r}")
            (self.runs / ARCHIVE / name).rename(self._free(name))
        return self.status(name)

    def estimate(self, options: dict[str, Any]) -> float | None:
        """About how many minutes a training will take here, after the newest run of the same network on images of the same size.

        Raises:
            ValueError: options that the training script refuses.
        """
        wanted = parse(settled(options, self.runs, self.data), self.runs / "estimate")
        minutes = [wanted["max_train_minutes"]] if wanted["max_train_minutes"] is not None else []
        alike = [run for run in self._runs() if all(json_of(run / CONFIG).get(key) == wanted.get(key) for key in SAME_SPEED)]
        rates = {run: rate for run in alike if (rate := pace_of(run)[1])}
        if rates and wanted["max_train_steps"]:
            newest = max(rates, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)
            images = wanted["max_train_steps"] * wanted["train_batch_size"] * wanted["gradient_accumulation_steps"] * self.num_processes
            minutes.append(images / rates[newest] / 60)
        return min(minutes, default=None)

    def _require_place(self, number: int) -> None:
        if sum(status.state == QUEUED for status in self._statuses()) + number > MAX_QUEUED:
            raise ValueError(f"{MAX_QUEUED} jobs are queued already; wait, or take one out")

    def _evaluations(self) -> list[Path]:
        folder = self.runs / EVALUATIONS
        if not folder.is_dir():
            return []
        return [each for each in folder.iterdir() if not each.name.startswith(".") and (each / JOB).is_file()]

    def _runs(self) -> list[Path]:
        if not self.runs.is_dir():
            return []
        folders = (folder for folder in self.runs.iterdir() if not folder.name.startswith(".") and folder.resolve().parent == self.runs)
        return [folder for folder in folders if (folder / JOB).is_file() or (folder / CONFIG).is_file()]

    def _find(self, name: Any) -> Path:
        for folder in (*self._runs(), *self._evaluations()):
            if folder.name == name:
                return folder
        raise ValueError(_no_run(name))

    def _new(self, name: Any) -> Path:
        """The folder of a run that is given this name, which no shipped checkpoint has: the two would be mixed up."""
        run = self._free(name)
        if (PRETRAINED / name).exists():
            raise ValueError(f"{name} is the name of a shipped checkpoint; choose another name")
        return run

    def _free(self, name: Any) -> Path:
        """The folder of a run to come."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError("the name of a run must be 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first")
        if os.path.lexists(self.runs / name):
            raise ValueError(f"there is a run or a file {name} already; choose another name, or delete it")
        return self.runs / name

    def _require_idle(self, run: Path) -> None:
        if (state := status_of(run).state) in ACTIVE:
            raise ValueError(f"{run.name} is {state}; stop it first" + ", and let it save" * (state == STOPPING))

    def _require_training(self, folder: Path) -> None:
        if folder.parent != self.runs:
            raise ValueError("this is an evaluation; it can be stopped or deleted, and asked for anew")

    def _statuses(self) -> list[Status]:
        """Of all runs, with places in the queue."""
        outside = cache(trained_outside)  # looked for once, and only if a run needs it
        statuses = [status_of(folder, outside) for folder in (*self._runs(), *self._evaluations())]
        queue = sorted((status for status in statuses if status.state == QUEUED), key=lambda status: queued_at(status.folder))
        position = {status.name: i for i, status in enumerate(queue, 1)}
        return [replace(status, position=position.get(status.name, 0)) for status in statuses]

    def _places(self, statuses: list[Status]) -> int:
        """Free ones; what was started without the page takes none."""
        return self.at_most - sum(status.state in (RUNNING, STOPPING) and status.started_at is not None for status in statuses)

    def _start_queued(self) -> None:
        """Start what waits, as far as there are places. Only with the lock."""
        statuses = self._statuses()
        queue = sorted((status for status in statuses if status.state == QUEUED), key=lambda status: status.position)
        for status in queue[: max(0, self._places(statuses))]:
            if status.kind == EVALUATION:
                names = status.options.get("checkpoints", ())
                _note(status.folder, [judging.UNKNOWN] * len(names), judging.versions_of(names, sources(self.runs)))
            launch(status.folder, self.num_processes, self.nice)

    def _read_weights(self) -> None:
        """Note which weights evaluations are about that have begun: a run may train on, or another one may get its name.

        Reading takes a while, so it is done without the lock. Should the page end meanwhile, the versions stay noted for the next look.
        """
        if not self._reads.acquire(blocking=False):  # somebody does already
            return
        try:
            for status in self._statuses():
                if VERSIONS not in status.options:
                    continue
                weights = [judging.hash_of(version) for version in status.options[VERSIONS]]
                with contextlib.suppress(ValueError), self._locked():  # where it cannot be noted now, a later look does it
                    _note(status.folder, weights, None)
        finally:
            self._reads.release()

    @contextmanager
    def _locked_then_started(self) -> Iterator[None]:
        """As `_locked`; then what waits is started."""
        with self._locked():
            yield
            self._start_queued()
        self._read_weights()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all pages on these runs."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with FileLock(self.runs / LOCK, timeout=LOCK_S):
                yield
        except OSError as error:
            raise ValueError(f"the runs in {self.runs} cannot be changed ({error}); see that the folder is writable") from error


def _is_about(asked: dict[str, Any], options: dict[str, Any], weights: list[str]) -> bool:
    """Whether an evaluation that was asked for before would tell the same: of the weights that are there now, if it has begun."""
    if {**asked, "weights": None, VERSIONS: None} != {**options, "weights": None, VERSIONS: None}:
        return False
    return all(was in (now, judging.UNKNOWN) for was, now in zip(asked.get("weights") or weights, weights, strict=True))


def _note(evaluation: Path, weights: list[str], versions: list[judging.Version | None] | None) -> None:
    """Which weights an evaluation is about; versions as long as these are to be read. Only with the lock."""
    if (job := read_job(evaluation)) is not None:
        write_json(evaluation / JOB, asdict(replace(job, options={**job.options, "weights": weights, VERSIONS: versions})))


def _no_run(name: Any) -> str:
    return f"there is no run {str(name)[:MAX_TEXT]!r}"
