"""Features in rotated frames, correlation of two maps, shifts in time.

Rotated feature alignment (Yang et al., R3Det, AAAI 2021), active rotating filters (Zhou et al., ORN, CVPR
2017), the correlation volume of optical flow (Dosovitskiy et al., FlowNet, ICCV 2015) and the temporal
interlace shift (Shao et al., TIN, AAAI 2020). The references are the kernels of the same names in mmcv 2.1.0.
Knows nothing of detectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.bilinear import average_samples, working_dtype
from serve.ops.checks import check_rank, check_same_device

__all__ = [
    "active_rotated_filter_backward",
    "active_rotated_filter_forward",
    "correlation_forward",
    "rotated_feature_align_forward",
    "tin_shift_backward",
    "tin_shift_forward",
]

POINTS = (1, 5)
# Which half sides, with which signs, lead from the centre to the four corners.
CORNERS = ((0, (1.0, -1.0, -1.0, 1.0)), (1, (1.0, 1.0, -1.0, -1.0)))


def rotated_feature_align_forward(
    features: Tensor, best_bboxes: Tensor, output: Tensor, spatial_scale: float, points: int
) -> None:
    """Add to each pixel samples of the map at the centre, and the corners, of its rotated box.

    Args:
        features: (B, C, H, W) floating point.
        best_bboxes: (B, H, W, 5): centre y, centre x, width, height in image pixels, angle in radians; the
            reference reads the first column as y.
        output: as `features`, written in place.
        spatial_scale: map pixels per image pixel.
        points: 1 for the centre, 5 for centre and corners.

    Raises:
        ValueError: a shape or `points` does not fit.
    """
    check_rank("features", features, 4)
    dtype = working_dtype(features)
    check_same_device(features=features, best_bboxes=best_bboxes, output=output)
    batch, _, height, width = features.shape
    if points not in POINTS:
        raise ValueError(f"points must be 1 or 5, got {points}")
    if tuple(best_bboxes.shape) != (batch, height, width, 5):
        raise ValueError(f"best_bboxes must be {(batch, height, width, 5)}, got {tuple(best_bboxes.shape)}")
    if output.shape != features.shape:
        raise ValueError(f"output must be {tuple(features.shape)}, got {tuple(output.shape)}")
    if output.numel() == 0:
        return
    boxes = best_bboxes.detach().to(dtype).reshape(-1, 5)
    y, x = boxes[:, 0, None] * spatial_scale, boxes[:, 1, None] * spatial_scale
    if points > 1:
        half = boxes[:, 2:4] * (spatial_scale / 2)
        cos, sin = torch.cos(boxes[:, 4, None]), torch.sin(boxes[:, 4, None])
        along, upward = (half[:, side, None] * half.new_tensor(signs) for side, signs in CORNERS)
        x = torch.cat((x, x + cos * along - sin * upward), dim=1)
        y = torch.cat((y, y + sin * along + cos * upward), dim=1)
    maps = features.detach().permute(0, 2, 3, 1).to(dtype).contiguous()
    image = torch.arange(batch, device=features.device).repeat_interleave(height * width)
    mean = average_samples(maps, image, y[:, None], x[:, None]).view(maps.shape)
    output.copy_((maps + mean * points).permute(0, 3, 1, 2))


def active_rotated_filter_forward(input: Tensor, indices: Tensor, output: Tensor) -> None:
    """Write rotated copies of oriented filters.

    Args:
        input: (O, I, orientations, kH, kW).
        indices: (orientations, kH, kW, rotations) int: for each entry of a filter its place, from 1, after
            each rotation.
        output: (O * rotations, I * orientations, kH, kW), written in place.

    Raises:
        ValueError: a shape does not fit.
        IndexError: an index is out of range.
    """
    place = _filter_places(input, indices, output)
    outer, inner = input.shape[:2]
    entries, rotations = place.shape
    flat = input.detach().reshape(outer, inner, entries)
    turned = output.new_zeros((outer, rotations, inner, entries))
    index = place.t()[None, :, None].expand(outer, rotations, inner, entries)
    turned.scatter_(3, index, flat[:, None].expand(index.shape).to(turned.dtype))
    output.copy_(turned.view(output.shape))


def active_rotated_filter_backward(grad_out: Tensor, indices: Tensor, grad_in: Tensor) -> None:
    """Write into `grad_in` the gradient of `active_rotated_filter_forward`: the sum over the copies."""
    place = _filter_places(grad_in, indices, grad_out)
    outer, inner = grad_in.shape[:2]
    entries, rotations = place.shape
    turned = grad_out.detach().reshape(outer, rotations, inner, entries)
    index = place.t()[None, :, None].expand(turned.shape)
    grad_in.copy_(turned.gather(3, index).sum(dim=1).view(grad_in.shape))


def _filter_places(filters: Tensor, indices: Tensor, turned: Tensor) -> Tensor:
    """(entries, rotations) int64 places from 0."""
    check_rank("input", filters, 5)
    check_rank("indices", indices, 4)
    check_same_device(input=filters, indices=indices, output=turned)
    outer, inner, orientations, height, width = filters.shape
    if tuple(indices.shape[:3]) != (orientations, height, width):
        raise ValueError(
            f"indices must be {(orientations, height, width)} x rotations, got {tuple(indices.shape)}"
        )
    rotations = indices.shape[3]
    expected = (outer * rotations, inner * orientations, height, width)
    if tuple(turned.shape) != expected:
        raise ValueError(f"output must be {expected}, got {tuple(turned.shape)}")
    place = indices.reshape(-1, rotations).long() - 1
    if place.numel() > 0:
        low, high = torch.stack(torch.aminmax(place)).tolist()
        if low < 0 or high >= place.shape[0]:
            raise IndexError(f"indices must lie in 1..{place.shape[0]}, got {low + 1}..{high + 1}")
    return place


def correlation_forward(
    input1: Tensor,
    input2: Tensor,
    output: Tensor,
    kH: int,
    kW: int,
    patchH: int,
    patchW: int,
    padH: int,
    padW: int,
    dilationH: int,
    dilationW: int,
    dilation_patchH: int,
    dilation_patchW: int,
    dH: int,
    dW: int,
) -> None:
    """Scalar products of windows of `input1` with shifted windows of `input2`; zeros outside.

    Args:
        input1: (B, C, H, W) floating point.
        input2: (B, C, H, W).
        output: (B, patchH, patchW, H', W'), written in place.
        kH: window height.
        kW: window width.
        patchH: shifts down, centred.
        patchW: shifts across, centred.
        padH: zeros above and below `input1`.
        padW: zeros left and right.
        dilationH: distance of window rows.
        dilationW: distance of window columns.
        dilation_patchH: pixels per shift down.
        dilation_patchW: pixels per shift across.
        dH: stride down.
        dW: stride across.

    Raises:
        ValueError: a shape does not fit.
    """
    check_rank("input1", input1, 4)
    dtype = working_dtype(input1)
    check_same_device(input1=input1, input2=input2, output=output)
    if input2.shape != input1.shape:
        raise ValueError(f"input2 must be {tuple(input1.shape)}, got {tuple(input2.shape)}")
    if min(kH, kW, patchH, patchW, dilationH, dilationW, dilation_patchH, dilation_patchW, dH, dW) < 1:
        raise ValueError("kernel, patch, dilations and strides must be positive")
    if min(padH, padW) < 0:
        raise ValueError(f"padding must be at least 0, got {padH} and {padW}")
    batch, _, height, width = input1.shape
    rows = (height + 2 * padH - ((kH - 1) * dilationH + 1)) // dH + 1
    columns = (width + 2 * padW - ((kW - 1) * dilationW + 1)) // dW + 1
    if tuple(output.shape) != (batch, patchH, patchW, rows, columns):
        raise ValueError(
            f"output must be {(batch, patchH, patchW, rows, columns)}, got {tuple(output.shape)}"
        )
    if output.numel() == 0:
        return
    reach_h = dilation_patchH * (patchH - 1) // 2
    reach_w = dilation_patchW * (patchW - 1) // 2
    first = input1.detach().to(dtype)
    # One spare margin: with an even patch the last shift reaches further than the first.
    far_h, far_w = dilation_patchH * (patchH - 1), dilation_patchW * (patchW - 1)
    second = functional.pad(input2.detach().to(dtype), (reach_w, far_w, reach_h, far_h))
    window = first.new_ones((1, 1, kH, kW))
    for i in range(patchH):
        for j in range(patchW):
            top, left = i * dilation_patchH, j * dilation_patchW
            product = (first * second[:, :, top : top + height, left : left + width]).sum(1, keepdim=True)
            summed = functional.conv2d(product, window, None, (dH, dW), (padH, padW), (dilationH, dilationW))
            output[:, i, j] = summed[:, 0].to(output.dtype)


def tin_shift_forward(input: Tensor, shift: Tensor, output: Tensor) -> None:
    """Shift groups of channels in time; what comes from outside is zero.

    Args:
        input: (B, T, C, S).
        shift: (B, G) int: frames by which each of G equal groups of channels moves forward.
        output: as `input`, written in place.

    Raises:
        ValueError: a shape does not fit.
    """
    _shift(input, shift, output, 1)


def tin_shift_backward(grad_output: Tensor, shift: Tensor, grad_input: Tensor) -> None:
    """Write into `grad_input` the gradient of `tin_shift_forward`: the shift backwards."""
    _shift(grad_output, shift, grad_input, -1)


def _shift(source: Tensor, shift: Tensor, target: Tensor, sign: int) -> None:
    check_rank("input", source, 4)
    check_rank("shift", shift, 2)
    check_same_device(input=source, shift=shift, output=target)
    batch, frames, channels, _ = source.shape
    groups = shift.shape[1]
    if target.shape != source.shape:
        raise ValueError(f"output must be {tuple(source.shape)}, got {tuple(target.shape)}")
    if shift.is_floating_point() or shift.shape[0] != batch or groups < 1 or channels % groups:
        raise ValueError(
            f"shift must be integers ({batch}, a divisor of {channels}), "
            f"got {tuple(shift.shape)} {shift.dtype}"
        )
    if target.numel() == 0:
        return
    moved = sign * shift.long().repeat_interleave(channels // groups, dim=1)
    origin = torch.arange(frames, device=source.device)[None, :, None] - moved[:, None]
    there = (origin >= 0) & (origin < frames)
    index = origin.clamp(0, frames - 1)[..., None].expand(source.shape)
    values = source.detach().gather(1, index)
    target.copy_(torch.where(there[..., None], values, torch.zeros_like(values)))
