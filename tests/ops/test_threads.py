"""Parallel loops: each range runs once, and an exception of a range reaches the caller."""

from __future__ import annotations

import threading

import pytest
import torch

from serve.ops.cpu.threads import parallel_for


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 100])
def test_parallel_for_covers_each_row_once(threads, total):
    done = [0] * total

    def work(first: int, last: int) -> None:
        assert first < last
        for k in range(first, last):
            done[k] += 1

    parallel_for(work, total)
    assert done == [1] * total


def test_small_work_stays_on_the_callers_thread(threads):
    ranges: list[tuple[int, int]] = []
    parallel_for(lambda first, last: ranges.append((first, last)), 99, min_per_thread=50)
    assert ranges == [(0, 99)]
    ranges.clear()
    parallel_for(lambda first, last: ranges.append((first, last)), 100, min_per_thread=50)
    assert (len(ranges) > 1) == (threads > 1) and sum(last - first for first, last in ranges) == 100


def test_exception_of_a_range_reaches_the_caller(threads):
    def work(first: int, last: int) -> None:
        if first <= 40 < last:
            raise IndexError("part 40")

    with pytest.raises(IndexError, match="part 40"):
        parallel_for(work, 100)


def test_caller_does_not_wait_for_threads_that_have_not_started():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    release, held = threading.Event(), threading.Semaphore(0)
    outer = threading.Thread(
        target=lambda: parallel_for(lambda first, last: (held.release(), release.wait(30)), 2)
    )
    try:
        outer.start()
        # The caller's thread and the pool's only thread are blocked.
        assert held.acquire(timeout=30) and held.acquire(timeout=30)
        done: list[int] = []
        parallel_for(lambda first, last: done.extend(range(first, last)), 50)
        assert sorted(done) == list(range(50))
    finally:
        release.set()
        outer.join()
        torch.set_num_threads(before)
