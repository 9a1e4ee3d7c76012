"""Several processes of one script that find each other over gloo, as `accelerate launch --cpu --num_processes N` begins them.

They are forked from one process that has loaded the libraries, which otherwise takes each of them, and a launcher, seconds.
"""

import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LIBRARIES = ["training.train_diffusion", "training.train_mae", "eval.fid"]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(LIBRARIES)


def run_together(processes: int, script: str, *flags: object, timeout: float = 300) -> CompletedProcess:
    """run_together(2, "training/train_diffusion.py", "--output_dir", run): returns once all have ended, with the first code that is not 0.

    As under torch's launcher one that fails takes the others along.
    """
    with socket.socket() as probe, TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        words = [str(word) for word in (script, *flags)]
        said = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        started = [_forks.Process(target=_run, args=(words, said, rank, processes, port)) for rank in range(processes)]
        for process in started:
            process.start()
        running, code = {process.sentinel: process for process in started}, 0
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running), timeout)]
            code = next((code for code in (code, *(process.exitcode for process in ended)) if code), 0)
            if code or not ended:
                for process in running.values():
                    process.terminate() if ended else process.kill()
        return CompletedProcess(words, code, *(Path(name).read_text() for name in said))


def _run(words: list[str], said: list[str], rank: int, processes: int, port: int) -> None:
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in place.items()}, ACCELERATE_USE_CPU="True", OMP_NUM_THREADS="1")
    for descriptor, name in enumerate(said, 1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    faulthandler.enable()
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
