"""Several processes of one script that find each other over gloo, as `accelerate launch --cpu --num_processes N` begins them.

They are forked from one process that has loaded the libraries, which otherwise takes each of them, and a launcher, seconds.
"""

import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
LIBRARIES = ["training.train_diffusion", "training.train_mae", "eval.fid"]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(LIBRARIES)


def run_together(processes: int, script: str, *flags: object, timeout: float = 300) -> CompletedProcess:
    """run_together(2, "training/train_diffusion.py", "--output_dir", run): returns once all have ended, with the first code that is not 0.

    As under torch's launcher one that fails takes the others along. AssertionError if one is at work after `timeout` seconds.
    """
    words, environment = [str(word) for word in (script, *flags)], dict(os.environ)
    with TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in said:
            path.touch()
        port, code, ends = _free_port(), 0, time.monotonic() + timeout
        started = [_forks.Process(target=_run, args=(words, said, environment, rank, processes, port)) for rank in range(processes)]
        try:
            for process in started:
                process.start()
            running = {process.sentinel: process for process in started}
            while running and (ended := [running.pop(sentinel) for sentinel in wait(list(running), ends - time.monotonic())]):
                code = next((code for code in (code, *(process.exitcode for process in ended)) if code), 0)
                if code:
                    for process in running.values():
                        process.terminate()
            told = [path.read_text() for path in said]
            assert not running, f"still at work after {timeout:g} s: {told}"
            return CompletedProcess(words, code, *told)
        finally:
            for process in started:
                if process.pid and process.is_alive():
                    process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words: list[str], said: list[Path], environment: dict[str, str], rank: int, processes: int, port: int) -> None:
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.clear()
    os.environ.update(environment, **{name: str(value) for name, value in place.items()}, ACCELERATE_USE_CPU="True", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # the libraries are loaded already
    for descriptor, name in enumerate(said, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    faulthandler.enable()
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
