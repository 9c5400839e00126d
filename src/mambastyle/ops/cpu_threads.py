"""Runs kernels that release the GIL on several threads: those of PyTorch's own OpenMP, or a small pool.

OpenMP's threads wait for their next work by spinning, some milliseconds long. A kernel on threads of our own,
called between two of PyTorch's operators, finds every core taken by them: on two cores it took as long as on
one. So PyTorch's runtime is asked for its threads where it can be found, and the pool serves elsewhere.

Numba's own `parallel=True` compiles for half a minute, and its default threading layer aborts the process
when two Python threads enter it at once; here any number of threads may call, and a forked child starts its
own pool.
"""

import ctypes
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()
_forked = False
# What a member of an OpenMP team runs; `None` is the pointer that it gets.
_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_ranges(kernel: Callable[[int, int], None], tasks: int, *, parallel: bool = True) -> None:
    """Calls `kernel(first, end)` over ranges of `0 .. tasks - 1`, on `torch.get_num_threads()` threads.

    Every range is handled by one call and the calling thread takes the first range. What the kernel raises is
    raised here once all ranges are done. With `parallel=False` there is one range and no other thread.
    """
    workers = min(torch.get_num_threads(), tasks) if parallel else 1
    if workers <= 1:
        kernel(0, tasks)
        return
    bounds = [tasks * worker // workers for worker in range(workers + 1)]
    ranges = list(itertools.pairwise(bounds))
    # In a forked child OpenMP would wait for threads that only the parent has.
    openmp = None if _forked else _openmp()
    errors = _run_in_team(openmp, kernel, ranges) if openmp is not None else _run_in_pool(kernel, ranges)
    if errors:
        raise errors[0]


def _run_in_team(
    openmp: Any, kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]
) -> list[BaseException]:
    """The ranges on the calling thread's OpenMP team; what they raised."""
    errors: list[BaseException] = []

    def member(_: Any) -> None:
        # A team may be smaller than what was asked for (within another one, or by a limit).
        for number in range(openmp.omp_get_thread_num(), len(ranges), openmp.omp_get_num_threads()):
            try:
                kernel(*ranges[number])
            except BaseException as error:  # nothing may leave a callback from C
                errors.append(error)

    openmp.GOMP_parallel(_MEMBER(member), None, len(ranges), 0)
    return errors


def _run_in_pool(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> list[BaseException]:
    """The ranges on the pool, the first one on the calling thread; what they raised."""
    pool = _pool_of(len(ranges) - 1)
    others = [pool.submit(kernel, *pair) for pair in ranges[1:]]
    errors: list[BaseException] = []
    try:
        kernel(*ranges[0])
    except BaseException as error:
        errors.append(error)
    # The kernels write to the caller's memory: never leave while one of them may still run.
    return errors + [error for other in others if (error := other.exception()) is not None]


@functools.cache
def _openmp() -> Any:
    """The OpenMP runtime that PyTorch uses, or None where it is not to be found (not on Linux, or not there).

    Other packages may have brought one too: its threads would compete with PyTorch's, as ours do.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    runtimes = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
    own = [path for path in runtimes if Path(path).is_relative_to(Path(torch.__file__).parent)]
    if len(chosen := own or runtimes) != 1:
        _log.info("%d OpenMP runtimes: the scan uses threads of its own", len(chosen))
        return None
    try:
        # The runtime itself, which is loaded already, and not a second one.
        library = ctypes.CDLL(chosen[0], mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.GOMP_parallel.argtypes = [_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num.restype = library.omp_get_num_threads.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        _log.info("%s cannot be used (%s): the scan uses threads of its own", chosen[0], error)
        return None
    return library


def _pool_of(size: int) -> ThreadPoolExecutor:
    """The pool, grown if it is smaller than `size`; a call that still uses the smaller one keeps it alive."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            _pool = ThreadPoolExecutor(size, thread_name_prefix="mambastyle-scan")
            _pool_size = size
        return _pool


def _after_fork() -> None:
    global _pool, _pool_size, _lock, _forked
    # A forked child has none of the parent's threads, and inherits the lock in whatever state it was.
    _pool, _pool_size, _lock, _forked = None, 0, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
