"""Pooling of upright regions: maximum per bin, exact integral per bin, and maxima along borders.

The references are mmcv 2.1.0 `csrc/common/cuda/roi_pool_cuda_kernel.cuh` (Girshick, Fast R-CNN, ICCV 2015),
`prroi_pool_cuda_kernel.cuh` (Jiang et al., IoU-Net, ECCV 2018) and `border_align_cuda_kernel.cuh` (Qiu et
al., BorderDet, ECCV 2020). Pooling by samples is in `serve.ops.roi.align` and `serve.ops.roi.sampling`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_integer,
    check_rank,
    check_same_device,
    check_shape,
    check_tensor,
    compute_dtype,
    uses_float32_kernel,
)
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for
from serve.ops.roi.bilinear import clamped_corners, mix_rows, pixel_rows
from serve.ops.roi.sampling import check_pooling

__all__ = ["border_align_forward", "prroi_pool_forward", "roi_pool_forward"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
ELEMENTS_PER_BLOCK = 1 << 24
BORDERS = 4


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the maximum of the map pixels that each bin touches; a bin outside the map is 0.

    A region without area leaves its part of `output` and `argmax` as they were.

    Args:
        input: (B, C, H, W) floating point.
        rois: (R, 5): batch index, x1, y1, x2, y2 in image pixels, both ends included.
        output: (R, C, pooled_height, pooled_width), written in place.
        argmax: as `output`, int32: ``row * W + column`` of the first maximum, -1 for an empty bin.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.

    Raises:
        ValueError: a shape does not fit.
        IndexError: the image of a region is out of range.
    """
    image = check_pooling(input, rois, output, 5, (pooled_height, pooled_width))
    expected = tuple(output.shape)
    check_shape("argmax", argmax, *expected)
    check_integer(argmax=argmax)
    check_same_device(input=input, argmax=argmax)
    if output.numel() == 0:
        return
    flat = ((rois[:, 3:5] + 1) * spatial_scale - rois[:, 1:3] * spatial_scale <= 0).any(dim=1)
    if bool(flat.any()):
        kept = (~flat).nonzero().squeeze(1)
        found, winners = output[kept], argmax[kept]
        roi_pool_forward(input, rois[kept], found, winners, pooled_height, pooled_width, spatial_scale)
        output[kept], argmax[kept] = found, winners
        return
    maps = input.detach().permute(0, 2, 3, 1).to(compute_dtype(input)).contiguous()
    rows, columns = _bin_bounds(rois.to(maps.dtype), expected[2:], spatial_scale, maps.shape[1:3])
    if uses_float32_kernel(input):
        best = np.empty((expected[0], *expected[2:], expected[1]), dtype=np.float32)
        at = np.empty(best.shape, dtype=np.int32)
        source, number = as_numpy(maps), as_numpy(image)
        down, across = as_numpy(rows), as_numpy(columns)

        def work(first: int, last: int) -> None:
            _max_kernel(source, number, down, across, best, at, first, last)

        parallel_for(work, expected[0])
        output.copy_(torch.from_numpy(best).permute(0, 3, 1, 2))
        argmax.copy_(torch.from_numpy(at).permute(0, 3, 1, 2))
    else:
        _max_torch(maps, image, rows, columns, output, argmax)


