"""Trainings that the page starts: processes that outlive it, a queue that two pages share, names and flags that are hostile."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest
from filelock import FileLock, Timeout

from app import catalog, job_flags, job_process, judging, libraries
from app import jobs as jobs_module
from app.__main__ import main, parser
from app.catalog import all_results
from app.job_files import (
    EVALUATION,
    FAILED,
    FINISHED,
    INTERRUPTED,
    JOB,
    LOG,
    MAX_POINTS,
    PART,
    QUEUED,
    RUNNING,
    STOPPING,
    Job,
    curve_of,
    part_of,
)
from app.job_status import progress_of
from app.jobs import Jobs
from app.judge_tab import leaderboard, measured, on_their_way_and_found
from app.render import result_words
from app.site import Site
from app.train_tab import form_errors
from app.train_view import details_of, on_their_way, overview_of
from app.votes import Votes
from models import Pipeline, create_model
from models.files import read_json, sha256, write_json
from models.progress import PROGRESS_FILE, progress_bar
from tests.conftest import ROOT, script_environment, wait_for
from tests.screenshot import free_port
from tests.tiny_pair import PLAIN, write_pair
from training import monitor

TINY = {
    "resolution": 8, "patch_size": 4, "alpha_min": 0.6, "train_batch_size": 4, "learning_rate": 1e-3, "mixed_precision": "no",
    "logging_steps": 2, "sample_steps": 0, "report_to": "none",
}  # fmt: skip
FLAGS = {"dataset_name": "openmoji", "max_train_steps": 3}


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Jobs(tmp_path / "runs")


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen]]:
    """process(program, *arguments): a Python process that has said its first word; it does not outlive the test."""
    started = []

    def start(program: str = "", *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", f"import time; {program}\nprint('ready', flush=True); time.sleep(600)", *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdout.close()


def write_job(jobs: Jobs, name: str, process: subprocess.Popen | None = None, **job: Any) -> Path:
    """A run as the page would have left it, with that process."""
    run = jobs.runs / name
    run.mkdir(parents=True)
    if process is not None:
        job = {"pid": process.pid, "process_began": psutil.Process(process.pid).create_time(), "started_at": time.time(), **job}
    (run / JOB).write_text(json.dumps(asdict(Job(**{"options": FLAGS, "queued_at": time.time(), **job}))))
    return run


def write_run(jobs: Jobs, name: str, saved: int = 0, log: str = "", rate: float = 10.0, lines: int = 0, **config: Any) -> Path:
    """What a training leaves in a run's folder."""
    run = jobs.runs / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps({"backbone": "dit", "size": "XS", "resolution": 32, "patch_size": None, **config}))
    (run / LOG).write_text(log)
    told = [{"step": 10 * i, "loss": 1 / i, "images_per_s": rate, "block_norms": [1.0]} for i in range(1, lines + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    if saved:
        (run / "model_index.json").write_text(json.dumps({"training": {"steps": saved}}))
    return run


# ------------------------------------------------------------------------------------------------------------ real trainings


@pytest.mark.slow
def test_trainings_outlive_the_page_and_wait_for_each_other(jobs: Jobs, image_folder: Path, tmp_path: Path) -> None:
    jobs.nice = 1
    options = {**TINY, "train_data_dir": str(image_folder), "max_train_steps": 100_000}
    page = "import json, os, sys, pathlib; from app.jobs import Jobs; jobs = Jobs(pathlib.Path(sys.argv[1]), nice=1);"
    page += "print(jobs.start('first', json.loads(sys.argv[2])).state, flush=True); os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", page, str(jobs.runs), json.dumps(options)]
    killed = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "running\n"), killed.stderr

    # the next page finds it, and queues behind it
    assert jobs.status("first").state == RUNNING
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"none")
    waiting = jobs.start("second", {**options, "train_data_dir": str(tmp_path / "broken")})
    assert (waiting.state, waiting.position) == (QUEUED, 1)
    assert jobs.start("third", options).position == 2
    assert [status.name for status in jobs.all()] == ["first", "second", "third"]
    stopped = jobs.stop("third")
    assert (stopped.state, stopped.message) == (INTERRUPTED, "stopped; there is no checkpoint yet")
    wait_for(lambda: len(progress_of(jobs.status("first")).curve) >= 2)
    progress = progress_of(jobs.status("first"))
    assert 0 < progress.step < progress.of == 100_000 and progress.seconds_left > 0
    assert any("images/s" in line for line in progress.log)
    leader = psutil.Process(json.loads((jobs.runs / "first" / JOB).read_text())["pid"])
    if not shutil.which("nvidia-smi"):
        assert {each.nice() for each in (leader, *leader.children(recursive=True))} == {1}

    # stopping saves; then comes the next one's turn, and it fails
    assert jobs.stop("first").state == STOPPING
    wait_for(lambda: not jobs.status("first").active)
    stopped, step = jobs.status("first"), progress_of(jobs.status("first")).step
    assert stopped.state == INTERRUPTED
    assert (int(re.fullmatch(r"stopped; the last checkpoint is of step (\d+)", stopped.message)[1])) == step >= 4
    wait_for(lambda: not jobs.status("second").active)
    failed = jobs.status("second")
    assert failed.state == FAILED and "a.png" in failed.message and "\n" not in failed.message
    assert failed.message in failed.log[-1] and progress_of(jobs.status("second")).step == 0

    # it goes on where it was, to an end that was moved
    with pytest.raises(ValueError, match="only max_train_steps and max_train_minutes can"):
        jobs.resume("first", {"alpha_min": 1.0})
    assert jobs.resume("first", {"max_train_steps": step + 4}).state == RUNNING
    wait_for(lambda: not jobs.status("first").active)
    finished = jobs.status("first")
    assert (finished.state, finished.message) == (FINISHED, f"all {step + 4:,} steps are done"), progress_of(jobs.status("first")).log
    assert Pipeline.from_pretrained(jobs.runs / "first").config.training["steps"] == step + 4
    steps = [line["step"] for line in progress_of(jobs.status("first")).curve]
    assert steps == sorted(set(steps)) and steps[-1] == step + 4
    with pytest.raises(ValueError, match="give it more"):
        jobs.resume("first")
    assert "resume_from_checkpoint" not in finished.options
    wait_for(lambda: jobs.all() and not job_process._children)  # no zombies stay


