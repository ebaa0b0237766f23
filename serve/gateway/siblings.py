"""What one of several gateway processes knows of the others, over Unix sockets in a folder of theirs."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

__all__ = ["OWN", "Siblings", "merge_metrics"]

# Query of a request between siblings: the answer is about the asked process alone.
OWN = "gateway=own"
_TIMEOUT_S = 1.0
# A family of an exposition, and the beginnings of samples with and without labels.
_FAMILY = re.compile(rb"(?P<header># HELP .*\n# TYPE .*\n)(?P<samples>(?:[^#].*\n)*)")
_LABELLED = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*+)\{", re.MULTILINE)
_BARE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*+) ", re.MULTILINE)


@dataclass(frozen=True)
class Siblings:
    """The processes of one port.

    Attributes:
        folder: folder of their sockets, which only their user may open.
        index: number of this process.
    """

    folder: Path
    index: int
    _clients: dict[Path, httpx.AsyncClient] = field(default_factory=dict, repr=False, compare=False)

    def listen(self) -> socket.socket:
        """Bind the socket of this process."""
        path = self.folder / f"{self.index}.sock"
        path.unlink(missing_ok=True)  # of a former process of that number
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        return listener

    async def ask(self, path: str) -> dict[str, httpx.Response]:
        """Send a GET to all others; returns the responses by number, without those that did not answer in time."""
        others = sorted(self.folder.glob("*.sock"))
        others.remove(self.folder / f"{self.index}.sock")
        found = await asyncio.gather(*(self._ask(other, path) for other in others))
        return {other.stem: answer for other, answer in zip(others, found, strict=True) if answer is not None}

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.aclose()

    async def _ask(self, socket_path: Path, path: str) -> httpx.Response | None:
        if socket_path not in self._clients:
            transport = httpx.AsyncHTTPTransport(uds=str(socket_path))
            self._clients[socket_path] = httpx.AsyncClient(
                base_url="http://gateway", transport=transport, timeout=_TIMEOUT_S, trust_env=False
            )
        try:
            return await self._clients[socket_path].get(f"{path}?{OWN}")
        except httpx.HTTPError:
            return None  # it is starting or ending


def merge_metrics(expositions: Mapping[str, bytes]) -> bytes:
    """Merge expositions in Prometheus' text format into one, with the name of each as the label ``gateway``.

    Line by line, because a parser takes 25 µs for each, on the event loop. A line break in a label is escaped.

    Args:
        expositions: by name of a process; in each, the samples of a family follow its ``# HELP`` and ``# TYPE``.
    """
    families: dict[bytes, list[bytes]] = {}
    for name, text in expositions.items():
        label = b'gateway="%s"' % name.encode()
        for family in _FAMILY.finditer(text):
            samples = _LABELLED.sub(rb"\1{%s," % label, family["samples"])
            samples = _BARE.sub(rb"\1{%s} " % label, samples)
            families.setdefault(family["header"], []).append(samples)
    return b"".join(header + b"".join(samples) for header, samples in families.items())
