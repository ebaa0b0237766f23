"""What Linux knows of a connection beyond asyncio's transports: its state, what was taken, what may lie unsent.

On other systems the functions do nothing and know nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from typing import Any

__all__ = ["CLOSE", "CLOSE_WAIT", "Begun", "acked_bytes", "limit_unsent", "reset", "state"]

CLOSE, CLOSE_WAIT = 7, 8  # states of a connection that was reset, or that the client has ended
_ACKED = struct.Struct("=Q")
_ACKED_AT = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info
_TCP_NOTSENT_LOWAT = 25  # Linux; Python names it from 3.12 on


class Begun:
    """Transport of an answer whose first byte is sent already."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._begun = True
        transport.write(b"H")  # of HTTP/1.1

    def write(self, data: bytes) -> None:
        """Write all of it but the byte that was sent."""
        if self._begun:
            self._begun, data = False, data[1:]
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def state(transport: asyncio.Transport) -> int | None:
    """Return the state of a connection, as in Linux's ``tcp_states.h``; None if it is unknown."""
    info = _tcp_info(transport)
    return info[0] if info else None


def acked_bytes(transport: asyncio.Transport) -> int | None:
    """Return the number of bytes that the peer's system has taken; None if it is unknown."""
    acked = _tcp_info(transport)[_ACKED_AT : _ACKED_AT + _ACKED.size]
    return int(_ACKED.unpack(acked)[0]) if len(acked) == _ACKED.size else None


def limit_unsent(transport: asyncio.Transport, nbytes: int) -> None:
    """Bound the bytes that the system holds unsent beside what is under way."""
    _set_option(transport, socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, nbytes)


def reset(transport: asyncio.Transport) -> None:
    """Reset a connection, so that the system drops what it holds for it as well."""
    _set_option(transport, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _set_option(transport: asyncio.Transport, level: int, name: int, value: int | bytes) -> None:
    """Set a socket option where the system has it."""
    connection = transport.get_extra_info("socket")
    if sys.platform == "linux" and connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(level, name, value)


def _tcp_info(transport: asyncio.Transport) -> bytes:
    """Return Linux's struct tcp_info of a connection; empty where there is none."""
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None:
        return b""
    try:
        return bytes(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size))
    except OSError:
        return b""
