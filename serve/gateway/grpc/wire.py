"""Fields of a protobuf message, without parsing it: long ones are taken out as views, and the rest is bounded.

A parsed message takes up to fifty times the memory of its bytes (an empty submessage has two), so the bounds come
before the parser. Format: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from serve.errors import BadRequest, FrameTooLarge

__all__ = ["MAX_FIELDS", "MAX_HEADER_BYTES", "split_message"]

MAX_FIELDS = 1024  # of a message, those of its submessages not counted
MAX_HEADER_BYTES = 1 << 20  # of all fields that are parsed
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


def split_message(message: memoryview, number: int) -> tuple[bytes, list[memoryview]]:
    """Split a message into the values of the bytes field `number`, as views, and a message of all other fields.

    Raises:
        BadRequest: the bytes are no protobuf message.
        FrameTooLarge: it has more than `MAX_FIELDS` fields, or over `MAX_HEADER_BYTES` besides field `number`.
    """
    found: list[memoryview] = []
    others: list[memoryview] = []
    others_bytes = fields = at = 0
    while at < len(message):
        fields += 1
        if fields > MAX_FIELDS:
            raise FrameTooLarge(f"the message has over {MAX_FIELDS} fields")
        begin = at
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _read_varint(message, at)
        elif kind in _FIXED_BYTES:
            at += _FIXED_BYTES[kind]
        elif kind == _LENGTH:
            length, at = _read_varint(message, at)
            at += length
            if tag >> 3 == number and at <= len(message):
                found.append(message[at - length : at])
                continue
        else:
            raise BadRequest("not a message of protobuf: a group, or an unknown wire type")
        if at > len(message):
            raise BadRequest("not a message of protobuf: it ends within a field")
        others.append(message[begin:at])
        others_bytes += at - begin
        if others_bytes > MAX_HEADER_BYTES:
            raise FrameTooLarge(
                f"the message has over {MAX_HEADER_BYTES} bytes besides raw_input_contents; send tensors there"
            )
    return b"".join(others), found


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read an integer of variable length; returns it and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BadRequest("not a message of protobuf: it ends within an integer, or the integer is too long")
