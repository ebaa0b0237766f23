"""Route ``POST /ui/image``: an image file to JPEG, for the formats that no browser reads.

It computes nothing but what a worker does with every frame of that format (`serve.protocol.images`), within the same
limits, one file at a time, behind the keys.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from serve.errors import FrameTooLarge
from serve.gateway.openapi import errors
from serve.gateway.options import GatewayOptions
from serve.gateway.ui.points import read_file
from serve.protocol.batch import Bytes
from serve.settings import Limits

__all__ = ["router", "to_jpeg"]

_QUALITY = 92
_LONGEST_SIDE_PX = 65_500  # of a JPEG, for libjpeg


def to_jpeg(body: Bytes, limits: Limits) -> bytes:
    """Encode an image file anew, in its size, so that boxes need no scale; 16-bit and float samples as 8 bits.

    Args:
        body: the file, of any format that a model reads.
        limits: limits on pixels.

    Raises:
        UndecodableFrame: no image, or a corrupt one.
        FrameTooLarge: more pixels than the limits allow, or a side longer than a JPEG's.
    """
    import cv2

    from serve.protocol.images import decode_image

    pixels = decode_image(body, "color", "cv2", limits.max_pixels)
    height, width = pixels.shape[:2]
    if max(height, width) > _LONGEST_SIDE_PX:
        raise FrameTooLarge(
            f"the image has {width} x {height} pixels, a side of a JPEG at most {_LONGEST_SIDE_PX}; it cannot be shown"
        )
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()


def router(options: GatewayOptions, limits: Limits) -> APIRouter:
    """Create the route."""
    routes = APIRouter(tags=["page"])
    decoding = asyncio.Lock()  # pixels take many times the bytes that the request is admitted with

    @routes.post(
        "/ui/image",
        response_class=Response,
        responses={
            200: {
                "description": "The image as JPEG, in its size",
                "content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}},
            },
            **errors(400, 401, 408, 413, 422, 429),
        },
    )
    async def image(request: Request) -> Response:
        """Decode an image file (TIFF, JPEG 2000, PPM, PFM, HDR and others)."""
        body = await read_file(request, options, limits)
        async with decoding:
            return Response(await asyncio.to_thread(to_jpeg, body, limits), media_type="image/jpeg")

    return routes
