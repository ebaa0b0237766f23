"""Admission control: bounds on the frames in progress and on the bytes held for them.

A request takes a permit before its body is read, grows it as the body arrives, and releases it however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.errors import Overloaded

__all__ = ["Admission", "Permit"]


class Admission:
    """Counts frames and bytes in progress, up to a limit of each."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        """Allow `max_items` frames and `max_bytes` bytes of request bodies at a time."""
        self.max_items, self.max_bytes = max_items, max_bytes
        self.items = 0
        self.bytes = 0

    @contextmanager
    def permit(self) -> Iterator[Permit]:
        """Yield an empty permit and release it at the end."""
        permit = Permit(self)
        try:
            yield permit
        finally:
            permit.release()


@dataclass
class Permit:
    """Share of an `Admission` that one request holds."""

    admission: Admission
    items: int = 0
    bytes: int = 0

    def grow(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Take `items` frames and `nbytes` bytes more.

        Raises:
            Overloaded: a limit would be exceeded; nothing is taken.
        """
        self.check(items=items, nbytes=nbytes)
        self.items += items
        self.bytes += nbytes
        self.admission.items += items
        self.admission.bytes += nbytes

    def check(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Check that `items` frames and `nbytes` bytes more would be admitted; takes nothing.

        Raises:
            Overloaded: a limit would be exceeded.
        """
        admission = self.admission
        if items and admission.items + items > admission.max_items:
            raise Overloaded(
                f"{admission.items} frames are pending, the limit is {admission.max_items}; retry later"
            )
        if nbytes and admission.bytes + nbytes > admission.max_bytes:
            raise Overloaded(
                f"pending requests hold {admission.bytes} bytes and this one needs {nbytes} more, the limit is "
                f"{admission.max_bytes}; retry later"
            )

    def move(self) -> Permit:
        """Transfer everything to a new permit, for a response that outlives the `with` block."""
        moved = Permit(self.admission, self.items, self.bytes)
        self.items = self.bytes = 0
        return moved

    def release(self) -> None:
        """Return everything to the admission; a second call has no effect."""
        self.admission.items -= self.items
        self.admission.bytes -= self.bytes
        self.items = self.bytes = 0
