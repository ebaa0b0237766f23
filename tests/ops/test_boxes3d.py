"""Points in 3D boxes, and the two pooling kernels over them, against loops from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.boxes import boxes3d
from serve.ops.roi import pool3d

some_seeds = st.integers(0, 2**16)


@pytest.fixture
def mmcv(mmcv_ops):
    return mmcv_ops


def scene(seed: int, boxes: int, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw float64 boxes, half of them axis-aligned with integers, and points, many on their faces."""
    rng = np.random.default_rng(seed)
    free = np.concatenate(
        (rng.uniform(-2, 2, (boxes, 3)), rng.uniform(0.5, 4, (boxes, 3)), rng.uniform(-7, 7, (boxes, 1))),
        axis=1,
    )
    whole = np.concatenate((free[:, :3].round(), 2 * free[:, 3:6].round(), np.zeros((boxes, 1))), axis=1)
    cloud = rng.uniform(-3, 3, (points, 3))
    cloud = np.where(rng.random((points, 1)) < 0.5, cloud.round(), cloud)
    return torch.from_numpy(np.where(rng.random((boxes, 1)) < 0.5, whole, free)), torch.from_numpy(cloud)


def local(point, box) -> tuple[float, float, float]:
    """Transform the point to the axes of the box, relative to the centre of its bottom."""
    x, y, z, *_, yaw = (float(v) for v in box)
    dx, dy = float(point[0]) - x, float(point[1]) - y
    return (
        dx * math.cos(yaw) + dy * math.sin(yaw),
        dy * math.cos(yaw) - dx * math.sin(yaw),
        float(point[2]) - z,
    )


def holds(point, box) -> bool:
    along, across, up = local(point, box)
    length, width, height = (float(v) for v in box[3:6])
    return abs(along) < length / 2 and abs(across) < width / 2 and abs(up - height / 2) <= height / 2


def table(points, boxes) -> np.ndarray:
    cells = [[holds(point, box) for point in points] for box in boxes]
    return np.array(cells, dtype=bool).reshape(len(boxes), len(points))


