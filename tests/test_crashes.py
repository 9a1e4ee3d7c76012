"""Trainings that are killed: whenever it happens, no whole checkpoint is lost, and what is resumed equals what was never stopped."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from models.files import read_json
from tests.conftest import ROOT, script_environment
from training.train_diffusion import main

STEPS = 6
FLAGS = [
    "--resolution", "8", "--patch_size", "4", "--alpha_min", "0.6", "--train_batch_size", "4", "--mixed_precision", "no",
    "--max_train_steps", str(STEPS), "--checkpointing_steps", "2", "--checkpoints_total_limit", "1", "--logging_steps", "1",
    "--sample_steps", "3", "--report_to", "none", "--random_flip",
]  # fmt: skip

# Imports once, then every training is a fork of it. Before the N-th thing that it does to the files of its run it kills itself:
# opening, renaming and deleting are what Python tells its auditors.
FORKS = """
import json, os, signal, sys
from pathlib import Path
import training.train_diffusion
from models.files import read_json
from training.checkpoint import _damage, checkpoints, step_of

flags, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

def train(run, kill_at=None, more=()):
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if event in CHANGES and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(str(run)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    sys.stdout = open(os.devnull, "w")
    training.train_diffusion.main([*flags, "--output_dir", str(run), *more])
    sys.__stdout__.flush()
    (folder / "changes").write_text(str(seen))
    os._exit(0)

assert train(folder / "whole") == 0
changes = int((folder / "changes").read_text())
for kill in range(1, changes + 1) if kills == "all" else [max(1, round(share * changes)) for share in kills]:
    run = folder / f"killed-{kill}"
    assert train(run, kill) == signal.SIGKILL, kill
    left = checkpoints(run)
    assert not any(map(_damage, left)), left
    resumed = train(run, None, ["--resume_from_checkpoint", "latest"] if left else [])
    print(json.dumps({"kill": kill, "of": changes, "step": step_of(left[-1]) if left else 0, "resumed": resumed}), flush=True)
"""


# The same with two processes that find each other over gloo. Each kill is [who, share]: process 0 or 1, or both of them when it is
# process 0's turn, before that share of what the process does to the files, each thing counted once. The folders that both make are not
# counted: which of them finds one made by the other, and how often it asks for it, differs from run to run.
PAIRS = """
import json, os, signal, socket, sys, time
from pathlib import Path
import training.train_diffusion
from training.checkpoint import _damage, checkpoints, step_of

flags, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

def process(rank, port, run, victims, kill_at, more):
    words = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in words.items()}, ACCELERATE_USE_CPU="True")
    seen = set()
    def watch(event, arguments):
        path = str(arguments[0]) if event in CHANGES else ""
        if path.startswith(f"{run}/") and path != f"{run}/checkpoints":
            before = len(seen)
            seen.add((event, path))
            if before < len(seen) == kill_at:
                for pid in (*victims, os.getpid()):
                    os.kill(pid, signal.SIGKILL)
    sys.addaudithook(watch)
    said = os.open(f"{run}.{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = 0
    try:
        training.train_diffusion.main([*flags, "--output_dir", str(run), *more])
        (folder / f"changes-{rank}").write_text(str(len(seen)))
    except SystemExit as end:
        code = end.code
    os._exit(code)

def train(run, who=None, kill_at=None, more=()):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in (1, 0):
        pid = os.fork()
        if not pid:
            victims = ranks if who == "both" else ()
            process(rank, port, run, victims, kill_at if rank == (0 if who == "both" else who) else None, more)
        ranks[pid] = rank
    died, ended, codes = None, None, {}
    while len(codes) < 2:
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        ended, died = time.monotonic(), died or time.monotonic()
    return codes[0], codes[1], ended - died

assert train(folder / "whole")[:2] == (0, 0)
changes = [int((folder / f"changes-{rank}").read_text()) for rank in (0, 1)]
for who, share in kills:
    run = folder / f"killed-{who}-{share}"
    *codes, waited_s = train(run, who, max(1, int(share * changes[who if who == 1 else 0])))
    left = checkpoints(run)
    assert not any(map(_damage, left)), left
    *resumed, _ = train(run, None, None, ["--resume_from_checkpoint", "latest"] if left else [])
    told = dict(who=who, run=run.name, codes=codes, waited_s=waited_s, step=step_of(left[-1]) if left else 0, resumed=resumed)
    print(json.dumps(told), flush=True)
"""


def kill_and_resume(images: Path, folder: Path, kills: object, script: str = FORKS, more: Sequence[str] = ()) -> list[dict]:
    """Train, killed before every file operation of `kills` (shares of all of them, or "all"), and resume; returns what was done."""
    flags = ["--train_data_dir", str(images), *FLAGS, *more]
    command = [sys.executable, "-c", script, json.dumps(flags), str(folder), json.dumps(kills)]
    done = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def told(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def assert_equal_runs(run: Path, whole: Path) -> None:
    """Weights, averages, optimizer, log and pictures of both are the same, and nothing else lies there."""
    files = [{str(path.relative_to(each)) for path in each.rglob("*")} for each in (run, whole)]
    assert files[0] == files[1]
    for path in sorted(files[1]):
        if path.endswith(".safetensors"):
            ours, theirs = load_file(run / path), load_file(whole / path)
            assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours), path
        elif path.endswith((".png", ".bin")):
            assert (run / path).read_bytes() == (whole / path).read_bytes(), path
    assert told(run) == told(whole)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(image_folder: Path, tmp_path: Path) -> None:
    everything = os.environ.get("FADING_SHORTCUTS_ALL_CRASHES")  # several minutes
    done = kill_and_resume(image_folder, tmp_path, "all" if everything else [(i + 0.5) / 8 for i in range(8)])
    assert {each["step"] for each in done} >= {0, 2, 4}, "the kills did not cover the run"
    for each in done:
        assert each["resumed"] == 0, each
        assert_equal_runs(tmp_path / f"killed-{each['kill']}", tmp_path / "whole")
    print(f"{len(done)} kills")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FADING_SHORTCUTS_ALL_CRASHES"), reason="compiles for more than a minute")
def test_a_compiled_one_goes_on_bit_for_bit(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # compiled once
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # by the training itself, so that no helper outlives its kill
    (done,) = kill_and_resume(image_folder, tmp_path, [0.7], more=["--compile"])
    assert (done["step"], done["resumed"]) == (4, 0), done
    assert any((tmp_path / "inductor").rglob("*.so")), "nothing was compiled"
    assert_equal_runs(tmp_path / f"killed-{done['kill']}", tmp_path / "whole")


@pytest.mark.slow
def test_of_two_processes_one_or_both_are_killed_and_they_go_on_as_if_nothing_had_happened(image_folder: Path, tmp_path: Path) -> None:
    done = kill_and_resume(image_folder, tmp_path, [[0, 0.5], [1, 0.9], ["both", 0.6]], PAIRS)
    assert len(done) == 3 and max(each["step"] for each in done) >= 2, "the kills did not cover the run"
    for each in done:
        assert each["resumed"] == [0, 0], each
        assert_equal_runs(tmp_path / each["run"], tmp_path / "whole")
        if each["who"] == "both":
            assert each["codes"] == [-signal.SIGKILL] * 2
        else:
            survivor = 1 - each["who"]
            assert each["codes"][survivor] == 1 and each["waited_s"] < 60, each
            said = (tmp_path / f"{each['run']}.{survivor}.txt").read_text()
            assert said.count("error: another process of this training has ended") == 1 and "Traceback" not in said, said
    print(done)


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """file_limit(bytes): no file may grow larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [3_000_000, 30_000_000], ids=["model", "optimizer"])
def test_a_full_disk_is_told_and_nothing_whole_is_lost(
    size: int, image_folder: Path, tmp_path: Path, file_limit: Callable, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    flags = ["--train_data_dir", str(image_folder), *FLAGS, "--sample_steps", "0", "--output_dir", str(run)]
    AcceleratorState._reset_state(True)
    main([*flags, "--max_train_steps", "2"])

    def held() -> dict[Path, bytes]:
        on_the_way = ("metrics.jsonl", "config.json")  # which tells how many steps are wanted now
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in on_the_way}

    before = held()
    AcceleratorState._reset_state(True)
    file_limit(size)
    with pytest.raises(SystemExit, match="2"):
        main([*flags, "--resume_from_checkpoint", "latest"])
    file_limit(resource.RLIM_INFINITY)
    error = capsys.readouterr().err
    assert "step-4 cannot be written" in error and "MiB are free there" in error and error.count("\n") == 1
    assert held() == before
    assert read_json(run / "config.json")["max_train_steps"] == STEPS
    AcceleratorState._reset_state(True)
    main([*flags, "--resume_from_checkpoint", "latest"])
    assert [line["step"] for line in told(run)] == list(range(1, STEPS + 1))


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'  # as root too, whom no permissions bind


