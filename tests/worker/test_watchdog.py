"""Watchdog of a worker that computes one batch for too long."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from serve.worker.watchdog import watchdog

PROGRAM = """
import ctypes, time
from serve.worker.watchdog import watchdog
def kernel_that_does_not_return():
    {hang}
with watchdog(0.3):
    kernel_that_does_not_return()
print("went on")
"""


@pytest.mark.parametrize(
    "hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"], ids=["waits", "holds the GIL"]
)
def test_expired_watchdog_ends_the_process_and_prints_the_stack(hang):
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(hang=hang)], capture_output=True, text=True)
    assert ended.returncode == 1 and time.monotonic() - began < 30
    assert "kernel_that_does_not_return" in ended.stderr and not ended.stdout


@pytest.mark.parametrize("inside", ["pass", "raise ValueError"])
def test_finished_block_cancels_the_watchdog(inside):
    # The watch is a thread of the process: a second or two for its end, or else it ends the process with 1.
    program = f"""
import contextlib, os
from serve.worker.watchdog import watchdog
before = len(os.listdir("/proc/self/task"))
with contextlib.suppress(ValueError), watchdog(10):
    print(len(os.listdir("/proc/self/task")) - before)
    {inside}
while len(os.listdir("/proc/self/task")) > before:
    pass
print("gone")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "1\ngone\n" and not ended.stderr


def test_watchdog_without_a_limit_starts_no_timer():
    with watchdog(0):
        pass


OVERLAPPING = """
import threading, time
from serve.worker.watchdog import watchdog
def outlives_its_limit():
    with watchdog({inner}):
        time.sleep({lasts})
with watchdog({outer}):
    thread = threading.Thread(target=outlives_its_limit)
    thread.start()
    {meanwhile}
thread.join()
print("went on")
"""


@pytest.mark.parametrize(
    ("outer", "inner", "lasts", "meanwhile", "survives"),
    [
        (60, 0.3, 60, "thread.join()", False),  # the later block has the earlier deadline
        (0.3, 60, 60, "thread.join()", False),
        (60, 0.5, 60, "pass", False),  # the other block has ended, this one goes on
        (1.0, 1.5, 60, "pass", False),  # likewise, and its deadline was the later one
        (0.5, 60, 1.5, "pass", True),  # the earlier deadline went with its block
    ],
)
def test_every_one_of_several_blocks_has_its_own_limit(outer, inner, lasts, meanwhile, survives):
    program = OVERLAPPING.format(outer=outer, inner=inner, lasts=lasts, meanwhile=meanwhile)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == ((0, "went on\n") if survives else (1, "")), ended.stderr
    assert survives or "outlives_its_limit" in ended.stderr
