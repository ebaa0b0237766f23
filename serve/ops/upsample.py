"""CARAFE upsampling, convolution at chosen pixels, and the attention masks of PSANet.

CARAFE (Wang et al., ICCV 2019): every output pixel is its own weighted sum of the pixels around its source.
Masked convolution: `masked_im2col_forward` gathers windows at chosen pixels, `masked_col2im_forward` writes
pixels back. PSANet (Zhao et al., ECCV 2018): masks relative to a pixel become masks over the map. The
references are mmcv 2.1.0 `csrc/common/cuda/carafe_naive_cuda_kernel.cuh`, `masked_conv2d_cuda_kernel.cuh`
and `csrc/pytorch/cpu/psamask.cpp`. Knows nothing of the layers around them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.bilinear import on_numba, working_dtype
from serve.ops.checks import as_numpy, check_rank, check_same_device
from serve.ops.jit import jit
from serve.ops.threads import in_parts

__all__ = [
    "carafe_forward",
    "carafe_naive_forward",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "psamask_backward",
    "psamask_forward",
]

F32 = npt.NDArray[np.float32]
ELEMENTS_PER_BLOCK = 1 << 26
STRIP = 16
COLLECT, DISTRIBUTE = 0, 1


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
    """As `carafe_naive_forward`; `rfeatures`, `routput` and `rmasks` are mmcv's buffers and not used."""
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
    check_rank("features", features, 4)
    dtype = working_dtype(features)
    check_same_device(features=features, masks=masks, output=output)
    batch, channels, height, width = features.shape
    if kernel_size < 1 or kernel_size % 2 == 0 or scale_factor < 1:
        raise ValueError(
            f"kernel_size must be odd and scale_factor positive, got {kernel_size} and {scale_factor}"
        )
    if group_size < 1 or channels % group_size:
        raise ValueError(f"features must have a multiple of group_size={group_size} channels, got {channels}")
    size = (height * scale_factor, width * scale_factor)
    for name, tensor, planes in (
        ("masks", masks, group_size * kernel_size**2),
        ("output", output, channels),
    ):
        if tuple(tensor.shape) != (batch, planes, *size):
            raise ValueError(f"{name} must be {(batch, planes, *size)}, got {tuple(tensor.shape)}")
    if output.numel() == 0:
        return
    maps, weights = features.detach().to(dtype), masks.detach().to(dtype)
    if not on_numba(features):
        _reassemble_torch(maps, weights, output, kernel_size, group_size, scale_factor)
        return
    source = as_numpy(maps.permute(0, 2, 3, 1))
    direct = output.dtype == torch.float32 and output.is_contiguous()
    result = output if direct else output.new_empty(output.shape, dtype=torch.float32)
    window, made = as_numpy(weights), as_numpy(result)

    def work(first: int, last: int) -> None:
        _reassemble_kernel(source, window, made, kernel_size, group_size, scale_factor, first, last)

    in_parts(work, batch * size[0])
    if not direct:
        output.copy_(result)


def _reassemble_torch(
    maps: Tensor, masks: Tensor, output: Tensor, kernel: int, groups: int, scale: int
) -> None:
    """Any device: one small matrix product per source pixel and group, in blocks of rows."""
    batch, channels, height, width = maps.shape
    per_group, taps, margin = channels // groups, kernel * kernel, kernel // 2
    padded = functional.pad(maps, (margin,) * 4)
    step = max(1, ELEMENTS_PER_BLOCK // (batch * channels * taps * width))
    for top in range(0, height, step):
        rows = min(step, height - top)
        windows = functional.unfold(padded[:, :, top : top + rows + 2 * margin], kernel)
        windows = windows.view(batch, groups, per_group, taps, rows, width).permute(0, 1, 4, 5, 2, 3)
        weights = masks[:, :, top * scale : (top + rows) * scale]
        weights = weights.reshape(batch, groups, taps, rows, scale, width, scale)
        weights = weights.permute(0, 1, 3, 5, 2, 4, 6).flatten(5)
        made = (windows @ weights).view(batch, groups, rows, width, per_group, scale, scale)
        made = made.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, channels, rows * scale, width * scale)
        output[:, :, top * scale : (top + rows) * scale] = made.to(output.dtype)


