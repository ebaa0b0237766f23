"""Thousands of mostly invalid requests while workers are killed, and then a normal one.

The gateway is the real command, TorchServe is real, its handler answers with a checksum of each frame: every
200 is held against the frame it is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from tests.conftest import pick_free_ports, write_archive
from tests.gateway import raw
from tests.gateway.checksum_handler import checksum
from tests.gateway.running import eventually

pytestmark = [pytest.mark.torchserve, pytest.mark.slow, pytest.mark.timeout(900)]

WARM_UP = 1_000
CLIENTS = 48
MAX_GROWTH_MIB = 20
PATH = "/predictions/checksum"
LIMITS = {
    "max_frame_bytes": 64 << 10, "max_body_bytes": 128 << 10, "batch_bytes": 128 << 10, "max_pending_frames": 128,
    "max_pending_bytes": 4 << 20, "body_timeout_s": 5, "log_level": "error",
}  # fmt: skip
# Outcomes of a valid request while workers die: answered, retry later, or past its deadline.
BUSY = {200, 429, 503, 504}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TorchServe]:
    store = tmp_path_factory.mktemp("store")
    write_archive(store / "checksum.mar", "tests.gateway.checksum_handler")
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    models = [ServedModel("checksum.mar", workers=2)]
    with TorchServe(TorchServeOptions(store, models, system_metrics=False, gpus=0, **ports)) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(server) -> Iterator[tuple[str, psutil.Process]]:
    urls = {"inference_url": server.inference_url, "management_url": server.management_url}
    urls["worker_sockets"] = str(server.worker_sockets)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**LIMITS, **urls}.items()]
    popen = subprocess.Popen(
        [sys.executable, "-m", "serve", "gateway", "--port", "0", *flags],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stderr is not None
    with popen, popen.stderr:
        url = re.search(r"http://\S+", popen.stderr.readline())
        assert url
        try:
            yield url[0], psutil.Process(popen.pid)
        finally:
            popen.send_signal(signal.SIGTERM)
            complaints = popen.stderr.read()
            assert popen.wait(30) == 0
            assert "Traceback" not in complaints, complaints[-5000:]


class Client:
    """Sends one request of a random kind, on a connection of its own, and holds the answer against it."""

    def __init__(self, url: str, seed: int) -> None:
        self.host, self.port = url.removeprefix("http://").split(":")
        self.dice = random.Random(seed)

    def frame(self) -> bytes:
        return self.dice.randbytes(16 * self.dice.randint(4, 400))

    async def exchange(
        self, sent: bytes, *, drip: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None
    ):
        """Status, content type and body; status 0 where the gateway closed without a word."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            try:
                writer.write(sent)
                await writer.drain()
                if drip is not None:
                    await drip(writer)
            except ConnectionError:
                pass  # it has answered already and will not read on
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if length := re.search(r"content-length: (\d+)", head):
                body = await reader.readexactly(int(length[1]))
            else:
                body = b""
                while size := int(await reader.readline(), 16):
                    body += await reader.readexactly(size)
                    await reader.readexactly(2)
            return int(head.split(" ", 2)[1]), body
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, b""
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    # Requests that are right

    async def one_frame(self):
        frame = self.frame()
        status, body = await self.exchange(raw.request(PATH, frame))
        assert status in BUSY and (status != 200 or body == checksum(frame)), (status, body)
        return status

    async def framed(self, *, lines: bool = False):
        frames = [self.frame() for _ in range(self.dice.randint(1, 6))]
        bad = self.dice.randrange(len(frames))
        frames[bad] = frames[bad][:-1]
        accept = "application/x-ndjson" if lines else "application/json"
        sent = raw.request(
            PATH,
            pack_frames([(frame, {}) for frame in frames]),
            content_type=FRAMES_CONTENT_TYPE,
            accept=accept,
        )
        status, body = await self.exchange(sent)
        assert status in BUSY, (status, body)
        if status == 200:
            found = (
                [json.loads(line) for line in body.splitlines()] if lines else json.loads(body)["outcomes"]
            )
            assert len(found) == len(frames)
            for i, outcome in enumerate(found):
                i = outcome.get("index", i)
                assert outcome["status"] in ({422} if i == bad else BUSY) | {429, 503, 504}, outcome
                if outcome["status"] == 200:
                    assert outcome["answer"] == json.loads(checksum(frames[i]))
        return status

    async def in_lines(self):
        return await self.framed(lines=True)

    # Requests that are wrong

    async def refused(self, sent: bytes, *statuses: int, drip=None):
        status, body = await self.exchange(sent, drip=drip)
        # Whoever is still sending when the gateway has answered and closed may see the reset before the answer.
        dropped_requests = status == 0 and drip is not None
        assert dropped_requests or status in statuses or status in BUSY - {200}, (status, body, sent[:100])
        return status

    async def odd_length(self):
        return await self.refused(raw.request(PATH, self.frame()[:-3]), 422)

    async def broken_json(self):
        return await self.refused(raw.request(PATH, b'{"b64": ', content_type="application/json"), 400)

    async def broken_form(self):
        kind = "multipart/form-data; boundary=b"
        return await self.refused(raw.request(PATH, b"--b\r\nnonsense", content_type=kind), 400)

    async def unknown_option(self):
        return await self.refused(raw.request(f"{PATH}?colour=red", self.frame()), 400)

    async def unknown_model(self):
        return await self.refused(raw.request(f"/predictions/nobody-{self.dice.random()}", self.frame()), 404)

    async def oversize(self):
        async def flood(writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(256 << 10))
            await writer.drain()

        return await self.refused(raw.head(PATH, content_length=1 << 30), 413, drip=flood)

    async def chunk_flood(self):
        async def flood(writer: asyncio.StreamWriter) -> None:
            for _ in range(40):
                writer.write(raw.chunk(bytes(8 << 10)))
                await writer.drain()

        return await self.refused(raw.head(PATH, transfer_encoding="chunked"), 413, drip=flood)

    async def no_http(self):
        return await self.refused(b"\x00\x01 nonsense\r\n\r\n", 400)

    async def expired(self):
        frame = self.frame()
        status, body = await self.exchange(raw.request(f"{PATH}?timeout_ms=1", frame))
        assert status in BUSY and (status != 200 or body == checksum(frame)), (status, body)
        return status

    # Clients that go

    async def hung_up(self):
        accept = self.dice.choice(["application/json", "application/x-ndjson"])
        sent = raw.request(PATH, self.frame(), accept=accept)
        _, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(sent[: self.dice.choice([10, len(sent) // 2, len(sent) - 1, len(sent), len(sent)])])
        await writer.drain()
        if self.dice.random() < 0.5:
            await asyncio.sleep(self.dice.random() * 0.02)  # a client's own pace, not a wait for anything
        writer.transport.abort() if self.dice.random() < 0.5 else writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return "gone"


WEIGHTS = {
    "one_frame": 40, "framed": 8, "in_lines": 7, "odd_length": 6, "broken_json": 3, "broken_form": 3,
    "unknown_option": 3, "unknown_model": 3, "oversize": 3, "chunk_flood": 3, "no_http": 2, "expired": 7, "hung_up": 12,
}  # fmt: skip


class Killer:
    """Kills a worker at each of `deaths` moments of a storm, counted in requests, not in seconds.

    Before each it holds the requests back until both workers are ready, so that one of them is left; it kills when as
    many requests as there are clients have gone out again.
    """

    def __init__(self, server: TorchServe, requests: int, deaths: int) -> None:
        self.killed: list[int] = []
        self._server = server
        self._every = requests // (deaths + 1)
        self._go = asyncio.Event()
        self._go.set()
        self._victims: list[int] = []

    async def before(self, number: int) -> None:
        """To be awaited before the request of this number."""
        moment, after = divmod(number, self._every)
        if moment and after == 0:
            self._go.clear()
            self._victims = await self._both()
            self._go.set()
        await self._go.wait()
        if self._victims and after >= CLIENTS:
            victim, self._victims = self._victims[moment % 2], []
            os.kill(victim, signal.SIGKILL)
            self.killed.append(victim)

    async def _both(self) -> list[int]:
        while len(ready := await asyncio.to_thread(ready_workers, self._server)) < 2:
            await asyncio.sleep(0.05)
        return ready


def ready_workers(server: TorchServe) -> list[int]:
    return [worker.pid for worker in server.workers("checksum") if worker.ready and worker.pid]


async def storm(
    url: str,
    requests: int,
    seed: int,
    counts: Counter[tuple[str, int | str]],
    killer: Killer | None = None,
) -> None:
    left = iter(range(requests))

    async def work(number: int) -> None:
        client = Client(url, seed + number)
        for each in left:
            if killer is not None:
                await killer.before(each)
            (kind,) = client.dice.choices(list(WEIGHTS), list(WEIGHTS.values()))
            counts[kind, await asyncio.wait_for(getattr(client, kind)(), 60)] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(work(number))


async def storm_with_deaths(
    url: str, server: TorchServe, requests: int, deaths: int, counts: Counter[tuple[str, int | str]]
) -> int:
    killer = Killer(server, requests, deaths)
    await storm(url, requests, WARM_UP, counts, killer)
    return len(killer.killed)


def pending(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    (model,) = httpx.get(f"{url}/models/checksum", trust_env=False).json()
    gauges = dict(re.findall(r"^mmdet3d_serve_pending_(frames|bytes) ([0-9.e+]+)$", text, re.MULTILINE))
    return {
        **{name: float(value) for name, value in gauges.items()},
        **{n: model[n] for n in ("waiting", "running")},
    }


@pytest.mark.parametrize(
    ("requests", "deaths"), [(2_000, 3), pytest.param(40_000, 12, marks=pytest.mark.soak)]
)
def test_normal_request_is_answered_after_mixed_requests_and_killed_workers(
    gateway, server, requests, deaths
):
    url, process = gateway
    eventually(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200, 30)
    asyncio.run(storm(url, WARM_UP, 0, Counter()))
    rss_before = process.memory_info().rss
    counts: Counter[tuple[str, int | str]] = Counter()
    began = time.monotonic()
    killed = asyncio.run(storm_with_deaths(url, server, requests, deaths, counts))
    seconds = time.monotonic() - began
    quiet = eventually(lambda: (found := pending(url)) and not any(found.values()) and found, 60)
    growth_mib = (process.memory_info().rss - rss_before) / (1 << 20)
    registry(counts)
    by_status = Counter[str]()
    for (_, status), number in counts.items():
        by_status[str(status)] += number
    summary = {
        "requests": counts.total(), "seconds": round(seconds, 1), "workers_killed": killed,
        "by_status": dict(by_status), "growth_mib": round(growth_mib, 1), "pending": quiet,
    }  # fmt: skip
    print(json.dumps(summary))
    assert set(quiet) == {"frames", "bytes", "waiting", "running"}
    assert counts.total() == requests and killed == deaths
    assert counts["one_frame", 200] > 0.5 * sum(n for (kind, _), n in counts.items() if kind == "one_frame")
    assert growth_mib <= MAX_GROWTH_MIB
    eventually(lambda: len(ready_workers(server)) == 2, 60)
    frame = bytes(range(256))
    answer = httpx.post(f"{url}{PATH}", content=frame, trust_env=False, timeout=30)
    assert answer.status_code == 200 and answer.content == checksum(frame)


def registry(counts: Counter[tuple[str, int | str]]) -> None:
    statuses = sorted({status for _, status in counts}, key=str)
    print("\n" + f"{'kind':16}" + "".join(f"{status!s:>7}" for status in statuses))
    for kind in WEIGHTS:
        print(f"{kind:16}" + "".join(f"{counts[kind, status] or '':>7}" for status in statuses))


def test_sixty_four_concurrent_clients_each_get_their_own_boxes(gateway, server):
    url, _ = gateway
    eventually(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200, 60)

    async def ask(number: int) -> list[bool]:
        client = Client(url, number)
        frames = [client.frame() for _ in range(10)]
        return [await client.exchange(raw.request(PATH, frame)) == (200, checksum(frame)) for frame in frames]

    async def all_of_them() -> list[list[bool]]:
        return await asyncio.gather(*(ask(number) for number in range(64)))

    assert all(map(all, asyncio.run(all_of_them())))
