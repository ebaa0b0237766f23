"""Forms (``multipart/form-data``, RFC 7578) to fields and files; nothing is copied, and nothing written to disk."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import BadRequest, FrameTooLarge, quote

__all__ = ["read_form"]

_MAX_CONTENT_TYPE_BYTES = 1024
_MAX_TEXT_BYTES = 64 * 1024
# RFC 2046, 5.1.1.
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


@dataclass
class _Part:
    """One part while it is read: its header, and where its content lies."""

    name: str = ""
    is_file: bool = False
    start: int = 0
    end: int = 0
    disposition: bytes = b""
    header: tuple[bytes, bytes] = (b"", b"")


@dataclass
class _Parts:
    """Callbacks of the parser over a whole body, which is passed to it at once."""

    found: list[_Part] = field(default_factory=list)
    is_ended: bool = False

    def on_part_begin(self) -> None:
        self.found.append(_Part())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.found[-1].header = (data[start:end], b"")

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.found[-1].header = (self.found[-1].header[0], data[start:end])

    def on_header_end(self) -> None:
        part = self.found[-1]
        if part.header[0].lower() == b"content-disposition":
            part.disposition = part.header[1]

    def on_headers_finished(self) -> None:
        part = self.found[-1]
        _, options = parse_options_header(part.disposition)
        if b"name" not in options:
            raise BadRequest("cannot parse the form: a part has no name in its Content-Disposition")
        part.name, part.is_file = _text(options[b"name"], "the name of a part"), b"filename" in options

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.found[-1]
        part.start, part.end = (start if part.end == 0 else part.start), end

    def on_end(self) -> None:
        self.is_ended = True


def read_form(
    body: bytes, content_type: str, max_parts: int
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
    # Also counts what only looks like a delimiter, on which the parser spends time in Python.
    delimiter, at = b"--" + boundary, 0
    for _ in range(max_parts + 2):
        at = body.find(delimiter, at) + len(delimiter)
        if at < len(delimiter):
            break
    else:
        raise FrameTooLarge(f"the form has more than {max_parts} parts")
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
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"cannot parse the form: {str(error)[:200]}") from None
    if not parts.is_ended:
        raise BadRequest("cannot parse the form: it ends before its last boundary")
    view = memoryview(body)
    texts: list[tuple[str, str]] = []
    files: list[tuple[str, memoryview]] = []
    for part in parts.found:
        if part.is_file:
            files.append((part.name, view[part.start : part.end]))
        elif part.end - part.start > _MAX_TEXT_BYTES:
            raise FrameTooLarge(
                f"the field {quote(part.name)} has {part.end - part.start} bytes, the limit is {_MAX_TEXT_BYTES}; "
                "send it as a file (with a filename)"
            )
        else:
            texts.append((part.name, _text(body[part.start : part.end], f"the field {quote(part.name)}")))
    return texts, files


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
