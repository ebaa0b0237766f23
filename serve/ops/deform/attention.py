"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021).

Each query and head takes a weighted sum of a few bilinear samples of each level, zeros outside. The reference is mmcv
2.1.0 `csrc/common/cuda/ms_deform_attn_cuda_kernel.cuh`. On CPU mmcv's layers use a slower torch function;
`serve.ops.patches` puts `attend` in its place. Gradients come from autograd on the torch version.
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
    check_tensor,
    compute_dtype,
    uses_float32_kernel,
)
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for
from serve.ops.device_kernels import uses_triton
from serve.ops.roi.bilinear import mix_rows, padded_corners

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
SAMPLES_PER_BLOCK = 1 << 24


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Compute (B, queries, heads * channels) in the dtype of `value`.

    Args:
        value: (B, keys, heads, channels) floating point; pixels of a level row by row, levels concatenated.
        value_spatial_shapes: (levels, 2) int: height, width of each level.
        value_level_start_index: (levels,) int: first key of each level.
        sampling_locations: (B, queries, heads, levels, points, 2): x, y as fractions of the level, pixel
            centres at (i + 0.5) / size.
        attention_weights: (B, queries, heads, levels, points).
        im2col_step: unused.

    Raises:
        ValueError: a shape does not fit the others, or the levels exceed the keys.
        TypeError: `value` is not floating point.
    """
    tensors = (value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
    if uses_triton(value) and value_spatial_shapes.device == value.device == value_level_start_index.device:
        from serve.ops.triton.attention import attend_samples

        # The levels' sizes stay on the device: samples outside of `value` are zero there.
        _check_shapes(*tensors)
        return attend_samples(*tensors)  # type: ignore[no-any-return]
    levels = _check(*tensors)
    if not uses_float32_kernel(value) or value.numel() == 0:
        return _attend_torch(value, levels, sampling_locations, attention_weights).to(value.dtype)
    batch, queries, heads = sampling_locations.shape[:3]
    result = np.empty((batch, queries, heads, value.shape[3]), dtype=np.float32)
    source, grid = as_numpy(value.float()), np.array(levels, dtype=np.int64).reshape(-1, 3)
    places, weights = as_numpy(sampling_locations.float()), as_numpy(attention_weights.float())

    def work(first: int, last: int) -> None:
        _attend_kernel(source, grid, places, weights, result, first, last)

    parallel_for(work, batch * queries)
    return torch.from_numpy(result).flatten(2).to(value.dtype)


def attend(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Call `ms_deform_attn_forward` with the arguments of mmcv's ``multi_scale_deformable_attn_pytorch``.

    It replaces that function, because mmcv's layers never call the kernel on CPU. Levels are concatenated. If
    gradients are needed, the torch version runs, which has them.
    """
    pixels = value_spatial_shapes.prod(dim=1)
    starts = pixels.cumsum(0) - pixels
    tensors = (value, sampling_locations, attention_weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        levels = _check(value, value_spatial_shapes, starts, sampling_locations, attention_weights)
        return _attend_torch(value, levels, sampling_locations, attention_weights).to(value.dtype)
    return ms_deform_attn_forward(
        value, value_spatial_shapes, starts, sampling_locations, attention_weights, 1
    )


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of `ms_deform_attn_forward` into the three ``grad_`` tensors; arguments as there."""
    levels = _check(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
    )
    batch, queries, heads = sampling_locations.shape[:3]
    check_tensor(("value", value), "grad_output", grad_output, batch, queries, heads * value.shape[3])
    for name, grad, of in (
        ("grad_value", grad_value, value),
        ("grad_sampling_loc", grad_sampling_loc, sampling_locations),
        ("grad_attn_weight", grad_attn_weight, attention_weights),
    ):
        check_tensor(("value", value), name, grad, *of.shape)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
        result = _attend_torch(leaves[0], levels, leaves[1], leaves[2])
        grads = torch.autograd.grad(result, leaves, grad_output.to(result.dtype).view_as(result))
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


def _check(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> list[tuple[int, int, int]]:
    """Check the arguments; return (start, height, width) of each level, in one transfer from the device."""
    _check_shapes(value, shapes, starts, locations, weights)
    keys = value.shape[1]
    levels = torch.cat((starts[:, None].to(shapes.device), shapes), dim=1).tolist()
    for start, height, width in levels:
        if start < 0 or height < 1 or width < 1 or start + height * width > keys:
            raise ValueError(
                f"value_spatial_shapes: a level of {height} x {width} from key {start} on "
                f"does not fit into {keys} keys"
            )
    return [(start, height, width) for start, height, width in levels]


def _check_shapes(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Check all but the numbers in `shapes` and `starts`."""
    check_rank("value", value, 4)
    check_rank("sampling_locations", locations, 6)
    check_floating(value=value, sampling_locations=locations, attention_weights=weights)
    check_integer(value_spatial_shapes=shapes, value_level_start_index=starts)
    for name, table in (("value_spatial_shapes", shapes), ("value_level_start_index", starts)):
        if table.device.type == "meta":
            raise ValueError(f"{name} must have values, got a tensor on {table.device}")
    check_same_device(value=value, sampling_locations=locations, attention_weights=weights)
    batch, _, heads, _ = value.shape
    count = locations.shape[3]
    if tuple(shapes.shape) != (count, 2) or tuple(starts.shape) != (count,):
        raise ValueError(
            f"value_spatial_shapes must be {(count, 2)} and value_level_start_index {(count,)}, "
            f"got {tuple(shapes.shape)} and {tuple(starts.shape)}"
        )
    if (locations.shape[0], locations.shape[2], locations.shape[5]) != (batch, heads, 2):
        raise ValueError(
            f"sampling_locations must be ({batch}, queries, {heads}, levels, points, 2), "
            f"got {tuple(locations.shape)}"
        )
    if weights.shape != locations.shape[:5]:
        raise ValueError(
            f"attention_weights must be {tuple(locations.shape[:5])}, got {tuple(weights.shape)}"
        )


def _attend_torch(
    value: Tensor, levels: list[tuple[int, int, int]], locations: Tensor, attention: Tensor
) -> Tensor:
    """Attend on any device, differentiably; (B, queries, heads * channels) in the compute dtype."""
    dtype = compute_dtype(value)
    batch, keys, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    rows = value.to(dtype).reshape(batch * keys * heads, channels)
    table = torch.cat((rows, rows.new_zeros((1, channels))))
    image = torch.arange(batch, device=value.device)[:, None, None, None, None]
    head = torch.arange(heads, device=value.device)[None, None, :, None, None]
    parts = []
    block = max(1, SAMPLES_PER_BLOCK // max(1, batch * heads * len(levels) * points * 4))
    for start in range(0, queries, block):
        where = locations[:, start : start + block].to(dtype)
        share = attention[:, start : start + block].to(dtype)
        indices, weights = [], []
        for level, (first, height, width) in enumerate(levels):
            x = where[:, :, :, level, :, 0] * width - 0.5
            y = where[:, :, :, level, :, 1] * height - 0.5
            index, weight = padded_corners(y, x, height, width)
            key = (image * keys + first + index) * heads + head
            indices.append(torch.where(index < 0, table.shape[0] - 1, key))
            weights.append(weight * share[:, :, :, level, :, None])
        bags = batch * where.shape[1] * heads
        samples = len(levels) * points * 4
        if samples == 0 or bags == 0:
            parts.append(table.new_zeros((batch, where.shape[1], heads * channels)))
            continue
        mixed = mix_rows(
            table,
            torch.stack(indices, dim=3).reshape(bags, samples),
            torch.stack(weights, dim=3).reshape(bags, samples),
        )
        parts.append(mixed.view(batch, where.shape[1], heads * channels))
    return torch.cat(parts, dim=1) if parts else table.new_zeros((batch, 0, heads * channels))


@jit
def _attend_kernel(
    value: F32, levels: I64, places: F32, weights: F32, result: F32, first: int, last: int
) -> None:  # pragma: no cover - compiled
    heads, channels = value.shape[2], value.shape[3]
    queries, points = places.shape[1], places.shape[4]
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
    edge = np.int64(0)
    for row in range(first, last):
        b, q = row // queries, row % queries
        for h in range(heads):
            out = result[b, q, h]
            out[:] = zero
            for level in range(levels.shape[0]):
                start, height, width = levels[level, 0], levels[level, 1], levels[level, 2]
                for p in range(points):
                    x = np.float32(places[b, q, h, level, p, 0] * np.float32(width) - half)
                    y = np.float32(places[b, q, h, level, p, 1] * np.float32(height) - half)
                    # The comparison is false for NaN too.
                    if not (y > -1 and x > -1 and y < height and x < width):
                        continue
                    y0, x0 = np.int64(np.floor(y)), np.int64(np.floor(x))
                    y1, x1 = y0 + 1, x0 + 1
                    down, right = np.float32(y - y0), np.float32(x - x0)
                    share = weights[b, q, h, level, p]
                    up, near = np.float32((one - down) * share), np.float32(one - right)
                    down = np.float32(down * share)
                    w00, w01, w10, w11 = up * near, up * right, down * near, down * right
                    if y0 < 0:
                        w00, w01, y0 = zero, zero, edge
                    if y1 >= height:
                        w10, w11, y1 = zero, zero, height - 1
                    if x0 < 0:
                        w00, w10, x0 = zero, zero, edge
                    if x1 >= width:
                        w01, w11, x1 = zero, zero, width - 1
                    upper, lower = start + y0 * width, start + y1 * width
                    a, c = value[b, upper + x0, h], value[b, lower + x0, h]
                    e, f = value[b, upper + x1, h], value[b, lower + x1, h]
                    for ch in range(channels):
                        out[ch] += w00 * a[ch] + w01 * e[ch] + w10 * c[ch] + w11 * f[ch]