@settings(max_examples=30, deadline=None)
@given(
    seed=some_seeds,
    t=st.integers(0, 6),
    m=st.integers(0, 40),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_points_in_boxes_include_bottom_and_top_but_not_sides(seed, t, m, index):
    boxes, points = scene(seed, t, m)
    expected = torch.from_numpy(table(points, boxes))
    each = torch.full((t, m), 9, dtype=index)
    boxes3d.points_in_boxes_cpu_forward(boxes, points, each)
    assert torch.equal(each, expected.to(index))
    splat = torch.zeros((1, m, t), dtype=index)
    boxes3d.points_in_boxes_all_forward(boxes[None], points[None], splat)
    assert torch.equal(splat[0].t(), expected.to(index))
    first = torch.full((1, m), -1, dtype=index)
    boxes3d.points_in_boxes_part_forward(boxes[None], points[None], first)
    assert first[0].tolist() == [next((b for b in range(t) if expected[b, p]), -1) for p in range(m)]
    exact = boxes3d.to_common_dtype(points, boxes)
    assert torch.equal(boxes3d.first_box_torch(*exact), first[0].long())
    assert all(torch.equal(hits, expected[block]) for block, hits in boxes3d.inside_blocks(*exact))


def test_points_in_boxes_accept_float16_slices_and_nan():
    boxes, points = (part.float() for part in scene(1, 5, 200))
    wide = points.repeat(1, 2).half()
    hits = [boxes3d.inside(cloud, boxes) for cloud in (wide[:, 3:], wide[:, 3:].float().contiguous())]
    assert torch.equal(*hits) and hits[0].any()
    lost = torch.full((3, 3), float("nan")).fill_diagonal_(0)
    # As in mmcv the comparison of heights lets NaN pass.
    lost[2, :2] = 0
    assert boxes3d.inside(lost, torch.tensor([[0.0, 0, 0, 9, 9, 9, 0]])).tolist() == [[False, False, True]]


def naive_pool(rois, points, features, grid, cap, mean):
    """Return a dictionary of cells to rows, and the pooled features."""
    cells: dict[tuple[int, ...], list[int]] = {}
    for b, box in enumerate(rois):
        for p, point in enumerate(points):
            if not holds(point, box):
                continue
            along, across, up = local(point, box)
            offsets = (along + float(box[3]) / 2, across + float(box[4]) / 2, up)
            at = [
                min(max(int(offset / (float(size) / count)), 0), count - 1)
                for offset, size, count in zip(offsets, box[3:6], grid, strict=True)
            ]
            rows = cells.setdefault((b, *at), [])
            if len(rows) < cap:
                rows.append(p)
    pooled = torch.zeros((len(rois), *grid, features.shape[1]), dtype=features.dtype)
    for cell, rows in cells.items():
        if rows:
            pooled[cell] = features[rows].mean(0) if mean else features[rows].amax(0)
    return cells, pooled


def outputs(rois, features, grid, k):
    shape = (len(rois), *grid)
    winners = torch.full((*shape, features.shape[1]), -9, dtype=torch.int32)
    held = torch.zeros((*shape, k), dtype=torch.int32)
    return winners, held, features.new_zeros((*shape, features.shape[1]))


@pytest.mark.parametrize("method", [pool3d.MAX, pool3d.MEAN])
@settings(max_examples=25, deadline=None)
@given(seed=some_seeds, n=st.integers(0, 4), p=st.integers(0, 60), k=st.integers(1, 5))
def test_roiaware_pool_uses_the_first_points_of_each_cell(method, seed, n, p, k):
    grid = (2, 3, 2)
    rois, points = scene(seed, n, p)
    features = torch.randn(p, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cells, expected = naive_pool(rois, points, features, grid, k - 1, method == pool3d.MEAN)
    winners, held, pooled = outputs(rois, features, grid, k)
    pool3d.roiaware_pool3d_forward(rois, points, features, winners, held, pooled, pool_method=method)
    torch.testing.assert_close(pooled, expected)
    for cell in np.ndindex(n, *grid):
        rows = cells.get(cell, [])
        assert held[cell][: len(rows) + 1].tolist() == [len(rows), *rows]
        if method == pool3d.MAX:
            best = [rows[i] for i in features[rows].argmax(0)] if rows else [-1] * 3
            assert winners[cell].tolist() == best
    _, other_held, other = outputs(rois, features, grid, k)
    other_winners = torch.full_like(winners, -1)
    pool3d.roiaware_torch(
        *boxes3d.to_common_dtype(points, rois), features, other_winners, other_held, other, method
    )
    assert torch.equal(other_held, held) and torch.equal(other, pooled)
    assert method == pool3d.MEAN or torch.equal(other_winners, winners)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_mmcv_roiaware_pool_and_gradients_use_these_kernels(mmcv, mode):
    rois, points = (part.float() for part in scene(8, 5, 300))
    features = torch.randn(300, 4, requires_grad=True)
    layer = mmcv.RoIAwarePool3d(out_size=(3, 2, 2), max_pts_per_voxel=6, mode=mode)
    out = layer(rois, points, features)
    again = features.detach().clone().requires_grad_()
    cells, expected = naive_pool(rois, points, again, (3, 2, 2), 5, mode == "avg")
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    torch.stack([(expected[cell] * upstream[cell]).sum() for cell in cells]).sum().backward()
    torch.testing.assert_close(features.grad, again.grad)


def test_roiaware_max_pool_ignores_nan():
    roi, points = (
        torch.tensor([[0.0, 0, 0, 2, 2, 2, 0]]),
        torch.tensor([[0.0, 0, 1], [0.1, 0, 1], [0, 0.1, 1]]),
    )
    features = torch.tensor([[float("nan"), float("nan")], [1, float("nan")], [2, float("-inf")]])
    winners, held, pooled = outputs(roi, features, (1, 1, 1), 9)
    pool3d.roiaware_pool3d_forward(roi, points, features, winners, held, pooled, pool3d.MAX)
    assert winners.flatten().tolist() == [2, -1] and pooled.flatten().tolist() == [2, 0]
    other = pooled.new_zeros(pooled.shape)
    frames, nothing = boxes3d.to_common_dtype(points, roi), torch.full_like(winners, -1)
    pool3d.roiaware_torch(*frames, features, nothing, held.clone(), other, pool3d.MAX)
    assert torch.equal(nothing, winners) and torch.equal(other, pooled)


@settings(max_examples=30, deadline=None)
@given(seed=some_seeds, t=st.integers(0, 5), m=st.integers(0, 60), samples=st.integers(1, 12))
def test_roipoint_pool_repeats_points_cyclically(seed, t, m, samples):
    boxes, points = scene(seed, t, m)
    features = torch.randn(m, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pooled = torch.full((1, t, samples, 5), 7.0, dtype=torch.float64)
    empty = torch.zeros((1, t), dtype=torch.int32)
    pool3d.roipoint_pool3d_forward(points[None], boxes[None], features[None], pooled, empty)
    for b, hits in enumerate(table(points, boxes)):
        rows = np.flatnonzero(hits)
        assert empty[0, b] == (len(rows) == 0)
        if len(rows) == 0:
            assert (pooled[0, b] == 7).all()
            continue
        rows = [int(rows[i % len(rows)]) for i in range(samples)]
        assert torch.equal(pooled[0, b], torch.cat((points[rows], features[rows]), dim=1))
    frames = boxes3d.to_common_dtype(points, boxes)
    pairs = zip(
        pool3d.find_first_inside(*frames, samples),
        pool3d.find_first_inside_torch(*frames, samples),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_mmcv_points_in_boxes_uses_these_kernels(mmcv):
    boxes, points = (torch.stack([part.float(), part.float().flip(0)]) for part in scene(4, 6, 80))
    every = mmcv.points_in_boxes_cpu(points, boxes)
    assert every.any() and torch.equal(mmcv.points_in_boxes_all(points, boxes), every)
    first = mmcv.points_in_boxes_part(points, boxes)
    assert torch.equal(first >= 0, every.any(2))
    assert torch.equal(every.argmax(2)[first >= 0].int(), first[first >= 0])
    features = torch.randn(2, 80, 3)
    pooled, empty = mmcv.RoIPointPool3d(num_sampled_points=16)(points, features, boxes)
    assert pooled.shape == (2, 6, 16, 6) and torch.equal(empty == 0, every.any(1))


def test_errors_name_the_wrong_argument():
    boxes, points = scene(0, 2, 3)
    with pytest.raises(ValueError, match=r"boxes_tensor must have shape \(\*, 7\)"):
        boxes3d.points_in_boxes_cpu_forward(boxes[:, :6], points, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="box_idx_of_points_tensor must have shape"):
        boxes3d.points_in_boxes_part_forward(boxes[None], points[None], torch.zeros(1, 4))
    with pytest.raises(TypeError, match="pts_tensor must be floating point"):
        boxes3d.points_in_boxes_all_forward(boxes[None], points[None].int(), torch.zeros(1, 3, 2))
    features = torch.zeros(3, 1, dtype=torch.float64)
    winners, held, pooled = outputs(boxes, features, (2, 2, 2), 4)
    with pytest.raises(ValueError, match="pool_method must be 0"):
        pool3d.roiaware_pool3d_forward(boxes, points, features, winners, held, pooled, 2)
    with pytest.raises(ValueError, match="pts_idx_of_voxels must be contiguous int32"):
        pool3d.roiaware_pool3d_forward(boxes, points, features, winners, held.long(), pooled, 0)
    with pytest.raises(IndexError, match="argmax must lie in"):
        pool3d.roiaware_pool3d_backward(held, torch.full_like(winners, 3), pooled, features, 0)
