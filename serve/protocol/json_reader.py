"""Bounded reading of JSON that a client sent: bytes, values and depth are limited before anything is built.

`orjson` parses. It is strict (no NaN, no lone surrogates, numbers of 64 bits), and holds the interpreter while it runs,
in proportion to the length of the text and the number of its values; both are limited first, so that one call takes a
few ten milliseconds at the most. Strings over `LONG_TEXT_BYTES`, as the base64 of a frame is, are cut out before: they
do not count towards the text, are not copied, and are decoded piece by piece (`LongText`).
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from serve.errors import BadRequest, FrameTooLarge

__all__ = ["JsonBounds", "LongText", "decode_base64", "decode_text", "read_json"]

LONG_TEXT_BYTES = 64 * 1024
_PIECE_BYTES = 1 << 20
_BACKSLASH = b"\\"
# A string and the colon after it, if it is the name of a member.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"\s*+(:)?', re.DOTALL)
# Characters of base64 as some libraries escape them.
_ESCAPED = (
    (rb"\/", b"/"),
    *((rb"\u00" + code, bytes.fromhex(code.decode())) for code in (b"2b", b"2B", b"2f", b"2F", b"3d", b"3D")),
)
_ESCAPE_BYTES = len(rb"\u003d")
_CONTAINERS = frozenset((list, dict))
# Stands for a long string while the rest is parsed; random, so that no body holds it.
_MARK = secrets.token_hex(16)


@dataclass(frozen=True)
class JsonBounds:
    """Upper bounds on a JSON document.

    Attributes:
        max_values: values in it: elements of lists, members of objects.
        max_objects: strings, names, lists and objects in it; each takes ten times as long as a number.
        max_bytes: length, not counting strings over 64 KiB without a quote in them, as base64 is.
        max_depth: lists and objects within each other; a calibration of cameras in a list of frames takes seven.
    """

    max_values: int = 500_000
    max_objects: int = 50_000
    max_bytes: int = 10 << 20
    max_depth: int = 32


class LongText:
    """A long JSON string, still escaped: the bytes from `start` to `end` of a document."""

    __slots__ = ("_document", "_end", "_start")

    def __init__(self, document: bytes | bytearray, start: int, end: int) -> None:
        self._document, self._start, self._end = document, start, end

    def __len__(self) -> int:
        return self._end - self._start

    def __repr__(self) -> str:
        return f"a text of {len(self)} bytes"

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yield the text in pieces of bounded length; none ends within an escape that base64 may have."""
        at = self._start
        while at < self._end:
            stop = min(at + _PIECE_BYTES, self._end)
            if stop < self._end:
                escape = self._document.rfind(_BACKSLASH, stop - _ESCAPE_BYTES + 1, stop)
                stop = stop if escape < 0 else escape
            yield self._document[at:stop]
            at = stop

    def unescape(self) -> str:
        """Return the text.

        Raises:
            BadRequest: it is not UTF-8, or has an invalid escape.
        """
        text: str = _parse(self._document[self._start - 1 : self._end + 1])
        return text


def read_json(body: bytes | bytearray | memoryview, bounds: JsonBounds) -> Any:
    """Parse a document; strings over 64 KiB in it become `LongText`.

    Raises:
        BadRequest: it is not JSON, nested too deeply, or an object has two members of one name.
        FrameTooLarge: more values or bytes than `bounds` allow.
    """
    document = body if isinstance(body, bytes | bytearray) else bytes(body)
    long: dict[str, LongText] = {}
    if len(document) <= LONG_TEXT_BYTES:
        _check_bytes(len(document), bounds.max_bytes)
        text = document
    else:
        text = _cut_long_texts(document, bounds.max_bytes, long)
    if len(text) > bounds.max_values:  # else it cannot hold more
        values = 1 + text.count(b",") + text.count(b"[") + text.count(b"{")
        if values > bounds.max_values:
            raise FrameTooLarge(
                f"the JSON has about {values} values, the limit is {bounds.max_values} (max_json_values); send numbers "
                "as bytes"
            )
    if len(text) > bounds.max_objects:
        objects = text.count(b'"') // 2 + text.count(b"[") + text.count(b"{")
        if objects > bounds.max_objects:
            raise FrameTooLarge(
                f"the JSON has about {objects} strings, names, lists and objects, the limit is {bounds.max_objects}; "
                "send numbers in one list, or as bytes"
            )
    parsed = [_parse(text)]
    members = _walk(parsed, bounds.max_depth, long)
    if text.count(b":") > members and _count_names(text) > members:
        raise BadRequest("an object in the JSON has two members of the same name; send each once")
    return parsed[0]


