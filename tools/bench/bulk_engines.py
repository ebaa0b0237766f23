"""The engines of `serve.bulk` by turns on the same frames, and the memory of each for growing numbers of frames."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from tools.bench.bulk import ENGINES, EngineTiming, Setting, engine_of, engine_timing
from tools.bench.commands import bulk_memory
from tools.bench.engine_report import (
    EngineReport,
    MemoryUse,
    memory_head,
    memory_row,
    timing_head,
    timing_rows,
)

__all__ = ["compare_engines"]


def compare_engines(
    setting: Setting,
    engines: Sequence[str],
    pairs: int,
    memory_frames: Sequence[int],
    out: str | None = None,
) -> EngineReport:
    """Measure, and print rows as they come; progress goes to standard error.

    Args:
        setting: what all engines do.
        engines: of `ENGINES`, the local one among them; the first begins the first pair.
        pairs: how often each engine computes the frames; the order is turned around from pair to pair.
        memory_frames: numbers of invented frames for which memory is measured, in processes of their own.
        out: ``s3://bucket/prefix`` for the results; temporary folders if None.

    Raises:
        SetupError: an engine's packages are not installed.
    """
    for name in engines:
        engine_of(name, setting)  # fails now, not after minutes
    load, before = os.getloadavg()[0], psutil.cpu_times()
    timings: list[dict[str, EngineTiming]] = []
    memory: dict[str, list[MemoryUse]] = {name: [] for name in engines if memory_frames}
    _print(timing_head())
    bar: tqdm[Any]
    with tqdm(
        total=pairs * len(engines) * setting.frames, unit=" frames", file=sys.stderr, disable=None
    ) as bar:
        for pair in range(pairs):
            timings.append({})
            for name in engines if pair % 2 == 0 else engines[::-1]:
                bar.set_description(f"pair {pair + 1} of {pairs}, {name}")
                timings[-1][name] = engine_timing(setting, name, out, lambda frames: _tick(bar, frames))
            _print(timing_rows(pair + 1, timings[-1]))
    if memory:
        _print(memory_head())
    with tqdm(total=len(memory) * len(memory_frames), unit=" runs", file=sys.stderr, disable=None) as bar:
        for name, uses in memory.items():
            for frames in sorted(memory_frames):
                bar.set_description(f"memory of {name} with {frames:,} frames")
                uses.append(_memory_of(name, frames, setting.processes))
                _print([memory_row(name, uses[-1])])
                bar.update()
    return EngineReport(
        Path(setting.archive).stem,
        f"{Path(setting.archive).name}, {setting.frame.name}, {setting.frames} frames, {setting.processes} processes "
        f"with {setting.threads} thread on {setting.device}, batches of {setting.batch_size}, parts of "
        f"{setting.part_frames}",
        _describe_machine(engines, load, before),
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        timings,
        memory,
    )


def _tick(bar: tqdm[Any], frames: int) -> None:
    bar.update(frames)


def _memory_of(engine: str, frames: int, processes: int) -> MemoryUse:
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder:
        found = bulk_memory.measure(frames, Path(folder), engine=engine, names="random", processes=processes)
    is_driven = engine != ENGINES[0]
    return MemoryUse(
        frames,
        found["packed"],
        found["coordinator"],
        found["process"] if is_driven else None,
        found["process_pss"] if is_driven else None,
        found["beside_pss"],
        found["rate"],
    )


def _describe_machine(engines: Sequence[str], load: float, before: Any) -> str:
    after = psutil.cpu_times()
    spent = sum(after) - sum(before)
    steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    ray = f", Ray {version('ray')}" if ENGINES[1] in engines else ""
    return (
        f"{os.cpu_count()} CPU cores{ray}; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after, steal time "
        f"{100 * steal / spent if spent else 0:.0f} %"
    )


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
