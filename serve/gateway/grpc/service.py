"""Handlers of the service: each message becomes an `Exchange` with the application, and its response a message.

All methods are handled as streams, also those with one message: so the message is not taken from the connection before
the call is admitted, and the response is held against the permit until the client's flow control has taken it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import grpc
import grpc.aio
from starlette.types import ASGIApp

from serve.errors import ClientDisconnected, Overloaded, ServeError
from serve.gateway.grpc.calls import Exchange
from serve.gateway.grpc.health import Health
from serve.gateway.grpc.intake import Intake, Message
from serve.gateway.grpc.messages import HEALTH, INFERENCE
from serve.gateway.grpc.running import Answer, Context, RunningCall, read_trailing
from serve.gateway.grpc.status import describe_error, read_error
from serve.gateway.grpc.stream import Streams
from serve.gateway.grpc.translation import METHODS
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.metrics import Metrics
from serve.gateway.middleware import RETRY_AFTER_S
from serve.gateway.options import GatewayOptions

__all__ = ["Service"]

_PROBES = ("ServerLive", "ServerReady")  # without a key and a message


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
        self._metrics = metrics
        self._intake = Intake(options, message_bytes)
        self._streams = Streams(app, options, lifecycle, self._intake)
        self._health = Health(app, options, lifecycle, self._intake)
        metrics.count_streams(lambda: self._streams.count)

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Return the handlers of all methods."""
        infer = {name: self._handler(name, self._single(name)) for name in METHODS}
        infer["ModelStreamInfer"] = self._handler("ModelStreamInfer", self._streams.handle)
        health = {
            "Check": self._handler("Check", self._health.check),
            "Watch": self._handler("Watch", self._health.watch),
        }
        return (
            grpc.method_handlers_generic_handler(INFERENCE, infer),
            grpc.method_handlers_generic_handler(HEALTH, health),
        )

    def _handler(
        self, name: str, handle: Callable[[RunningCall], Awaitable[Answer]]
    ) -> grpc.RpcMethodHandler:
        async def counted(_: object, context: Context) -> None:
            status = grpc.StatusCode.CANCELLED
            call = RunningCall(context, self._options)
            try:
                try:
                    answer = await handle(call)
                except ServeError as error:  # of a call that did not pass through the application
                    retry = {b"retry-after": b"%d" % RETRY_AFTER_S} if isinstance(error, Overloaded) else {}
                    answer = Answer(metadata=read_trailing(retry))
                    answer.fail(describe_error(error))
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

    def _single(self, name: str) -> Callable[[RunningCall], Awaitable[Answer]]:
        """Return the handler of a method with one message and one response."""
        method = METHODS[name]

        async def handle(call: RunningCall) -> Answer:
            answer = Answer()

            async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
                answer.metadata = read_trailing(headers)
                if status < 400 or status in method.answered:
                    await call.write(method.write(status, headers, body))
                else:
                    answer.fail(read_error(status, body))

            if name in _PROBES:
                path, message = method.read(b"").path, None
            else:
                path = f"/{INFERENCE}/{name}"
                message = Message(self._intake, call, method.read, has_frames=name == "ModelInfer")
            await Exchange(self._app, path, call.headers, call.client, finish, message).run()
            return answer

        return handle
