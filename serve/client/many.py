"""Frames of a sequence side by side: which may be, and their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from serve.client.options import PredictOptions
from serve.errors import UnknownOption

__all__ = ["Window", "check_order"]


def check_order(options: PredictOptions, concurrency: int) -> None:
    """Check that frames which are sent `concurrency` at a time need not arrive in order.

    Raises:
        UnknownOption: they belong to a track session, whose frames are followed as they arrive.
    """
    if concurrency > 1 and options.get("track_session") is not None:
        raise UnknownOption(
            f"track_session needs its frames in order, and predict_many sends {concurrency} side by side; "
            "use concurrency=1, or predict"
        )


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
