"""Thousands of mostly invalid requests while workers are killed, and then a normal one.

The gateway is the real command, TorchServe is real, its handler answers with a checksum of each frame: every
200 is held against the frame it is for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from serve.torchserve import TorchServe
from tests.attacks.gateway_process import gateway_process
from tests.gateway import raw
from tests.gateway.checksum_handler import checksum
from tests.gateway.running import eventually
from tests.gateway.storm import (
    PATH,
    Client,
    Killer,
    backend_flags,
    checksum_server,
    pending,
    print_counts,
    ready_workers,
    storm,
)

pytestmark = [pytest.mark.torchserve, pytest.mark.slow, pytest.mark.timeout(900)]

WARM_UP = 1_000
MAX_GROWTH_MIB = 20
# Room for all that the clients send at a time: then 429 is a mistake, and so is any other answer to a right request.
LIMITS = {
    "max_frame_bytes": 64 << 10, "max_body_bytes": 128 << 10, "batch_bytes": 128 << 10, "max_pending_frames": 512,
    "max_pending_bytes": 16 << 20, "body_timeout_s": 5, "client_share": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TorchServe]:
    with checksum_server(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(server) -> Iterator[tuple[str, psutil.Process]]:
    with gateway_process(**LIMITS, **backend_flags(server)) as running:
        yield running.url, running.process


async def storm_with_deaths(
    url: str, server: TorchServe, requests: int, deaths: int, counts: Counter[tuple[str, int | str]]
) -> int:
    killer = Killer(server, requests, deaths)
    await storm(url, requests, WARM_UP, counts, killer)
    return len(killer.killed)


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
    print_counts(counts)
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
    assert by_status["503"] == 0 and by_status["200"] > 0.4 * requests
    assert growth_mib <= MAX_GROWTH_MIB
    eventually(lambda: len(ready_workers(server)) == 2, 60)
    frame = bytes(range(256))
    answer = httpx.post(f"{url}{PATH}", content=frame, trust_env=False, timeout=30)
    assert answer.status_code == 200 and answer.content == checksum(frame)


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
