"""CPU quota of the container, from control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.worker.cpu_quota import available_cores

HERE = len(os.sched_getaffinity(0))


def v2(root: Path, text: str) -> Path:
    (root / "cpu.max").write_text(text)
    return root


def v1(root: Path, quota: str, period: str) -> Path:
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (root / "cpu" / "cpu.cfs_period_us").write_text(period)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),  # half a core still needs a thread
        ("150000 100000\n", min(2, HERE)),  # one and a half: two threads, neither held up for long
        ("800000000 100000\n", HERE),  # more than there are
        ("max 100000\n", HERE),
        ("", HERE),
        ("rubbish here\n", HERE),
    ],
)
def test_cgroup_v2_quota_limits_the_cores(tmp_path: Path, text: str, expected: int) -> None:
    assert available_cores(v2(tmp_path, text)) == expected


@pytest.mark.parametrize(("quota", "expected"), [("100000\n", 1), ("-1\n", HERE), ("x\n", HERE)])
def test_cgroup_v1_quota_limits_the_cores(tmp_path: Path, quota: str, expected: int) -> None:
    assert available_cores(v1(tmp_path, quota, "100000\n")) == expected


def test_all_cores_count_without_control_groups(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "absent") == HERE
