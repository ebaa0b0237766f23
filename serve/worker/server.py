"""Socket server of a worker, the other end of `serve.gateway.worker_client`; protocol: `serve.protocol.worker`.

One thread per connection receives a batch, calls `respond` and sends what it returns; `respond` itself serializes what
must not run concurrently. If it raises, the server sends an empty answer, and the gateway repeats the batch through
TorchServe.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from serve.errors import ServeError
from serve.protocol.worker import (
    BATCH_HEADER,
    HELLO,
    LENGTH,
    MAX_BATCH_FRAMES,
    MessageReader,
    ProtocolError,
    socket_path,
)

__all__ = ["Cancelled", "CancelledFrames", "Respond", "listen"]

# Returns the positions of the frames of the batch in progress that need no outcome any more.
Cancelled = Callable[[], Collection[int]]
# Maps a framed batch, which is overwritten afterwards, its compute limit in seconds (0 for none) and its cancelled
# frames to framed outcomes.
Respond = Callable[[memoryview, int, Cancelled], bytes]

# A gateway opens one per batch in flight, mostly two; several gateways may share a worker.
_MAX_CONNECTIONS = 32
_RETRY_S = 0.1

logger = logging.getLogger(__name__)


def listen(folder: Path, respond: Respond) -> socket.socket:
    """Listen for batches until the process ends; returns the socket, which may be closed to stop earlier.

    Args:
        folder: folder of the socket; only this user may have access, because there is no authentication.
        respond: answers a batch; called from several threads.

    Raises:
        OSError: the folder does not exist, or the path is too long for a socket.
    """
    path = socket_path(folder, os.getpid())
    path.unlink(missing_ok=True)  # left by a process with the same id
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_MAX_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    threading.Thread(target=_accept, args=(listener, respond), name="worker-socket", daemon=True).start()
    return listener


def _accept(listener: socket.socket, respond: Respond) -> None:
    free_slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if listener.fileno() < 0:
                return  # closed
            logger.warning("cannot accept a connection of the gateway: %s", error)  # no free file descriptor
            time.sleep(_RETRY_S)
            continue
        if not free_slots.acquire(blocking=False):
            connection.close()  # without a hello: the batch goes through TorchServe
            continue
        threading.Thread(
            target=_serve, args=(connection, respond, free_slots), name="worker-connection", daemon=True
        ).start()


def _serve(connection: socket.socket, respond: Respond, free_slots: threading.BoundedSemaphore) -> None:
    """Answer batches one after another until the gateway disconnects."""
    try:
        with connection:
            connection.sendall(HELLO)
            reader = MessageReader(BATCH_HEADER, reuse=True)
            while (received := _receive(connection, reader)) is not None:
                (length, compute_s), body = received
                if not length:
                    continue  # a frame of a batch that is answered already was cancelled
                cancelled = CancelledFrames(connection)
                answer = _answer(respond, body, compute_s, cancelled)
                if cancelled.is_disconnected():
                    return
                connection.sendall(LENGTH.pack(len(answer)) + answer)  # one send, one wake-up of the gateway
    except (OSError, ProtocolError):
        pass  # disconnected, or not a gateway of this version
    finally:
        free_slots.release()


def _answer(respond: Respond, body: memoryview, compute_s: int, cancelled: Cancelled) -> bytes:
    try:
        return respond(body, compute_s, cancelled)
    except ServeError as error:
        logger.info("cannot answer a batch, leaving it to TorchServe: %s", error)
    except Exception:
        logger.warning("cannot answer a batch, leaving it to TorchServe", exc_info=True)
    return b""


def _receive(connection: socket.socket, reader: MessageReader) -> tuple[tuple[int, ...], memoryview] | None:
    """Receive one message; None at the end of the connection."""
    while received := connection.recv_into(reader.buffer, 0, socket.MSG_WAITALL):
        if (message := reader.advance(received)) is not None:
            return message
    return None


class CancelledFrames:
    """Positions of the cancelled frames of the batch in progress; of all frames once the gateway has disconnected."""

    # Between two looks at the socket: a system call for each of many small frames would cost more than it saves.
    interval_s = 0.001

    def __init__(self, connection: socket.socket) -> None:
        self._looked_at = time.monotonic()
        self._connection = connection
        self._disconnected = False
        self._reader = MessageReader(BATCH_HEADER, max_bytes=0)
        self._positions: set[int] = set()

    def __call__(self) -> Collection[int]:
        """Read what has arrived, without waiting; once per `interval_s`."""
        now = time.monotonic()
        if now - self._looked_at >= self.interval_s:
            self._looked_at = now
            with suppress(BlockingIOError):
                while not self._disconnected:
                    self._read(socket.MSG_DONTWAIT)
        return range(MAX_BATCH_FRAMES) if self._disconnected else self._positions

    def is_disconnected(self) -> bool:
        """Read the rest of a message that has begun; return whether the gateway has disconnected."""
        while not self._disconnected and len(self._reader.buffer) < BATCH_HEADER.size:
            self._read(socket.MSG_WAITALL)
        return self._disconnected

    def _read(self, flags: int) -> None:
        try:
            received = self._connection.recv_into(self._reader.buffer, 0, flags)
            if received and (message := self._reader.advance(received)) is not None:
                self._positions.add(message[0][1])
            self._disconnected = not received
        except BlockingIOError:
            raise
        except (OSError, ProtocolError):  # or a batch before the answer to this one
            self._disconnected = True
