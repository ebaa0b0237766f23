"""Handlers of the service: each message becomes an `Exchange` with the application, and its response a message.

All methods are handled as streams, also those with one message: so the message is not taken from the connection before
the call is admitted, and the response is held against the permit until the client's flow control has taken it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from starlette.types import ASGIApp

from serve.errors import BadRequest, ClientDisconnected, SlowRequest
from serve.gateway.admission import Permit, client_of
from serve.gateway.grpc.calls import Call, Exchange, Finish, HttpRequest
from serve.gateway.grpc.messages import HEALTH, INFERENCE, message_class
from serve.gateway.grpc.reading import OpenStreams, ReadingSlots
from serve.gateway.grpc.status import CallError, read_error
from serve.gateway.grpc.translation import METHODS, read_infer, write_stream_error, write_stream_infer
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.metrics import Metrics
from serve.gateway.offload import run_beside_loop
from serve.gateway.options import GatewayOptions

__all__ = ["Service"]

_PROBES = ("ServerLive", "ServerReady")  # without a key and a message
# Metadata that the application reads as headers, beside x-….
_HEADERS = {"authorization", "traceparent", "tracestate"}
_TRAILING = (b"x-request-id", b"server-timing", b"retry-after")
_HEALTH_SERVICES = ("", INFERENCE, HEALTH)
_HEALTH_PERIOD_S = 1.0

_HealthRequest = message_class("grpc.health.v1.HealthCheckRequest")
_HealthResponse = message_class("grpc.health.v1.HealthCheckResponse")
Context = Any  # grpc.aio.ServicerContext


class Service:
    """The Open Inference Protocol and the health protocol, in front of the application."""

    def __init__(
        self,
        app: ASGIApp,
        options: GatewayOptions,
        lifecycle: Lifecycle,
        metrics: Metrics,
        message_bytes: int,
    ) -> None:
        """Answer calls by `app`, whose largest message has `message_bytes` bytes."""
        self._app = app
        self._options = options
        self._lifecycle = lifecycle
        self._metrics = metrics
        slots = max(1, options.max_pending_bytes // message_bytes)
        self._slots = ReadingSlots(slots, options.client_share)
        self._streams = OpenStreams(options.max_grpc_streams, options.client_share)
        metrics.count_streams(lambda: self._streams.count)

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Return the handlers of all methods."""
        infer = {name: self._handler(name, self._single(name)) for name in METHODS}
        infer["ModelStreamInfer"] = self._handler("ModelStreamInfer", self._stream_infer)
        health = {
            "Check": self._handler("Check", self._check_health),
            "Watch": self._handler("Watch", self._watch_health),
        }
        return (
            grpc.method_handlers_generic_handler(INFERENCE, infer),
            grpc.method_handlers_generic_handler(HEALTH, health),
        )

    def _handler(self, name: str, handle: Callable[[Context], Awaitable[_Answer]]) -> grpc.RpcMethodHandler:
        async def counted(_: object, context: Context) -> None:
            status = grpc.StatusCode.CANCELLED
            call = _RunningCall(context, self._options)
            try:
                answer = await handle(call)
                status = grpc.StatusCode.OK if answer.error is None else answer.error.status
                context.set_trailing_metadata(answer.metadata)
                if answer.error is not None:
                    await context.abort(status, answer.error.message, answer.metadata)
            except ClientDisconnected:
                await call.settle()
                await context.abort(status, "the response was not read in time")
            finally:
                self._metrics.observe_call(name, status.name)

        return grpc.stream_stream_rpc_method_handler(counted)

    def _single(self, name: str) -> Callable[[Context], Awaitable[_Answer]]:
        """Return the handler of a method with one message and one response."""
        method = METHODS[name]

        async def handle(call: _RunningCall) -> _Answer:
            answer = _Answer()

            async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
                answer.metadata = _trailing(headers)
                if status < 400 or status in method.answered:
                    await call.write(method.write(status, headers, body))
                else:
                    answer.fail(read_error(status, body))

            if name in _PROBES:
                await self._exchange(call, method.read(b"").path, finish)
            else:
                message = _Message(self, call, method.read, has_frames=name == "ModelInfer")
                await self._exchange(call, f"/{INFERENCE}/{name}", finish, message)
            return answer

        return handle

    async def _exchange(
        self, call: _RunningCall, path: str, finish: Finish, message: Call | None = None
    ) -> None:
        await Exchange(self._app, path, call.headers, call.client, finish, message).run()

    async def read_message(self, call: _RunningCall, client: str) -> bytes:
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
        self, call: _RunningCall, permit: Permit, message: bytes, read: Callable[[bytes], HttpRequest]
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

    # ModelStreamInfer

    async def _stream_infer(self, call: _RunningCall) -> _Answer:
        """Answer the requests of a stream concurrently, and in order."""
        answer = _Answer()

        async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
            answer.metadata = _trailing(headers)
            if status >= 400:
                answer.fail(read_error(status, body))

        path = f"/{INFERENCE}/ModelStreamInfer"
        with _Opening(self._streams) as opening:
            await self._exchange(call, path, finish, opening)
            if answer.error is None:
                await self._answer_requests(call, path)
                if self._lifecycle.stopping.is_set():
                    answer.fail(
                        CallError(
                            grpc.StatusCode.UNAVAILABLE,
                            "the server shuts down; open a new stream",
                            "not_ready",
                        )
                    )
        return answer

    async def _answer_requests(self, call: _RunningCall, path: str) -> None:
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
                    requests.create_task(self._answer_request(call, path, message, turn))
        except* ClientDisconnected:
            stalled = True
        if stalled:
            raise ClientDisconnected

    async def _messages(self, call: _RunningCall, window: asyncio.Semaphore) -> AsyncGenerator[bytes, None]:
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

    async def _answer_request(self, call: _RunningCall, path: str, message: bytes, turn: _Turn) -> None:
        request = _Message(self, call, read_infer, has_frames=True, message=message)

        async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
            if status < 400:
                response = write_stream_infer(status, headers, body)
            else:
                error = read_error(status, body)
                response = write_stream_error(error.message, error.code, request.request_id)
            await turn.come()
            await call.write(response)

        with turn:
            await self._exchange(call, path, finish, request)

    # Health

    async def _check_health(self, call: _RunningCall) -> _Answer:
        service = await self._read_service(call)
        if service not in _HEALTH_SERVICES:
            return _Answer(CallError(grpc.StatusCode.NOT_FOUND, f"unknown service {service[:80]!r}", ""))
        await call.write(await self._health(call))
        return _Answer()

    async def _watch_health(self, call: _RunningCall) -> _Answer:
        if await self._read_service(call) not in _HEALTH_SERVICES:
            await call.write(_HealthResponse(status="SERVICE_UNKNOWN").SerializeToString())
            await self._lifecycle.stopping.wait()
            return _Answer()
        last = b""
        while not self._lifecycle.stopping.is_set():
            if (now := await self._health(call)) != last:
                await call.write(now)
                last = now
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lifecycle.stopping.wait(), _HEALTH_PERIOD_S)
        return _Answer()

    async def _read_service(self, call: _RunningCall) -> str:
        message = await self.read_message(call, client_of({"client": call.client}))
        try:
            return str(_HealthRequest.FromString(message).service)
        except DecodeError:
            return "?"

    async def _health(self, call: _RunningCall) -> bytes:
        """Return the present HealthCheckResponse."""
        found = 0

        async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
            nonlocal found
            found = status

        await self._exchange(call, "/v2/health/ready", finish)
        return bytes(_HealthResponse(status="SERVING" if found == 200 else "NOT_SERVING").SerializeToString())


