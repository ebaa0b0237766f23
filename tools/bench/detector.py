"""Benchmark of native eager inference against our runtime: same model, same frame, alternating rounds.

Native means upstream's own `inference_detector` of mmdet or mmdet3d on a file, either in this process with the
installed kernels or in another Python with upstream's compiled ones.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve import archive, ops
from serve.compare.detections import Comparison, compare
from serve.compare.ties import confirm_ties
from serve.compare.tolerances import Tolerances, tolerances_for
from serve.errors import ServeError
from serve.protocol.options import FrameOptions
from serve.runtime import load_detector
from serve.runtime.rounding import variants
from serve.settings import Limits
from serve.verify.reference_loading import load_reference
from serve.verify.stages import STAGES, Stopwatch, time_stages
from tools.bench.reference import nondeterminism
from tools.bench.reference.nondeterminism import Nondeterminism
from tools.bench.reference.process import ReferenceProcess

__all__ = ["DetectorBenchmark", "Workload", "run"]

REST, TOTAL = "decode, rest", "total"

Run = tuple[dict[str, float], Any]


@dataclass(frozen=True)
class Workload:
    """Model, frame and device to measure.

    Attributes:
        archived: unpacked archive of the model, for our runtime.
        config: config of the model, for native inference.
        checkpoint: checkpoint of the model, for native inference.
        frame: file with one frame of the model's kind.
        device: ``cpu`` or ``cuda:N``.
    """

    archived: archive.Archive
    config: Path
    checkpoint: Path
    frame: Path
    device: str = "cpu"


@dataclass(frozen=True)
class DetectorBenchmark:
    """Medians over the rounds in seconds per frame, by stage, and the largest deviations of the detections.

    Attributes:
        native: medians of native inference.
        ours: medians of our runtime.
        equal: whether the detections are equal by the one standard (`serve.compare.tolerances`), ties apart.
        ties: detections that rounding decides (`serve.compare.ties`).
        largest_box: largest deviation of a box, metres or pixels.
        largest_score: largest deviation of a score.
        nondeterminism: result of `nondeterminism.check`; None if the model has no sparse convolution or native
            inference runs in this process.
        batch: frames that our runtime gets at once; upstream's `inference_detector` takes them one by one.
        ratios: how many times faster ours is, by stage.
    """

    model: str
    frame: str
    device: str
    threads: int
    rounds: int
    kernels: str
    native_side: str
    native: dict[str, float]
    ours: dict[str, float]
    detections: int
    equal: bool
    largest_box: float
    largest_score: float
    tolerances: Tolerances
    ties: int = 0
    nondeterminism: Nondeterminism | None = None
    batch: int = 1
    ratios: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Compute the ratios."""
        faster = {s: self.native[s] / self.ours[s] for s in self.native if self.ours.get(s, 0.0) > 0}
        object.__setattr__(self, "ratios", faster)

    def table(self) -> str:
        """Format a table of stages with both sides in milliseconds and their ratio."""
        lines = [
            f"{self.model}, {self.frame}, {self.device} with {self.threads} threads, median of {self.rounds} rounds",
            f"native: {self.native_side}; ours: {self.kernels} kernels"
            + (f", {self.batch} frames at once, per frame" if self.batch > 1 else ""),
            f"{'stage':<14}{'native ms':>12}{'ours ms':>12}{'ratio':>8}",
        ]
        for stage, native in self.native.items():
            ratio = f"{self.ratios[stage]:.2f}" if stage in self.ratios else "-"
            ours = self.ours.get(stage, 0.0)
            lines.append(f"{stage:<14}{native * 1e3:>12.1f}{ours * 1e3:>12.1f}{ratio:>8}")
        side = "native with 1 thread" if self.nondeterminism else "native"
        ties = f", {self.ties} of them ties by rounding" if self.ties else ""
        limits = (
            f"{self.tolerances.box_m:g} m, {self.tolerances.box_px:g} px, score {self.tolerances.score:g}"
        )
        lines.append(
            f"{self.detections} detections{ties}, {'equal' if self.equal else 'NOT equal'} to {side} within {limits}: "
            f"largest deviation of a box {self.largest_box:.1e}, of a score {self.largest_score:.1e}"
        )
        return "\n".join([*lines, *(self.nondeterminism.lines() if self.nondeterminism else ())])

    def json_line(self) -> str:
        """Format all fields as one line of JSON."""
        return json.dumps({**asdict(self), "ratio_total": self.ratios[TOTAL]})


