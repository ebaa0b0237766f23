"""Several gateway processes on one port, in front of one set of workers.

This process binds the port and starts the others, each with a socket of its own on the same port (SO_REUSEPORT): the
kernel spreads connections over them evenly, and no process hands requests to another. One that ends is started again;
a signal is passed on to all. Limits in total are divided among them. They do not batch together: each has its own
queue per model, so that two batches are on their way where one would be, and a worker takes them in turn.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from serve.gateway.listener import bind, url_of
from serve.gateway.options import GatewayOptions
from serve.settings.environment import child_environment, die_with_parent

__all__ = ["run_processes"]

_START_S = 60.0
# Pause before a process is started again; doubles while processes end within `_STABLE_S`.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STABLE_S = 0.2, 10.0, 30.0

logger = logging.getLogger(__name__)


def run_processes(
    options: GatewayOptions,
    *,
    listener: socket.socket | None = None,
    rejected: Mapping[str, str] | None = None,
    on_listening: Callable[[str], None] = lambda url: None,
) -> int:
    """Serve with `options.gateways` processes until a signal; returns 0 if each answered all that was in flight.

    Args:
        options: options of the gateway.
        listener: bound socket, from `bind(…, shared=True)`; None binds the address in the options.
        rejected: archives that are not served and the reasons, for ``/models``.
        on_listening: called with the URL once all processes accept connections.

    Raises:
        SettingsError: the address is not available.
    """
    with ExitStack() as stack:
        bound = stack.enter_context(listener or bind(options.host, options.port, shared=True))
        host, port = bound.getsockname()[:2]
        options = replace(options, host=host, port=port)
        if options.grpc_port is not None:
            reserved = stack.enter_context(bind(host, options.grpc_port, shared=True, flag="--grpc-port"))
            options = replace(options, grpc_port=reserved.getsockname()[1])
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-gateways-") as folder:
            document = {
                "options": _share(options).dump(),
                "rejected": dict(rejected or {}),
                "siblings": folder,
            }
            group = _Group(document, options.gateways)
            return asyncio.run(group.run(lambda: on_listening(url_of(bound))))


def _share(options: GatewayOptions) -> GatewayOptions:
    """Return the options of one process: its share of the limits in total, at least what one request may take."""
    count = options.gateways
    return replace(
        options,
        gateways=1,
        max_pending_frames=max(options.max_pending_frames // count, options.max_frames_per_request),
        max_pending_bytes=max(options.max_pending_bytes // count, options.max_body_bytes),
        max_connections=max(options.max_connections // count, 1),
        max_grpc_streams=max(options.max_grpc_streams // count, 1),
        shadow_frames=max(options.shadow_frames // count, 1),
        shadow_bytes=max(options.shadow_bytes // count, 1),
        sample_per_minute=max(options.sample_per_minute // count, 1),
    )


class _Group:
    """The processes, and their restarts."""

    def __init__(self, document: Mapping[str, Any], count: int) -> None:
        self._document = document
        self._count = count
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._signals = 0

    async def run(self, on_listening: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        # All of them start at once; the first start of each must succeed.
        started = await asyncio.gather(*(self._start(index) for index in range(self._count)))
        if all(started):
            on_listening()
        elif not self._stopping.is_set():
            logger.error("a gateway process did not start; stopping the others")
            self._on_signal()
        codes = await asyncio.gather(*(self._keep(index) for index in range(self._count)))
        return max(codes)

    def _on_signal(self) -> None:
        """Pass SIGTERM on: the first drains the processes, the second stops them at once."""
        self._stopping.set()
        for process in self._running.values():
            # Not by `send_signal`, which would reap a process that has ended, and leave its exit code unknown.
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    async def _keep(self, index: int) -> int:
        """Start a process again whenever it ends, until the group stops; returns its exit code as a shell's."""
        pause_s, began = _FIRST_PAUSE_S, time.monotonic()
        while True:
            process = self._running[index]
            code = await process.wait()
            if self._stopping.is_set():
                return 128 - code if code < 0 else code
            pause_s = _FIRST_PAUSE_S if time.monotonic() - began > _STABLE_S else pause_s
            logger.error("gateway process %d ended with code %d; starting it again", process.pid, code)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
                return 1
            pause_s, began = min(2 * pause_s, _LONGEST_PAUSE_S), time.monotonic()
            await self._start(index)

    async def _start(self, index: int) -> bool:
        """Start one process; returns whether it accepts connections."""
        self._running[index] = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serve.cli.gateway"),
            env=child_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes from this process, once
            preexec_fn=die_with_parent,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({**self._document, "index": index}).encode())
        with suppress(ConnectionError):
            await process.stdin.drain()
        process.stdin.close()
        if self._stopping.is_set():  # the signal came before the process was known
            process.terminate()
        with suppress(TimeoutError):
            return bool(await asyncio.wait_for(process.stdout.readline(), _START_S))
        process.kill()
        return False
