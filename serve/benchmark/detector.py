"""Native eager inference beside our runtime: the same model, the same frame, turn by turn in one process.

Native is `inference_detector` of mmdet or mmdet3d as upstream wrote it, from a file, with whatever kernels
are installed (named in the result). Knows nothing about servers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serve import archive, ops
from serve.benchmark.stages import STAGES, Stopwatch, timed
from serve.comparison import compare
from serve.errors import ServeError
from serve.native import load_native
from serve.runtime import load_detector
from serve.wire import Limits, Options

__all__ = ["DetectorBenchmark", "run"]

REST, TOTAL = "decode, rest", "total"


@dataclass(frozen=True)
class DetectorBenchmark:
    """Medians over the rounds, in seconds, by stage; `largest` are deviations of the answers."""

    model: str
    frame: str
    device: str
    threads: int
    rounds: int
    kernels: str
    native: dict[str, float]
    ours: dict[str, float]
    largest_box: float
    largest_score: float

    def table(self) -> str:
        """Stages, both sides in milliseconds, and how many times faster ours is."""
        lines = [
            f"{self.model}, {self.frame}, {self.device} with {self.threads} threads, {self.kernels} kernels on both "
            f"sides, median of {self.rounds} rounds",
            f"{'stage':<14}{'native ms':>12}{'ours ms':>12}{'ratio':>8}",
        ]
        for stage in self.native:
            native, ours = self.native[stage], self.ours.get(stage, 0.0)
            ratio = f"{native / ours:.2f}" if ours > 0 else "-"
            lines.append(f"{stage:<14}{native * 1e3:>12.1f}{ours * 1e3:>12.1f}{ratio:>8}")
        lines.append(f"largest deviation: box {self.largest_box:.1e}, score {self.largest_score:.1e}")
        return "\n".join(lines)

    def json_line(self) -> str:
        """Everything on one line."""
        return json.dumps({**self.__dict__, "ratio_total": self.native[TOTAL] / self.ours[TOTAL]})


def run(
    archived: archive.Archive,
    config: Path,
    checkpoint: Path,
    frame: Path,
    *,
    device: str = "cpu",
    rounds: int = 7,
    progress: Callable[[int], None] = lambda done: None,
) -> DetectorBenchmark:
    """Measure.

    Args:
        archived: the model as we serve it.
        config: its config, for the native side.
        checkpoint: its checkpoint.
        frame: one frame of the model's kind.
        device: ``cpu`` or ``cuda:N``.
        rounds: counted rounds, after two that are not; native and ours take turns.
        progress: told the number of rounds done.
    """
    native = load_native(config, checkpoint, device)
    ours = load_detector(archived, torch.device(device))
    body = frame.read_bytes()

    def run_native() -> Any:
        return native.detect(frame)

    def run_ours() -> Any:
        (outcome,) = ours.run([ours.decode(body, Options(), Limits())])
        if isinstance(outcome, ServeError):
            raise outcome
        return outcome

    times: dict[str, list[dict[str, float]]] = {"native": [], "ours": []}
    answers: dict[str, Any] = {}
    for done in range(rounds + 2):
        for side, network, once in (("native", native.module, run_native), ("ours", ours.network, run_ours)):
            seconds, answers[side] = _measure(network, once, device)
            if done >= 2:
                times[side].append(seconds)
        progress(done + 1)
    found = compare(answers["native"], answers["ours"])
    return DetectorBenchmark(
        model=archived.metadata.name,
        frame=frame.name,
        device=device,
        threads=torch.get_num_threads(),
        rounds=rounds,
        kernels=ops.kernels_in_use(),
        native=_medians(times["native"]),
        ours=_medians(times["ours"]),
        largest_box=found.largest_box,
        largest_score=found.largest_score,
    )


def _measure(network: Any, once: Callable[[], Any], device: str) -> tuple[dict[str, float], Any]:
    stopwatch = Stopwatch(torch.cuda.synchronize if device.startswith("cuda") else lambda: None)
    with timed(network, stopwatch):
        started = time.perf_counter()
        answer = once()
        total = time.perf_counter() - started
    seconds = {stage: stopwatch.seconds[stage] for stage in STAGES if stage in stopwatch.seconds}
    # Stages are disjoint: what they leave over is decoding, the pipeline, and the answer.
    return {REST: max(0.0, total - sum(seconds.values())), **seconds, TOTAL: total}, answer


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in runs[0]}
