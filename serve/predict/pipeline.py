"""Predict frame after frame: reading and decoding run ahead of the network, within a bound.

A feeder thread walks the source, two threads read and decode, the model's own thread computes, and the caller's thread
takes predictions in order. At most two batches and a few frames are in memory at a time.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import orjson

from serve.errors import ServeError, error_from_response
from serve.predict.frames import Frame, Prediction, encode_pixels
from serve.predict.models import Model, ServedAnswer
from serve.protocol.batch import Body
from serve.protocol.frames import FrameOptions
from serve.protocol.worker import Outcome, encode_outcome

__all__ = ["predict_frames"]

_READERS = 2


@dataclass
class _Entry:
    """A frame on its way; `outcome` is set when its batch is submitted."""

    frame: Frame
    prepared: Future[Any]
    body: Body | None = None
    finished: Prediction | None = None
    batch: Future[list[Outcome]] | None = None
    index: int = 0


def predict_frames(
    frames: Iterable[Frame],
    model: Model,
    options: FrameOptions,
    *,
    batch_size: int = 1,
    ahead: int = 4,
    finished: Callable[[Frame], Prediction | None] = lambda frame: None,
    keep_body: bool = False,
) -> Generator[Prediction]:
    """Predict frames in order.

    Args:
        frames: the frames; iterated in a thread of its own.
        model: the model.
        options: of every frame.
        batch_size: frames per batch, always consecutive ones.
        ahead: frames that are read beyond two batches.
        finished: returns the prediction of a frame that needs none any more, or None.
        keep_body: keep each frame's bytes in its prediction.

    Yields:
        One prediction per frame, in order.

    Raises:
        ServeError: what concerns every frame: the source ended with an error, the server is gone.
    """
    bound = 2 * batch_size + ahead
    with (
        ThreadPoolExecutor(_READERS, thread_name_prefix="reader") as readers,
        closing(_Feeder(frames, model, options, readers, bound, finished, keep_body)) as feeder,
    ):
        waiting: deque[_Entry] = deque()
        batch: list[_Entry] = []
        ended, problem = False, None
        while True:
            while not ended and len(waiting) < 2 * batch_size:
                if waiting and _is_done(waiting[0]) and feeder.is_empty():
                    break  # rather hand on what is there than wait for the source
                entry = feeder.take()
                if entry is None or isinstance(entry, BaseException):
                    ended, problem = True, entry
                    break
                waiting.append(entry)
                if entry.finished is None:
                    batch.append(entry)
                    if len(batch) == batch_size:
                        _submit(batch, model)
            if not waiting:
                if problem is not None:
                    raise problem
                return
            head = waiting.popleft()
            if head.finished is None and head.batch is None:
                _submit(batch, model)
            yield _prediction(head)
            feeder.release()


def _submit(batch: list[_Entry], model: Model) -> None:
    future = model.submit([entry.prepared for entry in batch])
    for index, entry in enumerate(batch):
        entry.batch, entry.index = future, index
    batch.clear()


def _is_done(entry: _Entry) -> bool:
    return entry.finished is not None or (entry.batch is not None and entry.batch.done())


def _prediction(entry: _Entry) -> Prediction:
    if entry.finished is not None:
        return entry.finished
    assert entry.batch is not None
    outcome = entry.batch.result()[entry.index]
    if isinstance(outcome, ServedAnswer):
        return Prediction(entry.frame, outcome.encoded, outcome, None, entry.body)
    status, encoded = encode_outcome(outcome)
    if isinstance(outcome, ServeError):
        return Prediction(entry.frame, encoded, None, outcome, entry.body)
    if status != 200:  # JSON lacks something that is in the answer
        error = error_from_response(status, orjson.loads(encoded))
        return Prediction(entry.frame, encoded, None, error, entry.body)
    return Prediction(entry.frame, encoded, outcome, None, entry.body)


class _Feeder:
    """Thread that walks the frames and has them read and decoded, at most `bound` at a time."""

    def __init__(
        self,
        frames: Iterable[Frame],
        model: Model,
        options: FrameOptions,
        readers: ThreadPoolExecutor,
        bound: int,
        finished: Callable[[Frame], Prediction | None],
        keep_body: bool,
    ) -> None:
        self._frames, self._model, self._options, self._readers = frames, model, options, readers
        self._finished, self._keep_body = finished, keep_body
        self._free = threading.Semaphore(bound)
        self._queue: queue.SimpleQueue[_Entry | BaseException | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._feed, name="feeder", daemon=True)
        self._thread.start()

    def take(self) -> _Entry | BaseException | None:
        """Wait for the next frame; None at the end, or the error that the source ended with."""
        return self._queue.get()

    def is_empty(self) -> bool:
        """Whether `take` would wait."""
        return self._queue.empty()

    def release(self) -> None:
        """Let one more frame be read."""
        self._free.release()

    def close(self) -> None:
        """Stop after the frame at hand."""
        self._stopped = True
        self._free.release()

    def _feed(self) -> None:
        frames = iter(self._frames)
        try:
            while True:
                self._free.acquire()
                if self._stopped:
                    break
                frame = next(frames, None)
                if frame is None:
                    break
                self._queue.put(self._start(frame))
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)
        finally:
            if isinstance(frames, Generator):
                frames.close()  # a video's file

    def _start(self, frame: Frame) -> _Entry:
        entry = _Entry(frame, Future())
        entry.finished = self._finished(frame)
        if entry.finished is None:
            entry.prepared = self._readers.submit(self._prepare, entry)
        return entry

    def _prepare(self, entry: _Entry) -> Any:
        frame = entry.frame
        if frame.pixels is not None and self._model.is_remote:
            body: Body = encode_pixels(frame.pixels(), small=True)
        else:
            body = frame.read()
        if self._keep_body:
            entry.body = body
        return self._model.prepare(body, self._options)