@dataclass
class _Answer:
    """How a call ends: with what was written, or with an error.

    Attributes:
        error: the error; None if a response was written.
        metadata: trailing metadata.
    """

    error: CallError | None = None
    metadata: tuple[tuple[str, str], ...] = ()

    def fail(self, error: CallError) -> None:
        """End with an error."""
        self.error = error
        self.metadata = (*self.metadata, ("error-code", error.code))


class _RunningCall:
    """A call as gRPC has it.

    Attributes:
        context: of grpcio.
        headers: the metadata that the application reads.
        client: address and port of the client.
    """

    def __init__(self, context: Context, options: GatewayOptions) -> None:
        self.context = context
        self._options = options
        self._stalled: asyncio.Future[None] | None = None
        self.headers = [
            (key.encode(), value.encode("latin-1", "replace"))
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str) and (key in _HEADERS or key.startswith("x-"))
        ]
        # ipv4:ADDRESS:PORT or ipv6:%5BADDRESS%5D:PORT
        family, _, rest = unquote(context.peer()).partition(":")
        host, _, port = rest.rpartition(":")
        is_internet = family in ("ipv4", "ipv6") and port.isdigit()
        self.client = (host.strip("[]"), int(port)) if is_internet else None

    async def write(self, message: bytes) -> None:
        """Write a message; the client must take it at the rate that HTTP's clients must keep.

        Raises:
            ClientDisconnected: it does not, now or before.
        """
        if self._stalled is not None:
            raise ClientDisconnected
        options = self._options
        limit_s = options.client_stall_timeout_s + len(message) / options.client_bytes_per_s
        writing = asyncio.ensure_future(self.context.write(message))
        done, _ = await asyncio.wait({writing}, timeout=limit_s)
        if not done:
            self._stalled = writing
            writing.add_done_callback(
                lambda ended: ended.cancelled() or ended.exception()
            )  # of no interest then
            raise ClientDisconnected
        writing.result()

    async def settle(self) -> None:
        """Wait for the end of a write that takes too long: grpcio can neither take it back nor end the call before."""
        if self._stalled is not None:
            await asyncio.wait({self._stalled})


class _Message:
    """A call with a message, or one message of a stream."""

    def __init__(
        self,
        service: Service,
        call: _RunningCall,
        translate: Callable[[bytes], HttpRequest],
        *,
        has_frames: bool,
        message: bytes | None = None,
    ) -> None:
        self._service = service
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
            message = await self._service.read_message(self._call, permit.client)
        request = await self._service.translate(self._call, permit, message, self._translate)
        self.request_id = request.id
        return request


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


def _trailing(headers: Mapping[bytes, bytes]) -> tuple[tuple[str, str], ...]:
    """Return the headers of a response that are trailing metadata of its call."""
    found = [(name.decode(), headers[name].decode()) for name in _TRAILING if name in headers]
    if retry_after := headers.get(b"retry-after"):
        # A client with a retry policy waits for so long (grpc/proposal, A6).
        found.append(("grpc-retry-pushback-ms", str(1000 * int(retry_after))))
    return tuple(found)
