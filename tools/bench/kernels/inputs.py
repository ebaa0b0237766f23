"""Synthetic, seeded inputs for kernels: boxes, points, feature maps, indices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Inputs"]


class Inputs:
    """Generator of tensors for one call, on one device.

    `real` selects inference sizes instead of small ones (see `size`).
    """

    def __init__(self, real: bool = True, device: str = "cpu", seed: int = 0) -> None:
        self.real = real
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def size(self, small: int, real: int) -> int:
        """Return `real` or `small`."""
        return real if self.real else small

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw float32 in [low, high)."""
        made = torch.rand(shape, generator=self._generator) * (high - low) + low
        return made.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Draw float32 with mean 0 and variance 1."""
        return torch.randn(shape, generator=self._generator).to(self.device)

    def whole(self, limit: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Draw integers in [0, limit)."""
        return torch.randint(limit, shape, generator=self._generator, dtype=dtype).to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate an output buffer."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def numbers(self, *values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Create a tensor of `values`."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def scores(self, count: int) -> Tensor:
        """Draw (count,) scores in [0, 1)."""
        return self.uniform(count)

    def boxes(self, count: int, extent: float) -> Tensor:
        """Draw (count, 4) boxes x1, y1, x2, y2 in pixels of an image of `extent` squared, many overlapping."""
        corner = self.uniform(count, 2, high=0.8 * extent)
        return torch.cat(
            (corner, corner + self.uniform(count, 2, low=0.02 * extent, high=0.2 * extent)), dim=1
        )

    def rotated(self, count: int, extent: float) -> Tensor:
        """Draw (count, 5) rotated boxes: centre x, y, width, height in pixels, angle in radians."""
        return torch.cat(
            (
                self.uniform(count, 2, high=extent),
                self.uniform(count, 2, low=0.02 * extent, high=0.2 * extent),
                self.uniform(count, 1, low=-math.pi, high=math.pi),
            ),
            dim=1,
        )

    def polygons(self, count: int, corners: int, extent: float) -> Tensor:
        """Draw (count, 2 * corners) x, y of convex polygons, counter-clockwise."""
        centre = self.uniform(count, 1, 2, low=0.1 * extent, high=0.9 * extent)
        radius = self.uniform(count, 1, 1, low=0.02 * extent, high=0.1 * extent)
        turn = self.uniform(count, 1, high=2 * math.pi)
        angle = turn + torch.arange(corners, device=self.device) * (2 * math.pi / corners)
        ring = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
        return (centre + radius * ring).flatten(1)

    def boxes3d(self, count: int) -> Tensor:
        """Draw (count, 7) x, y, z, length, width, height in metres, yaw: cars on a street of 70 x 80 m."""
        place = self.uniform(count, 3) * self.numbers(70.0, 80.0, 1.0) - self.numbers(0.0, 40.0, 1.5)
        extent = self.uniform(count, 3) * self.numbers(1.5, 0.5, 0.5) + self.numbers(3.5, 1.5, 1.4)
        return torch.cat((place, extent, self.uniform(count, 1, low=-math.pi, high=math.pi)), dim=1)

    def cloud(self, count: int, columns: int = 3) -> Tensor:
        """Draw (count, columns) points of the same street, in metres, denser near the sensor."""
        far = self.uniform(count, 1) ** 2 * 70
        angle = self.uniform(count, 1, low=-0.55, high=0.55)
        place = torch.cat((far * torch.cos(angle), far * torch.sin(angle)), dim=1)
        return torch.cat(
            (place, self.uniform(count, 1, low=-2.5, high=0.5), self.uniform(count, columns - 3)), dim=1
        )

    def voxels(self, count: int, *shape: int) -> Tensor:
        """Draw about `count` distinct voxels of one cloud, (N, 1 + D) int32 in lexicographic order."""
        cells = math.prod(shape)
        flat = torch.unique(torch.randint(cells, (count,), generator=self._generator))
        columns = []
        for extent in reversed(shape):
            columns.append(flat % extent)
            flat = flat // extent
        columns.append(torch.zeros_like(flat))
        return torch.stack(columns[::-1], dim=1).to(torch.int32).to(self.device)

    def regions(self, count: int, extent: float) -> Tensor:
        """Draw (count, 5) regions: image 0, then `boxes`."""
        return torch.cat((self.zeros(count, 1), self.boxes(count, extent)), dim=1)

    def rotated_regions(self, count: int, extent: float) -> Tensor:
        """Draw (count, 6) regions: image 0, then `rotated`."""
        return torch.cat((self.zeros(count, 1), self.rotated(count, extent)), dim=1)
