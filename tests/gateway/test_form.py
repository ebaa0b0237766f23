"""Forms are split in place."""

from __future__ import annotations

import pytest

from serve.errors import BadRequest, FrameTooLarge
from serve.gateway.form import read_form

KIND = "multipart/form-data; boundary=b"


def part(name: str, content: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


def test_fields_and_files_come_in_order_and_files_are_views():
    body = part("a", b"1") + part("f", b"\0\r\n\xff", '; filename="x"') + part("é", b"") + b"--b--\r\n"
    texts, files = read_form(body, KIND, 10)
    assert texts == [("a", "1"), ("é", "")]
    ((name, content),) = files
    assert (name, bytes(content)) == ("f", b"\0\r\n\xff") and content.obj is body


def test_as_many_parts_as_allowed_are_read():
    body = b"".join(part("a", b"1") for _ in range(5)) + b"--b--\r\n"
    assert len(read_form(body, KIND, 5)[0]) == 5
    with pytest.raises(FrameTooLarge):
        read_form(body, KIND, 4)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        part("a", b"1"),
        b"--b\r\n\r\n\r\n--b--\r\n",
        part("a", b"\xff") + b"--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n--b--\r\n',
    ],
)
def test_broken_form_is_refused(body):
    with pytest.raises(BadRequest):
        read_form(body, KIND, 5)


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", KIND + "ä" * 80, KIND + ";" * 2000]
)
def test_boundary_that_is_none_is_refused(kind):
    with pytest.raises(BadRequest):
        read_form(part("a", b"1") + b"--b--\r\n", kind, 5)


def test_long_text_field_is_refused():
    with pytest.raises(FrameTooLarge):
        read_form(part("a", b"1" * 70_000) + b"--b--\r\n", KIND, 5)
