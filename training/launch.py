"""`accelerate launch --cpu --num_processes N` as one expects it."""

import os
import sys

import psutil


def spread_over_cpu_processes() -> None:
    """Become N processes if `accelerate launch --cpu --num_processes N` was asked for N > 1.

    Without MPI accelerate starts a single process then, and says nothing. This replaces that process by torch's own launcher
    (gloo); its children find their rank in the environment and pass through here.
    """
    environment = os.environ
    alone = not any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    # accelerate names a port where it was asked for more than one process, and nowhere says how many
    if not (alone and environment.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in environment):
        return
    command = psutil.Process(os.getppid()).cmdline()
    arguments = [part for word in command for part in word.split("=", 1)]
    flag = next((i for i, part in enumerate(arguments) if part.replace("-", "_") == "__num_processes"), None)
    if flag is None:
        return
    count = arguments[flag + 1]
    endpoint = ["--master_addr", environment["MASTER_ADDR"], "--master_port", environment["MASTER_PORT"]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count, *endpoint]
    os.execv(sys.executable, [*launcher, *sys.argv])
