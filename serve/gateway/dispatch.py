"""Dispatch of frames to a model: one outcome per frame, within a deadline, cancelled when the client disconnects.

Whatever goes wrong with a frame here is the outcome of that frame alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from serve.errors import ClientDisconnected, ClientError, DeadlineExceeded, ServeError, UnknownOption
from serve.gateway.backend import Answer
from serve.gateway.batcher import BatchResult
from serve.gateway.models import ModelVersion
from serve.protocol.batching import estimate_cost
from serve.protocol.worker import EncodedFrame

__all__ = ["Fallback", "Outcome", "run_frames", "stream_frames"]

Outcome = BatchResult[Answer] | ServeError
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class Fallback:
    """Version that answers the frames on which another one fails.

    Attributes:
        model: the version.
        observe: called with the error of each such frame.
        frames: number of frames that it answered.
    """

    model: ModelVersion
    observe: Callable[[ServeError], None]
    frames: int = 0


async def run_frames(
    request: Request,
    model: ModelVersion,
    frames: Sequence[EncodedFrame | ServeError],
    timeout_s: float,
    fallback: Fallback | None = None,
) -> list[Outcome]:
    """Run frames concurrently; returns one outcome per frame, in order.

    To be called after the whole body was read: only then the next message of the client can be nothing but its
    disconnect, on which all frames are cancelled.

    Args:
        request: the request.
        model: the model to run.
        frames: the frames; in place of an invalid one, its error, which is its outcome.
        timeout_s: deadline, seconds from now; after it the outcome is `DeadlineExceeded`.
        fallback: answers the frames on which `model` fails; those that `model` has not answered after half of that time
            are sent to both, and the first answer counts.

    Raises:
        ClientDisconnected: the client disconnected.
    """
    if len(frames) == 1:  # saves a task
        return [await _cancel_on_disconnect(request, _run_frame(model, frames[0], timeout_s, fallback))]
    work = asyncio.gather(*(_run_frame(model, frame, timeout_s, fallback) for frame in frames))
    return list(await _cancel_on_disconnect(request, work))


async def stream_frames(
    request: Request,
    model: ModelVersion,
    frames: Sequence[EncodedFrame | ServeError],
    timeout_s: float,
    finish: Callable[[int, Outcome], T],
    fallback: Fallback | None = None,
) -> AsyncGenerator[T, None]:
    """Run frames as `run_frames` does; yields what `finish` makes of each as it finishes.

    Ends when the client disconnects. The frames that have not finished are cancelled when the generator ends.

    Args:
        request: the request.
        model: the model to run.
        frames: the frames; in place of an invalid one, its error.
        timeout_s: deadline, seconds from now.
        finish: called with the position and the outcome of a frame, also while nothing can be yielded.
        fallback: as of `run_frames`.
    """

    async def run(index: int, frame: EncodedFrame | ServeError) -> T:
        return finish(index, await _run_frame(model, frame, timeout_s, fallback))

    tasks = [asyncio.create_task(run(index, frame)) for index, frame in enumerate(frames)]
    del frames  # each is dropped with its task
    watch = asyncio.ensure_future(request.receive())
    try:
        while tasks:
            await asyncio.wait({*tasks, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                return
            done = [task for task in tasks if task.done()]
            tasks = [task for task in tasks if task not in done]
            while done:
                yield done.pop(0).result()
    finally:
        watch.cancel()
        for task in tasks:
            task.cancel()


async def _run_frame(
    model: ModelVersion,
    frame: EncodedFrame | ServeError,
    timeout_s: float,
    fallback: Fallback | None = None,
) -> Outcome:
    if isinstance(frame, ServeError):
        return frame
    if fallback is None:
        outcome = await _submit_frame(model, frame, timeout_s)
    else:
        model, outcome = await _run_with_fallback(model, frame, timeout_s, fallback)
    if model.observers:
        # Later: this task now writes the answer.
        asyncio.get_running_loop().call_soon(_observe, model, frame, outcome)
    return outcome


async def _run_with_fallback(
    model: ModelVersion, frame: EncodedFrame, timeout_s: float, fallback: Fallback
) -> tuple[ModelVersion, Outcome]:
    """Run a frame, on another version too if the first one fails or takes half of the time.

    Returns:
        The version of the outcome, and the outcome.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    trial = asyncio.create_task(_submit_frame(model, frame, timeout_s))
    tasks = [trial]
    try:
        await asyncio.wait({trial}, timeout=timeout_s / 2)
        if trial.done() and not _is_worth_another(trial.result()):
            return model, trial.result()
        other = asyncio.create_task(_submit_frame(fallback.model, frame, deadline - clock()))
        tasks.append(other)
        await asyncio.wait({other} if trial.done() else tasks, return_when=asyncio.FIRST_COMPLETED)
        if not other.done() and not isinstance(trial.result(), ServeError):
            return model, trial.result()
        outcome = await other
        error = trial.result() if trial.done() else DeadlineExceeded("no answer within half of the deadline")
        if isinstance(error, ServeError) and not (
            isinstance(error, UnknownOption) and isinstance(outcome, ClientError)
        ):
            fallback.observe(error)
        fallback.frames += 1
        return fallback.model, outcome
    finally:
        for task in tasks:
            task.cancel()


def _is_worth_another(outcome: Outcome) -> bool:
    """Return whether another version may answer a frame for which one has this outcome.

    A frame that cannot be read is no better elsewhere; an option can be: it may name a class or a field.
    """
    return isinstance(outcome, ServeError) and (
        not isinstance(outcome, ClientError) or isinstance(outcome, UnknownOption)
    )


def _observe(model: ModelVersion, frame: EncodedFrame, outcome: Outcome) -> None:
    for observe in model.observers:
        try:
            observe(model, frame, outcome)
        except Exception:
            logger.exception("an observer of the frames for %s failed", model.state.name)


async def _submit_frame(model: ModelVersion, frame: EncodedFrame, timeout_s: float) -> Outcome:
    assert model.batcher is not None
    try:
        cost = estimate_cost(frame, model.spec or {})
        async with asyncio.timeout(timeout_s):
            return await model.batcher.submit(frame, cost=cost.cost, nbytes=cost.nbytes, key=cost.key)
    except TimeoutError:
        return DeadlineExceeded("no answer before the deadline; raise timeout_ms or send fewer frames")
    except ServeError as error:
        return error
    except Exception as error:
        logger.exception("a frame for %s failed unexpectedly", model.state.name)
        return ServeError(
            f"the frame failed with an internal error ({type(error).__name__}); see the gateway's log"
        )


async def _cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it when the client disconnects, which uvicorn does not do."""
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
