"""Answers that a client does not read: a connection that stalls is reset."""

from __future__ import annotations

import asyncio

from serve.gateway import tcp

__all__ = ["UnreadAnswer"]


class UnreadAnswer:
    """Watch over what one connection has still to write.

    Args:
        transport: of the connection.
        stall_timeout_s: seconds in which the answer must move by `bytes_per_s`, else the connection is reset.
        bytes_per_s: least rate at which a client reads.
    """

    def __init__(self, transport: asyncio.Transport, stall_timeout_s: float, bytes_per_s: int) -> None:
        self._transport = transport
        self._stall_timeout_s = stall_timeout_s
        self._bytes_per_s = bytes_per_s
        self._timer: asyncio.TimerHandle | None = None
        self._progress = 0

    def watch(self) -> None:
        """Watch from now on, if anything is left to write."""
        if self._timer is None and self._transport.get_write_buffer_size():
            self._progress = self._read_progress()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._stall_timeout_s, self._check)

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._read_progress() - self._progress < self._bytes_per_s * self._stall_timeout_s:
            tcp.reset(self._transport)
        else:
            self.watch()

    def _read_progress(self) -> int:
        """Bytes that the client's system has taken; where that is unknown, those that have left this process."""
        acked = tcp.acked_bytes(self._transport)
        return -self._transport.get_write_buffer_size() if acked is None else acked
