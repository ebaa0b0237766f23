"""Predictions for programs on asyncio: many frames at a time, batches without a timer.

While the network computes one batch, frames are decoded; whatever is decoded when it becomes free is the next batch. A
lone frame never waits for others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from serve.errors import ServeError
from serve.predict.frames import FrameInput, as_body
from serve.predict.models import Model
from serve.protocol.options import FrameOptions

__all__ = ["AsyncPredictor"]


class AsyncPredictor:
    """Predicts frames of concurrent tasks; an asynchronous context manager, for one event loop.

    Args:
        model: from `serve.predict.load_model` or `serve.predict.connect`.
        max_batch: largest number of frames that are computed together.
        max_pending: frames at a time; further calls of `predict` wait.
        decoders: threads that decode.
    """

    def __init__(self, model: Model, *, max_batch: int = 8, max_pending: int = 64, decoders: int = 2) -> None:
        """See the class."""
        self._model, self._max_batch = model, max_batch
        self._free = asyncio.Semaphore(max_pending)
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decoder")
        self._decoded: deque[tuple[Future[Any], asyncio.Future[Any]]] = deque()
        self._running = 0

    async def __aenter__(self) -> Self:
        """Predict within the block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the threads; the model stays open."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def predict(self, frame: FrameInput, options: FrameOptions | None = None) -> Mapping[str, Any]:
        """Return the answer to one frame.

        Args:
            frame: path, encoded bytes, parts by name, or an array (`serve.predict.frames.FrameInput`).
            options: minimum score and so on.

        Raises:
            ServeError: the frame cannot be decoded, or the model failed on it.
        """
        loop = asyncio.get_running_loop()
        async with self._free:
            decoded: Future[Any] = self._decoders.submit(self._decode, frame, options or FrameOptions())
            await asyncio.wait([asyncio.wrap_future(decoded)])
            answer: asyncio.Future[Any] = loop.create_future()
            self._decoded.append((decoded, answer))
            self._start(loop)
            outcome = await answer
        if isinstance(outcome, ServeError):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    def _decode(self, frame: FrameInput, options: FrameOptions) -> Any:
        return self._model.prepare(as_body(frame), options)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand on what is decoded, if the model is free."""
        if self._running or not self._decoded:
            return
        batch: list[tuple[Future[Any], asyncio.Future[Any]]] = []
        while self._decoded and len(batch) < self._max_batch:
            decoded, answer = self._decoded.popleft()
            if not answer.cancelled():  # its task is gone
                batch.append((decoded, answer))
        if not batch:
            return
        self._running += 1
        computed = self._model.submit([decoded for decoded, _ in batch])

        def done(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._finish, loop, computed, [answer for _, answer in batch])

        computed.add_done_callback(done)

    def _finish(
        self, loop: asyncio.AbstractEventLoop, computed: Future[Any], answers: list[asyncio.Future[Any]]
    ) -> None:
        self._running -= 1
        self._start(loop)
        error = computed.exception()
        for i, answer in enumerate(answers):
            if answer.done():
                continue
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(computed.result()[i])
