"""Check of a device: the same models, archives and frames on the CPU and there, compared and measured.

It is what to run first on a new machine. On a CPU it compares the processor with itself, which shows that the check
works, and counts operators and synchronisations on a stand-in for CUDA.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from serve import ops
from serve.archive import Archive
from serve.compare.detections import compare_answers, detection_count
from serve.compare.tolerances import tolerances_for
from serve.convert.golden import golden_frame
from serve.errors import ServeError
from serve.ops.device_kernels import device_kernels, without_triton
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.options import FrameOptions
from serve.runtime import load_detector
from serve.runtime.accelerator.graphs import CALLS_BEFORE, graphs_of
from serve.runtime.accelerator.operators import OperatorCounter, OperatorCounts
from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device
from serve.runtime.detector import Detector
from serve.runtime.pipeline import frame_spec
from serve.settings import Limits
from serve.verify.stages import Stopwatch, time_stages

__all__ = ["DeviceCheck", "ModelCheck", "check_model"]

BATCH = 8
# Below the table.
LEGEND = (
    "found: detections on the CPU; repeats: the same bits twice; batch: as alone; self-test: a worker's golden frame;",
    "alone: ms of one frame; torch: without Triton; graphs: with MMDET3D_SERVE_CUDA_GRAPHS=auto; of 8, fp16: ms of a",
    "frame in a batch of 8; operators, waits, uploads: of one frame; MiB: most memory with a batch of 8",
)


@dataclass
class ModelCheck:
    """Results of one model; milliseconds are medians, and None was not measured.

    Attributes:
        error: what failed, if anything did.
        equal: whether each frame has the CPU's answer, within the limits of the device's precision.
        detections: number of detections in all frames on the CPU.
        verdict: of the frame that deviates most.
        repeats: whether the device answers a frame twice with the same bits.
        batch_equal: whether a frame's answer in a batch equals the one alone.
        self_test_s: the golden frame through the handler, seconds.
        cpu_ms: one frame on the CPU.
        alone_ms: one frame on the device.
        batch_ms: `BATCH` frames at once on the device, per frame.
        half_ms: as `batch_ms` in fp16.
        half_equal: whether the answer in fp16 equals the CPU's within the limits of fp16.
        torch_ms: one frame on the device with torch's ways in the place of Triton; None without Triton.
        torch_equal: whether its answer then equals the CPU's.
        graphs_ms: one frame on the device with CUDA graphs.
        graphs_equal: whether its answer then equals the CPU's.
        graphs_refused: why there are no graphs, if there are none.
        stages_ms: the parts of one frame on the device.
        operators: operators of one frame.
        synchronisations: times that the processor waits in one frame.
        uploads: copies to the device in one frame.
        peak_mib: largest memory of the device with a batch.
    """

    model: str
    error: str | None = None
    equal: bool | None = None
    detections: int | None = None
    verdict: str | None = None
    repeats: bool | None = None
    batch_equal: bool | None = None
    self_test_s: float | None = None
    cpu_ms: float | None = None
    alone_ms: float | None = None
    batch_ms: float | None = None
    half_ms: float | None = None
    half_equal: bool | None = None
    torch_ms: float | None = None
    torch_equal: bool | None = None
    graphs_ms: float | None = None
    graphs_equal: bool | None = None
    graphs_refused: str | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    operators: int | None = None
    synchronisations: int | None = None
    uploads: int | None = None
    peak_mib: float | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was compared is equal."""
        return self.error is None and all(
            one is not False
            for one in (
                self.equal,
                self.repeats,
                self.batch_equal,
                self.half_equal,
                self.torch_equal,
                self.graphs_equal,
            )
        )


