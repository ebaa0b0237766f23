"""JSON of clients is read within bounds; long texts stay where they are."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest

from serve.errors import BadRequest, ClientError, FrameTooLarge
from serve.protocol.json_reader import JsonBounds, LongText, decode_base64, decode_text, read_json

BOUNDS = JsonBounds()
RAW = os.urandom(300_000)
ENCODED = base64.b64encode(RAW).decode()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_long_base64_is_left_in_place_and_decoded(kind):
    body = kind(json.dumps({"score_thr": 0.5, "b64": ENCODED, "list": ["a", ENCODED]}).encode())
    document = read_json(body, BOUNDS)
    assert document["score_thr"] == 0.5 and isinstance(document["b64"], LongText)
    assert decode_base64(document["b64"]) == decode_base64(document["list"][1]) == RAW
    assert decode_text(document["b64"], 1 << 20) == ENCODED.encode()


def test_long_base64_does_not_count_towards_the_text():
    bounds = JsonBounds(max_bytes=1000)
    assert decode_base64(read_json(json.dumps(ENCODED).encode(), bounds)) == RAW
    with pytest.raises(FrameTooLarge):
        read_json(json.dumps([1] * 40_000).encode(), bounds)
    with pytest.raises(FrameTooLarge):
        read_json(json.dumps([1] * 400).encode(), bounds)


@pytest.mark.parametrize("character", ['"', "\\", "\U0001f600"])
def test_long_text_with_quotes_escapes_or_wide_characters_is_the_same_text(character):
    text = (character * 50 + "a" * 40_000) * 3
    found = read_json(json.dumps([text], ensure_ascii=False).encode(), BOUNDS)[0]
    assert (found.unescape() if isinstance(found, LongText) else found) == text


def test_text_over_its_bound_is_not_unescaped():
    (text,) = read_json(json.dumps(["a" * 100_000]).encode(), BOUNDS)
    with pytest.raises(FrameTooLarge):
        decode_text(text, 99_999)


def test_depth_is_bounded():
    assert read_json(nested(BOUNDS.max_depth), BOUNDS)
    with pytest.raises(BadRequest):
        read_json(nested(BOUNDS.max_depth + 1), BOUNDS)


@pytest.mark.parametrize(
    "document", [[1] * 1001, {f"{k}": 1 for k in range(1001)}, [[]] * 1001, ["a"] * 1001, [{"a": 1}] * 600]
)
def test_values_are_bounded(document: Any):
    with pytest.raises(FrameTooLarge):
        read_json(json.dumps(document).encode(), JsonBounds(max_values=1000, max_objects=1000))
    assert read_json(json.dumps(document).encode(), JsonBounds(max_values=2100, max_objects=4000)) == document


def test_strings_and_lists_are_bounded_more_strictly_than_numbers():
    bounds = JsonBounds(max_values=1000, max_objects=100)
    assert len(read_json(json.dumps([0.5] * 900).encode(), bounds)) == 900
    for document in (["a"] * 101, [[]] * 101, [{}] * 101):
        with pytest.raises(FrameTooLarge):
            read_json(json.dumps(document).encode(), bounds)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}',
        '{"b":{"a":":","a" :2}}',
        r'{"\"":1,"\"":2}',
        "NaN",
        "[Infinity]",
        "1e400",
        "1" + "0" * 400,
        r'"\ud800"',
        "",
        "{",
        '"a',
        "[1,]",
        "01",
        f'{{"{"a" * 70_000}":1}}',
        f'["{"a" * 70_000}',
        f'"{"a" * 70_000}" "b"',
    ],
)
def test_what_is_no_unambiguous_json_is_refused(text):
    with pytest.raises(BadRequest):
        read_json(text.encode(), BOUNDS)


def test_equal_names_in_different_objects_are_no_contradiction():
    text = r'[{"a":":","b":"x\":y"},{"a":": ","b":{"a":1}}]'
    assert read_json(text.encode(), BOUNDS) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["AAA", "AAAA=", "AA==AAAA", "AA=A", "A A A A ", "AAAÄ", "=", "A" * 70_001, "=" * 70_000]
)
def test_what_is_not_base64_is_refused(text):
    (found,) = read_json(json.dumps([text], ensure_ascii=False).encode(), BOUNDS)
    with pytest.raises(ValueError):
        decode_base64(found)


def test_body_that_is_not_utf8_is_a_client_error():
    with pytest.raises(ClientError):
        read_json(b'["\xff"]', BOUNDS)