def read_only(folder: Path, *command: object) -> subprocess.CompletedProcess:
    """Run a command that finds the folder on a disk that is mounted to be read alone."""
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, folder, *command]
    return subprocess.run([str(word) for word in alone], cwd=ROOT, env=script_environment(), capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="nothing here mounts a folder to be read alone")
def test_a_read_only_folder_is_told_before_anything_is_spent(image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--train_data_dir", str(image_folder), *FLAGS, "--sample_steps", "0", "--output_dir", str(run)]
    if read_only(tmp_path, "true").returncode:
        pytest.skip("this machine lets nobody mount folders")
    AcceleratorState._reset_state(True)
    main([*flags, "--max_train_steps", "2"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for folder in (run, run / "checkpoints"):
        done = read_only(folder, sys.executable, "training/train_diffusion.py", *flags, "--resume_from_checkpoint", "latest")
        assert done.returncode == 2 and not done.stdout, done.stderr
        assert done.stderr == f"error: {folder} cannot be written (Read-only file system); choose another --output_dir\n"
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_file_where_the_run_should_be_is_told(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit, match="2"):
            main(["--train_data_dir", str(image_folder), *FLAGS, "--output_dir", str(run)])
        assert capsys.readouterr().err == f"error: {tmp_path / 'file'} cannot be written (Not a directory); choose another --output_dir\n"


def test_a_name_that_no_folder_can_have_is_told(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--train_data_dir", str(image_folder), *FLAGS, "--output_dir", str(tmp_path / ("x" * 300))])
    assert capsys.readouterr().err.endswith("cannot be written (File name too long); choose another --output_dir\n")
