"""What the C library does with freed memory: give it back to the system, or keep it for the next tensor.

A map of a few megabytes that PyTorch frees goes back to the system, and the next one comes as fresh pages,
which the kernel must find and clear one by one. With large pictures that is a quarter of the time and more.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

# malloc.h of the GNU C library
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
# One arena: those that other threads get hold 64 MB at most, and what is larger is mapped anew each time.
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**26), (_ARENA_MAX, 1))
_GIVE_BACK = ((_MMAP_MAX, 2**16), (_TRIM_THRESHOLD, 2**17), (_TOP_PAD, 2**17))  # the library's own
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
_keeps = False
_giving_back = 0  # how many want it just now
_lock = threading.Lock()


class _Mallinfo2(ctypes.Structure):
    # Of ten counts of bytes the ninth is what is free in all arenas.
    _fields_ = [("before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("after", ctypes.c_size_t)]


@functools.cache
def _glibc() -> Any:
    """The GNU C library, or None where there is another one."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "mallinfo2", "malloc_trim")):
        return None
    library.mallinfo2.restype = _Mallinfo2
    return library


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for all of its memory and until it ends.

    Stylizing 1024 px takes 28 % less time and 2048 px 39 %, small pictures hardly less (docs/kernels.md). The
    process stays as large as it once was; `return_freed_memory` shrinks it. The command line does this for
    itself; a library should not, so in Python it is yours to call. Call it before there are threads:
    those that run already go on as they did.

    Returns whether it took effect: not without the GNU C library (macOS, Windows, Alpine), nor where the
    environment has settings of its own (MALLOC_TRIM_THRESHOLD_ and others).
    """
    global _keeps
    library = _glibc()
    if library is None or any(name in os.environ for name in _CHOSEN):
        return False
    with _lock:
        _keeps = _set(_KEEP) if not _giving_back else True
    return _keeps


def _set(settings: tuple[tuple[int, int], ...]) -> bool:
    return all([_glibc().mallopt(name, value) == 1 for name, value in settings])


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` took effect in this process."""
    return _keeps


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """Meanwhile this process keeps nothing that it frees, and what it had kept goes back; then as before.

    For work that fits in no other way: what is freed between other tensors cannot serve larger ones.
    """
    global _giving_back
    if not _keeps:
        yield
        return
    with _lock:
        _giving_back += 1
        _set(_GIVE_BACK)
    return_freed_memory()
    try:
        yield
    finally:
        with _lock:
            _giving_back -= 1
            if not _giving_back:
                _set(_KEEP)


def return_freed_memory() -> None:
    """Give what is free within the process back to the system; the settings stay."""
    if library := _glibc():
        library.malloc_trim(0)


def kept_bytes() -> int:
    """How much is free within the process and serves before the system is asked for more."""
    library = _glibc()
    return library.mallinfo2().fordblks if library else 0
