"""Gradients of region pooling, for training two-stage detectors on any device.

Means of samples and exact integrals are linear in the map: their gradients come from autograd on the torch version.
Gradients of maxima go to the recorded positions. All sums have a fixed order. The forward functions, which describe the
arguments, are in `serve.ops.roi.align`, `serve.ops.roi.sampling` and `serve.ops.roi.pool`. Every function adds to its
``grad_`` arguments in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.ops.checks import (
    check_floating,
    check_indices,
    check_rank,
    check_same_device,
    check_shape,
    compute_dtype,
)
from serve.ops.roi import align as roi_align
from serve.ops.roi import pool as roi_pool
from serve.ops.roi import sampling as roi_sampling
from serve.ops.roi.bilinear import add_at_corners, average_samples_torch, clamped_corners

__all__ = [
    "bezier_align_backward",
    "border_align_backward",
    "deform_roi_pool_backward",
    "prroi_pool_backward",
    "prroi_pool_coor_backward",
    "riroi_align_rotated_backward",
    "roi_align_backward",
    "roi_align_rotated_backward",
    "roi_pool_backward",
]


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward` by the map; it wrote `argmax_y` and `argmax_x`.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: the image of a region is out of range.
    """
    bins = (aligned_height, aligned_width)
    image = _check(grad_output, rois, grad_input, 5, bins)
    roi_align.check_mode(pool_mode)
    if pool_mode == roi_align.MAX_POOL:
        for name, at in (("argmax_y", argmax_y), ("argmax_x", argmax_x)):
            check_shape(name, at, *grad_output.shape)
            check_floating(**{name: at})
            check_same_device(**{"grad_output": grad_output, name: at})
    if grad_output.numel() == 0:
        return
    dtype = compute_dtype(grad_input)
    if pool_mode == roi_align.AVERAGE_POOL:
        where = roi_align.upright_places(rois, bins, spatial_scale, sampling_ratio, aligned, dtype)
        _spread(grad_output, image, *where, grad_input)
        return
    height, width = grad_input.shape[2:]
    pixel, weights = clamped_corners(argmax_y.to(dtype), argmax_x.to(dtype), height, width)
    # -1 stands for no sample; one that lay there has no gradient in the reference either.
    pixel = torch.where(argmax_y[..., None] == -1, -1, pixel)
    plane = image[:, None] * grad_input.shape[1] + torch.arange(grad_input.shape[1], device=image.device)
    add_at_corners(grad_input, plane[:, :, None, None], pixel, weights, grad_output)


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Add the gradient of `roi_align_rotated_forward` by the map; raises as `roi_align_backward`."""
    bins = (pooled_height, pooled_width)
    image = _check(grad_output, rois, grad_input, 6, bins)
    if grad_output.numel() > 0:
        box = rois[:, 1:6].to(compute_dtype(grad_input))
        where = roi_sampling.rotated_places(box, bins, spatial_scale, sampling_ratio, aligned, clockwise)
        _spread(grad_output, image, *where, grad_input)


def riroi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    """Add the gradient of `riroi_align_rotated_forward` by the map; raises as `roi_align_backward`."""
    bins = (pooled_height, pooled_width)
    image = _check(grad_output, rois, grad_input, 6, bins)
    roi_sampling.check_orientations(grad_input, num_orientations, "grad_input")
    if grad_output.numel() == 0:
        return
    box = rois[:, 1:6].to(compute_dtype(grad_input))
    with torch.enable_grad():
        pooled = torch.zeros(grad_output.shape, dtype=box.dtype, device=box.device, requires_grad=True)
        turned = roi_sampling.turn_orientations(pooled, box[:, 4], num_orientations)
        (grad,) = torch.autograd.grad(turned, pooled, grad_output.detach().to(box.dtype))
    where = roi_sampling.rotated_places(box, bins, spatial_scale, num_samples, False, clockwise)
    _spread(grad, image, *where, grad_input)


def bezier_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Add the gradient of `bezier_align_forward` by the map; raises as `roi_align_backward`."""
    bins = (aligned_height, aligned_width)
    image = _check(grad_output, rois, grad_input, roi_sampling.BEZIER_WIDTH, bins)
    if grad_output.numel() > 0:
        points = rois[:, 1 : roi_sampling.BEZIER_WIDTH].to(compute_dtype(grad_input))
        where = roi_sampling.bent_places(points, bins, spatial_scale, sampling_ratio, aligned)
        _spread(grad_output, image, *where, grad_input)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Add the gradients of `deform_roi_pool_forward` by map and offset; raises as `roi_align_backward`."""
    bins = (pooled_height, pooled_width)
    image = _check(grad_output, rois, grad_input, 5, bins)
    roi_sampling.check_shifts(offset, rois, bins)
    for name, tensor, like in (("input", input, grad_input), ("grad_offset", grad_offset, offset)):
        check_shape(name, tensor, *like.shape)
        check_floating(**{name: tensor})
        check_same_device(**{"grad_input": grad_input, name: tensor})
    if grad_output.numel() == 0:
        return
    dtype = compute_dtype(input)
    maps = input.detach().to(dtype).permute(0, 2, 3, 1).contiguous()
    box, grad = rois[:, 1:5].to(dtype), _bins_last(grad_output, dtype)
    total, total_offset = torch.zeros_like(maps), torch.zeros_like(offset, dtype=dtype)
    shift = offset.detach().to(dtype)
    extent = (box[:, 2:] * spatial_scale - 0.5) - (box[:, :2] * spatial_scale - 0.5)
    grids, places = roi_sampling.shifted_places(box, shift, bins, spatial_scale, sampling_ratio, gamma)
    with torch.enable_grad():
        maps.requires_grad_()
        for block, y, x in roi_sampling.sample_blocks(grids, places, bins[0] * bins[1]):
            if y.shape[2] == 0:
                continue
            pooled = average_samples_torch(maps, image[block], y, x)
            total += torch.autograd.grad(pooled, maps, grad[block])[0]
            if offset.numel() > 0:
                slopes = gamma * extent[block, :, None] * _shift_slopes(maps, image[block], y, x, grad[block])
                total_offset[block] += slopes.view(len(block), 2, *bins)
    grad_input += total.permute(0, 3, 1, 2)
    grad_offset += total_offset


def _shift_slopes(maps: Tensor, image: Tensor, y: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """Compute derivatives (R, 2, P) by a shift in x and y of all samples of a point, given those by their means.

    As in the reference the unclamped position weighs the corners, also if the sample was clamped to the border.

    Args:
        maps: (B, H, W, C).
        image: (R,) the map of each region.
        y: (R, P, S) rows.
        x: (R, P, S) columns.
        grad: (R, P, C).
    """
    height, width, channels = maps.shape[1:]
    index, _ = clamped_corners(y, x, height, width)
    there = index >= 0
    rows = image[:, None, None, None] * (height * width) + index.clamp(min=0)
    corner = maps.detach().reshape(-1, channels)[rows]
    value = torch.einsum("rpskc,rpc->rpsk", corner, grad) * there
    low_y, low_x = y.clamp(0, height - 1).floor(), x.clamp(0, width - 1).floor()
    high_y, high_x = (low_y + 1).clamp(max=height - 1), (low_x + 1).clamp(max=width - 1)
    v00, v01, v10, v11 = value.unbind(-1)
    by_x = v11 * (y - low_y) + v01 * (high_y - y) + v10 * (low_y - y) + v00 * (y - high_y)
    by_y = v11 * (x - low_x) + v10 * (high_x - x) + v01 * (low_x - x) + v00 * (x - high_x)
    return torch.stack((by_x.sum(2), by_y.sum(2)), dim=1) / y.shape[2]


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of `roi_pool_forward` by the map; it wrote `argmax`.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: an image of a region or a pixel in `argmax` is out of range.
    """
    image = _check(grad_output, rois, grad_input, 5, (pooled_height, pooled_width))
    check_shape("argmax", argmax, *grad_output.shape)
    check_same_device(grad_output=grad_output, argmax=argmax)
    check_indices("argmax", argmax, grad_input.shape[2] * grad_input.shape[3], least=-1)
    if grad_output.numel() == 0:
        return
    plane = image[:, None] * grad_input.shape[1] + torch.arange(grad_input.shape[1], device=image.device)
    one = torch.ones((*argmax.shape, 1), dtype=compute_dtype(grad_input), device=argmax.device)
    add_at_corners(grad_input, plane[:, :, None, None], argmax.long()[..., None], one, grad_output)


