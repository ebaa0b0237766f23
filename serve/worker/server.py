"""Socket server of a worker, the other end of `serve.gateway.worker_client`; protocol: `serve.protocol.worker`.

One thread per connection reads a batch, has it answered and sends the answer; `answer` itself serializes what must not
run concurrently. On any failure the server sends an empty answer, and the gateway repeats the batch through TorchServe.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from serve.errors import ServeError
from serve.protocol.worker import BATCH_HEADER, HELLO, LENGTH, MessageReader, ProtocolError, socket_path

__all__ = ["listen"]

# A gateway opens one per batch in flight, mostly two; several gateways may share a worker.
_MAX_CONNECTIONS = 32

logger = logging.getLogger(__name__)


def listen(folder: Path, answer: Callable[[memoryview, int], bytes]) -> socket.socket:
    """Listen for batches until the process ends; returns the socket, which may be closed to stop earlier.

    Args:
        folder: folder of the socket; only this user may have access, because there is no authentication.
        answer: maps a framed batch and its compute limit in seconds (0 for none) to framed outcomes; called from
            several threads.

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
    threading.Thread(target=_accept, args=(listener, answer), name="worker-socket", daemon=True).start()
    return listener


def _accept(listener: socket.socket, answer: Callable[[memoryview, int], bytes]) -> None:
    free_slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        if not free_slots.acquire(blocking=False):
            connection.close()  # without a hello: the batch goes through TorchServe
            continue
        threading.Thread(
            target=_serve, args=(connection, answer, free_slots), name="worker-connection", daemon=True
        ).start()


def _serve(
    connection: socket.socket,
    answer: Callable[[memoryview, int], bytes],
    free_slots: threading.BoundedSemaphore,
) -> None:
    """Answer batches one after another until the gateway disconnects."""
    try:
        with connection:
            connection.sendall(HELLO)
            reader = MessageReader(BATCH_HEADER, reuse=True)
            while (received := _receive(connection, reader)) is not None:
                (length, compute_s), batch = received
                if not length:
                    continue  # a frame of a batch that is answered already was cancelled
                body = _answer(answer, batch, compute_s)
                connection.sendall(LENGTH.pack(len(body)) + body)  # one send, one wake-up of the gateway
    except (OSError, ProtocolError):
        pass  # disconnected, or not a gateway of this version
    finally:
        free_slots.release()


def _answer(answer: Callable[[memoryview, int], bytes], batch: memoryview, compute_s: int) -> bytes:
    try:
        return answer(batch, compute_s)
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