@jit
def _reassemble_kernel(
    maps: F32, masks: F32, made: F32, kernel: int, groups: int, scale: int, first: int, last: int
) -> None:  # pragma: no cover - compiled
    """Output lines first:last; `maps` are channels last, `masks` and `made` channels first."""
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


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the windows of chosen output pixels into the columns of `col`; zeros outside the map.

    Args:
        im: (1, C, H, W).
        mask_h_idx: (M,) int rows of the output pixels.
        mask_w_idx: (M,) int columns of the output pixels.
        col: (C * kernel_h * kernel_w, M), written in place.
        kernel_h: window height.
        kernel_w: window width.
        pad_h: zeros above and below.
        pad_w: zeros left and right.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a pixel's window lies outside the padded map.
    """
    check_rank("im", im, 4)
    check_same_device(im=im, mask_h_idx=mask_h_idx, mask_w_idx=mask_w_idx, col=col)
    batch, channels, height, width = im.shape
    count = mask_h_idx.numel()
    if batch != 1:
        raise ValueError(f"im must be one image, got {batch}")
    if min(kernel_h, kernel_w) < 1 or min(pad_h, pad_w) < 0:
        raise ValueError(f"kernel {kernel_h} x {kernel_w} must be positive, padding at least 0")
    if tuple(col.shape) != (channels * kernel_h * kernel_w, count):
        raise ValueError(f"col must be {(channels * kernel_h * kernel_w, count)}, got {tuple(col.shape)}")
    tall, wide = height + 2 * pad_h, width + 2 * pad_w
    rows, columns = _pixels(mask_h_idx, mask_w_idx, tall - kernel_h + 1, wide - kernel_w + 1)
    if count == 0:
        return
    padded = functional.pad(im.detach()[0], (pad_w, pad_w, pad_h, pad_h)).flatten(1)
    down = torch.arange(kernel_h, device=im.device)[:, None, None]
    across = torch.arange(kernel_w, device=im.device)[None, :, None]
    index = ((rows + down) * wide + columns + across).flatten()
    col.copy_(padded.index_select(1, index).view(col.shape))


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write column m of `col` (channels, M) to pixel (mask_h_idx[m], mask_w_idx[m]) of `im`.

    Args:
        col: (channels, M).
        mask_h_idx: (M,) int rows, each pixel at most once.
        mask_w_idx: (M,) int columns.
        im: (1, channels, height, width), written in place; other pixels stay as they are.
        height: of `im`.
        width: of `im`.
        channels: of `im`.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a pixel is not in `im`.
    """
    check_same_device(im=im, mask_h_idx=mask_h_idx, mask_w_idx=mask_w_idx, col=col)
    if tuple(im.shape) != (1, channels, height, width):
        raise ValueError(f"im must be {(1, channels, height, width)}, got {tuple(im.shape)}")
    if tuple(col.shape) != (channels, mask_h_idx.numel()):
        raise ValueError(f"col must be {(channels, mask_h_idx.numel())}, got {tuple(col.shape)}")
    rows, columns = _pixels(mask_h_idx, mask_w_idx, height, width)
    im[0, :, rows, columns] = col.to(im.dtype)


