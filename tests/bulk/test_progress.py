"""Progress in a log: a line now and then, with a rate that start-up and a former run do not alter."""

from __future__ import annotations

import io
import re

from serve.bulk.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def figures(line: str) -> list[float]:
    """Frames, of all, percent, rate, and minutes and seconds left."""
    return [float(each.replace(",", "")) for each in re.findall(r"\d[\d,.]*", line.replace(", ", " "))]


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(100_000, 40_000, file=log, every_s=30, clock=clock) as progress:
        for second in range(1, 201):
            clock.now = second
            progress.advance(100 if second > 50 else 0)  # models are loaded for 50 s
    lines = log.getvalue().splitlines()
    assert len(lines) == 6
    assert figures(lines[0]) == [40_000, 100_000, 40]
    assert figures(lines[1]) == [41_000, 100_000, 41, 100, 9, 50]
    assert figures(lines[-1]) == [53_000, 100_000, 53, 100, 7, 50]


def test_a_part_that_begins_anew_and_a_source_that_stands_still_are_shown() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(1000, 0, file=log, every_s=10, clock=clock) as progress:
        progress.advance(100)
        clock.now = 11
        progress.advance(-50)
        clock.now = 22
        progress.advance(160)
    standing, going = map(figures, log.getvalue().splitlines())
    assert standing == [50, 1000, 5, 11]  # seconds without a frame, no rate
    assert going == [210, 1000, 21, 5, 2, 38]
