"""Synthetic scenes over time: what a standing LiDAR sees of objects that move, with their velocities.

A drive is a layout of `serve.synthetic.layout` whose objects go straight ahead at a constant speed. The sensor stands,
so that a point's frame is the same at all times. Objects may pass through each other and leave the view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.synthetic.layout import Layout, Placed, draw_layout
from serve.synthetic.raycast import Ground, cast
from serve.synthetic.scenes import points_in_boxes
from serve.synthetic.shapes import place

__all__ = ["Drive", "Moment", "drive", "layout_at"]

# Share of objects that move, and their speeds in m/s, by label: pedestrian, cyclist, car.
_MOVING = ((0.8, 0.8, 1.8), (0.9, 2.0, 6.0), (0.6, 2.0, 9.0))


@dataclass(frozen=True, slots=True)
class Moment:
    """One turn of the sensor.

    Attributes:
        time_s: seconds since the beginning of the drive.
        points: (N, 4) float32 x forward, y left, z up in metres from the sensor, intensity in [0, 1].
        boxes: (M, 7) float64 x, y, z of the bottom centre, dx, dy, dz in metres, yaw in radians.
        points_in_box: (M,) number of points in each box.
    """

    time_s: float
    points: NDArray[np.float32]
    boxes: NDArray[np.float64]
    points_in_box: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Drive:
    """A layout, the speeds of its objects, and what the sensor saw.

    Attributes:
        layout: at the beginning.
        labels: (M,) of the objects, rows of `serve.synthetic.layout.CLASSES`.
        velocities: (M, 2) x and y in m/s.
        moments: in order of time.
    """

    layout: Layout
    labels: NDArray[np.int64]
    velocities: NDArray[np.float64]
    moments: tuple[Moment, ...]


def drive(seed: int, times_s: NDArray[np.float64]) -> Drive:
    """Generate the drive of a seed (any integer >= 0), the same on every call.

    Args:
        seed: of the layout, which is that of `serve.synthetic.scenes.generate_scene` at time 0.
        times_s: seconds at which the sensor turns.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    layout = draw_layout(rng)
    labels = np.array([item.label for item in layout.objects], dtype=np.int64)
    speeds = np.array([_speed(rng, item.label) for item in layout.objects])
    yaws = np.array([item.box[6] for item in layout.objects])
    velocities = np.column_stack([speeds * np.cos(yaws), speeds * np.sin(yaws)])
    moments = tuple(_look(layout, velocities, float(time), rng) for time in times_s)
    return Drive(layout, labels, velocities, moments)


def layout_at(found: Drive, time_s: float) -> Layout:
    """Return the layout with its objects where they are after `time_s` seconds."""
    return _moved(found.layout, found.velocities, time_s)


def _speed(rng: np.random.Generator, label: int) -> float:
    share, low, high = _MOVING[label]
    return float(rng.uniform(low, high)) if rng.random() < share else 0.0


def _moved(layout: Layout, velocities: NDArray[np.float64], time_s: float) -> Layout:
    objects = [
        _shifted(item, layout.ground, *(velocity * time_s))
        for item, velocity in zip(layout.objects, velocities, strict=True)
    ]
    return Layout(layout.ground, objects, layout.clutter)


def _shifted(item: Placed, ground: Ground, x: float, y: float) -> Placed:
    """Move an object over the ground, without turning it."""
    before = np.array(item.box)
    rise = float(ground.height(before[0] + x, before[1] + y) - ground.height(before[0], before[1]))
    x0, y0, z0, *rest = item.box
    moved: tuple[float, ...] = (x0 + x, y0 + y, z0 + rise, *rest)
    return Placed(item.label, moved, place(item.solids, x, y, rise, 0.0))  # type: ignore[arg-type]


def _look(layout: Layout, velocities: NDArray[np.float64], time_s: float, rng: np.random.Generator) -> Moment:
    now = _moved(layout, velocities, time_s)
    returns = cast(now.ground, [item.solids for item in now.objects] + now.clutter, rng)
    points = returns.points.astype(np.float32)
    boxes = np.array([item.box for item in now.objects]).reshape(-1, 7)
    inside = points_in_boxes(points, boxes.astype(np.float32)).sum(axis=0).astype(np.int64)
    boxes[:, 6] = [math.atan2(math.sin(yaw), math.cos(yaw)) for yaw in boxes[:, 6]]
    return Moment(time_s, points, boxes, inside)