def prroi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of `prroi_pool_forward` by the map; raises as `roi_align_backward`."""
    bins = (pooled_height, pooled_width)
    image = _check(grad_output, rois, grad_input, 5, bins)
    if grad_output.numel() == 0:
        return
    dtype = compute_dtype(grad_input)
    box = rois[:, 1:5].double() * spatial_scale
    down, across = (one.to(dtype) for one in roi_pool.integral_weights(box, bins, grad_input.shape[2:]))
    grad = grad_output.detach().to(dtype)
    for number in range(grad_input.shape[0]):
        for rows in torch.split((image == number).nonzero().squeeze(1), 64):
            spread = torch.einsum("rcij,riy,rjx->cyx", grad[rows], down[rows], across[rows])
            grad_input[number] += spread.to(grad_input.dtype)


def prroi_pool_coor_backward(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    grad_rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of `prroi_pool_forward` by the regions' corners, (R, 5) with 0 for the image.

    `output` is unused. Raises as `roi_align_backward`.
    """
    bins = (pooled_height, pooled_width)
    image = _check(grad_output, rois, input, 5, bins, "input")
    check_shape("grad_rois", grad_rois, *rois.shape)
    check_floating(grad_rois=grad_rois)
    check_same_device(rois=rois, grad_rois=grad_rois)
    if grad_output.numel() == 0:
        return
    # Differences of nearly equal numbers: always in float64.
    maps, grad = input.detach().double(), grad_output.detach().double()
    with torch.enable_grad():
        corners = rois[:, 1:5].detach().double().requires_grad_()
        for number in range(maps.shape[0]):
            for rows in torch.split((image == number).nonzero().squeeze(1), 64):
                down, across = roi_pool.integral_weights(corners[rows] * spatial_scale, bins, maps.shape[2:])
                pooled = torch.einsum("cyx,riy,rjx->rcij", maps[number], down, across)
                (found,) = torch.autograd.grad(pooled, corners, grad[rows])
                grad_rois[:, 1:5] += found.to(grad_rois.dtype)


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Add the gradient of `border_align_forward` by the map; it wrote `argmax_idx`.

    Raises:
        TypeError, ValueError: a tensor of wrong dtype, shape or device.
        IndexError: a sample in `argmax_idx` is out of range.
    """
    channels, count = roi_pool.check_borders(grad_input, boxes, pool_size, "grad_input")
    shape = (grad_input.shape[0], channels, count, roi_pool.BORDERS)
    for name, tensor in (("grad_output", grad_output), ("argmax_idx", argmax_idx)):
        check_shape(name, tensor, *shape)
        check_same_device(**{"grad_input": grad_input, name: tensor})
    check_floating(grad_output=grad_output)
    check_indices("argmax_idx", argmax_idx, pool_size + 1)
    if grad_output.numel() == 0:
        return
    dtype = compute_dtype(grad_input)
    corners, step = boxes.detach().to(dtype), argmax_idx.to(dtype)
    size = (corners[..., 2:] - corners[..., :2]) / pool_size
    none = torch.zeros_like(size[..., 0])
    # (B, 1, N, 4): start and direction of each border, as in the forward function.
    x, y = corners[..., [0, 0, 2, 2]][:, None], corners[..., [1, 1, 3, 3]][:, None]
    step_x = torch.stack((size[..., 0], none, -size[..., 0], none), dim=-1)[:, None]
    step_y = torch.stack((none, size[..., 1], none, -size[..., 1]), dim=-1)[:, None]
    pixel, weights = clamped_corners(y + step * step_y, x + step * step_x, *grad_input.shape[2:])
    image = torch.arange(shape[0], device=boxes.device)[:, None, None, None] * roi_pool.BORDERS
    border = torch.arange(roi_pool.BORDERS, device=boxes.device)
    plane = (image + border) * channels + torch.arange(channels, device=boxes.device)[:, None, None]
    add_at_corners(grad_input, plane, pixel, weights, grad_output)


def _check(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    width: int,
    bins: tuple[int, int],
    name: str = "grad_input",
) -> Tensor:
    check_rank(name, grad_input, 4)
    return roi_sampling.check_pooling(grad_input, rois, grad_output, width, bins, name, "grad_output")


def _bins_last(grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshape (R, C, bins y, bins x) to (R, bins, C)."""
    return grad_output.detach().to(dtype).flatten(2).transpose(1, 2)


def _spread(
    grad_output: Tensor, image: Tensor, grids: Tensor, places: roi_sampling.Places, grad_input: Tensor
) -> None:
    """Add the gradient of means of samples to their map."""
    dtype = compute_dtype(grad_input)
    grad = _bins_last(grad_output, dtype)
    batch, channels, height, width = grad_input.shape
    total = torch.zeros((batch, height, width, channels), dtype=dtype, device=grad_input.device)
    with torch.enable_grad():
        maps = torch.zeros_like(total, requires_grad=True)
        for block, y, x in roi_sampling.sample_blocks(grids, places, grad.shape[1]):
            if y.shape[2] > 0:
                pooled = average_samples_torch(maps, image[block], y, x)
                total += torch.autograd.grad(pooled, maps, grad[block])[0]
    grad_input += total.permute(0, 3, 1, 2)
