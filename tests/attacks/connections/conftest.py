"""A gateway process under attack, in front of a fake TorchServe that answers as long as a test wants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from tests.attacks.gateway_process import GatewayProcess, gateway_process
from tests.gateway import fake_torchserve
from tests.gateway.conftest import NO_TLS, FakeBackend, background
from tests.gateway.running import Background, eventually

__all__ = ["background"]


@pytest.fixture(scope="session")
def kept_backend(background: Background) -> Iterator[FakeBackend]:
    made = FakeBackend(background)
    yield made
    made.release()
    made.go()


@pytest.fixture(scope="session")
def kept_gateways() -> Iterator[tuple[ExitStack, dict[str, GatewayProcess]]]:
    with ExitStack() as stack:
        yield stack, {}


@pytest.fixture
def backend(kept_backend: FakeBackend) -> Iterator[FakeBackend]:
    """The fake TorchServe of all gateways here, as new."""
    kept_backend.app.models = {"second": {"1.0": fake_torchserve.FakeModel(workers=[*range(1, 10)])}}
    kept_backend.app.calls.clear()
    yield kept_backend
    kept_backend.release()


@pytest.fixture
def attacked(
    backend: FakeBackend, kept_gateways: tuple[ExitStack, dict[str, GatewayProcess]]
) -> Iterator[Callable[..., GatewayProcess]]:
    """`attacked(max_pending_frames=8)`: a ready gateway process; one for all tests with the same options.

    It must end every test with nothing pending. `alone=True` starts one whose memory no other test has used.
    """
    stack, kept = kept_gateways
    with ExitStack() as own:
        used: list[GatewayProcess] = []

        def start(*, alone: bool = False, **options: Any) -> GatewayProcess:
            urls = {"inference_url": backend.url, "management_url": backend.url}
            key = repr(options)
            if alone:
                gateway = own.enter_context(gateway_process(**urls, **options))
            elif key in kept:
                gateway = kept[key]
            else:
                gateway = kept[key] = stack.enter_context(gateway_process(**urls, **options))
            eventually(lambda: get(gateway, "/health/ready").status_code == 200)
            used.append(gateway)
            return gateway

        yield start
        backend.release()
        for gateway in used:
            eventually(lambda gateway=gateway: pending(gateway) == (0, 0))  # type: ignore[misc]


@pytest.fixture
def long_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`long_answers(30_000_000)`: every frame is answered with so many bytes."""

    def lengthen(nbytes: int) -> None:
        answer = b'{"pad":"' + b"a" * nbytes + b'"}'
        monkeypatch.setattr(fake_torchserve, "answer_for", lambda frame, options: answer)

    return lengthen


def get(gateway: GatewayProcess, path: str) -> httpx.Response:
    return httpx.get(f"{gateway.url}{path}", trust_env=False, timeout=20, verify=NO_TLS)


def post(
    gateway: GatewayProcess, frame: bytes, *, source: str = "127.0.0.1", **request: Any
) -> httpx.Response:
    """Send one frame on a connection of its own, from an address of loopback."""
    transport = httpx.HTTPTransport(local_address=source, verify=NO_TLS)
    with httpx.Client(transport=transport, trust_env=False, timeout=20) as client:
        return client.post(f"{gateway.url}/predictions/second", content=frame, **request)


def pending(gateway: GatewayProcess) -> tuple[int, int]:
    """Frames and bytes that the gateway counts as pending, by its metrics."""
    text = get(gateway, "/metrics").text
    found = [re.search(rf"^mmdet3d_serve_pending_{name} (\S+)$", text, re.M) for name in ("frames", "bytes")]
    frames, nbytes = (int(float(each[1])) for each in found if each)
    return frames, nbytes


class Peak:
    """Largest resident size of a process since it was made, by its own samples; `grown` is against the start."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._first = self._most = gateway.resident_bytes()

    def sample(self) -> None:
        self._most = max(self._most, self._gateway.resident_bytes())

    @property
    def grown(self) -> int:
        self.sample()
        return self._most - self._first


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is entered here ends with the test; sockets by `closing`."""
    with ExitStack() as made:
        yield made


def keep_open(stack: ExitStack, connection: Any) -> Any:
    return stack.enter_context(closing(connection))
