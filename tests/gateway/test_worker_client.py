"""The worker's socket: client and server together, over real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from serve.errors import BadRequest
from serve.gateway.worker_client import ConnectionLost, WorkerLost, WorkerSockets, _Connection
from serve.protocol.worker import BATCH_HEADER, HELLO, LENGTH, MAX_MESSAGE_BYTES, socket_path
from serve.worker.server import CancelledFrames, listen

OWN = os.getpid()


@contextmanager
def worker(folder: Path, answer: Callable[[memoryview], bytes], pid: int = OWN) -> Iterator[socket.socket]:
    """A worker's end in this process, under the name of another one where `pid` says so."""
    with closing(listen(folder, lambda batch, compute_s, cancelled: answer(batch))) as listener:
        if pid != OWN:
            socket_path(folder, OWN).rename(socket_path(folder, pid))
        yield listener
    socket_path(folder, pid).unlink()


def asking(folder: Path, calls):
    """What the coroutine function `calls` makes of a `WorkerSockets`."""

    async def run():
        sockets = WorkerSockets(folder)
        try:
            return await calls(sockets)
        finally:
            sockets.close()

    return asyncio.run(run())


def test_batch_of_chunks_and_its_answer_arrive_complete(tmp_path):
    large = os.urandom(3_000_000)
    pieces = (b"ab", memoryview(large), bytearray(b"c"), b"")
    with worker(tmp_path, lambda body: bytes(body)[::-1]):

        async def calls(sockets):
            return [await sockets.call([OWN], pieces, 20.0) for _ in range(3)]

        answers = asking(tmp_path, calls)
    assert answers == [(b"ab" + large + b"c")[::-1]] * 3


def test_worker_receives_the_compute_limit(tmp_path):
    with closing(listen(tmp_path, lambda batch, compute_s, cancelled: str(compute_s).encode())):

        async def calls(sockets):
            return [await sockets.call([OWN], [b"x"], 20.0, 7), await sockets.call([OWN], [b"x"], 20.0)]

        assert asking(tmp_path, calls) == [b"7", b"0"]


def test_second_batch_is_received_while_the_first_is_answered(tmp_path):
    both = threading.Barrier(2, timeout=20)

    def answer(body: memoryview) -> bytes:
        both.wait()  # no answer before both have arrived
        return bytes(body)

    with worker(tmp_path, answer):

        async def calls(sockets):
            return await asyncio.gather(*(sockets.call([OWN], [name], 20.0) for name in (b"one", b"two")))

        assert asking(tmp_path, calls) == [b"one", b"two"]


@pytest.mark.parametrize("error", [BadRequest("not framed"), RuntimeError("CUDA error: out of memory")])
def test_failed_batch_is_left_to_torchserve_and_the_connection_stays_open(tmp_path, error):
    def answer(body: memoryview) -> bytes:
        if body == b"bad":
            raise error
        return bytes(body)

    with worker(tmp_path, answer):

        async def calls(sockets):
            return [await sockets.call([OWN], [name], 20.0) for name in (b"bad", b"good")]

        assert asking(tmp_path, calls) == [None, b"good"]


def test_call_returns_none_without_a_listening_worker(tmp_path):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(socket_path(tmp_path, 2)))  # of one that has died
    stale.close()

    async def calls(sockets):
        return [await sockets.call(pids, [b"x"], 20.0) for pids in ([], [1], [1, 2])]

    assert asking(tmp_path, calls) == [None, None, None]


def test_worker_that_dies_with_a_batch_raises_worker_lost(tmp_path):
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(socket_path(tmp_path, 1)))
        dying.listen()

        def die() -> None:
            connection, _ = dying.accept()
            connection.sendall(HELLO)
            connection.recv(BATCH_HEADER.size + 1)
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()

        async def calls(sockets):
            with pytest.raises(WorkerLost) as lost:
                await sockets.call([1, OWN], [b"x"], 20.0)
            assert lost.value.pid == 1
            dying.close()
            return await sockets.call([1, OWN], [b"x"], 20.0)

        with worker(tmp_path, bytes):
            assert asking(tmp_path, calls) == b"x"
        thread.join()


