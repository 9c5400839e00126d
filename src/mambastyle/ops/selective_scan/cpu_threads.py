"""A small thread pool for kernels that release the GIL.

Numba's own `parallel=True` compiles for half a minute, and its default threading layer aborts the process
when two Python threads enter it at once; here any number of threads may call, and a forked child starts its
own pool.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


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
    pool = _pool_of(workers - 1)
    others = [pool.submit(kernel, *pair) for pair in itertools.pairwise(bounds[1:])]
    try:
        kernel(bounds[0], bounds[1])
    finally:
        # The kernels write to the caller's memory: never leave while one of them may still run.
        errors = [error for other in others if (error := other.exception()) is not None]
    if errors:
        raise errors[0]


def _pool_of(size: int) -> ThreadPoolExecutor:
    """The pool, grown if it is smaller than `size`; a call that still uses the smaller one keeps it alive."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            _pool = ThreadPoolExecutor(size, thread_name_prefix="mambastyle-scan")
            _pool_size = size
        return _pool


def _forget_pool() -> None:
    global _pool, _pool_size, _lock
    # A forked child has none of the parent's threads, and inherits the lock in whatever state it was.
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