@pytest.mark.slow
def test_a_preset_of_the_masked_autoencoders_runs_their_script(jobs: Jobs, image_folder: Path) -> None:
    options = {**TINY, "preset": "mae-openmoji-plain", "train_data_dir": str(image_folder), "max_train_steps": 2, "lr_warmup_steps": 1}
    jobs.start("masked", {**options, "long_skips": False, "sample_steps": 2, "alpha_min": None})
    process = psutil.Process(json.loads((jobs.runs / "masked" / JOB).read_text())["pid"])
    wait_for(lambda: any("train_mae.py" in word for word in process.cmdline()))  # a moment after it was forked it has the page's
    wait_for(lambda: not jobs.status("masked").active)
    assert jobs.status("masked").state == FINISHED, progress_of(jobs.status("masked")).log
    progress = progress_of(jobs.status("masked"))
    assert (progress.step, progress.of, progress.sample) == (2, 2, jobs.runs / "masked/samples/step-2.png")
    config = json.loads((jobs.runs / "masked/config.json").read_text())
    assert (config["preset"], config["backbone"], config["alpha_min"], config["long_skips"]) == ("mae-openmoji-plain", "mae", 1.0, False)


# ----------------------------------------------------------------------------------------------------------------- processes


def test_a_number_that_now_belongs_to_another_process_is_not_taken_for_the_training(jobs: Jobs, process: Callable) -> None:
    stranger = process()
    write_job(jobs, "mine", stranger, process_began=psutil.Process(stranger.pid).create_time() - 60)
    status = jobs.status("mine")
    assert (status.state, status.message) == (INTERRUPTED, "its process ended early; there is no checkpoint yet")
    with pytest.raises(ValueError, match="does not run"):
        jobs.stop("mine")
    jobs.delete("mine")
    assert stranger.poll() is None


def test_a_clock_that_was_set_hides_no_training(jobs: Jobs, process: Callable) -> None:
    own = process("", "training/train_diffusion.py", f"--output_dir={jobs.runs / 'mine'}")
    write_job(jobs, "mine", own, process_began=psutil.Process(own.pid).create_time() - 60)
    assert (jobs.status("mine").state, jobs.status("mine").message) == (RUNNING, "trains")
    jobs.stop("mine")
    assert own.wait(10) == -signal.SIGTERM


def test_a_process_that_ended_unnoticed_is_not_taken_for_running(jobs: Jobs, process: Callable) -> None:
    ended = process()
    write_job(jobs, "mine", ended)
    assert jobs.status("mine").state == RUNNING
    ended.kill()
    wait_for(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE)  # its parent has not asked for its end yet
    assert jobs.status("mine").state == INTERRUPTED


