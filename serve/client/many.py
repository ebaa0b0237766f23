"""Frames of a sequence side by side: which may be, and their results in order."""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from serve.client.options import PredictOptions
from serve.errors import UndecodableFrame, UnknownOption

__all__ = ["Threads", "Window", "check_many"]

T = TypeVar("T")


def check_many(frames: object, options: PredictOptions, concurrency: int) -> None:
    """Check the arguments of `predict_many`.

    Raises:
        UndecodableFrame: `frames` is a single frame.
        UnknownOption: `concurrency` is no number of requests, or the frames belong to a track session and would be
            sent side by side: its frames are followed as they arrive.
    """
    is_one = isinstance(frames, str | bytes | bytearray | memoryview | os.PathLike | Mapping | io.IOBase)
    if isinstance(frames, np.ndarray) and frames.dtype.kind not in "OSU":  # which hold paths, or any objects
        is_image = frames.dtype == np.uint8 and frames.ndim == 3 and frames.shape[2] in (1, 3, 4)
        is_one = frames.ndim < 3 or is_image
    if is_one:
        raise UndecodableFrame("predict_many takes several frames, and this is one; use predict, or [frame]")
    if isinstance(concurrency, bool) or not isinstance(concurrency, int | np.integer) or concurrency < 1:
        raise UnknownOption(f"concurrency must be a number of requests from 1 on, got {concurrency!r}")
    if concurrency > 1 and options.get("track_session") is not None:
        raise UnknownOption(
            f"track_session needs its frames in order, and predict_many sends {concurrency} side by side; "
            "use concurrency=1, or predict"
        )


class Threads:
    """Threads that make calls.

    Unlike those of a `ThreadPoolExecutor` they do not hold up the end of the program, which Ctrl-C asks for while
    their requests wait for a server.

    Args:
        most: threads at a time; they start as calls come.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        #: Set when the results are not wanted any more.
        self.stopped = threading.Event()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Make a call once a thread is free."""
        future: Future[T] = Future()
        self._queue.put((future, call))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name=f"client-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def stop(self, *, wait: bool) -> None:
        """Make no further call; `wait` for those that are under way."""
        self.stopped.set()
        for _ in self._threads:
            self._queue.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            future, call = task
            if self.stopped.is_set() or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


class _Task(Protocol):
    def done(self) -> bool: ...


Started = TypeVar("Started", bound=_Task)


class Window(Generic[Started]):
    """Tasks of a sequence that are under way, taken in the order in which they were added.

    Args:
        size: tasks at a time, waiting for their turn included.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._tasks: deque[Started] = deque()

    def add(self, task: Started) -> None:
        """Add the next task."""
        self._tasks.append(task)

    def take(self, *, ended: bool = False) -> Iterator[Started]:
        """Take the first tasks while they are done, too many, or all that is left if the sequence has `ended`."""
        while self._tasks and (ended or len(self._tasks) >= self._size or self._tasks[0].done()):
            yield self._tasks.popleft()

    def rest(self) -> Iterator[Started]:
        """Take all that is left, to give it up."""
        while self._tasks:
            yield self._tasks.popleft()
