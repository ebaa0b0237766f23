"""uvicorn on an event loop in a thread: real sockets for black-box tests."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn

T = TypeVar("T")


class Background:
    """An event loop that turns in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        async def run() -> None:
            function(*arguments)

        self.call(run())

    def stop(self) -> None:
        async def left() -> list[str]:
            await asyncio.sleep(0)
            return [str(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

        found = self.call(left())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        assert not found, found


class Listening:
    """An ASGI application on a port of 127.0.0.1, served by uvicorn (`config`) until it is closed."""

    def __init__(self, background: Background, app: Any, port: int = 0, **config: Any) -> None:
        self._background = background
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        plain = {
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "timeout_graceful_shutdown": 1,
        }
        self._server = uvicorn.Server(uvicorn.Config(app, **plain, **config))
        background.call(self._start())

    async def _start(self) -> None:
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[self._listener])

    def close(self) -> None:
        """End it; connections that are open are cut."""
        self._background.call(self._end())

    async def _end(self) -> None:
        for server in self._server.servers:
            server.close()
        self._listener.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for task in list(self._server.server_state.tasks):
            task.cancel()
        while self._server.server_state.tasks:
            await asyncio.sleep(0)
        await self._server.lifespan.shutdown()


def eventually(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """Wait until `condition` holds; fails with what it last gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not come to hold within {timeout_s} s: {found!r}"
        time.sleep(0.005)
    return found
