"""The load: a process of its own that asks a server over loopback, in bounded number and time.

One line of JSON in (a `Load`), one line out (a `Measured`), until standard input ends. Closed loop: so many
clients, each asks again when it is answered. Open loop: arrivals of a Poisson process, whoever is still
waiting; latency counts from the moment a request should have left. Every answer is looked at: one that is not
200, or not about the frame that was sent, counts as failed. Knows HTTP/1.1, and nothing about servers.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop

__all__ = ["Load", "Measured", "measure", "quantile"]

MOST_IN_FLIGHT = 512
FAREWELL_S = 5.0  # how long answers may still come after the last request left


@dataclass(frozen=True)
class Load:
    """What to ask, how, and for how long.

    Attributes:
        host: address of loopback.
        port: its port.
        path: what to POST to.
        body: file with the request's body.
        headers: of every request.
        clients: clients of a closed loop; 0 for an open one.
        rate: mean arrivals per second of an open loop.
        warm_s: seconds that are not counted, first.
        seconds: seconds that are counted.
        most: requests at the most, counted or not.
        expect: members that the answer (or the only element of it) must have; none are looked for when empty.
        seed: of the arrivals.
    """

    host: str
    port: int
    path: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    clients: int = 0
    rate: float = 0.0
    warm_s: float = 0.5
    seconds: float = 3.0
    most: int = 20_000
    expect: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What came of it; times in milliseconds.

    Attributes:
        answered: right answers to counted requests.
        total: right answers in all, those that are not counted too.
        failed: counted requests with another answer, or none.
        failures: how many of each kind, by status or reason.
        p50_ms, p99_ms, mean_ms: latency of the right answers; None without any.
        rate: right answers per second while it ran (slope of the count over time).
        mean_batch: frames per batch, where the answers name their batch.
        overrun: an open loop could not be kept up with.
        late_ms: median by which requests left after their moment, a property of this process.
        client_cpu_s: CPU seconds of this process.
    """

    answered: int
    total: int
    failed: int
    failures: Mapping[str, int]
    p50_ms: float | None
    p99_ms: float | None
    mean_ms: float | None
    rate: float
    mean_batch: float | None
    overrun: bool
    late_ms: float
    client_cpu_s: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of sorted values that at least `share` of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1))]


class _Connection(asyncio.Protocol):
    """One connection, one request at a time; connects anew when the server closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._chunks: list[bytes] = []
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; raises OSError when the connection fails."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, *self._address)
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._chunks = []
        self._answer = loop.create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail(error or ConnectionResetError("closed by the server"))

    def on_body(self, data: bytes) -> None:
        """Of httptools: a piece of the body."""
        self._chunks.append(data)

    def on_message_complete(self) -> None:
        """Of httptools: the answer is there."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._chunks)))
        if not self._parser.should_keep_alive():
            self.close()

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


@dataclass
class _Tally:
    """Counts what falls into the counted time."""

    begin: float
    end: float
    expect: Mapping[str, Any]
    asked: int = 0
    total: int = 0
    latencies_s: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    batches: float = 0.0
    named: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)

    def counts(self, moment: float) -> bool:
        return self.begin <= moment < self.end

    def wrong(self, status: int, body: bytes) -> str | None:
        """What is wrong with an answer; counts its batch when nothing is."""
        if status != 200:
            return str(status)
        if not self.expect:
            return None
        try:
            said = json.loads(body)
            said = said[0] if isinstance(said, list) else said
            if any(said[name] != value for name, value in self.expect.items()):
                return "wrong answer"
            if said.get("batch"):
                self.named += 1
                self.batches += 1 / said["batch"]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return "unreadable answer"
        return None


def measure(load: Load) -> Measured:
    """Put the load on the server and wait for its end; needs a thread without an event loop."""
    body = Path(load.body).read_bytes()
    head = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    request = (
        f"POST {load.path} HTTP/1.1\r\nhost: {load.host}:{load.port}\r\ncontent-length: {len(body)}\r\n{head}\r\n"
    ).encode() + body
    return uvloop.run(_closed(load, request) if load.clients else _open(load, request))


async def _closed(load: Load, request: bytes) -> Measured:
    tally = _tally(load, time.perf_counter())
    cpu_s = _cpu_s()

    async def client() -> None:
        connection = _Connection(load.host, load.port)
        try:
            while (sent := time.perf_counter()) < tally.end and tally.asked < load.most:
                tally.asked += 1
                await _ask(connection, request, sent, tally, by_answer=True)
        finally:
            connection.close()

    clients = [asyncio.create_task(client()) for _ in range(load.clients)]
    await _ended(clients, tally.end + FAREWELL_S)
    return _measured(tally, _cpu_s() - cpu_s, overrun=False)


