"""The order of a measurement: rounds in which every contender has its turn, and medians over the rounds.

In turns, so that a change of the machine's speed meets all of them; who has no turn is paused. A turn in which the
host below a virtual machine gave its CPUs to others is taken again, whoever's it was. Knows what is asked for and how
long, and nothing of how a server is started or how results are shown.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil

from tools.bench.serving.load import Load, Measured
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import cpu_seconds
from tools.bench.serving.targets import Contender, Field, Subject

__all__ = ["Machine", "Plan", "Result", "Row", "measure", "priority"]

IDLE_S = 1.5
SETTLE_S = 0.1
QUIET = 0.02  # share of the CPU time that the host may take in a turn that is not taken again


@dataclass(frozen=True)
class Plan:
    """What is measured with one frame, and how often.

    Attributes:
        frame: the frame; for several sizes there are several plans.
        rounds: turns of every contender.
        lone_s: seconds of a lone client.
        rate: arrivals per second; 0 leaves the open loop out.
        open_s: its seconds.
        clients: of the closed loop.
        closed_s: its seconds.
        warm_s: seconds of the closed loop before the first round: Java compiles while it runs.
    """

    frame: bytes
    rounds: int
    lone_s: float
    rate: float
    open_s: float
    clients: int
    closed_s: float
    warm_s: float = 0.0

    def turns(self) -> int:
        """Measurements per contender."""
        return self.rounds * (3 if self.rate else 2)


@dataclass(frozen=True)
class Row:
    """Medians over the rounds of one contender with one frame; None where there is nothing to tell.

    Attributes:
        lone_ms: p50 of a lone client.
        p50_ms, p99_ms: of the open loop; None when it could not be kept up with (`overrun`).
        rate: frames per second of the closed loop.
        open_batch, closed_batch: frames per batch.
        cpu_ms: CPU time of all its processes per frame of the closed loop.
        own_cpu_ms: of the processes that only this contender has: for the gateway, the gateway's own.
        idle_cpu: CPU seconds per second with nothing to do, its own processes.
        failed: requests without a right answer, of all that counted.
        overrun: the open loop could not be kept up with, in any round.
    """

    lone_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    rate: float | None = None
    open_batch: float | None = None
    closed_batch: float | None = None
    cpu_ms: float | None = None
    own_cpu_ms: float | None = None
    idle_cpu: float | None = None
    failed: int = 0
    overrun: bool = False


@dataclass(frozen=True)
class Machine:
    """What else went on.

    Attributes:
        cores: of this machine.
        load_before: load average before the first server was started.
        others: CPU cores that processes other than ours used on average meanwhile.
        load_after: load average at the end, ours included.
        priority: how the system was asked to favour all that was measured; empty: not at all.
        stolen: share of the CPU time that a host below this machine gave to others in the turns that count.
    """

    cores: int
    load_before: float
    others: float
    load_after: float
    priority: str = ""
    stolen: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether the figures are of a machine that had other things to do."""
        return self.others > 0.1 * self.cores or self.stolen > 0.1


@dataclass(frozen=True)
class Result:
    """One subject with one frame: rows by contender, who was skipped and why."""

    subject: str
    frame_bytes: int
    plan: Plan
    rows: Mapping[str, Row]
    skipped: Mapping[str, str]
    others: float = 0.0
    stolen: float = 0.0


def priority() -> str:
    """The scheduling of this process, which all it starts inherits, where it is not the usual one."""
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        return "real-time scheduling"
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return f"nice {nice}" if nice else ""


