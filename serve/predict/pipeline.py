"""Predict frame after frame: reading and decoding run ahead of the network, within a bound.

A feeder thread walks the source, two threads read and decode, the model's own thread computes, and the caller's thread
takes predictions in order. At most two batches and a few frames are in memory at a time.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import orjson

from serve.errors import ServeError, error_from_response
from serve.predict.frames import Frame, Prediction, encode_pixels
from serve.predict.models import Model, ServedAnswer, outcome_of_error
from serve.protocol.batch import Body
from serve.protocol.batching import BatchLimits, BatchRule, BatchSize, FrameCost, estimate_cost, ragged
from serve.protocol.options import FrameOptions
from serve.protocol.worker import EncodedFrame, Outcome, encode_outcome

__all__ = ["predict_frames"]

_READERS = 2
_ONE_FRAME = FrameCost(1, 0)


@dataclass
class _Entry:
    """A frame on its way; `batch` is set when its batch is submitted, `cost` when the frame was read."""

    frame: Frame
    prepared: Future[Any]
    cost: Future[FrameCost]
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
    rule: BatchRule | None = None,
    ahead: int = 4,
    readers: int = _READERS,
    submitted: Callable[[], None] = lambda: None,
    finished: Callable[[Frame], Prediction | None] = lambda frame: None,
    keep_body: bool = False,
) -> Generator[Prediction]:
    """Predict frames in order.

    Args:
        frames: the frames; iterated in a thread of its own.
        model: the model.
        options: of every frame.
        batch_size: frames per batch, always consecutive ones.
        rule: which frames share a batch, by their cost and the sizes of their images; in place of `batch_size`.
        ahead: frames that are read beyond two batches.
        readers: frames that are read and decoded at a time.
        submitted: called when the last batch was queued for the model.
        finished: returns the prediction of a frame that needs none any more, or None.
        keep_body: keep each frame's bytes in its prediction.

    Yields:
        One prediction per frame, in order.

    Raises:
        ServeError: what concerns every frame: the source ended with an error, the server is gone.
    """
    if rule is not None:
        batch_size = rule.limits.items
    window = 2 * batch_size
    with (
        ThreadPoolExecutor(readers, thread_name_prefix="reader") as pool,
        closing(
            _Feeder(frames, model, options, pool, window + ahead, finished, keep_body, rule is not None)
        ) as feeder,
    ):
        waiting: deque[_Entry] = deque()
        batches = _OpenBatches(model, rule or BatchRule(BatchLimits(batch_size), ragged), window)
        ended, problem = False, None
        while True:
            while not ended and len(waiting) < window:
                if waiting and _is_done(waiting[0]) and feeder.is_empty():
                    break  # rather hand on what is there than wait for the source
                entry = feeder.take()
                if entry is None or isinstance(entry, BaseException):
                    ended, problem = True, entry
                    batches.submit_all()
                    submitted()
                    break
                waiting.append(entry)
                batches.add(entry)
            if not waiting:
                if problem is not None:
                    raise problem
                return
            yield _prediction(waiting.popleft())
            feeder.release()


class _OpenBatches:
    """Batches that are not submitted yet, one per key of their frames.

    Which frames share a batch depends on the frames and on nothing else, such as how fast they are read.

    Args:
        model: takes the batches.
        rule: which frames share a batch.
        window: frames among which those of a batch are looked for.
    """

    def __init__(self, model: Model, rule: BatchRule, window: int) -> None:
        self._model, self._rule, self._window = model, rule, window
        self._open: dict[Hashable, tuple[int, BatchSize, list[_Entry]]] = {}
        self._count = 0

    def add(self, entry: _Entry) -> None:
        """Put a frame into a batch, and submit those that are full or have waited for the length of the window."""
        self._count += 1
        if entry.finished is None:
            self._put(entry)
        for key, (first, _, _) in list(self._open.items()):
            if self._count - first >= self._window - 1:
                self._submit(key)

    def submit_all(self) -> None:
        """Submit what is open."""
        for key in list(self._open):
            self._submit(key)

    def _put(self, entry: _Entry) -> None:
        try:
            cost = entry.cost.result()
        except Exception as error:  # the frame's own, such as a file that is gone
            entry.batch = Future()
            entry.batch.set_result([outcome_of_error(error)])
            return
        if cost.key in self._open and not self._open[cost.key][1].admits(cost.cost, cost.nbytes):
            self._submit(cost.key)
        if cost.key not in self._open:
            self._open[cost.key] = (self._count, self._rule.open_batch(), [])
        _, size, entries = self._open[cost.key]
        size.add(cost.cost, cost.nbytes)
        entries.append(entry)
        if size.is_full:
            self._submit(cost.key)

    def _submit(self, key: Hashable) -> None:
        _, _, entries = self._open.pop(key)
        future = self._model.submit([entry.prepared for entry in entries])
        for index, entry in enumerate(entries):
            entry.batch, entry.index = future, index


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
        by_cost: bool,
    ) -> None:
        self._frames, self._model, self._options, self._readers = frames, model, options, readers
        self._finished, self._keep_body = finished, keep_body
        self._spec = model.description if by_cost else None
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
        entry = _Entry(frame, Future(), Future())
        entry.finished = self._finished(frame)
        if self._spec is None:
            entry.cost.set_result(_ONE_FRAME)
        if entry.finished is None:
            entry.prepared = self._readers.submit(self._prepare, entry)
        return entry

    def _prepare(self, entry: _Entry) -> Any:
        try:
            body = self._read(entry.frame)
            if self._spec is not None:
                entry.cost.set_result(estimate_cost(EncodedFrame(body, self._options), self._spec))
        except Exception as error:
            if not entry.cost.done():
                entry.cost.set_exception(error)
            raise
        if self._keep_body:
            entry.body = body
        return self._model.prepare(body, self._options)

    def _read(self, frame: Frame) -> Body:
        if frame.pixels is not None and self._model.is_remote:
            return encode_pixels(frame.pixels(), small=True)
        return frame.read()
