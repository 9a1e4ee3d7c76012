"""What the C library does with memory that was freed."""

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt(3)
MOST, MOST_BEFORE_2_35 = 2**31 - 1, 2**25


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for what is allocated next, from now on; returns whether it does (elsewhere nothing changes).

    A training on a CPU frees and allocates the same large tensors in every step. By itself glibc gives them back to the kernel, which
    hands them out again page by page, each filled with zeros: 15,000 page faults and a seventh of the time of a step of a DiT-XS. What
    the process holds does not fall below its peak any more.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return any(mallopt(MMAP_THRESHOLD, most) for most in (MOST, MOST_BEFORE_2_35)) and bool(mallopt(TRIM_THRESHOLD, MOST))
