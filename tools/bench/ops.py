"""Benchmark of single kernels: the numba version, the torch version for any device, and an alternative.

Inputs are synthetic and seeded, at inference sizes (`tools.bench.kernels`). Alternatives are torchvision, if it can be
imported, and a compiled mmcv in another Python, which generates the same inputs in its own process. Tests check
correctness.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve.errors import SetupError
from serve.ops import extension
from serve.ops.checks import torch_only
from tools.bench.kernels import boxes, images, points
from tools.bench.kernels.inputs import Inputs

__all__ = ["CASES", "OpsBenchmark", "Row", "compile_all", "run", "time_compiled"]

CASES: dict[str, Callable[[Inputs], list[Any]]] = {
    **boxes.CASES,
    **points.CASES,
    **images.CASES,
}
# Duration of one measurement, after one warm-up call.
SECONDS_PER_SIDE = 0.4
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# A warm-up call this long is the measurement: torch versions of some kernels take minutes on a CPU.
LONG_CALL_S = 2.0
SIZES_SHOWN = 2
# Kernels that mmcv 2.1.0 compiles for the CPU (`mmcv/ops/csrc/pytorch/cpu`).
COMPILED_ON_CPU = {
    "bezier_align_forward", "box_iou_quadri", "box_iou_rotated", "contour_expand", "deform_conv_forward",
    "dynamic_voxelize_forward", "hard_voxelize_forward", "modulated_deform_conv_forward", "nms", "nms_match",
    "nms_quadri", "nms_rotated", "pixel_group", "points_in_boxes_cpu_forward", "psamask_forward",
    "roi_align_forward", "roi_align_rotated_forward", "rotated_feature_align_forward", "softnms",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """Medians of one kernel in milliseconds; None if there is no such version or it failed."""

    kernel: str
    sizes: str
    ours_ms: float
    torch_ms: float | None
    alternative: str
    alternative_ms: float | None


@dataclass(frozen=True)
class OpsBenchmark:
    """All rows of one run."""

    device: str
    threads: int
    torch: str
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        """Format a table of kernels, sizes of their first arguments, and milliseconds of each version."""
        wide = max((len(row.sizes) for row in self.rows), default=5)
        lines = [
            f"{self.device} with {self.threads} threads, torch {self.torch}; median ms",
            f"{'kernel':<44}{'sizes':<{wide}}{'ours':>10}{'torch':>11}{'other':>10}  what",
        ]
        for row in self.rows:
            lines.append(
                f"{row.kernel:<44}{row.sizes:<{wide}}{row.ours_ms:>10.3f}{_format_ms(row.torch_ms):>11}"
                f"{_format_ms(row.alternative_ms):>10}  {row.alternative}".rstrip()
            )
        return "\n".join(lines)

    def json_line(self) -> str:
        """Format all rows as one line of JSON."""
        rows = [row.__dict__ for row in self.rows]
        return json.dumps({"device": self.device, "threads": self.threads, "torch": self.torch, "rows": rows})


def _format_ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


def run(
    device: str = "cpu",
    substring: str = "",
    native_python: Path | None = None,
    progress: Callable[[str], None] = lambda kernel: None,
) -> OpsBenchmark:
    """Measure the kernels whose names contain `substring`.

    Args:
        device: ``cpu`` or ``cuda:N``; CUDA has the torch version only.
        substring: part of the names; empty for all.
        native_python: Python with a compiled mmcv, to measure its kernels too.
        progress: called with each kernel's name before it is measured.

    Raises:
        SetupError: no name contains `substring`, or the other Python has no compiled mmcv.
    """
    names = sorted(name for name in CASES if substring in name)
    if not names:
        raise SetupError(f"no kernel name contains {substring!r}")
    native = {} if native_python is None else _native(native_python, names, device)
    found = OpsBenchmark(device, torch.get_num_threads(), torch.__version__)
    for name in names:
        progress(name)
        kernel, arguments = extension.kernels()[name], CASES[name](Inputs(True, device))
        ours = _median_ms(kernel, arguments, device)
        torch_ms = None
        if device == "cpu":
            with torch_only():
                torch_ms = _median_ms(kernel, arguments, device)
        other, what = native.get(name), "mmcv, compiled"
        if other is None:
            other, what = _torchvision_ms(name, arguments, device)
        found.rows.append(Row(name, _sizes(arguments), ours, torch_ms, what if other else "", other))
    return found


def compile_all(progress: Callable[[str], None] = lambda kernel: None, processes: int = 1) -> int:
    """Call every kernel once on small inputs, so that its machine code is there for all processes.

    Args:
        progress: called with each kernel that is done.
        processes: so many compile side by side.

    Returns:
        How many kernels.
    """
    # Neighbours call the same functions: each process has a stretch of its own, so that few are compiled twice.
    length = -(-len(CASES) // processes)
    stretches = (list(CASES)[start : start + length] for start in range(0, len(CASES), length))
    names = [name for abreast in itertools.zip_longest(*stretches) for name in abreast if name is not None]
    # Forked, they need not import torch again; nothing here has started a thread yet.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        for name in pool.map(_compile, names):
            progress(name)
    return len(names)


def _compile(name: str) -> str:
    extension.kernels()[name](*CASES[name](Inputs(False)))
    return name


def _sizes(arguments: Sequence[Any]) -> str:
    shapes = [tuple(one.shape) for one in arguments if isinstance(one, torch.Tensor) and one.numel() > 3]
    return ", ".join("x".join(map(str, shape)) for shape in shapes[:SIZES_SHOWN]) + "  "


def _median_ms(kernel: Callable[..., Any], arguments: list[Any], device: str) -> float:
    """Measure one call in milliseconds; output arguments keep the values of the previous call."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    started = time.perf_counter()
    kernel(*arguments)
    wait()
    first_s = time.perf_counter() - started
    if first_s > LONG_CALL_S:
        return first_s * 1e3
    taken: list[float] = []
    while len(taken) < MIN_ROUNDS or (sum(taken) < SECONDS_PER_SIDE and len(taken) < MAX_ROUNDS):
        started = time.perf_counter()
        kernel(*arguments)
        wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e3


