"""The local engine: processes of this machine that compute parts.

A process takes its next part when the last batch of its present one is queued, so that the model does not wait while
results are written, or put into a bucket, and the first frames of the next part are read and decoded.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from serve.bulk.destination import Destination
from serve.bulk.parts import LOADING, Counts, Job, Part, compute_part
from serve.errors import ServeError, SetupError
from serve.predict.models import Model

__all__ = ["LocalEngine", "Sender", "end_with_parent"]

logger = logging.getLogger(__name__)

_CONTEXT = get_context("spawn")
_MOST_OPEN = 4  # parts of a process: one that is computed, others that are put into a slow bucket
_SHOW_S = 0.5
_END_S = 5.0


@dataclass
class _OpenPart:
    """A part that a process has.

    Attributes:
        part: the part.
        lane: where the process counts the frames of it that it has begun.
        shown: frames that were shown as begun.
        queued: whether its last batch is queued for the model.
    """

    part: Part
    lane: int
    shown: int = 0
    queued: bool = False


class _Slot:
    """A place for one process, and the parts that it has."""

    def __init__(self, job: Job, device: str, threads: int, where: str, scratch: str) -> None:
        self.device = device
        self.open: dict[int, _OpenPart] = {}
        self.is_loaded = False
        self.connection: Connection[Any, Any] | None = None
        self._begun: Any = _CONTEXT.Array("q", _MOST_OPEN, lock=False)  # one writer each
        self._arguments = (job, device, threads, where, scratch, self._begun)
        self._process: Any = None

    def accepts_another(self) -> bool:
        """Whether the process can begin a part while it finishes the ones that it has."""
        return (
            self.is_loaded
            and 0 < len(self.open) < _MOST_OPEN
            and all(each.queued and not each.part.cautious for each in self.open.values())
        )

    def give(self, part: Part) -> None:
        """Let the process compute a part, and start it if there is none."""
        if self.connection is None:
            self.connection, other = _CONTEXT.Pipe()
            self._process = _CONTEXT.Process(
                target=_run_process, args=(other, *self._arguments), daemon=True, name=f"bulk {self.device}"
            )
            self._process.start()
            other.close()  # so that the end of the process ends the connection
        lane = next(k for k in range(_MOST_OPEN) if k not in {each.lane for each in self.open.values()})
        self._begun[lane] = 0
        self.open[part.number] = _OpenPart(part, lane)
        if self.is_loaded:
            self._send(part, lane)

    def receive(self) -> tuple[Any, ...] | None:
        """Receive a message of the process; None if it has ended."""
        assert self.connection is not None
        try:
            message: tuple[Any, ...] = self.connection.recv()
        except (EOFError, OSError):
            return None
        if message[0] == "loaded":
            self.is_loaded = True
            for each in self.open.values():
                self._send(each.part, each.lane)
        elif message[0] == "queued":
            self.open[message[1]].queued = True
        return message

    def begun(self, each: _OpenPart) -> int:
        """Return how many frames of a part the process has begun."""
        return int(self._begun[each.lane])

    def record_end(self) -> list[Part]:
        """Find out what ended the process; returns its parts, which are to be computed again."""
        for each in self.open.values():
            each.part.record_end(self.begun(each) if self.is_loaded else LOADING, self.device)
        return [each.part for each in self.open.values()]

    def end(self, *, grace_s: float = 0.0) -> None:
        """End the process: ask it for `grace_s` seconds, then kill it."""
        process, connection = self._process, self.connection
        self._process = self.connection = None
        self.is_loaded = False
        self.open.clear()
        if connection is not None:
            connection.close()  # which it takes as the end
        if process is not None:
            if grace_s:
                process.join(grace_s)
            process.kill()
            process.join()
            process.close()

    def _send(self, part: Part, lane: int) -> None:
        assert self.connection is not None
        with suppress(OSError):  # it has ended: that is noticed where messages are received
            self.connection.send((part.number, part.lines, part.cautious, part.deadly, lane))


class LocalEngine:
    """One process per place of this machine.

    Args:
        devices: a process each.
        threads: torch threads of a process.
    """

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        self._devices, self._threads = devices, threads

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        """See `Engine.compute`."""
        # Of all processes, so that one that is killed leaves nothing behind.
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bulk-", ignore_cleanup_errors=True) as scratch:
            slots = [
                _Slot(job, device, self._threads, destination.where, scratch) for device in self._devices
            ]
            grace_s = 0.0
            try:
                yield from _run(slots, parts, advance)
                grace_s = _END_S
            finally:
                for slot in slots:
                    slot.end(grace_s=grace_s)


def _run(
    slots: Sequence[_Slot], parts: Iterator[Part], advance: Callable[[int], None]
) -> Iterator[tuple[int, Counts]]:
    again: deque[Part] = deque()
    while True:
        _give_parts(slots, again, parts)
        busy = {slot.connection: slot for slot in slots if slot.connection is not None and slot.open}
        if not busy:
            return
        for connection in wait(list(busy), timeout=_SHOW_S):
            slot = busy[connection]  # type: ignore[index]
            message = slot.receive()
            if message is None:
                advance(-sum(each.shown for each in slot.open.values()))
                again.extend(slot.record_end())
                slot.end()
            elif message[0] == "failed":
                raise message[1]
            elif message[0] == "done":
                _, number, figures = message
                counts = Counts.of(figures)
                advance(counts.frames - slot.open.pop(number).shown)
                yield number, counts
        advance(sum(map(_newly_begun, slots)))


def _give_parts(slots: Sequence[_Slot], again: deque[Part], parts: Iterator[Part]) -> None:
    """Give parts to processes without one, then to those that only have results to write."""
    for slot in slots:
        if not slot.open:
            part = again.popleft() if again else next(parts, None)
            if part is None:
                break
            slot.give(part)
    for slot in slots:
        if slot.accepts_another() and not again and (part := next(parts, None)) is not None:
            slot.give(part)


def _newly_begun(slot: _Slot) -> int:
    total = 0
    for each in slot.open.values():
        begun = slot.begun(each)
        total, each.shown = total + begun - each.shown, begun
    return total


def _run_process(
    connection: Connection[Any, Any],
    job: Job,
    device: str,
    threads: int,
    where: str,
    scratch: str,
    begun: Any,
) -> None:
    """Load the model and compute parts until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    threading.Thread(target=end_with_parent, args=(scratch,), daemon=True).start()
    tempfile.tempdir = scratch
    send = Sender(connection)
    try:
        destination = Destination(where)
        model = job.open_model(Path(job.archive), device, trust_code=job.trust_code, threads=threads)
    except Exception as error:
        send("failed", _portable(error, "the model cannot be loaded"))
        return
    send("loaded")
    with suppress(EOFError, OSError):
        while True:
            part = connection.recv()
            threading.Thread(
                target=_compute, args=(model, job, destination, send, begun, *part), daemon=True
            ).start()
    model.close()
    logging.shutdown()
    if (parent := parent_process()) is None or not parent.is_alive():
        shutil.rmtree(
            scratch, ignore_errors=True
        )  # this thread may be faster than the one that waits for the parent
    os._exit(0)  # the end of an interpreter with torch takes half a second


