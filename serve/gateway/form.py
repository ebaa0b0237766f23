"""Forms (``multipart/form-data``, RFC 7578) to fields and files; nothing is copied, and nothing written to disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import BadRequest, FrameTooLarge, quote

__all__ = ["read_form"]

_MAX_CONTENT_TYPE_BYTES = 1024
_MAX_TEXT_BYTES = 64 * 1024
# What the parser gets at once: it holds the interpreter while it looks for the boundary.
_PIECE_BYTES = 1 << 20
# RFC 2046, 5.1.1.
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


@dataclass
class _Part:
    """One part while it is read: its header, and where its content lies in the body."""

    name: str = ""
    is_file: bool = False
    start: int = 0
    length: int = 0
    disposition: bytes = b""
    header: tuple[bytes, bytes] = (b"", b"")


class _Parts:
    """Callbacks of the parser, which is passed the body in pieces: only positions are noted.

    Attributes:
        found: the parts.
        is_ended: whether the last boundary was found.
    """

    def __init__(self) -> None:
        self.found: list[_Part] = []
        self.is_ended = False
        self._piece = b""
        self._base = 0

    def begin_piece(self, piece: bytes, base: int) -> None:
        """Note the piece that the parser gets next, and its position."""
        self._piece, self._base = piece, base

    def on_part_begin(self) -> None:
        self.found.append(_Part())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        name, value = self.found[-1].header
        self.found[-1].header = (data[start:end], b"") if value else (name + data[start:end], b"")

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        name, value = self.found[-1].header
        self.found[-1].header = (name, value + data[start:end])

    def on_header_end(self) -> None:
        part = self.found[-1]
        name, value = part.header
        if name.lower() == b"content-disposition":
            part.disposition = value
        part.header = (b"", b"")

    def on_headers_finished(self) -> None:
        part = self.found[-1]
        _, options = parse_options_header(part.disposition)
        if b"name" not in options:
            raise BadRequest("cannot parse the form: a part has no name in its Content-Disposition")
        part.name, part.is_file = _text(options[b"name"], "the name of a part"), b"filename" in options

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.found[-1]
        if not part.length:
            # What only began like a boundary at the end of the last piece comes as bytes of its own.
            part.start = self._base + (start if data is self._piece else start - end)
        part.length += end - start

    def on_end(self) -> None:
        self.is_ended = True


def read_form(
    body: bytes | bytearray, content_type: str, max_parts: int
) -> tuple[list[tuple[str, str]], list[tuple[str, memoryview]]]:
    """Read a form.

    Args:
        body: the whole body.
        content_type: the header with the boundary.
        max_parts: maximum number of fields and files together.

    Returns:
        Names and texts of the fields, and names and contents of the files (views of `body`), in order.

    Raises:
        BadRequest: it is not a form, ends early, or has a field that is not UTF-8.
        FrameTooLarge: more parts, or a field of more than 64 KiB.
    """
    boundary = _read_boundary(content_type)
    _check_delimiters(body, b"--" + boundary, max_parts)
    parts = _Parts()
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.on_part_begin,
            "on_header_field": parts.on_header_field,
            "on_header_value": parts.on_header_value,
            "on_header_end": parts.on_header_end,
            "on_headers_finished": parts.on_headers_finished,
            "on_part_data": parts.on_part_data,
            "on_end": parts.on_end,
        },
    )
    try:
        for at in range(0, len(body), _PIECE_BYTES):
            piece = bytes(body[at : at + _PIECE_BYTES])
            parts.begin_piece(piece, at)
            parser.write(piece)
            if parts.is_ended:
                break
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"cannot parse the form: {str(error)[:200]}") from None
    if not parts.is_ended:
        raise BadRequest("cannot parse the form: it ends before its last boundary")
    view = memoryview(body)
    texts: list[tuple[str, str]] = []
    files: list[tuple[str, memoryview]] = []
    for part in parts.found:
        content = view[part.start : part.start + part.length]
        if part.is_file:
            files.append((part.name, content))
        elif part.length > _MAX_TEXT_BYTES:
            raise FrameTooLarge(
                f"the field {quote(part.name)} has {part.length} bytes, the limit is {_MAX_TEXT_BYTES}; "
                "send it as a file (with a filename)"
            )
        else:
            texts.append((part.name, _text(bytes(content), f"the field {quote(part.name)}")))
    return texts, files


def _check_delimiters(body: bytes | bytearray, delimiter: bytes, max_parts: int) -> None:
    """Bound the delimiters, and what only looks like one, on which the parser spends time in Python."""
    found = at = 0
    while at < len(body):
        stop = at + _PIECE_BYTES + len(delimiter) - 1
        next_at = body.find(delimiter, at, stop)
        if next_at < 0:
            at += _PIECE_BYTES
            continue
        found += 1
        at = next_at + len(delimiter)
        if found > max_parts + 1:
            raise FrameTooLarge(f"the form has more than {max_parts} parts")


def _read_boundary(content_type: str) -> bytes:
    if len(content_type) > _MAX_CONTENT_TYPE_BYTES:
        raise BadRequest(
            f"the Content-Type has {len(content_type)} characters, the limit is {_MAX_CONTENT_TYPE_BYTES}"
        )
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise BadRequest("the Content-Type of the form has no valid boundary")
    return boundary


def _text(value: bytes, what: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{what} is not UTF-8") from None