@pytest.mark.parametrize("sent", [LENGTH.pack(MAX_MESSAGE_BYTES + 1), LENGTH.pack(1) + b"too much"])
def test_answer_of_invalid_length_raises_connection_lost(tmp_path, sent):
    with socket.socket(socket.AF_UNIX) as wrong:
        wrong.bind(str(socket_path(tmp_path, 1)))
        wrong.listen()

        def answer() -> None:
            connection, _ = wrong.accept()
            with connection:
                connection.sendall(HELLO)
                connection.recv(BATCH_HEADER.size + 1)
                connection.sendall(sent)
                connection.recv(1)  # until it hangs up

        thread = threading.Thread(target=answer)
        thread.start()

        async def calls(sockets):
            with pytest.raises(ConnectionLost):
                await sockets.call([1], [b"x"], 20.0)

        asking(tmp_path, calls)
        thread.join()


def test_hung_worker_gets_no_batches_until_it_was_replaced(tmp_path):
    go_on = threading.Event()

    def answer(body: memoryview) -> bytes:
        go_on.wait(20)
        return bytes(body)

    with worker(tmp_path, answer):

        async def calls(sockets):
            with pytest.raises(TimeoutError):
                await sockets.call([OWN], [b"x"], 0.05)
            go_on.set()
            avoided = await sockets.call([OWN], [b"x"], 20.0)
            sockets.retain(set())  # it is gone, and another one has come with its number
            return avoided, await sockets.call([OWN], [b"x"], 20.0)

        assert asking(tmp_path, calls) == (None, b"x")


@pytest.mark.parametrize("greeting", [b"", b"late", LENGTH.pack(0), LENGTH.pack(1) + b"x", b"\xff" * 8])
def test_worker_without_a_hello_gets_no_batch(tmp_path, greeting, monkeypatch):
    monkeypatch.setattr("serve.gateway.worker_client.CONNECT_TIMEOUT_S", 0.2)
    came = []
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(socket_path(tmp_path, 1)))
        mute.listen()

        def say() -> None:
            connection, _ = mute.accept()
            with connection:
                connection.sendall(greeting)
                came.append(connection.recv(1))

        thread = threading.Thread(target=say)
        thread.start()

        async def calls(sockets):
            return await sockets.call([1], [b"x"], 20.0)

        assert asking(tmp_path, calls) is None
        thread.join()
    assert came == [b""]


def test_worker_with_the_fewest_batches_gets_the_next(tmp_path):
    busy, go_on = threading.Event(), threading.Event()

    def slow(body: memoryview) -> bytes:
        busy.set()
        go_on.wait(20)
        return b"slow"

    with worker(tmp_path, slow, pid=1), worker(tmp_path, lambda body: b"quick", pid=2):

        async def calls(sockets):
            first = asyncio.create_task(sockets.call([1, 2], [b"x"], 20.0))
            await asyncio.to_thread(busy.wait, 20)
            others = [await sockets.call([1, 2], [b"x"], 20.0) for _ in range(3)]
            go_on.set()
            return await first, others

        assert asking(tmp_path, calls) == (b"slow", [b"quick"] * 3)


def test_concurrent_batches_go_to_different_workers(tmp_path):
    with worker(tmp_path, lambda body: b"first", pid=1), worker(tmp_path, lambda body: b"second", pid=2):

        async def calls(sockets):
            return await asyncio.gather(*(sockets.call([1, 2], [b"x"], 20.0) for _ in range(4)))

        assert sorted(map(bytes, asking(tmp_path, calls))) == [b"first"] * 2 + [b"second"] * 2


