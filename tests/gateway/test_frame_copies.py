"""Frames that outlive their request: shared where their bytes are their own, else copied without the lock."""

from __future__ import annotations

from typing import Any

import pytest

from serve.gateway.frame_copies import copy_views, join_pieces, needs_copy, share_frame
from serve.gateway.offload import QUICK_BYTES
from serve.protocol.worker import EncodedFrame

LONG = QUICK_BYTES + 7


@pytest.mark.parametrize("size", [0, 5, LONG])
@pytest.mark.parametrize("is_parts", [False, True])
def test_a_view_is_copied_and_lets_go_of_its_body(size: int, is_parts: bool) -> None:
    whole = bytearray(b"ab" * size)
    view = memoryview(whole)[size:]
    frame = EncodedFrame(
        {"points": view, "image": b"i"} if is_parts else view, rest=[] if is_parts else [view]
    )
    assert needs_copy(frame)
    copied = copy_views(frame)
    assert copied.nbytes == frame.nbytes and not any(each is view for each in copied.rest)
    expected = bytes(view)
    view.release()
    whole.clear()  # an error while anybody has a view of it
    body: Any = copied.body
    found = body["points"] if is_parts else body
    joined: Any = copied.join()
    assert bytes(found) == expected and (is_parts or bytes(joined) == 2 * expected)


@pytest.mark.parametrize("body", [b"x" * LONG, bytearray(LONG)])
def test_bytes_of_its_own_are_shared(body: Any) -> None:
    frame = EncodedFrame(body, rest=[body])
    assert not needs_copy(frame)
    shared = share_frame(frame)
    copied = copy_views(shared)
    assert copied.body is body and copied.rest[0] is body
    frame.join()
    assert shared.body is body and shared.nbytes == frame.nbytes == 2 * LONG


@pytest.mark.parametrize(
    "pieces", [[b"abc"], [b"a", bytearray(b"b"), memoryview(b"c")], [b"a" * LONG, b"", b"b"]]
)
def test_pieces_are_joined(pieces: list[Any]) -> None:
    assert bytes(join_pieces(pieces)) == b"".join(pieces)
