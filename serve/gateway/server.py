"""Gateway server: listen, serve, drain, exit with 0.

On SIGTERM or SIGINT readiness fails; after `shutdown_delay_s` the server stops accepting connections; requests in
flight then have `graceful_timeout_s` to finish. A second signal stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import uvicorn
from starlette.types import ASGIApp

from serve.gateway.app import create_app
from serve.gateway.http_protocol import ConnectionLimits, make_protocol_class
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.listener import bind, url_of
from serve.gateway.options import GatewayOptions
from serve.gateway.siblings import Siblings

__all__ = ["GatewayServer", "run"]

_LINGERING_CLOSE_S = 5.0
_M_MMAP_THRESHOLD = -3  # glibc's <malloc.h>
_LARGEST_KEPT_BYTES = 8 << 20

logger = logging.getLogger(__name__)


class GatewayServer(uvicorn.Server):
    """uvicorn server that drains on signals and then exits with 0."""

    def __init__(
        self, app: ASGIApp, options: GatewayOptions, lifecycle: Lifecycle, on_listening: Callable[[str], None]
    ) -> None:
        """Call `on_listening` with the address once the server accepts connections."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                # Longer than the body timeout, so that a late body is answered 408 before its connection is closed.
                http=make_protocol_class(
                    ConnectionLimits(
                        header_timeout_s=options.header_timeout_s,
                        request_timeout_s=options.body_timeout_s + _LINGERING_CLOSE_S,
                        stall_timeout_s=options.client_stall_timeout_s,
                        bytes_per_s=options.client_bytes_per_s,
                        max_requests=options.max_requests_per_connection,
                        max_connections=options.max_connections,
                        client_share=options.client_share,
                    )
                ),
                ws="none",  # an upgraded connection would have none of these limits
                proxy_headers=bool(options.trusted_proxies),
                forwarded_allow_ips=list(options.trusted_proxies),
                timeout_keep_alive=max(1, round(options.keep_alive_s)),
                timeout_graceful_shutdown=max(1, round(options.graceful_timeout_s)),
                lifespan="on",
            )
        )
        self._options = options
        self._lifecycle = lifecycle
        self._on_listening = on_listening
        self._ending = asyncio.Event()
        self.dropped_requests = 0  # still in flight at the end of the graceful timeout

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install the signal handlers; uvicorn's own re-raise the signal after a clean exit."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting connections, and report the address."""
        await super().startup(sockets)
        if self.started and sockets:
            self._on_listening(url_of(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in flight, and count those that were dropped."""
        tasks = set(self.server_state.tasks)
        await super().shutdown(sockets)
        self.dropped_requests = sum(not task.done() or task.cancelling() > 0 for task in tasks)

    async def main_loop(self) -> None:
        """Wait for shutdown without polling (uvicorn polls at 10 Hz)."""
        await self.on_tick(0)
        await self._ending.wait()

    def _on_signal(self) -> None:
        if self._lifecycle.draining:
            self.force_exit = True
            self._stop()
            return
        logger.info("draining: accepting requests for %g s, then %g s for those in flight",
                    self._options.shutdown_delay_s, self._options.graceful_timeout_s)  # fmt: skip
        self._lifecycle.drain()
        asyncio.get_running_loop().call_later(self._options.shutdown_delay_s, self._stop)

    def _stop(self) -> None:
        self._lifecycle.stop()
        self.should_exit = True
        self._ending.set()


def _return_large_blocks() -> None:
    """Make glibc return freed blocks of a large body to the system at once.

    By default it learns to keep them, up to 64 MB a time, so that a few long answers stay in the resident size.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)


def run(
    options: GatewayOptions,
    *,
    listener: socket.socket | None = None,
    rejected: Mapping[str, str] | None = None,
    siblings: Siblings | None = None,
    on_listening: Callable[[str], None] = lambda url: None,
) -> int:
    """Serve until a signal; returns the exit code, 0 if every request in flight was answered.

    Args:
        options: options of the gateway.
        listener: bound socket; None binds the address in the options.
        rejected: archives that are not served and the reasons, for ``/models``.
        siblings: the other processes of the port, if this is one of several.
        on_listening: called with the URL once the server accepts connections.

    Raises:
        SettingsError: an option needs a file or package that is missing, or the address is not available.
    """
    _return_large_blocks()
    lifecycle = Lifecycle()
    app = create_app(options, lifecycle, rejected, siblings)
    listeners = [listener or bind(options.host, options.port, shared=siblings is not None)]
    if siblings is not None:
        listeners.append(siblings.listen())
    elif options.grpc_port is not None:
        # gRPC binds its port itself, later, and gives no reason if it cannot.
        bind(options.host, options.grpc_port, flag="--grpc-port").close()
    server = GatewayServer(app, options, lifecycle, on_listening)
    with ExitStack() as stack:
        for each in listeners:
            stack.enter_context(each)
        server.run(sockets=listeners)
    if server.dropped_requests:
        logger.error("%d requests in flight were not answered", server.dropped_requests)
    return 0 if server.started and not server.dropped_requests else 1
