"""A run at volume: 64 clients, killed workers, and hostile clients beside.

`make test-soak TESTS="tests/gateway/test_volume.py --duration 600"`; prints its counts and one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil
import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.torchserve import TorchServe
from tests.attacks.bodies.hostile import ATTACKS
from tests.attacks.gateway_process import LiveWatch, gateway_process
from tests.gateway import raw
from tests.gateway.running import eventually
from tests.gateway.storm import (
    PATH,
    WEIGHTS,
    Client,
    backend_flags,
    checksum_server,
    print_counts,
    ready_workers,
)

pytestmark = [pytest.mark.soak, pytest.mark.torchserve, pytest.mark.slow, pytest.mark.timeout(3600)]

CLIENTS = 64
HOSTILE = 4  # of each kind
KILL_EVERY_S = 20.0
WARM_UP_S = 10.0
MAX_GROWTH_MIB = 30
GOOD, BAD = "a key of good clients", "a key of hostile clients"
LIMITS = {
    "max_pending_frames": 2048, "max_pending_bytes": 256 << 20, "max_body_bytes": 256 << 10,
    "max_frame_bytes": 64 << 10,
    "batch_bytes": 256 << 10, "body_timeout_s": 5, "client_stall_timeout_s": 3, "client_share": 0.5,
    "log_level": "error",
}  # fmt: skip
# A deadline of 1 ms is answered 504 by its own wish.
KINDS = {kind: weight for kind, weight in WEIGHTS.items() if kind != "expired"}


class Run:
    """Everything at once for a time, with counts by kind and status."""

    def __init__(self, url: str, server: TorchServe, duration_s: float) -> None:
        self.counts: Counter[tuple[str, int | str]] = Counter()
        self.hostile: Counter[str] = Counter()
        self.killed: list[int] = []
        self.wrong: list[str] = []
        self._url, self._server = url, server
        # Made before, because making them holds the interpreter that is also the 64 clients.
        self._bodies = [(attack, attack.body()) for attack in ATTACKS.values() if not attack.large]
        self._bodies = [(attack, body) for attack, body in self._bodies if len(body) <= 512 << 10]
        self._ends = time.monotonic() + duration_s

    async def everything(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._ask(number))
            for number in range(HOSTILE):
                for attack in (
                    self._read_nothing,
                    self._announce,
                    self._stay_idle,
                    self._send_hostile_bodies,
                ):
                    group.create_task(attack(number))
            group.create_task(self._kill())

    def _runs(self) -> bool:
        return time.monotonic() < self._ends

    async def _ask(self, number: int) -> None:
        client = Client(self._url, number, {"x_api_key": GOOD})
        while self._runs():
            (kind,) = client.dice.choices(list(KINDS), list(KINDS.values()))
            try:
                self.counts[kind, await asyncio.wait_for(getattr(client, kind)(), 60)] += 1
            except (AssertionError, TimeoutError) as error:
                self.counts[kind, "wrong"] += 1
                self.wrong.append(f"{kind}: {str(error)[:300] or repr(error)}")

    async def _kill(self) -> None:
        """Kill a worker whenever both are ready, one after the other."""
        while self._runs():
            await asyncio.sleep(KILL_EVERY_S)
            if len(ready := await asyncio.to_thread(ready_workers, self._server)) == 2 and self._runs():
                os.kill(ready[len(self.killed) % 2], signal.SIGKILL)
                self.killed.append(ready[len(self.killed) % 2])

    @contextlib.asynccontextmanager
    async def _connected(self, kind: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        self.hostile[kind] += 1
        host, port = self._url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, port)
        try:
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                yield reader, writer
        finally:
            writer.transport.abort()

    async def _hold(self, writer: asyncio.StreamWriter) -> None:
        """Keep the connection until the gateway cuts it, at most half a minute."""
        until = min(self._ends, time.monotonic() + 30)
        while time.monotonic() < until and not writer.transport.is_closing():
            await asyncio.sleep(0.2)

    async def _read_nothing(self, number: int) -> None:
        frames = pack_frames([(bytes(16 * 200), {})] * 60)
        while self._runs():
            async with self._connected("reads nothing") as (reader, writer):
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                headers = {
                    "content_type": FRAMES_CONTENT_TYPE,
                    "accept": "application/x-ndjson",
                    "x_api_key": BAD,
                }
                writer.write(raw.request(PATH, frames, **headers))
                await self._hold(writer)

    async def _announce(self, number: int) -> None:
        while self._runs():
            async with self._connected("announces a body") as (_, writer):
                writer.write(raw.head(PATH, content_length=256 << 10, x_api_key=BAD))
                await self._hold(writer)

    async def _stay_idle(self, number: int) -> None:
        while self._runs():
            async with self._connected("stays idle") as (_, writer):
                writer.write(b"POST ")
                await self._hold(writer)

    async def _send_hostile_bodies(self, number: int) -> None:
        sent = number
        while self._runs():
            attack, body = self._bodies[sent % len(self._bodies)]
            sent += HOSTILE
            headers = {name.replace("-", "_"): value for name, value in attack.headers.items()}
            path = attack.path.replace("second", "checksum")
            async with self._connected("hostile body") as (reader, writer):
                writer.write(raw.request(path, body, x_api_key=BAD, connection="close", **headers))
                answer = await asyncio.wait_for(reader.read(), 30)
                if answer and (status := raw.status(answer)) >= 500:
                    self.hostile[f"hostile body answered {status}"] += 1
            await asyncio.sleep(0.05)  # a stranger's own pace; the 64 are the load


def pending(url: str) -> dict[str, Any]:
    (model,) = httpx.get(f"{url}/models/checksum", trust_env=False, headers={"x-api-key": GOOD}).json()
    return {name: model[name] for name in ("waiting", "running")}


def test_nothing_is_lost_mixed_up_or_left_in_a_run_at_volume(tmp_path, pytestconfig) -> None:
    duration_s = float(pytestconfig.getoption("--duration"))
    (tmp_path / "keys").write_text(f"{GOOD}\n{BAD}\n")
    (tmp_path / "store").mkdir()
    with (
        checksum_server(tmp_path / "store") as server,
        gateway_process(**LIMITS, api_keys_file=tmp_path / "keys", **backend_flags(server)) as gateway,
    ):
        ready = f"{gateway.url}/health/ready"
        eventually(lambda: httpx.get(ready, trust_env=False).status_code == 200, 60)
        asyncio.run(Run(gateway.url, server, WARM_UP_S).everything())
        before = gateway.resident_bytes()
        run = Run(gateway.url, server, duration_s)
        began, cpu_began = time.monotonic(), gateway.cpu_s()
        with LiveWatch(gateway.url) as watch:
            asyncio.run(run.everything())
        seconds = time.monotonic() - began
        left = eventually(lambda: (found := pending(gateway.url)) and not any(found.values()) and found, 60)
        growth_mib = (gateway.resident_bytes() - before) / (1 << 20)
        cpu_s = gateway.cpu_s() - cpu_began
        resident_mib = gateway.resident_bytes() >> 20
        threads, files = gateway.process.num_threads(), gateway.process.num_fds()
        assert isinstance(gateway.process, psutil.Process)
    print_counts(run.counts)
    errors_5xx = sum(
        number for (_, status), number in run.counts.items() if isinstance(status, int) and status >= 500
    )
    errors_5xx += sum(number for kind, number in run.hostile.items() if "answered 5" in kind)
    summary = {
        "seconds": round(seconds, 1), "requests": run.counts.total(), "answered_200": sum(
            number for (_, status), number in run.counts.items() if status == 200
        ), "hung_up": run.counts["hung_up", "gone"], "wrong_or_lost": len(run.wrong), "errors_5xx": errors_5xx,
        "workers_killed": len(run.killed), "hostile": dict(run.hostile), "pending": left,
        "resident_mib": resident_mib, "growth_mib": round(growth_mib, 1), "threads": threads, "files": files,
        "gateway_cpu_s": round(cpu_s, 1), "slowest_live_ms": round(1e3 * watch.slowest_s),
        "stolen_ms": round(1e3 * watch.stolen_s),
    }  # fmt: skip
    print(json.dumps(summary))
    assert not run.wrong, run.wrong[:5]
    assert errors_5xx == 0
    assert run.counts["one_frame", 200] > 10 * duration_s
    assert len(run.killed) >= duration_s // (3 * KILL_EVERY_S)
    assert growth_mib <= MAX_GROWTH_MIB
