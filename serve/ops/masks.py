"""Convolution at chosen pixels, and the attention masks of PSANet.

Masked convolution: `masked_im2col_forward` gathers windows at chosen pixels, `masked_col2im_forward` writes
pixels back. PSANet (Zhao et al., ECCV 2018): masks relative to a pixel become masks over the map. The
references are mmcv 2.1.0 `csrc/common/cuda/masked_conv2d_cuda_kernel.cuh` and `csrc/pytorch/cpu/psamask.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.checks import check_floating, check_rank, check_same_device, check_writable_from

__all__ = [
    "masked_col2im_forward",
    "masked_im2col_forward",
    "psamask_backward",
    "psamask_forward",
]

COLLECT, DISTRIBUTE = 0, 1


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
    check_writable_from("col", col, "im", im)
    batch, channels, height, width = im.shape
    count = mask_h_idx.numel()
    if batch != 1:
        raise ValueError(f"im must be one image, got {batch}")
    if min(kernel_h, kernel_w) < 1 or min(pad_h, pad_w) < 0:
        raise ValueError(
            f"kernel_h and kernel_w must be positive, pad_h and pad_w at least 0, "
            f"got {kernel_h}, {kernel_w}, {pad_h} and {pad_w}"
        )
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
        height: height of `im`.
        width: width of `im`.
        channels: channels of `im`.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a pixel is not in `im`.
    """
    check_same_device(im=im, mask_h_idx=mask_h_idx, mask_w_idx=mask_w_idx, col=col)
    check_writable_from("im", im, "col", col)
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
        output: (B, H * W, H, W), written in place. Collect: channel i at (h, w) is the entry for pixel i in the
            mask of (h, w). Distribute: channel i at (h, w) is the entry for (h, w) in the mask of pixel i.
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
    _check_masks(input, output, shape, psa_type, ("input", "output"))
    if output.numel() == 0:
        return
    index, inside = _mask_index(shape, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    flat = input.detach().flatten(2)
    collected = flat.gather(1, index.expand(num_, -1, -1))
    # Pixels beyond a mask get 0 even if the mask holds inf.
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
    _check_masks(grad_input, grad_output, shape, psa_type, ("grad_input", "grad_output"))
    if grad_input.numel() == 0:
        return
    index, inside = _mask_index(shape, h_mask, w_mask, half_h_mask, half_w_mask, grad_input.device)
    grad = grad_output.detach().flatten(2)
    if psa_type == DISTRIBUTE:
        grad = grad.transpose(1, 2)
    grad = grad.reshape(num_, h_feature * w_feature, -1)
    grad = torch.where(inside, grad, torch.zeros_like(grad))
    flat = grad.new_zeros((num_, h_mask * w_mask, h_feature * w_feature))
    grad_input.copy_(flat.scatter_add_(1, index.expand(num_, -1, -1), grad).view(grad_input.shape))


def _check_masks(
    masks: Tensor, spread: Tensor, shape: tuple[int, ...], psa_type: int, names: tuple[str, str]
) -> None:
    if psa_type not in (COLLECT, DISTRIBUTE):
        raise ValueError(f"psa_type must be 0 (collect) or 1 (distribute), got {psa_type}")
    if min(shape) < 0:
        raise ValueError(f"num_, h_feature, w_feature, h_mask and w_mask must be at least 0, got {shape}")
    expected = (shape[0], shape[2] * shape[3], shape[2], shape[3])
    for name, tensor, size, origin in (
        (names[0], masks, shape, "(num_, h_mask * w_mask, h_feature, w_feature)"),
        (names[1], spread, expected, "(num_, h_feature * w_feature, h_feature, w_feature)"),
    ):
        if tuple(tensor.shape) != size:
            raise ValueError(f"{name} must be {origin} = {size}, got {tuple(tensor.shape)}")
    check_floating(**{names[0]: masks, names[1]: spread})
    check_same_device(**{names[0]: masks, names[1]: spread})


def _mask_index(
    shape: tuple[int, ...], h_mask: int, w_mask: int, half_h: int, half_w: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the mask channel of each pixel for each target, (H * W targets, H * W pixels), and its validity."""
    height, width = shape[2:]
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    row = (y[:, None] - y[None] + half_h)[:, None, :, None].expand(height, width, height, width)
    column = (x[:, None] - x[None] + half_w)[None, :, None, :].expand(height, width, height, width)
    inside = (row >= 0) & (row < h_mask) & (column >= 0) & (column < w_mask)
    index = torch.where(inside, row * w_mask + column, torch.zeros_like(row))
    pixels = height * width
    return index.reshape(pixels, pixels), inside.reshape(pixels, pixels)
