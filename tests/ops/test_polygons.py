"""Quadrilaterals, hulls and smallest rectangles against shapely and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.boxes import polygons, quadrilaterals

some_seeds = st.integers(0, 2**16)


@pytest.fixture
def mmcv(mmcv_ops):
    return mmcv_ops


def quads(seed: int, n: int) -> torch.Tensor:
    """Draw (n, 8) quadrilaterals, star-shaped around their centre (convex or concave), in either orientation."""
    rng = np.random.default_rng(seed)
    angles = (np.arange(4) + rng.uniform(0.1, 0.9, (n, 4))) * math.pi / 2
    radii = rng.uniform(0.3, 3, (n, 4))
    around = np.stack((np.cos(angles) * radii, np.sin(angles) * radii), axis=-1) + rng.uniform(
        -2, 2, (n, 1, 2)
    )
    if n > 2:
        around[1] = around[0]
        around[2] = [[0, 0], [2, 0], [2, 2], [0, 2]]
    around[::2] = around[::2, ::-1]
    return torch.from_numpy(around.reshape(n, 8))


def shape_of(row) -> shapely.Polygon:
    return shapely.Polygon(np.asarray(row, dtype=np.float64).reshape(-1, 2))


def iou_of(a: shapely.Polygon, b: shapely.Polygon) -> float:
    return a.intersection(b).area / a.union(b).area


def as_quads(boxes: torch.Tensor) -> torch.Tensor:
    """Convert (n, 5) rotated boxes to (n, 8) corners, every other one in the other orientation."""
    corners = np.array([np.asarray(rectangle_of(box).exterior.coords)[:4] for box in boxes]).reshape(-1, 4, 2)
    corners[::2] = corners[::2, ::-1]
    return torch.from_numpy(corners.reshape(-1, 8))


@settings(max_examples=25, deadline=None)
@given(seed=some_seeds, n=st.integers(1, 6), m=st.integers(1, 6))
def test_quadrilateral_iou_of_rectangles_equals_polygon_intersection(seed, n, m):
    first, second = as_quads(turned(seed, n)), as_quads(turned(seed + 1, m))
    expected = torch.tensor(
        [[iou_of(shape_of(a), shape_of(b)) for b in second] for a in first], dtype=torch.float64
    ).view(n, m)
    ious = torch.full((n * m,), -1.0, dtype=torch.float64)
    quadrilaterals.box_iou_quadri(first, second, ious, mode_flag=0, aligned=False)
    torch.testing.assert_close(ious.view(n, m), expected, atol=1e-6, rtol=1e-6)
    if n == m:
        aligned = torch.full((n,), -1.0, dtype=torch.float64)
        quadrilaterals.box_iou_quadri(first, second, aligned, mode_flag=1, aligned=True)
        areas = [
            (shape_of(a).intersection(shape_of(b)).area / shape_of(a).area)
            for a, b in zip(first, second, strict=True)
        ]
        torch.testing.assert_close(aligned, torch.tensor(areas, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_quadrilateral_without_area_overlaps_nothing():
    line, square = torch.tensor([[0.0, 0, 1, 0, 2, 0, 1, 0]]), torch.tensor([[0.0, -1, 2, -1, 2, 1, 0, 1]])
    for pair in ((line, square), (square, line), (line, line)):
        ious = torch.full((1,), -1.0)
        quadrilaterals.box_iou_quadri(*pair, ious)
        assert ious.item() == 0


@settings(max_examples=20, deadline=None)
@given(
    seed=some_seeds,
    n=st.integers(1, 15),
    threshold=st.sampled_from([0.05, 0.4, 0.8]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_quadrilateral_nms_of_rectangles_is_greedy(seed, n, threshold, dtype):
    boxes = as_quads(turned(seed, n)).to(dtype)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    order = scores.argsort(descending=True)
    kept: list[int] = []
    for i in order.tolist():
        if all(iou_of(shape_of(boxes[k]), shape_of(boxes[i])) < threshold for k in kept):
            kept.append(i)
    # Appended labels change nothing.
    labelled = torch.cat((boxes, torch.arange(n)[:, None].to(dtype)), dim=1)
    for dets, multi_label in ((boxes, False), (labelled, True)):
        got = quadrilaterals.nms_quadri(dets, scores, order, dets[order], threshold, multi_label)
        assert got.tolist() == kept


@settings(max_examples=20, deadline=None)
@given(seed=some_seeds, n=st.integers(0, 30), m=st.integers(0, 5))
def test_points_in_polygons_use_parity_of_crossings(seed, n, m):
    boxes = quads(seed, m).float()
    points = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) * 6 - 3
    inside = torch.full((n, m), -1.0)
    polygons.points_in_polygons_forward(points, boxes, inside)
    expected = [[shape_of(box).contains(shapely.Point(point.tolist())) for box in boxes] for point in points]
    assert torch.equal(inside, torch.tensor(expected, dtype=torch.float32).view(n, m))
    assert torch.equal(polygons.in_polygons_torch(points, boxes.view(m, 4, 2)).float(), inside)


def test_points_in_polygons_stop_counting_at_a_side_with_the_point():
    # Sides in the order of the reference: (first, last), (second, first), …
    square = torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]])
    points = torch.tensor([[1.0, 1], [0, 1], [2, 1], [0, 0], [1, 0], [3, 1]])
    inside = torch.zeros(6, 1)
    polygons.points_in_polygons_forward(points, square, inside)
    assert inside[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert torch.equal(polygons.in_polygons_torch(points, square.view(1, 4, 2)).float(), inside)


def point_sets(seed: int, n: int, whole: bool) -> torch.Tensor:
    """Draw (n, 18) sets of nine points; integers give many collinear and equal ones."""
    points = np.random.default_rng(seed).uniform(-3, 3, (n, 9, 2))
    return torch.from_numpy((points.round() if whole else points).reshape(n, 18))


@settings(max_examples=25, deadline=None)
@given(seed=some_seeds, n=st.integers(0, 5), k=st.integers(0, 4), whole=st.booleans())
def test_convex_iou_uses_the_hull_of_the_points(seed, n, k, whole):
    sets, boxes = point_sets(seed, n, whole), quads(seed, k)
    hulls = [shapely.MultiPoint(points.view(9, 2).numpy()).convex_hull for points in sets]
    ious = torch.full((n, k), -1.0, dtype=torch.float64)
    polygons.convex_iou(sets, boxes, ious)
    expected = torch.tensor(
        [[iou_of(hull, shape_of(box)) for box in boxes] for hull in hulls], dtype=torch.float64
    )
    torch.testing.assert_close(ious, expected.view(n, k), atol=1e-6, rtol=1e-6)


def generalized_iou(points: np.ndarray, box: np.ndarray) -> float:
    hull, quad = shapely.MultiPoint(points.reshape(9, 2)).convex_hull, shape_of(box)
    union = hull.union(quad).area
    around = shapely.MultiPoint(np.concatenate((points, box)).reshape(-1, 2)).convex_hull.area
    return hull.intersection(quad).area / union - (around - union) / around


@settings(max_examples=8, deadline=None)
@given(seed=some_seeds, apart=st.booleans())
def test_convex_giou_and_its_gradient_equal_finite_differences(seed, apart):
    sets, boxes = point_sets(seed, 2, False), quads(seed, 2) + (9.0 if apart else 0.0)
    output = torch.zeros((2, 19), dtype=torch.float64)
    polygons.convex_giou(sets, boxes, output)
    for points, box, row in zip(sets.numpy(), boxes.numpy(), output, strict=True):
        assert row[18].item() == pytest.approx(generalized_iou(points, box), abs=1e-6)
        for i in range(18):
            step = np.zeros(18)
            step[i] = 1e-6
            rise = generalized_iou(points + step, box) - generalized_iou(points - step, box)
            assert row[i].item() == pytest.approx(rise / 2e-6, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=some_seeds, n=st.integers(0, 5), whole=st.booleans())
def test_min_area_rectangle_contains_all_points_and_is_minimal(seed, n, whole):
    sets = point_sets(seed, n, whole)
    rectangles = torch.full((n, 8), float("nan"), dtype=torch.float64)
    polygons.min_area_polygons(sets, rectangles)
    for points, corners in zip(sets.view(n, 9, 2).numpy(), rectangles.view(n, 4, 2).numpy(), strict=True):
        rectangle = shapely.Polygon(corners)
        best = shapely.MultiPoint(points).minimum_rotated_rectangle
        assert rectangle.area == pytest.approx(best.area, rel=1e-5, abs=1e-5)
        assert all(rectangle.distance(shapely.Point(point)) < 1e-5 for point in points)
        side, next_side = corners[1] - corners[0], corners[2] - corners[1]
        assert abs(side @ next_side) < 1e-4


def test_min_area_rectangle_of_a_rectangle_starts_at_its_lower_right():
    grid = torch.tensor(list(itertools.product((0.0, 1.0, 4.0), (0.0, 1.0, 2.0)))).view(1, 18)
    rectangle = torch.zeros(1, 8)
    polygons.min_area_polygons(grid, rectangle)
    assert rectangle.tolist() == [[4, 0, 0, 0, 0, 2, 4, 2]]


def turned(seed: int, n: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        (rng.uniform(-2, 2, (n, 2)), rng.uniform(0.5, 4, (n, 2)), rng.uniform(-4, 4, (n, 1))), 1
    )
    return torch.from_numpy(boxes)


def rectangle_of(box) -> shapely.Polygon:
    x, y, w, h, a = (float(v) for v in box)
    local = np.array([[w, h], [-w, h], [-w, -h], [w, -h]]) / 2
    return shapely.Polygon(local @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + [x, y])


@settings(max_examples=15, deadline=None)
@given(seed=some_seeds, n=st.integers(1, 8))
def test_sorted_vertices_give_the_overlap_area(mmcv_ops, seed, n):
    from mmcv.ops.diff_iou_rotated import diff_iou_rotated_2d

    first, second = turned(seed, n), turned(seed + 1, n)
    second[0] = first[0]  # every corner twice
    first[-1, 4] = 0
    second[-1] = first[-1] * torch.tensor([1, 1, 0.5, 0.5, 1])
    got = diff_iou_rotated_2d(first[None], second[None])[0]
    expected = [iou_of(rectangle_of(a), rectangle_of(b)) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_sorted_vertices_are_a_closed_ring_with_padding():
    vertices, mask = torch.zeros(1, 2, 24, 2), torch.zeros(1, 2, 24, dtype=torch.bool)
    for row, (x, y) in {3: (1, 1), 9: (-1, -1), 20: (-1, 1), 0: (1, -1)}.items():
        vertices[0, 0, row], mask[0, 0, row] = torch.tensor([x, y]), True
    mask[0, 1, 8:10] = True
    rows = polygons.diff_iou_rotated_sort_vertices_forward(vertices, mask, mask.sum(2).int())
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[[3, 20, 9, 0, 3, 8, 8, 8, 8], [10] * 9]]


def test_mmcv_polygon_functions_use_these_kernels(mmcv):
    boxes, sets = quads(3, 6).float(), point_sets(4, 6, False).float()
    iou = mmcv.box_iou_quadri(boxes, boxes)
    torch.testing.assert_close(iou.diagonal(), torch.ones(6))
    dets, kept = mmcv.nms_quadri(boxes, torch.linspace(1, 0, 6), 0.5)
    assert kept[0] == 0 and 1 not in kept and dets.shape == (len(kept), 9)
    assert mmcv.points_in_polygons(boxes.view(6, 4, 2).mean(1), boxes).shape == (6, 6)
    giou, gradient = mmcv.convex_giou(sets, boxes)
    assert gradient.shape == (6, 18) and (giou <= mmcv.convex_iou(sets, boxes).diagonal() + 1e-6).all()
    assert mmcv.min_area_polygons(sets).shape == (6, 8)


def test_polygon_kernels_accept_float16_and_transposed_inputs():
    sets, boxes = point_sets(5, 4, False).half(), quads(6, 4).half()
    found = []
    for turn in (lambda t: t, lambda t: t.float().t().contiguous().t()):
        ious, gious, rectangles, inside = (
            torch.zeros(4, 4),
            torch.zeros(4, 19),
            torch.zeros(4, 8),
            torch.zeros(4, 4),
        )
        pairs = torch.zeros(4, 4)
        polygons.convex_iou(turn(sets), turn(boxes), ious)
        polygons.convex_giou(turn(sets), turn(boxes), gious)
        polygons.min_area_polygons(turn(sets), rectangles)
        polygons.points_in_polygons_forward(turn(sets[:, :2]), turn(boxes), inside)
        quadrilaterals.box_iou_quadri(turn(boxes), turn(boxes), pairs)
        found.append((ious, gious, rectangles, inside, pairs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_errors_name_the_wrong_argument():
    boxes = quads(0, 2)
    with pytest.raises(ValueError, match=r"boxes1 must be \(N, >=8\)"):
        quadrilaterals.box_iou_quadri(boxes[:, :5], boxes, torch.zeros(4))
    with pytest.raises(ValueError, match="ious must hold 4 numbers"):
        quadrilaterals.box_iou_quadri(boxes, boxes, torch.zeros(3))
    with pytest.raises(ValueError, match="mode_flag must be 0"):
        quadrilaterals.box_iou_quadri(boxes, boxes, torch.zeros(4), 2)
    with pytest.raises(ValueError, match="order must have shape"):
        quadrilaterals.nms_quadri(boxes, boxes[:, 0], torch.zeros(1, dtype=torch.int64), boxes, 0.5)
    with pytest.raises(ValueError, match=r"pointsets must have shape \(\*, 18\)"):
        polygons.min_area_polygons(boxes, boxes)
    with pytest.raises(TypeError, match="polygons must be floating point"):
        polygons.convex_iou(point_sets(0, 2, False), boxes.int(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="vertices must hold more than 8"):
        four = torch.zeros(1, 1, 4, 2)
        polygons.diff_iou_rotated_sort_vertices_forward(four, four[..., 0].bool(), torch.zeros(1, 1))
