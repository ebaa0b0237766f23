"""Fixtures: a gateway on a real port in front of a fake TorchServe."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest

from serve.gateway.admission import Admission
from serve.gateway.app import create_app
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.models import ModelRegistry
from serve.gateway.options import GatewayOptions
from tests.gateway.fake_torchserve import FakeTorchServe
from tests.gateway.running import Background, Listening, eventually

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # made once: a default context takes longer than most tests


@dataclass
class RunningGateway:
    """A gateway under test, seen from outside, and the two counts it must bring back to zero."""

    client: httpx.Client
    listening: Listening
    admission: Admission
    registry: ModelRegistry
    lifecycle: Lifecycle
    grpc_port: int | None = None

    @property
    def url(self) -> str:
        return self.listening.url

    def post(self, path: str = "/predictions/second", **request: Any) -> httpx.Response:
        return self.client.post(path, **request)

    def idle(self) -> bool:
        """Whether nothing is counted, waiting or running any more."""
        batchers = [model.batcher for model in self.registry.all() if model.batcher is not None]
        return not (
            self.admission.items
            or self.admission.bytes
            or sum(batcher.waiting + batcher.running for batcher in batchers)
        )


class FakeBackend:
    """`FakeTorchServe` on a port, which can go away and come back."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self.app = background.call(_made())
        self.listening: Listening | None = Listening(background, self.app)
        self.port = self.listening.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def hold(self, *frames: bytes) -> None:
        """Let calls wait (those with one of `frames` in them, if any are named) until `release`."""
        self.app.gated_frames = set(frames)
        self._background.soon(self.app.gate.clear)

    def let_pass(self) -> None:
        """Let the calls that wait now go on, and hold those that follow."""

        def pulse() -> None:
            self.app.gate.set()
            self.app.gate.clear()

        self._background.soon(pulse)

    def release(self) -> None:
        self._background.soon(self.app.gate.set)

    def go(self) -> None:
        if self.listening is not None:
            self.listening.close()
            self.listening = None

    def come_back(self) -> None:
        self.listening = Listening(self._background, self.app, self.port)


async def _made() -> FakeTorchServe:
    return FakeTorchServe()


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.stop()


@pytest.fixture
def backend(background: Background) -> Iterator[FakeBackend]:
    made = FakeBackend(background)
    yield made
    made.release()
    made.go()


@pytest.fixture
def torchserve(backend: FakeBackend) -> FakeTorchServe:
    return backend.app


@contextmanager
def running_gateway(background: Background, **options: Any) -> Iterator[RunningGateway]:
    """A gateway with these options; it must end with nothing pending."""
    lifecycle = Lifecycle()
    app: Any = background.call(_created(GatewayOptions(**options), lifecycle))
    listening = Listening(background, app)
    client = httpx.Client(base_url=listening.url, trust_env=False, timeout=20.0, verify=NO_TLS)
    inner = app
    while not hasattr(inner, "state"):
        inner = getattr(inner, "_app", None) or inner.app
    made = RunningGateway(client, listening, inner.state.admission, inner.state.registry, lifecycle)
    made.grpc_port = getattr(inner.state, "grpc_port", None)
    try:
        yield made
        eventually(made.idle)
    finally:
        client.close()
        listening.close()


@pytest.fixture
def start_gateway(background: Background, backend: FakeBackend) -> Iterator[Callable[..., RunningGateway]]:
    """`start_gateway(max_pending_frames=2)`: a gateway with these options, in front of the one of paper."""
    with ExitStack() as stack:

        def start(**options: Any) -> RunningGateway:
            urls = {"inference_url": backend.url, "management_url": backend.url}
            return stack.enter_context(running_gateway(background, **{**urls, **options}))

        yield start
        backend.release()


async def _created(options: GatewayOptions, lifecycle: Lifecycle) -> Any:
    return create_app(options, lifecycle)


@pytest.fixture
def gateway(start_gateway: Callable[..., RunningGateway]) -> RunningGateway:
    return start_gateway()


@pytest.fixture
def cloud() -> Callable[[int], bytes]:
    """`cloud(3)`: a frame of 16 points that is different for every number."""

    def make(number: int, points: int = 16) -> bytes:
        return np.random.default_rng(number).normal(size=(points, 4)).astype(np.float32).tobytes()

    return make
