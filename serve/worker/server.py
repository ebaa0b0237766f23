"""The worker's end of `serve.gateway.worker_client`: a Unix socket on which batches come that do not go through TorchServe.

Every connection has a thread that reads a batch, has it answered and sends the answer; what may run only one at a time
is the business of who answers. Whatever goes wrong is answered with no bytes, and the batch comes again through
TorchServe. Knows nothing about models or frames.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from serve.errors import ServeError
from serve.protocol.worker import BATCH_HEADER, HELLO, LENGTH, MAX_MESSAGE_BYTES, socket_path

__all__ = ["listen"]

# One gateway holds as many as it has batches here, two; several gateways may share a worker.
_MOST_CONNECTIONS = 32

logger = logging.getLogger(__name__)


def listen(folder: Path, answer: Callable[[memoryview, int], bytes]) -> socket.socket:
    """Listen for batches until the process ends; returns the socket, which may be closed to end sooner.

    Args:
        folder: where the socket goes; it must be this user's alone, for whoever can connect is answered.
        answer: a framed batch, and for how many seconds it may be computed (0: any number), to framed outcomes;
            called from several threads.

    Raises:
        OSError: the folder is not there, or the path is too long for a socket.
    """
    path = socket_path(folder, os.getpid())
    path.unlink(missing_ok=True)  # of a process that had the same id
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_MOST_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    threading.Thread(target=_accept, args=(listener, answer), name="direct", daemon=True).start()
    return listener


def _accept(listener: socket.socket, answer: Callable[[memoryview, int], bytes]) -> None:
    room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        if not room.acquire(blocking=False):
            connection.close()  # without a greeting: its batch goes through TorchServe
            continue
        threading.Thread(
            target=_serve, args=(connection, answer, room), name="direct-connection", daemon=True
        ).start()


def _serve(
    connection: socket.socket, answer: Callable[[memoryview, int], bytes], room: threading.BoundedSemaphore
) -> None:
    """Answer one batch after the other, until the other side hangs up."""
    try:
        with connection:
            connection.sendall(HELLO)
            while (received := _receive(connection)) is not None:
                body = _answered(answer, *received)
                del received
                connection.sendall(LENGTH.pack(len(body)) + body)  # one message, one wake-up
    except OSError:
        pass  # hung up
    finally:
        room.release()


def _answered(answer: Callable[[memoryview, int], bytes], batch: memoryview, compute_s: int) -> bytes:
    try:
        return answer(batch, compute_s)
    except ServeError as error:
        logger.info("a batch is left to TorchServe: %s", error)
    except Exception:
        logger.warning("a batch is left to TorchServe", exc_info=True)
    return b""


def _receive(connection: socket.socket) -> tuple[memoryview, int] | None:
    """One batch and its seconds; None at the end of the connection, or where its length is impossible."""
    head = bytearray(BATCH_HEADER.size)
    if not _fill(connection, memoryview(head)):
        return None
    length, compute_s = BATCH_HEADER.unpack(head)
    if length > MAX_MESSAGE_BYTES:
        return None
    batch = memoryview(bytearray(length))
    return (batch, compute_s) if _fill(connection, batch) else None


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    while buffer:
        received = connection.recv_into(buffer)
        if not received:
            return False
        buffer = buffer[received:]
    return True
