"""Dispatch of frames to a model: one outcome per frame, within a deadline, cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from starlette.requests import Request

from serve.errors import ClientDisconnected, DeadlineExceeded, ServeError
from serve.gateway.backend import Answer, EncodedFrame
from serve.gateway.batcher import BatchResult
from serve.gateway.cost import estimate_cost
from serve.gateway.models import ModelVersion

__all__ = ["FrameResult", "cancel_on_disconnect", "run_frame", "run_frames"]

FrameResult = BatchResult[Answer] | ServeError
T = TypeVar("T")


async def run_frames(
    model: ModelVersion, frames: Sequence[EncodedFrame | ServeError], timeout_s: float
) -> list[FrameResult]:
    """Run frames concurrently; returns one result per frame, in order, and raises no `ServeError`."""
    if len(frames) == 1:
        return [await run_frame(model, frames[0], timeout_s)]  # saves a task
    return list(await asyncio.gather(*(run_frame(model, frame, timeout_s) for frame in frames)))


async def run_frame(model: ModelVersion, frame: EncodedFrame | ServeError, timeout_s: float) -> FrameResult:
    """Run one frame; an error, also one passed in, is returned as the result.

    Args:
        model: the model to run.
        frame: the frame, or the error that was found while reading it.
        timeout_s: deadline, seconds from now; after it the result is `DeadlineExceeded`.
    """
    if isinstance(frame, ServeError):
        return frame
    try:
        cost = estimate_cost(frame.body, model.spec or {})
        async with asyncio.timeout(timeout_s):
            return await model.submit(frame, cost)
    except TimeoutError:
        return DeadlineExceeded("no answer before the deadline; raise timeout_ms or send fewer frames")
    except ServeError as error:
        return error


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it when the client disconnects, which uvicorn does not do.

    To be used after the whole body was read: only then the next message can be nothing but the disconnect.

    Raises:
        ClientDisconnected: the client disconnected.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.ensure_future(request.receive())
    disconnected = False

    def cancel(_: object) -> None:
        nonlocal disconnected
        disconnected = True
        task.cancel()

    cancelled_before = task.cancelling()
    watch.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and task.uncancel() <= cancelled_before:
            raise ClientDisconnected from None
        raise  # cancelled by the server, not by a disconnect
    finally:
        watch.remove_done_callback(cancel)
        watch.cancel()
