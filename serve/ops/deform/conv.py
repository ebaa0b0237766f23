"""Deformable convolution v1 (Dai et al., ICCV 2017) and v2, with a mask (Zhu et al., CVPR 2019).

Each kernel tap reads the input at its position shifted by an offset per output pixel and deformable group, with
bilinear interpolation and zeros outside. The reference is mmcv 2.1.0 `csrc/pytorch/cpu/deform_conv.cpp` and
`modulated_deform_conv.cpp`. Gradients come from autograd on the torch version. This module has mmcv's argument lists;
`serve.ops.deform.columns` does the work.
"""

from __future__ import annotations

from torch import Tensor

from serve.ops.checks import check_tensor
from serve.ops.deform.columns import Geometry, check, convolve, gradients

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]

NAMES = ("kH", "kW", "dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
MODULATED_NAMES = (
    "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w",
    "dilation_h", "dilation_w", "group", "deformable_group",
)  # fmt: skip


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve with deformable taps, v1.

    Args:
        input: (B, C, H, W) floating point.
        weight: (O, C / group, kH, kW).
        offset: (B, deformable_group * 2 * kH * kW, H', W'): for each tap dy, then dx, in pixels.
        output: (B, O, H', W'), written in place.
        columns: unused buffer of mmcv's kernel.
        ones: unused buffer of mmcv's kernel.
        kW: kernel width.
        kH: kernel height.
        dW: stride across.
        dH: stride down.
        padW: zeros added left and right.
        padH: zeros added above and below.
        dilationW: distance of taps across.
        dilationH: distance of taps down.
        group: groups of the convolution.
        deformable_group: groups of channels with their own offsets.
        im2col_step: unused; blocks bound the memory for any batch.

    Raises:
        ValueError: a shape does not fit the others; the message names it.
        TypeError: `input` is not floating point.
    """
    geometry = Geometry(
        (kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group, NAMES
    )
    check(input, weight, None, offset, None, output, geometry)
    convolve(input, weight, None, offset, None, output, geometry)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolve with deformable taps, v2: as `deform_conv_forward`, each sample times its mask.

    Args:
        input: (B, C, H, W) floating point.
        weight: (O, C / group, kernel_h, kernel_w).
        bias: (O,), used if `with_bias`.
        ones: unused buffer of mmcv's kernel.
        offset: (B, deformable_group * 2 * taps, H', W') pixels.
        mask: (B, deformable_group * taps, H', W').
        output: (B, O, H', W'), written in place.
        columns: unused buffer of mmcv's kernel.
        kernel_h: kernel height.
        kernel_w: kernel width.
        stride_h: stride down.
        stride_w: stride across.
        pad_h: zeros added above and below.
        pad_w: zeros added left and right.
        dilation_h: distance of taps down.
        dilation_w: distance of taps across.
        group: groups of the convolution.
        deformable_group: groups of channels with their own offsets and masks.
        with_bias: add `bias`.

    Raises:
        ValueError: a shape does not fit the others; the message names it.
        TypeError: `input` is not floating point.
    """
    geometry = Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w),
        group, deformable_group, MODULATED_NAMES,
    )  # fmt: skip
    added = bias if with_bias else None
    if offset.shape[2:] == mask.shape[2:]:
        offset, mask = _as_read(offset, output), _as_read(mask, output)
    check(input, weight, added, offset, mask, output, geometry)
    convolve(input, weight, added, offset, mask, output, geometry)


def _as_read(maps: Tensor, output: Tensor) -> Tensor:
    """Reinterpret offsets or masks (B, C, H, W) of a larger map than `output` as the reference does.

    The reference reads each image's memory with the strides of the output's size (`modulated_deformable_im2col` in mmcv
    2.1.0). mmdet's DyHead passes those of the level below, and its published weights were trained that way.
    """
    if maps.dim() != 4 or output.dim() != 4 or len(maps) != len(output):
        return maps
    rows, columns = output.shape[2:]
    if maps.shape[2:] == output.shape[2:] or maps.shape[2] * maps.shape[3] <= rows * columns:
        return maps
    channels = maps.shape[1]
    return maps.flatten(1)[:, : channels * rows * columns].view(len(maps), channels, rows, columns)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the gradients of `deform_conv_forward` to `gradInput` and `gradOffset`; arguments as there."""
    geometry = Geometry(
        (kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group, NAMES
    )
    check(input, weight, None, offset, None, gradOutput, geometry, output_name="gradOutput")
    _check_grads(gradInput=(gradInput, input), gradOffset=(gradOffset, offset))
    grads = gradients(input, weight, None, offset, None, gradOutput, geometry, "io")
    gradInput += grads[0]
    gradOffset += grads[1]


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add `scale` times the gradient of the weight to `gradWeight`; arguments as in the forward."""
    geometry = Geometry(
        (kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group, NAMES
    )
    check(input, gradWeight, None, offset, None, gradOutput, geometry, "gradWeight", "gradOutput")
    # The convolution is linear in its weight, so its gradient is the same for any weight.
    gradWeight += scale * gradients(input, gradWeight, None, offset, None, gradOutput, geometry, "w")[0]


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the gradients of `modulated_deform_conv_forward` to the ``grad_`` tensors; arguments as there."""
    geometry = Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w),
        group, deformable_group, MODULATED_NAMES,
    )  # fmt: skip
    added = bias if with_bias else None
    check(input, weight, added, offset, mask, grad_output, geometry, output_name="grad_output")
    _check_grads(
        grad_input=(grad_input, input), grad_weight=(grad_weight, weight), grad_offset=(grad_offset, offset),
        grad_mask=(grad_mask, mask), **({"grad_bias": (grad_bias, bias)} if with_bias else {}),
    )  # fmt: skip
    targets = [grad_input, grad_weight, grad_offset, grad_mask, *([grad_bias] if with_bias else [])]
    wanted = "iwomb" if with_bias else "iwom"
    grads = gradients(input, weight, added, offset, mask, grad_output, geometry, wanted)
    for target, grad in zip(targets, grads, strict=True):
        target += grad


def _check_grads(**grads: tuple[Tensor, Tensor]) -> None:
    """Raise unless each gradient has the shape, dtype and device of its tensor."""
    for name, (grad, of) in grads.items():
        check_tensor((name.removeprefix("grad_").removeprefix("grad").lower(), of), name, grad, *of.shape)