def test_frame_that_nobody_waits_for_is_cancelled_at_the_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(CancelledFrames, "interval_s", 0.0)
    reached = threading.Event()

    def respond(body, compute_s, cancelled):
        reached.set()
        deadline = time.monotonic() + 20
        while not cancelled() and time.monotonic() < deadline:
            pass
        return repr(sorted(cancelled())).encode()

    with closing(listen(tmp_path, respond)):

        async def calls(sockets):
            waiting = [asyncio.get_running_loop().create_future() for _ in range(3)]
            call = asyncio.create_task(sockets.call([OWN], [b"x"], 20.0, 0, waiting))
            await asyncio.to_thread(reached.wait, 20)
            waiting[1].cancel()
            first = await call
            reached.clear()
            waiting[2].cancel()  # too late for the first batch, and none of the second's
            done = [asyncio.get_running_loop().create_future()]
            call = asyncio.create_task(sockets.call([OWN], [b"x"], 20.0, 0, done))
            await asyncio.to_thread(reached.wait, 20)
            done[0].set_result(None)
            return [first, await call]

        assert asking(tmp_path, calls) == [b"[1]", b"[0]"]


def test_cancel_scheduled_while_an_answer_arrives_does_not_reach_the_next_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(CancelledFrames, "interval_s", 0.0)
    gone = []
    received = _Connection.data_received

    def receive(connection, data):
        received(connection, data)
        for future in gone:  # its callback runs after the caller has sent the next batch
            if not future.done():
                future.set_result(None)

    monkeypatch.setattr(_Connection, "data_received", receive)

    def respond(body, compute_s, cancelled):
        deadline = time.monotonic() + 0.2
        while not cancelled() and time.monotonic() < deadline:
            pass
        return repr(sorted(cancelled())).encode()

    with closing(listen(tmp_path, respond)):

        async def calls(sockets):
            loop = asyncio.get_running_loop()
            await sockets.call([OWN], [b"x"], 20.0, 0)  # connects
            gone.append(loop.create_future())
            await sockets.call([OWN], [b"x"], 20.0, 0, gone)
            return [await sockets.call([OWN], [b"x"], 20.0, 0, [loop.create_future()])]

        assert asking(tmp_path, calls) == [b"[]"]


def test_message_of_invalid_length_closes_the_connection_before_allocation(tmp_path):
    with worker(tmp_path, bytes), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(socket_path(tmp_path, OWN)))
        client.sendall(BATCH_HEADER.pack(1 << 60, 0))
        assert client.recv(len(HELLO)) == HELLO
        assert client.recv(1) == b""


def test_socket_is_private_and_replaces_a_stale_one(tmp_path):
    for name in (b"first", b"second"):
        listener = listen(tmp_path, lambda batch, compute_s, cancelled, name=name: name)
        assert socket_path(tmp_path, OWN).stat().st_mode & 0o077 == 0

        async def calls(sockets):
            return await sockets.call([OWN], [b"x"], 20.0)

        assert asking(tmp_path, calls) == name
        listener.close()  # its file stays, as after a kill


def test_full_worker_leaves_its_batch_to_torchserve(tmp_path):
    with worker(tmp_path, bytes):
        clients = []
        for _ in range(40):
            client = socket.socket(socket.AF_UNIX)
            client.connect(
                str(socket_path(tmp_path, OWN))
            )  # with a timeout it would not wait for the backlog
            client.settimeout(20)
            clients.append(client)
        assert clients[-1].recv(1) == b"" and clients[0].recv(len(HELLO)) == HELLO

        async def calls(sockets):
            return await sockets.call([OWN], [b"x"], 20.0)

        assert asking(tmp_path, calls) is None
        clients[0].sendall(BATCH_HEADER.pack(1, 0) + b"x")
        assert clients[0].recv(9) == LENGTH.pack(1) + b"x"
        for client in clients:
            client.close()
        # Room is given back: a new one is answered.
        deadline = time.monotonic() + 20
        while (answer := asking(tmp_path, calls)) is None and time.monotonic() < deadline:
            pass
        assert answer == b"x"
