"""Head of a request: what it must have beyond what the parser checks.

One Host of the right form, no transfer coding but chunked, and a number of lines. Anything else could mean one thing to
a proxy before the gateway and another to the gateway.
"""

from __future__ import annotations

import re

from serve.errors import BadRequest, ServeError

__all__ = ["MAX_HEADER_LINES", "RequestHead"]

MAX_HEADER_LINES = 256
# RFC 9112, 3.2: uri-host [":" port] of RFC 3986, possibly empty; anything else must be answered 400.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(:[0-9]*)?")


class RequestHead:
    """Lines of one head that decide whether the request is answered."""

    def __init__(self) -> None:
        """Start a head without lines."""
        self._lines = 0
        self._hosts: list[bytes] = []
        self._codings: list[bytes] = []  # of Transfer-Encoding

    def add(self, name: bytes, value: bytes) -> bool:
        """Count a line, its name in lower case; return whether there may be so many."""
        self._lines += 1
        if self._lines > MAX_HEADER_LINES:
            return False
        if name == b"host":
            self._hosts.append(value)
        elif name == b"transfer-encoding":
            self._codings.append(value)
        return True

    def check(self, http_version: str) -> ServeError | None:
        """Return what is wrong with the whole head, or None."""
        if self._lines > MAX_HEADER_LINES:
            return BadRequest(f"the request header has more than {MAX_HEADER_LINES} lines")
        hosts = len(self._hosts)
        if hosts > 1 or (hosts == 0 and http_version != "1.0"):
            return BadRequest(f"a request must have one Host header, this one has {hosts}")
        if hosts and not _HOST.fullmatch(self._hosts[0].strip(b" \t")):
            return BadRequest("the Host header is not a name or address with an optional port")
        # The parser takes any list that ends in chunked, and would pass the other coding on as the body.
        if self._codings and [one.strip(b" \t").lower() for one in self._codings] != [b"chunked"]:
            return BadRequest("Transfer-Encoding may be chunked only; send the body uncompressed")
        return None