@dataclass
class DeviceCheck:
    """Results of all models on one device."""

    device: str
    name: str
    torch: str
    kernels: str
    counted_on: str
    device_kernels: str | None = None
    models: list[ModelCheck] = field(default_factory=list)

    def table(self) -> str:
        """Format a table, and what failed below it."""
        columns = (
            ("model", 15), ("equal", 6), ("found", 6), ("repeats", 8), ("batch", 6), ("self-test s", 12),
            ("CPU ms", 8), ("alone ms", 9), ("torch ms", 9), ("graphs ms", 10), ("of 8 ms", 8), ("fp16 ms", 8),
            ("operators", 10), ("waits", 6), ("uploads", 8), ("MiB", 7),
        )  # fmt: skip
        lines = [
            f"{self.device}: {self.name}, torch {self.torch}, {self.kernels} kernels"
            f"{f', on the device by {self.device_kernels}' if self.device_kernels else ''}; "
            f"operators counted on {self.counted_on}",
            "".join(f"{title:>{width}}" for title, width in columns),
        ]
        for one in self.models:
            cells = (
                one.model, one.equal, one.detections, one.repeats, one.batch_equal, one.self_test_s, one.cpu_ms,
                one.alone_ms, one.torch_ms, one.graphs_ms, one.batch_ms, one.half_ms,
                one.operators, one.synchronisations, one.uploads, one.peak_mib,
            )  # fmt: skip
            lines.append(
                "".join(f"{_cell(cell):>{width}}" for cell, (_, width) in zip(cells, columns, strict=True))
            )
        for one in self.models:
            if one.stages_ms:
                stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in one.stages_ms.items())
                lines.append(f"{one.model}, ms of one frame: {stages}")
            if one.graphs_refused:
                lines.append(f"{one.model}: no CUDA graphs, {one.graphs_refused}")
            if not one.ok:
                lines.append(f"{one.model}: {one.error or one.verdict}")
        return "\n".join([*lines, *LEGEND])

    def json_line(self) -> str:
        """Format all fields as one line of JSON."""
        return json.dumps(asdict(self))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def check_model(archive: Archive, folder: Path, device: torch.device, *, measure: bool = True) -> ModelCheck:
    """Check one model; whatever fails is part of the result.

    Args:
        archive: unpacked archive.
        folder: the archive's folder, for the handler.
        device: device to check.
        measure: measure times too.
    """
    result = ModelCheck(archive.metadata.name)
    try:
        _check(result, archive, folder, device, measure=measure)
    except Exception as error:  # another model may do
        cause = error.__cause__ or error
        result.error = f"{type(cause).__name__}: {cause}"[:500]
    return result


def _check(
    result: ModelCheck, archive: Archive, folder: Path, device: torch.device, *, measure: bool
) -> None:
    bodies = _frames(frame_spec(archive.config()))
    loops = load_detector(archive, torch.device("cpu"))
    there = load_detector(archive, device)
    expected = _answers(loops, bodies)
    got = [_answers(there, [body])[0] for body in bodies]
    limits = tolerances_for(device, archive.metadata.inference.autocast)
    found = [
        compare_answers(one, other, limits, sides=(str(device), "cpu"))
        for one, other in zip(got, expected, strict=True)
    ]
    result.equal = all(one.ok for one in found)
    result.verdict = next((one for one in found if not one.ok), found[0]).verdict()
    result.detections = sum(detection_count(one) for one in expected)
    result.repeats = _same_bits(got[0], _answers(there, bodies[:1])[0])
    together = _answers(there, bodies)
    result.batch_equal = all(
        compare_answers(one, other, limits, sides=("batch", "alone")).ok
        for one, other in zip(together, got, strict=True)
    )
    result.self_test_s = _run_handler(archive, folder, device)
    counts = _count(archive, there, device, bodies[0])
    if counts is not None:
        result.operators, result.uploads = counts.operator_count, counts.uploads
        result.synchronisations = counts.synchronisation_count
    if measure:
        _measure(result, loops, there, device, bodies, expected)
        if device.type == "cuda":
            _measure_ways(result, archive, there, device, bodies[0], expected[0])


def _measure_ways(
    result: ModelCheck,
    archive: Archive,
    there: Detector,
    device: torch.device,
    body: Any,
    expected: dict[str, Any],
) -> None:
    """Compare and measure one frame with torch's ways in the place of Triton, and with CUDA graphs."""
    limits = tolerances_for(device, archive.metadata.inference.autocast)

    def run(detector: Detector) -> tuple[bool, float]:
        answer = _answers(detector, [body])[0]
        ok = compare_answers(answer, expected, limits, sides=(str(device), "cpu")).ok
        return ok, _median_ms(lambda: _answers(detector, [body]), device)

    if device_kernels(device.index or 0).triton:
        with without_triton():
            result.torch_equal, result.torch_ms = run(there)
    graphed = load_detector(archive, device, cuda_graphs=True)
    for _ in range(CALLS_BEFORE):
        _answers(graphed, [body])
    result.graphs_equal, result.graphs_ms = run(graphed)
    graphs = graphs_of(graphed.network)
    result.graphs_refused = graphs.disabled or (
        None if graphs.replays else "this network has no part for them"
    )


