"""Clients of the load generator over gRPC: calls with one message each, or one stream for all clients."""

from __future__ import annotations

import asyncio
from collections import deque

import grpc
import grpc.aio

__all__ = ["Calls", "Stream"]

# A connection of its own for each channel, as a client over HTTP has; answers of any length.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


class Calls:
    """One channel, with one call at a time."""

    def __init__(self, host: str, port: int, method: str) -> None:
        self._channel = grpc.aio.insecure_channel(f"{host}:{port}", options=_OPTIONS)
        self._call = self._channel.unary_unary(method)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a message; return 200 and the response, or the number of the gRPC status and no bytes."""
        try:
            return 200, await self._call(request)
        except grpc.aio.AioRpcError as error:
            return error.code().value[0], b""

    async def end(self) -> None:
        """Close the channel."""
        await self._channel.close()


class Stream:
    """One stream for all clients: each waits for the answer to its message, and answers come in order.

    A client ends the stream once none waits for an answer.
    """

    def __init__(self, host: str, port: int, method: str) -> None:
        self._channel = grpc.aio.insecure_channel(f"{host}:{port}", options=_OPTIONS)
        self._stream = self._channel.stream_stream(method)()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._writing = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a message; return 200 and the response to it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        async with self._writing:
            self._waiting.append(answer)
            try:
                await self._stream.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                self._waiting.remove(answer)
                raise ConnectionError(str(error)) from error
        return 200, await answer

    async def end(self) -> None:
        """Close the channel if no client waits."""
        if self._waiting:
            return
        self._stream.cancel()
        await self._channel.close()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    async def _read(self) -> None:
        error: Exception = ConnectionResetError("the stream has ended")
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(message)
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as failed:
            error = ConnectionError(type(failed).__name__)
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(error)
