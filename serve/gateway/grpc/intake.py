"""Messages of calls on their way in: read within limits, and translated to requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from serve.errors import BadRequest, SlowRequest
from serve.gateway.admission import Permit
from serve.gateway.grpc.calls import HttpRequest
from serve.gateway.grpc.reading import ReadingSlots
from serve.gateway.grpc.running import RunningCall
from serve.gateway.offload import run_beside_loop
from serve.gateway.options import GatewayOptions

__all__ = ["Intake", "Message"]


class Intake:
    """Reads and translates messages, as many at a time as the limit of pending bytes has room for."""

    def __init__(self, options: GatewayOptions, message_bytes: int) -> None:
        """Take the limits from `options`; the largest message has `message_bytes` bytes."""
        self._options = options
        slots = max(1, options.max_pending_bytes // message_bytes)
        self._slots = ReadingSlots(slots, options.client_share)

    async def read(self, call: RunningCall, client: str) -> bytes:
        """Read the message of a call with one message.

        Raises:
            SlowRequest: it did not arrive in time.
            BadRequest: there is none.
        """
        try:
            async with asyncio.timeout(self._options.body_timeout_s), self._slots.hold(client):
                message = await call.context.read()
        except TimeoutError:
            raise SlowRequest(
                f"the message did not arrive within {self._options.body_timeout_s:g} s"
            ) from None
        if not isinstance(message, bytes):
            raise BadRequest("the call ended without a message")
        return message

    async def translate(
        self, call: RunningCall, permit: Permit, message: bytes, read: Callable[[bytes], HttpRequest]
    ) -> HttpRequest:
        """Translate a message; meanwhile its bytes are held by the permit."""
        permit.grow(nbytes=len(message))
        request = await run_beside_loop(len(message), read, 0, message)
        permit.shrink(nbytes=len(message))  # from here on, the body counts itself
        remaining_s = call.context.time_remaining()
        if remaining_s is None:
            return request
        timeout_ms = min(max(1.0, remaining_s * 1000), self._options.max_timeout_s * 1000)
        return replace(request, headers=(*request.headers, (b"x-timeout-ms", b"%.3f" % timeout_ms)))


class Message:
    """A call with a message, or one message of a stream."""

    def __init__(
        self,
        intake: Intake,
        call: RunningCall,
        translate: Callable[[bytes], HttpRequest],
        *,
        has_frames: bool,
        message: bytes | None = None,
    ) -> None:
        self._intake = intake
        self._call = call
        self._translate = translate
        self._has_frames = has_frames
        self._message = message
        self.request_id = ""

    async def read(self, permit: Permit) -> HttpRequest:
        """Read and translate the message; a call with frames is refused before if no frame is admitted."""
        if self._has_frames:
            permit.check(items=1)
        message, self._message = self._message, None
        if message is None:
            message = await self._intake.read(self._call, permit.client)
        request = await self._intake.translate(self._call, permit, message, self._translate)
        self.request_id = request.id
        return request