class Sender:
    """Sends messages of several threads; without a receiver, they are lost."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def __call__(self, *message: Any) -> None:
        """Send a message."""
        with self._lock, suppress(OSError):
            self._connection.send(message)


def end_with_parent(scratch: str) -> None:
    """End when the process that waits for this one was killed, and remove its folder: nothing else would."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _compute(
    model: Model,
    job: Job,
    destination: Destination,
    send: Sender,
    begun: Any,
    number: int,
    lines: Sequence[bytes],
    cautious: bool,
    deadly: frozenset[int],
    lane: int,
) -> None:
    """Predict a part and put its results into the destination."""

    def begin(count: int) -> None:
        begun[lane] = count

    try:
        counts = compute_part(
            model, job, destination, number, lines, cautious, deadly, begin, lambda: send("queued", number)
        )
    except BaseException as error:
        send("failed", _portable(error, f"part {number} cannot be computed"))
        return
    send("done", number, counts.figures())


def _portable(error: BaseException, what: str) -> ServeError:
    """Return an error that another process can have, and that ends the run with a message.

    Args:
        error: whatever was raised.
        what: what failed, the beginning of the message for all that is no error of this package.
    """
    if not isinstance(error, ServeError):
        logger.error("%s", what, exc_info=error)
        return SetupError(f"{what} ({type(error).__name__}: {error}); is there enough memory?")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return SetupError(str(error))
    return error
