"""torch.compile: what it needs, and where it is worth its time."""

import math
import os
import shutil

import torch

# A compiled DiT or MAE is ready within one to three minutes; so long a training on a GPU gets them back many times over
WORTH_STEPS, WORTH_MINUTES = 5000, 15.0


def has_compiler() -> bool:
    """Whether there is one that can translate what torch writes: C++ for CPUs, C around Triton's kernels."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def require_compiler() -> None:
    """Raise ValueError, which names the flag, if there is none."""
    if not has_compiler():
        raise ValueError("--compile needs a C++ compiler; install one (Debian: apt-get install g++), or leave it away")


def is_worth_it(device: torch.device, steps: int | None, minutes: float | None) -> bool:
    """Whether a training of so many steps, or minutes, is to be compiled where nobody said so.

    Only on GPUs that Triton knows. On CPUs it gains a quarter of a DiT's step and 6 % of an MAE's (tests/benchmarks/RESULTS.md), last
    digits change, and whoever repeats a small run wants those.
    """
    from torch.utils._triton import has_triton

    is_long = (steps or math.inf) >= WORTH_STEPS and (minutes or math.inf) >= WORTH_MINUTES
    return device.type == "cuda" and is_long and has_triton() and has_compiler()
