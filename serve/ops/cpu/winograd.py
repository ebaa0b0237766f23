"""3 x 3 convolution with stride 1 on a CPU by Winograd's minimal filtering F(2 x 2, 3 x 3).

Four outputs take 16 products instead of 36: tiles of 4 x 4 inputs and the weights are transformed, multiplied
element by element (a matrix product over channels each), and transformed back (A. Lavin and S. Gray, "Fast Algorithms
for Convolutional Neural Networks", CVPR 2016, section 4.1). The transforms are sums and halvings, so the rounding error
is that of a direct convolution, within a small factor. Everything between input and output is blocked for the cache. An
output has the same bits for any number of threads and any other frames in the batch.
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
    CHANNELS,
    HAS_AVX512,
    I64,
    LANES,
    load_vector,
    pack_panels,
    splat,
    vector_pointer,
)
from serve.ops.cpu.jit import jit

__all__ = ["BLOCK", "PREFERRED", "transform_inputs", "transform_outputs", "transform_weight"]

# Measured faster than torch's convolution with AVX-512; not measured elsewhere.
PREFERRED = HAS_AVX512
F32 = npt.NDArray[np.float32]
I64s = npt.NDArray[np.int64]
# Tiles per block: a multiple of ROWS whose transforms fit the L2 cache.
BLOCK = 48
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def transform_weight(weight: Tensor) -> Tensor:
    """Transform (Cout, Cin, 3, 3) float32 for `convolve_3x3`, in float64: 16 x `pack_panels`, (16, P, Cin, C).

    Raises:
        ValueError: another kernel size, or channels that are not multiples of `CHANNELS` and `LANES`.
    """
    check_rank("weight", weight, 4)
    if weight.shape[2:] != (3, 3) or weight.shape[1] % LANES or weight.shape[0] % CHANNELS:
        raise ValueError(
            f"weight must be (a multiple of {CHANNELS}, a multiple of {LANES}, 3, 3), got {tuple(weight.shape)}"
        )
    g = torch.tensor(_G, dtype=torch.float64)
    transformed = torch.einsum("ai,ocij,bj->abco", g, weight.detach().double().cpu(), g)
    return pack_panels(transformed.flatten(0, 1).float())


@jit
def transform_inputs(patch: F32, seen: F32) -> None:  # pragma: no cover - compiled
    """Write the transform of ``patch[:4, :4]`` to ``seen[:, 0]``."""
    for c in range(0, patch.shape[2], LANES):
        _inputs_at(patch, seen, c)


@jit
def transform_outputs(sums: F32, bias: F32, relu: bool, out: F32) -> None:  # pragma: no cover - compiled
    """Write the transform of ``sums[:, 0]`` plus `bias` to ``out[:2, :2]``."""
    for c in range(0, bias.shape[0], LANES):
        _outputs_at(sums, bias, relu, out, c)


@intrinsic  # type: ignore[untyped-decorator]
def _inputs_at(typing_context: Any, patch: Any, seen: Any, channel: Any) -> tuple[Any, Callable[..., Any]]:
    """Generate `transform_inputs` for `LANES` channels: B' d B, B' = (1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        d = _view(context, builder, signature, arguments, 0)
        v = _view(context, builder, signature, arguments, 1)
        channel = arguments[2]

        def transform(line: list[Any]) -> list[Any]:
            a, b, c, e = line
            return [
                builder.fsub(a, c), builder.fadd(b, c), builder.fsub(c, b), builder.fsub(b, e),
            ]  # fmt: skip

        rows = [[load_vector(builder, d.data, d.at(i, j, channel)) for j in range(4)] for i in range(4)]
        columns = [transform([rows[i][j] for i in range(4)]) for j in range(4)]
        for i in range(4):
            for j, value in enumerate(transform([columns[j][i] for j in range(4)])):
                builder.store(value, vector_pointer(builder, v.data, v.at(4 * i + j, 0, channel)), align=4)
        return context.get_dummy_value()

    return types.void(patch, seen, channel), generate


@intrinsic  # type: ignore[untyped-decorator]
def _outputs_at(
    typing_context: Any, sums: Any, bias: Any, relu: Any, out: Any, channel: Any
) -> tuple[Any, Callable[..., Any]]:
    """Generate `transform_outputs` for `LANES` channels: A' m A, A' = (1 1 1 0; 0 1 -1 -1)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        m = _view(context, builder, signature, arguments, 0)
        b = context.make_array(signature.args[1])(context, builder, arguments[1])
        o = _view(context, builder, signature, arguments, 3)
        relu, channel = arguments[2], arguments[4]

        def transform(line: list[Any]) -> list[Any]:
            a, b, c, e = line
            return [builder.fadd(builder.fadd(a, b), c), builder.fsub(builder.fsub(b, c), e)]

        rows = [
            [load_vector(builder, m.data, m.at(4 * i + j, 0, channel)) for j in range(4)] for i in range(4)
        ]
        columns = [transform([rows[i][j] for i in range(4)]) for j in range(4)]
        offset = load_vector(builder, b.data, channel)
        zero = splat(builder, context.get_constant(types.float32, 0.0))
        for i in range(2):
            for j, value in enumerate(transform([columns[j][i] for j in range(4)])):
                total = builder.fadd(value, offset)
                # Ordered comparison: NaN stays NaN.
                negative = builder.fcmp_ordered("<", total, zero)
                cut = builder.select(negative, zero, total)
                kept = builder.select(relu, cut, total)
                builder.store(kept, vector_pointer(builder, o.data, o.at(i, j, channel)), align=4)
        return context.get_dummy_value()

    return types.void(sums, bias, relu, out, channel), generate


class _View:
    """Three-dimensional array in generated code; only its last dimension must be contiguous."""

    def __init__(self, builder: Any, array: Any) -> None:
        self._builder = builder
        self.data = array.data
        self._strides = [builder.extract_value(array.strides, d) for d in range(2)]

    def at(self, i: int, j: int, k: Any) -> Any:
        """Compute the index of element (i, j, k) from the start of the data."""
        builder, (outer, inner) = self._builder, self._strides
        size = I64(4)
        rows = builder.add(builder.mul(I64(i), outer), builder.mul(I64(j), inner))
        return builder.add(builder.sdiv(rows, size), k)


def _view(context: Any, builder: Any, signature: Any, arguments: Any, index: int) -> _View:
    return _View(builder, context.make_array(signature.args[index])(context, builder, arguments[index]))
