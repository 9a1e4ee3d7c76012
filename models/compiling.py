"""torch.compile: what it needs, and where it is worth its time."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

WORTH_STEPS, WORTH_MINUTES = 5000, 15.0  # so long a training is compiled on a GPU; how much it gains there was not measured yet


def has_compiler() -> bool:
    """Whether there is one that can translate what torch writes for CPUs."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def has_what_triton_needs() -> bool:
    """Whether a GPU's kernels can be compiled: Triton, a C compiler and Python's headers for what calls them."""
    from torch.utils._triton import has_triton

    has_c = any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    return has_triton() and has_compiler() and has_c and Path(sysconfig.get_path("include"), "Python.h").is_file()


def require_compiler() -> None:
    """Raise ValueError, which names the flag, if there is none."""
    if not has_compiler():
        raise ValueError("--compile needs a C++ compiler; install one (Debian: apt-get install g++), or leave it away")


def is_worth_it(device: torch.device, steps: int | None, minutes: float | None) -> bool:
    """Whether a training of so many steps is to be compiled where nobody said so; without a number of steps, of so many minutes.

    Only on GPUs that Triton knows. On CPUs it gains a sixth to a quarter of a DiT's step and less than a tenth of an MAE's
    (tests/benchmarks/RESULTS.md), last digits change, and whoever repeats a small run wants those.
    """
    # both may be given: then the minutes say when to leave, and the training goes on later
    is_long = steps >= WORTH_STEPS if steps is not None else (minutes or 0) >= WORTH_MINUTES
    return device.type == "cuda" and is_long and has_what_triton_needs()
