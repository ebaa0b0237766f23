"""A worker that computes one batch for too long ends itself."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from serve.worker.watchdog import limited_to

PROGRAM = """
import ctypes, time
from serve.worker.watchdog import limited_to
def kernel_that_does_not_return():
    {hang}
with limited_to(0.3):
    kernel_that_does_not_return()
print("went on")
"""


@pytest.mark.parametrize(
    "hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"], ids=["waits", "holds the GIL"]
)
def test_what_takes_too_long_ends_the_process_and_its_place_is_said(hang):
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(hang=hang)], capture_output=True, text=True)
    assert ended.returncode == 1 and time.monotonic() - began < 30
    assert "kernel_that_does_not_return" in ended.stderr and not ended.stdout


def test_what_is_quick_goes_on():
    program = PROGRAM.format(hang="pass") + "time.sleep(1)\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "went on\n" and not ended.stderr


def test_an_error_inside_takes_the_watch_off_too():
    program = """
import time
from serve.worker.watchdog import limited_to
try:
    with limited_to(0.3):
        raise ValueError
except ValueError:
    time.sleep(1)
print("went on")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "went on\n"


def test_without_a_limit_nothing_is_watched():
    with limited_to(0):
        pass
