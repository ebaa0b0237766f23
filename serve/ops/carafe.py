"""CARAFE upsampling (Wang et al., ICCV 2019): each output pixel is a weighted sum of the pixels around its source.

The reference is mmcv 2.1.0 `csrc/common/cuda/carafe_naive_cuda_kernel.cuh`. Gradients come from autograd on the torch
version.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_rank,
    check_same_device,
    check_shape,
    check_tensor,
    compute_dtype,
    uses_float32_kernel,
)
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for

__all__ = ["carafe_backward", "carafe_forward", "carafe_naive_backward", "carafe_naive_forward"]

F32 = npt.NDArray[np.float32]
ELEMENTS_PER_BLOCK = 1 << 26
STRIP = 16


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Run `carafe_naive_forward`; copy `features` to `rfeatures` (same shape) for the backward function.

    `routput` and `rmasks` are buffers of mmcv's kernel and unused.
    """
    _check(features, masks, output, kernel_size, group_size, scale_factor, "output")
    check_tensor(("features", features), "rfeatures", rfeatures, *features.shape)
    rfeatures.detach().copy_(features.detach())
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Upsample by reassembly; zeros outside the map.

    Args:
        features: (B, C, H, W) floating point.
        masks: (B, group_size * kernel_size^2, H * scale_factor, W * scale_factor): weights of the window
            around pixel (y // scale_factor, x // scale_factor), row by row.
        output: (B, C, H * scale_factor, W * scale_factor), written in place.
        kernel_size: side of the window, odd.
        group_size: groups of channels with their own weights.
        scale_factor: output pixels per pixel and axis.

    Raises:
        ValueError: a shape does not fit.
        TypeError: `features` is not floating point.
    """
    _check(features, masks, output, kernel_size, group_size, scale_factor, "output")
    if output.numel() == 0:
        return
    dtype = compute_dtype(features)
    maps, weights = features.detach().to(dtype), masks.detach().to(dtype)
    if not uses_float32_kernel(features):
        output.copy_(reassemble_torch(maps, weights, kernel_size, group_size, scale_factor))
        return
    source = as_numpy(maps.permute(0, 2, 3, 1))
    direct = output.dtype == torch.float32 and output.is_contiguous()
    result = output if direct else output.new_empty(output.shape, dtype=torch.float32)
    window, made = as_numpy(weights), as_numpy(result)

    def work(first: int, last: int) -> None:
        _reassemble_kernel(source, window, made, kernel_size, group_size, scale_factor, first, last)

    parallel_for(work, output.shape[0] * output.shape[2])
    if not direct:
        output.copy_(result)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Run `carafe_naive_backward` with the features that `carafe_forward` saved; the ``r`` buffers are unused."""
    check_rank("rfeatures", rfeatures, 4)
    check_floating(rfeatures=rfeatures)
    carafe_naive_backward(
        top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor
    )


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients of `carafe_naive_forward` to `bottom_grad` and `mask_grad`, given `top_grad` of its output."""
    _check(features, masks, top_grad, kernel_size, group_size, scale_factor, "top_grad")
    for name, grad, like in (("bottom_grad", bottom_grad, features), ("mask_grad", mask_grad, masks)):
        check_tensor(("features", features), name, grad, *like.shape)
    if top_grad.numel() == 0:
        return
    dtype = compute_dtype(features)
    with torch.enable_grad():
        leaves = [one.detach().to(dtype).requires_grad_() for one in (features, masks)]
        made = reassemble_torch(leaves[0], leaves[1], kernel_size, group_size, scale_factor)
        grads = torch.autograd.grad(made, leaves, top_grad.to(dtype))
    bottom_grad += grads[0]
    mask_grad += grads[1]


def _check(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    name: str,
) -> None:
    check_rank("features", features, 4)
    check_floating(features=features, masks=masks, **{name: output})
    check_same_device(features=features, masks=masks, **{name: output})
    batch, channels, height, width = features.shape
    if kernel_size < 1 or kernel_size % 2 == 0 or scale_factor < 1:
        raise ValueError(
            f"kernel_size must be odd and scale_factor positive, got {kernel_size} and {scale_factor}"
        )
    if group_size < 1 or channels % group_size:
        raise ValueError(f"features must have a multiple of group_size={group_size} channels, got {channels}")
    size = (height * scale_factor, width * scale_factor)
    check_shape("masks", masks, batch, group_size * kernel_size**2, *size)
    check_shape(name, output, batch, channels, *size)


def reassemble_torch(maps: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    """Reassemble on any device, differentiably: one small matrix product per source pixel and group, by rows."""
    batch, channels, height, width = maps.shape
    per_group, taps, margin = channels // groups, kernel * kernel, kernel // 2
    padded = functional.pad(maps, (margin,) * 4)
    step = max(1, ELEMENTS_PER_BLOCK // (batch * channels * taps * width))
    parts = []
    for top in range(0, height, step):
        rows = min(step, height - top)
        windows = functional.unfold(padded[:, :, top : top + rows + 2 * margin], kernel)
        windows = windows.view(batch, groups, per_group, taps, rows, width).permute(0, 1, 4, 5, 2, 3)
        weights = masks[:, :, top * scale : (top + rows) * scale]
        weights = weights.reshape(batch, groups, taps, rows, scale, width, scale)
        weights = weights.permute(0, 1, 3, 5, 2, 4, 6).flatten(5)
        made = (windows @ weights).view(batch, groups, rows, width, per_group, scale, scale)
        made = made.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, channels, rows * scale, width * scale)
        parts.append(made)
    return torch.cat(parts, dim=2)


@jit
def _reassemble_kernel(
    maps: F32, masks: F32, made: F32, kernel: int, groups: int, scale: int, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Compute output lines first:last; `maps` is channels-last, `masks` and `made` are channels-first."""
    height, width, channels = maps.shape[1], maps.shape[2], maps.shape[3]
    lines, columns = made.shape[2], made.shape[3]
    per_group, margin = channels // groups, kernel // 2
    zero = np.float32(0)
    weights = np.empty(kernel * kernel, dtype=np.float32)
    places = np.empty((kernel * kernel, 2), dtype=np.int64)
    # A cache line of pixels, channels last; written to the output channel by channel.
    strip = np.empty((STRIP, channels), dtype=np.float32)
    for line in range(first, last):
        b, row = line // lines, line % lines
        top = row // scale - margin
        for start in range(0, columns, STRIP):
            size = min(STRIP, columns - start)
            for k in range(size):
                column = start + k
                left = column // scale - margin
                for g in range(groups):
                    begin = g * per_group
                    out = strip[k, begin : begin + per_group]
                    out[:] = zero
                    count = 0
                    for u in range(max(0, -top), min(kernel, height - top)):
                        for v in range(max(0, -left), min(kernel, width - left)):
                            weights[count] = masks[b, (g * kernel + u) * kernel + v, row, column]
                            places[count, 0], places[count, 1] = top + u, left + v
                            count += 1
                    # Four taps at a time: a quarter of the loads and stores of `out`.
                    t = 0
                    while t + 4 <= count:
                        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
                        p0 = maps[b, places[t, 0], places[t, 1], begin : begin + per_group]
                        p1 = maps[b, places[t + 1, 0], places[t + 1, 1], begin : begin + per_group]
                        p2 = maps[b, places[t + 2, 0], places[t + 2, 1], begin : begin + per_group]
                        p3 = maps[b, places[t + 3, 0], places[t + 3, 1], begin : begin + per_group]
                        for ch in range(per_group):
                            out[ch] += w0 * p0[ch] + w1 * p1[ch] + w2 * p2[ch] + w3 * p3[ch]
                        t += 4
                    while t < count:
                        w0 = weights[t]
                        p0 = maps[b, places[t, 0], places[t, 1], begin : begin + per_group]
                        for ch in range(per_group):
                            out[ch] += w0 * p0[ch]
                        t += 1
            for ch in range(channels):
                for k in range(size):
                    made[b, ch, row, start + k] = strip[k, ch]
