"""Similarity of boxes by hand, and beside the kernels of detectors."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from serve.tracking.similarity import space_gious

UNIT = np.array([[0.0, 0, 0, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((0.0, 0, 0, 1, 1, 1, 0), 1.0),
        ((0.0, 0, 0, 1, 1, 1, np.pi / 2), 1.0),
        ((0.5, 0, 0, 1, 1, 1, 0), 1 / 3),
        ((3.0, 0, 0, 1, 1, 1, 0), -0.5),  # of a hull of 4 two are empty
        ((0.0, 0, 3, 1, 1, 1, 0), -0.5),
        ((0.0, 0, 0.5, 1, 1, 1, 0), 1 / 3),
    ],
)
def test_generalised_iou_of_cubes_by_hand(other: tuple[float, ...], expected: float) -> None:
    assert space_gious(UNIT, np.array([other]))[0, 0] == pytest.approx(expected, abs=1e-6)


def corners(box: NDArray[np.float64]) -> NDArray[np.float64]:
    turn = np.array([[np.cos(box[6]), np.sin(box[6])], [-np.sin(box[6]), np.cos(box[6])]])
    return np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) / 2 * box[3:5] @ turn + box[:2]


def test_turned_boxes_equal_the_kernels_iou_and_scipys_hull() -> None:
    torch = pytest.importorskip("torch", reason="the kernels are torch's")
    from serve.ops.boxes.rotated import box_iou_rotated

    rng = np.random.default_rng(0)
    one, two = (
        np.column_stack(
            [
                rng.uniform(-4, 4, (60, 2)),
                np.zeros(60),
                rng.uniform(0.3, 5, (60, 2)),
                np.ones(60),
                rng.uniform(-7, 7, 60),
            ]
        )
        for _ in range(2)
    )
    flat = [torch.tensor(boxes[:, [0, 1, 3, 4, 6]], dtype=torch.float32) for boxes in (one, two)]
    ious = torch.empty(60 * 60)
    box_iou_rotated(*flat, ious, mode_flag=0, aligned=False)
    iou = ious.reshape(60, 60).numpy().astype(np.float64)
    assert 0.2 < (iou > 0).mean() < 0.8
    areas = [boxes[:, 3] * boxes[:, 4] for boxes in (one, two)]
    union = (areas[0][:, None] + areas[1][None]) / (1 + iou)
    hull = np.array([[ConvexHull(np.concatenate([corners(a), corners(b)])).volume for b in two] for a in one])
    np.testing.assert_allclose(space_gious(one, two), iou - (hull - union) / hull, atol=1e-3)


def test_far_pairs_are_not_computed() -> None:
    far = np.array([[100.0, 0, 0, 1, 1, 1, 0]])
    assert space_gious(UNIT, far, -0.2)[0, 0] == -1
    assert space_gious(UNIT, far)[0, 0] == pytest.approx(-99 / 101)


def test_pairs_that_are_not_computed_would_not_have_reached_the_least() -> None:
    rng = np.random.default_rng(0)
    low = [-30, -30, -2, 0.3, 0.3, 0.5, -4]
    one, two = (rng.uniform(low, [30, 30, 2, 12, 3, 3, 4], (80, 7)) for _ in range(2))
    whole, part = space_gious(one, two), space_gious(one, two, -0.2)
    left_out = part == -1
    assert left_out.mean() > 0.3
    assert whole[left_out].max() < -0.2
    np.testing.assert_array_equal(part[~left_out], whole[~left_out])
