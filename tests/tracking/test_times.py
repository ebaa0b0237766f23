"""Unix times in names of files."""

from __future__ import annotations

import pytest

from serve.tracking.times import time_in_name


@pytest.mark.parametrize(
    ("name", "time_s"),
    [
        ("n015-2018-07-24-11-22-45+0800__LIDAR_TOP__1532402927647951.pcd.bin", 1532402927.647951),
        ("1305031102.175304.png", 1305031102.175304),
        ("1305031102.png", 1305031102.0),
        ("frame_1305031102175.jpg", 1305031102.175),
        ("1698765432123456789.bin", 1698765432.1234567),
        ("1305031102/1305031103.bin", 1305031103.0),
        ("000008.bin", None),
        ("0000000001.bin", None),
        ("20260101120000.bin", None),
        ("1305031102175304999.bin", 1305031102.175305),
        ("9999999999.bin", None),
        ("", None),
    ],
)
def test_the_last_unix_time_of_a_name_is_its_time(name: str, time_s: float | None) -> None:
    assert time_in_name(name) == (None if time_s is None else pytest.approx(time_s, abs=1e-6))
