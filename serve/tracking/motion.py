"""Constant-velocity Kalman filters of many boxes at once.

The filter of AB3DMOT (X. Weng et al., *3D Multi-Object Tracking: A Baseline and New Evaluation Metrics*, IROS 2020):
the state is a box and the velocity of its centre, a detection measures the box. All its covariances start diagonal and
the motion joins each coordinate with its own velocity alone. So the filter of ten dimensions falls exactly into filters
of one coordinate and one velocity each, which are computed side by side: three numbers of covariance per coordinate.

Noise is per nominal frame, the period that a sensor usually has; a step of another length scales it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BoxFilters"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Variances, in the squares of metres, radians and metres per frame; the values of AB3DMOT.
_MOVING = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # of x, y, z, dx, dy, dz, yaw, which have a velocity
_MEASURED = 1.0
_FIRST = 10.0  # of the first measurement
_FIRST_VELOCITY = 10_000.0  # before a second measurement
_STEP = 1.0  # added per frame
_STEP_VELOCITY = 0.01


class BoxFilters:
    """Filters of K boxes x, y, z, dx, dy, dz, yaw.

    Attributes:
        boxes: (K, 7) float64 estimate of each box.
        velocities: (K, 7) float64 estimate of each velocity, per nominal frame; 0 where a coordinate has none.
    """

    def __init__(self) -> None:
        """Start without a box."""
        columns = len(_MOVING)
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
            boxes: (M, 7) first measurements.
            velocities: (M, 7) velocities that were measured with them, per nominal frame; NaN where unknown.
        """
        known = np.zeros(boxes.shape, bool) if velocities is None else np.isfinite(velocities)
        first = np.zeros(boxes.shape) if velocities is None else np.where(known, velocities, 0.0)
        # A measured velocity is trusted as the first measurement of a box is.
        variance = np.where(known, _FIRST, _FIRST_VELOCITY)
        self.boxes = np.concatenate([self.boxes, boxes])
        self.velocities = np.concatenate([self.velocities, first * _MOVING])
        self._box_var = np.concatenate([self._box_var, np.full(boxes.shape, _FIRST)])
        self._cross_var = np.concatenate([self._cross_var, np.zeros(boxes.shape)])
        self._velocity_var = np.concatenate([self._velocity_var, variance * _MOVING])

    def predict(self, frames: float) -> None:
        """Move all boxes on by `frames` nominal frames."""
        self.boxes = self.boxes + frames * self.velocities
        self._box_var = (
            self._box_var + 2 * frames * self._cross_var + frames**2 * self._velocity_var + frames * _STEP
        )
        self._cross_var = self._cross_var + frames * self._velocity_var
        self._velocity_var = self._velocity_var + frames * _STEP_VELOCITY * _MOVING

    def update(self, rows: Ints, measured: Floats) -> None:
        """Correct the boxes of `rows`, each named once, by a measurement each: (M, 7)."""
        box, cross = self._box_var[rows], self._cross_var[rows]
        total = box + _MEASURED
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
