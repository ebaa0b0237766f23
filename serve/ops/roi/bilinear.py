"""Bilinear samples of feature maps at scattered positions, the base of the image kernels.

There are two rules for samples outside of a map. *Zero padding* (deformable convolution and attention): pixels outside
are zero, so a sample fades out within one pixel of the border. *Clamping* (RoIAlign and similar): a sample up to one
pixel outside has the border's value, one further out is zero. A NaN position is outside under both.

On any device, samples are sums of four weighted rows of a table (one row per pixel), by
`torch.nn.functional.embedding_bag`, which is differentiable. On CPU in float32, numba loops along channels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from serve.ops.checks import as_numpy, compute_dtype, uses_float32_kernel
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for

__all__ = [
    "add_at_corners",
    "average_samples",
    "average_samples_torch",
    "clamped_corners",
    "mix_rows",
    "padded_corners",
    "pixel_rows",
]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


def pixel_rows(maps: Tensor) -> Tensor:
    """Reshape (..., H, W, C) maps to a (pixels + 1, C) table; the last row is zero, for samples outside."""
    rows = maps.reshape(-1, maps.shape[-1])
    return torch.cat((rows, rows.new_zeros((1, rows.shape[1]))))


def mix_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum `table` (T, C) rows (N, S) int64 times `weights` (N, S) for each of N bags; (N, C)."""
    if rows.numel() == 0 or table.shape[1] == 0:
        return table.new_zeros((rows.shape[0], table.shape[1]))
    return functional.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")


def padded_corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the four pixels around each position (..., 4) int64 ``row * width + column`` and their weights.

    Zero padding: pixels outside are -1.
    """
    inside = (y > -1) & (x > -1) & (y < height) & (x < width)
    y, x = torch.where(inside, y, torch.zeros_like(y)), torch.where(inside, x, torch.zeros_like(x))
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    rows = torch.stack((top, top, top + 1, top + 1), dim=-1)
    columns = torch.stack((left, left + 1, left, left + 1), dim=-1)
    weights = torch.stack(
        ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right), dim=-1
    )
    there = inside[..., None] & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.long() * width + columns.long()
    return torch.where(there, index, torch.full_like(index, -1)), weights


def clamped_corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Run `padded_corners` with clamping: all four pixels are -1 more than one pixel outside."""
    inside = (y >= -1) & (x >= -1) & (y <= height) & (x <= width)
    y = torch.where(inside, y, torch.zeros_like(y)).clamp(0, height - 1)
    x = torch.where(inside, x, torch.zeros_like(x)).clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    rows = torch.stack((top, top, top + 1, top + 1), dim=-1).long().clamp(max=height - 1)
    columns = torch.stack((left, left + 1, left, left + 1), dim=-1).long().clamp(max=width - 1)
    weights = torch.stack(
        ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right), dim=-1
    )
    index = rows * width + columns
    return torch.where(inside[..., None], index, torch.full_like(index, -1)), weights


def average_samples(maps: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Compute (R, P, C) means of clamped bilinear samples.

    Args:
        maps: (B, H, W, C) contiguous, in the compute dtype.
        image: (R,) int64, index of each region's map, in range.
        y: (R, P, S) rows in map pixels: S samples for P points per region.
        x: (R, P, S) columns in map pixels.
    """
    if not uses_float32_kernel(maps):
        return average_samples_torch(maps, image, y, x)
    pooled = np.empty((*y.shape[:2], maps.shape[3]), dtype=np.float32)
    source, number = as_numpy(maps), as_numpy(image.long())
    rows, columns = as_numpy(y.float()), as_numpy(x.float())

    def work(first: int, last: int) -> None:
        _average_kernel(source, number, rows, columns, pooled, first, last)

    parallel_for(work, y.shape[0])
    return torch.from_numpy(pooled)


def average_samples_torch(maps: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Run `average_samples` on any device."""
    height, width, channels = maps.shape[1:]
    regions, points, samples = y.shape
    index, weights = clamped_corners(y, x, height, width)
    outside = maps.shape[0] * height * width
    index = torch.where(index < 0, outside, index + image[:, None, None, None] * (height * width))
    weights = weights.to(maps.dtype) / max(samples, 1)
    mixed = mix_rows(
        pixel_rows(maps),
        index.reshape(regions * points, samples * 4),
        weights.reshape(regions * points, samples * 4),
    )
    return mixed.view(regions, points, channels)


def add_at_corners(maps: Tensor, plane: Tensor, pixel: Tensor, weights: Tensor, values: Tensor) -> None:
    """Add `values` times `weights` to given pixels of `maps` (B, C, H, W), in a fixed order on any device.

    Args:
        maps: floating point, changed in place.
        plane: ``image * C + channel``, int64, of a shape that broadcasts to that of `values`.
        pixel: (..., K) int64 ``row * W + column`` from `clamped_corners`; negative ones are skipped.
        weights: (..., K).
        values: (...).
    """
    dtype = compute_dtype(maps)
    flat = maps.detach().to(dtype, copy=True).reshape(-1)
    there = pixel >= 0
    index = plane[..., None] * (maps.shape[2] * maps.shape[3]) + pixel.clamp(min=0)
    added = values.detach().to(dtype)[..., None] * weights
    there = there.expand(added.shape)
    flat.index_put_((index.expand(added.shape)[there],), added[there], accumulate=True)
    maps.copy_(flat.view(maps.shape))


@jit
def _average_kernel(
    maps: F32, image: I64, ys: F32, xs: F32, pooled: F32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    height, width, channels = maps.shape[1], maps.shape[2], maps.shape[3]
    one, zero = np.float32(1), np.float32(0)
    share = one / np.float32(max(ys.shape[2], 1))
    for r in range(first, last):
        source = maps[image[r]]
        for p in range(ys.shape[1]):
            out = pooled[r, p]
            out[:] = zero
            for s in range(ys.shape[2]):
                y, x = ys[r, p, s], xs[r, p, s]
                # The comparison is false for NaN too.
                if not (y >= -1 and x >= -1 and y <= height and x <= width):
                    continue
                y = min(max(y, zero), np.float32(height - 1))
                x = min(max(x, zero), np.float32(width - 1))
                y0, x0 = np.int64(y), np.int64(x)
                y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                down, right = np.float32(y - y0), np.float32(x - x0)
                w00 = np.float32((one - down) * (one - right) * share)
                w01 = np.float32((one - down) * right * share)
                w10 = np.float32(down * (one - right) * share)
                w11 = np.float32(down * right * share)
                a, b, c, d = source[y0, x0], source[y0, x1], source[y1, x0], source[y1, x1]
                for ch in range(channels):
                    out[ch] += w00 * a[ch] + w01 * b[ch] + w10 * c[ch] + w11 * d[ch]