def decode_base64(text: str | LongText) -> bytes | bytearray:
    """Decode base64; a long text piece by piece, so that other threads run in between.

    Raises:
        ValueError: it is not base64.
    """
    if isinstance(text, str):
        return _decode_groups(text.encode())
    decoded = bytearray()
    rest: bytes | bytearray = b""
    is_padded = False
    for piece in text.pieces():
        if is_padded:
            raise binascii.Error("Excess data after padding")
        if _BACKSLASH in piece:
            for escaped, character in _ESCAPED:
                piece = piece.replace(escaped, character)
        rest = rest + piece if rest else piece
        whole = len(rest) // 4 * 4
        found = _decode_groups(rest[:whole])
        is_padded = len(found) < whole // 4 * 3
        decoded += found
        rest = rest[whole:]
    if rest:
        raise binascii.Error("Incorrect padding")
    return decoded


def decode_text(text: str | LongText, max_bytes: int) -> bytes:
    """Return a string's UTF-8.

    Raises:
        FrameTooLarge: a long text of more than `max_bytes`.
        BadRequest: a long text with an invalid escape or character.
    """
    if isinstance(text, str):
        return text.encode()
    if len(text) > max_bytes:
        raise FrameTooLarge(f"the JSON has {text!r}, the limit is {max_bytes}; send it as base64 or as bytes")
    return text.unescape().encode()


def _decode_groups(text: bytes | bytearray) -> bytes:
    """Decode whole groups of four characters; the strict mode lets pass what exceeds the padding of the last."""
    found = binascii.a2b_base64(text, strict_mode=True)
    if len(text) % 4 or len(found) < len(text) // 4 * 3 - 2:
        raise binascii.Error("Incorrect padding")
    return found


def _parse(text: bytes | bytearray) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"cannot parse the JSON: {str(error)[:200]}") from None


def _check_bytes(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise FrameTooLarge(
            f"the JSON has {nbytes} bytes without its base64, the limit is {max_bytes} (max_json_bytes); send numbers "
            "as bytes"
        )


def _cut_long_texts(
    document: bytes | bytearray, max_bytes: int, long: dict[str, LongText]
) -> bytes | bytearray:
    """Return the document with a mark in place of every long string, which `long` then has by its mark.

    A string that holds a quote is left as it is, so that nothing has to be tokenized: a long string is what is between
    two quotes, unless the first of them ends a string.
    """
    chunks: list[bytes | bytearray] = []
    copied = at = 0
    while at < len(document):
        stop = at + LONG_TEXT_BYTES // 2  # of the blocks of this length, a long string fills at least one
        if document.find(b'"', at, stop) >= 0:
            at = stop
            continue
        start, end = document.rfind(b'"', copied, at), document.find(b'"', stop)
        if end < 0:
            break
        if start >= 0 and end - start > LONG_TEXT_BYTES and _is_string(document, start, end):
            mark = f"{_MARK}.{len(long)}"
            long[mark] = LongText(document, start + 1, end)
            chunks += (document[copied : start + 1], mark.encode())
            copied = end
        at = end + 1
    _check_bytes(len(document) - sum(map(len, long.values())), max_bytes)
    if not long:
        return document
    chunks.append(document[copied:])
    return b"".join(chunks)


def _is_string(document: bytes | bytearray, start: int, end: int) -> bool:
    """Return whether the text between two neighbouring quotes of a valid document is a string."""
    if document[start - 1 : start] == _BACKSLASH or document[end - 1] == 0x5C:
        return False  # an escaped quote
    # After the end of a string follows one of these; the text between may also be nothing but white space.
    return document[start + 1 : start + 1 + LONG_TEXT_BYTES].lstrip(b" \t\r\n")[:1] not in (
        b"",
        b":",
        b",",
        b"]",
        b"}",
    )


def _walk(parsed: list[Any], max_depth: int, long: dict[str, LongText]) -> int:
    """Check the depth of ``parsed[0]``, put the long texts in their places; return the number of members."""
    containers: list[Any] = [parsed]
    members, depth, left = 0, -1, len(long)
    while containers:
        depth += 1
        if depth > max_depth:
            raise BadRequest(f"the JSON is nested more than {max_depth} deep")
        deeper: list[Any] = []
        for container in containers:
            is_object = type(container) is dict
            members += len(container) * is_object
            if left:
                for key, value in list(container.items() if is_object else enumerate(container)):
                    if type(value) is str and value in long:
                        container[key] = long[value]
                        left -= 1
            values = container.values() if is_object else container
            if not _CONTAINERS.isdisjoint(
                map(type, values)
            ):  # mostly numbers, which this passes over quickly
                deeper += [value for value in values if type(value) in _CONTAINERS]
        containers = deeper
    if left:
        raise BadRequest(f"a name in the JSON is longer than {LONG_TEXT_BYTES} bytes")
    return members


def _count_names(text: bytes | bytearray) -> int:
    """Return how many strings are names of members, equal ones too."""
    return sum(1 for found in _STRING.finditer(text) if found[1])
