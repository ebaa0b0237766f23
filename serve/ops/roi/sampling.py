"""Pooling of rotated, shifted or bent regions: means of bilinear samples on a grid per bin.

The kernels are RoIAlign with other sample positions; all clamp at the border and default to one sample per map pixel.
The references are mmcv 2.1.0 `csrc/pytorch/cpu/roi_align_rotated.cpp` (Ma et al., RRPN, 2018) and `bezier_align.cpp`
(Liu et al., ABCNet, CVPR 2020), `csrc/common/cuda/riroi_align_rotated_cuda_kernel.cuh` (Han et al., ReDet, CVPR 2021)
and `deform_roi_pool_cuda_kernel.cuh` (Dai et al., ICCV 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from serve.ops.checks import check_floating, check_rank, check_same_device, check_width, compute_dtype
from serve.ops.roi.bilinear import average_samples

__all__ = [
    "bezier_align_forward",
    "deform_roi_pool_forward",
    "riroi_align_rotated_forward",
    "roi_align_rotated_forward",
]

SAMPLES_PER_BLOCK = 1 << 21
BEZIER_WIDTH = 17

# (regions of a block, samples down, samples across) -> rows and columns (R, bins, samples).
Places = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Average-pool rotated regions.

    Args:
        input: (B, C, H, W) floating point.
        rois: (R, 6): batch index, centre x, y, width, height in image pixels, angle in radians.
        output: (R, C, pooled_height, pooled_width), written in place.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for one per map pixel.
        aligned: shift by half a pixel.
        clockwise: the angle turns clockwise on the screen (y down), else counter-clockwise.

    Raises:
        ValueError: a shape does not fit, or a size is negative while `aligned`.
        IndexError: the image of a region is out of range.
    """
    image = check_pooling(input, rois, output, 6, (pooled_height, pooled_width))
    if output.numel() > 0:
        box = rois[:, 1:6].to(compute_dtype(input))
        bins = (pooled_height, pooled_width)
        _pool(
            input,
            image,
            *rotated_places(box, bins, spatial_scale, sampling_ratio, aligned, clockwise),
            output,
        )


def riroi_align_rotated_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    """Average-pool rotated regions and rotate their orientation channels (rotation-invariant RoIAlign).

    Args:
        features: (B, C * num_orientations, H, W) floating point.
        rois: (R, 6) as in `roi_align_rotated_forward`.
        output: (R, C * num_orientations, pooled_height, pooled_width), written in place.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
        num_samples: samples per bin and axis; 0 for one per map pixel.
        num_orientations: orientation channels, interpolated linearly.
        clockwise: as in `roi_align_rotated_forward`; the channels rotate by the given angle.

    Raises:
        ValueError: a shape does not fit.
        IndexError: the image of a region is out of range.
    """
    image = check_pooling(features, rois, output, 6, (pooled_height, pooled_width), "features")
    check_orientations(features, num_orientations, "features")
    if output.numel() == 0:
        return
    box = rois[:, 1:6].to(compute_dtype(features))
    pooled = torch.empty(output.shape, dtype=box.dtype, device=output.device)
    where = rotated_places(box, (pooled_height, pooled_width), spatial_scale, num_samples, False, clockwise)
    _pool(features, image, *where, pooled)
    output.copy_(turn_orientations(pooled, box[:, 4], num_orientations))


def check_orientations(features: Tensor, orientations: int, name: str) -> None:
    """Raise ValueError unless the channels of `features` are a multiple of `orientations`."""
    if orientations < 1 or features.shape[1] % orientations:
        raise ValueError(
            f"{name} must have a multiple of num_orientations={orientations} channels, got {features.shape[1]}"
        )


