"""Constant-velocity Kalman filters of many boxes at once.

The filter of AB3DMOT (X. Weng et al., *3D Multi-Object Tracking: A Baseline and New Evaluation Metrics*, IROS 2020):
the state is a box and the velocity of its centre, a detection measures the box. All its covariances start diagonal and
the motion joins each coordinate with its own velocity alone. So the filter of ten dimensions falls exactly into filters
of one coordinate and one velocity each, which are computed side by side: three numbers of covariance per coordinate.

Noise is per nominal frame, the period that a sensor usually has; a step of another length scales it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["IMAGE_NOISE", "SPACE_NOISE", "BoxFilters", "Noise"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Noise:
    """Variances of the filter, in the square of a box's unit and per nominal frame.

    Attributes:
        moving: for each coordinate of a box whether it has a velocity.
        measured: of a measurement.
        first: of the first measurement.
        first_velocity: of the velocity before a second measurement.
        step: of the box, added per frame.
        step_velocity: of the velocity, added per frame.
        relative: whether the unit is the height of the box rather than a metre.
    """

    moving: tuple[bool, ...]
    measured: float
    first: float
    first_velocity: float
    step: float
    step_velocity: float
    relative: bool = False


#: Boxes x, y, z, dx, dy, dz, yaw in metres and radians; the values of AB3DMOT.
SPACE_NOISE = Noise((True, True, True, False, False, False, False), 1.0, 10.0, 10_000.0, 1.0, 0.01)
#: Boxes centre x, centre y, width, height in pixels, with the standard deviations of DeepSORT, which ByteTrack took
#: over: a twentieth of the height for places, a 160th for velocities (N. Wojke et al., *Simple Online and Realtime
#: Tracking with a Deep Association Metric*, ICIP 2017).
IMAGE_NOISE = Noise(
    (True,) * 4, 1 / 20**2, (2 / 20) ** 2, (10 / 160) ** 2, 1 / 20**2, 1 / 160**2, relative=True
)


class BoxFilters:
    """Filters of K boxes of C coordinates each.

    Attributes:
        boxes: (K, C) float64 estimate of each box.
        velocities: (K, C) float64 estimate of each velocity, per nominal frame; 0 where a coordinate has none.
    """

    def __init__(self, noise: Noise) -> None:
        """Start without a box."""
        self._noise = noise
        self._moving = np.array(noise.moving, np.float64)
        columns = len(noise.moving)
        self.boxes: Floats = np.empty((0, columns))
        self.velocities: Floats = np.empty((0, columns))
        # Variances of box and velocity, and their covariance.
        self._box_var: Floats = np.empty((0, columns))
        self._cross_var: Floats = np.empty((0, columns))
        self._velocity_var: Floats = np.empty((0, columns))

    def __len__(self) -> int:
        """Return the number of boxes."""
        return len(self.boxes)

    def append(self, boxes: Floats, velocities: Floats | None = None) -> None:
        """Start filters.

        Args:
            boxes: (M, C) first measurements.
            velocities: (M, C) velocities that were measured with them, per nominal frame; NaN where unknown.
        """
        unit = self._squared_unit(boxes)
        known = np.zeros(boxes.shape, bool) if velocities is None else np.isfinite(velocities)
        first = np.zeros(boxes.shape) if velocities is None else np.where(known, velocities, 0.0)
        # A measured velocity is trusted as the first measurement of a box is.
        variance = np.where(known, self._noise.first, self._noise.first_velocity)
        self.boxes = np.concatenate([self.boxes, boxes])
        self.velocities = np.concatenate([self.velocities, first * self._moving])
        self._box_var = np.concatenate(
            [self._box_var, np.broadcast_to(self._noise.first * unit, boxes.shape)]
        )
        self._cross_var = np.concatenate([self._cross_var, np.zeros(boxes.shape)])
        self._velocity_var = np.concatenate([self._velocity_var, variance * self._moving * unit])

    def predict(self, frames: float) -> None:
        """Move all boxes on by `frames` nominal frames."""
        unit = self._squared_unit(self.boxes)
        self.boxes = self.boxes + frames * self.velocities
        self._box_var = (
            self._box_var
            + 2 * frames * self._cross_var
            + frames**2 * self._velocity_var
            + frames * self._noise.step * unit
        )
        self._cross_var = self._cross_var + frames * self._velocity_var
        self._velocity_var = self._velocity_var + frames * self._noise.step_velocity * self._moving * unit

    def update(self, rows: Ints, measured: Floats) -> None:
        """Correct the boxes of `rows`, each named once, by a measurement each: (M, C)."""
        box, cross = self._box_var[rows], self._cross_var[rows]
        total = box + self._noise.measured * self._squared_unit(measured)
        gain, velocity_gain = box / total, cross / total
        innovation = measured - self.boxes[rows]
        self.boxes[rows] += gain * innovation
        self.velocities[rows] += velocity_gain * innovation
        self._box_var[rows] = (1 - gain) * box
        self._cross_var[rows] = (1 - gain) * cross
        self._velocity_var[rows] -= velocity_gain * cross

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Drop the boxes that `rows` does not name."""
        for name in ("boxes", "velocities", "_box_var", "_cross_var", "_velocity_var"):
            setattr(self, name, getattr(self, name)[rows])

    def _squared_unit(self, boxes: Floats) -> Floats:
        """Return what variances are in units of, (M, 1)."""
        if not self._noise.relative:
            return np.ones((len(boxes), 1))
        return np.asarray(np.maximum(boxes[:, 3:4], 1.0) ** 2)
