"""RoIAlign over all levels of a feature pyramid at once, on any device.

Each region takes as many samples as its size asks for, so their number is read from the regions: with regions in the
processor's memory nothing waits for the device. All samples of all regions, whatever their level, are one list, and a
bin is a weighted sum of pixels, by `torch.nn.functional.embedding_bag`. The samples are those of
`serve.ops.roi.align`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.constants import constant

__all__ = ["align_pyramid"]

# Samples at a time: each takes some 200 bytes for a moment.
MAX_SAMPLES = 1 << 23


def align_pyramid(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    bins: tuple[int, int],
    *,
    sampling_ratio: int,
    aligned: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Average-pool regions, each out of its level.

    Args:
        maps: (B, C, H, W) floating point per level, on one device.
        rois: (R, 5): batch index, x1, y1, x2, y2 in image pixels, on the device of the maps or the CPU.
        levels: (R,) int64 level of each region, beside `rois`.
        scales: map pixels per image pixel of each level.
        bins: bins down and across.
        sampling_ratio: samples per bin and axis; 0 for one per map pixel.
        aligned: shift by half a pixel.
        dtype: compute dtype of the samples; that of the maps by default.

    Returns:
        (R, C, bins down, bins across) in that dtype.
    """
    dtype, device, channels = dtype or maps[0].dtype, maps[0].device, maps[0].shape[1]
    shape = (len(rois), channels, *bins)
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    rows = [one.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype) for one in maps]
    # The last row, for samples outside, is zero.
    table = torch.cat((*rows, rows[0].new_zeros((1, channels))))
    places, numbers, samples = _regions(maps, rois, levels, scales, bins, sampling_ratio, aligned)
    places, numbers = (one.to(device, non_blocking=True) for one in (places, numbers))
    counts: list[int] = samples.tolist()  # waits for the device if the regions are there
    pooled, first, total = [], 0, 0
    for last, count in enumerate([*counts, MAX_SAMPLES + 1]):
        if last > first and (total + count) * bins[0] * bins[1] > MAX_SAMPLES:
            part = slice(first, last)
            pooled.append(_pool(table, places[part], numbers[part], total, bins))
            first, total = last, 0
        total += count
    output = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
    return output.view(len(rois), *bins, channels).permute(0, 3, 1, 2).contiguous()


def _regions(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    bins: tuple[int, int],
    ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute positions and samples of each region, where the regions are.

    Returns:
        (R, 4) left, top, width and height of a bin in map pixels; (R, 5) int64 samples across and down, height and
        width of the map, its first row in the table; (R,) samples per bin.
    """
    where = rois.device
    kind = torch.float64 if rois.dtype == torch.float64 else torch.float32
    start, extents = 0, []
    for one in maps:
        extents.append((one.shape[2], one.shape[3], start))
        start += one.shape[0] * one.shape[2] * one.shape[3]
    scale = constant(tuple(map(float, scales)), kind, where)[levels]
    box = rois[:, 1:5].to(kind) * scale[:, None] - (0.5 if aligned else 0.0)
    extent = box[:, 2:] - box[:, :2]
    if not aligned:
        extent = extent.clamp(min=1.0)
    size = extent / constant((float(bins[1]), float(bins[0])), kind, where)
    samples = torch.full_like(size, ratio) if ratio > 0 else size.ceil().clamp(min=0)
    samples = samples.long()
    extent_of = constant(tuple(extents), torch.int64, where)[levels]
    first = extent_of[:, 2] + rois[:, 0].long() * extent_of[:, 0] * extent_of[:, 1]
    numbers = torch.cat((samples, extent_of[:, :2], first[:, None]), dim=1)
    return torch.cat((box[:, :2], size), dim=1), numbers, samples[:, 0] * samples[:, 1]


def _pool(table: Tensor, places: Tensor, numbers: Tensor, total: int, bins: tuple[int, int]) -> Tensor:
    """Pool regions with `total` samples per bin in sum; (R * bins, C)."""
    device, per_region = table.device, bins[0] * bins[1]
    share = (numbers[:, 0] * numbers[:, 1])[:, None].expand(-1, per_region).reshape(-1)
    starts = share.cumsum(dim=0) - share
    bag = torch.repeat_interleave(share, output_size=total * per_region)
    sample = torch.arange(len(bag), device=device) - starts[bag]
    region = bag // per_region
    bin_of = bag - region * per_region
    across, down, height, width, first = numbers[region].unbind(dim=1)
    left, top, wide, tall = places[region].unbind(dim=1)
    row = sample // across
    y, y_inside = _position(top, tall, bin_of // bins[1], row, down, height)
    x, x_inside = _position(left, wide, bin_of % bins[1], sample - row * across, across, width)
    y0, x0 = y.floor(), x.floor()
    ly, lx = y - y0, x - x0
    upper, y1 = y0.long(), torch.minimum(y0.long() + 1, height - 1)
    lower, x1 = x0.long(), torch.minimum(x0.long() + 1, width - 1)
    inside = (y_inside & x_inside)[:, None]
    upper, y1 = first + upper * width, first + y1 * width
    index = torch.stack((upper + lower, upper + x1, y1 + lower, y1 + x1), dim=1)
    index = torch.where(inside, index, len(table) - 1)
    weights = torch.stack(((1 - ly) * (1 - lx), (1 - ly) * lx, ly * (1 - lx), ly * lx), dim=1)
    weights = weights / (across * down)[:, None]
    return functional.embedding_bag(
        index.flatten(), table, starts * 4, mode="sum", per_sample_weights=weights.flatten().to(table.dtype)
    )


def _position(
    start: Tensor, size: Tensor, bin_of: Tensor, sample: Tensor, samples: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the clamped position of each sample along one axis, summed in the reference's order, and if it counts."""
    position = (start + bin_of * size) + (sample + 0.5) * size / samples
    inside = (position >= -1.0) & (position <= limit)
    return torch.minimum(position.clamp(min=0), (limit - 1).to(position.dtype)), inside
