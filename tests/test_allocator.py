"""Freed memory is kept on request, comes back on request, and is counted as free meanwhile."""

import os
import platform
import subprocess
import sys

import pytest

import mambastyle as ms

FAULTS = """
import resource, threading, torch
from mambastyle import allocator

def faults(megabytes):
    # As in the page, the work is another thread's.
    found = []
    worker = threading.Thread(target=lambda: found.append(count(megabytes)))
    worker.start()
    worker.join()
    return found[0]

def count(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = allocator.keep_freed_memory()
assert allocator.keeps_freed_memory() == kept
# Twice as large: small allocations nibble at freed blocks, and an aligned one asks for more than its size.
faults(160)
again, held = faults(80), allocator.kept_bytes()
with allocator.giving_back():
    meanwhile, held_meanwhile = faults(80), allocator.kept_bytes()
faults(160)
after = faults(80)
allocator.return_freed_memory()
print(int(kept), again, held, meanwhile, held_meanwhile, after, faults(80))
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of the GNU C library")


def measured(**environment: str) -> list[int]:
    command = [sys.executable, "-W", "error", "-c", FAULTS]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=True
    )
    return [int(word) for word in done.stdout.split()]


@needs_glibc
def test_kept_memory_is_used_again_without_new_pages():
    kept, again, held, meanwhile, held_meanwhile, after, returned = measured()
    assert kept
    assert again <= 8
    assert held > 80 * 2**20
    # Of huge pages it takes few.
    assert meanwhile > 16
    assert held_meanwhile < 2**24
    assert after <= 8
    assert returned > 16


@needs_glibc
def test_settings_of_the_environment_win():
    kept, again, held, *_ = measured(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert again > 16
    assert held < 2**24


def test_both_are_public():
    assert {"keep_freed_memory", "return_freed_memory"} <= set(ms.__all__)
