"""Memory that goes back to the system when it is freed."""

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc
_THRESHOLD = 2**20


def give_back_large_arrays() -> None:
    """Have glibc map large arrays one by one, so that freeing one gives its memory back; nothing elsewhere.

    By itself glibc raises its threshold to 32 MB as arrays come and go, and keeps what is freed below that in heaps,
    one for each thread: hundreds of megabytes where one block of a model follows the other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        mallopt(_M_ARENA_MAX, 2)


def give_back_free_pages() -> None:
    """Have glibc return what compilers left free in the middle of its heaps; nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
