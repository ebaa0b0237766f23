"""The convolution behind `serve.ops.deform.conv`: sampled rows, then one matrix product per group.

The samples of a block of output pixels become rows of a matrix (numba along channels on CPU, torch elsewhere), one
matrix product per group turns them into outputs, and blocks bound the memory. The mask is optional: v1 is v2 without.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.ops.checks import (
    as_numpy,
    check_floating,
    check_rank,
    check_same_device,
    compute_dtype,
    uses_float32_kernel,
)
from serve.ops.cpu.jit import jit
from serve.ops.cpu.threads import parallel_for
from serve.ops.roi.bilinear import mix_rows, padded_corners, pixel_rows

__all__ = ["Geometry", "check", "convolve", "convolve_torch", "gradients"]

F32 = npt.NDArray[np.float32]
# Bytes of sampled rows per block. Measured on 2 cores: with less, threads synchronize too often.
CPU_BLOCK_BYTES = 1 << 24
DEVICE_BLOCK_BYTES = 1 << 28


@dataclass(frozen=True)
class Geometry:
    """Parameters of the convolution; pairs are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int
    # mmcv's names of the ten numbers, for messages: kernel, stride, padding, dilation (height, width), groups.
    names: tuple[str, ...] = ()

    @property
    def taps(self) -> int:
        """Samples per output pixel and deformable group."""
        return self.kernel[0] * self.kernel[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute rows and columns of the output."""
        rows, columns = (
            (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                (height, width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return rows, columns


def check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor | None,
    output: Tensor,
    geometry: Geometry,
    weight_name: str = "weight",
    output_name: str = "output",
) -> None:
    """Raise ValueError (TypeError for a dtype) unless all tensors are consistent."""
    check_rank("input", input, 4)
    check_rank(weight_name, weight, 4)
    named = {"input": input, weight_name: weight, "offset": offset, output_name: output}
    check_floating(**named)
    check_same_device(**named)
    batch, channels, height, width = input.shape
    groups, deform_groups = geometry.groups, geometry.deform_groups
    numbers = (
        *geometry.kernel,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        groups,
        deform_groups,
    )
    for place, (name, value) in enumerate(zip(geometry.names, numbers, strict=True)):
        least = 0 if place in (4, 5) else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if channels % groups or channels % deform_groups or weight.shape[0] % groups:
        raise ValueError(
            f"input channels {channels} and {weight_name} rows {weight.shape[0]} must divide into group={groups} "
            f"and deformable_group={deform_groups}"
        )
    rows, columns = geometry.output_size(height, width)
    if rows < 1 or columns < 1:
        raise ValueError(f"input of {height} x {width} leaves an output of {rows} x {columns}: {geometry}")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        weight_name: (weight, (weight.shape[0], channels // groups, *geometry.kernel)),
        "offset": (offset, (batch, deform_groups * 2 * geometry.taps, rows, columns)),
        output_name: (output, (batch, weight.shape[0], rows, columns)),
    }
    if mask is not None:
        check_floating(mask=mask)
        check_same_device(input=input, mask=mask)
        expected["mask"] = (mask, (batch, deform_groups * geometry.taps, rows, columns))
    if bias is not None:
        check_floating(bias=bias)
        check_same_device(input=input, bias=bias)
        expected["bias"] = (bias, (weight.shape[0],))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor | None,
    output: Tensor,
    geometry: Geometry,
) -> None:
    """Write the convolution into `output` (B, O, H', W'); all arguments passed `check`."""
    if output.numel() == 0:
        return
    if not uses_float32_kernel(input):
        output.copy_(convolve_torch(input, weight, bias, offset, mask, geometry))
        return
    direct = output.dtype == torch.float32 and output.is_contiguous()
    result = output if direct else output.new_empty(output.shape, dtype=torch.float32)
    _convolve_cpu(input.detach().float(), weight.detach().float(), offset, mask, result, geometry)
    if bias is not None:
        result += bias.detach().float()[:, None, None]
    if not direct:
        output.copy_(result)


def _flatten_taps(weight: Tensor, groups: int) -> Tensor:
    """Flatten the kernel to one matrix per group, (groups, O / groups, taps * C / groups)."""
    rows, channels = weight.shape[:2]
    return weight.reshape(groups, rows // groups, channels, -1).transpose(2, 3).flatten(2).contiguous()


def _convolve_cpu(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, output: Tensor, geometry: Geometry
) -> None:
    groups, deform_groups, taps = geometry.groups, geometry.deform_groups, geometry.taps
    batch, channels = input.shape[:2]
    pixels = output.shape[2] * output.shape[3]
    # Channels-last: the inner loop and its four neighbours are contiguous in memory.
    maps = as_numpy(input.permute(0, 2, 3, 1))
    shifts = as_numpy(offset.detach().float()).reshape(batch, deform_groups, taps, 2, pixels)
    if mask is None:
        factors = np.empty((batch, 0, taps, pixels), dtype=np.float32)
    else:
        factors = as_numpy(mask.detach().float()).reshape(batch, deform_groups, taps, pixels)
    kernel = _flatten_taps(weight, groups)
    block = min(pixels, max(64, CPU_BLOCK_BYTES // (4 * taps * channels)))
    sampled = np.empty((groups, block, taps, channels // groups), dtype=np.float32)
    matrix = torch.from_numpy(sampled).flatten(2)
    numbers = np.array(
        [output.shape[3], geometry.kernel[1], *geometry.stride, *geometry.padding, *geometry.dilation],
        dtype=np.int64,
    )
    for image in range(batch):
        planes = output[image].view(groups, -1, pixels)
        for start in range(0, pixels, block):
            count = min(block, pixels - start)

            def work(first: int, last: int, image: int = image, start: int = start) -> None:
                _sample_kernel(
                    maps[image], shifts[image], factors[image], sampled, numbers, start, first, last
                )

            parallel_for(work, count)
            span = planes[:, :, start : start + count]
            if groups == 1:
                torch.mm(kernel[0], matrix[0, :count].t(), out=span[0])
            else:
                # One call: a product per group would synchronize threads once per group.
                span.copy_(torch.bmm(kernel, matrix[:, :count].transpose(1, 2)))


def convolve_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Convolve on any device, differentiably; (B, O, H', W') in the compute dtype of `input`."""
    groups, deform_groups, taps = geometry.groups, geometry.deform_groups, geometry.taps
    dtype = compute_dtype(input)
    batch, channels, height, width = input.shape
    rows, columns = geometry.output_size(height, width)
    pixels = rows * columns
    down, across = _tap_positions(geometry, rows, columns, input.device)
    shifts = offset.to(dtype).reshape(batch, deform_groups, taps, 2, pixels)
    factors = None if mask is None else mask.to(dtype).reshape(batch, deform_groups, taps, pixels)
    kernel = _flatten_taps(weight.to(dtype), groups)
    block = max(64, DEVICE_BLOCK_BYTES // (dtype.itemsize * taps * channels))
    per_group = channels // deform_groups
    first_row = torch.arange(deform_groups, device=input.device)[:, None, None, None] * (height * width)
    images = []
    for image in range(batch):
        maps = input[image].to(dtype).view(deform_groups, per_group, height, width)
        table = pixel_rows(maps.permute(0, 2, 3, 1))
        parts = []
        for start in range(0, pixels, block):
            span = slice(start, min(start + block, pixels))
            y = down[:, span] + shifts[image, :, :, 0, span]
            x = across[:, span] + shifts[image, :, :, 1, span]
            index, weights = padded_corners(y, x, height, width)
            index = torch.where(index < 0, table.shape[0] - 1, index + first_row)
            if factors is not None:
                weights = weights * factors[image, :, :, span, None]
            mixed = mix_rows(table, index.reshape(-1, 4), weights.reshape(-1, 4))
            mixed = mixed.view(deform_groups, taps, -1, per_group).permute(2, 1, 0, 3)
            grouped = mixed.reshape(-1, taps, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)
            parts.append(torch.bmm(kernel, grouped.transpose(1, 2)).flatten(0, 1))
        images.append(torch.cat(parts, dim=1).view(-1, rows, columns))
    result = torch.stack(images)
    return result if bias is None else result + bias.to(dtype)[:, None, None]


def _tap_positions(
    geometry: Geometry, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute (taps, pixels) rows and columns of the undeformed taps in input pixels, int64."""

    def along(axis: int, count: int) -> Tensor:
        steps = torch.arange(count, device=device) * geometry.stride[axis] - geometry.padding[axis]
        taps = torch.arange(geometry.kernel[axis], device=device) * geometry.dilation[axis]
        return taps[:, None] + steps[None]

    kernel_h, kernel_w = geometry.kernel
    shape = (kernel_h, kernel_w, rows, columns)
    down = along(0, rows)[:, None, :, None].expand(shape)
    across = along(1, columns)[None, :, None, :].expand(shape)
    return down.reshape(geometry.taps, -1), across.reshape(geometry.taps, -1)


def gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor | None,
    grad_output: Tensor,
    geometry: Geometry,
    wanted: str,
) -> list[Tensor]:
    """Compute the gradients of the tensors with initials in `wanted`: i(nput) w(eight) b(ias) o(ffset) m(ask)."""
    with torch.enable_grad():
        leaves = {
            name: None if tensor is None else tensor.detach().requires_grad_(name in wanted)
            for name, tensor in {"i": input, "w": weight, "b": bias, "o": offset, "m": mask}.items()
        }
        first, kernel, shifts = leaves["i"], leaves["w"], leaves["o"]
        assert first is not None and kernel is not None and shifts is not None
        result = convolve_torch(first, kernel, leaves["b"], shifts, leaves["m"], geometry)
        asked = [leaf for name in wanted if (leaf := leaves[name]) is not None]
        return list(torch.autograd.grad(result, asked, grad_output.to(result.dtype)))


@jit
def _sample_kernel(
    maps: F32,
    shifts: F32,
    factors: F32,
    sampled: F32,
    numbers: npt.NDArray[np.int64],
    start: int,
    first: int,
    last: int,
) -> None:  # pragma: no cover - compiled
    """Fill rows first:last of `sampled` (groups, block, taps, channels) with output pixels from `start` on."""
    height, width, channels = maps.shape
    out_w, kernel_w, stride_h, stride_w = numbers[0], numbers[1], numbers[2], numbers[3]
    pad_h, pad_w, dilation_h, dilation_w = numbers[4], numbers[5], numbers[6], numbers[7]
    per_group = sampled.shape[3]
    deform_groups, taps = shifts.shape[0], shifts.shape[1]
    per_deform = channels // deform_groups
    one, zero, zero_at = np.float32(1), np.float32(0), np.int64(0)
    for row in range(first, last):
        pixel = start + row
        top = pixel // out_w * stride_h - pad_h
        left = pixel % out_w * stride_w - pad_w
        for tap in range(taps):
            tap_y = np.float32(top + tap // kernel_w * dilation_h)
            tap_x = np.float32(left + tap % kernel_w * dilation_w)
            for d in range(deform_groups):
                y = np.float32(tap_y + shifts[d, tap, 0, pixel])
                x = np.float32(tap_x + shifts[d, tap, 1, pixel])
                # The comparison is false for NaN too.
                inside = y > -1 and x > -1 and y < height and x < width
                w00, w01, w10, w11 = zero, zero, zero, zero
                y0, x0, y1, x1 = zero_at, zero_at, zero_at, zero_at
                if inside:
                    y0, x0 = np.int64(np.floor(y)), np.int64(np.floor(x))
                    y1, x1 = y0 + 1, x0 + 1
                    down, right = np.float32(y - y0), np.float32(x - x0)
                    factor = factors[d, tap, pixel] if factors.shape[0] > 0 else one
                    up, near = np.float32((one - down) * factor), np.float32(one - right)
                    down = np.float32(down * factor)
                    if y0 >= 0:
                        w00, w01 = up * near, up * right
                    else:
                        y0 = zero_at
                    if y1 < height:
                        w10, w11 = down * near, down * right
                    else:
                        y1 = np.int64(height - 1)
                    if x0 < 0:
                        w00, w10, x0 = zero, zero, zero_at
                    if x1 >= width:
                        w01, w11, x1 = zero, zero, np.int64(width - 1)
                a, b, c, e = maps[y0, x0], maps[y0, x1], maps[y1, x0], maps[y1, x1]
                # The channels of one deformable group, split at the end of a group of the convolution.
                at = d * per_deform
                end = at + per_deform
                while at < end:
                    group = at // per_group
                    begin = at - group * per_group
                    size = min(per_group - begin, end - at)
                    # Slices, so that the loops below index from 0 and are vectorised.
                    out = sampled[group, row, tap, begin : begin + size]
                    if inside:
                        p, q = a[at : at + size], b[at : at + size]
                        r, s = c[at : at + size], e[at : at + size]
                        for ch in range(size):
                            out[ch] = w00 * p[ch] + w01 * q[ch] + w10 * r[ch] + w11 * s[ch]
                    else:
                        out[:] = zero
                    at += size
