"""The filters beside the matrix form that they are the exact parts of."""

from __future__ import annotations

from typing import Any

import numpy as np

from serve.tracking.motion import BoxFilters


class MatrixFilter:
    """AB3DMOT's filter as its paper writes it: ten dimensions, full matrices."""

    def __init__(self, box: Any) -> None:
        self.state = np.concatenate([box, np.zeros(3)])
        self.covariance = np.diag([10.0] * 7 + [10_000.0] * 3)
        self.motion = np.eye(10)
        self.noise = np.diag([1.0] * 7 + [0.01] * 3)
        self.seen = np.eye(7, 10)

    def predict(self, frames: float) -> None:
        self.motion[[0, 1, 2], [7, 8, 9]] = frames
        self.state = self.motion @ self.state
        self.covariance = self.motion @ self.covariance @ self.motion.T + frames * self.noise

    def update(self, box: Any) -> None:
        total = self.seen @ self.covariance @ self.seen.T + np.eye(7)
        gain = self.covariance @ self.seen.T @ np.linalg.inv(total)
        self.state = self.state + gain @ (box - self.seen @ self.state)
        self.covariance = (np.eye(10) - gain @ self.seen) @ self.covariance


def test_filters_equal_the_matrix_form() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0, 10, (3, 7))
    filters, matrices = BoxFilters(), [MatrixFilter(box) for box in first]
    filters.append(first)
    for _ in range(30):
        frames = float(rng.choice([1.0, 0.5, 3.0]))
        measured = rng.normal(0, 10, (2, 7))
        rows = np.sort(rng.choice(3, 2, replace=False))
        filters.predict(frames)
        filters.update(rows, measured)
        for matrix in matrices:
            matrix.predict(frames)
        for row, box in zip(rows, measured, strict=True):
            matrices[row].update(box)
        np.testing.assert_allclose(filters.boxes, [m.state[:7] for m in matrices], atol=1e-8)
        np.testing.assert_allclose(filters.velocities[:, :3], [m.state[7:] for m in matrices], atol=1e-8)
    assert not filters.velocities[:, 3:].any()


def test_a_steady_object_has_its_velocity_after_a_few_frames() -> None:
    filters = BoxFilters()
    filters.append(np.array([[0.0, 0, 0, 4, 2, 1.5, 0]]))
    for k in range(1, 15):
        filters.predict(1)
        filters.update(np.array([0]), np.array([[3.0 * k, -k, 0, 4, 2, 1.5, 0]]))
    np.testing.assert_allclose(filters.velocities[0, :2], (3, -1), atol=0.1)


def test_boxes_that_are_not_kept_are_dropped_from_every_part() -> None:
    filters = BoxFilters()
    filters.append(np.arange(21.0).reshape(3, 7))
    filters.keep(np.array([True, False, True]))
    assert len(filters) == 2
    filters.predict(1)
    filters.update(np.array([1]), np.full((1, 7), 14.0))
    assert filters.boxes[1, 0] == 14.0
