"""Kernels without a CPU version in mmcv, and those that decide at a threshold, against the values of mmcv's own code.

``reference_values.npz`` was computed by mmcv 2.1.0's kernels, compiled for the CPU from their CUDA sources: boxes that
touch within and beyond the margin of 3D overlap, thresholds that are an IoU or the float next to it, point sets with
coinciding and collinear points, ties of distances. docs/kernels.md says what differs and why.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from serve.ops import losses, rotated_features
from serve.ops.boxes import iou3d, polygons, quadrilaterals, rotated
from serve.ops.checks import torch_only
from serve.ops.points import neighbours, sampling, voxelize
from serve.ops.roi import align, gradients, pool

VALUES = np.load(Path(__file__).with_name("reference_values.npz"))


def value(name: str) -> torch.Tensor:
    return torch.from_numpy(VALUES[name])


def decisions(name: str) -> list[tuple[float, list[int]]]:
    """The thresholds of a suppression and the rows that the reference keeps."""
    pairs = zip(VALUES[f"{name}_thresholds"], VALUES[f"{name}_kept"], strict=True)
    return [(float(threshold), np.flatnonzero(kept).tolist()) for threshold, kept in pairs]


def test_overlap_in_bev_claims_corners_within_the_margin():
    boxes = value("bev_boxes")
    areas = torch.full((len(boxes), len(boxes)), -1.0)
    iou3d.iou3d_boxes_overlap_bev_forward(boxes, boxes, areas)
    torch.testing.assert_close(areas, value("bev_overlap"), rtol=1e-5, atol=1e-6)
    # Two unit squares that share a side, or miss it by 5 mm, overlap; at 2 cm they do not.
    squares = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0], [1.005, 0, 0, 1, 1, 1, 0], [-1.02, 0, 0, 1, 1, 1, 0]])
    areas = torch.zeros(3, 3)
    iou3d.iou3d_boxes_overlap_bev_forward(squares, squares, areas)
    assert areas[0, 1].item() == pytest.approx(0.005, abs=1e-5) and areas[0, 2] == 0


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("bev", iou3d.iou3d_nms3d_forward), ("unrotated", iou3d.iou3d_nms3d_normal_forward)],
)
def test_nms_in_bev_decides_as_the_reference_at_the_threshold(name, kernel):
    boxes = value("bev_boxes")
    for threshold, expected in decisions(name):
        keep, number = torch.zeros(len(boxes), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        kernel(boxes, keep, number, threshold)
        assert keep[: int(number)].tolist() == expected, threshold


@pytest.mark.parametrize(("mode", "name"), [(0, "rotated_iou"), (1, "rotated_iof")])
def test_rotated_iou_equals_the_reference(mode, name):
    boxes = value("rotated_boxes")
    ious = torch.full((len(boxes) ** 2,), -1.0)
    rotated.box_iou_rotated(boxes, boxes, ious, mode)
    torch.testing.assert_close(ious.view(len(boxes), -1), value(name), rtol=1e-5, atol=1e-6)
    aligned = torch.full((len(boxes),), -1.0)
    rotated.box_iou_rotated(boxes, boxes, aligned, mode, True)
    torch.testing.assert_close(aligned, value(name).diagonal(), rtol=1e-5, atol=1e-6)


def suppressed(kernel, boxes: torch.Tensor, threshold: float, labelled: bool) -> list[int]:
    """The rows that a kernel keeps of sorted boxes, with labels that are all different or without."""
    order = torch.arange(len(boxes))
    dets = torch.cat((boxes, order[:, None].float()), dim=1) if labelled else boxes
    scores = torch.linspace(1, 0, len(boxes))
    if kernel is rotated.nms_rotated:
        return kernel(dets, scores, order, dets, order, threshold, labelled).tolist()
    return kernel(dets, scores, order, dets, threshold, labelled).tolist()


@pytest.mark.parametrize("labelled", [False, True])
def test_rotated_nms_decides_as_the_reference_and_ignores_labels(labelled):
    for threshold, expected in decisions("rotated"):
        found = suppressed(rotated.nms_rotated, value("rotated_boxes"), threshold, labelled)
        assert found == expected, threshold


@pytest.mark.parametrize("labelled", [False, True])
def test_quadrilateral_nms_decides_as_the_reference_and_ignores_labels(labelled):
    for threshold, expected in decisions("quadrilateral"):
        found = suppressed(quadrilaterals.nms_quadri, value("quadrilaterals"), threshold, labelled)
        assert found == expected, threshold


def test_iou_of_quadrilaterals_that_are_no_rectangles_equals_the_reference():
    boxes = value("quadrilaterals")
    ious = torch.full((len(boxes) ** 2,), -1.0)
    quadrilaterals.box_iou_quadri(boxes, boxes, ious)
    torch.testing.assert_close(ious.view(len(boxes), -1), value("quadrilateral_iou"), rtol=1e-4, atol=1e-5)


def test_convex_iou_of_degenerate_hulls_equals_the_reference():
    sets, boxes = value("point_sets"), value("point_set_polygons")
    ious = torch.full((len(sets), len(boxes)), -1.0)
    polygons.convex_iou(sets, boxes, ious)
    torch.testing.assert_close(ious, value("hull_iou"), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_convex_giou_and_its_gradient_equal_the_reference():
    sets, boxes = value("point_sets"), value("point_set_polygons")
    output = torch.full((len(sets), 19), -1.0)
    polygons.convex_giou(sets, boxes, output)
    torch.testing.assert_close(output, value("giou"), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_smallest_rectangle_is_the_one_of_the_reference():
    rectangles = torch.full((len(value("point_sets")), 8), -1.0)
    polygons.min_area_polygons(value("point_sets"), rectangles)
    torch.testing.assert_close(rectangles, value("rectangles"), rtol=1e-5, atol=1e-5)


def test_rings_of_coinciding_vertices_equal_the_reference():
    mask = value("vertex_mask")
    rings = polygons.diff_iou_rotated_sort_vertices_forward(
        value("vertices")[None], mask[None], mask.sum(1).int()[None]
    )
    assert torch.equal(rings[0], value("rings"))


def test_knn_breaks_ties_as_the_heap_of_the_reference():
    points, centres = value("points"), value("centres")
    rows, dist2 = torch.zeros(2, 12, 9, dtype=torch.int32), torch.zeros(2, 12, 9)
    neighbours.knn_forward(points, centres, rows, dist2, 2, 70, 12, 9)
    assert torch.equal(rows, value("knn")) and torch.equal(dist2, value("knn_dist2"))


def test_knn_of_float64_points_has_float32_distances():
    points = torch.tensor([[[0.1, 0, 0], [0.2, 0, 0]]], dtype=torch.float64)
    rows, dist2 = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, dtype=torch.float64)
    neighbours.knn_forward(points, torch.zeros(1, 1, 3).double(), rows, dist2, 1, 2, 1, 2)
    assert dist2[0, 0].tolist() == [float(np.float32(0.1 * 0.1)), float(np.float32(0.2 * 0.2))]


def test_neighbours_of_float16_points_are_found_by_float16_distances():
    far = torch.tensor([[[300.0, 0, 0], [1.0, 0, 0]]]).half()
    rows, dist2 = torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3).half()
    neighbours.three_nn_forward(torch.zeros(1, 1, 3).half(), far, dist2, rows, 1, 1, 2)
    # 300 squared is beyond float16.
    assert rows[0, 0].tolist() == [1, 0, 0] and dist2[0, 0].tolist() == [1, float("inf"), float("inf")]


@pytest.mark.parametrize("vectorized", [False, True])
def test_furthest_point_ties_are_broken_by_the_threads_of_the_reference(vectorized):
    points = value("points")
    distances = ((points[:, :, None] - points[:, None]) ** 2).sum(-1) - 0.5
    for kernel, given, name in (
        (sampling.furthest_point_sampling_forward, points, "furthest"),
        (sampling.furthest_point_sampling_with_dist_forward, distances, "furthest_with_dist"),
    ):
        expected = value(name)
        rows, nearest = torch.zeros_like(expected), torch.full((2, 70), 1e10)
        if vectorized:
            with torch_only():
                kernel(given, nearest, rows, 2, 70, expected.shape[1])
        else:
            kernel(given, nearest, rows, 2, 70, expected.shape[1])
        assert torch.equal(rows, expected)


def test_temporal_shift_backward_shifts_forward_and_leaves_the_rest():
    grad_input = torch.full(value("shift_grad").shape, 7.0)
    rotated_features.tin_shift_backward(value("shift_grad"), value("shift"), grad_input)
    assert torch.equal(grad_input, value("shift_grad_input"))


def test_correlation_backward_centres_an_even_patch_on_whole_steps():
    # Two shifts, two pixels apart: forward they reach from -1 to 1, backward from 0 to 2.
    steps = dict.fromkeys(("kH", "kW", "patchH", "dilationH", "dilationW", "dilation_patchH", "dH", "dW"), 1)
    steps |= {"patchW": 2, "padH": 0, "padW": 0, "dilation_patchW": 2}
    first, second = torch.ones(1, 1, 1, 5), torch.arange(1.0, 6).view(1, 1, 1, 5)
    output = torch.zeros(1, 1, 2, 1, 5)
    rotated_features.correlation_forward(first, second, output, **steps)
    assert output[0, 0, :, 0].tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 0]]
    grads = torch.zeros_like(first), torch.zeros_like(second)
    rotated_features.correlation_backward(torch.ones_like(output), first, second, *grads, **steps)
    assert grads[0].flatten().tolist() == [1 + 3, 2 + 4, 3 + 5, 4, 5]
    assert grads[1].flatten().tolist() == [1, 1, 2, 2, 2]


def test_gradients_of_deformable_pooling_equal_the_reference_beyond_the_border():
    maps, rois, offset = value("pool_map"), value("pool_rois"), value("pool_offset")
    grad_map, grad_offset = torch.zeros_like(maps), torch.zeros_like(offset)
    gradients.deform_roi_pool_backward(
        value("pool_grad"), maps, rois, offset, grad_map, grad_offset, 2, 3, 0.5, 2, 0.1
    )
    torch.testing.assert_close(grad_map, value("pool_grad_map"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_offset, value("pool_grad_offset"), rtol=1e-4, atol=1e-5)


def test_sigmoid_focal_loss_gradient_stays_at_extreme_logits():
    grad = torch.zeros_like(value("logits"))
    losses.sigmoid_focal_loss_backward(value("logits"), value("targets"), torch.zeros(0), grad, 2.0, 0.25)
    torch.testing.assert_close(grad, value("focal_grad"), rtol=1e-5, atol=1e-6)


def test_voxel_grid_rounds_halves_up():
    # 2.5 voxels along x are three; a point in the third is inside.
    points = torch.tensor([[1.1, 0.5, 0.5]])
    coors = torch.zeros(1, 3, dtype=torch.int32)
    voxelize.dynamic_voxelize_forward(
        points, torch.tensor([0.5, 1, 1]), torch.tensor([0.0, 0, 0, 1.25, 1, 1]), coors
    )
    assert coors.tolist() == [[0, 0, 2]]


def test_float64_points_are_voxelized_in_float64():
    # In float32 the point lies on the border of the second voxel.
    points = torch.tensor([[1 - 1e-12, 0.5, 0.5]], dtype=torch.float64)
    coors = torch.zeros(1, 3, dtype=torch.int32)
    voxelize.dynamic_voxelize_forward(points, torch.ones(3), torch.tensor([0.0, 0, 0, 2, 1, 1]), coors)
    assert coors.tolist() == [[0, 0, 0]]


def test_roi_pool_leaves_regions_without_area_untouched():
    output, argmax = torch.full((2, 1, 1, 1), 7.0), torch.full((2, 1, 1, 1), 7, dtype=torch.int32)
    rois = torch.tensor([[0.0, 3, 0, 1, 2], [0, 0, 0, 1, 1]])
    pool.roi_pool_forward(torch.arange(16.0).view(1, 1, 4, 4), rois, output, argmax, 1, 1, 1.0)
    assert output.flatten().tolist() == [7, 5] and argmax.flatten().tolist() == [7, 5]


def test_maximum_of_no_samples_is_the_start_value_of_the_reference():
    rois = torch.tensor([[0.0, 1, 1, 1, 1]])
    output, at_y, at_x = (torch.zeros(1, 1, 1, 1) for _ in range(3))
    align.roi_align_forward(torch.ones(1, 1, 4, 4), rois, output, at_y, at_x, 1, 1, 1.0, 0, 0, True)
    assert (output.item(), at_y.item(), at_x.item()) == (-10000, -1, -1)
    grad = torch.zeros(1, 1, 4, 4)
    gradients.roi_align_backward(torch.ones_like(output), rois, at_y, at_x, grad, 1, 1, 1.0, 0, 0, True)
    assert not grad.any()