def turn_orientations(pooled: Tensor, angle: Tensor, orientations: int) -> Tensor:
    """Rotate the orientation channels of (R, C * orientations, bins y, bins x) by `angle` (R,)."""
    steps = angle * orientations / (2 * math.pi)
    whole = steps.floor()
    share = (steps - whole)[:, None, None]
    # One row of bins per region and channel; the rows of a region's orientations are permuted.
    stacked = pooled.flatten(2).flatten(0, 1)
    channel = torch.arange(orientations, device=pooled.device)[None] - whole[:, None].long()
    first = torch.arange(stacked.shape[0], device=pooled.device).view(len(angle), -1, orientations)[:, :, :1]

    def turn(extra: int) -> Tensor:
        rows = first + torch.remainder(channel + extra, orientations)[:, None]
        return stacked.index_select(0, rows.flatten()).view(len(angle), -1, stacked.shape[1])

    return torch.lerp(turn(0), turn(1), share).view(pooled.shape)


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Average-pool upright regions with individually shifted bins.

    Args:
        input: (B, C, H, W) floating point.
        rois: (R, 5): batch index, x1, y1, x2, y2 in image pixels.
        offset: (R, 2, pooled_height, pooled_width): shifts x, then y, in region sizes; empty for none.
        output: (R, C, pooled_height, pooled_width), written in place.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for one per map pixel.
        gamma: factor on `offset`.

    Raises:
        ValueError: a shape does not fit.
        IndexError: the image of a region is out of range.
    """
    image = check_pooling(input, rois, output, 5, (pooled_height, pooled_width))
    check_shifts(offset, rois, (pooled_height, pooled_width))
    if output.numel() > 0:
        box = rois[:, 1:5].to(compute_dtype(input))
        shift = offset.detach().to(box.dtype)
        bins = (pooled_height, pooled_width)
        _pool(input, image, *shifted_places(box, shift, bins, spatial_scale, sampling_ratio, gamma), output)


def check_shifts(offset: Tensor, rois: Tensor, bins: tuple[int, int], name: str = "offset") -> None:
    """Raise ValueError unless `offset` is empty or has an x and a y for every bin of every region."""
    if offset.numel() > 0 and tuple(offset.shape) != (len(rois), 2, *bins):
        raise ValueError(f"{name} must be empty or {(len(rois), 2, *bins)}, got {tuple(offset.shape)}")
    check_floating(**{name: offset})
    check_same_device(**{"rois": rois, name: offset})


def bezier_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Average-pool regions between two cubic Bézier curves.

    Args:
        input: (B, C, H, W) floating point.
        rois: (R, 17): batch index, then eight control points x, y in image pixels: four of the upper curve
            from left to right, four of the lower one from right to left.
        output: (R, C, aligned_height, aligned_width), written in place.
        aligned_height: bins down.
        aligned_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for one per map pixel.
        aligned: shift by half a pixel.

    Raises:
        ValueError: a shape does not fit.
        IndexError: the image of a region is out of range.
    """
    image = check_pooling(input, rois, output, BEZIER_WIDTH, (aligned_height, aligned_width))
    if output.numel() > 0:
        points = rois[:, 1:BEZIER_WIDTH].to(compute_dtype(input))
        bins = (aligned_height, aligned_width)
        _pool(input, image, *bent_places(points, bins, spatial_scale, sampling_ratio, aligned), output)


def rotated_places(
    box: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool, clockwise: bool
) -> tuple[Tensor, Places]:
    """Return grids and sample positions for rotated rectangles (R, 5) in image pixels."""
    centre = box[:, :2] * scale - (0.5 if aligned else 0.0)
    extent = box[:, 2:4] * scale
    if not aligned:
        extent = extent.clamp(min=1.0)
    elif box.device.type == "cpu" and bool((extent < 0).any()):
        raise ValueError("rois must have widths and heights of at least 0 when aligned")
    angle = -box[:, 4] if clockwise else box[:, 4]
    return _grids(extent, *bins, ratio), _rotate_grid(centre, extent, angle, *bins)


