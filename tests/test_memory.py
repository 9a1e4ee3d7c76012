"""Freed memory that is kept."""

import subprocess
import sys

from tests.conftest import ROOT, script_environment

# 40 MiB: above 32 MiB glibc always gives back what it did not promise to keep; below, it begins to keep it by itself after a few frees
STEPS = """
import resource, statistics, sys, torch
from training.memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(10 * 2**20) for _ in range(3)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for keep in (False, True):
    if keep and not keep_freed_memory():
        sys.exit(3)
    print(int(statistics.median(faults_of_a_step() for _ in range(25))))  # the first ones may still grow the heap
"""


def test_large_tensors_are_taken_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    if done.returncode != 3:  # another C library
        given_back, kept = map(int, done.stdout.split())
        assert given_back > 1000 > 100 > kept, done.stdout + done.stderr
