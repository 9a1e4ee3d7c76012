"""How the processes of a training start and stop together."""

import ctypes
import math
import os
import signal
import sys
import time
from datetime import timedelta
from itertools import pairwise

import psutil
import torch
from accelerate import Accelerator
from tqdm import tqdm

PR_SET_PDEATHSIG = 1  # of prctl(2): which signal this process gets when its parent ends; kept by execv
PATIENCE = timedelta(hours=2)  # of processes while the main one samples, judges or writes; NCCL's own is 10 minutes
STOP_CHECK_STEPS = 10  # how often several processes on GPUs agree on stopping; on CPUs they do it at every step


def spread_over_cpu_processes() -> None:
    """Become N processes on this machine if `accelerate launch --cpu --num_processes N` was asked for N > 1.

    Without MPI accelerate starts a single process then, and says nothing. This replaces that process by torch's own launcher
    (gloo), on whatever port is free; its children find their rank in the environment and pass through here.
    """
    environment = os.environ
    alone = not any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    # accelerate names a port where it was asked for more than one process, and nowhere says how many
    if not (alone and environment.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in environment):
        return
    command = psutil.Process(os.getppid()).cmdline()
    words = [part for word in command for part in word.split("=", 1)]
    asked = {flag.replace("-", "_"): value for flag, value in pairwise(words) if flag.startswith("--")}
    if int(asked.get("__num_machines", 1)) > 1:
        raise ValueError("accelerate launch --cpu begins processes on one machine; on several use torchrun, see training/configs/README.md")
    if "__num_processes" not in asked:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # accelerate's launcher hands no signal on: its end has to tell
    # processes find each other by an address, as the machine's name may be known to nobody
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", asked["__num_processes"]]
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


class StopSignals:
    """Turns SIGINT, SIGTERM, SIGHUP and the end of `accelerate launch` into a wish to stop that all processes share.

    SIGHUP, of a terminal that is closed, stays ignored under `nohup`. A second signal interrupts at once; a launcher may hand on the one
    that its processes got from the terminal already, so only one that comes later counts.
    """

    ECHO_S = 3.0

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.wished, self.signalled = False, -math.inf
        # accelerate's launcher for one process dies of a signal without handing it on
        self.launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def __enter__(self) -> "StopSignals":
        numbers = {signal.SIGINT, signal.SIGTERM, *({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ())}
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.wished and now - self.signalled > self.ECHO_S:
            raise KeyboardInterrupt
        if self.wished:
            return
        self.signalled = now
        self.ask()
        if self.accelerator.is_main_process:
            tqdm.write(f"{signal.Signals(number).name}: saving, then leaving; once more to leave at once")

    def ask(self) -> None:
        """Stop as soon as all processes are ready to."""
        self.wished = True

    def heard(self) -> bool:
        """Whether this process wishes to stop."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.wished = True
        return self.wished

    def asked(self, step: int) -> bool:
        """Whether to stop before step `step` + 1; the same answer in every process."""
        wished = self.heard()
        if self.accelerator.num_processes == 1:
            return wished
        if self.accelerator.device.type != "cpu" and step % STOP_CHECK_STEPS:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(self.wished), device=self.accelerator.device)).item())