def shifted_places(
    box: Tensor, offset: Tensor, bins: tuple[int, int], scale: float, ratio: int, gamma: float
) -> tuple[Tensor, Places]:
    """Return grids and sample positions for upright rectangles (R, 4) with bins shifted by `offset`."""
    box = box * scale - 0.5
    extent = box[:, 2:] - box[:, :2]
    size = extent / extent.new_tensor([bins[1], bins[0]])
    row = torch.arange(bins[0], device=box.device, dtype=box.dtype).repeat_interleave(bins[1])
    column = torch.arange(bins[1], device=box.device, dtype=box.dtype).repeat(bins[0])
    # Where each bin's region would begin, y and x (R, bins), and where the bin does.
    begin = [box[:, axis, None].expand(-1, len(row)) for axis in (1, 0)]
    if offset.numel() > 0:
        shift = offset.flatten(2)
        begin = [
            one + gamma * extent[:, axis, None] * shift[:, axis]
            for one, axis in zip(begin, (1, 0), strict=True)
        ]
    first = [
        one + at * size[:, axis, None] for one, at, axis in zip(begin, (row, column), (1, 0), strict=True)
    ]

    def places(rows: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
        y = first[0][rows, :, None] + (_middles(down, size) * size[rows, 1, None] / max(down, 1))[:, None]
        x = first[1][rows, :, None] + (_middles(across, size) * size[rows, 0, None] / max(across, 1))[:, None]
        shape = (len(rows), len(row), down, across)
        return y[:, :, :, None].expand(shape).flatten(2), x[:, :, None, :].expand(shape).flatten(2)

    return _grids(extent, *bins, ratio), places


def bent_places(
    points: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> tuple[Tensor, Places]:
    """Return grids and sample positions between two Bézier curves, (R, 16) control points in image pixels."""
    height, width = bins
    points = points.reshape(-1, 8, 2) * scale
    upper, lower = points[:, :4], points[:, 4:].flip(1)
    extent = torch.maximum((upper[:, 0] - upper[:, 3]).abs(), (lower[:, 0] - lower[:, 3]).abs())
    if not aligned:
        extent = extent.clamp(min=1.0)
    u = (torch.arange(width, device=points.device, dtype=points.dtype) / width).double()
    v = (torch.arange(height, device=points.device, dtype=points.dtype) / height)[:, None, None]
    # Bernstein polynomials of degree three; as in the reference the curves are summed in float64 and rounded.
    basis = torch.stack(((1 - u) ** 3, 3 * u * (1 - u) ** 2, 3 * u**2 * (1 - u), u**3))
    top = torch.einsum("rkc,kw->rwc", upper.double(), basis).to(points.dtype)[:, None]
    bottom = torch.einsum("rkc,kw->rwc", lower.double(), basis).to(points.dtype)[:, None]
    centre = (bottom * v).double() + top.double() * (1 - v.double()) - (0.5 if aligned else 0.0)
    centre = centre.to(points.dtype).flatten(1, 2)
    size = extent / extent.new_tensor([width, height])

    def places(rows: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
        half, step = size[rows] * 0.5, size[rows]
        y = (centre[rows, :, 1] - half[:, 1, None])[..., None]
        y = y + (_middles(down, size) * step[:, 1, None] / max(down, 1))[:, None]
        x = (centre[rows, :, 0] - half[:, 0, None])[..., None]
        x = x + (_middles(across, size) * step[:, 0, None] / max(across, 1))[:, None]
        shape = (len(rows), centre.shape[1], down, across)
        return (
            y[:, :, :, None].expand(shape).flatten(2),
            x[:, :, None, :].expand(shape).flatten(2),
        )

    return _grids(extent, *bins, ratio), places


def check_regions(input: Tensor, rois: Tensor, width: int, name: str = "input") -> Tensor:
    """Check `input` (B, C, H, W) and `rois` (R, `width`); return the image (R,) int64 of each region."""
    check_rank(name, input, 4)
    check_width("rois", rois, width)
    check_floating(**{name: input, "rois": rois})
    check_same_device(**{name: input, "rois": rois})
    if rois.shape[0] > 0 and input.numel() == 0:
        raise ValueError(f"{name} must have pixels to take regions of, got shape {tuple(input.shape)}")
    if rois.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=rois.device)
    low, high = torch.aminmax(rois[:, 0])
    finite = torch.isfinite(rois).all().to(low.dtype)
    lowest, highest, usable = torch.stack((low, high, finite)).tolist()
    if not usable:
        raise ValueError("rois must be finite")
    if not (lowest >= 0 and highest < input.shape[0]):
        raise IndexError(f"rois name images {lowest:.0f} to {highest:.0f} but {name} has {input.shape[0]}")
    return rois[:, 0].long()


def check_pooling(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    width: int,
    bins: tuple[int, int],
    name: str = "input",
    pooled: str = "output",
) -> Tensor:
    """Run `check_regions`, and check that `output` has a value per region, channel and bin."""
    image = check_regions(input, rois, width, name)
    expected = (rois.shape[0], input.shape[1], *bins)
    if tuple(output.shape) != expected:
        raise ValueError(f"{pooled} must be {expected}, got {tuple(output.shape)}")
    check_floating(**{pooled: output})
    check_same_device(**{name: input, pooled: output})
    return image


def _middles(count: int, like: Tensor) -> Tensor:
    """(count,) middles of the first `count` intervals of length 1."""
    return torch.arange(count, device=like.device, dtype=like.dtype) + 0.5


def _rotate_grid(centre: Tensor, extent: Tensor, angle: Tensor, bins_y: int, bins_x: int) -> Places:
    """Places on a regular grid over rectangles: (R, 2) `centre` and `extent` x y, (R,) `angle`."""
    size = extent / extent.new_tensor([bins_x, bins_y])

    def along(rows: Tensor, axis: int, bins: int, grid: int) -> Tensor:
        # Summed in the reference's order: a sample at the edge of the map would else fall on its other side.
        step, start = size[rows, axis, None], -extent[rows, axis, None] / 2
        first = start + torch.arange(bins, device=extent.device, dtype=extent.dtype) * step
        return first[:, :, None] + (_middles(grid, extent) * step / max(grid, 1))[:, None]

    def places(rows: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
        shape = (len(rows), bins_y, bins_x, down, across)
        v = (
            along(rows, 1, bins_y, down)[:, :, None, :, None]
            .expand(shape)
            .reshape(len(rows), bins_y * bins_x, down * across)
        )
        u = along(rows, 0, bins_x, across)[:, None, :, None, :].expand(shape).reshape(v.shape)
        x, y = centre[rows, 0, None, None], centre[rows, 1, None, None]
        cos, sin = torch.cos(angle[rows])[:, None, None], torch.sin(angle[rows])[:, None, None]
        return v * cos - u * sin + y, v * sin + u * cos + x

    return places


def _grids(extent: Tensor, bins_y: int, bins_x: int, ratio: int) -> Tensor:
    """Compute (R, 2) int64 samples per bin, down and across."""
    if ratio > 0:
        return torch.full(extent.shape, ratio, dtype=torch.int64, device=extent.device)
    return torch.ceil(extent.flip(1) / extent.new_tensor([bins_y, bins_x])).long().clamp(min=0)


def _pool(input: Tensor, image: Tensor, grids: Tensor, places: Places, output: Tensor) -> None:
    maps = input.detach().permute(0, 2, 3, 1).to(compute_dtype(input)).contiguous()
    for block, y, x in sample_blocks(grids, places, output.shape[2] * output.shape[3]):
        pooled = average_samples(maps, image[block], y, x)
        output[block] = pooled.transpose(1, 2).reshape(len(block), *output.shape[1:]).to(output.dtype)


def sample_blocks(grids: Tensor, places: Places, bins: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (rows, y, x) of regions with the same sampling grid, in blocks of bounded memory.

    Regions without samples have (R, bins, 0) `y` and `x`.
    """
    kinds, kind = torch.unique(grids, dim=0, return_inverse=True)
    for number, (down, across) in enumerate(kinds.tolist()):
        rows = (kind == number).nonzero().squeeze(1)
        for block in torch.split(rows, max(1, SAMPLES_PER_BLOCK // (bins * max(1, down * across)))):
            yield block, *places(block, down, across)
