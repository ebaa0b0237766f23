"""Route ``POST /ui/points``: a point-cloud file to float32, for the formats that the page has no reader for.

It computes nothing but what a worker does with every frame of that format (`serve.protocol.point_formats`), within the
same limits, behind the keys.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.gateway.middleware import permit_of
from serve.gateway.offload import run_beside_loop
from serve.gateway.openapi import errors
from serve.gateway.options import GatewayOptions
from serve.gateway.request import read_body
from serve.protocol.batch import Bytes
from serve.protocol.point_formats import read_point_file
from serve.protocol.point_signatures import sniff
from serve.settings import Limits

__all__ = ["read_columns", "read_file", "router"]

# What the page draws, in the order of the answer.
_SHOWN = ("x", "y", "z", "intensity", "red", "green", "blue")
_MOST_NUMBERED = 8


def read_columns(body: Bytes, limits: Limits) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Decode a point-cloud file.

    Args:
        body: the file, of any format with a signature.
        limits: limits on bytes and points.

    Returns:
        Names of the columns (numbers if the file does not name them), and (N, columns) float32, little-endian.

    Raises:
        UndecodableFrame: a ``.bin``, which has no signature, or no point cloud, or a corrupt one.
        FrameTooLarge: more points or bytes than the limits allow.
    """
    kind = sniff(body)
    if kind is None:
        raise UndecodableFrame(
            f"the file begins with {bytes(body[:8])!r}, which is no signature of npy, npz, PCD, PLY, LAS or LAZ; send "
            "one of these, or a .bin to the model itself"
        )
    table = read_point_file(body, kind, limits)
    names = tuple(name for name in _SHOWN if name in table.columns) or tuple(table.columns)[:_MOST_NUMBERED]
    points = np.empty((table.count, len(names)), "<f4")
    for place, name in enumerate(names):
        points[:, place] = table.columns[name]
    return names, points


async def read_file(request: Request, options: GatewayOptions, limits: Limits) -> Bytes:
    """Read a body that is one file, and count it as one frame until the request ends.

    Raises:
        FrameTooLarge: more bytes than a frame may have.
        Overloaded: a limit of pending frames or bytes would be exceeded.
    """
    permit = permit_of(request.scope)
    permit.check(items=1)
    body = await read_body(request, permit, options)
    permit.grow(items=1)
    if len(body) > limits.max_frame_bytes:
        raise FrameTooLarge(
            f"the frame has {len(body)} bytes, the limit is {limits.max_frame_bytes}; send a smaller one, or raise "
            "MMDET3D_SERVE_MAX_FRAME_BYTES"
        )
    return body


def router(options: GatewayOptions, limits: Limits) -> APIRouter:
    """Create the route."""
    routes = APIRouter(tags=["page"])

    @routes.post(
        "/ui/points",
        response_class=Response,
        responses={
            200: {
                "description": "Points as float32, row by row; X-Columns names their columns",
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            },
            **errors(400, 401, 408, 413, 422, 429),
        },
    )
    async def points(request: Request) -> Response:
        """Decode a point-cloud file (npy, npz, PCD, PLY, LAS or LAZ)."""
        body = await read_file(request, options, limits)
        names, decoded = await run_beside_loop(len(body), read_columns, len(body), body, limits)
        return Response(
            decoded.tobytes(), headers={"x-columns": ",".join(names)}, media_type="application/octet-stream"
        )

    return routes
