"""Memory that the process frees and needs again a moment later."""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(max_bytes: int) -> None:
    """Let the C library keep freed memory for the next tensors and images.

    By default, it gives large blocks back to the system, which clears every page of the next one:
    up to two fifths of the time of a training step on CPUs. The process takes more memory for it.
    Only what is free at the end of the heap is given back, from `max_bytes` on. Settings of the
    user, ``MALLOC_…`` or ``GLIBC_TUNABLES``, are left alone, as are other C libraries.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, max_bytes)
