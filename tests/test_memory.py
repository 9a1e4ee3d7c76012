"""Freed memory that is kept."""

import subprocess
import sys

from tests.conftest import ROOT, script_environment

STEPS = """
import resource, sys, torch
from training.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    kept = [torch.ones(2**22) for _ in range(3)]  # 16 MiB each

for keep in (False, True):
    if keep and not keep_freed_memory():
        sys.exit(3)
    step()
    before = faults()
    for _ in range(4):
        step()
    print(faults() - before)
"""


def test_large_tensors_are_taken_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    if done.returncode != 3:  # another C library
        given_back, kept = map(int, done.stdout.split())
        assert given_back > 1000 > 100 > kept, done.stdout + done.stderr
