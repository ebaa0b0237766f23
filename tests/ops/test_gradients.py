"""Gradients of the kernels used in training, against finite differences of the forward functions, through mmcv."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from serve.ops import carafe, rotated_features, score_assign
from serve.ops.extension import kernels
from serve.ops.roi import gradients as roi_gradients
from serve.ops.roi import pool as roi_pool
from tools.bench.kernels.images import CASES
from tools.bench.kernels.inputs import Inputs

MODULES = (roi_gradients, carafe, rotated_features, score_assign)
EXTENT = 40.0
SCALE = 0.25


@pytest.fixture
def ops(mmcv_ops):
    return mmcv_ops


def maps(x: Inputs, channels: int = 4) -> torch.Tensor:
    return x.normal(2, channels, 8, 9).double()


def regions(boxes: torch.Tensor) -> torch.Tensor:
    """Assign boxes to two images."""
    image = torch.arange(len(boxes), dtype=boxes.dtype) % 2
    return torch.cat((image[:, None], boxes), dim=1).double()


def check_derivative(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, step: float = 1e-5
) -> None:
    """Compare the gradient of a random sum of outputs along a random direction, for each input."""
    generator = torch.Generator().manual_seed(1)
    leaves = [one.clone().requires_grad_() for one in inputs]
    made = function(*leaves)
    weight = torch.randn(made.shape, generator=generator, dtype=made.dtype)
    grads = torch.autograd.grad(made, leaves, weight)
    for number, (one, grad) in enumerate(zip(inputs, grads, strict=True)):
        assert grad.shape == one.shape and bool(grad.abs().sum() > 0)
        direction = torch.randn(one.shape, generator=generator, dtype=one.dtype)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[number] = one + sign * step * direction
            ends.append((function(*moved).detach() * weight).sum())
        expected = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(ops, mode, ratio, aligned):
    x = Inputs(False)
    rois = regions(x.boxes(5, EXTENT) - 4)
    check_derivative(lambda m: ops.roi_align(m, rois, (3, 2), SCALE, ratio, mode, aligned), maps(x))


@pytest.mark.parametrize("clockwise", [True, False])
def test_rotated_roi_align(ops, clockwise):
    x = Inputs(False)
    rois = regions(x.rotated(5, EXTENT))
    check_derivative(lambda m: ops.roi_align_rotated(m, rois, (3, 2), SCALE, 0, True, clockwise), maps(x))


def test_rotation_invariant_roi_align(ops):
    x = Inputs(False)
    rois = regions(x.rotated(5, EXTENT))
    check_derivative(lambda m: ops.riroi_align_rotated(m, rois, (3, 2), SCALE, 2, 4, True), maps(x, 8))


def test_bezier_align(ops):
    x = Inputs(False)
    corners = torch.tensor(
        [[[2.0, 3], [8, 1], [16, 1], [24, 4], [26, 20], [18, 16], [9, 17], [3, 21]]]
    ).flatten(1)
    rois = regions(torch.cat((corners, corners + 7)))
    check_derivative(lambda m: ops.bezier_align(m, rois, (2, 4), SCALE, 2, True), maps(x))


def test_deformable_roi_pooling_with_respect_to_map_and_offset(ops):
    x = Inputs(False)
    # Well inside the map: mmcv's derivative by the offset is another where samples are clamped to the border.
    rois = regions(0.3 * EXTENT + 0.4 * x.boxes(4, EXTENT))
    offset = 0.1 * x.normal(4, 2, 3, 3).double()
    check_derivative(lambda m, o: ops.deform_roi_pool(m, rois, o, (3, 3), SCALE, 2, 0.5), maps(x), offset)


def test_deformable_roi_pooling_without_offset(ops):
    x = Inputs(False)
    rois, none = regions(x.boxes(4, EXTENT)), torch.zeros(0).double()
    check_derivative(lambda m: ops.deform_roi_pool(m, rois, none, (3, 3), SCALE, 2, 0.5), maps(x))


def test_roi_pool(ops):
    x = Inputs(False)
    rois = regions(x.boxes(5, EXTENT))
    check_derivative(lambda m: ops.roi_pool(m, rois, (3, 2), SCALE), maps(x))


def test_border_align(ops):
    x = Inputs(False)
    boxes = torch.stack((x.boxes(4, 8), x.boxes(4, 8))).double()
    check_derivative(lambda m: ops.border_align(m, boxes, 5), maps(x, 8))


class PreciseRoIPool(torch.autograd.Function):
    """The bare kernels: mmcv's function accepts float32 only, too coarse for finite differences."""

    @staticmethod
    def forward(ctx, features, rois):
        output = features.new_zeros(len(rois), features.shape[1], 3, 2)
        roi_pool.prroi_pool_forward(features, rois, output, 3, 2, SCALE)
        ctx.save_for_backward(features, rois, output)
        return output

    @staticmethod
    def backward(ctx, grad):
        features, rois, output = ctx.saved_tensors
        by_map, by_rois = torch.zeros_like(features), torch.zeros_like(rois)
        roi_gradients.prroi_pool_backward(grad, rois, by_map, 3, 2, SCALE)
        roi_gradients.prroi_pool_coor_backward(output, grad, features, rois, by_rois, 3, 2, SCALE)
        return by_map, by_rois


