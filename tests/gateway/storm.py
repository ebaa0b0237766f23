"""Requests of every kind, right and wrong, from many clients, and a killer of workers.

Every 200 is held against the frame that it is for; the handler behind the gateway is `checksum_handler`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import httpx

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from tests.conftest import pick_free_ports, write_archive
from tests.gateway import raw
from tests.gateway.checksum_handler import checksum

CLIENTS = 48
PATH = "/predictions/checksum"


@contextlib.contextmanager
def checksum_server(store: Path) -> Iterator[TorchServe]:
    """TorchServe with two workers of the checksum handler."""
    write_archive(store / "checksum.mar", "tests.gateway.checksum_handler")
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    models = [ServedModel("checksum.mar", workers=2)]
    with TorchServe(TorchServeOptions(store, models, system_metrics=False, gpus=0, **ports)) as running:
        yield running


def backend_flags(server: TorchServe) -> dict[str, str]:
    """Options that lead a gateway to `server`."""
    return {
        "inference_url": server.inference_url,
        "management_url": server.management_url,
        "worker_sockets": str(server.worker_sockets),
    }


class Client:
    """Sends one request of a random kind, on a connection of its own, and holds the answer against it."""

    def __init__(self, url: str, seed: int, headers: Mapping[str, str] | None = None) -> None:
        self.host, self.port = url.removeprefix("http://").split(":")
        self.dice = random.Random(seed)
        self.headers = dict(headers or {})

    def request(self, path: str, body: bytes, **headers: object) -> bytes:
        return raw.request(path, body, **self.headers, **headers)

    def head(self, path: str, **headers: object) -> bytes:
        return raw.head(path, **self.headers, **headers)

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
        status, body = await self.exchange(self.request(PATH, frame))
        assert status == 200 and body == checksum(frame), (status, body)
        return status

    async def framed(self, *, lines: bool = False):
        frames = [self.frame() for _ in range(self.dice.randint(1, 6))]
        bad = self.dice.randrange(len(frames))
        frames[bad] = frames[bad][:-1]
        accept = "application/x-ndjson" if lines else "application/json"
        sent = self.request(
            PATH,
            pack_frames([(frame, {}) for frame in frames]),
            content_type=FRAMES_CONTENT_TYPE,
            accept=accept,
        )
        status, body = await self.exchange(sent)
        assert status == 200, (status, body)
        if status == 200:
            found = (
                [json.loads(line) for line in body.splitlines()] if lines else json.loads(body)["outcomes"]
            )
            assert len(found) == len(frames)
            for i, outcome in enumerate(found):
                i = outcome.get("index", i)
                assert outcome["status"] == (422 if i == bad else 200), outcome
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
        assert dropped_requests or status in statuses, (status, body, sent[:100])
        return status

    async def odd_length(self):
        return await self.refused(self.request(PATH, self.frame()[:-3]), 422)

    async def broken_json(self):
        return await self.refused(self.request(PATH, b'{"b64": ', content_type="application/json"), 400)

    async def broken_form(self):
        kind = "multipart/form-data; boundary=b"
        return await self.refused(self.request(PATH, b"--b\r\nnonsense", content_type=kind), 400)

    async def unknown_option(self):
        return await self.refused(self.request(f"{PATH}?colour=red", self.frame()), 400)

    async def unknown_model(self):
        return await self.refused(
            self.request(f"/predictions/nobody-{self.dice.random()}", self.frame()), 404
        )

    async def oversize(self):
        async def flood(writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(256 << 10))
            await writer.drain()

        return await self.refused(self.head(PATH, content_length=1 << 30), 413, drip=flood)

    async def chunk_flood(self):
        async def flood(writer: asyncio.StreamWriter) -> None:
            for _ in range(40):
                writer.write(raw.chunk(bytes(8 << 10)))
                await writer.drain()

        return await self.refused(self.head(PATH, transfer_encoding="chunked"), 413, drip=flood)

    async def no_http(self):
        return await self.refused(b"\x00\x01 nonsense\r\n\r\n", 400)

    async def expired(self):
        frame = self.frame()
        status, body = await self.exchange(self.request(f"{PATH}?timeout_ms=1", frame))
        assert status == 504 or (status == 200 and body == checksum(frame)), (status, body)
        return status

    # Clients that go

    async def hung_up(self):
        accept = self.dice.choice(["application/json", "application/x-ndjson"])
        sent = self.request(PATH, self.frame(), accept=accept)
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


def pending(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    (model,) = httpx.get(f"{url}/models/checksum", trust_env=False).json()
    gauges = dict(re.findall(r"^mmdet3d_serve_pending_(frames|bytes) ([0-9.e+]+)$", text, re.MULTILINE))
    return {
        **{name: float(value) for name, value in gauges.items()},
        **{n: model[n] for n in ("waiting", "running")},
    }


def print_counts(counts: Counter[tuple[str, int | str]]) -> None:
    statuses = sorted({status for _, status in counts}, key=str)
    print("\n" + f"{'kind':16}" + "".join(f"{status!s:>7}" for status in statuses))
    for kind in WEIGHTS:
        print(f"{kind:16}" + "".join(f"{counts[kind, status] or '':>7}" for status in statuses))
