"""Features in rotated frames, correlation of two maps, shifts in time.

Rotated feature alignment (Yang et al., R3Det, AAAI 2021), active rotating filters (Zhou et al., ORN, CVPR
2017), the correlation volume of optical flow (Dosovitskiy et al., FlowNet, ICCV 2015) and the temporal
interlace shift (Shao et al., TIN, AAAI 2020). The references are the kernels of the same names in mmcv 2.1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.checks import (
    check_floating,
    check_indices,
    check_integer,
    check_rank,
    check_same_device,
    check_shape,
    check_writable_from,
    compute_dtype,
)
from serve.ops.roi.bilinear import average_samples, average_samples_torch

__all__ = [
    "active_rotated_filter_backward",
    "active_rotated_filter_forward",
    "correlation_backward",
    "correlation_forward",
    "rotated_feature_align_backward",
    "rotated_feature_align_forward",
    "tin_shift_backward",
    "tin_shift_forward",
]

POINTS = (1, 5)
# The last twelve arguments of the correlation kernels.
STEPS = (
    "kH", "kW", "patchH", "patchW", "padH", "padW",
    "dilationH", "dilationW", "dilation_patchH", "dilation_patchW", "dH", "dW",
)  # fmt: skip
# Signs of the half sides from the centre to the four corners.
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
    _check_aligned(features, best_bboxes, output, points, "features", "output")
    if output.numel() == 0:
        return
    image, y, x = _aligned_places(best_bboxes, compute_dtype(features), spatial_scale, points)
    maps = features.detach().permute(0, 2, 3, 1).to(y.dtype).contiguous()
    mean = average_samples(maps, image, y[:, None], x[:, None]).view(maps.shape)
    output.copy_((maps + mean * points).permute(0, 3, 1, 2))


def rotated_feature_align_backward(
    grad_output: Tensor, best_bboxes: Tensor, grad_input: Tensor, spatial_scale: float, points: int
) -> None:
    """Add to `grad_input` the gradient of `rotated_feature_align_forward` with respect to the map."""
    _check_aligned(grad_input, best_bboxes, grad_output, points, "grad_input", "grad_output")
    if grad_output.numel() == 0:
        return
    image, y, x = _aligned_places(best_bboxes, compute_dtype(grad_input), spatial_scale, points)
    grad = grad_output.detach().to(y.dtype).permute(0, 2, 3, 1)
    with torch.enable_grad():
        maps = torch.zeros_like(grad, memory_format=torch.contiguous_format, requires_grad=True)
        mean = average_samples_torch(maps, image, y[:, None], x[:, None]).view(maps.shape)
        (spread,) = torch.autograd.grad(maps + mean * points, maps, grad)
    grad_input += spread.permute(0, 3, 1, 2)


def _check_aligned(
    features: Tensor, best_bboxes: Tensor, output: Tensor, points: int, name: str, output_name: str
) -> None:
    check_rank(name, features, 4)
    check_floating(**{name: features})
    check_same_device(**{name: features, "best_bboxes": best_bboxes, output_name: output})
    if points not in POINTS:
        raise ValueError(f"points must be 1 or 5, got {points}")
    batch, _, height, width = features.shape
    check_shape("best_bboxes", best_bboxes, batch, height, width, 5)
    check_shape(output_name, output, *features.shape)
    check_floating(**{"best_bboxes": best_bboxes, output_name: output})


def _aligned_places(
    best_bboxes: Tensor, dtype: torch.dtype, scale: float, points: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image (P,) of each pixel, and the rows and columns (P, points) to sample."""
    batch, height, width = best_bboxes.shape[:3]
    boxes = best_bboxes.detach().to(dtype).reshape(-1, 5)
    y, x = boxes[:, 0, None] * scale, boxes[:, 1, None] * scale
    if points > 1:
        half = boxes[:, 2:4] * (scale / 2)
        cos, sin = torch.cos(boxes[:, 4, None]), torch.sin(boxes[:, 4, None])
        along, upward = (half[:, side, None] * half.new_tensor(signs) for side, signs in CORNERS)
        x = torch.cat((x, x + cos * along - sin * upward), dim=1)
        y = torch.cat((y, y + sin * along + cos * upward), dim=1)
    image = torch.arange(batch, device=boxes.device).repeat_interleave(height * width)
    return image, y, x


