"""Socket protocol between the gateway and a worker: messages, bounds, and the words for what travels.

An *encoded frame* is bytes with parsed options, a *frame* (`serve.protocol.frames.Frame`) is decoded, an *outcome* is
the answer to one frame or its error. A worker listens on a Unix socket, `socket_path`. All integers are little-endian.

1. On accept the worker sends `HELLO`. No hello means that it is full or hung; another one, that it speaks another
   version of this protocol.
2. The gateway sends a batch: `BATCH_HEADER` (length in bytes, uint64; compute limit in whole seconds, uint32, 0 for
   none), then a framed batch of that length (`batch_chunks`).
3. While it waits, it may send `cancel_message(i)`, a head of length 0: frame `i` of the batch needs no outcome any
   more. Without a batch in progress the worker ignores it.
4. The worker answers with `LENGTH` (uint64) and framed outcomes of that length. Length 0 means that it could not
   answer; the gateway then sends the batch through TorchServe, which reports the reason.

Steps 2 to 4 repeat until one side closes the connection. `serve.gateway.worker_client` is one end,
`serve.worker.server` the other; both receive with a `MessageReader`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from serve.errors import BadRequest, InferenceFailed, ServeError, error_body, quote
from serve.protocol.batch import (
    Body,
    Bytes,
    Outcomes,
    body_bytes,
    body_chunks,
    frame_entry,
    join_entries,
    pack_outcomes,
    unpack_frames,
)
from serve.protocol.json_bodies import encode_json
from serve.protocol.options import DEFAULT_OPTIONS, FrameOptions

__all__ = [
    "BATCH_HEADER",
    "GREETING",
    "HELLO",
    "LENGTH",
    "MAX_BATCH_FRAMES",
    "MAX_MESSAGE_BYTES",
    "Batch",
    "EncodedFrame",
    "MessageReader",
    "ObservedAnswer",
    "Outcome",
    "ProtocolError",
    "batch_chunks",
    "cancel_message",
    "encode_outcome",
    "read_batch",
    "socket_path",
    "write_outcomes",
]

BATCH_HEADER = struct.Struct("<QI")  # bytes, seconds
LENGTH = struct.Struct("<Q")  # bytes
GREETING = b"mmdet3d-serve worker 2"
HELLO = LENGTH.pack(len(GREETING)) + GREETING
MAX_MESSAGE_BYTES = (1 << 31) - 1  # TorchServe's own limit
MAX_BATCH_FRAMES = 4096

# The answer to one frame as a dictionary, or its error.
Outcome = dict[str, Any] | ServeError


class ObservedAnswer(dict[str, Any]):
    """Answer with what is counted of its frame, which is no part of its JSON.

    Attributes:
        observed: whatever `serve.worker.handler.Handler.count` takes.
    """

    def __init__(self, answer: Mapping[str, Any], observed: Any) -> None:
        super().__init__(answer)
        self.observed = observed


_DEFAULTS = {each.name: each.default for each in fields(FrameOptions)}


class ProtocolError(Exception):
    """The other end sent what it must not; the connection is of no use any more."""


def socket_path(folder: Path, pid: int) -> Path:
    """Path of the socket on which the worker with process id `pid` listens."""
    return folder / f"{pid}.sock"


@dataclass
class EncodedFrame:
    """One frame as it was received. What cannot be sent to a worker fails here, and not with its batch.

    Attributes:
        body: its bytes, or those of its parts by name; what arrived of it first, if it has a `rest`.
        options: its options.
        rest: what arrived later, in pieces: they are sent as they are, and joined only for a reader (`join`).
        nbytes: its size, all parts together.
        entry: its line in the header of a framed batch.

    Raises:
        BadRequest: a name of a part or an option cannot be encoded.
    """

    body: Body
    options: FrameOptions = DEFAULT_OPTIONS
    rest: Sequence[Bytes] = ()
    nbytes: int = field(init=False, repr=False, compare=False)
    entry: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        options = (
            {}
            if self.options is DEFAULT_OPTIONS
            else {
                name: value
                for name, default in _DEFAULTS.items()
                if (value := getattr(self.options, name)) != default
            }
        )
        self.nbytes = body_bytes(self.body) + sum(map(len, self.rest))
        self.entry = frame_entry(self.body, options, self.nbytes)

    def join(self) -> Body:
        """Return the whole body, in one piece per part."""
        if self.rest:
            self.body, self.rest = b"".join([*body_chunks(self.body), *self.rest]), ()
        return self.body


@dataclass
class Batch:
    """Frames to answer together.

    Attributes:
        frames: the frames; in place of an invalid one, its error.
        compute_s: seconds of decoding or of computing after which the worker ends itself; 0 for no limit.
        cancelled: returns the positions of the frames that need no outcome any more; called between frames.
    """

    frames: Sequence[EncodedFrame | ServeError]
    compute_s: float = 0
    cancelled: Callable[[], Collection[int]] = frozenset


def batch_chunks(frames: Sequence[EncodedFrame]) -> list[Bytes]:
    """Build the framed batch of some frames, as chunks that are not joined; it cannot fail."""
    return join_entries(
        [frame.entry for frame in frames],
        (chunk for frame in frames for chunk in (*body_chunks(frame.body), *frame.rest)),
    )


def read_batch(body: Bytes) -> list[EncodedFrame | ServeError]:
    """Read a framed batch of a gateway, which has parsed the options.

    Args:
        body: the framed batch; the frames are views of it.

    Raises:
        BadRequest: the body is not a framed batch.
        FrameTooLarge: more than `MAX_BATCH_FRAMES`, or too long a header.
    """
    return [_read_frame(payload, options) for payload, options in unpack_frames(body, MAX_BATCH_FRAMES)]


def _read_frame(body: Body, options: Mapping[str, Any]) -> EncodedFrame | ServeError:
    try:
        return EncodedFrame(body, FrameOptions(**{name: _freeze(value) for name, value in options.items()}))
    except (ServeError, TypeError) as error:
        return error if isinstance(error, ServeError) else BadRequest(f"unknown options: {quote(options)}")


def _freeze(value: Any) -> Any:
    """Return a value of an option as it was before it was JSON."""
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def encode_outcome(outcome: Outcome, request_id: str | None = None) -> tuple[int, bytes]:
    """Encode an outcome as HTTP status and JSON; one that cannot be encoded becomes `InferenceFailed`.

    Args:
        outcome: the outcome.
        request_id: id for the body of an error; None to leave it out.
    """
    try:
        return _encode_outcome(outcome, request_id)
    except Exception as error:
        # An object that JSON lacks, a lone surrogate in a name, an error without a text.
        failed = InferenceFailed(f"the outcome of this frame cannot be encoded ({type(error).__name__})")
        return _encode_outcome(failed, request_id)


def _encode_outcome(outcome: Outcome, request_id: str | None) -> tuple[int, bytes]:
    if isinstance(outcome, ServeError):
        return outcome.status, encode_json(error_body(outcome, request_id))
    return 200, encode_json(outcome)


def write_outcomes(
    outcomes: Sequence[Outcome], seconds: Mapping[str, float], observed: Mapping[str, Any] | None = None
) -> bytes:
    """Build the framed outcomes of a batch.

    Args:
        outcomes: the outcomes, in the order of the frames.
        seconds: duration of each stage.
        observed: counts of the frames that were answered, together.
    """
    return pack_outcomes(Outcomes([encode_outcome(outcome) for outcome in outcomes], dict(seconds), observed))


def cancel_message(index: int) -> bytes:
    """Build the message that frame `index` of the batch in progress needs no outcome any more."""
    return BATCH_HEADER.pack(0, index)


class MessageReader:
    """Reads messages of a head and a body into memory that is allocated once the length is known and allowed.

    Receive into `buffer`, then pass the number of bytes to `advance`, which returns a message once it is complete.

    Args:
        head: layout of the head, whose first field is the length of the body.
        reuse: keep the memory of a body for the next one; its view is valid until then.
        max_bytes: maximum length of a body.
    """

    # Memory that one connection keeps between two messages.
    _KEPT_BYTES = 64 << 20

    def __init__(
        self, head: struct.Struct, *, reuse: bool = False, max_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        self._head = head
        self._reuse = reuse
        self._max_bytes = max_bytes
        self._head_view = memoryview(bytearray(head.size))
        self._store = bytearray()
        self._body: memoryview | None = None  # None while the head is read
        self._free = self._head_view

    @property
    def buffer(self) -> memoryview:
        """Memory for the next bytes; never empty."""
        return self._free

    def advance(self, nbytes: int) -> tuple[tuple[int, ...], memoryview] | None:
        """Take note of `nbytes` received into `buffer`; return the fields of the head and the body once complete.

        Raises:
            ProtocolError: the length is over the maximum.
        """
        self._free = self._free[nbytes:]
        if self._free:
            return None
        values = self._head.unpack(self._head_view)
        if self._body is None:
            self._body = self._allocate(values[0])
            self._free = self._body
            if self._free:
                return None
        body, self._body, self._free = self._body, None, self._head_view
        return values, body

    def _allocate(self, length: int) -> memoryview:
        if length > self._max_bytes:
            raise ProtocolError(f"a message of {length} bytes, the limit is {self._max_bytes}")
        if not self._reuse or length > self._KEPT_BYTES:
            return memoryview(bytearray(length))
        if len(self._store) < length:
            self._store = bytearray(length)
        return memoryview(self._store)[:length]
