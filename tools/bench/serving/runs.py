"""Order of a measurement: every target is measured in every round, and medians are taken over the rounds.

Targets alternate, so that a change of the machine's speed affects all of them; the others are paused meanwhile. A
measurement with too much CPU steal time is repeated, for every target alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil

from tools.bench.serving.load import Load, LoadResult
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import cpu_seconds
from tools.bench.serving.targets import Target, TargetSet, Workload

__all__ = ["Machine", "Plan", "Result", "Row", "measure", "priority"]

IDLE_S = 1.5
SETTLE_S = 0.1
MAX_STEAL = 0.02  # share of the CPU time; a measurement with more is repeated


@dataclass(frozen=True)
class Plan:
    """Loads to measure with one frame.

    Attributes:
        frame: bytes of the frame.
        rounds: rounds per target.
        lone_s: seconds of a single client.
        rate: arrivals per second of the open loop; 0 skips it.
        open_s: seconds of the open loop.
        clients: clients of the closed loop.
        closed_s: seconds of the closed loop.
        warmup_s: seconds of the closed loop before the first round, for Java's JIT compiler.
    """

    frame: bytes
    rounds: int
    lone_s: float
    rate: float
    open_s: float
    clients: int
    closed_s: float
    warmup_s: float = 0.0

    def measurements(self) -> int:
        """Return the number of loads per target."""
        return self.rounds * (3 if self.rate else 2)


@dataclass(frozen=True)
class Row:
    """Medians over the rounds of one target with one frame; None if not measured.

    Attributes:
        lone_ms: p50 latency of a single client.
        p50_ms, p99_ms: latency of the open loop; None if `overrun`.
        rate: frames per second of the closed loop.
        open_batch, closed_batch: mean frames per batch.
        cpu_ms: CPU time of all processes of the target per frame of the closed loop.
        own_cpu_ms: the same for processes of this target alone (the gateway, without TorchServe).
        idle_cpu: CPU seconds per second of the target's own processes without load.
        failed: counted requests without a correct response.
        overrun: whether the target failed to keep up with the open loop in any round.
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
    """State of the machine during the run.

    Attributes:
        cores: CPU cores.
        load_before: load average before the first server started.
        others: mean CPU cores used by processes outside of the benchmark.
        load_after: load average at the end, the benchmark included.
        priority: scheduling priority of everything measured; empty for the default.
        steal: mean share of CPU steal time in the counted measurements.
    """

    cores: int
    load_before: float
    others: float
    load_after: float
    priority: str = ""
    steal: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other work on the machine may have affected the figures."""
        return self.others > 0.1 * self.cores or self.steal > 0.1


@dataclass(frozen=True)
class Result:
    """Rows of one workload with one frame, by target, and the skipped targets with reasons."""

    workload: str
    frame_bytes: int
    plan: Plan
    rows: Mapping[str, Row]
    skipped: Mapping[str, str]
    others: float = 0.0
    steal: float = 0.0


def priority() -> str:
    """Describe the scheduling of this process, which its children inherit; empty for the default."""
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        return "real-time scheduling"
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return f"nice {nice}" if nice else ""


def measure(
    workload: Workload,
    plans: Sequence[Plan],
    folder: Path,
    bench_python: Path,
    *,
    only: Sequence[str] = (),
    retries: int = 0,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """Start all targets of `workload`, measure every plan in rounds, end them.

    Args:
        workload: model to serve.
        plans: one per frame.
        folder: folder for request bodies.
        bench_python: Python of the peers.
        only: names of targets to measure; empty for all.
        retries: repetitions of a measurement with more than `MAX_STEAL`; the one with the least counts.
        announce: called with the name of each server that is started.
        progress: called with the number of loads done since the last call.

    Raises:
        BackendStartError: our own server did not start; a peer that does not start is skipped.
        SetupError: the load generator exited.
    """
    with LoadProcess() as load, TargetSet(workload, bench_python, only, announce) as target_set:
        expects = [{"bytes": len(plan.frame)} if workload.reports_batch else {} for plan in plans]
        bodies = [folder / f"{workload.name}-{len(plan.frame)}.bin" for plan in plans]
        for body, plan in zip(bodies, plans, strict=True):
            body.write_bytes(plan.frame)
        target_set.await_ready(load, bodies[0], expects[0])
        idle = {one.name: _idle(one, target_set) for one in target_set.targets}
        results = []
        for plan, body, expect in zip(plans, bodies, expects, strict=True):
            others = _Others(load)
            steal: list[float] = []
            rounds: dict[str, list[Row]] = {one.name: [] for one in target_set.targets}
            for target in target_set.targets if plan.warmup_s else ():
                target_set.run_only(target)
                warm = replace(target.load(body, expect), clients=plan.clients, seconds=plan.warmup_s)
                load.measure(warm)
            for number in range(plan.rounds):
                for target in target_set.targets:
                    target_set.run_only(target)
                    time.sleep(SETTLE_S)
                    request = target.load(body, expect)
                    attempts: list[tuple[float, Row]] = []
                    while len(attempts) <= retries and not any(share <= MAX_STEAL for share, _ in attempts):
                        others.begin(target)
                        row = _measure_round(load, request, target, plan, number)
                        attempts.append((others.end(target), row))
                    share, row = min(attempts, key=lambda one: one[0])
                    steal.append(share)
                    rounds[target.name].append(row)
                    progress(plan.measurements() // plan.rounds)
            rows = {
                name: replace(_median(measured), idle_cpu=idle[name]) for name, measured in rounds.items()
            }
            skipped, host = dict(target_set.skipped), statistics.fmean(steal) if steal else 0.0
            results.append(Result(workload.name, len(plan.frame), plan, rows, skipped, others.cores(), host))
        return results


def _measure_round(
    load: LoadProcess,
    request: Load,
    target: Target,
    plan: Plan,
    number: int,
) -> Row:
    lone = load.measure(replace(request, clients=1, warmup_s=0.2, seconds=plan.lone_s))
    opened: LoadResult | None = None
    if plan.rate:
        opened = load.measure(replace(request, rate=plan.rate, seconds=plan.open_s, seed=number))
    before, own_before = cpu_seconds(target.groups), cpu_seconds(target.own)
    closed = load.measure(replace(request, clients=plan.clients, seconds=plan.closed_s))
    spent, own_spent = cpu_seconds(target.groups) - before, cpu_seconds(target.own) - own_before
    kept_up = opened is not None and not opened.overrun
    return Row(
        lone_ms=lone.p50_ms,
        p50_ms=opened.p50_ms if opened and kept_up else None,
        p99_ms=opened.p99_ms if opened and kept_up else None,
        rate=closed.rate,
        open_batch=opened.mean_batch if opened and kept_up else None,
        closed_batch=closed.mean_batch,
        cpu_ms=spent / closed.total * 1e3 if closed.total else None,
        own_cpu_ms=own_spent / closed.total * 1e3 if closed.total and target.own else None,
        # Failures of an overrun loop are implied by "overrun".
        failed=lone.failed + closed.failed + (opened.failed if opened and kept_up else 0),
        overrun=opened is not None and opened.overrun,
    )


def _idle(target: Target, target_set: TargetSet) -> float:
    """Measure the CPU seconds per second of an idle target."""
    target_set.run_only(target)
    time.sleep(5 * SETTLE_S)
    groups = target.own or target.groups
    before = cpu_seconds(groups)
    time.sleep(IDLE_S)
    return (cpu_seconds(groups) - before) / IDLE_S


def _median(rows: Sequence[Row]) -> Row:
    if not rows:
        return Row()
    values: dict[str, float | None] = {}
    for each in fields(Row):
        if each.name in ("failed", "overrun"):
            continue
        found = [value for row in rows if (value := getattr(row, each.name)) is not None]
        values[each.name] = statistics.median(found) if found else None
    overrun = any(row.overrun for row in rows)
    if overrun:
        values |= {"p50_ms": None, "p99_ms": None, "open_batch": None}
    return Row(**values, failed=sum(row.failed for row in rows), overrun=overrun)


@dataclass
class _Others:
    """CPU time of processes outside of the benchmark, while a target is measured."""

    load: LoadProcess
    spent_s: float = 0.0
    wall_s: float = 0.0
    _began: tuple[float, ...] = ()

    def begin(self, target: Target) -> None:
        self._began = self._now(target)

    def end(self, target: Target) -> float:
        """Return the share of CPU steal time since `begin`; 0 on systems that do not report it."""
        wall, all_, ours, steal = (
            now - then for now, then in zip(self._now(target), self._began, strict=True)
        )
        self.wall_s += wall
        self.spent_s += max(0.0, all_ - ours)
        return steal / (wall * (os.cpu_count() or 1))

    def cores(self) -> float:
        return self.spent_s / self.wall_s if self.wall_s else 0.0

    def _now(self, target: Target) -> tuple[float, ...]:
        times = psutil.cpu_times()
        steal = getattr(times, "steal", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        ours = cpu_seconds([*target.groups, self.load.pid, os.getpid()])
        return time.monotonic(), sum(times) - idle - steal, ours, steal