async def _open(load: Load, request: bytes) -> Measured:
    tally = _tally(load, time.perf_counter())
    cpu_s = _cpu_s()
    idle: deque[_Connection] = deque()
    connections: list[_Connection] = []
    flying: set[asyncio.Task[None]] = set()
    overrun = False

    async def one(moment: float) -> None:
        if not idle:
            connections.append(_Connection(load.host, load.port))
            idle.append(connections[-1])
        connection = idle.pop()
        if tally.counts(moment):
            tally.late_s.append(time.perf_counter() - moment)
        await _ask(connection, request, moment, tally, by_answer=False)
        idle.append(connection)

    for moment in _arrivals(load, time.perf_counter()):
        if (left_s := moment - time.perf_counter()) > 0:
            await asyncio.sleep(left_s)
        if len(flying) >= MOST_IN_FLIGHT:
            overrun = True
            break
        task = asyncio.create_task(one(moment))
        flying.add(task)
        task.add_done_callback(flying.discard)
    # What a second of arrivals leaves behind is a queue that grows.
    overrun = overrun or len(flying) > load.rate
    await _ended([*flying], time.perf_counter() + FAREWELL_S)
    for connection in connections:
        connection.close()
    return _measured(tally, _cpu_s() - cpu_s, overrun)


def _tally(load: Load, now: float) -> _Tally:
    return _Tally(now + load.warm_s, now + load.warm_s + load.seconds, load.expect)


def _arrivals(load: Load, now: float) -> Sequence[float]:
    dice = random.Random(load.seed)
    moments: list[float] = []
    end, moment = now + load.warm_s + load.seconds, now
    while (moment := moment + dice.expovariate(load.rate)) < end and len(moments) < load.most:
        moments.append(moment)
    return moments


async def _ask(
    connection: _Connection, request: bytes, since: float, tally: _Tally, *, by_answer: bool
) -> None:
    """One request; counted when its answer (closed loop) or its moment (open loop) is within the time."""
    wrong: str | None = None
    answer: tuple[int, bytes] | None = None
    try:
        answer = await connection.ask(request)
    except OSError as error:
        wrong = type(error).__name__
    except asyncio.CancelledError:
        if tally.counts(since):
            tally.failures["unanswered"] = tally.failures.get("unanswered", 0) + 1
        raise
    now = time.perf_counter()
    counts = tally.counts(now if by_answer else since)
    if answer is not None and counts:
        wrong = tally.wrong(*answer)
    if wrong is not None:
        if counts:
            tally.failures[wrong] = tally.failures.get(wrong, 0) + 1
        if by_answer:
            await asyncio.sleep(0.01)  # one that refuses at once is not asked in a tight loop
        return
    tally.total += 1
    if not counts:
        return
    tally.latencies_s.append(now - since)
    tally.finished.append(now)


async def _ended(tasks: Sequence[asyncio.Task[None]], deadline: float) -> None:
    """Wait for the tasks until `deadline`, then end them; what went wrong inside is raised."""
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=max(0.0, deadline - time.perf_counter()))
        for task in pending:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def _measured(tally: _Tally, client_cpu_s: float, overrun: bool) -> Measured:
    ordered = sorted(tally.latencies_s)
    failed = sum(tally.failures.values())
    return Measured(
        answered=len(ordered),
        total=tally.total,
        failed=failed,
        failures=tally.failures,
        p50_ms=quantile(ordered, 0.5) * 1e3 if ordered else None,
        p99_ms=quantile(ordered, 0.99) * 1e3 if ordered else None,
        mean_ms=statistics.fmean(ordered) * 1e3 if ordered else None,
        rate=_slope(sorted(tally.finished)),
        mean_batch=tally.named / tally.batches if tally.batches else None,
        overrun=overrun,
        late_ms=statistics.median(tally.late_s) * 1e3 if tally.late_s else 0.0,
        client_cpu_s=client_cpu_s,
    )


def _slope(finished: Sequence[float]) -> float:
    """Answers per second: a straight line through their count, so that whole batches at the ends do not matter."""
    if len(finished) < 2 or finished[0] == finished[-1]:
        return 0.0
    return statistics.linear_regression(finished, range(len(finished))).slope


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(read: Callable[[], str] = sys.stdin.readline) -> int:
    """Answer lines until there are no more."""
    while line := read():
        print(json.dumps(asdict(measure(Load(**json.loads(line))))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
