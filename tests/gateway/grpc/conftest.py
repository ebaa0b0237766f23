"""A gateway with a gRPC port, and Triton's client for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.gateway.conftest import RunningGateway

grpc = pytest.importorskip("grpc", reason="needs the extra grpc")
triton = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")


@pytest.fixture
def start_grpc(start_gateway: Callable[..., RunningGateway]) -> Iterator[Callable[..., Any]]:
    """`start_grpc(max_pending_frames=2)`: Triton's client, with the gateway and a plain channel to it."""
    with ExitStack() as stack:

        def start(**options: Any) -> Any:
            gateway = start_gateway(grpc_port=0, **options)
            address = f"127.0.0.1:{gateway.grpc_port}"
            client = stack.enter_context(triton.InferenceServerClient(address))
            client.gateway = gateway
            client.channel = stack.enter_context(grpc.insecure_channel(address))
            return client

        yield start


@pytest.fixture
def client(start_grpc: Callable[..., Any]) -> Any:
    return start_grpc()
