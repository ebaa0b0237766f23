"""JSON request bodies to frames: inline or by URI, one or many.

A frame is ``{"b64": …}``, or an object of parts (`serve.protocol.frames.read_json_frame`). ``{"uri": "s3://…"}`` may
replace any ``{"b64": …}``; `References` decides which URIs may be read, none unless the operator lists prefixes.
``{"frames": [frame, …]}`` holds several frames, each with its own error.
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
from serve.protocol.sweeps import list_sweeps
from serve.storage.references import References

__all__ = ["read_frames"]


async def read_frames(
    body: bytes, references: References, permit: Permit, max_frames: int
) -> tuple[list[EncodedFrame | ServeError], bool]:
    """Read all frames of a JSON body; returns them and whether the body was a list.

    Args:
        body: the request's body.
        references: reads URIs.
        permit: grows by the size of the objects read.
        max_frames: maximum number of frames.

    Raises:
        BadRequest: the body is not JSON, or has none of these shapes.
        FrameTooLarge: more than `max_frames` frames.
        ServeError: the error of the frame if it is the only one.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"cannot parse the body as JSON: {error}") from None
    if not isinstance(document, Mapping) or "frames" not in document:
        return [await _read_frame(document, references, permit)], False
    listed = document["frames"]
    if not isinstance(listed, list) or not listed:
        raise BadRequest('"frames" must be a list of frames, each {"b64": …} or {"uri": …}')
    if len(listed) > max_frames:
        raise FrameTooLarge(f"the request has {len(listed)} frames, the limit is {max_frames}")
    common = {name: value for name, value in document.items() if name != "frames"}
    return list(
        await asyncio.gather(*(_read_one(entry, common, references, permit) for entry in listed))
    ), True


async def _read_one(
    document: Any, common: Mapping[str, Any], references: References, permit: Permit
) -> EncodedFrame | ServeError:
    try:
        frame = await _read_frame(document, references, permit)
    except ServeError as error:
        return error
    return EncodedFrame(frame.body, {**common, **frame.options})


async def _read_frame(document: Any, references: References, permit: Permit) -> EncodedFrame:
    if not isinstance(document, Mapping):
        return EncodedFrame(*read_json_frame(document))
    if "uri" in document:
        if "b64" in document or any(is_part(*each) for each in document.items()):
            raise BadRequest('"uri" replaces the frame; remove "b64" and parts')
        options = {name: value for name, value in document.items() if name != "uri"}
        return EncodedFrame(await _fetch(document["uri"], references, permit), options)
    document = list_sweeps(document)
    uris = {
        name: value["uri"]
        for name, value in document.items()
        if is_part(name) and isinstance(value, Mapping) and set(value) == {"uri"}
    }
    if not uris:
        return EncodedFrame(*read_json_frame(document))
    fetched = await asyncio.gather(*(_fetch(uri, references, permit) for uri in uris.values()))
    inline = {name: value for name, value in document.items() if name not in uris}
    parts: Body = {}
    if any(is_part(*each) for each in inline.items()):
        parts, inline = read_json_frame(inline)
    assert isinstance(parts, Mapping)
    return EncodedFrame({**parts, **dict(zip(uris, fetched, strict=True))}, inline)


async def _fetch(uri: Any, references: References, permit: Permit) -> bytes:
    data = await references.fetch(uri)
    permit.grow(nbytes=len(data))
    return data
