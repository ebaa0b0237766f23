"""The client for programs on asyncio; the methods are those of `serve.client.Client`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import httpx

from serve.client.connection import Connections, connection_arguments, read_headers
from serve.client.frames import FrameInput
from serve.client.many import Window, check_many
from serve.client.options import PredictOptions
from serve.client.requests import CONNECT_S, Calls, Reply, Send, Steps, Wait
from serve.client.results import Result
from serve.client.retry import Retry
from serve.errors import ServeError

__all__ = ["AsyncClient"]

T = TypeVar("T")


class AsyncClient:
    """Connections to one server, for the tasks of one event loop; an asynchronous context manager.

    The arguments are those of `serve.client.Client`.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        retry: Retry | None = None,
        compress: bool = False,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        self._calls = Calls(address, timeout_s, retry or Retry())
        arguments = connection_arguments(self._calls.url, token, compress, verify)
        self._connections = Connections(lambda: httpx.AsyncClient(**arguments))

    async def __aenter__(self) -> Self:
        """Keep connections open for several requests."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._connections.get().aclose()

    async def predict(
        self,
        frame: FrameInput,
        model: str,
        version: str | None = None,
        *,
        content_type: str | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        **options: Unpack[PredictOptions],
    ) -> Result:
        """Send one frame and return its result; arguments and errors are those of `Client.predict`."""
        return await self._run(
            self._calls.predict(
                frame, model, version, options, content_type=content_type, timeout_s=timeout_s, retry=retry
            )
        )

    @overload
    def predict_many(
        self,
        frames: Iterable[FrameInput] | AsyncIterable[FrameInput],
        model: str,
        version: str | None = None,
        *,
        concurrency: int = 8,
        return_errors: Literal[False] = False,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> AsyncIterator[Result]: ...

    @overload
    def predict_many(
        self,
        frames: Iterable[FrameInput] | AsyncIterable[FrameInput],
        model: str,
        version: str | None = None,
        *,
        concurrency: int = 8,
        return_errors: bool,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> AsyncIterator[Result | ServeError]: ...

    async def predict_many(
        self,
        frames: Iterable[FrameInput] | AsyncIterable[FrameInput],
        model: str,
        version: str | None = None,
        *,
        concurrency: int = 8,
        return_errors: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> AsyncIterator[Result | ServeError]:
        """Send many frames side by side; yields their results in order, as `Client.predict_many` does."""
        check_many(frames, options, concurrency)
        turns = asyncio.Semaphore(concurrency)
        window: Window[asyncio.Task[Result]] = Window(2 * concurrency)

        async def send(frame: FrameInput) -> Result:
            async with turns:
                return await self.predict(frame, model, version, timeout_s=timeout_s, **options)

        try:
            async for frame in _each(frames):
                window.add(asyncio.create_task(send(frame)))
                for each in window.take():
                    yield await _outcome(each, return_errors)
            for each in window.take(ended=True):
                yield await _outcome(each, return_errors)
        finally:
            left = list(window.rest())
            for each in left:
                each.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def draw(
        self,
        frame: FrameInput,
        model: str,
        version: str | None = None,
        *,
        content_type: str | None = None,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> bytes:
        """Return a PNG of a frame with its detections, as `Client.draw` does."""
        steps = self._calls.draw(
            frame, model, version, options, content_type=content_type, timeout_s=timeout_s
        )
        return await self._run(steps)

    async def models(self) -> list[dict[str, Any]] | None:
        """Return the gateway's descriptions of its models, as `Client.models` does."""
        return await self._run(self._calls.models())

    async def describe(self, model: str, version: str | None = None) -> dict[str, Any] | None:
        """Return the gateway's description of a model, as `Client.describe` does."""
        return await self._run(self._calls.describe(model, version))

    async def _run(self, steps: Steps[T]) -> T:
        """Do what a call asks for, until it returns."""
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, Send):
                        done: Any = await self._send(step)
                    elif isinstance(step, Wait):
                        await asyncio.sleep(step.seconds)
                        done = None
                    else:
                        done = await asyncio.to_thread(step.call)
                except ServeError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(done)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _send(self, step: Send) -> Reply:
        timeout = httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECT_S))
        with self._calls.map_errors(step):
            async with asyncio.timeout(step.timeout_s):
                response = await self._connections.get_open().request(
                    **step.request.arguments(), timeout=timeout
                )
                return Reply(response.status_code, read_headers(response), response.content)


async def _each(frames: Iterable[FrameInput] | AsyncIterable[FrameInput]) -> AsyncIterator[FrameInput]:
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    else:
        for frame in frames:
            yield frame


async def _outcome(task: asyncio.Task[Result], return_errors: bool) -> Result | ServeError:
    try:
        return await task
    except ServeError as error:
        if return_errors:
            return error
        raise
