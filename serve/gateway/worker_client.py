"""A batch to a worker without a detour: a Unix socket that every worker of TorchServe listens on beside TorchServe's.

TorchServe starts, watches, scales and ends the workers; what goes past it is the batches themselves, which its Java
threads would hand to each other five times each way while the device waits (docs/decisions/0010-direct-sockets.md).
Two connections to a worker are two batches: the second is read and decoded while the first is computed.

A worker that takes a connection greets it; one that does not has no room, or hangs. A batch is its length (uint64,
little-endian), the seconds for which the worker may compute it before it ends itself (uint32; 0: any number;
`serve.worker.watchdog`), and so many bytes: frames (`serve.protocol.batch`). An answer is its length and outcomes; one of no
bytes says that the worker could not do it, and TorchServe is asked, which has a word for every failure.
Knows process ids and bytes, and nothing of models; `serve.worker.server` is the worker's end.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import cast

from serve.gateway.http_pool import BrokenOff
from serve.protocol.batch import Bytes

__all__ = ["BATCH", "GREETING", "LENGTH", "LONGEST_BYTES", "LostWithBatch", "WorkerSockets", "socket_path"]

BATCH = struct.Struct("<QI")  # bytes, seconds
LENGTH = struct.Struct("<Q")
GREETING = LENGTH.pack(0)  # an answer to nothing
LONGEST_BYTES = (1 << 31) - 1  # what TorchServe itself takes at the most
CONNECT_S = 1.0

logger = logging.getLogger(__name__)


class LostWithBatch(BrokenOff):
    """The worker with the process id `pid` hung up before it had answered."""

    def __init__(self, pid: int, reason: str) -> None:
        super().__init__(reason)
        self.pid = pid


def socket_path(folder: Path, pid: int) -> Path:
    """Where the worker with this process id listens."""
    return folder / f"{pid}.sock"


class WorkerSockets:
    """Connections to workers, kept open; belongs to one event loop.

    Args:
        folder: where the sockets are; it must be the workers' owner's alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: dict[int, list[_Connection]] = {}
        self._busy: set[_Connection] = set()
        # Under way, by process id; those too for which a connection is being made.
        self._batches: Counter[int] = Counter()
        self._hung: set[int] = set()
        self._met: set[int] = set()

    def follow(self, pids: set[int]) -> None:
        """Hang up on workers that are not among `pids`: they are gone."""
        for pid in self._idle.keys() - pids:
            for connection in self._idle.pop(pid):
                connection.close()
        self._batches = Counter({pid: count for pid, count in self._batches.items() if count or pid in pids})
        self._hung &= pids
        self._met &= pids

    async def ask(
        self, pids: Sequence[int], chunks: Sequence[Bytes], timeout_s: float, compute_s: int = 0
    ) -> bytes | None:
        """The answer of that one of the workers `pids` that has least to do; None where TorchServe is to be asked.

        Args:
            pids: process ids.
            chunks: the batch, in the pieces it is in.
            timeout_s: seconds to wait for the answer.
            compute_s: whole seconds after which the worker shall end itself if it still computes; 0: none.

        Raises:
            LostWithBatch: the worker went away with the batch.
            TimeoutError: no answer within `timeout_s`. That worker gets no more batches this way, so that TorchServe
                sees for itself that it hangs, and replaces it.
        """
        for pid in sorted(pids, key=self._batches.__getitem__):
            if pid in self._hung:
                continue
            self._batches[pid] += 1
            try:
                if (connection := await self._connection(pid)) is not None:
                    head = BATCH.pack(sum(len(chunk) for chunk in chunks), compute_s)
                    return await self._call(pid, connection, [head, *chunks], timeout_s) or None
            finally:
                self._batches[pid] -= 1
        return None

    def close(self) -> None:
        """Hang up; calls under way end with `LostWithBatch`."""
        for connection in [*self._busy, *chain.from_iterable(self._idle.values())]:
            connection.close()
        self._idle.clear()

    async def _call(
        self, pid: int, connection: _Connection, message: Sequence[Bytes], timeout_s: float
    ) -> bytes:
        self._busy.add(connection)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await connection.ask(message)
        except BaseException as error:
            connection.close()
            if isinstance(error, TimeoutError):
                self._hung.add(pid)
            if isinstance(error, BrokenOff):
                raise LostWithBatch(pid, str(error)) from None
            raise
        finally:
            self._busy.discard(connection)
        self._idle.setdefault(pid, []).append(connection)
        return answer

    async def _connection(self, pid: int) -> _Connection | None:
        idle = self._idle.get(pid, [])
        while idle:
            if (connection := idle.pop()).open:
                return connection
        made = _Connection()
        try:
            async with asyncio.timeout(CONNECT_S):
                path = str(socket_path(self._folder, pid))
                await asyncio.get_running_loop().create_unix_connection(lambda: made, path)
                await made.greeted()
        except (OSError, TimeoutError, BrokenOff):
            # Not there yet, not any more, or in another container; no room, or it hangs.
            made.close()
            return None
        except BaseException:
            made.close()
            raise
        if pid not in self._met:
            self._met.add(pid)
            logger.info("worker %d takes batches directly", pid)
        return made


class _Connection(asyncio.Protocol):
    """One connection, one batch at a time."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._received = bytearray()

    async def greeted(self) -> None:
        """Wait for the worker's greeting."""
        if await self._answer or not self.open:
            raise BrokenOff("the worker does not greet")

    async def ask(self, message: Sequence[Bytes]) -> bytes:
        """Send one message, in pieces, and wait for its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        # What the socket does not take now is kept by reference until it does: nothing is joined here.
        self._transport.writelines(message)
        return await self._answer

    def close(self) -> None:
        """Hang up at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it
        self.open = True

    def data_received(self, data: bytes) -> None:
        if self._answer.done():
            self.close()  # nothing was asked
            return
        self._received += data
        if len(self._received) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(self._received)
        if length > LONGEST_BYTES or len(self._received) > LENGTH.size + length:
            self._end("the worker's answer has an impossible length")
        elif len(self._received) == LENGTH.size + length:
            answer = bytes(memoryview(self._received)[LENGTH.size :])
            self._received = bytearray()
            self._answer.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(str(error) if error else "closed by the worker")

    def _end(self, reason: str) -> None:
        self.close()
        if not self._answer.done():
            self._answer.set_exception(BrokenOff(reason))
