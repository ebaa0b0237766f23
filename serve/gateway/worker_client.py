"""Client of the workers' sockets: sends batches to TorchServe's workers without passing through TorchServe.

TorchServe starts, watches, scales and ends the workers; only the batches bypass it, because its Java threads pass each
of them on five times in both directions while the device waits (docs/decisions/0010-direct-sockets.md). With two
connections to a worker, the second batch is read and decoded while the first is computed. The messages are described
in `serve.protocol.worker`; the worker's end is `serve.worker.server`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

from serve.protocol.batch import Bytes
from serve.protocol.worker import (
    BATCH_HEADER,
    GREETING,
    LENGTH,
    MessageReader,
    ProtocolError,
    cancel_message,
    socket_path,
)

__all__ = ["ConnectionLost", "WorkerLost", "WorkerSockets"]

CONNECT_TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


class ConnectionLost(Exception):
    """The connection was closed, or broke the protocol, before the answer was complete."""


class WorkerLost(ConnectionLost):
    """The worker with process id `pid` closed the connection before it answered."""

    def __init__(self, pid: int, reason: str) -> None:
        super().__init__(reason)
        self.pid = pid


class WorkerSockets:
    """Persistent connections to workers; belongs to one event loop.

    Args:
        folder: folder of the sockets; only the owner of the workers may have access.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: dict[int, list[_Connection]] = {}
        self._busy: set[_Connection] = set()
        # Batches in flight by process id, including those that still connect.
        self._batches: Counter[int] = Counter()
        self._hung: set[int] = set()
        self._known: set[int] = set()

    def retain(self, pids: set[int]) -> None:
        """Close the connections to workers that are not among `pids`."""
        for pid in self._idle.keys() - pids:
            for connection in self._idle.pop(pid):
                connection.close()
        self._batches = Counter({pid: count for pid, count in self._batches.items() if count or pid in pids})
        self._hung &= pids
        self._known &= pids

    async def call(
        self,
        pids: Sequence[int],
        chunks: Sequence[Bytes],
        timeout_s: float,
        compute_s: int = 0,
        waiting: Sequence[asyncio.Future[Any]] = (),
    ) -> Bytes | None:
        """Send a batch to the worker with the fewest batches in flight.

        Args:
            pids: process ids of the workers.
            chunks: framed batch, in chunks.
            timeout_s: timeout of the answer, seconds.
            compute_s: whole seconds of decoding or computing after which the worker ends itself; 0 for no limit.
            waiting: for each frame a future that is done as soon as its outcome is not awaited any more; the worker
                then neither decodes nor computes the frame if it has not yet.

        Returns:
            Framed outcomes; None if the batch must go through TorchServe.

        Raises:
            WorkerLost: the worker died with the batch.
            TimeoutError: no answer within `timeout_s`. That worker gets no more batches here, so that TorchServe
                notices that it hangs and replaces it.
        """
        for pid in sorted(pids, key=self._batches.__getitem__):
            if pid in self._hung:
                continue
            self._batches[pid] += 1
            try:
                if (connection := await self._connection(pid)) is not None:
                    head = BATCH_HEADER.pack(sum(len(chunk) for chunk in chunks), compute_s)
                    return await self._send(pid, connection, [head, *chunks], timeout_s, waiting) or None
            finally:
                self._batches[pid] -= 1
        return None

    def close(self) -> None:
        """Close all connections; calls in flight end with `WorkerLost`."""
        for connection in [*self._busy, *chain.from_iterable(self._idle.values())]:
            connection.close()
        self._idle.clear()

    async def _send(
        self,
        pid: int,
        connection: _Connection,
        message: Sequence[Bytes],
        timeout_s: float,
        waiting: Sequence[asyncio.Future[Any]],
    ) -> Bytes:
        self._busy.add(connection)
        cancels: list[Callable[[asyncio.Future[Any]], None]] = []
        try:
            async with asyncio.timeout(timeout_s):
                answer = connection.call(message)
                cancels += [partial(connection.cancel, i, answer) for i in range(len(waiting))]
                for future, cancel in zip(waiting, cancels, strict=True):
                    future.add_done_callback(cancel)
                received = await answer
        except BaseException as error:
            connection.close()
            if isinstance(error, TimeoutError):
                self._hung.add(pid)
            if isinstance(error, ConnectionLost):
                raise WorkerLost(pid, str(error)) from None
            raise
        finally:
            self._busy.discard(connection)
            for future, cancel in zip(
                waiting, cancels, strict=False
            ):  # none, if the message could not be sent
                future.remove_done_callback(cancel)
        self._idle.setdefault(pid, []).append(connection)
        return received

    async def _connection(self, pid: int) -> _Connection | None:
        idle = self._idle.get(pid, [])
        while idle:
            if (connection := idle.pop()).open:
                return connection
        made = _Connection()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                path = str(socket_path(self._folder, pid))
                await asyncio.get_running_loop().create_unix_connection(lambda: made, path)
                await made.wait_for_hello()
        except (OSError, TimeoutError, ConnectionLost):
            # Not started yet, gone or in another container; or full or hung.
            made.close()
            return None
        except BaseException:
            made.close()
            raise
        if pid not in self._known:
            self._known.add(pid)
            logger.info("sending batches to the socket of worker %d", pid)
        return made


class _Connection(asyncio.Protocol):
    """One connection with one batch at a time."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Bytes] = asyncio.get_running_loop().create_future()
        self._reader = MessageReader(LENGTH)

    async def wait_for_hello(self) -> None:
        """Wait for the worker's hello."""
        if await self._answer != GREETING or not self.open:
            raise ConnectionLost("the worker speaks another version of the protocol")

    def call(self, message: Sequence[Bytes]) -> asyncio.Future[Bytes]:
        """Send one message; returns the future of its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        # The transport keeps references to chunks that the socket does not accept yet; nothing is joined.
        self._transport.writelines(message)
        return self._answer

    def cancel(self, index: int, answer: asyncio.Future[Bytes], future: asyncio.Future[Any]) -> None:
        """Tell the worker that frame `index` of the batch with this `answer` is not awaited any more.

        The call may have been scheduled before that batch was answered, and run when the next one is in progress.
        """
        if self.open and self._answer is answer and not answer.done():
            assert self._transport is not None
            self._transport.write(cancel_message(index))

    def close(self) -> None:
        """Close the connection at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass of it
        self.open = True

    def data_received(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                taken = min(len(rest), len(self._reader.buffer))
                self._reader.buffer[:taken] = rest[:taken]
                rest = rest[taken:]
                if (received := self._reader.advance(taken)) is None:
                    continue
                if self._answer.done() or rest:
                    raise ProtocolError("an answer without a batch")
                self._answer.set_result(received[1])
        except ProtocolError as error:
            self._end(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(str(error) if error else "closed by the worker")

    def _end(self, reason: str) -> None:
        self.close()
        if not self._answer.done():
            self._answer.set_exception(ConnectionLost(reason))
