"""A synthetic street over six seconds: what moves keeps its id, so that tracks over it can be measured.

`MOVERS` is a script rather than a draw, because each of its objects is there for one thing that loses ids: pedestrians
who pass each other within a metre or whose paths cross, a cyclist who is hidden behind a van, cars that meet, one that
stands, one that comes into view late. Nothing touches anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.synthetic.layout import CLASSES, Layout, Placed
from serve.synthetic.raycast import Ground
from serve.synthetic.scenes import Scene, observe_layout
from serve.synthetic.shapes import Material, Solid, box, car, cyclist, pedestrian, place

__all__ = ["FRAMES", "MOVERS", "RATE", "Mover", "MovingFrame", "generate_sequence", "true_boxes"]

#: Frames per second, a spinning LiDAR's.
RATE = 10.0
#: Frames until the script ends.
FRAMES = 60
_PEDESTRIAN, _CYCLIST, _CAR = range(len(CLASSES))
_SIZES = {_PEDESTRIAN: (0.8, 0.6, 1.75), _CYCLIST: (1.75, 0.6, 1.75), _CAR: (4.0, 1.65, 1.55)}
_SHAPES = {_PEDESTRIAN: pedestrian, _CYCLIST: cyclist, _CAR: car}
_MARGIN = 0.03  # metres between an object's solids and its box, each side
_ROAD_Z = -1.73  # metres, seen from the sensor
_VAN = (14.0, 4.0)  # hides what passes behind it
_SEED = 3_000_000  # training, held-out and sample scenes are below


@dataclass(frozen=True)
class Mover:
    """One object.

    Attributes:
        name: what it does.
        label: index into `CLASSES`.
        start: x and y of its centre in the first frame, metres.
        velocity: along x and y, metres per second.
        yaw: heading of one that stands, radians; others look where they go.
    """

    name: str
    label: int
    start: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    yaw: float = 0.0

    @property
    def heading(self) -> float:
        """Angle about z, radians."""
        return math.atan2(self.velocity[1], self.velocity[0]) if any(self.velocity) else self.yaw

    def at(self, time_s: float) -> tuple[float, float]:
        """Place of its centre at a time, metres."""
        (x, y), (vx, vy) = self.start, self.velocity
        return x + vx * time_s, y + vy * time_s


#: The objects; an object's id is its position.
MOVERS = (
    Mover("oncoming car", _CAR, (55.0, 3.0), (-8.0, 0.0)),
    Mover("car ahead, which drives away", _CAR, (14.0, -2.5), (5.0, 0.0)),
    Mover("parked car", _CAR, (20.0, -7.0), yaw=0.1),
    Mover("car that comes into view from the right", _CAR, (44.0, -40.0), (0.0, 8.0)),
    Mover("cyclist who is hidden behind the van", _CYCLIST, (24.0, 12.0), (0.0, -5.0)),
    Mover("pedestrian who passes another", _PEDESTRIAN, (16.0, -9.0), (0.0, 1.4)),
    Mover("the other", _PEDESTRIAN, (16.9, 3.0), (0.0, -1.4)),
    Mover("pedestrian whose path crosses another's", _PEDESTRIAN, (9.0, -5.5), (0.5, 1.2)),
    Mover("the other", _PEDESTRIAN, (10.5, 3.0), (-0.2, -1.2)),
)


@dataclass(frozen=True, slots=True)
class MovingFrame:
    """One frame of the sequence.

    Attributes:
        time_s: since the first frame, seconds.
        scene: point cloud, and the boxes that have a return.
        ids: (M,) position in `MOVERS` of each box of the scene.
    """

    time_s: float
    scene: Scene
    ids: NDArray[np.int64]


def true_boxes(time_s: float) -> NDArray[np.float64]:
    """Boxes of all `MOVERS` at a time, seen or hidden: (K, 7), bottom centre, metres and radians."""
    return np.array(
        [(*mover.at(time_s), _ROAD_Z, *_SIZES[mover.label], mover.heading) for mover in MOVERS], np.float64
    )


def generate_sequence(frames: int = FRAMES) -> Iterator[MovingFrame]:
    """Generate the frames of the sequence, the same on every call.

    Args:
        frames: number of frames; after `FRAMES` most objects are out of view.
    """
    rng = np.random.Generator(np.random.PCG64(_SEED))
    # A plain: the road is wider than the view.
    ground = Ground(np.zeros(2), np.zeros((3, 4)), (0.0, 0.0, 100.0), 0.1, (0.25, 0.35))
    shapes: list[list[Solid]] = []
    for mover in MOVERS:
        length, width, height = _SIZES[mover.label]
        inner = (length - 2 * _MARGIN, width - 2 * _MARGIN, height - _MARGIN)
        shapes.append(_SHAPES[mover.label](*inner, rng))
    van = place(
        [box((-0.95, 0.95), (-0.95, 0.95), (0.0, 2.3), Material(0.4, drop=0.03))], *_VAN, _ROAD_Z, 0.0
    )
    for number in range(frames):
        time_s = number / RATE
        layout = Layout(ground, clutter=[van])
        for mover, solids, placed in zip(MOVERS, shapes, true_boxes(time_s).tolist(), strict=True):
            x, y, z, *size, yaw = placed
            layout.objects.append(Placed(mover.label, (x, y, z, *size, yaw), place(solids, x, y, z, yaw)))
        scene, ids = observe_layout(layout, np.random.Generator(np.random.PCG64([_SEED, number])))
        yield MovingFrame(time_s, scene, ids)
