"""Warnings: unusual clouds are answered and named, usual ones pass without a word."""

from __future__ import annotations

import time

import numpy as np
import pytest

from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frame_warnings import PointExpectations, check_points
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits

RANGE = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
KITTI = PointExpectations(RANGE, 1.0, uses_intensity=True)
NUSCENES = PointExpectations((-50, -50, -5, 50, 50, 3), 255.0, uses_intensity=True)


def scaled(street: np.ndarray, factor: tuple[float, ...]) -> np.ndarray:
    return (street * np.array(factor, np.float32)).astype(np.float32)


@pytest.mark.parametrize(
    ("factor", "expected", "codes"),
    [
        ((1, 1, 1, 1), KITTI, []),
        ((1, 1, 1, 255), NUSCENES, []),
        ((1, 1, 1, 255), KITTI, ["intensity_scale"]),
        ((1, 1, 1, 65535), NUSCENES, ["intensity_scale"]),
        ((1, 1, 1, 1), NUSCENES, ["intensity_scale"]),
        ((1, 1, 1, 0), KITTI, ["no_intensity"]),
        ((1, 1, 1, 0), PointExpectations(RANGE), []),
        ((1, 1, 1, 255), PointExpectations(RANGE, None, uses_intensity=True), []),
        ((1000, 1000, 1000, 1), KITTI, ["points_out_of_range"]),
        ((-1, 1, 1, 1), KITTI, ["points_out_of_range"]),
        ((1000, 1000, 1000, 255), KITTI, ["points_out_of_range", "intensity_scale"]),
    ],
)
def test_unusual_clouds_are_named(street, factor, expected, codes):
    assert [warning.code for warning in check_points(scaled(street, factor), expected)] == codes


def test_few_bright_points_are_no_other_scale(street):
    points = street.copy()
    points[:: len(points) // 20, 3] = 200
    assert check_points(points, KITTI) == ()


def test_empty_cloud_is_named():
    found = check_points(np.zeros((0, 4), np.float32), KITTI)
    assert [warning.code for warning in found] == ["empty_cloud"]


def test_one_point_with_intensity_outside_the_sample_is_no_zero_intensity():
    points = np.ones((100_000, 4), np.float32)
    points[:, 2:] = 0
    points[7, 3] = 0.5
    assert check_points(points, KITTI) == ()


def test_decoded_frame_carries_its_warnings(street):
    spec = FrameSpec("lidar", expected=KITTI)
    body = scaled(street, (1, 1, 1, 255)).tobytes()
    frame = decode_frame(body, spec, FrameOptions(load_dim=4), Limits())
    assert [warning.code for warning in frame.warnings] == ["intensity_scale"]
    assert frame.warnings[0].document().keys() == {"code", "message"}


@pytest.mark.timing
def test_warnings_take_a_fraction_of_a_millisecond(street):
    points = np.tile(street, (8, 1))[:120_000]
    assert len(points) == 120_000
    spent = []
    for _ in range(30):
        began = time.perf_counter()
        check_points(points, KITTI)
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[len(spent) // 2] < 3e-4
