"""``python -m tools.simulation check``: the simulation beside the serving benchmark, on one machine.

Reads the figures of docs/benchmarks/serving.md. Two of them set the simulation: the gateway's CPU time per frame, and
the latency of a lone client, whose rest is the transport. The others are predicted. Exit status: 1 if a prediction
deviates by more than --limit.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import SettingsError
from tools.simulation.commands.options import check_finite
from tools.simulation.load import Load, simulate
from tools.simulation.service import PodModel

__all__ = ["Comparison", "compare", "main"]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "serving.md"
TARGET = "gateway + TorchServe"
# The sleeping model of tools/bench/serving/sleep_model.py.
_BATCH_S, _FRAME_S = 0.020, 0.002


@dataclass(frozen=True)
class Comparison:
    """One figure: of the benchmark, of the simulation."""

    frame_bytes: int
    name: str
    measured: float
    simulated: float

    @property
    def deviation(self) -> float:
        """Relative deviation of the simulated figure."""
        return self.simulated / self.measured - 1


def main(argv: Sequence[str] | None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="page with the benchmark's JSON (default: the docs')"
    )
    parser.add_argument(
        "--limit", type=float, default=0.10, help="largest relative deviation (default: 0.10)"
    )
    args = parser.parse_args(argv)
    check_finite(args)
    if args.limit < 0:
        raise SettingsError(f"--limit must be at least 0, not {args.limit}")
    found = list(compare(_read(args.page)))
    print("| frames of | figure | measured | simulated | deviation |\n| ---: | --- | ---: | ---: | ---: |")
    for row in found:
        print(
            f"| {row.frame_bytes // 1000:,} kB | {row.name} | {row.measured:.1f} | {row.simulated:.1f} "
            f"| {row.deviation:+.1%} |"
        )
    worst = max(found, key=lambda row: abs(row.deviation))
    print(
        json.dumps(
            {"check": {"figures": len(found), "worst": worst.name, "deviation": round(worst.deviation, 4)}}
        )
    )
    return int(abs(worst.deviation) > args.limit)


def _read(page: Path) -> dict[str, Any]:
    """Read the benchmark's line of JSON from its page."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{page} cannot be read: {error.strerror}") from error
    line = re.search(r'^\{"day".*"results".*\}$', text, re.MULTILINE)
    if line is None:
        raise SettingsError(f"{page} has no line of JSON of `make bench NAME=serving`")
    found: dict[str, Any] = json.loads(line.group())
    return found


def compare(benchmark: dict[str, Any]) -> Iterator[Comparison]:
    """Predict every figure of the sleeping model behind the gateway."""
    for result in benchmark["results"]:
        row = result["rows"].get(TARGET)
        if result["workload"] != "sleep" or row is None:
            continue
        gateway_s = row["own_cpu_ms"] / 1e3
        model = PodModel(
            _BATCH_S,
            _FRAME_S,
            gateway_s=gateway_s,
            transport_s=max(0.0, row["lone_ms"] / 1e3 - _BATCH_S - _FRAME_S - gateway_s),
        )
        closed = simulate(model, Load(clients=result["clients"]))
        yield Comparison(result["frame_bytes"], "frames/s", row["rate"], closed.frames_per_s)
        yield Comparison(
            result["frame_bytes"], "frames of a batch, closed loop", row["closed_batch"], closed.mean_batch
        )
        if row["p50_ms"] is None or row["p99_ms"] is None:
            continue
        opened = simulate(model, Load(rate=result["rate"], seconds=600))
        assert opened.p50_ms is not None and opened.p99_ms is not None
        yield Comparison(result["frame_bytes"], "p50 ms, Poisson", row["p50_ms"], opened.p50_ms)
        yield Comparison(result["frame_bytes"], "p99 ms, Poisson", row["p99_ms"], opened.p99_ms)
        yield Comparison(
            result["frame_bytes"], "frames of a batch, Poisson", row["open_batch"], opened.mean_batch
        )
