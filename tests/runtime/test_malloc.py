"""Malloc keeps freed memory for the next frame, unless the environment tunes the allocator."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from serve.settings import Settings

# Allocates, writes and frees 96 MB twenty times, in a thread as in a worker; prints the result and the page faults.
PROBE = """
import resource
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from serve.runtime.malloc import disable_malloc_trim
kept = KEEP
def frame():
    blocks = [np.ones(4_000_000) for _ in range(3)]
engine = ThreadPoolExecutor(1)
engine.submit(frame).result()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    engine.submit(frame).result()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def probe(keep: bool) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("KEEP", "disable_malloc_trim()" if keep else "False")],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_disable_malloc_trim_avoids_page_faults():
    kept, faults = probe(keep=True)
    _, without = probe(keep=False)
    assert kept
    assert faults < 100 < without


@pytest.mark.parametrize(
    "tuned",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
        {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"},
    ],
)
def test_malloc_tuned_by_the_environment_is_not_overridden(tuned):
    assert Settings.from_environment({}).keep_heap
    assert not Settings.from_environment(tuned).keep_heap
    assert Settings.from_environment(tuned | {"MMDET3D_SERVE_KEEP_HEAP": "1"}).keep_heap
    assert not Settings.from_environment({"MMDET3D_SERVE_KEEP_HEAP": "0"}).keep_heap
