"""Load generator: a process that sends HTTP/1.1 requests over loopback, bounded in number and time.

It reads one line of JSON (a `Load`) and answers with one line (a `LoadResult`), until standard input closes. Closed
loop: each client sends its next request when the previous one is answered. Open loop: arrivals are a Poisson process,
independent of pending requests; latency counts from the scheduled arrival (no coordinated omission). Every response is
checked: another status than 200, or content about another frame, counts as failed.
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
from typing import Any, Protocol, cast

import httptools
import uvloop

__all__ = ["Connection", "Load", "LoadResult", "measure", "quantile"]

MAX_IN_FLIGHT = 512
SHUTDOWN_S = 5.0  # time for pending responses after the last request


@dataclass(frozen=True)
class Load:
    """Requests to send, how, and for how long.

    Attributes:
        host: address on loopback.
        port: port of the server.
        path: path to POST to.
        body: path of the file with the request body.
        headers: headers of every request.
        protocol: ``http``, ``grpc`` (calls, `body` is the message) or ``grpc-stream`` (one stream for all clients).
        clients: clients of a closed loop; 0 selects an open loop.
        rate: mean arrivals per second of an open loop.
        warmup_s: seconds before counting starts.
        seconds: seconds of counting.
        max_requests: bound on all requests, counted or not.
        expect: members that the JSON response (or its only element) must have; empty accepts any.
        seed: seed of the arrivals.
    """

    host: str
    port: int
    path: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    protocol: str = "http"
    clients: int = 0
    rate: float = 0.0
    warmup_s: float = 0.5
    seconds: float = 3.0
    max_requests: int = 20_000
    expect: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class LoadResult:
    """Result of a load; times in milliseconds.

    Attributes:
        answered: correct responses to counted requests.
        total: correct responses including the warm-up.
        failed: counted requests with a wrong response or none.
        failures: number of failures by status or reason.
        p50_ms, p99_ms, mean_ms: latency of correct responses; None without any.
        rate: correct responses per second (slope of their count over time).
        mean_batch: mean frames per batch, if responses report their batch.
        overrun: whether the server could not keep up with an open loop.
        late_ms: median delay of this process in sending a scheduled request.
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
    """Return the nearest-rank quantile: the smallest value that `share` of the sorted values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1))]


class Connection(Protocol):
    """Connection of a client."""

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return status and body. Raises OSError if the connection fails."""

    async def end(self) -> None:
        """End the connection."""


class _Connection(asyncio.Protocol):
    """Connection with one request at a time; reconnects if the server closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._chunks: list[bytes] = []
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return status and body. Raises OSError if the connection fails."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, *self._address)
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._chunks = []
        self._answer = loop.create_future()
        self._transport.write(request)
        return await self._answer

    async def end(self) -> None:
        """Abort the connection."""
        self.close()

    def close(self) -> None:
        """Abort the connection."""
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
        """Collect a chunk of the body (httptools callback)."""
        self._chunks.append(data)

    def on_message_complete(self) -> None:
        """Resolve the pending request (httptools callback)."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._chunks)))
        if not self._parser.should_keep_alive():
            self.close()

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


@dataclass
class _Tally:
    """Counters of the counted interval."""

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

    def check(self, status: int, body: bytes) -> str | None:
        """Return what is wrong with a response, or None; count the batch of a correct one."""
        if status != 200:
            return str(status)
        if not self.expect:
            return None
        try:
            answer = json.loads(body)
            answer = answer[0] if isinstance(answer, list) else answer
            if any(answer[name] != value for name, value in self.expect.items()):
                return "wrong answer"
            if answer.get("batch"):
                self.named += 1
                self.batches += 1 / answer["batch"]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return "unreadable answer"
        return None


def measure(load: Load) -> LoadResult:
    """Run the load to its end; call it from a thread without an event loop."""
    body = Path(load.body).read_bytes()
    if load.protocol != "http":
        return uvloop.run(_closed(load, body))
    head = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    request = (
        f"POST {load.path} HTTP/1.1\r\nhost: {load.host}:{load.port}\r\ncontent-length: {len(body)}\r\n{head}\r\n"
    ).encode() + body
    return uvloop.run(_closed(load, request) if load.clients else _open(load, request))


