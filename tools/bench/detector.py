"""Native eager inference beside our runtime: the same model, the same frame, turn by turn.

Native is `inference_detector` of mmdet or mmdet3d as upstream wrote it, from a file: in this process, with
whatever kernels are installed, or in another Python with upstream's compiled ones. Knows nothing about servers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve import archive, ops
from serve.compare.detections import Comparison, Tolerances, compare
from serve.errors import ServeError
from serve.protocol.frames import Limits, FrameOptions
from serve.runtime import load_detector
from serve.verify.reference import load_reference
from tools.bench.reference import nondeterminism as race
from tools.bench.reference.process import NativeProcess
from tools.bench.stages import STAGES, Stopwatch, timed

__all__ = ["DetectorBenchmark", "Subject", "run"]

REST, TOTAL = "decode, rest", "total"
EQUAL = Tolerances(box_m=1e-4, score=1e-4)

Run = tuple[dict[str, float], Any]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        archived: the model as we serve it.
        config: its config, for the native side.
        checkpoint: its checkpoint.
        frame: one frame of the model's kind.
        device: ``cpu`` or ``cuda:N``.
    """

    archived: archive.Archive
    config: Path
    checkpoint: Path
    frame: Path
    device: str = "cpu"


@dataclass(frozen=True)
class DetectorBenchmark:
    """Medians over the rounds, in seconds, by stage; `largest_*` are deviations of the answers.

    `equal` says that every detection has its counterpart within 1e-4 (metres, radians, score). `race` has what
    `race.observe` found, None where the native side has no sparse convolution or is this process.
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
    race: race.Race | None = None
    ratios: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Work out how many times faster ours is, by stage."""
        faster = {s: self.native[s] / self.ours[s] for s in self.native if self.ours.get(s, 0.0) > 0}
        object.__setattr__(self, "ratios", faster)

    def table(self) -> str:
        """Stages, both sides in milliseconds, and how many times faster ours is."""
        lines = [
            f"{self.model}, {self.frame}, {self.device} with {self.threads} threads, median of {self.rounds} rounds",
            f"native: {self.native_side}; ours: {self.kernels} kernels",
            f"{'stage':<14}{'native ms':>12}{'ours ms':>12}{'ratio':>8}",
        ]
        for stage, native in self.native.items():
            ratio = f"{self.ratios[stage]:.2f}" if stage in self.ratios else "-"
            ours = self.ours.get(stage, 0.0)
            lines.append(f"{stage:<14}{native * 1e3:>12.1f}{ours * 1e3:>12.1f}{ratio:>8}")
        told = "equal within 1e-4" if self.equal else "NOT equal within 1e-4"
        lines.append(
            f"{self.detections} detections, {told} (native{' with 1 thread' if self.race else ''}): largest deviation "
            f"of a box {self.largest_box:.1e}, of a score {self.largest_score:.1e}"
        )
        return "\n".join([*lines, *(self.race.lines() if self.race else ())])

    def json_line(self) -> str:
        """Everything on one line."""
        return json.dumps({**asdict(self), "ratio_total": self.ratios[TOTAL]})


def run(
    subject: Subject,
    *,
    native_python: Path | None = None,
    rounds: int = 7,
    progress: Callable[[int], None] = lambda done: None,
) -> DetectorBenchmark:
    """Measure.

    Args:
        subject: model, frame and device.
        native_python: the Python the native side runs in; None: this process.
        rounds: counted rounds, after two that are not; native and ours take turns.
        progress: told the number of rounds done.

    Raises:
        SetupError: the other Python does not run, or its process has ended.
        InferenceFailed: a side cannot run this model or this frame.
    """
    ours = load_detector(subject.archived, torch.device(subject.device))
    body = subject.frame.read_bytes()

    def run_ours() -> Any:
        (outcome,) = ours.run([ours.decode(body, FrameOptions(), Limits())])
        if isinstance(outcome, ServeError):
            raise outcome
        return outcome

    with ExitStack() as stack:
        if native_python is None:
            run_native, said = _in_process(subject), f"upstream's Python on {ops.kernels_in_use()} kernels"
        else:
            run_native, said = _in(stack, native_python, subject, torch.get_num_threads())
        times: dict[str, list[dict[str, float]]] = {"native": [], "ours": []}
        answers: dict[str, Any] = {}
        for done in range(rounds + 2):
            for side, once in (
                ("native", run_native),
                ("ours", lambda: _measure(ours.network, run_ours, subject.device)),
            ):
                seconds, answers[side] = once()
                if done >= 2:
                    times[side].append(_disjoint(seconds))
            progress(done + 1)
    seen = None
    if native_python is not None:
        # What races with many threads is compared where it does not.
        with ExitStack() as stack:
            answers["native"] = _in(stack, native_python, subject, 1)[0]()[1]
        if subject.device == "cpu":
            seen = race.observe(
                native_python, subject.config, subject.checkpoint, subject.frame, torch.get_num_threads()
            )
    found = _compared(answers["native"], answers["ours"])
    return DetectorBenchmark(
        model=subject.archived.metadata.name,
        frame=subject.frame.name,
        device=subject.device,
        threads=torch.get_num_threads(),
        rounds=rounds,
        kernels=ops.kernels_in_use(),
        native_side=said,
        native=_medians(times["native"]),
        ours=_medians(times["ours"]),
        detections=found.expected_count,
        equal=found.ok,
        largest_box=found.largest_box,
        largest_score=found.largest_score,
        race=seen,
    )


def _in_process(subject: Subject) -> Callable[[], Run]:
    native = load_reference(subject.config, subject.checkpoint, subject.device)
    return lambda: _measure(native.module, lambda: native.detect(subject.frame), subject.device)


def _in(stack: ExitStack, python: Path, subject: Subject, threads: int) -> tuple[Callable[[], Run], str]:
    """How to run the native side in another Python until `stack` closes, and what it is."""
    process = stack.enter_context(NativeProcess(python, threads))
    loaded = process.ask(
        "load", config=str(subject.config), checkpoint=str(subject.checkpoint), device=subject.device
    )

    def once() -> Run:
        answer = process.ask("run", frame=str(subject.frame))
        return answer["seconds"], answer["answer"]

    versions = ", ".join(f"{name} {version}" for name, version in loaded["versions"].items())
    sparse = f", sparse convolution of {loaded['sparse']}" if loaded["sparse"] else ""
    return once, f"{versions}, {loaded['kernels']} kernels of mmcv{sparse}"


def _compared(native: Any, ours: Any) -> Comparison:
    """Ours may have more to tell (names, model), which is not compared."""
    shared = {key: value for key, value in ours.items() if key in native}
    return compare(native, shared, EQUAL, sides=("native", "ours"))


def _measure(network: Any, once: Callable[[], Any], device: str) -> Run:
    stopwatch = Stopwatch(torch.cuda.synchronize if device.startswith("cuda") else lambda: None)
    with timed(network, stopwatch):
        started = time.perf_counter()
        answer = once()
        total = time.perf_counter() - started
    return {**stopwatch.seconds, TOTAL: total}, answer


def _disjoint(seconds: dict[str, float]) -> dict[str, float]:
    """In the order of the stages; what they leave over is decoding, the pipeline, and the answer."""
    stages = {stage: seconds[stage] for stage in STAGES if stage in seconds}
    return {REST: max(0.0, seconds[TOTAL] - sum(stages.values())), **stages, TOTAL: seconds[TOTAL]}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in runs[0]}