def test_only_a_second_wish_kills_and_a_double_click_is_none(jobs: Jobs, process: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, file=open({!r}, 'w'), flush=True)"
    deaf = process(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {child.format(str(jobs.runs.parent / 'child'))}")
    write_job(jobs, "deaf", deaf)
    child_pid = int((jobs.runs.parent / "child").read_text())
    assert jobs.stop("deaf").state == jobs.stop("deaf").state == STOPPING
    time.sleep(0.2)
    assert deaf.poll() is None
    monkeypatch.setattr(jobs_module, "KILL_AFTER_S", 0.1)
    jobs.stop("deaf")
    assert deaf.wait(10) == -signal.SIGKILL
    wait_for(lambda: not psutil.pid_exists(child_pid) or psutil.Process(child_pid).status() == psutil.STATUS_ZOMBIE, 10)
    assert jobs.status("deaf").state == INTERRUPTED


def test_all_are_stopped_and_no_other_takes_their_place(jobs: Jobs, process: Callable) -> None:
    running = [process(), process()]
    for name, each in zip(("one", "two"), running, strict=True):
        write_job(jobs, name, each)
    write_job(jobs, "queued")
    jobs.stop_all(10)
    assert [each.wait(10) for each in running] == [-signal.SIGTERM] * 2
    assert {status.name: status.state for status in jobs.all()} == {"one": INTERRUPTED, "two": INTERRUPTED, "queued": QUEUED}


def test_what_was_started_in_a_shell_is_seen_and_left_alone(jobs: Jobs, process: Callable) -> None:
    run = write_run(jobs, "mine", saved=2, max_train_steps=50)
    assert jobs.status("mine").message == "does not run; the last checkpoint is of step 2"
    shell = process("", "training/train_diffusion.py", "--preset", "demo-plain", f"--output_dir={run}")
    assert (jobs.status("mine").state, jobs.status("mine").message) == (RUNNING, "started outside the page")
    for change in (jobs.stop, jobs.delete, jobs.resume, lambda name: jobs.rename(name, "other")):
        with pytest.raises(ValueError, match=r"outside the page|is running"):
            change("mine")
    job = Job(FLAGS, 1.0, pid=2**22 - 1, process_began=0.0, stop_asked_at=2.0)  # stopped in the page, resumed in the shell
    (run / JOB).write_text(json.dumps(asdict(job)))
    with pytest.raises(ValueError, match="outside the page"):
        jobs.stop("mine")
    shell.kill()
    shell.wait()
    jobs.delete("mine")
    assert not run.exists()


def test_a_training_whose_page_died_at_its_start_is_not_started_twice(jobs: Jobs, process: Callable) -> None:
    run = write_job(jobs, "mine")
    orphan = process("", "training/train_diffusion.py", f"--output_dir={run}")
    assert jobs.status("mine").state == RUNNING
    assert json.loads((run / JOB).read_text())["pid"] == orphan.pid and not (run / LOG).exists()


def test_jobs_on_cpus_leave_the_cores_to_the_page(process: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = psutil.Process(process().pid)
    monkeypatch.setattr(job_process, "which", lambda name: f"/usr/bin/{name}")
    job_process.give_way(sleeper.pid, 10)
    assert sleeper.nice() == 0, "a GPU computes"
    monkeypatch.setattr(job_process, "which", lambda name: None)
    job_process.give_way(sleeper.pid, 0)
    assert sleeper.nice() == 0
    job_process.give_way(sleeper.pid, 10)
    assert sleeper.nice() == 10
    group = Path(f"/proc/{sleeper.pid}/autogroup")  # where the kernel has them: of the session, which no other shares
    assert not group.is_file() or group.read_text().strip().endswith("nice 10")
    sleeper.kill()
    sleeper.wait()
    job_process.give_way(sleeper.pid, 10)  # it may have ended meanwhile


def test_how_nice_jobs_can_be(capsys: pytest.CaptureFixture) -> None:
    assert parser().parse_args([]).nice == 10
    with pytest.raises(SystemExit, match="2"):
        main(["--port", str(free_port()), "--nice", "20"])
    assert "--nice is 20; it must be between 0 and 19" in capsys.readouterr().err


def test_a_queued_run_whose_folder_was_removed_is_not_started(jobs: Jobs) -> None:
    run = write_job(jobs, "mine")
    shutil.rmtree(run)
    job_process.launch(run)
    assert not run.exists()


PAGE = """
import os, subprocess, sys, time
from pathlib import Path
from app import job_files, job_process, jobs

def launch(run, *rest):  # a real process, but one that begins at once
    time.sleep(0.05)
    process = subprocess.Popen(["sleep", "100"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job_process._children[process.pid] = process
    jobs.write_json(run / jobs.JOB, jobs.asdict(jobs.replace(job_files.read_job(run), pid=process.pid, started_at=time.time(),
        process_began=job_process.psutil.Process(process.pid).create_time())))
    print(run.name, process.pid, flush=True)

jobs.launch = launch
page = jobs.Jobs(Path(sys.argv[1]), at_most=2)
for _ in range(20):
    page.all()
"""


def test_pages_that_look_at_once_start_no_more_than_may_run(jobs: Jobs) -> None:
    for i in range(6):
        write_job(jobs, f"run-{i}", queued_at=1000.0 - i)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pages = [subprocess.Popen([sys.executable, "-c", PAGE, jobs.runs], cwd=ROOT, env=script_environment(), **pipes) for _ in range(4)]
    told = [page.communicate(timeout=120) for page in pages]
    started = dict(line.split() for out, _ in told for line in out.splitlines())
    try:
        assert not any(errors for _, errors in told)
        assert sum(len(out.splitlines()) for out, _ in told) == 2
        assert started.keys() == {"run-5", "run-4"}, "who came first goes first"
        waiting = [status for status in Jobs(jobs.runs, at_most=2).all() if status.state == QUEUED]
        assert [(status.name, status.position) for status in waiting] == [("run-3", 1), ("run-2", 2), ("run-1", 3), ("run-0", 4)]
    finally:
        for pid in started.values():
            os.kill(int(pid), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------------- on disk

REACHED = "5 images of here\nstep 2 of 9: loss 1\n/runs/mine: step 7 reached\n"
TRACEBACK = "Traceback (most recent call last):\n  File 'x', line 1\n    here()\nRuntimeError: shapes differ\nand more\n"


@pytest.mark.parametrize(
    "saved, steps, log, asked, expected",
    [
        (9, 9, "", False, (FINISHED, "all 9 steps are done")),
        (9, 9, "SIGTERM: saving, then leaving\n", True, (FINISHED, "all 9 steps are done")),
        (7, None, REACHED, False, (FINISHED, "its time is over after 7 steps")),
        (7, 9, REACHED, False, (FINISHED, "its time is over after 7 steps")),
        (7, None, "SIGTERM: saving, then leaving\n" + REACHED, False, (INTERRUPTED, "its process ended early; the last checkpoint is of")),
        (7, None, REACHED, True, (INTERRUPTED, "stopped; the last checkpoint is of step 7")),
        (0, 9, "5 images of here\n", False, (INTERRUPTED, "its process ended early; there is no checkpoint yet")),
        (4, 9, "a line\nerror: the loss is not finite before step 6\n", False, (FAILED, "the loss is not finite before step 6")),
        (0, 9, TRACEBACK, False, (FAILED, "RuntimeError: shapes differ")),
        (0, 9, "words\n" + "Traceback (most recent call last):\n", False, (FAILED, "it broke down")),
        (0, 9, "x" * 100_000 + "\n" * 200 + "error: at last\n", False, (FAILED, "at last")),
    ],
)
def test_what_became_of_a_run_is_read_from_its_files(
    jobs: Jobs, saved: int, steps: int | None, log: str, asked: bool, expected: tuple[str, str]
) -> None:
    write_job(jobs, "mine", pid=2**22 - 1, process_began=0.0, stop_asked_at=1.0 if asked else None)
    write_run(jobs, "mine", saved, log, max_train_steps=steps)
    if steps is None:
        (jobs.runs / "mine" / JOB).write_text((jobs.runs / "mine" / JOB).read_text().replace('"max_train_steps": 3', '"seed": 3'))
    else:
        (jobs.runs / "mine" / JOB).write_text((jobs.runs / "mine" / JOB).read_text().replace('_steps": 3', f'_steps": {steps}'))
    status = jobs.status("mine")
    assert status.state == expected[0] and status.message.startswith(expected[1])
    assert bool(status.log) == (status.state == FAILED) and len(status.log) <= 40
    assert progress_of(jobs.status("mine")).seconds_left is None


def test_old_words_do_not_speak_of_a_new_attempt(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    write_job(jobs, "mine", pid=2**22 - 1, process_began=0.0)
    write_run(jobs, "mine", log="error: no space left\n", max_train_steps=3)
    assert jobs.status("mine").state == FAILED
    full = Jobs(jobs.runs, at_most=0)
    assert full.resume("mine").state == QUEUED
    assert full.stop("mine").message == "stopped; there is no checkpoint yet"


def test_a_run_of_a_shell_is_resumed_with_what_its_config_tells(jobs: Jobs) -> None:
    config = {"dataset_name": "openmoji", "preset": "demo-plain", "max_train_steps": 20, "long_skips": False, "vae": None}
    write_run(jobs, "mine", saved=5, versions={"torch": "2"}, images_a_step=4, train_batch_size=4, output_dir="elsewhere", **config)
    checkpoint = jobs.runs / "mine/checkpoints/step-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    full = Jobs(jobs.runs, at_most=0)
    assert [status.name for status in jobs.all()] == ["mine"], "the versions of libraries are not those of an evaluation"
    assert full.resume("mine", {"max_train_steps": "30"}).state == QUEUED
    job = Job(**json.loads((jobs.runs / "mine" / JOB).read_text()))
    assert job.options["max_train_steps"] == 30 and "versions" not in job.options and "images_a_step" not in job.options
    words = job_flags.arguments(job.options, jobs.runs / "mine", job.resume)
    assert {"--preset=demo-plain", "--no-long_skips", "--max_train_steps=30", "--resume_from_checkpoint=latest"} <= set(words)
    assert [word for word in words if "output_dir" in word] == [f"--output_dir={jobs.runs / 'mine'}"]


def test_the_steps_of_a_cosine_are_not_moved(jobs: Jobs) -> None:
    write_run(jobs, "mine", saved=5, dataset_name="openmoji", max_train_steps=20, lr_scheduler="cosine")
    with pytest.raises(ValueError, match="fall to 0 at step 20"):
        Jobs(jobs.runs, at_most=0).resume("mine", {"max_train_steps": 30})


def test_damaged_files_hide_no_run(jobs: Jobs) -> None:
    for name, content in (("a", "{"), ("b", '{"pid": 1}'), ("c", "[]"), ("d", '{"options": {}, "queued_at": 0, "news": 1}')):
        write_run(jobs, name, saved=1)
        (jobs.runs / name / JOB).write_text(content)
        (jobs.runs / name / "model_index.json").write_text(content)
        (jobs.runs / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1, "images_per_s": 1}\n{"step": 2, "lo')
    (jobs.runs / "a" / "config.json").write_text("\0")
    assert {status.name: status.state for status in jobs.all()} == dict.fromkeys("abcd", INTERRUPTED)
    assert [progress_of(jobs.status(name)).step for name in "abcd"] == [1, 1, 1, 1]


def test_progress_of_a_running_one(jobs: Jobs, process: Callable) -> None:
    options = {**FLAGS, "max_train_steps": 30_000}
    write_job(jobs, "mine", process(), options=options)
    run = write_run(jobs, "mine", lines=2000, rate=50.0, images_a_step=5, max_train_steps=30_000, log="one\ntwo\rthree\n")
    (run / "samples").mkdir()
    for name in ("step-500.png", "step-1500.png", "step-x.png", ".step-9999.png.partial-1"):
        (run / "samples" / name).touch()
    progress = progress_of(jobs.status("mine"))
    assert (progress.step, progress.of, progress.images_per_s) == (20_000, 30_000, 50.0)
    assert progress.seconds_left == pytest.approx(10_000 * 5 / 50)
    assert len(progress.curve) == MAX_POINTS
    steps = [line["step"] for line in progress.curve]
    assert (steps[0], steps[-1]) == (10, 20_000) and steps == sorted(set(steps))
    assert max(b - a for a, b in pairwise(steps)) <= 50, "evenly thinned"
    assert progress.sample == run / "samples/step-1500.png" and progress.log == ("one", "two", "three")
    job = json.loads((run / JOB).read_text())
    job |= {"options": {**options, "max_train_minutes": 10}, "started_at": time.time() - 590}
    (run / JOB).write_text(json.dumps(job))
    assert progress_of(jobs.status("mine")).seconds_left == pytest.approx(10, abs=5), "whichever ends it first"


def test_a_table_of_many_runs_reads_the_curves_of_each_once(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(monitor, "read_metrics", lambda run: read.append(run) or [{"step": 7, "images_per_s": 5.0}])
    for i in range(20):
        (jobs.runs / f"r{i}").mkdir(parents=True)
        (jobs.runs / f"r{i}/config.json").write_text('{"max_train_steps": 9}')
        (jobs.runs / f"r{i}/metrics.jsonl").write_text("{}")
    for _ in range(3):
        assert overview_of(jobs, jobs.all()).count("step 7 of 9") == 20
    assert len(read) == 20


def test_of_a_long_training_only_what_is_shown_is_kept(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Line(dict):
        pass

    read: list[weakref.ref] = []

    def read_metrics(run: Path) -> list[Line]:
        lines = [Line(step=step, images_per_s=5.0) for step in range(1, 10 * MAX_POINTS + 1)]
        read.extend(map(weakref.ref, lines))
        return lines

    monkeypatch.setattr(monitor, "read_metrics", read_metrics)
    run = write_run(jobs, "mine", lines=1)
    for _ in range(3):  # as it grows
        with (run / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        progress = progress_of(jobs.status("mine"))
        assert (progress.step, progress.images_per_s, len(progress.curve)) == (10 * MAX_POINTS, 5.0, MAX_POINTS)
    assert len(read) == 3 * 10 * MAX_POINTS and sum(line() is not None for line in read) <= 3 * MAX_POINTS


def test_quick_looks_are_not_thinned_out_and_have_curves_of_their_own(jobs: Jobs) -> None:
    run = write_run(jobs, "mine", lines=3)
    looks = {10: {"probe_knn": 0.25, "probe_linear": 0.5}, 2503: {"fd": 30.0}}
    lines = [{"step": step, "images_per_s": 5.0, "loss": 1.0, **looks.get(step, {})} for step in range(1, 4 * MAX_POINTS + 1001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] != 10))
    shown = details_of(jobs, jobs.status("mine"), None)
    assert "Fréchet distance of a quick look" in shown and "kNN of a quick look" not in shown
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {10, 2503} <= {line["step"] for line in progress_of(jobs.status("mine")).curve}
    assert "kNN of a quick look" in details_of(jobs, jobs.status("mine"), None)


def test_curves_are_read_when_the_libraries_are_there(jobs: Jobs) -> None:
    run = write_run(jobs, "mine", lines=3)
    look = threading.Thread(target=curve_of, args=[run])
    with libraries._lock:  # another thread imports them
        look.start()
        look.join(0.5)
        assert look.is_alive()
    look.join(60)
    assert not look.is_alive() and len(curve_of(run)) == 3


def test_the_jobs_are_looked_through_once_for_what_runs_and_what_was_found(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, each in (("done", {"pid": 2**22 - 1, "process_began": 0.0, "started_at": 1.0}), ("next", {})):
        options = {"measure": "FD", "checkpoints": ["openmoji-plain"], "num_samples": 64}
        write_job(jobs, f".evaluations/{name}", options=options, kind=EVALUATION, **each)
    write_json(jobs.runs / ".evaluations/done/result.json", {"metric": "FD", "value": 3.25})
    looked, statuses = [], jobs._statuses
    monkeypatch.setattr(jobs, "_statuses", lambda: looked.append(1) or statuses())
    jobs.at_most = 0
    waits, found = on_their_way_and_found(Site(jobs.runs, jobs, Votes(tmp_path / "votes")))
    assert "place 1 in the queue" in waits and "<b>3.25</b>" in found and len(looked) == 1


def test_a_result_is_read_once_for_all_who_look(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"measure": "FD", "checkpoints": ["openmoji-plain"], "num_samples": 64}
    folder = write_job(jobs, ".evaluations/done", options=options, kind=EVALUATION, pid=2**22 - 1, process_began=0.0, started_at=1.0)
    site, read = Site(jobs.runs, jobs, Votes(tmp_path / "votes")), []
    monkeypatch.setattr(judging, "read_json", lambda file: read.append(file) or read_json(file))
    for value in (3.25, 4.5):
        write_json(folder / "result.json", {"metric": "FD", "value": value})
        for _ in range(3):
            assert f"<b>{value}</b>" in leaderboard(site)
    assert len(read) == 2


def test_the_estimate_follows_runs_of_the_same_network_and_size(jobs: Jobs) -> None:
    flags = {**FLAGS, "max_train_steps": 600, "train_batch_size": 10}
    assert jobs.estimate(flags) is None
    write_run(jobs, "other-size", size="S", lines=3, rate=1.0)
    write_run(jobs, "other-pixels", resolution=64, lines=3, rate=1.0)
    write_run(jobs, "other-depth", depth=24, lines=3, rate=1.0)
    write_run(jobs, "no-lines")
    assert jobs.estimate(flags) is None
    write_run(jobs, "older", lines=3, rate=20.0)
    os.utime(jobs.runs / "older/metrics.jsonl", (1, 1))
    write_run(jobs, "newest", lines=30, rate=10.0)
    assert jobs.estimate(flags) == pytest.approx(600 * 10 / 10 / 60)
    assert jobs.estimate({**flags, "max_train_minutes": 3}) == 3
    assert jobs.estimate({**flags, "gradient_accumulation_steps": 2}) == pytest.approx(20)
    with pytest.raises(ValueError, match="--size"):
        jobs.estimate({**flags, "size": "XXL"})


# ------------------------------------------------------------------------------------------------------------ names and flags


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/a", "a\0", ".hidden", "a\n", "-x", "ä", "a" * 65, None, 3, ["a"]])
def test_names_that_are_no_plain_words_are_refused(jobs: Jobs, name: object) -> None:
    write_run(jobs, "mine", saved=1)
    for use in (lambda: jobs.start(name, FLAGS), lambda: jobs.check(name, FLAGS), lambda: jobs.rename("mine", name)):
        with pytest.raises(ValueError, match="the name of a run must be"):
            use()
    for use in (jobs.status, jobs.stop, jobs.resume, jobs.delete, lambda name: jobs.rename(name, "other")):
        with pytest.raises(ValueError, match="there is no run"):
            use(name)
    assert {path.name for path in jobs.runs.iterdir()} <= {"mine", ".jobs.lock"}


def test_no_run_is_named_like_a_shipped_checkpoint(jobs: Jobs) -> None:
    write_run(jobs, "mine", saved=1)
    for use in (
        lambda: jobs.start("openmoji-plain", FLAGS),
        lambda: jobs.start_pair("openmoji", {**FLAGS, "alpha_min": 0.6}),
        lambda: jobs.rename("mine", "openmoji-plain"),
    ):
        with pytest.raises(ValueError, match="openmoji-plain is the name of a shipped checkpoint; choose another name"):
            use()
    assert [status.name for status in jobs.all()] == ["mine"]


def test_nothing_is_overwritten_and_links_that_lead_out_are_no_runs(jobs: Jobs, tmp_path: Path) -> None:
    outside = write_run(Jobs(tmp_path / "elsewhere"), "secret", saved=1)
    write_run(jobs, "mine", saved=1)
    (jobs.runs / "file").touch()
    (jobs.runs / "link").symlink_to(outside)
    (jobs.runs / "nowhere").symlink_to(tmp_path / "made by a start")
    for name in ("mine", "file", "link", "nowhere"):
        for use in (lambda name=name: jobs.start(name, FLAGS), lambda name=name: jobs.rename("mine", name)):
            with pytest.raises(ValueError, match="already"):
                use()
    for use in (jobs.delete, jobs.status, jobs.stop, jobs.resume):
        with pytest.raises(ValueError, match="there is no run"):
            use("link")
    assert [status.name for status in jobs.all()] == ["mine"]
    assert (outside / "config.json").is_file() and not (tmp_path / "made by a start").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (None, "options must be names"),
        ({1: 2}, "options must be names"),
        ({}, "--dataset_name"),
        ({"dataset_name": "openmoji"}, "needs an end"),
        ({"preset": "nonsense"}, "--preset"),
        ({**FLAGS, "preset": ["demo-plain"]}, "must be a text"),
        ({**FLAGS, "nonsense": 1}, "no option 'nonsense'"),
        ({**FLAGS, "help": True}, "no option 'help'"),
        ({**FLAGS, "seed=1 --output_dir": "/tmp/x"}, "no option"),
        ({**FLAGS, "mask_ratio": 0.5}, "no option 'mask_ratio'"),
        ({**FLAGS, "output_dir": "/tmp/x"}, "the page gives it"),
        ({**FLAGS, "resume_from_checkpoint": "latest"}, "the page gives it"),
        ({**FLAGS, "size": "Q"}, "--size cannot be 'Q'; choose from"),
        ({**FLAGS, "patch_size": 5}, "patch"),
        ({**FLAGS, "depth": 5}, "use an even depth"),
        ({**FLAGS, "alpha_min": 0}, "alpha_min"),
        ({**FLAGS, "alpha_min": float("nan")}, "alpha_min"),
        ({**FLAGS, "learning_rate": float("nan")}, "learning_rate"),
        ({**FLAGS, "alpha_min": 0.5, "alpha_eff": 0.003}, "not both"),
        ({**FLAGS, "seed": -1}, "--seed"),
        ({**FLAGS, "seed": 2**70}, "'seed' must be"),
        ({**FLAGS, "seed": True}, "--seed"),
        ({**FLAGS, "seed": "1; rm"}, "--seed"),
        ({**FLAGS, "max_train_steps": 2.5}, "max_train_steps"),
        ({**FLAGS, "long_skips": 3}, "long_skips"),
        ({**FLAGS, "objective": "ddpm", "path": "gvp"}, "path"),
        ({**FLAGS, "resolution": 100_000}, "up to 1024"),
        ({**FLAGS, "resolution": "1_000_000"}, "up to 1024"),
        ({**FLAGS, "train_batch_size": 1e9}, "up to 4096"),
        ({**FLAGS, "train_batch_size": "many"}, "train_batch_size"),
        ({**FLAGS, "image_column": "x" * 10_000}, "printable text"),
        ({**FLAGS, "image_column": "a\0b"}, "printable text"),
        ({**FLAGS, "init_from": "../../etc"}, "no checkpoint"),
        ({**FLAGS, "init_from": "/etc/passwd"}, "no checkpoint"),
        ({"train_data_dir": "/no/such", "max_train_steps": 1}, "not a folder"),
        ({"train_data_dir": str(ROOT / "models"), "max_train_steps": 1}, "holds no images"),
        ({**FLAGS, "resolution": "wide"}, "--resolution cannot be 'wide'; give a whole number"),
        ({"dataset_name": "../x", "max_train_steps": 1}, "not a folder"),
    ],
)
def test_bad_flags_are_told_in_one_line_and_leave_nothing(jobs: Jobs, options: Any, message: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        jobs.start("mine", options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert not jobs.runs.exists() and capfd.readouterr().err == ""


def test_errors_name_fields_of_the_form_and_leave_names_alone(jobs: Jobs) -> None:
    write_job(jobs, "a--seed-3")
    with pytest.raises(gr.Error, match="there is a run or a file a--seed-3 already"), form_errors():
        jobs.start("a--seed-3", FLAGS)
    with pytest.raises(gr.Error, match="Against missing is not a folder"), form_errors():
        jobs.judge({"measure": "FD", "checkpoints": ["openmoji-plain"], "reference": "missing"})
    with pytest.raises(gr.Error) as error, form_errors():
        raise ValueError("a-patch_size: --seed is 3, and patch_size must divide (--resolution)")
    assert error.value.message == "a-patch_size: Seed is 3, and Patch must divide (Resolution)"


def test_no_value_passes_for_another_flag(jobs: Jobs) -> None:
    sly = {**FLAGS, "label_column": "--output_dir=/tmp/elsewhere", "image_column": "--help"}
    words = job_flags.arguments(jobs.check("mine", sly)["mine"], jobs.runs / "mine")
    assert [word for word in words if word.startswith("--output_dir")] == [f"--output_dir={jobs.runs / 'mine'}"]
    assert job_flags.parse(sly, jobs.runs / "mine")["label_column"] == "--output_dir=/tmp/elsewhere"


def test_values_are_stored_as_the_script_reads_them(jobs: Jobs) -> None:
    options = jobs.check("mine", {**FLAGS, "seed": "7", "max_train_minutes": 2, "alpha_eff": None, "init_from": "openmoji-plain"})["mine"]
    assert options.pop("init_from") == str(ROOT / "models/pretrained/openmoji-plain")
    assert options == {**FLAGS, "seed": 7, "max_train_minutes": 2.0} and "alpha_eff" not in options


def test_a_training_begins_with_the_newest_weights_alone(jobs: Jobs) -> None:
    write_pair(jobs.runs)
    shutil.copytree(jobs.runs / "tiny-plain/model", jobs.runs / "tiny-plain/ema")
    with pytest.raises(ValueError, match="begin with the newest weights of a run; give its name alone"):
        jobs.check("mine", {**FLAGS, "init_from": f"{PLAIN} raw"})


def test_a_pair_is_checked_as_it_would_be_started(jobs: Jobs) -> None:
    checked = jobs.check("mine", {**FLAGS, "alpha_min": 0.6}, pair=True)
    assert {name: options["alpha_min"] for name, options in checked.items()} == {"mine-plain": 1.0, "mine-decayed": 0.6}
    write_job(jobs, "mine")
    assert jobs.check("mine", {**FLAGS, "alpha_min": 0.6}, pair=True) == checked, "the run without an ending is another one"
    write_job(jobs, "mine-decayed")
    for options, message in (({"alpha_min": 0.6}, "a run or a file mine-decayed already"), ({}, "an alpha_min below 1")):
        for use in (lambda name, options: jobs.check(name, options, pair=True), jobs.start_pair):
            with pytest.raises(ValueError, match=message):
                use("mine", {**FLAGS, **options})
    assert not (jobs.runs / "mine-plain").exists(), "both or none"


@pytest.mark.parametrize("given", [{"preset": "dit-64px-rule"}, {"dataset_name": "openmoji", "shortcut_schedule": "sqrt-half"}])
def test_the_plain_one_of_a_pair_is_plain(given: dict, jobs: Jobs, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "launch", lambda *_: None)
    data = {} if "dataset_name" in given else {"train_data_dir": str(image_folder)}
    plain, decayed = jobs.start_pair("mine", {**given, **data, "max_train_steps": 1})
    for status, is_plain in ((plain, True), (decayed, False)):
        values = job_flags.parse(status.options, jobs.runs / "x")
        model = create_model("dit", "XS", **{name: values[name] for name in ("alpha_min", "alpha_eff", "shortcut_schedule")})
        assert all(alpha == 1 for alpha in model.alphas) == is_plain


def test_what_a_checkpoint_was_trained_on_is_proposed_where_it_is_here(jobs: Jobs, image_folder: Path) -> None:
    write_pair(jobs.runs)
    index = jobs.runs / "tiny-plain" / "model_index.json"
    about = json.loads(index.read_text())
    assert judging.training_data("openmoji-plain", jobs.runs) == "openmoji"
    for data, proposed in ((str(image_folder), str(image_folder)), ("/no/such", ""), ("tiny-imagenet-10", "")):
        write_json(index, {**about, "training": {**about["training"], "data": data}})
        assert judging.training_data(PLAIN, jobs.runs) == proposed
    assert judging.training_data("nothing", jobs.runs) == ""


def test_images_come_from_the_allowed_folder_alone(jobs: Jobs, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(image_folder)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images holds no images"):
        jobs.check("mine", {"train_data_dir": str(tmp_path / "images"), "max_train_steps": 1})
    for archive in ("train-000.tar", "train.parquet", "a.PNG"):
        place = tmp_path / "images" / archive
        place.touch()
        assert jobs.check("mine", {"train_data_dir": str(tmp_path / "images"), "max_train_steps": 1})
        place.unlink()
    (tmp_path / "images" / "a.PNG").touch()
    fenced = Jobs(jobs.runs, data=tmp_path)
    stored = fenced.check("mine", {"train_data_dir": "images", "max_train_steps": 1})["mine"]
    assert stored["train_data_dir"] == str(tmp_path / "images")
    for name in ("..", "/etc", str(image_folder), "out", "images/../.."):
        with pytest.raises(ValueError, match="outside"):
            fenced.check("mine", {"train_data_dir": name, "max_train_steps": 1})
        if name != "out":
            with pytest.raises(ValueError, match="outside"):
                fenced.check("mine", {"dataset_name": name, "max_train_steps": 1})
    with pytest.raises(ValueError, match=r"outside|not a folder"):
        fenced.check("mine", {"dataset_name": "models/pretrained", "max_train_steps": 1})
    for name, stored in (("images", str(tmp_path / "images")), ("cifar10", "cifar10")):
        assert fenced.check("mine", {"dataset_name": name, "max_train_steps": 1})["mine"]["dataset_name"] == stored
    assert jobs.check("mine", {"train_data_dir": str(image_folder), "max_train_steps": 1})


def test_one_evaluation_is_not_queued_twice(jobs: Jobs) -> None:
    jobs.at_most = 0
    options = {"measure": "FD", "checkpoints": ["openmoji-plain"], "num_samples": 64}
    queued = jobs.judge(options)
    with pytest.raises(ValueError, match="FD of openmoji-plain, 64 images is on its way already"):
        jobs.judge(options)
    assert jobs.judge({**options, "num_samples": 65}).position == 2
    jobs.stop(queued.name)
    assert jobs.judge(options).position == 2


def test_numbers_are_about_the_weights_that_were_judged(
    jobs: Jobs, process: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(jobs.runs)
    monkeypatch.setattr(jobs_module, "launch", lambda *_: None)
    index = jobs.runs / PLAIN.removeprefix("runs/") / "model_index.json"
    before = process()
    write_job(jobs, "before", before)
    options = {"measure": "FD", "checkpoints": [PLAIN], "num_samples": 64}
    judged = jobs.judge(options)
    index.write_text(index.read_text().replace("1234", "2345"))  # it trains on while its evaluation waits
    before.kill()
    before.wait()
    jobs.all()  # now the evaluation begins
    job, running = json.loads((judged.folder / JOB).read_text()), process()
    began = {"pid": running.pid, "process_began": psutil.Process(running.pid).create_time(), "started_at": time.time()}
    write_json(judged.folder / JOB, {**job, **began})
    with pytest.raises(ValueError, match="on its way already"):
        jobs.judge(options)
    index.write_text(index.read_text().replace("2345", "3456"))  # newer weights are another question
    jobs.stop(jobs.judge(options).name)
    index.write_text(index.read_text().replace("3456", "2345"))
    write_json(judged.folder / "result.json", {"metric": "FD", "value": 3.5, "num_samples": 64})
    running.kill()
    running.wait()
    site = Site(jobs.runs, jobs, Votes(tmp_path / "votes"))
    assert [each["value"] for each in measured(jobs)[PLAIN]] == [3.5]
    assert "earlier" not in leaderboard(site)
    index.write_text(index.read_text().replace("2345", "5678"))  # as a new run of that name would leave it
    assert measured(jobs)[PLAIN] == [] and "(earlier weights)" in leaderboard(site)
    shutil.rmtree(index.parent)
    assert measured(jobs)[PLAIN] == [] and "(not here any more)" in leaderboard(site)


def test_weights_are_read_while_others_may_go_on(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(jobs.runs)
    monkeypatch.setattr(jobs_module, "launch", lambda *_: None)
    read, held = [], []

    def reads(file: Path) -> str:
        read.append(file)
        try:
            FileLock(jobs.runs / jobs_module.LOCK, timeout=0).acquire().lock.release()
        except Timeout:
            held.append(file)
        return sha256(file)

    monkeypatch.setattr(catalog, "sha256", reads)
    index = jobs.runs / PLAIN.removeprefix("runs/") / "model_index.json"
    jobs.at_most = 0
    judged = jobs.judge({"measure": "FD", "checkpoints": [PLAIN], "num_samples": 64})
    index.write_text(index.read_text().replace("1234", "7654"))
    jobs.at_most, asked = 1, len(read)
    jobs.all()  # now it begins
    assert 0 < asked < len(read) and held == []
    assert json.loads((judged.folder / JOB).read_text())["options"]["weights"] == [catalog.find(PLAIN, jobs.runs).hash]


@pytest.mark.parametrize("trains_on", [False, True])
def test_weights_that_a_page_could_not_note_are_read_by_the_next_look(
    trains_on: bool, jobs: Jobs, process: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(jobs.runs)
    running, lock = process(), FileLock(jobs.runs / jobs_module.LOCK)
    began = {"pid": running.pid, "process_began": psutil.Process(running.pid).create_time(), "started_at": time.time()}
    monkeypatch.setattr(jobs_module, "launch", lambda run, *_: write_json(run / JOB, {**json.loads((run / JOB).read_text()), **began}))
    monkeypatch.setattr(jobs_module, "LOCK_S", 0.1)
    jobs.at_most = 0
    judged = jobs.judge({"measure": "FD", "checkpoints": [PLAIN], "num_samples": 64})
    catalog.hash_of_version.cache_clear()
    monkeypatch.setattr(catalog, "sha256", lambda file: (lock.acquire(), sha256(file))[1])  # another page is busy from now on
    jobs.at_most = 1
    assert jobs.start("mine", FLAGS).position == 1, "the training is queued, whatever becomes of the evaluation that begins with it"
    lock.release(force=True)
    catalog.hash_of_version.cache_clear()  # as in a page that begins
    monkeypatch.setattr(catalog, "sha256", sha256)
    noted = [catalog.find(PLAIN, jobs.runs).hash]
    if trains_on:
        os.utime(jobs.runs / PLAIN.removeprefix("runs/") / "model_index.json", ns=(1, 1))
        noted = [judging.UNKNOWN]
    catalog.hash_of_version.cache_clear()
    page = Jobs(jobs.runs)
    assert page.status(judged.name).options["weights"] == noted
    write_json(judged.folder / "result.json", {"metric": "FD", "value": 3.5, "num_samples": 64})
    page.stop("mine")
    running.kill()
    running.wait()
    assert [each["value"] for each in measured(page)[PLAIN]] == ([] if trains_on else [3.5])


def test_a_run_is_known_by_its_settings(jobs: Jobs, process: Callable) -> None:
    write_job(jobs, "mine", process())
    run = write_run(jobs, "mine", sample_steps=500)
    status = jobs.status("mine")
    shown = details_of(jobs, status, None)
    assert status.options and all(f"{name} {value}" in shown for name, value in status.options.items())
    assert "the first at step 500" in shown
    (run / "samples").mkdir()
    (run / "samples" / "step-500.png").write_bytes(b"")
    assert "the first at step" not in details_of(jobs, status, None)


def test_a_run_has_the_colour_of_its_kind_whichever_is_chosen_first(jobs: Jobs) -> None:
    for name, alpha_min in (("plain", 1.0), ("decayed", 0.5), ("milder", 0.8)):
        write_run(jobs, name, saved=30, lines=3, alpha_min=alpha_min)
    keys = {
        chosen: re.findall(r'class="key c(\d)"></span>(\w+)', details_of(jobs, *map(jobs.status, chosen)))[:2]
        for chosen in (("plain", "decayed"), ("decayed", "plain"), ("decayed", "milder"))
    }
    assert sorted(keys["plain", "decayed"]) == sorted(keys["decayed", "plain"]) == [("0", "plain"), ("1", "decayed")]
    assert keys["decayed", "milder"] == [("0", "decayed"), ("1", "milder")]
    assert 'class="key c1"></span>decayed' in details_of(jobs, jobs.status("decayed"), None)


def test_a_run_that_vanishes_beside_another_one_breaks_nothing(jobs: Jobs) -> None:
    for name in ("one", "other"):
        write_run(jobs, name, saved=30, lines=3)
    one, other = map(jobs.status, ("one", "other"))
    jobs.delete("other")
    assert "one</h3>" in details_of(jobs, one, other)


def test_a_paired_difference_tells_whose_it_is_and_how_it_was_taken(tmp_path: Path) -> None:
    about = {"reference": "openmoji", "num_samples": 64, "reference_num": 9, "feature_extractor": "efficientnet-lite0"}
    entries = [{"name": path, "metrics": {"FD": {"value": 7.5}}, **about} for path in ("/r/x", "/r/y@raw")]
    row = {"contender": "/r/y@raw", "against": "/r/x", "metric": "FD", "difference": -1.0, "low": -2.0, "high": -0.5, "verdict": "better"}
    row["interval"] = "of two independent numbers"
    write_json(tmp_path / judging.COMPARISON, {"entries": entries, "differences": [row]})
    options = {"checkpoints": ["runs/x", "runs/y"], "paths": ["/r/x", "/r/y@raw"]}
    (line,) = judging.read_results(tmp_path, options)[1]
    assert line.startswith(
        "FD: runs/y against runs/x -1 [-2, -0.5], better (95 %, of two independent numbers; 64 samples against 9 of openmoji"
    )
    assert "efficientnet-lite0" in line


def test_weights_that_change_while_they_are_read_are_unknown(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(jobs.runs)
    source = catalog.find(PLAIN, jobs.runs)
    version = source.version
    os.utime(source.files[-1], ns=(1, 1))
    assert judging.hash_of(version) == judging.UNKNOWN != judging.hash_of(source.version)
    assert judging.hash_of(json.loads(json.dumps(source.version))) == source.hash


def test_an_evaluation_tells_how_far_it_is(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import time; from models.progress import progress_bar; bar = progress_bar(total=8, desc='generating')"
    program += "; bar.update(2); time.sleep(1); bar.update(2); time.sleep(600)"
    monkeypatch.setattr(judging, "command", lambda *_: ["-c", program])
    name = jobs.judge({"measure": "FD", "checkpoints": ["openmoji-plain"], "num_samples": 64}).name
    wait_for(lambda: (progress_of(jobs.status(name)).part or {}).get("done") == 4)
    assert progress_of(jobs.status(name)).part["seconds_left"] > 0
    status = jobs.status(name)
    for shown in (overview_of(jobs, [status]), details_of(jobs, status, None), on_their_way(jobs, [status])):
        assert "generating: 4 of 8, " in shown and "left of this part" in shown
        assert time.strftime("FD of openmoji-plain, 64 images, %Y-%m-%d ", time.localtime(status.started_at)) in shown
    jobs.stop(name)
    wait_for(lambda: not jobs.status(name).active)
    assert progress_of(jobs.status(name)).part is None and on_their_way(jobs, jobs.all()) == ""

    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress.json"))
    for _ in progress_bar(range(3), desc="probing"):
        assert json.loads((tmp_path / "progress.json").read_text())["part"] == "probing"
    assert not (tmp_path / "progress.json").exists(), "between two parts nothing is told"


def test_what_a_killed_process_was_at_is_not_told_of_another(jobs: Jobs, process: Callable) -> None:
    told = {"part": "encoding", "done": 1, "of": 8, "seconds_left": 3.0}
    write_job(jobs, "mine", process())
    run = write_run(jobs, "mine", saved=2, max_train_steps=50)
    write_json(run / PART, told)
    assert progress_of(jobs.status("mine")).part == told
    (run / JOB).write_text(json.dumps(asdict(Job(FLAGS, 1.0, pid=2**22 - 1, process_began=0.0, started_at=1.0))))
    process("", "training/train_diffusion.py", f"--output_dir={run}")  # goes on in a shell
    assert jobs.status("mine").message == "started outside the page" and progress_of(jobs.status("mine")).part is None


def test_only_times_that_can_be_told_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / PART))
    bar = progress_bar(total=2, desc="encoding")
    time.sleep(0.01)
    bar.update(3)  # more than was thought at first
    bar.refresh()
    told = part_of(tmp_path)
    assert told == {"part": "encoding", "done": 3, "of": 2, "seconds_left": 0}
    bar.close()
    for odd in ("NaN", "Infinity", '"3"'):
        for key in ("done", "of", "seconds_left"):
            (tmp_path / PART).write_text(json.dumps({**told, key: "odd"}).replace('"odd"', odd))
            assert part_of(tmp_path) is None


def test_odd_result_files_do_not_break_the_tables(jobs: Jobs, tmp_path: Path) -> None:
    write_pair(jobs.runs)
    odd = [
        {"metric": "FD", "value": True},
        {"metric": "FD", "value": "3"},
        {
            "metric": "FD",
            "value": 1.0,
            "low": "x",
            "high": None,
            "sampler": "euler",
            "guidance_scale": "a",
            "alpha_min": [],
            "reference": 3,
        },
        {"metric": "KD", "value": None, "metrics": {"KD": {"value": 2.0, "low": {}}, "IS": {"value": None}, "FD": 4}},
        {"metric": "linear", "value": 5.0, "dataset": "d", "best": {"block": 1, "time": "late"}, "images_seen": "many"},
        {"metric": "linear", "value": 6.0, "dataset": "d", "best": [1]},
    ]
    for i, result in enumerate(odd):
        write_json(jobs.runs / "tiny-plain" / "eval" / f"{i}.json", result)
    found = all_results(jobs.runs)[PLAIN]
    assert [each["value"] for each in found] == [1.0, 2.0, 5.0, 6.0]
    assert all(map(result_words, found)) and "<b>5</b>" in leaderboard(Site(jobs.runs, None, Votes(tmp_path / "votes")))


def test_the_queue_moves_while_nobody_looks(
    jobs: Jobs, process: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jobs_module, "MOVE_S", 0.05)
    started: list[str] = []
    monkeypatch.setattr(jobs_module, "launch", lambda folder, *_: started.append(folder.name))
    before = process()
    write_job(jobs, "before", before)
    write_job(jobs, "next")
    write_job(jobs, "damaged", options=[])
    jobs.keep_moving()
    time.sleep(0.3)
    assert started == [] and capsys.readouterr().out.count("the queue cannot move") == 1
    shutil.rmtree(jobs.runs / "damaged")
    before.kill()
    before.wait()
    try:
        deadline = time.monotonic() + 10
        while not started and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started[0] == "next"
    finally:
        jobs.at_most = 0  # the thread goes on


def test_the_queue_rests_while_nothing_waits(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "MOVE_S", 0.05)
    jobs.at_most = 0  # the thread goes on
    looked: list[float] = []
    monkeypatch.setattr(jobs, "all", lambda: looked.append(time.monotonic()))
    write_job(jobs, "cancelled", stop_asked_at=1.0)
    write_job(jobs, "unstartable", error="it could not be started")
    jobs.keep_moving()
    time.sleep(0.3)
    assert looked == []
    write_job(jobs, "next")
    wait_for(lambda: bool(looked), 10)


def test_the_queue_has_an_end(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "MAX_QUEUED", 2)
    full = Jobs(jobs.runs, at_most=0)
    for name in "ab":
        assert full.start(name, FLAGS).state == QUEUED
    with pytest.raises(ValueError, match="2 jobs are queued already"):
        full.start("c", FLAGS)
    with pytest.raises(ValueError, match="2 jobs are queued already"):
        full.judge({"measure": "FD", "checkpoints": ["openmoji-plain"], "num_samples": 64})
    assert not (jobs.runs / "c").exists()
    with pytest.raises(ValueError, match="a is queued; stop it first"):
        full.delete("a")
    full.stop("a")
    full.rename("a", "c")
    full.delete("c")
    assert [status.name for status in full.all()] == ["b"] and full.start("a", FLAGS).position == 2


def test_what_cannot_be_started_fails_and_holds_up_nobody(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(job_process.loaded, "let_go", lambda: asked.append(True))
    write_job(jobs, "mine", options={**FLAGS, "image_column": "a\0b"})
    (jobs.runs / "yours" / LOG).mkdir(parents=True)
    (jobs.runs / "yours" / JOB).write_text((jobs.runs / "mine" / JOB).read_text())
    jobs.all()
    assert {(status.state, status.message.split(" (")[0]) for status in jobs.all()} == {(FAILED, "it could not be started")}
    assert len(asked) == 2, "the page's networks make room on the GPU for what begins"


def test_looking_makes_nothing(jobs: Jobs) -> None:
    assert jobs.all() == [] and not jobs.runs.exists()
