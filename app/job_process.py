"""Processes of jobs: started so that they outlive the page, found again, ended."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from shutil import which

import psutil

from app import job_flags, judging
from app.job_files import EVALUATION, JOB, LOG, PART, Job, read_job
from app.sampler import loaded
from models.files import remove, write_json
from models.progress import PROGRESS_FILE

ROOT = Path(__file__).resolve().parent.parent
SAME_START_S = 2.0  # two readings of a process's start differ by less

_children: dict[int, subprocess.Popen] = {}  # of this page, to be reaped


def launcher(num_processes: int) -> list[str]:
    """`accelerate launch`, with everything said that it would guess otherwise; one process for each GPU, or one on the CPU."""
    cores = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // num_processes)
    several = ["--multi_gpu"] * (num_processes > 1)
    given = [f"--num_processes={num_processes}", "--num_machines=1", f"--num_cpu_threads_per_process={cores}"]
    return ["-m", "accelerate.commands.launch", "--quiet", *given, "--mixed_precision=no", "--dynamo_backend=no", *several]


def launch(run: Path, num_processes: int = 1, nice: int = 0) -> None:
    """Start a queued job's process; a training has so many. For `nice` see `give_way`."""
    queued = read_job(run)
    if queued is None:  # its folder was removed meanwhile
        return
    job = replace(queued, started_at=time.time())
    process = trained_outside().get(run)  # a page that was killed right after the start did not write it down
    if process is None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        loaded.let_go()
        try:
            with (run / LOG).open("ab") as log:
                job = replace(job, log_begins=log.tell())
                if job.kind == EVALUATION:
                    words = judging.command(job.options, run)
                else:
                    words = [*launcher(num_processes), *job_flags.command(job.options, run, job.resume)]
                remove(run / PART)  # of a process that was killed
                child = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, PROGRESS_FILE: str(run / PART)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # what ends the page is not for the training
                )
        except (OSError, ValueError) as error:
            write_json(run / JOB, asdict(replace(job, error=f"it could not be started ({error})")))
            return
        give_way(child.pid, nice)
        _children[child.pid], process = child, psutil.Process(child.pid)
    write_json(run / JOB, asdict(replace(job, pid=process.pid, process_began=process.create_time())))


def give_way(pid: int, nice: int) -> None:
    """Let a process that leads a session of its own, and what it starts, have the less of the cores the nicer it is, up to 19.

    Threads that share a computation wait for the slowest one. Where a training and the page, which samples, shared the cores evenly, the
    sampling took four times as long as alone, and both together twice as long as one after the other (tests/benchmarks, beside).
    """
    if not nice or which("nvidia-smi"):  # with a GPU the cores have little to do
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
        # Linux shares cores among sessions, and a process's own niceness counts within its session alone
        Path(f"/proc/{pid}/autogroup").write_text(str(nice), encoding="ascii")


def process_of(run: Path, job: Job) -> psutil.Process | None:
    """The process of a job while it lives: it began when the job says, or (the clock may have been set since) says itself whose it is."""
    if job.pid is None:
        return None
    child = _children.get(job.pid)
    if child and child.poll() is not None:
        _children.pop(job.pid, None)
    try:
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.process_began) < SAME_START_S or job_flags.output_dir(run) in process.cmdline()
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def ask_to_stop(run: Path, process: psutil.Process) -> None:
    """A training saves and leaves. Its launcher would die of the signal without handing it on, so those that train get it."""
    with suppress(psutil.Error):
        word = job_flags.output_dir(run)
        trainers = [each for each in process.children(recursive=True) if word in each.cmdline()]
        for each in trainers or [process]:
            with suppress(psutil.Error):
                each.terminate()


def kill(process: psutil.Process | None) -> None:
    """At once, with all that it started."""
    if process is not None:
        with suppress(psutil.Error):
            for each in (*process.children(recursive=True), process):
                with suppress(psutil.Error):
                    each.kill()


def trained_outside() -> dict[Path, psutil.Process]:
    """Folders of runs -> the processes that train them, as the command lines tell; for what no job file knows."""
    found = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [part for word in process.info["cmdline"] or () for part in word.split("=", 1)]
        if {Path(word).name for word in words} & {f"{script}.py" for script in job_flags.SCRIPTS.values()}:
            flags = dict(pairwise(words))
            folder = flags.get("--output_dir") or f"runs/{flags.get('--preset')}"
            found[(Path(process.info["cwd"] or ROOT) / folder).resolve()] = process
    return found
