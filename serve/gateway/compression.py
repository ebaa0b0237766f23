"""Compression of answers by ``Accept-Encoding`` (RFC 9110, 12.5.3): gzip, and zstd where Python has it.

Off for short answers, where it costs the gateway more than it saves the network (docs/gateway.md#compression has
figures). Python 3.14 has zstd; before, the package backports.zstd.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from isal import isal_zlib

from serve.gateway.offload import run_beside_loop

__all__ = ["CODINGS", "choose_coding", "compress"]

# A longer header is that of no client that reads these codings.
_LONGEST_HEADER_CHARS = 1024
# Of ISA-L's levels 0 to 3, the fastest but one: 0.1 ms for 29 kB of detections, to 45 %.
_GZIP_LEVEL = 1
_GZIP_WINDOW_BITS = 31  # zlib's for a gzip header
_ZSTD_LEVEL = 1


def _gzip(body: bytes) -> bytes:
    return isal_zlib.compress(body, _GZIP_LEVEL, _GZIP_WINDOW_BITS)


def _find_zstd() -> Callable[[bytes], bytes] | None:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        return lambda body: bytes(module.compress(body, level=_ZSTD_LEVEL))
    return None


_ZSTD = _find_zstd()
#: Codings that this process writes, best first.
CODINGS: Mapping[str, Callable[[bytes], bytes]] = {**({"zstd": _ZSTD} if _ZSTD else {}), "gzip": _gzip}


@lru_cache(maxsize=32)
def choose_coding(accept_encoding: str) -> str | None:
    """Choose the coding with the highest quality value, the better one of equals; None for an answer as it is."""
    wanted: dict[str, float] = {}
    for item in accept_encoding.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        quality = next((each[2:] for each in parameters if each.startswith("q=")), "1")
        try:
            wanted[name.removeprefix("x-")] = float(quality)
        except ValueError:
            wanted[name] = 0.0
    rest = wanted.get("*", 0.0)
    offers = [(wanted.get(name, rest), -place, name) for place, name in enumerate(CODINGS)]
    best, _, name = max(offers)
    return name if best > 0 and best >= wanted.get("identity", 0.0) else None


async def compress(body: bytes, accept_encoding: str, headers: dict[str, str]) -> bytes:
    """Compress a long answer if its client accepts that.

    Args:
        body: the answer.
        accept_encoding: the header of the request, empty without one.
        headers: of the response; those of the coding are added.
    """
    headers["vary"] = "accept-encoding"
    if len(accept_encoding) > _LONGEST_HEADER_CHARS:
        return body
    coding = choose_coding(accept_encoding)
    if coding is None:
        return body
    packed = await run_beside_loop(len(body), CODINGS[coding], 0, body)
    headers["content-encoding"] = coding
    return packed
