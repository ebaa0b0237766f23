"""RoIAlign (He et al., Mask R-CNN, ICCV 2017): bilinear samples of a feature map, pooled per bin.

The reference is mmcv 2.1.0 `csrc/pytorch/cpu/roi_align.cpp`: samples more than one pixel outside the map are zero,
nearer ones are clamped to the border. On CPU regions are distributed over torch's number of threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import as_numpy, check_tensor, compute_dtype, uses_float32_kernel
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for
from serve.ops.roi.pyramid import align_pyramid
from serve.ops.roi.sampling import Places, check_pooling

# The kernel only, as `serve.ops.extension` exports it; `serve.runtime.region_features` uses `average_into`, too.
__all__ = ["roi_align_forward"]

F32 = npt.NDArray[np.float32]
MAX_POOL, AVERAGE_POOL = 0, 1
SAMPLES_PER_BLOCK = 1 << 24


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool `rois` out of `input`.

    Args:
        input: (B, C, H, W) float.
        rois: (R, 5): batch index, then x1, y1, x2, y2 in pixels of the original image.
        output: (R, C, aligned_height, aligned_width), written in place.
        argmax_y: as `output` for max pooling, else empty: row of the maximum's sample, map pixels.
        argmax_x: as `argmax_y`, for the column.
        aligned_height: bins down.
        aligned_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for one per map pixel.
        pool_mode: 0 max, 1 average.
        aligned: shift by half a pixel (detectron2's correction).
    """
    bins = (aligned_height, aligned_width)
    check_pooling(input, rois, output, 5, bins)
    check_mode(pool_mode)
    if pool_mode == MAX_POOL:
        for name, at in (("argmax_y", argmax_y), ("argmax_x", argmax_x)):
            check_tensor(("input", input), name, at, *output.shape)
    if output.numel() == 0:
        return
    dtype = compute_dtype(input)
    where, samples = _sampling(rois, bins, spatial_scale, sampling_ratio, aligned, dtype)
    if pool_mode == MAX_POOL:
        _pool_maxima(input, where, samples, output, argmax_y, argmax_x)
    elif uses_float32_kernel(input):
        _average_cpu(input, where, samples, output)
    else:
        output.copy_(
            align_pyramid(
                [input], rois.to(dtype), torch.zeros_like(rois[:, 0], dtype=torch.int64), [spatial_scale], bins,
                sampling_ratio=sampling_ratio, aligned=aligned, dtype=dtype,
            )
        )  # fmt: skip


def check_mode(pool_mode: int) -> None:
    """Raise ValueError unless `pool_mode` is 0 or 1."""
    if pool_mode not in (MAX_POOL, AVERAGE_POOL):
        raise ValueError(f"pool_mode must be 0 (max) or 1 (average), got {pool_mode}")