def _measure(
    result: ModelCheck,
    loops: Detector,
    there: Detector,
    device: torch.device,
    bodies: Sequence[Any],
    expected: Sequence[dict[str, Any]],
) -> None:
    result.cpu_ms = _median_ms(lambda: _answers(loops, bodies[:1]), device)
    result.alone_ms = _median_ms(lambda: _answers(there, bodies[:1]), device)
    batch = [bodies[i % len(bodies)] for i in range(BATCH)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result.batch_ms = _median_ms(lambda: _answers(there, batch), device) / BATCH
    if device.type == "cuda":
        result.peak_mib = torch.cuda.max_memory_allocated(device) / 2**20
        with torch.autocast("cuda", dtype=torch.float16):
            half = compare_answers(
                _answers(there, bodies[:1])[0],
                expected[0],
                tolerances_for(device, "fp16"),
                sides=("fp16", "cpu"),
            )
            result.half_equal = half.ok
            result.half_ms = _median_ms(lambda: _answers(there, batch), device) / BATCH
    runs = []
    for _ in range(3):
        stopwatch = Stopwatch(_wait(device))
        with time_stages(there.network, stopwatch):
            _answers(there, bodies[:1])
        runs.append(stopwatch.seconds)
    result.stages_ms = {stage: statistics.median(run[stage] for run in runs) * 1e3 for stage in runs[0]}


def _count(archive: Archive, there: Detector, device: torch.device, body: Any) -> OperatorCounts | None:
    """Count one frame, which has run before, on the device, or on a stand-in if it is the CPU."""
    if device.type != "cpu":
        with OperatorCounter(device) as counter, _noted_synchronisations(device) as noted:
            _answers(there, [body])
        counts: OperatorCounts = counter.counts
        waits = sum("synchroniz" in str(warning.message) for warning in noted)
        if waits > counts.synchronisation_count:  # where the runtime waits within an operator
            counts.synchronisations["noted by CUDA only"] = waits - counts.synchronisation_count
        return counts
    if torch.cuda.is_available() or ops.kernels_in_use() != "portable":
        return None
    with stand_in_device() as stand_in:
        detector = load_detector(archive, DEVICE)
        _answers(detector, [body])
        stand_in.reset()
        _answers(detector, [body])
        found: OperatorCounts = stand_in.counts
        return found


@contextmanager
def _noted_synchronisations(device: torch.device) -> Iterator[list[Any]]:
    """Collect CUDA's own warnings about waiting calls inside the block."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield noted
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _run_handler(archive: Archive, folder: Path, device: torch.device) -> float:
    """Load the archive as a worker does, golden frame included; return the seconds of the golden frame."""
    from serve.worker.handler import DetectionHandler

    class _Handler(DetectionHandler):
        package = archive.metadata.package

    handler = _Handler()
    gpu = None if device.type == "cpu" else device.index or 0
    handler.initialize(SimpleNamespace(system_properties={"gpu_id": gpu, "model_dir": str(folder)}))
    try:
        return handler.self_test_s
    finally:
        handler._engine.shutdown()


def _frames(spec: FrameSpec) -> list[Any]:
    """Return the golden frame, and for point clouds three with fewer of its points."""
    parts = {part: body for part, (_, body) in golden_frame(spec).items()}
    if set(parts) != {"points"}:
        return [parts if len(parts) > 1 else next(iter(parts.values()))]
    cloud = np.frombuffer(parts["points"], np.float32).reshape(-1, spec.load_dim)
    kept = [np.arange(len(cloud)) % 7 != dropped for dropped in range(3)]
    return [parts["points"], *(cloud[rows].tobytes() for rows in kept)]


def _answers(detector: Detector, bodies: Sequence[Any]) -> list[dict[str, Any]]:
    found = detector.run([detector.decode(body, FrameOptions(), Limits()) for body in bodies])
    for outcome in found:
        if isinstance(outcome, ServeError):
            raise outcome
    return [outcome for outcome in found if isinstance(outcome, dict)]


def _same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        np.array_equal(value, other[key]) if isinstance(value, np.ndarray) else value == other[key]
        for key, value in one.items()
    )


def _wait(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda" and torch.cuda.is_available():
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _median_ms(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    wait = _wait(device)
    seconds = []
    for done in range(rounds + 1):
        started = time.perf_counter()
        call()
        wait()
        if done:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3
