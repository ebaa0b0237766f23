"""JSON request bodies to frames: inline or by URI, one or many.

A frame is ``{"b64": …}``, or an object of parts (`serve.protocol.json_bodies.read_json_frame`). ``{"uri": "s3://…"}``
may replace any ``{"b64": …}``; `References` decides which URIs may be read, none unless the operator lists prefixes.
``{"frames": [frame, …]}`` holds several frames, each with its own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import BadRequest, FrameTooLarge, ServeError
from serve.gateway.admission import Permit
from serve.gateway.offload import run_beside_loop
from serve.protocol.batch import MAX_PARTS, Body, Bytes, RawFrame
from serve.protocol.frame_spec import is_part
from serve.protocol.json_bodies import read_json_frame
from serve.protocol.json_reader import JsonBounds, read_json
from serve.protocol.sweeps import list_sweeps
from serve.storage.references import References

__all__ = ["read_frames"]


@dataclass(frozen=True)
class _Draft:
    """A frame that may have bytes still to be fetched.

    Attributes:
        body: its bytes, those of its parts by name, or None if `uris` has them.
        options: its options.
        uris: URIs of parts by name; of the whole frame under the name "".
    """

    body: Body | None
    options: Mapping[str, Any]
    uris: Mapping[str, Any] = field(default_factory=dict)


async def read_frames(
    body: bytes | bytearray, references: References, permit: Permit, max_frames: int, bounds: JsonBounds
) -> tuple[list[RawFrame | ServeError], bool]:
    """Read all frames of a JSON body; returns them and whether the body was a list.

    Args:
        body: the request's body; a long one is read in a thread.
        references: reads URIs.
        permit: grows by the size of the objects read.
        max_frames: maximum number of frames.
        bounds: of the document.

    Raises:
        BadRequest: the body is not JSON, or has none of these shapes.
        FrameTooLarge: more than `max_frames` frames, or beyond `bounds`.
        ServeError: the error of the frame if it is the only one.
    """
    drafts, many = await run_beside_loop(len(body), _read_drafts, len(body), body, max_frames, bounds)
    if not many:
        (only,) = drafts
        if isinstance(only, ServeError):
            raise only
        return [await _fetch_all(only, references, permit)], False
    return list(await asyncio.gather(*(_complete(draft, references, permit) for draft in drafts))), True


def _read_drafts(
    body: bytes | bytearray, max_frames: int, bounds: JsonBounds
) -> tuple[list[_Draft | ServeError], bool]:
    document = read_json(body, bounds)
    if not isinstance(document, dict) or "frames" not in document:
        return [_read_draft(document, {})], False
    listed = document["frames"]
    if not isinstance(listed, list) or not listed:
        raise BadRequest('"frames" must be a list of frames, each {"b64": …} or {"uri": …}')
    if len(listed) > max_frames:
        raise FrameTooLarge(f"the request has {len(listed)} frames, the limit is {max_frames}")
    common = {name: value for name, value in document.items() if name != "frames"}
    return [_read_draft(entry, common) for entry in listed], True


def _read_draft(document: Any, common: Mapping[str, Any]) -> _Draft | ServeError:
    try:
        draft = _split(document)
    except ServeError as error:
        return error
    return _Draft(draft.body, {**common, **draft.options}, draft.uris)


def _split(document: Any) -> _Draft:
    """Divide a frame into its bytes, its options, and the URIs of what is not inline."""
    if not isinstance(document, dict):
        return _Draft(*read_json_frame(document))
    if "uri" in document:
        if "b64" in document or any(is_part(*each) for each in document.items()):
            raise BadRequest('"uri" replaces the frame; remove "b64" and parts')
        options = {name: value for name, value in document.items() if name != "uri"}
        return _Draft(None, options, {"": document["uri"]})
    document = list_sweeps(document)
    uris = {
        name: value["uri"]
        for name, value in document.items()
        if is_part(name) and isinstance(value, Mapping) and set(value) == {"uri"}
    }
    if not uris:
        return _Draft(*read_json_frame(document))
    if len(uris) > MAX_PARTS:
        raise FrameTooLarge(f"the frame has {len(uris)} parts, the limit is {MAX_PARTS}")
    inline = {name: value for name, value in document.items() if name not in uris}
    if any(is_part(*each) for each in inline.items()):
        return _Draft(*read_json_frame(inline), uris)
    return _Draft({}, inline, uris)


async def _complete(
    draft: _Draft | ServeError, references: References, permit: Permit
) -> RawFrame | ServeError:
    if isinstance(draft, ServeError):
        return draft
    try:
        return await _fetch_all(draft, references, permit)
    except ServeError as error:
        return error


async def _fetch_all(draft: _Draft, references: References, permit: Permit) -> RawFrame:
    if draft.body is None:
        return RawFrame(await _fetch(draft.uris[""], references, permit), draft.options)
    if not draft.uris:
        return RawFrame(draft.body, draft.options)
    fetched = await asyncio.gather(*(_fetch(uri, references, permit) for uri in draft.uris.values()))
    parts: dict[str, Bytes] = dict(draft.body) if isinstance(draft.body, Mapping) else {}
    return RawFrame({**parts, **dict(zip(draft.uris, fetched, strict=True))}, draft.options)


async def _fetch(uri: Any, references: References, permit: Permit) -> bytes:
    data = await references.fetch(uri)
    permit.grow(nbytes=len(data))
    return data
