"""gRPC server of the gateway, in the event loop of the application: limits of connections, start and drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from serve.errors import SettingsError
from serve.gateway.grpc.reading import MAX_CALLS_PER_CONNECTION
from serve.gateway.grpc.service import Service
from serve.gateway.grpc.wire import MAX_HEADER_BYTES
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.metrics import Metrics
from serve.gateway.options import GatewayOptions

__all__ = ["listen"]

# Calls without frames, beside the pending frames, the streams and the watches of health.
_OTHER_CALLS = 64
_IDENTITY_ONLY = 1  # of grpc_compression_algorithm: a compressed message could unfold to any size

logger = logging.getLogger(__name__)


@asynccontextmanager
async def listen(
    app: ASGIApp, options: GatewayOptions, lifecycle: Lifecycle, metrics: Metrics, *, shared: bool = False
) -> AsyncIterator[int]:
    """Serve `app` over gRPC on `options.grpc_port` within the block, which is given the port.

    When `lifecycle` stops, no further call is accepted, streams end after the requests they have sent, and what is in
    flight has `graceful_timeout_s` to finish.

    Args:
        app: the application.
        options: options of the gateway.
        lifecycle: says when to stop.
        metrics: counts calls and streams.
        shared: let other gateway processes listen on the port as well.

    Raises:
        SettingsError: the port is not available.
    """
    if options.trusted_proxies:
        app = ProxyHeadersMiddleware(app, trusted_hosts=list(options.trusted_proxies))  # type: ignore[arg-type,assignment]
    message_bytes = options.max_body_bytes + MAX_HEADER_BYTES
    service = Service(app, options, lifecycle, metrics, message_bytes)
    server = grpc.aio.server(
        options=_channel_options(options, message_bytes, shared),
        maximum_concurrent_rpcs=options.max_pending_frames + 2 * options.max_grpc_streams + _OTHER_CALLS,
    )
    server.add_generic_rpc_handlers(service.handlers())
    host = f"[{options.host}]" if ":" in options.host else options.host
    try:
        port = server.add_insecure_port(f"{host}:{options.grpc_port}")
    except RuntimeError:
        raise SettingsError(
            f"cannot listen on {options.host} port {options.grpc_port}; end what uses it, or choose another with "
            "--grpc-port"
        ) from None
    await server.start()
    logger.info("gRPC at %s:%d", host, port)
    stopping = asyncio.create_task(_stop(server, options, lifecycle))
    try:
        yield port
    finally:
        lifecycle.stop()
        await stopping


async def _stop(server: grpc.aio.Server, options: GatewayOptions, lifecycle: Lifecycle) -> None:
    await lifecycle.stopping.wait()
    await server.stop(options.graceful_timeout_s)


def _channel_options(options: GatewayOptions, message_bytes: int, shared: bool) -> list[tuple[str, int]]:
    """Return the arguments of grpc_arg_keys.h, the limits of HTTP where there is one of the kind."""

    def milliseconds(seconds: float) -> int:
        return max(1, round(seconds * 1000))

    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        ("grpc.max_connection_idle_ms", milliseconds(options.keep_alive_s)),
        # A client that is gone without a word is found by pings that it does not answer.
        ("grpc.keepalive_time_ms", milliseconds(options.client_stall_timeout_s)),
        ("grpc.keepalive_timeout_ms", milliseconds(options.client_stall_timeout_s)),
        ("grpc.http2.min_ping_interval_without_data_ms", milliseconds(options.client_stall_timeout_s)),
        ("grpc.so_reuseport", int(shared)),
    ]
