"""The memory allocator of the CPU."""

import ctypes
import os
import platform

# parameters of mallopt: size from which malloc maps memory anew, free memory that it returns to the system
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_SETTINGS = ('MALLOC_', 'GLIBC_TUNABLES')  # environment variables of glibc's malloc


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for the next step, instead of returning it and faulting in new pages.

    Only on Linux with glibc, whose malloc otherwise maps every tensor above 32 MiB at most anew, and not where
    environment variables set malloc up. See `man mallopt`.
    """
    if platform.libc_ver()[0] != 'glibc' or any(name.startswith(_SETTINGS) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not libc.mallopt(_M_MMAP_THRESHOLD, 2**30):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most before glibc 2.35
    libc.mallopt(_M_TRIM_THRESHOLD, 2**30)
