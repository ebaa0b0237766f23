"""Bounds on the messages that arrive at a time.

gRPC hands out a message when all of it is there, so its bytes cannot be counted as they come. Instead, so many are
read at a time as the limit of pending bytes could hold if each were as long as a message may be; the others wait in
their connections, by HTTP/2's flow control.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from serve.errors import Overloaded

__all__ = ["MAX_CALLS_PER_CONNECTION", "OpenStreams", "ReadingSlots"]

MAX_CALLS_PER_CONNECTION = 128


class ReadingSlots:
    """Slots for messages that arrive, of which one client may hold a share."""

    def __init__(self, slots: int, client_share: float) -> None:
        """Create `slots` slots; one client may hold the share `client_share` of them."""
        self._all = asyncio.Semaphore(slots)
        self._client_slots = math.ceil(slots * client_share)
        self._of_clients: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def hold(self, client: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it."""
        own = self._of_clients.get(client)
        if own is None:
            own = self._of_clients[client] = asyncio.Semaphore(self._client_slots)
        async with own, self._all:
            yield


class OpenStreams:
    """Number of open streams, in total and per client."""

    def __init__(self, limit: int, client_share: float) -> None:
        """Allow `limit` streams at a time, and one client the share `client_share` of them."""
        self._limit = limit
        self._client_limit = math.ceil(limit * client_share)
        self._of_clients: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Number of open streams."""
        return sum(self._of_clients.values())

    def open(self, client: str) -> None:
        """Count one stream more.

        Raises:
            Overloaded: there are too many.
        """
        own = self._of_clients.get(client, 0)
        if self.count >= self._limit or own >= self._client_limit:
            raise Overloaded(
                f"{self.count} streams are open, {own} of them by this client; the limits are {self._limit} and "
                f"{self._client_limit}; retry later"
            )
        self._of_clients[client] = own + 1

    def close(self, client: str) -> None:
        """Count one stream less."""
        self._of_clients[client] -= 1
        if not self._of_clients[client]:
            del self._of_clients[client]