def test_precise_roi_pooling_with_respect_to_map_and_corners():
    x = Inputs(False)
    boxes = x.boxes(5, EXTENT).double()
    check_derivative(lambda m, b: PreciseRoIPool.apply(m, regions(b)), maps(x), boxes)


def test_precise_roi_pooling_of_a_region_without_area_has_no_gradient():
    flat = torch.tensor([[0.0, 5, 5, 5, 20]]).double().requires_grad_()
    PreciseRoIPool.apply(maps(Inputs(False)), flat).sum().backward()
    assert flat.grad.abs().sum() == 0


def test_precise_roi_pooling_through_mmcv(ops):
    features = maps(Inputs(False)).float().requires_grad_()
    rois = regions(Inputs(False).boxes(3, EXTENT)).float().requires_grad_()
    ops.prroi_pool(features, rois, (2, 2), SCALE).sum().backward()
    # Weights of a bin within the map sum to one: each of 3 regions has 4 bins of 4 channels.
    torch.testing.assert_close(features.grad.sum(), torch.tensor(48.0), rtol=0.2, atol=0)
    assert rois.grad.shape == rois.shape and bool(torch.isfinite(rois.grad).all())


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_alignment(ops, points):
    x = Inputs(False)
    boxes = x.rotated(2 * 8 * 9, EXTENT).view(2, 8, 9, 5).double()
    check_derivative(lambda m: ops.rotated_feature_align(m, boxes, SCALE, points), maps(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_carafe_with_respect_to_map_and_masks(ops, groups):
    x = Inputs(False)
    masks = x.uniform(2, groups * 9, 16, 18).double()
    check_derivative(lambda m, k: ops.carafe(m, k, 3, groups, 2), maps(x), masks)


def test_naive_carafe_has_the_same_gradients():  # mmcv's function checks for CUDA before it calls the kernel
    for number in (0, 1):
        ((top, features, masks, *rest), (_, _, _, *buffers)) = (
            CASES[name](Inputs(False)) for name in ("carafe_naive_backward", "carafe_backward")
        )
        carafe.carafe_naive_backward(top, features, masks, *rest)
        carafe.carafe_backward(top, features, masks, *buffers)
        assert torch.equal(rest[number], buffers[4 + number])


@pytest.mark.parametrize("stride", [1, 2])
def test_correlation_with_respect_to_both(ops, stride):
    x = Inputs(False)
    layer = ops.Correlation(3, 2, stride=stride, padding=1, dilation_patch=2)
    check_derivative(layer, maps(x), maps(x))


class Chamfer(torch.autograd.Function):
    """The bare kernels: mmcv's function returns float32 gradients."""

    @staticmethod
    def forward(ctx, first, second):
        dist = [first.new_zeros(one.shape[:2]) for one in (first, second)]
        idx = [torch.zeros(one.shape[:2], dtype=torch.int32) for one in (first, second)]
        score_assign.chamfer_distance_forward(first, second, *dist, *idx)
        ctx.save_for_backward(first, second, *idx)
        return torch.cat(dist, dim=1)

    @staticmethod
    def backward(ctx, grad):
        first, second, *idx = ctx.saved_tensors
        grads = torch.zeros_like(first), torch.zeros_like(second)
        parts = grad.split([first.shape[1], second.shape[1]], dim=1)
        score_assign.chamfer_distance_backward(first, second, *idx, *parts, *grads)
        return grads


def test_chamfer_distance_with_respect_to_both_sets(ops):
    x = Inputs(False)
    first, second = x.uniform(2, 6, 2).double(), x.uniform(2, 5, 2).double()
    check_derivative(Chamfer.apply, first, second)
    single = first.float().requires_grad_()
    ops.chamfer_distance(single, second.float())[0].sum().backward()
    assert bool(single.grad.abs().sum() > 0)


def test_scores_by_neighbour_with_respect_to_features_centres_and_scores(ops):
    x = Inputs(False)
    idx = x.whole(7, 2, 5, 3, dtype=torch.int64)
    tensors = x.uniform(2, 5, 3, 2).double(), x.normal(2, 7, 2, 4).double(), x.normal(2, 7, 2, 4).double()
    check_derivative(lambda s, p, c: ops.assign_score_withk(s, p, c, idx, "sum"), *tensors)


@pytest.mark.parametrize("kernel", ["roi_align_backward", "roi_pool_backward"])
def test_gradients_accumulate(kernel):
    first, second = (CASES[kernel](Inputs(False)) for _ in range(2))
    at = next(i for i, one in enumerate(first) if isinstance(one, torch.Tensor) and one.dim() == 4 and i > 1
              and one.dtype == torch.float32)  # fmt: skip
    second[at] += 1
    kernels()[kernel](*first)
    kernels()[kernel](*second)
    torch.testing.assert_close(second[at], first[at] + 1)
