"""Every hostile body is a client error, and does not delay other clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from urllib.parse import urlsplit

import pytest

from tests.attacks.bodies.hostile import ATTACKS, Attack
from tests.attacks.gateway_process import ALLOWED_S, GatewayProcess, LiveWatch
from tests.gateway.running import eventually

# Copies of a body that the process may hold at once, and what else a request may take.
COPIES, OTHER_BYTES = 3, 64 << 20
TRIES = 4


def send(url: str, attack: Attack, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer; the gateway may answer, and close, before it has read all."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=100)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", attack.path, body, dict(attack.headers))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, text


def growth(gateway: GatewayProcess, stop: threading.Event, found: list[int]) -> None:
    before = gateway.resident_bytes()
    while not stop.wait(0.01):
        found.append(gateway.resident_bytes() - before)


@pytest.mark.timing
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_body_is_refused_while_others_are_answered(attacked, name):
    attack = ATTACKS[name]
    body = attack.body()
    waits = []
    for _ in range(TRIES):
        # A gateway notices late that a client has gone whose body it had stopped reading.
        eventually(lambda: attacked.pending_bytes() == 0, 30)
        grown, stop = [0], threading.Event()
        watch_memory = threading.Thread(target=growth, args=(attacked, stop, grown))
        watch_memory.start()
        cpu_s = attacked.cpu_s()
        try:
            with LiveWatch(attacked.url) as watch:
                status, answer = send(attacked.url, attack, body)
        finally:
            stop.set()
            watch_memory.join()
        assert status in attack.statuses, answer[:500]
        if status >= 400:
            document = json.loads(answer)
            error = document["error"] if isinstance(document["error"], dict) else document
            assert error["code"] and 20 < len(answer) < 3000
        assert max(grown) < COPIES * len(body) + OTHER_BYTES
        # A loop that stands still computes: on a busy machine, it waited no longer for itself than it computed.
        waits.append(min(watch.slowest_s - watch.stolen_s, attacked.cpu_s() - cpu_s))
        if waits[-1] <= ALLOWED_S:
            return
    pytest.fail(f"/health/live took {min(waits):.3f} s at best beside this body")
