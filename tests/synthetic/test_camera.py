"""Behaviour of the synthetic camera: it sees what the LiDAR beside it sees."""

from __future__ import annotations

import numpy as np
import pytest

from serve.synthetic import camera, raycast
from serve.synthetic.layout import Layout, Placed
from serve.synthetic.raycast import Ground
from serve.synthetic.shapes import Material, box, place

FLAT = Ground(np.zeros(2), np.zeros((3, 4)), (0.0, 0.0, 50.0), 0.0, (0.3, 0.3))


def street(*, sign_at: tuple[float, float, float]) -> Layout:
    """A flat road with one white board, 1 m wide and high, facing the camera."""
    board = box((-0.1, 0.1), (-0.5, 0.5), (0.0, 1.0), Material(0.95))
    x, y, z = sign_at
    return Layout(FLAT, [Placed(2, (x, y, z, 0.2, 1.0, 1.0, 0.0), place([board], x, y, z, 0.0))])


def pixel_of(point: tuple[float, float, float]) -> tuple[int, int]:
    u, v, depth, _ = camera.LIDAR_TO_IMAGE @ (*point, 1.0)
    return round(v / depth), round(u / depth)


def test_projection_agrees_with_the_crop_of_the_lidar():
    rng = np.random.default_rng(0)
    points = rng.uniform((-5, -30, -3), (60, 30, 5), (5000, 3))
    u, v, depth, _ = camera.LIDAR_TO_IMAGE @ np.hstack([points, np.ones((5000, 1))]).T
    with np.errstate(divide="ignore"):
        u, v = u / depth, v / depth
    inside = (depth > 0.5) & (u >= 0) & (u < camera.WIDTH) & (v >= 0) & (v < camera.HEIGHT)
    np.testing.assert_array_equal(inside, raycast.in_camera(points))


@pytest.fixture(scope="module")
def empty_street():
    return camera.render(Layout(FLAT), supersampling=1).astype(int)


@pytest.mark.parametrize("place_m", [(10.0, 0.0, -1.0), (15.0, 6.0, -1.73), (20.0, -9.0, -1.5)])
def test_an_object_is_drawn_where_its_box_projects_to(place_m, empty_street):
    drawn = camera.render(street(sign_at=place_m), supersampling=1).astype(int)
    changed = np.abs(drawn - empty_street).sum(axis=2) > 40
    x, y, z = place_m
    assert changed[pixel_of((x - 0.1, y, z + 0.5))]
    assert not changed[pixel_of((x - 0.1, y, z + 1.3))]
    assert not changed[pixel_of((x - 0.1, y + 0.8, z + 0.9))]
