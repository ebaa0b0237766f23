"""A batch to a worker without a detour: a Unix socket that every worker of TorchServe listens on beside TorchServe's.

TorchServe starts, watches, scales and ends the workers; what goes past it is the batches themselves, which its Java
threads would hand to each other five times each way while the device waits (docs/decisions/0010-direct-sockets.md).
Two connections to a worker are two batches: the second is read and decoded while the first is computed.

A message is its length (uint64, little-endian) and so many bytes: frames there, outcomes back (`serve.framing`). An
answer of no bytes says that the worker could not do it; TorchServe is then asked, which has a word for every failure.
Knows process ids and bytes, and nothing of models; `handlers.direct_socket` is the worker's end.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from serve.connection import BrokenOff
from serve.framing import Bytes

__all__ = ["LENGTH", "LONGEST_BYTES", "LostWithBatch", "WorkerSockets", "socket_path"]

LENGTH = struct.Struct("<Q")
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
        self._busy: dict[int, set[_Connection]] = {}
        self._hung: set[int] = set()
        self._met: set[int] = set()

    def follow(self, pids: set[int]) -> None:
        """Hang up on workers that are not among `pids`: they are gone."""
        for pid in self._idle.keys() - pids:
            for connection in self._idle.pop(pid):
                connection.close()
        self._hung &= pids
        self._met &= pids

    async def ask(self, pids: Sequence[int], chunks: Sequence[Bytes], timeout_s: float) -> bytes | None:
        """The answer of that one of the workers `pids` that has least to do; None where TorchServe is to be asked.

        Raises:
            LostWithBatch: the worker went away with the batch.
            TimeoutError: no answer within `timeout_s`. That worker gets no more batches this way, so that TorchServe
                sees for itself that it hangs, and replaces it.
        """
        for pid in sorted(pids, key=lambda pid: len(self._busy.get(pid, ()))):
            if pid not in self._hung and (connection := await self._connection(pid)) is not None:
                return await self._call(pid, connection, chunks, timeout_s) or None
        return None

    def close(self) -> None:
        """Hang up; calls under way end with `LostWithBatch`."""
        for connections in (*self._idle.values(), *self._busy.values()):
            for connection in [*connections]:
                connection.close()
        self._idle.clear()

    async def _call(
        self, pid: int, connection: _Connection, chunks: Sequence[Bytes], timeout_s: float
    ) -> bytes:
        busy = self._busy.setdefault(pid, set())
        busy.add(connection)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await connection.ask(chunks)
        except BaseException as error:
            connection.close()
            if isinstance(error, TimeoutError):
                self._hung.add(pid)
            if isinstance(error, BrokenOff):
                raise LostWithBatch(pid, str(error)) from None
            raise
        finally:
            busy.discard(connection)
            if not busy:
                self._busy.pop(pid, None)
        self._idle.setdefault(pid, []).append(connection)
        return answer

    async def _connection(self, pid: int) -> _Connection | None:
        idle = self._idle.get(pid, [])
        while idle:
            if (connection := idle.pop()).open:
                return connection
        path = socket_path(self._folder, pid)
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await asyncio.get_running_loop().create_unix_connection(_Connection, str(path))
        except (OSError, TimeoutError):  # not there yet, not there any more, or in another container
            return None
        if not made.open:  # it hung up at once
            return None
        if pid not in self._met:
            self._met.add(pid)
            logger.info("worker %d takes batches directly", pid)
        return made


class _Connection(asyncio.Protocol):
    """One connection, one batch at a time."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._received = bytearray()

    async def ask(self, chunks: Sequence[Bytes]) -> bytes:
        """Send one message and wait for its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        # What the socket does not take now is kept by reference until it does: nothing is joined here.
        self._transport.writelines([LENGTH.pack(sum(len(chunk) for chunk in chunks)), *chunks])
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
        if self._answer is None or self._answer.done():
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
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BrokenOff(reason))
