"""Ranges of tasks on several threads: each once, errors raised, with PyTorch's OpenMP and without it."""

import ctypes
import sys
import threading
import time

import pytest
import torch

from mambastyle.ops import cpu_threads


@pytest.fixture(params=["OpenMP", "pool"])
def _three_threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if request.param == "pool":
        monkeypatch.setattr(cpu_threads, "_openmp", lambda: None)
    elif cpu_threads._openmp() is None:
        pytest.skip("PyTorch's OpenMP is not to be found on this system")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the pool serves")
def test_pytorchs_openmp_is_found():
    if torch.backends.openmp.is_available():
        assert cpu_threads._openmp() is not None


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize(("tasks", "ranges"), [(9, [(0, 3), (3, 6), (6, 9)]), (2, [(0, 1), (1, 2)])])
def test_every_range_is_run_once_on_a_thread_of_its_own(tasks, ranges):
    runs = []

    def kernel(first, end):
        runs.append((first, end, threading.get_native_id()))
        time.sleep(0.05)  # or one thread of the pool might take two

    cpu_threads.run_ranges(kernel, tasks)
    assert sorted(run[:2] for run in runs) == ranges
    assert len({thread for _, _, thread in runs}) == len(ranges)
    assert min(runs)[2] == threading.get_native_id()


def test_without_parallel_there_is_one_range():
    runs = []
    cpu_threads.run_ranges(lambda *pair: runs.append(pair), 9, parallel=False)
    assert runs == [(0, 9)]


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_in_a_thread_reaches_the_caller_when_all_are_done(failing):
    done = []

    def kernel(first, end):
        if first == failing:
            raise KeyError("lost")
        time.sleep(0.05)
        done.extend(range(first, end))

    with pytest.raises(KeyError, match="lost"):
        cpu_threads.run_ranges(kernel, 9)
    assert sorted(done) == [task for task in range(9) if not failing <= task < failing + 3]


def test_a_team_smaller_than_asked_for_does_all(monkeypatch):
    class OneMember:
        """A runtime that gives no threads, as within another parallel region."""

        def GOMP_parallel(self, member, data, count, flags):
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(member)(data)

        def omp_get_thread_num(self):
            return 0

        def omp_get_num_threads(self):
            return 1

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cpu_threads, "_openmp", OneMember)
    runs = []
    cpu_threads.run_ranges(lambda *pair: runs.append(pair), 9)
    assert runs == [(0, 3), (3, 6), (6, 9)]
