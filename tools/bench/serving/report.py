"""Results as a table, figures, one line of JSON, and a page of the documentation, judged against the aims."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.pages import split_page, write_measured
from tools.bench.serving import sleep_model
from tools.bench.serving.runs import Machine, Result, Row
from tools.bench.serving.targets import GATEWAY, GATEWAY_HTTP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Report"]

ALONE = "TorchServe batch 1"
_OURS, _THEIRS, _IDEAL = "#1b6e53", "#8fa3ad", "#b3261e"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:g} MB" if nbytes >= 1_000_000 else f"{nbytes / 1000:.0f} kB"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _open(row: Row) -> str:
    return "overrun" if row.overrun else f"{_number(row.p50_ms)} / {_number(row.p99_ms)}"


_COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("lone p50 ms", lambda row: _number(row.lone_ms)),
    ("Poisson p50 / p99 ms", _open),
    ("its batch", lambda row: _number(row.open_batch)),
    ("frames/s", lambda row: _number(row.rate, 0 if (row.rate or 0) >= 100 else 1)),
    ("its batch ", lambda row: _number(row.closed_batch)),
    ("CPU ms/frame", lambda row: _number(row.cpu_ms, 2)),
    ("own CPU ms", lambda row: _number(row.own_cpu_ms, 2)),
    ("idle CPU", lambda row: "–" if row.idle_cpu is None else f"{100 * row.idle_cpu:.0f} %"),
    ("failed", lambda row: str(row.failed)),
)


@dataclass(frozen=True)
class Report:
    """Results of one run, with the day (ISO 8601) and the state of the machine."""

    results: Sequence[Result]
    machine: Machine
    day: str
    quick: bool

    def table(self) -> str:
        """Format tables for a terminal."""
        blocks = []
        for result in self.results:
            cells = [["", *(name for name, _ in _COLUMNS)], *self._cells(result)]
            widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
            lines = [
                row[0].ljust(widths[0]) + "".join(f"  {cell.rjust(width)}" for cell, width in
                                                  zip(row[1:], widths[1:], strict=True))
                for row in cells
            ]  # fmt: skip
            blocks.append("\n".join([self._heading(result), *lines, *self._skipped(result)]))
        return "\n\n".join([*blocks, *self.verdicts(), self.describe_machine()])

    def describe_machine(self) -> str:
        """Describe the machine, with a warning if it was busy."""
        machine = self.machine
        description = (
            f"{machine.cores} CPU cores; other processes used {machine.others:.2f} of them; steal time "
            f"{100 * machine.steal:.0f} %; load average "
            f"{machine.load_before:.1f} before, {machine.load_after:.1f} after"
            f"{f'; everything ran with {machine.priority}' if machine.priority else ''}"
        )
        if not machine.busy:
            return description
        return f"{description}\nwarning: the machine was busy; compare the figures, but do not quote them"

    def verdicts(self) -> list[str]:
        """Judge each aim by this run."""
        return [f"{'holds' if holds else 'MISSED'}: {text}" for text, holds in self._aims()]

    def json_line(self) -> str:
        """Format all results as one line of JSON."""
        results = [
            {
                "workload": result.workload,
                "frame_bytes": result.frame_bytes,
                "rounds": result.plan.rounds,
                "rate": result.plan.rate,
                "clients": result.plan.clients,
                "rows": {name: _round_values(row) for name, row in result.rows.items()},
                "skipped": dict(result.skipped),
                "other_cores": round(result.others, 3),
            }
            for result in self.results
        ]
        aims = {text: holds for text, holds in self._aims()}
        return json.dumps(
            {"day": self.day, "quick": self.quick, **asdict(self.machine), "results": results, "aims": aims}
        )

    def markdown(self, figures: Sequence[str]) -> str:
        """Format the measured part of the page."""
        blocks = [f"Measured on {self.day}. {self.describe_machine()}."]
        for result in self.results:
            head = ["", *(name.strip() for name, _ in _COLUMNS)]
            cells = [head, ["---", *(["---:"] * len(_COLUMNS))], *self._cells(result, strong=True)]
            blocks.append(f"### {self._heading(result)}")
            blocks.append("\n".join("| " + " | ".join(row) + " |" for row in cells))
            blocks.extend(self._skipped(result))
        blocks.append("\n".join(f"* {verdict}" for verdict in self.verdicts()))
        blocks.extend(f"![{Path(name).stem}]({name})" for name in figures)
        blocks.append(f"```json\n{self.json_line()}\n```")
        return "\n\n".join(blocks)

    def write_page(self, page: Path) -> list[Path]:
        """Write tables, figures and the line of JSON into the marked part of `page`.

        Raises:
            ValueError: the page has no marked part.
        """
        split_page(page)
        figures = self.draw(page.parent)
        write_measured(page, self.markdown([figure.name for figure in figures]))
        return [page, *figures]

    def draw(self, folder: Path) -> list[Path]:
        """Draw latency and throughput of the sleep model."""
        shown = [result for result in self.results if result.workload == "sleep"]
        if not shown:
            return []
        latency = [result for result in shown if result.plan.rate]
        return [
            _bars(folder / "serving-latency.png", latency, _latency_panel),
            _bars(folder / "serving-throughput.png", shown, _rate_panel),
        ]

    def _heading(self, result: Result) -> str:
        plan = result.plan
        opened = f", Poisson {plan.rate:g}/s" if plan.rate else ""
        return (
            f"{result.workload}, frames of {_size(result.frame_bytes)}: lone client{opened}, "
            f"{plan.clients} clients; medians of {plan.rounds} rounds"
        )

    def _cells(self, result: Result, *, strong: bool = False) -> list[list[str]]:
        return [
            [f"**{name}**" if strong and name == GATEWAY else name, *(show(row) for _, show in _COLUMNS)]
            for name, row in result.rows.items()
        ]

    def _skipped(self, result: Result) -> list[str]:
        return [f"skipped {name}: {reason}" for name, reason in result.skipped.items()]

    def _aims(self) -> list[tuple[str, bool]]:
        """List the aims that this run measured, with their figures and whether they hold."""
        found: list[tuple[str, bool]] = []
        for result in self.results:
            ours = result.rows.get(GATEWAY)
            if result.workload != "sleep" or ours is None:
                continue
            size = _size(result.frame_bytes)
            others = [row for name, row in result.rows.items() if name not in (GATEWAY, GATEWAY_HTTP)]
            if result.frame_bytes < 100_000:
                found += self._speed_aims(size, ours, others, result.rows.get(ALONE))
            elif result.frame_bytes < 1_000_000 and ours.own_cpu_ms is not None:
                text = f"gateway's CPU per frame of {size}: {ours.own_cpu_ms:.2f} ms, aim below 1.5"
                found.append((text, ours.own_cpu_ms < 1.5))
        if found and ours is not None and ours.idle_cpu is not None:
            found.append((f"idle gateway: {100 * ours.idle_cpu:.1f} % CPU, aim 0", ours.idle_cpu < 0.005))
        return found

    def _speed_aims(
        self, size: str, ours: Row, others: Sequence[Row], alone: Row | None
    ) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool]] = []
        for name, mine, rest, bound in (
            ("p50", ours.p50_ms, [row.p50_ms for row in others], 45.0),
            ("p99", ours.p99_ms, [row.p99_ms for row in others], 68.0),
        ):
            best = min((value for value in rest if value is not None), default=float("inf"))
            if mine is not None:
                text = f"Poisson {name} with {size}: {mine:.1f} ms; aim {bound:.0f}, best of the others {best:.1f}"
                found.append((text, mine <= bound and mine < best))
        if ours.rate is not None:
            best = max((row.rate for row in others if row.rate is not None), default=0.0)
            text = (
                f"closed loop with {size}: {ours.rate:.0f} frames/s; aim 300, best of the others {best:.0f}"
            )
            found.append((text, ours.rate >= 300 and ours.rate > best))
        if ours.lone_ms is not None and alone is not None and alone.lone_ms is not None:
            more = ours.lone_ms - alone.lone_ms
            found.append((f"lone client: {more:+.1f} ms against TorchServe alone, aim +2", more <= 2.0))
        return found


def _round_values(row: Row) -> dict[str, object]:
    return {
        name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(row).items()
    }


def _bars(path: Path, results: Sequence[Result], panel: Callable[..., None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * max(1, len(results)) + 1.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(results)), squeeze=False, sharey=True)[0]
    for axis, result in zip(axes, results, strict=False):
        names = [*result.rows][::-1]
        panel(axis, result, names)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.tick_params(labelleft=axis is axes[0])
        for label in axis.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == GATEWAY else "normal")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def _latency_panel(axis: Axes, result: Result, names: Sequence[str]) -> None:
    rows = [result.rows[name] for name in names]
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        colour = _OURS if name == GATEWAY else _THEIRS
        if row.p50_ms is None or row.p99_ms is None:
            axis.text(2, place, "overrun", va="center", color=_IDEAL)
            continue
        axis.barh(place, row.p99_ms, color=colour, alpha=0.45, height=0.7)
        axis.barh(place, row.p50_ms, color=colour, height=0.7)
        axis.text(row.p99_ms + 2, place, f"{row.p50_ms:.0f} / {row.p99_ms:.0f}", va="center", fontsize=9)
    axis.axvline(sleep_model.lone_s() * 1e3, color=_IDEAL, linewidth=1, linestyle="--")
    axis.set_xlim(0, 1.25 * max([row.p99_ms or 0.0 for row in rows] + [50.0]))
    axis.set_xlabel("ms, p50 (full) and p99 (pale)")
    axis.set_title(f"{_size(result.frame_bytes)} at {result.plan.rate:g}/s, floor 22 ms", fontsize=10)


def _rate_panel(axis: Axes, result: Result, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        rate = result.rows[name].rate or 0.0
        axis.barh(place, rate, color=_OURS if name == GATEWAY else _THEIRS, height=0.7)
        inside = rate > 60
        axis.text(
            *(rate - 4 if inside else rate + 4, place, f"{rate:.0f}"),
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=9,
        )
    axis.axvline(sleep_model.ideal_rate(), color=_IDEAL, linewidth=1, linestyle="--")
    axis.set_xlim(0, 1.2 * sleep_model.ideal_rate())
    axis.set_xlabel("frames per second")
    axis.set_title(
        f"{_size(result.frame_bytes)}, {result.plan.clients} clients, ideal {sleep_model.ideal_rate():.0f}/s",
        fontsize=10,
    )
