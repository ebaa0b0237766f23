"""Frames in JSON: inline, by reference, one or many.

``{"b64": …}``, ``{"points": {"b64": …}, …}`` (see `serve.protocol.frames.read_json_frame`), ``{"uri": "s3://…"}`` in the place of
any ``{"b64": …}``, and ``{"frames": [one of these, …]}`` for many. Whether an address may be read is `References`'
to say; it is off unless the operator lists prefixes. What is wrong with one of many frames is its own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson

from serve.errors import BadRequest, FrameTooLarge, ServeError
from serve.gateway.admission import Permit
from serve.gateway.backend import EncodedFrame
from serve.protocol.batch import Body
from serve.protocol.frames import is_part, read_json_frame
from serve.storage.references import References

__all__ = ["read_frames"]


async def read_frames(
    body: bytes, references: References, permit: Permit, most: int
) -> tuple[list[EncodedFrame | ServeError], bool]:
    """All frames of a JSON body, and whether it was a list of them.

    Args:
        body: the request's body.
        references: reads addresses.
        permit: grows with what they hold.
        most: largest number of frames.

    Raises:
        BadRequest: not JSON, or not one of these shapes.
        FrameTooLarge: more than `most` frames.
        ServeError: what is wrong with the only frame.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is declared as JSON but does not parse: {error}") from None
    if not isinstance(document, Mapping) or "frames" not in document:
        return [await _frame(document, references, permit)], False
    listed = document["frames"]
    if not isinstance(listed, list) or not listed:
        raise BadRequest('"frames" must be a list of frames, each {"b64": …} or {"uri": …}')
    if len(listed) > most:
        raise FrameTooLarge(f"the request has {len(listed)} frames, the limit is {most}")
    common = {name: value for name, value in document.items() if name != "frames"}
    return list(await asyncio.gather(*(_one_of(each, common, references, permit) for each in listed))), True


async def _one_of(
    document: Any, common: Mapping[str, Any], references: References, permit: Permit
) -> EncodedFrame | ServeError:
    try:
        frame = await _frame(document, references, permit)
    except ServeError as error:
        return error
    return EncodedFrame(frame.body, {**common, **frame.options})


async def _frame(document: Any, references: References, permit: Permit) -> EncodedFrame:
    if not isinstance(document, Mapping):
        return EncodedFrame(*read_json_frame(document))
    if "uri" in document:
        if "b64" in document or any(map(is_part, document)):
            raise BadRequest('"uri" stands for the frame; leave out "b64" and parts')
        options = {name: value for name, value in document.items() if name != "uri"}
        return EncodedFrame(await _fetch(document["uri"], references, permit), options)
    addresses = {
        name: value["uri"]
        for name, value in document.items()
        if is_part(name) and isinstance(value, Mapping) and set(value) == {"uri"}
    }
    if not addresses:
        return EncodedFrame(*read_json_frame(document))
    fetched = await asyncio.gather(*(_fetch(uri, references, permit) for uri in addresses.values()))
    inline = {name: value for name, value in document.items() if name not in addresses}
    parts: Body = {}
    if any(map(is_part, inline)):
        parts, inline = read_json_frame(inline)
    assert isinstance(parts, Mapping)
    return EncodedFrame({**parts, **dict(zip(addresses, fetched, strict=True))}, inline)


async def _fetch(uri: Any, references: References, permit: Permit) -> bytes:
    data = await references.fetch(uri)
    permit.grow(nbytes=len(data))
    return data
