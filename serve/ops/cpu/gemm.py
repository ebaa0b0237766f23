"""GEMM microkernel of the convolutions on a CPU: a few rows times a panel of weights, in registers.

A compiler that vectorises a plain loop keeps the sums in memory and uses half of the width of 512-bit vectors. So the
loop is written in LLVM IR: sums of `ROWS` rows by `CHANNELS` output channels are read once, stay in vector registers
for all input channels, and are written once (register blocking: K. Goto and R. van de Geijn, "Anatomy of
high-performance matrix multiplication", ACM TOMS 34, 2008). A row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional

from serve.ops.cpu.jit import jit

__all__ = [
    "CHANNELS",
    "FROM_ADDEND",
    "FROM_BIAS",
    "FROM_OUT",
    "FROM_ZERO",
    "FUSED",
    "HAS_AVX512",
    "I64",
    "LANES",
    "ROWS",
    "VECTOR",
    "add_products",
    "aligned_zeros",
    "compress_neighbours",
    "load_vector",
    "pack_panels",
    "set_products",
    "splat",
    "vector_pointer",
]

# 6 x 2 sums, two weights and one value fit the 16 vector registers of AVX2, 6 x 4 sums the 32 of AVX-512.
ROWS = 6
_VECTORS, _WIDE_VECTORS = 2, 4


def _compiles_avx512() -> bool:
    """Return whether numba compiles for vectors of 16 floats: on this CPU, unless NUMBA_CPU_FEATURES names another."""
    if numba.config.CPU_FEATURES is not None:
        return "+avx512f" in numba.config.CPU_FEATURES.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


HAS_AVX512 = _compiles_avx512()
LANES = 16 if HAS_AVX512 else 8
# Output channels per panel, and per wide panel for AVX-512, which has twice the weights per value read.
CHANNELS, _WIDE_CHANNELS = _VECTORS * LANES, _WIDE_VECTORS * LANES
_CACHE_LINE_FLOATS = 16

# What `set_products` begins with.
FROM_ZERO, FROM_BIAS, FROM_ADDEND, FROM_OUT = range(4)

I64, _I32 = ir.IntType(64), ir.IntType(32)
VECTOR = ir.VectorType(ir.FloatType(), LANES)
# Allow fused multiply-add: one rounding instead of two.
FUSED = ("contract",)


def pack_panels(weight: Tensor) -> Tensor:
    """Pack weights (…, Cin, Cout) for `add_products`.

    Returns:
        (…, P, Cin, C), contiguous and zero beyond Cout; C is `CHANNELS`, or twice as many with AVX-512 if Cout is a
        multiple of that.
    """
    channels = _WIDE_CHANNELS if HAS_AVX512 and weight.shape[-1] % _WIDE_CHANNELS == 0 else CHANNELS
    count = -(-weight.shape[-1] // channels)
    padded: Tensor = functional.pad(weight, (0, count * channels - weight.shape[-1]))
    return padded.reshape(*weight.shape[:-1], count, channels).transpose(-3, -2).contiguous()


@jit
def aligned_zeros(count: int) -> npt.NDArray[np.float32]:  # pragma: no cover - compiled
    """Allocate zeros aligned to a cache line, in compiled code, so that no vector crosses a line."""
    room = np.zeros(count + _CACHE_LINE_FLOATS, np.float32)
    skipped = -(room.ctypes.data // 4) % _CACHE_LINE_FLOATS
    return room[skipped : skipped + count]


@intrinsic  # type: ignore[untyped-decorator]
def add_products(
    typing_context: Any,
    features: Any,
    panel: Any,
    sums: Any,
    sources: Any,
    targets: Any,
    row: Any,
    channel: Any,
) -> tuple[Any, Callable[..., Any]]:
    """Compute ``sums[targets[j], channel + c] += features[sources[j]] @ panel[:, c]``, all c, `ROWS` j from `row`.

    For compiled code only; without checks.

    Args:
        typing_context: passed by numba; the caller passes the rest.
        features: (N, Cin) float32, its rows contiguous.
        panel: (Cin, C) float32, C-contiguous, one of `pack_panels`.
        sums: (M, >= channel + C) float32, its rows contiguous.
        sources: int32, rows of `features`.
        targets: int32, rows of `sums`, distinct within the `ROWS`.
        row: first index into `sources` and `targets`.
        channel: first column of `sums`.
    """
    return types.void(features, panel, sums, sources, targets, row, channel), _generate


@intrinsic  # type: ignore[untyped-decorator]
def set_products(
    typing_context: Any,
    features: Any,
    panel: Any,
    out: Any,
    sources: Any,
    targets: Any,
    row: Any,
    channel: Any,
    begin: Any,
    bias: Any,
    addend: Any,
    origins: Any,
    column: Any,
    relu: Any,
) -> tuple[Any, Callable[..., Any]]:
    """Compute ``out[targets[j], channel + c] = before + features[sources[j]] @ panel[:, c]``, like `add_products`.

    For compiled code only; without checks. What follows `channel`:

    Args:
        typing_context: passed by numba; the caller passes the rest.
        features: as in `add_products`.
        panel: as in `add_products`.
        out: as the sums of `add_products`.
        sources: as in `add_products`.
        targets: as in `add_products`, but may repeat with their sources and origins.
        row: as in `add_products`.
        channel: as in `add_products`.
        begin: what is before: `FROM_ZERO`, `FROM_BIAS`, `FROM_ADDEND` (the bias and an addend) or `FROM_OUT`.
        bias: (>= column + C,) float32, C-contiguous.
        addend: (K, >= column + C) float32, its rows contiguous.
        origins: int32, rows of `addend`.
        column: first column of `bias` and `addend`.
        relu: whether to cut at zero; NaN stays NaN.
    """
    kinds = (features, panel, out, sources, targets, row, channel, begin, bias, addend, origins, column, relu)
    return types.void(*kinds), _generate_setting


@intrinsic  # type: ignore[untyped-decorator]
def compress_neighbours(
    typing_context: Any, partners: Any, sources: Any, targets: Any, packed: Any, first: Any
) -> tuple[Any, Callable[..., Any]]:
    """Append neighbours and indices of the rows with one, of `LANES` rows from `first`; compiled code with AVX-512.

    Args:
        typing_context: passed by numba; the caller passes the rest.
        partners: int32 neighbours, negative for none.
        sources: int32, gets the neighbours; up to `LANES` elements from `packed` on are overwritten.
        targets: int32, gets the indices into `partners`; overwritten likewise.
        packed: number of elements so far.
        first: first index into `partners`.

    Returns:
        The new number of elements.
    """
    return types.int64(partners, sources, targets, packed, first), _generate_packing


def _generate_packing(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    partners, sources, targets = (
        context.make_array(kind)(context, builder, value)
        for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
    )
    packed, first = arguments[3:]
    numbers = ir.VectorType(_I32, LANES)
    truths = ir.VectorType(ir.IntType(1), LANES)
    compress = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(numbers, [numbers, truths, numbers]),
        f"llvm.experimental.vector.compress.v{LANES}i32",
    )
    there = builder.load(builder.bitcast(builder.gep(partners.data, [first]), numbers.as_pointer()), align=4)
    has = builder.icmp_signed(">=", there, ir.Constant(numbers, [0] * LANES))
    start = builder.insert_element(ir.Constant(numbers, ir.Undefined), builder.trunc(first, _I32), _I32(0))
    start = builder.shuffle_vector(start, start, ir.Constant(numbers, [0] * LANES))
    here = builder.add(start, ir.Constant(numbers, list(range(LANES))))
    for values, kept in ((there, sources), (here, targets)):
        dense = builder.call(compress, [values, has, ir.Constant(numbers, ir.Undefined)])
        builder.store(dense, builder.bitcast(builder.gep(kept.data, [packed]), numbers.as_pointer()), align=4)
    count = builder.ctpop(builder.bitcast(has, ir.IntType(LANES)))
    return builder.add(packed, builder.zext(count, I64))


def vector_pointer(builder: Any, data: Any, at: Any) -> Any:
    """Return a pointer to the `LANES` floats of `data` from index `at`."""
    return builder.bitcast(builder.gep(data, [at]), VECTOR.as_pointer())


def load_vector(builder: Any, data: Any, at: Any) -> Any:
    """Load the `LANES` floats of `data` from index `at`."""
    return builder.load(vector_pointer(builder, data, at), align=4)


def splat(builder: Any, value: Any) -> Any:
    """Broadcast one float to all lanes."""
    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    features, panel, sums, sources, targets = _arrays(context, builder, signature, arguments, range(5))
    row, channel = arguments[5:]

    def generate(vectors: int) -> None:
        rows = _Rows(builder, sums, targets, row, channel, vectors)
        rows.store(_products(builder, features, panel, sources, row, rows.load(), vectors))

    _for_width(builder, panel, generate)
    return context.get_dummy_value()


def _generate_setting(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    features, panel, out, sources, targets, bias, addend, origins = _arrays(
        context, builder, signature, arguments, (0, 1, 2, 3, 4, 8, 9, 10)
    )
    row, channel, begin = arguments[5:8]
    column, relu = arguments[11:]
    zero = splat(builder, context.get_constant(types.float32, 0.0))

    def generate(vectors: int) -> None:
        rows = _Rows(builder, out, targets, row, channel, vectors)
        added = _Rows(builder, addend, origins, row, column, vectors)
        after = builder.append_basic_block("begin.end")
        starts = {number: builder.append_basic_block(f"begin.{number}") for number in range(4)}
        switch = builder.switch(begin, starts[FROM_OUT])
        values: dict[Any, list[Any]] = {}
        for number, block in starts.items():
            if number != FROM_OUT:
                switch.add_case(I64(number), block)
            builder.position_at_end(block)
            offsets = [
                load_vector(builder, bias.data, builder.add(column, I64(v * LANES))) for v in range(vectors)
            ] * ROWS
            if number == FROM_ADDEND:
                offsets = [builder.fadd(x, y) for x, y in zip(offsets, added.load(), strict=True)]
            before = {FROM_ZERO: [zero] * ROWS * vectors, FROM_OUT: rows.load()}.get(number, offsets)
            values[builder.block] = before
            builder.branch(after)
        builder.position_at_end(after)
        chosen = [builder.phi(VECTOR) for _ in range(ROWS * vectors)]
        for block, before in values.items():
            for phi, value in zip(chosen, before, strict=True):
                phi.add_incoming(value, block)
        totals = _products(builder, features, panel, sources, row, chosen, vectors)
        # Ordered comparison: NaN stays NaN.
        cut = [builder.select(builder.fcmp_ordered("<", total, zero), zero, total) for total in totals]
        rows.store([builder.select(relu, x, y) for x, y in zip(cut, totals, strict=True)])

    _for_width(builder, panel, generate)
    return context.get_dummy_value()


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any, indices: Iterable[int]) -> list[Any]:
    return [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in indices]


def _for_width(builder: Any, panel: Any, generate: Callable[[int], None]) -> None:
    """Generate code for panels of either width."""
    if not HAS_AVX512:
        generate(_VECTORS)
        return
    is_wide = builder.icmp_signed("==", builder.extract_value(panel.shape, 1), I64(_WIDE_CHANNELS))
    with builder.if_else(is_wide) as (wide, narrow):
        with wide:
            generate(_WIDE_VECTORS)
        with narrow:
            generate(_VECTORS)


class _Rows:
    """`ROWS` rows of a matrix, by number, from a column on, in generated code."""

    def __init__(self, builder: Any, matrix: Any, numbers: Any, row: Any, column: Any, vectors: int) -> None:
        self._builder, self._data = builder, matrix.data
        pitch = builder.sdiv(builder.extract_value(matrix.strides, 0), I64(4))
        self._places = []
        for j in range(ROWS):
            number = builder.sext(builder.load(builder.gep(numbers.data, [builder.add(row, I64(j))])), I64)
            first = builder.add(builder.mul(number, pitch), column)
            self._places += [builder.add(first, I64(v * LANES)) for v in range(vectors)]

    def load(self) -> list[Any]:
        return [load_vector(self._builder, self._data, at) for at in self._places]

    def store(self, values: list[Any]) -> None:
        for value, at in zip(values, self._places, strict=True):
            self._builder.store(value, vector_pointer(self._builder, self._data, at), align=4)


def _products(
    builder: Any, features: Any, panel: Any, sources: Any, row: Any, before: list[Any], vectors: int
) -> list[Any]:
    """Generate the loop over input channels for panels of `vectors` vectors; return the sums, kept in registers."""
    inputs = builder.extract_value(features.shape, 1)
    pitch = builder.sdiv(builder.extract_value(features.strides, 0), I64(4))
    steps = [I64(v * LANES) for v in range(vectors)]
    values = []
    for j in range(ROWS):
        source = builder.sext(builder.load(builder.gep(sources.data, [builder.add(row, I64(j))])), I64)
        values.append(builder.gep(features.data, [builder.mul(source, pitch)]))
    begin = builder.block
    loop, end = builder.append_basic_block("products"), builder.append_basic_block("products.end")
    builder.cbranch(builder.icmp_signed(">", inputs, I64(0)), loop, end)

    builder.position_at_end(loop)
    a = builder.phi(I64)
    running = [builder.phi(VECTOR) for _ in before]
    first = builder.mul(a, I64(vectors * LANES))
    weights = [load_vector(builder, panel.data, builder.add(first, step)) for step in steps]
    after: list[Any] = []
    for j in range(ROWS):
        value = splat(builder, builder.load(builder.gep(values[j], [a])))
        for one in weights:
            product = builder.fmul(value, one, flags=FUSED)
            after.append(builder.fadd(running[len(after)], product, flags=FUSED))
    a_next = builder.add(a, I64(1))
    a.add_incoming(I64(0), begin)
    a.add_incoming(a_next, loop)
    for total, old, new in zip(running, before, after, strict=True):
        total.add_incoming(old, begin)
        total.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", a_next, inputs), loop, end)

    builder.position_at_end(end)
    totals = [builder.phi(VECTOR) for _ in before]
    for total, old, new in zip(totals, before, after, strict=True):
        total.add_incoming(old, begin)
        total.add_incoming(new, loop)
    return totals