def _sampling(
    rois: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute (R, 5) image, left, top, bin width, bin height in map pixels, and (R, 2) int64 samples per bin x, y."""
    box = rois[:, 1:5].to(dtype) * scale - (0.5 if aligned else 0.0)
    extent = box[:, 2:] - box[:, :2]
    if not aligned:
        extent = extent.clamp(min=1.0)
    size = extent / extent.new_tensor([bins[1], bins[0]])
    samples = torch.full_like(size, ratio) if ratio > 0 else size.ceil().clamp(min=0)
    return torch.cat((rois[:, :1].to(dtype), box[:, :2], size), dim=1), samples.long()


def upright_places(
    rois: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool, dtype: torch.dtype
) -> tuple[Tensor, Places]:
    """Return the forward function's grids and sample positions for `serve.ops.roi.sampling.sample_blocks`."""
    where, samples = _sampling(rois, bins, scale, ratio, aligned, dtype)

    def places(rows: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
        shape = (len(rows), *bins, down, across)
        y = _sample_positions(where[rows, 2], where[rows, 4], bins[0], down).view(-1, bins[0], 1, down, 1)
        x = _sample_positions(where[rows, 1], where[rows, 3], bins[1], across).view(-1, 1, bins[1], 1, across)
        return y.expand(shape).flatten(3).flatten(1, 2), x.expand(shape).flatten(3).flatten(1, 2)

    return samples.flip(1), places


def _pool_maxima(
    input: Tensor, where: Tensor, samples: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor
) -> None:
    """Any device: regions with the same sampling grid are done together, in blocks of bounded memory."""
    # mmcv starts its maxima here on the CPU, at the least float32 on CUDA.
    lowest = -10000.0 if input.device.type == "cpu" else torch.finfo(torch.float32).min
    channels, bins_y, bins_x = output.shape[1], output.shape[2], output.shape[3]
    for grid_x, grid_y in torch.unique(samples, dim=0).tolist():
        rows = (samples == samples.new_tensor([grid_x, grid_y])).all(dim=1).nonzero().squeeze(1)
        if grid_x * grid_y == 0:
            output[rows], argmax_y[rows], argmax_x[rows] = lowest, -1, -1
            continue
        per_region = channels * bins_y * grid_y * bins_x * grid_x
        for block in torch.split(rows, max(1, SAMPLES_PER_BLOCK // per_region)):
            y = _sample_positions(where[block, 2], where[block, 4], bins_y, grid_y)
            x = _sample_positions(where[block, 1], where[block, 3], bins_x, grid_x)
            values = _bilinear(input, where[block, 0].long(), y, x)
            values = values.view(-1, channels, bins_y, grid_y, bins_x, grid_x).transpose(3, 4)
            # What is no number, or not above the least, is never the largest.
            values = values.flatten(4)
            best, at = torch.where(values > lowest, values, torch.full_like(values, lowest)).max(dim=4)
            output[block] = best.to(output.dtype)
            none = best == lowest
            rows_y = y.view(-1, 1, bins_y, 1, grid_y).expand(-1, channels, -1, bins_x, -1)
            columns_x = x.view(-1, 1, 1, bins_x, grid_x).expand(-1, channels, bins_y, -1, -1)
            for argmax, place in (
                (argmax_y, rows_y.gather(4, (at // grid_x)[..., None])[..., 0]),
                (argmax_x, columns_x.gather(4, (at % grid_x)[..., None])[..., 0]),
            ):
                argmax[block] = torch.where(none, -1, place).to(argmax.dtype)


def _sample_positions(start: Tensor, bin_size: Tensor, bins: int, grid: int) -> Tensor:
    """(R, bins * grid) sample coordinates along one axis, map pixels.

    Summed in the reference's order: a sample at the edge of what counts would else fall on its other side.
    """
    step = torch.arange(bins, device=start.device, dtype=start.dtype)
    inner = torch.arange(grid, device=start.device, dtype=start.dtype) + 0.5
    first = start[:, None] + step * bin_size[:, None]
    return (first[:, :, None] + (inner * bin_size[:, None] / grid)[:, None]).flatten(1)


def _bilinear(input: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample (R, C, len(y), len(x)) on a grid per region."""
    height, width = input.shape[2:]
    y_low, y_high, y_weight, y_ok = _neighbours(y, height)
    x_low, x_high, x_weight, x_ok = _neighbours(x, width)
    maps = input.permute(0, 2, 3, 1)
    picked = image[:, None, None]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return maps[picked, rows[:, :, None], columns[:, None, :]].to(y.dtype)

    wy, wx = y_weight[:, :, None, None], x_weight[:, None, :, None]
    top = at(y_low, x_low) * (1 - wx) + at(y_low, x_high) * wx
    bottom = at(y_high, x_low) * (1 - wx) + at(y_high, x_high) * wx
    value = top * (1 - wy) + bottom * wy
    value = value * (y_ok[:, :, None, None] & x_ok[:, None, :, None])
    return value.permute(0, 3, 1, 2).contiguous()


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inside = (position >= -1.0) & (position <= size)
    clamped = position.clamp(0, size - 1)
    low = clamped.floor().long()
    return low, (low + 1).clamp(max=size - 1), clamped - low, inside


def average_into(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    rows: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    *,
    aligned: bool,
) -> None:
    """Average-pool `rois` out of `input` into rows of `output`, on the CPU, as `roi_align_forward` does.

    Args:
        input: (B, C, H, W) float32.
        rois: (R, 5), as in `roi_align_forward`.
        output: (N, C, bins down, bins across) float32, contiguous or channels-last; its `rows` are written.
        rows: (R,) int64.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for one per map pixel.
        aligned: shift by half a pixel.
    """
    bins = (output.shape[2], output.shape[3])
    where, samples = _sampling(rois, bins, spatial_scale, sampling_ratio, aligned, torch.float32)
    _average_cpu(input, where, samples, output, as_numpy(rows))


def _average_cpu(
    input: Tensor, where: Tensor, samples: Tensor, output: Tensor, rows: npt.NDArray[np.int64] | None = None
) -> None:
    # Channels-last: the inner loop and its four neighbours are contiguous in memory.
    maps = as_numpy(input.float().permute(0, 2, 3, 1))
    regions, grids = as_numpy(where), as_numpy(samples)
    rows = np.arange(len(regions)) if rows is None else rows
    ends = output.permute(0, 2, 3, 1)
    last = ends.is_contiguous()
    direct = output.dtype == torch.float32 and (last or output.is_contiguous())
    pooled = (ends if last else output) if direct else torch.empty(ends.shape)
    target = pooled.detach().numpy().reshape(len(pooled), -1)
    bins_y, bins_x = output.shape[2], output.shape[3]

    def work(first: int, end: int) -> None:
        _average_kernel(
            maps,
            regions[first:end],
            grids[first:end],
            rows[first:end],
            bins_y,
            bins_x,
            last or not direct,
            target,
        )

    parallel_for(work, len(regions))
    if not direct:
        output.copy_(pooled.permute(0, 3, 1, 2))


@jit
def _average_kernel(
    maps: F32, regions: F32, grids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], bins_y: int, bins_x: int,
    channels_last: bool, target: F32,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Write each region to its row of `target`: bins by channels if `channels_last`, else channels by bins."""
    height, width, channels = maps.shape[1], maps.shape[2], maps.shape[3]
    one = np.float32(1)
    pooled = np.empty((bins_y, bins_x, channels), np.float32)
    cells = pooled.reshape(bins_y * bins_x, channels)
    for r in range(regions.shape[0]):
        image = maps[np.int64(regions[r, 0])]
        grid_x, grid_y = grids[r, 0], grids[r, 1]
        share = one / np.float32(max(grid_x * grid_y, 1))
        pooled[:] = 0
        for by in range(bins_y):
            for bx in range(bins_x):
                out = pooled[by, bx]
                for iy in range(grid_y):
                    y = regions[r, 2] + np.float32(by) * regions[r, 4]
                    y += (np.float32(iy) + np.float32(0.5)) * regions[r, 4] / np.float32(grid_y)
                    if y < -1.0 or y > height:
                        continue
                    y = min(max(y, np.float32(0)), np.float32(height - 1))
                    y0 = np.int64(y)
                    y1 = min(y0 + 1, height - 1)
                    ly = np.float32(y - y0)
                    for ix in range(grid_x):
                        x = regions[r, 1] + np.float32(bx) * regions[r, 3]
                        x += (np.float32(ix) + np.float32(0.5)) * regions[r, 3] / np.float32(grid_x)
                        if x < -1.0 or x > width:
                            continue
                        x = min(max(x, np.float32(0)), np.float32(width - 1))
                        x0 = np.int64(x)
                        x1 = min(x0 + 1, width - 1)
                        lx = np.float32(x - x0)
                        w00 = np.float32((one - ly) * (one - lx) * share)
                        w01 = np.float32((one - ly) * lx * share)
                        w10 = np.float32(ly * (one - lx) * share)
                        w11 = np.float32(ly * lx * share)
                        a, b, c, d = image[y0, x0], image[y0, x1], image[y1, x0], image[y1, x1]
                        for ch in range(channels):
                            out[ch] += w00 * a[ch] + w01 * b[ch] + w10 * c[ch] + w11 * d[ch]
        into = target[rows[r]]
        if channels_last:
            for i in range(cells.shape[0]):
                for ch in range(channels):
                    into[i * channels + ch] = cells[i, ch]
        else:
            for ch in range(channels):
                for i in range(cells.shape[0]):
                    into[ch * cells.shape[0] + i] = cells[i, ch]
