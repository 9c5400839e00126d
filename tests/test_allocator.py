"""Freed memory is kept on request, comes back on request, and is counted as free meanwhile."""

import os
import subprocess
import sys

import pytest

import mambastyle as ms

FAULTS = """
import resource, sys, torch
from mambastyle import allocator

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = [faults(32) for _ in range(4)][-1]
kept = allocator.keep_freed_memory()
# Twice as large: small allocations nibble at freed blocks, and an aligned one asks for more than its size.
faults(64)
again, held = faults(32), allocator.kept_bytes()
allocator.return_freed_memory()
print(int(kept), fresh, again, held, faults(32))
"""


def measured(**environment: str) -> list[int]:
    command = [sys.executable, "-W", "error", "-c", FAULTS]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=True
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library's allocator")
def test_kept_memory_is_used_again_without_new_pages():
    kept, fresh, again, held, returned = measured()
    assert kept
    assert held > 2**25
    # Huge pages make few faults of many.
    assert again <= 8
    assert fresh > 16
    assert returned > 16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library's allocator")
def test_settings_of_the_environment_win():
    kept, fresh, again, _, _ = measured(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert again > fresh / 2


def test_both_are_public():
    assert {"keep_freed_memory", "return_freed_memory"} <= set(ms.__all__)
