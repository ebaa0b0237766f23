"""Runs the gateway: listen, serve, drain, end with 0.

SIGTERM or SIGINT: readiness says no; after `shutdown_delay_s` no connection is taken any more; requests in flight have
`graceful_timeout_s` to finish. A second signal ends at once. Knows uvicorn, and nothing of what is served.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from serve.gateway.app import create_app
from serve.gateway.http_protocol import make_protocol_class
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.listener import bind, url_of
from serve.gateway.options import GatewayOptions

__all__ = ["GatewayServer", "run"]

_LINGERING_CLOSE_S = 5.0

logger = logging.getLogger(__name__)


class GatewayServer(uvicorn.Server):
    """uvicorn with our end: signals drain, and the exit code is 0 when they did."""

    def __init__(
        self, app: ASGIApp, options: GatewayOptions, lifecycle: Lifecycle, listening: Callable[[str], None]
    ) -> None:
        """`listening` is told the address once connections are taken."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                # A body that is late is answered 408 first; what was answered before its end is dropped until then.
                http=make_protocol_class(
                    options.header_timeout_s,
                    options.body_timeout_s + _LINGERING_CLOSE_S,
                    options.max_requests_per_connection,
                ),
                timeout_keep_alive=max(1, round(options.keep_alive_s)),
                timeout_graceful_shutdown=max(1, round(options.graceful_timeout_s)),
                lifespan="on",
            )
        )
        self._options = options
        self._lifecycle = lifecycle
        self._listening = listening
        self._ending = asyncio.Event()
        self.dropped_requests = 0  # requests that were in flight when the time to finish them was up

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours: uvicorn's own would end the process by the signal itself, after a clean end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections, and say so."""
        await super().startup(sockets)
        if self.started and sockets:
            self._listening(url_of(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in flight, and count what was not."""
        tasks = set(self.server_state.tasks)
        await super().shutdown(sockets)
        self.dropped_requests = sum(not task.done() or task.cancelling() > 0 for task in tasks)

    async def main_loop(self) -> None:
        """Wait for the word to end; uvicorn's own looks for it ten times a second, which costs when idle."""
        await self.on_tick(0)
        await self._ending.wait()

    def _on_signal(self) -> None:
        if self._lifecycle.draining:
            self.force_exit = True
            self._stop()
            return
        logger.info("draining: %g s more for new requests, then %g s for those in flight",
                    self._options.shutdown_delay_s, self._options.graceful_timeout_s)  # fmt: skip
        self._lifecycle.drain()
        asyncio.get_running_loop().call_later(self._options.shutdown_delay_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True
        self._ending.set()


def run(
    options: GatewayOptions,
    *,
    listener: socket.socket | None = None,
    rejected: Mapping[str, str] | None = None,
    listening: Callable[[str], None] = lambda url: None,
) -> int:
    """Serve until a signal; returns the exit code, 0 when everything in flight was answered.

    Args:
        options: of the gateway.
        listener: bound socket to serve on; None binds the address of the options.
        rejected: archives that are not served, with the reason of each, for ``/models``.
        listening: called with the URL once connections are taken.

    Raises:
        SettingsError: an option cannot be honoured, or the address cannot be listened on.
    """
    lifecycle = Lifecycle()
    app = create_app(options, lifecycle, rejected)
    listener = listener or bind(options.host, options.port)
    server = GatewayServer(app, options, lifecycle, listening)
    with listener:
        server.run(sockets=[listener])
    if server.dropped_requests:
        logger.error("%d requests in flight were not answered", server.dropped_requests)
    return 0 if server.started and not server.dropped_requests else 1
