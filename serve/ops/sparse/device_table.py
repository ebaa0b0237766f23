"""Sparse convolution on any device by whole tensors: all kernel offsets at once, one synchronisation for all layers.

A neighbour table has, for each output voxel and kernel offset, the row of the input voxel, or the number of input
voxels for none. Neighbours are found by binary search in sorted linear indices of a grid with room around it, in which
a neighbour under one offset is always the same distance away. The voxels that a chain of strided layers reaches are
found from the first layer's: along one dimension, what a coordinate reaches through the chain is a short list, and a
voxel reaches the product of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from serve.ops.constants import constant
from serve.ops.device_kernels import uses_triton

__all__ = ["ConvGeometry", "gather_convolve", "invert_rows", "neighbour_rows", "reached_voxels"]

# Larger than any linear index, and the sum of four stays below the largest int64.
_NOWHERE = 1 << 60
# Elements of gathered features at a time: 256 MiB in float32.
MAX_GATHERED = 1 << 26


@dataclass(frozen=True)
class ConvGeometry:
    """Extents of one sparse convolution that is not transposed, by dimension."""

    ksize: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]


def neighbour_rows(inputs: Tensor, outputs: Tensor, geometry: ConvGeometry, *, ascending: bool) -> Tensor:
    """Find the input voxel of each output voxel under each kernel offset.

    Args:
        inputs: (N, 1 + D) int: batch index, then coordinates, each voxel once and inside, N > 0.
        outputs: (M, 1 + D) int.
        geometry: extents.
        ascending: whether `inputs` are in lexicographic order.

    Returns:
        (M, K) int64 or int32 rows of `inputs`, N for none.
    """
    device = inputs.device
    multipliers, deltas, stride, shift = _padded_grid(geometry)
    known = (inputs * constant(multipliers, torch.int64, device)).sum(dim=1) + shift
    order: Tensor | None = None
    if not ascending:
        known, order = torch.sort(known)
    base = (outputs * constant(stride, torch.int64, device)).sum(dim=1)
    if uses_triton(known):
        from serve.ops.triton.neighbours import find_rows

        return find_rows(known, order, base, constant(deltas, torch.int64, device))  # type: ignore[no-any-return]
    wanted = base[:, None] + constant(deltas, torch.int64, device)
    place = torch.searchsorted(known, wanted)
    none = len(inputs)
    found = torch.cat((known, known.new_full((1,), -1)))[place] == wanted
    if order is not None:
        place = torch.cat((order, order.new_full((1,), none)))[place]
    return torch.where(found, place, none)


@lru_cache(maxsize=256)
def _padded_grid(
    geometry: ConvGeometry,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Lay out a grid with room for every position that a window covers.

    Returns:
        Distance in the grid per step of the batch index and of each input coordinate; per kernel offset; per step of
        each output coordinate; and of an input voxel from where an output voxel of the same numbers starts.
    """
    extents = [
        max(p + n, (out - 1) * s + (k - 1) * d + 1)
        for k, s, p, d, n, out in zip(
            geometry.ksize, geometry.stride, geometry.padding, geometry.dilation,
            geometry.in_shape, geometry.out_shape, strict=True,
        )
    ]  # fmt: skip
    steps = [prod(extents[d + 1 :]) for d in range(len(extents))]
    offsets = [0]
    for k, d, step in zip(geometry.ksize, geometry.dilation, steps, strict=True):
        offsets = [offset + position * d * step for offset in offsets for position in range(k)]
    frame = prod(extents)
    shift = sum(p * step for p, step in zip(geometry.padding, steps, strict=True))
    strides = (frame, *(s * step for s, step in zip(geometry.stride, steps, strict=True)))
    return (frame, *steps), tuple(offsets), strides, shift


def invert_rows(table: Tensor, inputs: int) -> Tensor:
    """Turn a table (M, K) over `inputs` voxels round: (inputs, K) rows of the outputs, M for none."""
    outputs, offsets = table.shape
    inverse = table.new_full((inputs + 1, offsets), outputs)
    rows = torch.arange(outputs, device=table.device)[:, None].expand(-1, offsets)
    return inverse.scatter_(0, table.long(), rows.to(table.dtype))[:-1]


