"""The memory of the tensors of a training step stays with the process."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of options in glibc's ``malloc.h``."""
LARGEST = 64 * 2**20
"""Larger tensors get memory of their own, which goes back to the system with them."""
KEPT = 512 * 2**20
"""Free memory beyond this goes back to the system."""


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step.

    By default glibc returns every tensor of some MB to the system, and each step pays for mapping
    and clearing the same pages again. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGEST)
            mallopt(M_TRIM_THRESHOLD, KEPT)