def _torchvision_ms(name: str, a: list[Any], device: str) -> tuple[float | None, str]:
    try:
        from torchvision import ops  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None, ""
    calls: dict[str, Callable[[], Any]] = {
        "nms": lambda: ops.nms(a[0], a[1], a[2]),
        "bbox_overlaps": lambda: ops.box_iou(a[0], a[1]),
        "roi_align_forward": lambda: ops.roi_align(a[0], a[1], (7, 7), a[7], 0, True),
        "roi_pool_forward": lambda: ops.roi_pool(a[0], a[1], (7, 7), a[6]),
        "deform_conv_forward": lambda: ops.deform_conv2d(a[0], a[2], a[1], padding=1),
        "modulated_deform_conv_forward": lambda: ops.deform_conv2d(
            a[0], a[4], a[1], a[2], padding=1, mask=a[5]
        ),
    }
    if name not in calls:
        return None, ""
    return _median_ms(lambda *_: calls[name](), [], device), "torchvision"


def _native(python: Path, names: list[str], device: str) -> dict[str, float | None]:
    """Measure the compiled kernels of another Python's mmcv, in milliseconds; None if a kernel failed."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.bench import ops; ops.time_compiled()"
    )
    names = [name for name in names if device != "cpu" or name in COMPILED_ON_CPU]
    asked = json.dumps({"names": names, "device": device, "threads": torch.get_num_threads()})
    ran = subprocess.run(
        [str(python), "-c", program],
        input=asked,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or ["no output"]
        raise SetupError(f"{python} cannot measure a compiled mmcv: {last[0]}")
    answer: dict[str, float | None] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def time_compiled() -> None:
    """Measure the kernels named on standard input and print milliseconds as JSON; runs in the other process."""
    import importlib

    compiled = importlib.import_module("mmcv._ext")
    if hasattr(compiled, "PORTABLE"):
        raise SystemExit("this Python has no compiled mmcv")
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    taken: dict[str, float | None] = {}
    for name in asked["names"]:
        try:
            arguments = CASES[name](Inputs(True, asked["device"]))
            taken[name] = _median_ms(getattr(compiled, name), arguments, asked["device"])
        except Exception:  # most of its kernels exist for CUDA only
            taken[name] = None
    print(json.dumps(taken))