def _bin_bounds(rois: Tensor, bins: tuple[int, ...], scale: float, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Compute (R, bins, 2) int64 first pixel and end of each bin, down and across; equal without area."""
    starts = rois[:, 1:3] * scale
    extent = (rois[:, 3:5] + 1) * scale - starts
    empty = (extent <= 0).any(dim=1)
    bounds = []
    for axis, count, limit in ((1, bins[0], size[0]), (0, bins[1], size[1])):
        step = (extent[:, axis] / count)[:, None]
        number = torch.arange(count, device=rois.device, dtype=rois.dtype)[None]
        first = torch.floor(number * step + starts[:, axis, None])
        end = torch.ceil((number + 1) * step + starts[:, axis, None])
        bound = torch.stack((first, end), dim=-1).clamp(0, limit).long()
        bounds.append(torch.where(empty[:, None, None], torch.zeros_like(bound), bound))
    return bounds[0], bounds[1]


def _max_torch(
    maps: Tensor, image: Tensor, rows: Tensor, columns: Tensor, output: Tensor, argmax: Tensor
) -> None:
    """Pool on any device; each bin has a window as large as the largest bin of its region."""
    height, width, channels = maps.shape[1:]
    lowest = torch.finfo(torch.float32).min
    windows = torch.stack([(b[..., 1] - b[..., 0]).amax(dim=1) for b in (rows, columns)], dim=1).clamp(min=1)
    kinds, kind = torch.unique(windows, dim=0, return_inverse=True)
    bins = rows.shape[1] * columns.shape[1]
    for number, (down, across) in enumerate(kinds.tolist()):
        regions = (kind == number).nonzero().squeeze(1)
        for block in torch.split(regions, max(1, ELEMENTS_PER_BLOCK // (bins * down * across * channels))):
            y = rows[block, :, 0, None] + torch.arange(down, device=maps.device)
            x = columns[block, :, 0, None] + torch.arange(across, device=maps.device)
            there = (y < rows[block, :, 1, None])[:, :, None, :, None]
            there = there & (x < columns[block, :, 1, None])[:, None, :, None, :]
            y, x = y.clamp(max=height - 1)[:, :, None, :, None], x.clamp(max=width - 1)[:, None, :, None, :]
            values = maps[image[block, None, None, None, None], y, x]
            # Not a number loses every comparison.
            usable = there[..., None] & (values > lowest)
            values = torch.where(usable, values, torch.full_like(values, lowest))
            best, at = values.flatten(3, 4).max(dim=3)
            place = (y * width + x).flatten(3)[..., None].expand(*values.shape[:3], -1, channels)
            pixel = place.gather(3, at[:, :, :, None])[:, :, :, 0]
            none = ~there.flatten(3).any(dim=3)[..., None]
            pixel = torch.where(none | (best == lowest), torch.full_like(pixel, -1), pixel)
            output[block] = torch.where(none, 0.0, best).permute(0, 3, 1, 2).to(output.dtype)
            argmax[block] = pixel.permute(0, 3, 1, 2).to(argmax.dtype)


@jit
def _max_kernel(
    maps: F32, image: I64, rows: I64, columns: I64, best: F32, at: I32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    width, channels = maps.shape[2], maps.shape[3]
    zero, lowest = np.float32(0), np.float32(-3.4028234663852886e38)
    for r in range(first, last):
        source = maps[image[r]]
        for i in range(rows.shape[1]):
            for j in range(columns.shape[1]):
                top, bottom = rows[r, i, 0], rows[r, i, 1]
                left, right = columns[r, j, 0], columns[r, j, 1]
                value, where = best[r, i, j], at[r, i, j]
                where[:] = -1
                if bottom <= top or right <= left:
                    value[:] = zero
                    continue
                value[:] = lowest
                for y in range(top, bottom):
                    for x in range(left, right):
                        pixel = source[y, x]
                        place = np.int32(y * width + x)
                        for ch in range(channels):
                            more = pixel[ch] > value[ch]
                            value[ch] = pixel[ch] if more else value[ch]
                            where[ch] = place if more else where[ch]


def prroi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the exact mean over each bin of the bilinearly interpolated map; zeros outside the map.

    The integral of the interpolation is separable: the weight of each map row and column is the area under its triangle
    within the bin. So pooling is two matrix products per region.

    Args:
        input: (B, C, H, W) floating point.
        rois: (R, 5): batch index, x1, y1, x2, y2 in image pixels.
        output: (R, C, pooled_height, pooled_width), written in place; 0 for a region without area.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.

    Raises:
        ValueError: a shape does not fit.
        IndexError: the image of a region is out of range.
    """
    image = check_pooling(input, rois, output, 5, (pooled_height, pooled_width))
    if output.numel() == 0:
        return
    dtype = compute_dtype(input)
    maps = input.detach().to(dtype).permute(0, 2, 3, 1).contiguous()
    height, width, channels = maps.shape[1:]
    # Triangle areas are differences of nearly equal numbers: always in float64.
    box = rois[:, 1:5].double() * spatial_scale
    sizes = torch.Size((height, width))
    down, across = (one.to(dtype) for one in integral_weights(box, (pooled_height, pooled_width), sizes))
    block = max(1, ELEMENTS_PER_BLOCK // (pooled_height * width * channels))
    for number in range(maps.shape[0]):
        here = (image == number).nonzero().squeeze(1)
        for rows in torch.split(here, block):
            tall = down[rows].flatten(0, 1) @ maps[number].flatten(1)
            tall = tall.view(-1, width, channels)
            wide = across[rows].repeat_interleave(pooled_height, dim=0) @ tall
            pooled = wide.view(len(rows), pooled_height, pooled_width, channels).permute(0, 3, 1, 2)
            output[rows] = pooled.to(output.dtype)


def integral_weights(box: Tensor, bins: tuple[int, int], size: torch.Size) -> tuple[Tensor, Tensor]:
    """Compute the weights (R, bins y, H) and (R, bins x, W) of rows and columns in bins of boxes (R, 4), map pixels."""
    down = _triangle_means(box[:, 1], box[:, 3], bins[0], size[0])
    return down, _triangle_means(box[:, 0], box[:, 2], bins[1], size[1])


def _triangle_means(start: Tensor, end: Tensor, bins: int, size: int) -> Tensor:
    """Compute the weight (R, bins, size) of each pixel in the mean over each of `bins` equal parts of start..end."""
    step = (end - start).clamp(min=0) / bins
    edge = start[:, None] + step[:, None] * torch.arange(bins + 1, device=start.device)
    # Area under a triangle of half width 1 around the pixel, from its left end to the edge.
    t = (edge[..., None] - torch.arange(size, device=start.device)).clamp(-1, 1)
    area = torch.where(t <= 0, (1 + t) ** 2 / 2, 1 - (1 - t) ** 2 / 2)
    width = step[:, None, None]
    # No division by zero, not even in discarded elements: their gradient would be NaN.
    part = (area[:, 1:] - area[:, :-1]) / torch.where(width > 0, width, torch.ones_like(width))
    return torch.where(width > 0, part, torch.zeros_like(part))


def border_align_forward(
    input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int
) -> None:
    """Write the maximum of `pool_size` + 1 samples along each border of each box, from a map per border.

    Args:
        input: (B, 4 * C, H, W) floating point; channels for the top, left, bottom and right border.
        boxes: (B, N, 4): x1, y1, x2, y2 in map pixels. Top and left run from the first corner, bottom and right back
            from the second.
        output: (B, C, N, 4), written in place.
        argmax_idx: as `output`, int32: index of the first sample with the maximum.
        pool_size: steps along a border.

    Raises:
        ValueError: a shape does not fit.
    """
    channels, count = check_borders(input, boxes, pool_size)
    batch, _, height, width = input.shape
    check_tensor(("input", input), "output", output, batch, channels, count, BORDERS)
    check_shape("argmax_idx", argmax_idx, *output.shape)
    check_integer(argmax_idx=argmax_idx)
    check_same_device(input=input, argmax_idx=argmax_idx)
    if output.numel() == 0:
        return
    maps = input.detach().view(batch, BORDERS, channels, height, width).permute(0, 3, 4, 1, 2)
    maps = maps.to(compute_dtype(input)).contiguous()
    corners = boxes.detach().to(maps.dtype)
    if uses_float32_kernel(input):
        best = np.empty((batch, count, BORDERS, channels), dtype=np.float32)
        at = np.empty(best.shape, dtype=np.int32)
        source, places = as_numpy(maps), as_numpy(corners)

        def work(first: int, last: int) -> None:
            _border_kernel(source, places, pool_size, best, at, first, last)

        parallel_for(work, batch * count)
        found, number = torch.from_numpy(best), torch.from_numpy(at)
    else:
        found, number = _border_torch(maps, corners, pool_size)
    output.copy_(found.permute(0, 3, 1, 2))
    argmax_idx.copy_(number.permute(0, 3, 1, 2))


def check_borders(input: Tensor, boxes: Tensor, pool_size: int, name: str = "input") -> tuple[int, int]:
    """Check map and boxes; return channels per border and boxes per image."""
    check_rank(name, input, 4)
    check_rank("boxes", boxes, 3)
    check_floating(**{name: input, "boxes": boxes})
    check_same_device(**{name: input, "boxes": boxes})
    if boxes.numel() > 0 and input.numel() == 0:
        raise ValueError(f"{name} must have pixels to take borders of, got shape {tuple(input.shape)}")
    batch, planes = input.shape[:2]
    if pool_size < 1:
        raise ValueError(f"pool_size must be at least 1, got {pool_size}")
    if planes % BORDERS:
        raise ValueError(f"{name} must have a multiple of 4 channels, got {planes}")
    if boxes.shape[0] != batch or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be ({batch}, N, 4), got {tuple(boxes.shape)}")
    return planes // BORDERS, boxes.shape[1]


def _border_torch(maps: Tensor, boxes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Pool on any device; (B, N, 4, C) maxima and the int32 indices of their samples."""
    batch, height, width, borders, channels = maps.shape
    size = boxes[..., 2:] - boxes[..., :2]
    none = torch.zeros_like(size[..., 0])
    across, down = size[..., 0] / steps, size[..., 1] / steps
    step_x = torch.stack((across, none, -across, none), dim=-1)
    step_y = torch.stack((none, down, none, -down), dim=-1)
    x = torch.stack((boxes[..., 0], boxes[..., 0], boxes[..., 2], boxes[..., 2]), dim=-1)
    y = torch.stack((boxes[..., 1], boxes[..., 1], boxes[..., 3], boxes[..., 3]), dim=-1)
    table = pixel_rows(maps)
    image = torch.arange(batch, device=maps.device)[:, None, None, None] * (height * width)
    border = torch.arange(borders, device=maps.device)[:, None]
    shape = (*x.shape, channels)
    best = torch.empty(shape, dtype=maps.dtype, device=maps.device)
    at = torch.zeros(shape, dtype=torch.int32, device=maps.device)
    for number in range(steps + 1):
        index, weights = clamped_corners(y, x, height, width)
        rows = torch.where(index < 0, table.shape[0] - 1, (image + index) * borders + border)
        value = mix_rows(table, rows.reshape(-1, 4), weights.reshape(-1, 4)).view(shape)
        if number == 0:
            best = value
        else:
            more = value > best
            best, at = torch.where(more, value, best), torch.where(more, number, at)
        # Add step by step like the reference, so that samples fall on the same side of the map's edge.
        x, y = x + step_x, y + step_y
    return best, at.to(torch.int32)


@jit
def _border_kernel(
    maps: F32, boxes: F32, steps: int, best: F32, at: I32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    height, width, channels = maps.shape[1], maps.shape[2], maps.shape[4]
    one, zero, lowest = np.float32(1), np.float32(0), np.float32(-np.inf)
    for row in range(first, last):
        b, n = row // boxes.shape[1], row % boxes.shape[1]
        for border in range(4):
            corner = border // 2 * 2
            x, y = boxes[b, n, corner], boxes[b, n, corner + 1]
            along = border % 2
            step = np.float32((boxes[b, n, along + 2] - boxes[b, n, along]) / np.float32(steps))
            if border >= 2:
                step = -step
            value, number = best[b, n, border], at[b, n, border]
            number[:] = 0
            value[:] = lowest
            for i in range(steps + 1):
                place = np.int32(i)
                if y >= -1 and x >= -1 and y <= height and x <= width:
                    cy = min(max(y, zero), np.float32(height - 1))
                    cx = min(max(x, zero), np.float32(width - 1))
                    y0, x0 = np.int64(cy), np.int64(cx)
                    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                    down, right = np.float32(cy - y0), np.float32(cx - x0)
                    w00, w01 = (one - down) * (one - right), (one - down) * right
                    w10, w11 = down * (one - right), down * right
                    p, q = maps[b, y0, x0, border], maps[b, y0, x1, border]
                    s, t = maps[b, y1, x0, border], maps[b, y1, x1, border]
                    for ch in range(channels):
                        v = np.float32(w00 * p[ch] + w01 * q[ch] + w10 * s[ch] + w11 * t[ch])
                        more = v > value[ch]
                        value[ch] = v if more else value[ch]
                        number[ch] = place if more else number[ch]
                else:
                    for ch in range(channels):
                        more = zero > value[ch]
                        value[ch] = zero if more else value[ch]
                        number[ch] = place if more else number[ch]
                if along == 0:
                    x = np.float32(x + step)
                else:
                    y = np.float32(y + step)