def gather_convolve(
    features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, *, relu: bool = False
) -> Tensor:
    """Convolve by one matrix product over the gathered features of all offsets.

    Args:
        features: (N, Cin) float.
        weight: (K, Cin, Cout).
        bias: (Cout,).
        table: (M, K) int64 or int32 rows of `features`, N for none.
        relu: apply a ReLU.

    Returns:
        (M, Cout), in half precision inside autocast.
    """
    kind = features.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if uses_triton(features) and features.dtype == weight.dtype:
        from serve.ops.triton.sparse_conv import convolve_rows

        return convolve_rows(features, weight, bias, table, relu)  # type: ignore[no-any-return]
    offsets = table.shape[1]
    padded = torch.cat((features, features.new_zeros((1, features.shape[1]))))
    matrix = weight[:offsets].reshape(offsets * weight.shape[1], weight.shape[2])
    made = []
    for rows in torch.split(table, max(1, MAX_GATHERED // matrix.shape[0])):
        gathered = padded.index_select(0, rows.reshape(-1)).view(len(rows), matrix.shape[0])
        made.append(torch.mm(gathered, matrix) if bias is None else torch.addmm(bias, gathered, matrix))
    output = made[0] if len(made) == 1 else torch.cat(made)
    return output.relu_() if relu else output


def reached_voxels(
    voxels: Tensor, batch_size: int, chains: Sequence[tuple[ConvGeometry, ...]]
) -> list[Tensor]:
    """Find the output voxels of chains of strided convolutions, with one synchronisation for all.

    Args:
        voxels: (N, 1 + D) int input voxels of the first layers, N > 0.
        batch_size: clouds in the batch.
        chains: one or more geometries each, of layers that follow each other.

    Returns:
        (M, 1 + D) int32 per chain, in lexicographic order.

    Raises:
        IndexError: a voxel lies outside.
    """
    if not chains:
        return []
    device = voxels.device
    limits = (batch_size, *chains[0][0].in_shape)
    low, high = torch.aminmax(voxels, dim=0)
    # Outside of the grid there is no list; such voxels are reported below.
    inside = voxels.clamp(constant((0,) * len(limits), torch.int64, device), _last(limits, device))
    columns = inside.long().unbind(dim=1)
    found = []
    for chain in chains:
        shape = chain[-1].out_shape
        keys = (columns[0] * prod(shape)).view(-1, *[1] * len(shape))
        for d, reached in enumerate(_reached_keys(chain)):
            ways = constant(reached, torch.int64, device)[columns[d + 1]]
            keys = keys + ways.view(-1, *(ways.shape[1] if i == d else 1 for i in range(len(shape))))
        ordered = torch.sort(keys.flatten()).values
        first = torch.cat((ordered[:1] < _NOWHERE, (ordered[1:] != ordered[:-1]) & (ordered[1:] < _NOWHERE)))
        found.append((ordered, first, torch.cumsum(first, dim=0)))
    counts, lows, highs = _download(torch.stack([numbers[-1] for _, _, numbers in found]), low, high)
    if min(lows) < 0 or any(h >= limit for h, limit in zip(highs, limits, strict=True)):
        raise IndexError(
            f"voxels run from {lows} to {highs} but must lie in [0, (batch {batch_size}, "
            f"spatial shape {list(limits[1:])}))"
        )
    rows = []
    for chain, (ordered, first, numbers), count in zip(chains, found, counts, strict=True):
        places = ordered.new_empty(count + 1).scatter_(0, torch.where(first, numbers - 1, count), ordered)[
            :-1
        ]
        shape = chain[-1].out_shape
        steps = tuple(prod(shape[d:]) for d in range(len(shape) + 1))
        split = places[:, None].div(constant(steps, torch.int64, device), rounding_mode="floor")
        rows.append(split.remainder(constant((batch_size, *shape), torch.int64, device)).to(torch.int32))
    return rows


def _last(limits: tuple[int, ...], device: torch.device) -> Tensor:
    return constant(tuple(limit - 1 for limit in limits), torch.int64, device)


def _download(*vectors: Tensor) -> list[list[int]]:
    """Return the numbers of several vectors, waiting once for the device."""
    numbers = torch.cat([vector.long() for vector in vectors]).tolist()
    found = []
    for vector in vectors:
        found.append(numbers[: len(vector)])
        numbers = numbers[len(vector) :]
    return found


@lru_cache(maxsize=256)
def _reached_keys(chain: tuple[ConvGeometry, ...]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """List, by dimension and input coordinate, the linear indices of all coordinates that the chain reaches."""
    shape = chain[-1].out_shape
    found = []
    for d in range(len(shape)):
        reached = [{coordinate} for coordinate in range(chain[0].in_shape[d])]
        for geometry in chain:
            reached = [
                {place for coordinate in places for place in _reach(geometry, d, coordinate)}
                for places in reached
            ]
        ways, step = max(1, *map(len, reached)), prod(shape[d + 1 :])
        found.append(
            tuple(
                (*(place * step for place in sorted(places)), *[_NOWHERE] * (ways - len(places)))
                for places in reached
            )
        )
    return tuple(found)


def _reach(geometry: ConvGeometry, d: int, coordinate: int) -> set[int]:
    """Return the output coordinates whose window along dimension `d` covers an input coordinate."""
    shifted = (
        coordinate + geometry.padding[d] - position * geometry.dilation[d]
        for position in range(geometry.ksize[d])
    )
    places = {s // geometry.stride[d] for s in shifted if s % geometry.stride[d] == 0}
    return {place for place in places if 0 <= place < geometry.out_shape[d]}
