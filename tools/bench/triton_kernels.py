"""Code of the kernels in Triton, compiled for a card that need not be there.

Triton compiles for any card by itself (its wheel has NVIDIA's assembler). So what an interpreter cannot see is found
without a GPU: types that do not fit, registers that spill, more shared memory than a card has. Speed it does not tell.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["Row", "TritonBenchmark", "compile_kernels", "compiling_only"]


@dataclass(frozen=True)
class Row:
    """Code of one kernel for one kind of arguments.

    Attributes:
        kernel: name of the kernel.
        case: kind of arguments.
        registers: per thread.
        spilled_bytes: of registers, per thread, in memory.
        shared_bytes: shared memory per program.
        threads: per program.
    """

    kernel: str
    case: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int


@dataclass(frozen=True)
class TritonBenchmark:
    """Rows of all kernels for one compute capability."""

    triton: str
    capability: int
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        """Format a table of the kernels."""
        lines = [
            f"compiled for sm_{self.capability} by Triton {self.triton}, not run",
            f"{'kernel':<20}{'case':<28}{'registers':>10}{'spilled B':>11}{'shared B':>10}{'threads':>9}",
        ]
        lines += [
            f"{row.kernel:<20}{row.case:<28}{row.registers:>10}{row.spilled_bytes:>11}{row.shared_bytes:>10}{row.threads:>9}"
            for row in self.rows
        ]
        return "\n".join(lines)

    def json_line(self) -> str:
        """Format all fields as one line of JSON."""
        return json.dumps(asdict(self))


def compile_kernels(capability: int) -> TritonBenchmark:
    """Compile every kernel for a compute capability such as 80 or 90, with the arguments of real models.

    Raises:
        RuntimeError: Triton interprets kernels in this process (``TRITON_INTERPRET``).
        ModuleNotFoundError: Triton is not installed.
    """
    import triton

    from serve.ops.triton import probe

    if probe.interpreted():
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it"
        )
    result = TritonBenchmark(triton.__version__, capability)
    with compiling_only(capability) as made:
        for case, call in _cases().items():
            made.clear()
            call()
            for compiled in made:
                registers, spilled = _registers(compiled.asm["ptx"], capability)
                metadata = compiled.metadata
                name = compiled.src.fn.__name__.lstrip("_")
                result.rows.append(
                    Row(name, case, registers, spilled, metadata.shared, 32 * metadata.num_warps)
                )
    return result


@contextmanager
def compiling_only(capability: int) -> Iterator[list[Any]]:
    """Have Triton take the CPU for a card: calls of kernels compile and do not run; collects what was compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class _NoDriver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    made: list[Any] = []
    run = JITFunction.run
    driver = triton.runtime.driver

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        made.append(compiled)
        return compiled

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", _NoDriver()),
    ):
        yield made


def _registers(ptx: str, capability: int) -> tuple[int, int]:
    """Assemble; return the registers per thread, and the bytes of those that spill."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}a" if f"sm_{capability}a" in ptx else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ran = subprocess.run(
            [str(assembler), "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
    said = ran.stderr + ran.stdout
    used = re.search(r"Used (\d+) registers", said)
    stored = re.search(r"(\d+) bytes spill stores", said)
    assert used is not None and stored is not None, said
    return int(used[1]), int(stored[1])


def _cases() -> dict[str, Callable[[], object]]:
    """Return calls of the operators on the CPU, by a name."""
    from serve.ops.triton import attention, neighbours, rotated, sampling, sparse_conv, suppression, voxels

    points, ends = torch.rand(400, 4), torch.tensor([400])
    keys, grid = torch.arange(400), [1408, 1600, 41]
    cases: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.float16):
        for in_channels, out_channels in ((4, 16), (16, 32), (64, 64), (64, 128), (128, 256)):
            features, weight = torch.rand(100, in_channels), torch.rand(27, in_channels, out_channels)
            table, bias = torch.full((100, 27), 100), torch.rand(out_channels)
            arguments = (features.to(dtype), weight.to(dtype), bias.to(dtype), table, True)
            name = f"{str(dtype).removeprefix('torch.')} {in_channels} to {out_channels}"
            cases[name] = lambda arguments=arguments: sparse_conv.convolve_rows(*arguments)  # type: ignore[misc]
        value = torch.rand(1, 100, 8, 32).to(dtype)
        shapes, starts = torch.tensor([[10, 10]]), torch.tensor([0])
        places, shares = torch.rand(1, 40, 8, 1, 4, 2).to(dtype), torch.rand(1, 40, 8, 1, 4).to(dtype)
        cases[str(dtype).removeprefix("torch.")] = (
            lambda arguments=(value, shapes, starts, places, shares): attention.attend_samples(*arguments)  # type: ignore[misc]
        )
    cases["upright"] = lambda: suppression.overlap_bits(torch.rand(100, 4), 0.0, 0.5)
    cases["rotated"] = lambda: rotated.rotated_overlap_bits(torch.rand(100, 6), 0.5, False)
    cases["upright 3D"] = lambda: rotated.rotated_overlap_bits(torch.rand(100, 6), 0.5, True)
    cases["voxels of a layer"] = lambda: neighbours.find_rows(keys, keys, keys, keys[:27])
    cases["2,048 samples"] = lambda: sampling.sample_furthest(
        torch.rand(1, 4096, 3), torch.full((1, 4096), 1e10), torch.arange(1024), 2048
    )
    cases["points"] = lambda: voxels.cell_keys(points, ends, 1, [0.05, 0.05, 0.1], [0.0, -40.0, -3.0], grid)
    cases["keys"] = lambda: voxels.mark_first_points(keys, keys, 1 << 30)
    buffers = (
        torch.zeros(400, 5, 4),
        torch.zeros(400, 4, dtype=torch.int32),
        torch.zeros(400, dtype=torch.int32),
    )
    cases["voxels"] = lambda: voxels.write_voxels(points, keys, keys, keys, ends, 1, grid, 5, 400, *buffers)
    return cases
