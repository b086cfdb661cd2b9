"""Freed memory stays with the process: fetching it from the system for every batch costs time.

The C library of Linux hands large blocks back as soon as they are freed, and the system fills what it hands out again
with zeros, page by page. A convolutional network frees and asks for all its maps in every step: for DropNet's Models B
and C, three runs in lockstep, that was 5 to 11 % of a step, for two of Model B on a busy machine 17 % (our own
measurements, one thread). It is done in processes that only train, never in the one where somebody works.
"""

from __future__ import annotations

import ctypes
import functools
import sys

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
_KEPT = 1 << 30  # bytes: larger blocks go back, and so does more than this at the end of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Keep up to 1 GiB that was freed for what comes next, until the process ends.

    Returns:
        Whether the C library took it; False where it is another one than glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(_MMAP, _KEPT) or mallopt(_MMAP, 1 << 25), mallopt(_TRIM, _KEPT)])
