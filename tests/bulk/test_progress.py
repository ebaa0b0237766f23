"""Progress in a log: a line now and then, with a rate that start-up and a former run do not alter."""

from __future__ import annotations

import io

from serve.bulk.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(100_000, 40_000, file=log, every_s=30, clock=clock) as progress:
        for second in range(1, 201):
            clock.now = second
            progress.advance(100 if second > 50 else 0)  # models are loaded for 50 s
    lines = log.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0] == "40,000 of 100,000 frames (40.0 %), loading"
    assert lines[1] == "41,000 of 100,000 frames (41.0 %), 100 a second, 9 min 50 s left"
    assert lines[-1] == "53,000 of 100,000 frames (53.0 %), 100 a second, 7 min 50 s left"


def test_a_part_that_begins_anew_and_a_source_that_stands_still_are_shown() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(1000, 0, file=log, every_s=10, clock=clock) as progress:
        progress.advance(100)
        clock.now = 11
        progress.advance(-50)
        clock.now = 22
        progress.advance(160)
    assert log.getvalue().splitlines() == [
        "50 of 1,000 frames (5.0 %), no frame for 11 s",
        "210 of 1,000 frames (21.0 %), 5 a second, 2 min 38 s left",
    ]
