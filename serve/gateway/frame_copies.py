"""Bytes of frames that outlive their request.

A frame does not change once it is read, so that bytes of its own are shared. A frame of a request of several, or of
several parts, is a view, which keeps the whole body of its request in memory: it is copied. numpy copies, because it
releases the interpreter's lock and `bytes` does not: a thread that copies does not stop the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from serve.gateway.offload import QUICK_BYTES
from serve.protocol.batch import Body, Bytes
from serve.protocol.worker import EncodedFrame

__all__ = ["copy_views", "join_pieces", "needs_copy", "share_frame"]


def share_frame(frame: EncodedFrame) -> EncodedFrame:
    """Return a frame of the same bytes, whose pieces stay as they are when the other one's are joined."""
    return EncodedFrame(frame.body, frame.options, tuple(frame.rest))


def needs_copy(frame: EncodedFrame) -> bool:
    """Return whether a part of the frame is a view."""
    parts = frame.body.values() if isinstance(frame.body, Mapping) else (frame.body,)
    return any(isinstance(part, memoryview) for part in (*parts, *frame.rest))


def copy_views(frame: EncodedFrame) -> EncodedFrame:
    """Return a frame without views; long ones are to be copied in a thread."""
    return EncodedFrame(_copy_body(frame.body), frame.options, [_copy(piece) for piece in frame.rest])


def join_pieces(pieces: Sequence[Bytes]) -> Bytes:
    """Join pieces; long ones are to be joined in a thread."""
    if len(pieces) == 1:
        return pieces[0]
    if sum(map(len, pieces)) <= QUICK_BYTES:
        return b"".join(pieces)
    return np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces]).data


def _copy_body(body: Body) -> Body:
    return {name: _copy(part) for name, part in body.items()} if isinstance(body, Mapping) else _copy(body)


def _copy(part: Bytes) -> Bytes:
    if not isinstance(part, memoryview):
        return part
    return bytes(part) if len(part) <= QUICK_BYTES else np.frombuffer(part, np.uint8).copy().data
