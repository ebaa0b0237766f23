"""How much is being worked on at a time: frames, and bytes held for them, bounded.

A request takes a permit before its body is read, lets it grow with what it turns out to be, and gives it back on
every way out. Knows nothing about queues, HTTP or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.errors import Overloaded

__all__ = ["Admission", "Permit"]


class Admission:
    """Bounds what is being worked on: requests, and bytes held for them. The one owner of both counts."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        """Allow `max_items` frames and `max_bytes` bytes of bodies at a time."""
        self.max_items, self.max_bytes = max_items, max_bytes
        self.items = 0
        self.bytes = 0

    @contextmanager
    def permit(self) -> Iterator[Permit]:
        """Held by a request from before its body is read until it is answered; given back on every way out."""
        permit = Permit(self)
        try:
            yield permit
        finally:
            permit.give_back()


@dataclass
class Permit:
    """What one request holds of an `Admission`; it grows as the request turns out larger."""

    admission: Admission
    items: int = 0
    bytes: int = 0

    def grow(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Take more.

        Raises:
            Overloaded: that would be over a bound; nothing more is taken.
        """
        self.expect(items=items, nbytes=nbytes)
        self.items += items
        self.bytes += nbytes
        self.admission.items += items
        self.admission.bytes += nbytes

    def expect(self, *, items: int = 0, nbytes: int = 0) -> None:
        """See whether there is room for so much more; takes nothing.

        Raises:
            Overloaded: there is none now.
        """
        owner = self.admission
        if items and owner.items + items > owner.max_items:
            raise Overloaded(
                f"{owner.items} frames are waiting or running, the limit is {owner.max_items}; retry later"
            )
        if nbytes and owner.bytes + nbytes > owner.max_bytes:
            raise Overloaded(
                f"requests being served hold {owner.bytes} bytes and this one needs {nbytes} more, the limit is "
                f"{owner.max_bytes}; retry later"
            )

    def move(self) -> Permit:
        """Hand all of it to a permit of its own, for an answer that outlives the function that was permitted."""
        moved = Permit(self.admission, self.items, self.bytes)
        self.items = self.bytes = 0
        return moved

    def give_back(self) -> None:
        """Return everything; harmless the second time."""
        self.admission.items -= self.items
        self.admission.bytes -= self.bytes
        self.items = self.bytes = 0