def active_rotated_filter_forward(input: Tensor, indices: Tensor, output: Tensor) -> None:
    """Write rotated copies of oriented filters.

    Args:
        input: (O, I, orientations, kH, kW).
        indices: (orientations, kH, kW, rotations) int: position of each filter entry after each rotation,
            counted from 1.
        output: (O * rotations, I * orientations, kH, kW), written in place.

    Raises:
        ValueError: a shape does not fit.
        IndexError: an index is out of range.
    """
    place = _filter_places(input, indices, output, "input", "output")
    outer, inner = input.shape[:2]
    entries, rotations = place.shape
    flat = input.detach().reshape(outer, inner, entries)
    turned = output.new_zeros((outer, rotations, inner, entries))
    index = place.t()[None, :, None].expand(outer, rotations, inner, entries)
    turned.scatter_(3, index, flat[:, None].expand(index.shape).to(turned.dtype))
    output.copy_(turned.view(output.shape))


def active_rotated_filter_backward(grad_out: Tensor, indices: Tensor, grad_in: Tensor) -> None:
    """Write into `grad_in` the gradient of `active_rotated_filter_forward`: the sum over the copies."""
    place = _filter_places(grad_in, indices, grad_out, "grad_in", "grad_out")
    outer, inner = grad_in.shape[:2]
    entries, rotations = place.shape
    turned = grad_out.detach().reshape(outer, rotations, inner, entries)
    index = place.t()[None, :, None].expand(turned.shape)
    grad_in.copy_(turned.gather(3, index).sum(dim=1).view(grad_in.shape))


