"""ModelStreamInfer: the requests of a stream are answered beside each other, and in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Self

import grpc
from starlette.types import ASGIApp

from serve.errors import ClientDisconnected
from serve.gateway.admission import Permit
from serve.gateway.grpc.calls import Exchange
from serve.gateway.grpc.intake import Intake, Message
from serve.gateway.grpc.messages import INFERENCE
from serve.gateway.grpc.reading import OpenStreams
from serve.gateway.grpc.running import Answer, RunningCall, read_trailing
from serve.gateway.grpc.status import CallError, read_error
from serve.gateway.grpc.translation import read_infer, write_stream_error, write_stream_infer
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.options import GatewayOptions

__all__ = ["Streams"]

_PATH = f"/{INFERENCE}/ModelStreamInfer"


class Streams:
    """The streams of a server."""

    def __init__(self, app: ASGIApp, options: GatewayOptions, lifecycle: Lifecycle, intake: Intake) -> None:
        """Answer the requests of streams by `app`."""
        self._app = app
        self._options = options
        self._lifecycle = lifecycle
        self._intake = intake
        self._open = OpenStreams(options.max_grpc_streams, options.client_share)

    @property
    def count(self) -> int:
        """Number of open streams."""
        return self._open.count

    async def handle(self, call: RunningCall) -> Answer:
        """Answer the requests of a stream concurrently, and in order."""
        answer = Answer()

        async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
            answer.metadata = read_trailing(headers)
            if status >= 400:
                answer.fail(read_error(status, body))

        with _Opening(self._open) as opening:
            await Exchange(self._app, _PATH, call.headers, call.client, finish, opening).run()
            if answer.error is None:
                await self._answer_requests(call)
                if self._lifecycle.stopping.is_set():
                    answer.fail(
                        CallError(
                            grpc.StatusCode.UNAVAILABLE,
                            "the server shuts down; open a new stream",
                            "not_ready",
                        )
                    )
        return answer

    async def _answer_requests(self, call: RunningCall) -> None:
        """Answer the requests of a stream.

        Raises:
            ClientDisconnected: the responses are not read in time; the requests that were not answered are cancelled.
        """
        window = asyncio.Semaphore(self._options.max_frames_per_request)
        turn = _Turn.first(window)
        stalled = False
        try:
            async with asyncio.TaskGroup() as requests, aclosing(self._messages(call, window)) as messages:
                async for message in messages:
                    turn = turn.following()
                    requests.create_task(self._answer_request(call, message, turn))
        except* ClientDisconnected:
            stalled = True
        if stalled:
            raise ClientDisconnected

    async def _messages(self, call: RunningCall, window: asyncio.Semaphore) -> AsyncGenerator[bytes, None]:
        """Yield the messages of a stream, each once there is room for it, until the client or the server ends it."""
        stopping = asyncio.ensure_future(self._lifecycle.stopping.wait())
        try:
            while True:
                await window.acquire()
                reading = asyncio.ensure_future(call.context.read())
                try:
                    await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not reading.done():
                        reading.cancel()
                if not reading.done() or not isinstance(message := reading.result(), bytes):
                    return
                yield message
        finally:
            stopping.cancel()

    async def _answer_request(self, call: RunningCall, message: bytes, turn: _Turn) -> None:
        request = Message(self._intake, call, read_infer, has_frames=True, message=message)

        async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
            if status < 400:
                response = write_stream_infer(status, headers, body)
            else:
                error = read_error(status, body)
                response = write_stream_error(error.message, error.code, request.request_id)
            await turn.come()
            await call.write(response)

        with turn:
            await Exchange(self._app, _PATH, call.headers, call.client, finish, request).run()


class _Opening:
    """The beginning of a stream, which has no message yet; closes the stream at the end of the block."""

    def __init__(self, streams: OpenStreams) -> None:
        self._streams = streams
        self._client: str | None = None

    async def read(self, permit: Permit) -> None:
        """Count the stream."""
        self._streams.open(permit.client)
        self._client = permit.client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._streams.close(self._client)


class _Turn:
    """The turn of a response of a stream: after the one before it. Ends, with the block, the turn and its room."""

    def __init__(self, window: asyncio.Semaphore, previous: asyncio.Event, own: asyncio.Event) -> None:
        self._window = window
        self._previous = previous
        self._own = own

    @classmethod
    def first(cls, window: asyncio.Semaphore) -> Self:
        """Create the turn before the first, which is over."""
        over = asyncio.Event()
        over.set()
        return cls(window, over, over)

    def following(self) -> Self:
        """Create the next turn."""
        return type(self)(self._window, self._own, asyncio.Event())

    async def come(self) -> None:
        """Wait for the turn."""
        await self._previous.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._own.set()
        self._window.release()