async def _closed(load: Load, request: bytes) -> LoadResult:
    tally = _tally(load, time.perf_counter())
    cpu_s = _cpu_s()

    connect = _connector(load)

    async def client() -> None:
        connection = connect()
        try:
            while (sent := time.perf_counter()) < tally.end and tally.asked < load.max_requests:
                tally.asked += 1
                await _send(connection, request, sent, tally, by_answer=True)
        finally:
            await connection.end()

    clients = [asyncio.create_task(client()) for _ in range(load.clients)]
    await _finish(clients, tally.end + SHUTDOWN_S)
    return _summarize(tally, _cpu_s() - cpu_s, overrun=False)


def _connector(load: Load) -> Callable[[], Connection]:
    """Return what makes the connection of one more client."""
    if load.protocol == "http":
        return lambda: _Connection(load.host, load.port)
    from tools.bench.serving.grpc_load import Calls, Stream

    if load.protocol == "grpc":
        return lambda: Calls(load.host, load.port, load.path)
    stream = Stream(load.host, load.port, load.path)
    return lambda: stream


async def _open(load: Load, request: bytes) -> LoadResult:
    tally = _tally(load, time.perf_counter())
    cpu_s = _cpu_s()
    idle: deque[_Connection] = deque()
    connections: list[_Connection] = []
    in_flight: set[asyncio.Task[None]] = set()
    overrun = False

    async def one(moment: float) -> None:
        if not idle:
            connections.append(_Connection(load.host, load.port))
            idle.append(connections[-1])
        connection = idle.pop()
        if tally.counts(moment):
            tally.late_s.append(time.perf_counter() - moment)
        await _send(connection, request, moment, tally, by_answer=False)
        idle.append(connection)

    for moment in _arrivals(load, time.perf_counter()):
        if (left_s := moment - time.perf_counter()) > 0:
            await asyncio.sleep(left_s)
        if len(in_flight) >= MAX_IN_FLIGHT:
            overrun = True
            break
        task = asyncio.create_task(one(moment))
        in_flight.add(task)
        task.add_done_callback(in_flight.discard)
    # More than a second of arrivals pending: the queue grows.
    overrun = overrun or len(in_flight) > load.rate
    await _finish([*in_flight], time.perf_counter() + SHUTDOWN_S)
    for connection in connections:
        connection.close()
    return _summarize(tally, _cpu_s() - cpu_s, overrun)


def _tally(load: Load, now: float) -> _Tally:
    return _Tally(now + load.warmup_s, now + load.warmup_s + load.seconds, load.expect)


def _arrivals(load: Load, now: float) -> Sequence[float]:
    rng = random.Random(load.seed)
    moments: list[float] = []
    end, moment = now + load.warmup_s + load.seconds, now
    while (moment := moment + rng.expovariate(load.rate)) < end and len(moments) < load.max_requests:
        moments.append(moment)
    return moments


async def _send(
    connection: Connection, request: bytes, since: float, tally: _Tally, *, by_answer: bool
) -> None:
    """Send one request; count it by the time of its response (closed loop) or its arrival (open loop)."""
    failure: str | None = None
    answer: tuple[int, bytes] | None = None
    try:
        answer = await connection.ask(request)
    except OSError as error:
        failure = type(error).__name__
    except asyncio.CancelledError:
        if tally.counts(since):
            tally.failures["unanswered"] = tally.failures.get("unanswered", 0) + 1
        raise
    now = time.perf_counter()
    counts = tally.counts(now if by_answer else since)
    if answer is not None and counts:
        failure = tally.check(*answer)
    if failure is not None:
        if counts:
            tally.failures[failure] = tally.failures.get(failure, 0) + 1
        if by_answer:
            await asyncio.sleep(0.01)  # no busy loop on a server that rejects at once
        return
    tally.total += 1
    if not counts:
        return
    tally.latencies_s.append(now - since)
    tally.finished.append(now)


async def _finish(tasks: Sequence[asyncio.Task[None]], deadline: float) -> None:
    """Wait for the tasks until `deadline`, cancel the rest, and raise their first exception."""
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=max(0.0, deadline - time.perf_counter()))
        for task in pending:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def _summarize(tally: _Tally, client_cpu_s: float, overrun: bool) -> LoadResult:
    ordered = sorted(tally.latencies_s)
    failed = sum(tally.failures.values())
    return LoadResult(
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
    """Fit responses per second by linear regression, so that batches at the ends do not matter."""
    if len(finished) < 2 or finished[0] == finished[-1]:
        return 0.0
    return statistics.linear_regression(finished, range(len(finished))).slope


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(read: Callable[[], str] = sys.stdin.readline) -> int:
    """Answer lines until the end of input."""
    while line := read():
        print(json.dumps(asdict(measure(Load(**json.loads(line))))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