def _pixels(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    for name, index in (("mask_h_idx", rows), ("mask_w_idx", columns)):
        check_rank(name, index, 1)
        if index.is_floating_point() or index.shape != rows.shape:
            raise ValueError(
                f"{name} must be {rows.numel()} integers, got {tuple(index.shape)} {index.dtype}"
            )
    if rows.numel() == 0:
        return rows.long(), columns.long()
    bounds = torch.stack((*torch.aminmax(rows.long()), *torch.aminmax(columns.long()))).tolist()
    for name, low, high, limit in (
        ("mask_h_idx", bounds[0], bounds[1], height),
        ("mask_w_idx", bounds[2], bounds[3], width),
    ):
        if low < 0 or high >= limit:
            raise IndexError(f"{name} must lie in 0..{limit - 1}, got {low}..{high}")
    return rows.long(), columns.long()


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Turn masks centred on each pixel into masks over the whole map.

    Args:
        input: (B, h_mask * w_mask, H, W): the mask of pixel (h, w) along the channels.
        output: (B, H * W, H, W), written in place. Collect: channel i at (h, w) is what the mask of (h, w)
            says about pixel i. Distribute: channel i at (h, w) is what the mask of i says about (h, w).
        psa_type: 0 collect, 1 distribute.
        num_: B.
        h_feature: H.
        w_feature: W.
        h_mask: mask height.
        w_mask: mask width.
        half_h_mask: row of the mask's centre.
        half_w_mask: column of the mask's centre.

    Raises:
        ValueError: a shape or `psa_type` does not fit.
    """
    shape = (num_, h_mask * w_mask, h_feature, w_feature)
    _check_masks(input, output, shape, psa_type)
    if output.numel() == 0:
        return
    index, inside = _mask_index(shape, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    flat = input.detach().flatten(2)
    collected = flat.gather(1, index.expand(num_, -1, -1))
    # Where a mask does not reach, 0 even if the mask holds inf.
    collected = torch.where(inside, collected, torch.zeros_like(collected))
    if psa_type == DISTRIBUTE:
        collected = collected.transpose(1, 2)
    output.copy_(collected.reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write into `grad_input` the gradient of `psamask_forward`; arguments as there."""
    shape = (num_, h_mask * w_mask, h_feature, w_feature)
    _check_masks(grad_input, grad_output, shape, psa_type)
    if grad_input.numel() == 0:
        return
    index, inside = _mask_index(shape, h_mask, w_mask, half_h_mask, half_w_mask, grad_input.device)
    grad = grad_output.detach().flatten(2)
    if psa_type == DISTRIBUTE:
        grad = grad.transpose(1, 2)
    grad = grad.reshape(num_, h_feature * w_feature, -1)
    grad = torch.where(inside, grad, torch.zeros_like(grad))
    flat = grad_input.new_zeros((num_, h_mask * w_mask, h_feature * w_feature))
    grad_input.copy_(flat.scatter_add_(1, index.expand(num_, -1, -1), grad).view(grad_input.shape))


def _check_masks(masks: Tensor, spread: Tensor, shape: tuple[int, ...], psa_type: int) -> None:
    check_same_device(input=masks, output=spread)
    if psa_type not in (COLLECT, DISTRIBUTE):
        raise ValueError(f"psa_type must be 0 (collect) or 1 (distribute), got {psa_type}")
    if tuple(masks.shape) != shape:
        raise ValueError(f"input must be {shape}, got {tuple(masks.shape)}")
    expected = (shape[0], shape[2] * shape[3], shape[2], shape[3])
    if tuple(spread.shape) != expected:
        raise ValueError(f"output must be {expected}, got {tuple(spread.shape)}")


def _mask_index(
    shape: tuple[int, ...], h_mask: int, w_mask: int, half_h: int, half_w: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(H * W targets, H * W pixels): which mask channel of the pixel speaks of the target, and if any does."""
    height, width = shape[2:]
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    row = (y[:, None] - y[None] + half_h)[:, None, :, None].expand(height, width, height, width)
    column = (x[:, None] - x[None] + half_w)[None, :, None, :].expand(height, width, height, width)
    inside = (row >= 0) & (row < h_mask) & (column >= 0) & (column < w_mask)
    index = torch.where(inside, row * w_mask + column, torch.zeros_like(row))
    pixels = height * width
    return index.reshape(pixels, pixels), inside.reshape(pixels, pixels)
