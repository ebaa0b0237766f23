"""Two engines of `serve.bulk` side by side: their rates and starts in pairs, and the memory that frames cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tools.bench.bulk import ENGINES, EngineTiming
from tools.bench.pages import write_measured

__all__ = ["EngineReport", "MemoryUse", "memory_head", "memory_row", "timing_head", "timing_rows"]

_LOCAL = ENGINES[0]
_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryUse:
    """Peaks of memory of a run over very many frames, MiB.

    Attributes:
        frames: of the run.
        packed: bytes that a frame's line of the manifest takes as it goes to Ray.
        command: resident memory of the command.
        driver: of the process that directs Ray; None for the local engine, which has none.
        driver_pss: proportional memory of that process, by samples.
        beside_pss: proportional memory of all processes that have no model, the command with them, by samples.
        rate: frames per second, with a model that answers at once.
    """

    frames: int
    packed: float
    command: float
    driver: float | None
    driver_pss: float | None
    beside_pss: float
    rate: float


@dataclass(frozen=True)
class EngineReport:
    """Results of one run of the benchmark.

    Attributes:
        name: of the archive, without its suffix.
        workload: what was computed, a phrase.
        machine: what it ran on, a phrase.
        day: ISO 8601.
        pairs: timings of each engine by its name, in the order in which they ran.
        memory: of each engine by its name, for growing numbers of frames.
    """

    name: str
    workload: str
    machine: str
    day: str
    pairs: Sequence[Mapping[str, EngineTiming]]
    memory: Mapping[str, Sequence[MemoryUse]]

    def ratios(self) -> dict[str, float]:
        """Return the median over the pairs of each engine's rate to the local one's."""
        return {
            name: statistics.median(pair[name].rate / pair[_LOCAL].rate for pair in self.pairs)
            for name in self._engines()
        }

    def medians(self) -> dict[str, EngineTiming]:
        """Return the median of each figure, by engine."""
        return {
            name: EngineTiming(
                *(
                    statistics.median(getattr(pair[name], each.name) for pair in self.pairs)
                    for each in fields(EngineTiming)
                )
            )
            for name in self._engines()
        }

    def growth(self, engine: str) -> dict[str, float]:
        """Return the bytes by which the peaks of an engine grow with a frame, by attribute of `MemoryUse`.

        Empty if fewer than two numbers of frames were measured.
        """
        runs = sorted(self.memory.get(engine, ()), key=lambda use: use.frames)
        if len(runs) < 2 or runs[0].frames == runs[-1].frames:
            return {}
        few, many = runs[0], runs[-1]
        found = {}
        for name in ("command", "driver", "driver_pss", "beside_pss"):
            before, after = getattr(few, name), getattr(many, name)
            if before is not None and after is not None:
                found[name] = (after - before) * _MIB / (many.frames - few.frames)
        return found

    def conclusions(self) -> list[str]:
        """Describe medians and growth in a line each."""
        medians, ratios = self.medians(), self.ratios()
        lines = [
            f"{name}: {timing.rate:.1f} frames/s, {ratios[name]:.3f} of the {_LOCAL} engine's rate; all models ready "
            f"after {timing.start_s:.1f} s, first part after {timing.first_part_s:.1f} s, {timing.end_s:.1f} s to end "
            f"(medians of {len(self.pairs)})"
            for name, timing in medians.items()
        ]
        for name in self.memory:
            if growth := self.growth(name):
                listed = ", ".join(f"{_NAMES[key]} {value:.0f}" for key, value in growth.items())
                lines.append(f"{name}: growth in bytes for each frame: {listed}")
        return lines

    def markdown(self) -> str:
        """Format the measured part of the page."""
        tables = [
            "\n".join(
                [
                    *timing_head(),
                    *(row for k, pair in enumerate(self.pairs) for row in timing_rows(k + 1, pair)),
                ]
            )
        ]
        if self.memory:
            rows = [memory_row(name, use) for name, uses in self.memory.items() for use in uses]
            tables.append("\n".join([*memory_head(), *rows]))
        return "\n\n".join(
            [
                f"Measured on {self.day}: {self.workload}; {self.machine}.",
                *tables,
                "\n".join(f"* {line}" for line in self.conclusions()),
            ]
        )

    def json_line(self) -> str:
        """Format all results as one line of JSON."""
        return json.dumps(
            {
                "bulk_engines": {
                    **{name: getattr(self, name) for name in ("name", "workload", "machine", "day")},
                    "ratios": self.ratios(),
                    "pairs": [{name: asdict(timing) for name, timing in pair.items()} for pair in self.pairs],
                    "memory": {name: [asdict(use) for use in uses] for name, uses in self.memory.items()},
                    "growth_bytes": {name: self.growth(name) for name in self.memory},
                }
            }
        )

    def write_page(self, page: Path) -> None:
        """Write the results into the part of `page` that has the archive's name.

        Raises:
            ValueError: the page has no such part.
        """
        write_measured(page, self.markdown(), self.name)

    def _engines(self) -> Sequence[str]:
        return [name for name in ENGINES if name in self.pairs[0]]


_NAMES = {
    "command": "command",
    "driver": "Ray's driver",
    "driver_pss": "its PSS",
    "beside_pss": "PSS of all without a model",
}


def timing_head() -> list[str]:
    """Return the head of the table of timings."""
    return [
        f"| pair | engine | frames/s | to {_LOCAL} | models ready, s | first part, s | end, s | whole, s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]


def timing_rows(pair: int, timings: Mapping[str, EngineTiming]) -> list[str]:
    """Format a pair, in the order in which its engines ran."""
    return [
        f"| {pair} | {name} | {timing.rate:.1f} | {timing.rate / timings[_LOCAL].rate:.3f} | {timing.start_s:.1f} "
        f"| {timing.first_part_s:.1f} | {timing.end_s:.1f} | {timing.whole_s:.1f} |"
        for name, timing in timings.items()
    ]


def memory_head() -> list[str]:
    """Return the head of the table of memory."""
    return [
        "| engine | frames | its line packed, bytes | command, MiB | Ray's driver, MiB | its PSS, MiB "
        "| PSS of all without a model, MiB | frames/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]


def memory_row(engine: str, use: MemoryUse) -> str:
    """Format the memory of one run."""
    driver = " | ".join("–" if mib is None else f"{mib:.0f}" for mib in (use.driver, use.driver_pss))
    return (
        f"| {engine} | {use.frames:,} | {use.packed:.1f} | {use.command:.0f} | {driver} | {use.beside_pss:.0f} "
        f"| {use.rate:.0f} |"
    )
