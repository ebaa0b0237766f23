"""3 x 3 convolution with stride 1 on a CPU by Winograd's minimal filtering F(4 x 4, 3 x 3) and F(2 x 2, 3 x 3).

Sixteen outputs take 36 products instead of 144, or four take 16 instead of 36: tiles of inputs and the weights are
transformed, multiplied element by element (a matrix product over channels each), and transformed back (A. Lavin and
S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, sections 4.1 and 4.3). For 4 x 4 outputs
they evaluate polynomials at 0, 1, -1, 2, -2 and infinity; here it is at 0, ±sqrt(1/2), ±sqrt(2) and infinity, which
halves the rounding error, to twice that of a direct convolution over 256 channels. Everything between input and output
is blocked for the cache. An output has the same bits for any number of threads and any other frames in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from serve.ops.checks import check_rank
from serve.ops.cpu.gemm import (
    FUSED,
    I64,
    LANES,
    load_vector,
    pack_panels,
    splat,
    vector_pointer,
)
from serve.ops.cpu.jit import jit

__all__ = ["BLOCK", "transform_inputs", "transform_outputs", "transform_weight"]

F32 = npt.NDArray[np.float32]
# Tiles per block: a multiple of ROWS.
BLOCK = 48
# Points of the polynomials for 4 x 4 outputs, apart from 0 and infinity: ±_A and ±_B. Their product is 1, and their
# squares add up to 2.5.
_A, _B = 0.5**0.5, 2**0.5


def _weight_transform(tile: int) -> Tensor:
    """Return the matrix (tile + 2, 3) that evaluates three weights at the points, over the Lagrange denominators."""
    rows = [[1.0, 0.0, 0.0]]
    if tile == 2:
        rows += [[0.5, 0.5, 0.5], [0.5, -0.5, 0.5]]
    else:
        for p, other in ((_A, _B), (_B, _A)):
            scale = 2 * p * p * (p * p - other * other)
            rows += [[1 / scale, sign * p / scale, p * p / scale] for sign in (1, -1)]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """Transform (Cout, Cin, 3, 3) float32 in float64: `pack_panels` of each place, ((tile + 2)**2, P, Cin, C).

    Raises:
        ValueError: another kernel size, or input channels that are not a multiple of `LANES`.
    """
    check_rank("weight", weight, 4)
    if weight.shape[2:] != (3, 3) or weight.shape[1] % LANES:
        raise ValueError(f"weight must be (Cout, a multiple of {LANES}, 3, 3), got {tuple(weight.shape)}")
    g = _weight_transform(tile)
    transformed = torch.einsum("ai,ocij,bj->abco", g, weight.detach().double().cpu(), g)
    return pack_panels(transformed.flatten(0, 1).float())


@jit
def transform_inputs(patch: F32, tile: int, seen: F32) -> None:  # pragma: no cover - compiled
    """Write the transform of the first tile + 2 rows and columns of `patch` to `seen`, ((tile + 2)**2, >= Cin)."""
    if tile == 2:
        for c in range(0, patch.shape[2], LANES):
            _inputs_at_2(patch, seen, c)
    else:
        for c in range(0, patch.shape[2], LANES):
            _inputs_at_4(patch, seen, c)


@jit
def transform_outputs(
    sums: F32, tile: int, bias: F32, relu: bool, out: F32
) -> None:  # pragma: no cover - compiled
    """Write the transform of `sums`, ((tile + 2)**2, >= Cout), plus `bias` to the first rows and columns of `out`.

    Cout is a multiple of `LANES`.
    """
    if tile == 2:
        for c in range(0, bias.shape[0], LANES):
            _outputs_at_2(sums, bias, relu, out, c)
    else:
        for c in range(0, bias.shape[0], LANES):
            _outputs_at_4(sums, bias, relu, out, c)


class _Arithmetic:
    """Sums and multiples of vectors in generated code, with fused multiply-add."""

    def __init__(self, context: Any, builder: Any) -> None:
        self._builder = builder
        self._constants = {
            value: splat(builder, context.get_constant(types.float32, value))
            for value in (2.5, 2.0, 0.5, _A, _B, _A**3, _B**3)
        }

    def add(self, x: Any, y: Any) -> Any:
        return self._builder.fadd(x, y, flags=FUSED)

    def subtract(self, x: Any, y: Any) -> Any:
        return self._builder.fsub(x, y, flags=FUSED)

    def times(self, factor: float, x: Any) -> Any:
        return self._builder.fmul(self._constants[factor], x, flags=FUSED)

    def inputs(self, line: list[Any]) -> list[Any]:
        """Transform a line of four or six inputs."""
        if len(line) == 4:
            d0, d1, d2, d3 = line
            return [self.subtract(d0, d2), self.add(d1, d2), self.subtract(d2, d1), self.subtract(d1, d3)]
        d0, d1, d2, d3, d4, d5 = line
        even_a, odd_a = (
            self.subtract(d4, self.times(2.0, d2)),
            self.subtract(self.times(_A, d3), self.times(_B, d1)),
        )
        even_b, odd_b = (
            self.subtract(d4, self.times(0.5, d2)),
            self.subtract(self.times(_B, d3), self.times(_A, d1)),
        )
        return [
            self.add(self.subtract(d0, self.times(2.5, d2)), d4),
            self.add(even_a, odd_a),
            self.subtract(even_a, odd_a),
            self.add(even_b, odd_b),
            self.subtract(even_b, odd_b),
            self.add(self.subtract(d1, self.times(2.5, d3)), d5),
        ]

    def outputs(self, line: list[Any]) -> list[Any]:
        """Transform a line of four or six products to two or four outputs."""
        if len(line) == 4:
            m0, m1, m2, m3 = line
            return [self.add(self.add(m0, m1), m2), self.subtract(self.subtract(m1, m2), m3)]
        m0, m1, m2, m3, m4, m5 = line
        even_a, odd_a, even_b, odd_b = (
            self.add(m1, m2),
            self.subtract(m1, m2),
            self.add(m3, m4),
            self.subtract(m3, m4),
        )
        return [
            self.add(self.add(m0, even_a), even_b),
            self.add(self.times(_A, odd_a), self.times(_B, odd_b)),
            self.add(self.times(0.5, even_a), self.times(2.0, even_b)),
            self.add(self.add(self.times(_A**3, odd_a), self.times(_B**3, odd_b)), m5),
        ]


@intrinsic  # type: ignore[untyped-decorator]
def _inputs_at_2(typing_context: Any, patch: Any, seen: Any, channel: Any) -> tuple[Any, Callable[..., Any]]:
    """Generate `transform_inputs` for `LANES` channels."""
    return types.void(patch, seen, channel), _inputs(2)


@intrinsic  # type: ignore[untyped-decorator]
def _inputs_at_4(typing_context: Any, patch: Any, seen: Any, channel: Any) -> tuple[Any, Callable[..., Any]]:
    """Generate `transform_inputs` for `LANES` channels."""
    return types.void(patch, seen, channel), _inputs(4)


@intrinsic  # type: ignore[untyped-decorator]
def _outputs_at_2(
    typing_context: Any, sums: Any, bias: Any, relu: Any, out: Any, channel: Any
) -> tuple[Any, Callable[..., Any]]:
    """Generate `transform_outputs` for `LANES` channels."""
    return types.void(sums, bias, relu, out, channel), _outputs(2)


@intrinsic  # type: ignore[untyped-decorator]
def _outputs_at_4(
    typing_context: Any, sums: Any, bias: Any, relu: Any, out: Any, channel: Any
) -> tuple[Any, Callable[..., Any]]:
    """Generate `transform_outputs` for `LANES` channels."""
    return types.void(sums, bias, relu, out, channel), _outputs(4)


def _inputs(tile: int) -> Callable[..., Any]:
    window = tile + 2

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        d = _view(context, builder, signature, arguments, 0)
        v = _view(context, builder, signature, arguments, 1)
        channel, vectors = arguments[2], _Arithmetic(context, builder)
        rows = []
        for i in range(window):
            line = [load_vector(builder, d.data, d.at(i, j, channel)) for j in range(window)]
            rows.append(vectors.inputs(line))
        for j in range(window):
            for i, value in enumerate(vectors.inputs([row[j] for row in rows])):
                builder.store(value, vector_pointer(builder, v.data, v.at(window * i + j, channel)), align=4)
        return context.get_dummy_value()

    return generate


def _outputs(tile: int) -> Callable[..., Any]:
    window = tile + 2

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        m = _view(context, builder, signature, arguments, 0)
        b = context.make_array(signature.args[1])(context, builder, arguments[1])
        o = _view(context, builder, signature, arguments, 3)
        relu, channel, vectors = arguments[2], arguments[4], _Arithmetic(context, builder)
        rows = []
        for i in range(window):
            line = [load_vector(builder, m.data, m.at(window * i + j, channel)) for j in range(window)]
            rows.append(vectors.outputs(line))
        offset = load_vector(builder, b.data, channel)
        zero = splat(builder, context.get_constant(types.float32, 0.0))
        for j in range(tile):
            for i, value in enumerate(vectors.outputs([row[j] for row in rows])):
                total = builder.fadd(value, offset)
                # Ordered comparison: NaN stays NaN.
                negative = builder.fcmp_ordered("<", total, zero)
                cut = builder.select(negative, zero, total)
                kept = builder.select(relu, cut, total)
                builder.store(kept, vector_pointer(builder, o.data, o.at(i, j, channel)), align=4)
        return context.get_dummy_value()

    return generate


class _View:
    """Array in generated code; only its last dimension must be contiguous."""

    def __init__(self, builder: Any, array: Any, dimensions: int) -> None:
        self._builder = builder
        self.data = array.data
        self._strides = [builder.extract_value(array.strides, d) for d in range(dimensions - 1)]

    def at(self, *indices: Any) -> Any:
        """Compute the index of an element from the start of the data; only its last index may be a value."""
        builder = self._builder
        *outer, last = indices
        offset = I64(0)
        for number, stride in zip(outer, self._strides, strict=True):
            offset = builder.add(offset, builder.mul(I64(number), stride))
        return builder.add(builder.sdiv(offset, I64(4)), last)


def _view(context: Any, builder: Any, signature: Any, arguments: Any, index: int) -> _View:
    kind = signature.args[index]
    return _View(builder, context.make_array(kind)(context, builder, arguments[index]), kind.ndim)