def run(
    workload: Workload,
    *,
    native_python: Path | None = None,
    rounds: int = 7,
    batch: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> DetectorBenchmark:
    """Measure native inference and our runtime in alternating rounds.

    Args:
        workload: model, frame and device.
        native_python: Python for native inference; None for this process.
        rounds: counted rounds, after two warm-up rounds.
        batch: frames that our runtime gets at once.
        progress: called with the number of rounds done.

    Raises:
        SetupError: the other Python does not run, or its process has exited.
        InferenceFailed: a side cannot run this model or this frame.
    """
    ours = load_detector(workload.archived, torch.device(workload.device))
    body = workload.frame.read_bytes()

    def run_ours() -> Any:
        outcomes = ours.run([ours.decode(body, FrameOptions(), Limits()) for _ in range(batch)])
        for outcome in outcomes:
            if isinstance(outcome, ServeError):
                raise outcome
        return outcomes[0]

    with ExitStack() as stack:
        if native_python is None:
            run_native = _load_in_process(workload)
            description = f"upstream's Python on {ops.kernels_in_use()} kernels"
        else:
            run_native, description = _start(stack, native_python, workload, torch.get_num_threads())
        times: dict[str, list[dict[str, float]]] = {"native": [], "ours": []}
        answers: dict[str, Any] = {}
        for done in range(rounds + 2):
            for side, once in (
                ("native", run_native),
                ("ours", lambda: _measure(ours.network, run_ours, workload.device)),
            ):
                seconds, answers[side] = once()
                if done >= 2:
                    frames = batch if side == "ours" else 1
                    times[side].append(_disjoint({stage: spent / frames for stage, spent in seconds.items()}))
            progress(done + 1)
    seen = None
    if native_python is not None:
        # spconv is nondeterministic with several threads, so detections are compared with one.
        with ExitStack() as stack:
            answers["native"] = _start(stack, native_python, workload, 1)[0]()[1]
        if workload.device == "cpu":
            seen = nondeterminism.check(
                native_python, workload.config, workload.checkpoint, workload.frame, torch.get_num_threads()
            )
    tolerances = tolerances_for(workload.device, workload.archived.metadata.inference.autocast)
    changed = variants(ours.network, run_ours)
    found = _compare(answers["native"], answers["ours"], tolerances, changed)
    return DetectorBenchmark(
        model=workload.archived.metadata.name,
        frame=workload.frame.name,
        device=workload.device,
        threads=torch.get_num_threads(),
        rounds=rounds,
        kernels=ops.kernels_in_use(),
        native_side=description,
        native=_medians(times["native"]),
        ours=_medians(times["ours"]),
        detections=found.actual_count,
        equal=found.ok,
        ties=found.ties,
        tolerances=tolerances,
        largest_box=found.largest_box,
        largest_score=found.largest_score,
        nondeterminism=seen,
        batch=batch,
    )


def _load_in_process(workload: Workload) -> Callable[[], Run]:
    native = load_reference(workload.config, workload.checkpoint, workload.device)
    return lambda: _measure(native.module, lambda: native.detect(workload.frame), workload.device)


def _start(stack: ExitStack, python: Path, workload: Workload, threads: int) -> tuple[Callable[[], Run], str]:
    """Start native inference in another Python until `stack` closes; return a call and a description."""
    process = stack.enter_context(ReferenceProcess(python, threads))
    loaded = process.call(
        "load", config=str(workload.config), checkpoint=str(workload.checkpoint), device=workload.device
    )

    def once() -> Run:
        answer = process.call("run", frame=str(workload.frame))
        return answer["seconds"], answer["answer"]

    versions = ", ".join(f"{name} {version}" for name, version in loaded["versions"].items())
    sparse = f", sparse convolution of {loaded['sparse']}" if loaded["sparse"] else ""
    return once, f"{versions}, {loaded['kernels']} kernels of mmcv{sparse}"


def _compare(native: Any, ours: Any, tolerances: Tolerances, changed: Iterator[Any]) -> Comparison:
    """Compare the fields that both have, since ours adds names and model; `changed` are answers of our variants."""

    def shared(answer: Any) -> dict[str, Any]:
        return {key: value for key, value in answer.items() if key in native}

    found = compare(shared(ours), native, tolerances, sides=("ours", "native"))
    confirmed = confirm_ties(found, shared(ours), native, map(shared, changed))
    assert isinstance(confirmed, Comparison)
    return confirmed


def _measure(network: Any, once: Callable[[], Any], device: str) -> Run:
    stopwatch = Stopwatch(torch.cuda.synchronize if device.startswith("cuda") else lambda: None)
    with time_stages(network, stopwatch):
        started = time.perf_counter()
        answer = once()
        total = time.perf_counter() - started
    return {**stopwatch.seconds, TOTAL: total}, answer


def _disjoint(seconds: dict[str, float]) -> dict[str, float]:
    """Order by stage and add the remainder: decoding, the pipeline and postprocessing."""
    stages = {stage: seconds[stage] for stage in STAGES if stage in seconds}
    return {REST: max(0.0, seconds[TOTAL] - sum(stages.values())), **stages, TOTAL: seconds[TOTAL]}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in runs[0]}
