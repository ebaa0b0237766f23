"""Portable arbitrary maps (PAM, ``P7``): the header, and what of them OpenCV reads right.

OpenCV's reader trusts the header: where the kind of tuples contradicts their depth, it reads and writes beyond its
rows, and with an alpha channel it fills a part of every row. So the header is read strictly here, in one spelling, and
what OpenCV would get wrong is refused before it is asked.

Sources: the pages on Netpbm, and OpenCV's ``modules/imgcodecs/src/grfmt_pam.cpp``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from serve.errors import UndecodableFrame

__all__ = ["PamHeader", "check_pam", "read_pam_header"]

_MAX_HEADER_BYTES = 4096
_LINE = re.compile(rb"(WIDTH|HEIGHT|DEPTH|MAXVAL) ([0-9]{1,9})|(TUPLTYPE) ([A-Z_]{1,32})|#[^\r\n]*|")
#: Channels of the kinds of tuples that OpenCV converts right.
_CHANNELS = {b"GRAYSCALE": 1, b"RGB": 3}


class PamHeader(NamedTuple):
    """Fields of a header; `tuples` is empty if the kind is not given, `end` the offset of the samples."""

    width: int
    height: int
    depth: int
    maxval: int
    tuples: bytes
    end: int


def read_pam_header(body: memoryview) -> PamHeader:
    """Read the header of a PAM.

    Raises:
        ValueError: a field is missing, occurs twice, or is written in another way than ``NAME value``.
    """
    head, found, _ = bytes(body[:_MAX_HEADER_BYTES]).partition(b"\nENDHDR\n")
    lines = head.split(b"\n")
    if not found or lines[0] != b"P7":
        raise ValueError("a PAM without ENDHDR")
    fields: dict[bytes, bytes] = {}
    for line in lines[1:]:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"a PAM with the header line {line[:40]!r}")
        name, value = match[1] or match[3], match[2] or match[4]
        if name in fields:
            raise ValueError(f"a PAM with two lines of {name.decode()}")
        if name:
            fields[name] = value
    if missing := [
        name.decode() for name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL") if name not in fields
    ]:
        raise ValueError(f"a PAM without {missing[0]}")
    width, height, depth, maxval = (int(fields[name]) for name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"))
    return PamHeader(width, height, depth, maxval, fields.get(b"TUPLTYPE", b""), len(head) + len(found))


def check_pam(body: memoryview) -> None:
    """Check that a PAM is complete, and of a kind whose pixels OpenCV gives right.

    Raises:
        UndecodableFrame: it is neither.
    """
    header = read_pam_header(body)
    # Without a kind, OpenCV takes one by depth, but with 8 bits only.
    usual = {1: b"GRAYSCALE", 3: b"RGB"} if header.maxval < 256 else {}
    kind = header.tuples or usual.get(header.depth, b"")
    if _CHANNELS.get(kind) != header.depth or not 1 < header.maxval < 65536:
        raise UndecodableFrame(
            f"the PAM has {header.depth} channels of {header.tuples.decode() or 'no kind'} up to {header.maxval}; read "
            "are GRAYSCALE with DEPTH 1 and RGB with DEPTH 3, of 8 or 16 bits; send a PNG"
        )
    samples = header.width * header.height * header.depth * (1 if header.maxval < 256 else 2)
    if len(body) - header.end < samples:
        raise UndecodableFrame(
            f"the PAM is not complete ({samples} bytes of samples, {len(body) - header.end} are there); send the file "
            "unchanged"
        )