def measure(
    subject: Subject,
    plans: Sequence[Plan],
    folder: Path,
    bench_python: Path,
    *,
    only: Sequence[str] = (),
    patience: int = 0,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda turns: None,
) -> list[Result]:
    """Start all contenders of `subject`, measure every plan in rounds, end them.

    Args:
        subject: what is served.
        plans: one per frame.
        folder: for the bodies.
        bench_python: the Python of the servers that are not ours.
        only: contenders to take, or all.
        patience: how often a turn is taken again because the host took more than `QUIET`; the quietest one counts.
        say: told what is started.
        progress: told how many measurements are done since the last word.

    Raises:
        BackendStartError: ours did not start; of the others it is noted.
        SetupError: the load generator has ended.
    """
    with LoadProcess() as load, Field(subject, bench_python, only, say) as field_:
        expects = [{"bytes": len(plan.frame)} if subject.answers_batch else {} for plan in plans]
        bodies = [folder / f"{subject.name}-{len(plan.frame)}.bin" for plan in plans]
        for body, plan in zip(bodies, plans, strict=True):
            body.write_bytes(plan.frame)
        field_.await_answers(load, bodies[0], expects[0])
        idle = {one.name: _idle(one, field_) for one in field_.contenders}
        results = []
        for plan, body, expect in zip(plans, bodies, expects, strict=True):
            others = _Others(load)
            stolen: list[float] = []
            turns: dict[str, list[Row]] = {one.name: [] for one in field_.contenders}
            for contender in field_.contenders if plan.warm_s else ():
                field_.only_runs(contender)
                warm = replace(contender.load(body, expect), clients=plan.clients, seconds=plan.warm_s)
                load.measure(warm)
            for number in range(plan.rounds):
                for contender in field_.contenders:
                    field_.only_runs(contender)
                    time.sleep(SETTLE_S)
                    request = contender.load(body, expect)
                    tried: list[tuple[float, Row]] = []
                    while len(tried) <= patience and not any(share <= QUIET for share, _ in tried):
                        others.begin(contender)
                        row = _turn(load, request, contender, plan, number)
                        tried.append((others.end(contender), row))
                    share, row = min(tried, key=lambda one: one[0])
                    stolen.append(share)
                    turns[contender.name].append(row)
                    progress(plan.turns() // plan.rounds)
            rows = {name: replace(_median(measured), idle_cpu=idle[name]) for name, measured in turns.items()}
            skipped, host = dict(field_.skipped), statistics.fmean(stolen) if stolen else 0.0
            results.append(Result(subject.name, len(plan.frame), plan, rows, skipped, others.cores(), host))
        return results


def _turn(
    load: LoadProcess,
    request: Load,
    contender: Contender,
    plan: Plan,
    number: int,
) -> Row:
    lone = load.measure(replace(request, clients=1, warm_s=0.2, seconds=plan.lone_s))
    opened: Measured | None = None
    if plan.rate:
        opened = load.measure(replace(request, rate=plan.rate, seconds=plan.open_s, seed=number))
    before, own_before = cpu_seconds(contender.groups), cpu_seconds(contender.own)
    closed = load.measure(replace(request, clients=plan.clients, seconds=plan.closed_s))
    spent, own_spent = cpu_seconds(contender.groups) - before, cpu_seconds(contender.own) - own_before
    kept_up = opened is not None and not opened.overrun
    return Row(
        lone_ms=lone.p50_ms,
        p50_ms=opened.p50_ms if opened and kept_up else None,
        p99_ms=opened.p99_ms if opened and kept_up else None,
        rate=closed.rate,
        open_batch=opened.mean_batch if opened and kept_up else None,
        closed_batch=closed.mean_batch,
        cpu_ms=spent / closed.total * 1e3 if closed.total else None,
        own_cpu_ms=own_spent / closed.total * 1e3 if closed.total and contender.own else None,
        # What an overrun loop lost says nothing that "overrun" does not.
        failed=lone.failed + closed.failed + (opened.failed if opened and kept_up else 0),
        overrun=opened is not None and opened.overrun,
    )


def _idle(contender: Contender, field_: Field) -> float:
    """CPU seconds per second that a contender spends on nothing."""
    field_.only_runs(contender)
    time.sleep(5 * SETTLE_S)
    groups = contender.own or contender.groups
    before = cpu_seconds(groups)
    time.sleep(IDLE_S)
    return (cpu_seconds(groups) - before) / IDLE_S


def _median(turns: Sequence[Row]) -> Row:
    if not turns:
        return Row()
    values: dict[str, float | None] = {}
    for each in fields(Row):
        if each.name in ("failed", "overrun"):
            continue
        found = [value for turn in turns if (value := getattr(turn, each.name)) is not None]
        values[each.name] = statistics.median(found) if found else None
    overrun = any(turn.overrun for turn in turns)
    if overrun:
        values |= {"p50_ms": None, "p99_ms": None, "open_batch": None}
    return Row(**values, failed=sum(turn.failed for turn in turns), overrun=overrun)


@dataclass
class _Others:
    """How much of the machine went to processes that are not ours, while somebody had a turn."""

    load: LoadProcess
    spent_s: float = 0.0
    wall_s: float = 0.0
    _began: tuple[float, ...] = ()

    def begin(self, contender: Contender) -> None:
        self._began = self._now(contender)

    def end(self, contender: Contender) -> float:
        """The share of the CPU time that the host took since `begin`; Linux tells, elsewhere it is 0."""
        wall, all_, ours, stolen = (
            now - then for now, then in zip(self._now(contender), self._began, strict=True)
        )
        self.wall_s += wall
        self.spent_s += max(0.0, all_ - ours)
        return stolen / (wall * (os.cpu_count() or 1))

    def cores(self) -> float:
        return self.spent_s / self.wall_s if self.wall_s else 0.0

    def _now(self, contender: Contender) -> tuple[float, ...]:
        times = psutil.cpu_times()
        stolen = getattr(times, "steal", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        ours = cpu_seconds([*contender.groups, self.load.pid, os.getpid()])
        return time.monotonic(), sum(times) - idle - stolen, ours, stolen