def _filter_places(filters: Tensor, indices: Tensor, turned: Tensor, name: str, turned_name: str) -> Tensor:
    """Check the arguments; return (entries, rotations) int64 positions, counted from 0."""
    check_rank(name, filters, 5)
    check_rank("indices", indices, 4)
    check_floating(**{name: filters, turned_name: turned})
    check_same_device(**{name: filters, "indices": indices, turned_name: turned})
    outer, inner, orientations, height, width = filters.shape
    if tuple(indices.shape[:3]) != (orientations, height, width):
        raise ValueError(
            f"indices must be {(orientations, height, width)} x rotations, got {tuple(indices.shape)}"
        )
    rotations = indices.shape[3]
    expected = (outer * rotations, inner * orientations, height, width)
    check_shape(turned_name, turned, *expected)
    entries = orientations * height * width
    check_indices("indices", indices, entries + 1, least=1)
    return indices.reshape(entries, rotations).long() - 1


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
    """Write scalar products of windows of `input1` with shifted windows of `input2`; zeros outside.

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
    steps = (
        kH,
        kW,
        patchH,
        patchW,
        padH,
        padW,
        dilationH,
        dilationW,
        dilation_patchH,
        dilation_patchW,
        dH,
        dW,
    )
    _check_correlation(input1, input2, output, steps, "output")
    if output.numel() > 0:
        dtype = compute_dtype(input1)
        output.copy_(_correlate(input1.detach().to(dtype), input2.detach().to(dtype), steps))


def correlation_backward(
    grad_output: Tensor,
    input1: Tensor,
    input2: Tensor,
    grad_input1: Tensor,
    grad_input2: Tensor,
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
    """Add the gradients of `correlation_forward` to `grad_input1` and `grad_input2`; arguments as there."""
    steps = (
        kH,
        kW,
        patchH,
        patchW,
        padH,
        padW,
        dilationH,
        dilationW,
        dilation_patchH,
        dilation_patchW,
        dH,
        dW,
    )
    _check_correlation(input1, input2, grad_output, steps, "grad_output")
    for name, grad in (("grad_input1", grad_input1), ("grad_input2", grad_input2)):
        check_shape(name, grad, *input1.shape)
        check_floating(**{name: grad})
        check_same_device(**{"input1": input1, name: grad})
    if grad_output.numel() == 0:
        return
    dtype = compute_dtype(input1)
    with torch.enable_grad():
        leaves = [one.detach().to(dtype).requires_grad_() for one in (input1, input2)]
        made = _correlate(leaves[0], leaves[1], steps, whole_steps=True)
        grads = torch.autograd.grad(made, leaves, grad_output.to(dtype))
    grad_input1 += grads[0]
    grad_input2 += grads[1]


def _check_correlation(
    first: Tensor, second: Tensor, output: Tensor, steps: tuple[int, ...], name: str
) -> None:
    check_rank("input1", first, 4)
    check_floating(input1=first, input2=second, **{name: output})
    check_same_device(input1=first, input2=second, **{name: output})
    if second.shape != first.shape:
        raise ValueError(f"input2 must be {tuple(first.shape)}, got {tuple(second.shape)}")
    kernel_h, kernel_w, patch_h, patch_w, pad_h, pad_w, dilation_h, dilation_w, *_, stride_h, stride_w = steps
    for argument, value in zip(STEPS, steps, strict=True):
        least = 0 if argument.startswith("pad") else 1
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    batch, _, height, width = first.shape
    rows = (height + 2 * pad_h - ((kernel_h - 1) * dilation_h + 1)) // stride_h + 1
    columns = (width + 2 * pad_w - ((kernel_w - 1) * dilation_w + 1)) // stride_w + 1
    check_shape(name, output, batch, patch_h, patch_w, rows, columns)


def _correlate(first: Tensor, second: Tensor, steps: tuple[int, ...], *, whole_steps: bool = False) -> Tensor:
    """Correlate differentiably; (B, patchH, patchW, H', W') in the dtype of both.

    `whole_steps` centres an even patch on a whole number of its steps, as the reference does in its backward only.
    """
    kernel_h, kernel_w, patch_h, patch_w, pad_h, pad_w, dilation_h, dilation_w, down, across, *stride = steps
    height, width = first.shape[2:]
    # One spare margin: with an even patch the last shift reaches further than the first.
    far_h, far_w = down * (patch_h - 1), across * (patch_w - 1)
    above, before = far_h // 2, far_w // 2
    if whole_steps:
        above, before = down * ((patch_h - 1) // 2), across * ((patch_w - 1) // 2)
    padded = functional.pad(second, (before, far_w, above, far_h))
    window = first.new_ones((1, 1, kernel_h, kernel_w))
    made = []
    for i in range(patch_h):
        for j in range(patch_w):
            top, left = i * down, j * across
            product = (first * padded[:, :, top : top + height, left : left + width]).sum(1, keepdim=True)
            made.append(
                functional.conv2d(product, window, None, stride, (pad_h, pad_w), (dilation_h, dilation_w))
            )
    return torch.stack([one[:, 0] for one in made], dim=1).view(-1, patch_h, patch_w, *made[0].shape[2:])


def tin_shift_forward(input: Tensor, shift: Tensor, output: Tensor) -> None:
    """Shift groups of channels in time; where nothing comes to, `output` stays as it is (mmcv gives zeros).

    Args:
        input: (B, T, C, S).
        shift: (B, G) int: frames by which each of G equal groups of channels moves forward.
        output: as `input`, written in place.

    Raises:
        ValueError: a shape does not fit.
    """
    _shift(input, shift, output, ("input", "output"))


def tin_shift_backward(grad_output: Tensor, shift: Tensor, grad_input: Tensor) -> None:
    """Shift `grad_output` as `tin_shift_forward` does, forward too, into `grad_input`.

    That is not its gradient, but what mmcv's kernel gives; models were trained with it.
    """
    _shift(grad_output, shift, grad_input, ("grad_output", "grad_input"))


def _shift(source: Tensor, shift: Tensor, target: Tensor, names: tuple[str, str]) -> None:
    check_rank(names[0], source, 4)
    check_rank("shift", shift, 2)
    check_integer(shift=shift)
    check_same_device(**{names[0]: source, "shift": shift, names[1]: target})
    batch, frames, channels, _ = source.shape
    groups = shift.shape[1]
    check_shape(names[1], target, *source.shape)
    check_writable_from(names[1], target, names[0], source)
    if shift.shape[0] != batch or groups < 1 or channels % groups:
        raise ValueError(f"shift must be ({batch}, a divisor of {channels}), got {tuple(shift.shape)}")
    if target.numel() == 0:
        return
    moved = shift.long().repeat_interleave(channels // groups, dim=1)
    origin = torch.arange(frames, device=source.device)[None, :, None] - moved[:, None]
    there = (origin >= 0) & (origin < frames)
    index = origin.clamp(0, frames - 1)[..., None].expand(source.shape)
    values = source.detach().gather(1, index)
    target.copy_(torch.where(there[..., None], values.to(target.dtype), target))
