"""Admission control: bounds on the frames in progress and on the bytes held for requests and answers.

Every request has a permit until its answer is written, or has failed. The permit grows with what has arrived, not with
what was announced, shrinks as frames are done, and counts the answer instead of the request once that is computed. One
client (an API key, or an address if there are no keys) may hold only a share of each limit, so that others are served
beside it. So may one model, if there are several: what it holds beyond an equal share leaves half of such a share free
for the others, whatever flood there is of requests for it.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from serve.errors import Overloaded

__all__ = ["Admission", "Permit", "client_of"]


class Admission:
    """Counts frames and bytes in progress, up to a limit of each, in total and per client."""

    def __init__(self, max_items: int, max_bytes: int, client_share: float = 1.0) -> None:
        """Allow `max_items` frames and `max_bytes` bytes at a time, and one client `client_share` of each."""
        self.max_items, self.max_bytes = max_items, max_bytes
        self.client_items = math.ceil(max_items * client_share)
        self.client_bytes = math.ceil(max_bytes * client_share)
        self.items = 0
        self.bytes = 0
        # Number of models among which the limits are shared; set by the table of models.
        self.count_models: Callable[[], int] = lambda: 1
        self._clients: dict[str, _Held] = {}
        self._models: dict[str, _Held] = {}

    def permit(self, client: str = "") -> Permit:
        """Create an empty permit of a client; a context manager that releases it."""
        return Permit(self, client)

    def held_by(self, client: str) -> _Held:
        """Return what a client holds, to read."""
        return self._clients.get(client) or _Held()

    def held_for(self, model: str) -> _Held:
        """Return what requests for a model hold, to read."""
        return self._models.get(model) or _Held()

    def _add(self, client: str, model: str, items: int, nbytes: int) -> None:
        self.items += items
        self.bytes += nbytes
        for table, name in ((self._clients, client), (self._models, model)):
            held = table.get(name)
            if held is None:
                held = table[name] = _Held()
            held.items += items
            held.bytes += nbytes
            if not (held.items or held.bytes):
                del table[name]


@dataclass
class _Held:
    """Frames and bytes that a client, or the requests for a model, hold."""

    items: int = 0
    bytes: int = 0


@dataclass
class Permit:
    """Share of an `Admission` that one request holds."""

    admission: Admission
    client: str
    items: int = 0
    bytes: int = 0
    model: str = ""  # of the request, once it is known; set while nothing is held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def grow(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Take `items` frames and `nbytes` bytes more.

        Raises:
            Overloaded: a limit would be exceeded; nothing is taken.
        """
        self.check(items=items, nbytes=nbytes)
        self._add(items, nbytes)

    def shrink(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Return `items` frames and `nbytes` bytes, as far as they are held."""
        self._add(-min(items, self.items), -min(nbytes, self.bytes))

    def check(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Check that `items` frames and `nbytes` bytes more would be admitted; takes nothing.

        Raises:
            Overloaded: a limit would be exceeded.
        """
        admission, held = self.admission, self.admission.held_by(self.client)
        if items and admission.items + items > admission.max_items:
            raise Overloaded(
                f"{admission.items} frames are pending, the limit is {admission.max_items}; retry later"
            )
        if nbytes and admission.bytes + nbytes > admission.max_bytes:
            raise Overloaded(
                f"pending requests hold {admission.bytes} bytes and this one needs {nbytes} more, the limit is "
                f"{admission.max_bytes}; retry later"
            )
        if items and held.items + items > admission.client_items:
            raise Overloaded(
                f"{held.items} frames of this client are pending, its share is {admission.client_items}; retry later"
            )
        if nbytes and held.bytes + nbytes > admission.client_bytes:
            raise Overloaded(
                f"pending requests of this client hold {held.bytes} bytes and this one needs {nbytes} more, its "
                f"share is {admission.client_bytes}; retry later"
            )

        models = admission.count_models()
        if models > 1 and self.model:
            of_model = admission.held_for(self.model)
            if _crowds_out(of_model.items, items, admission.items, admission.max_items, models):
                raise Overloaded(
                    f"{of_model.items} frames for {self.model} are pending, the rest of {admission.max_items} is for "
                    "other models; retry later"
                )
            if _crowds_out(of_model.bytes, nbytes, admission.bytes, admission.max_bytes, models):
                raise Overloaded(
                    f"pending requests for {self.model} hold {of_model.bytes} bytes, the rest of "
                    f"{admission.max_bytes} is for other models; retry later"
                )

    def exchange(self, nbytes: int) -> None:
        """Hold the `nbytes` bytes of an answer, in place of the frames and bytes of the request.

        Raises:
            Overloaded: a limit would be exceeded; nothing has changed.
        """
        if nbytes > self.bytes:
            self.check(nbytes=nbytes - self.bytes)
        self._add(-self.items, nbytes - self.bytes)

    def release(self) -> None:
        """Return everything to the admission; a second call has no effect."""
        self._add(-self.items, -self.bytes)

    def _add(self, items: int, nbytes: int) -> None:
        if items or nbytes:
            self.items += items
            self.bytes += nbytes
            self.admission._add(self.client, self.model, items, nbytes)


def _crowds_out(held: int, more: int, total: int, limit: int, models: int) -> bool:
    """Return whether a model would go beyond an equal share of a limit and into what is kept for the others.

    A model that holds nothing may take what one request needs.
    """
    return (
        bool(held and more) and held + more > limit / models and total + more > limit - limit / (2 * models)
    )


def client_of(scope: Mapping[str, object]) -> str:
    """Return the network that a request came from: the IPv4 address, or the /64 of an IPv6 address."""
    client = scope.get("client")
    host = str(client[0]) if isinstance(client, list | tuple) and client else ""
    if ":" not in host:
        return host
    try:
        return str(ipaddress.IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host
