"""Dynamic batching: greedy, late-binding, within a cost budget, with one outcome per item.

A free slot takes what is queued at once; while a batch runs, the next one grows. There is no resident task and
batches never wait for a timer: a worker task exists only while there is work, so none can die and leave callers
waiting, and the only timer (`lead_time_s`) sends a batch earlier. An item is opaque: it has a cost, a size and a key.

Policy of one `Batcher`:

* FIFO among items of one key. The head of the queue always goes, alone if it must, so that nothing starves and an
  oversized item cannot block the queue.
* A batch ends before the first item that would exceed the budget.
* A cancelled item (deadline, disconnect, shutdown) is skipped; `Job.cancelled` says so in the queue and later. A batch
  that runs is not interrupted and keeps its slot, because the device is still busy with it.
* A background item is a batch of its own that takes a free slot while the queue is empty; it is never sent ahead. So
  one of the others waits for one background item per slot at most.
* Prefetch: while all slots are busy, up to `prefetch` batches are sent ahead if they are full, to hide the transport.
* Early send: a batch that is not full is sent `lead_time_s` before a slot is expected to be free, as long as the
  durations of batches are predictable (`serve.gateway.early_send`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from serve.errors import BackendBroken, FrameTooLarge, Overloaded, ServeError
from serve.gateway.early_send import EarlySend, SentBatch
from serve.protocol.batching import BatchCost, BatchLimits, BatchSize, ragged

__all__ = ["BatchReport", "BatchResult", "Batcher", "Job"]

In = TypeVar("In")
Out = TypeVar("Out")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchReport:
    """Statistics of one batch.

    Attributes:
        items: number of items.
        cost: cost of the batch.
        queue_s: seconds that each item waited.
        run_s: seconds from sending the batch to its answer.
        failed: whether the batch failed as a whole.
        outcomes: outcome of each item; none if the batch failed.
        background: whether it was a background item.
    """

    items: int
    cost: int
    queue_s: tuple[float, ...]
    run_s: float
    failed: bool
    outcomes: Sequence[Any] = ()
    background: bool = False


@dataclass(frozen=True)
class BatchResult(Generic[Out]):
    """Answer to one item of a batch.

    Attributes:
        value: the answer.
        queue_s: seconds that the item waited for its batch.
        run_s: seconds from sending the batch to its answer.
        batch_items: number of items in the batch.
    """

    value: Out
    queue_s: float
    run_s: float
    batch_items: int


@dataclass(eq=False)
class Job(Generic[In, Out]):
    """One item from its submission to its outcome.

    Attributes:
        item: the item.
        cost: its cost.
        nbytes: its size.
        key: only items of equal keys share a batch.
        queued_at: time of submission, seconds of the batcher's clock.
        answer: its outcome, for the caller.
        background: whether it waits for all others.
    """

    item: In
    cost: int
    nbytes: int
    key: Hashable
    queued_at: float
    answer: asyncio.Future[BatchResult[Out]] = field(repr=False)
    background: bool = False

    @property
    def cancelled(self) -> bool:
        """Whether the caller has stopped waiting (deadline, disconnect or shutdown)."""
        return self.answer.done()


class Batcher(Generic[In, Out]):
    """Collects items into batches for `run`; belongs to one event loop.

    Args:
        run: answers a batch with one outcome per job, in order: a value or an exception; anything for a cancelled
            one. An exception that it raises fails the whole batch.
        limits: bounds of one batch.
        batch_cost: cost of a batch from its item count, total cost and largest cost.
        slots: maximum number of batches that run at a time.
        prefetch: maximum number of full batches sent ahead while all slots are busy.
        lead_time_s: seconds before a slot is expected to be free at which the next batch is sent, full or not;
            0 turns this off. Applies only while the mean error of the predictions is below it.
        observe: called with the report of every batch after it ran.
        clock: returns seconds; finer than the loop's own clock, which has whole milliseconds under uvloop.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job[In, Out]]], Awaitable[Sequence[Out | Exception]]],
        limits: BatchLimits,
        *,
        batch_cost: BatchCost = ragged,
        slots: int = 1,
        prefetch: int = 1,
        lead_time_s: float = 0.0,
        observe: Callable[[BatchReport], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._limits = limits
        self._batch_cost = batch_cost
        self._slots = slots
        self._prefetch = prefetch
        self._observe = observe
        self._clock = clock
        self._queue: deque[Job[In, Out]] = deque()
        self._background: deque[Job[In, Out]] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._sent: list[SentBatch] = []  # in the order of sending
        self._early_send = EarlySend(lead_time_s if prefetch else 0.0, self._start_workers, clock)

    @property
    def waiting(self) -> int:
        """Number of items in the queue whose callers still wait, without background items."""
        return sum(not job.cancelled for job in self._queue)

    @property
    def running(self) -> int:
        """Number of batches that were sent and not yet answered."""
        return len(self._sent)

    def stalled_s(self) -> float:
        """Age of the oldest running batch, seconds; 0 if none runs, or only background items for which none waits."""
        now = self._clock()
        return max(
            (now - batch.began for batch in self._sent if self._queue or not batch.background), default=0.0
        )

    def set_slots(self, slots: int) -> None:
        """Set the number of slots; additional ones are used at once."""
        self._slots = slots
        self._start_workers()

    async def submit(
        self,
        item: In,
        *,
        cost: int,
        nbytes: int = 0,
        key: Hashable = None,
        background_s: float | None = None,
    ) -> BatchResult[Out]:
        """Queue one item and wait for its outcome; cancelling removes the item from the queue.

        Args:
            item: the item.
            cost: its cost.
            nbytes: its size.
            key: only items of equal keys share a batch.
            background_s: for a background item, how long it may wait for a slot, seconds.

        Raises:
            FrameTooLarge: the item exceeds the byte limit of a batch.
            Overloaded: a background item got no slot in time.
            Exception: the item's own outcome, or a copy of the error that failed its batch.
        """
        if nbytes > self._limits.nbytes:
            raise FrameTooLarge(
                f"the frame has {nbytes} bytes; the limit of a batch is {self._limits.nbytes}"
            )
        loop = asyncio.get_running_loop()
        is_background = background_s is not None
        queue = self._background if is_background else self._queue
        job: Job[In, Out] = Job(
            item, cost, nbytes, key, self._clock(), loop.create_future(), background=is_background
        )
        queue.append(job)
        self._start_workers()
        timer = None if background_s is None else loop.call_later(background_s, self._give_up, job)
        try:
            return await job.answer
        except asyncio.CancelledError:
            # Admission no longer counts its bytes: release them now rather than at the next free slot.
            with suppress(ValueError):
                queue.remove(job)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _give_up(self, job: Job[In, Out]) -> None:
        """End the wait of a background item that is still queued."""
        if job in self._background:
            self._background.remove(job)
            if not job.cancelled:
                job.answer.set_exception(Overloaded("all workers are busy with other frames"))

    def _start_workers(self) -> None:
        """Start worker tasks for free slots, at most one per queued item."""
        target = min(self._slots, self.running + len(self._queue) + len(self._background))
        if len(self._workers) >= self._slots:
            if len(self._queue) >= self._limits.items:
                target = self._slots + self._prefetch
            elif self._queue and self._early_send.is_allowed:
                target = self._slots + 1
        while len(self._workers) < target:
            task = asyncio.create_task(self._worker())
            self._workers.add(task)

    async def _worker(self) -> None:
        # No await between a `_take_batch` that returns nothing and the end of the task: a submit in between would
        # rely on this worker.
        task = asyncio.current_task()
        assert task is not None
        try:
            while batch := self._next_batch():
                await self._run_batch(batch)
        except Exception:
            # This batch is lost, but not the queue.
            self._workers.discard(task)
            self._start_workers()
            raise
        finally:
            self._workers.discard(task)

    def _next_batch(self) -> list[Job[In, Out]]:
        """Take any batch for a slot that is free or about to be, or a full batch to prefetch."""
        if self.running < self._slots or (self.running == self._slots and self._early_send.is_allowed):
            return self._take_batch(full_only=False) or self._take_background()
        return self._take_batch(full_only=True) if self.running < self._slots + self._prefetch else []

    def _take_background(self) -> list[Job[In, Out]]:
        """Take a background item if nothing else waits and a slot is free."""
        while self._background and not self._queue and self.running < self._slots:
            job = self._background.popleft()
            if not job.cancelled:
                return [job]
        return []

    def _take_batch(self, *, full_only: bool) -> list[Job[In, Out]]:
        """Take the head of the queue and the items that fit with it."""
        batch: list[Job[In, Out]] = []
        passed: list[Job[In, Out]] = []
        size = BatchSize(self._limits, self._batch_cost)
        full = False
        while self._queue and not full:
            job = self._queue.popleft()
            if job.cancelled:
                continue
            if batch and job.key != batch[0].key:
                passed.append(job)
                continue
            if not size.admits(job.cost, job.nbytes):
                passed.append(job)
                full = True
                continue
            batch.append(job)
            size.add(job.cost, job.nbytes)
            full = size.is_full
        if full_only and not full:
            # Put them back; the order within each key is kept, the order among keys need not be.
            passed, batch = batch + passed, []
        self._queue.extendleft(reversed(passed))
        return batch

    async def _run_batch(self, batch: list[Job[In, Out]]) -> None:
        began = self._clock()
        costs = [job.cost for job in batch]
        cost = self._batch_cost(len(batch), sum(costs), max(costs))
        running = self._start_batch(began, cost, background=batch[0].background)
        queue_s = tuple(began - job.queued_at for job in batch)
        failed: Exception | None = None
        outcomes: Sequence[Out | Exception] = ()
        try:
            outcomes = await self._run(batch)
            if len(outcomes) != len(batch):
                failed = BackendBroken(f"the backend answered {len(outcomes)} of {len(batch)} frames")
        except Exception as error:
            failed = error
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and not _is_cancelling():
                failed = BackendBroken("the call for the batch was cancelled internally")
            else:  # the loop is shutting down: do not leave callers waiting
                for job in batch:
                    job.answer.cancel()
                raise
        finally:
            self._finish_batch(running, self._clock(), went_well=failed is None)
        run_s = self._clock() - began
        _settle(batch, outcomes, failed, queue_s, run_s)
        # Deferred until the next batch was sent, for which a device may be waiting.
        is_failed = failed is not None
        report = BatchReport(
            len(batch),
            cost,
            queue_s,
            run_s,
            is_failed,
            () if is_failed else outcomes,
            background=running.background,
        )
        asyncio.get_running_loop().call_soon(self._observe, report)

    def _start_batch(self, now: float, cost: int, *, background: bool) -> SentBatch:
        batch = SentBatch(now, cost, now if self.running < self._slots else None, background)
        self._sent.append(batch)
        self._early_send.schedule(self._sent, self._slots)
        return batch

    def _finish_batch(self, batch: SentBatch, now: float, *, went_well: bool) -> None:
        self._sent.remove(batch)
        if batch.slot_since is not None:
            if went_well:
                self._early_send.observe(batch.cost, now - batch.slot_since)
            # The oldest prefetched batch moves into the slot.
            prefetched = next((sent for sent in self._sent if sent.slot_since is None), None)
            if prefetched is not None:
                prefetched.slot_since = now
        self._early_send.schedule(self._sent, self._slots)


def _settle(
    batch: Sequence[Job[In, Out]],
    outcomes: Sequence[Out | Exception],
    failed: Exception | None,
    queue_s: Sequence[float],
    run_s: float,
) -> None:
    """Give each caller that still waits its outcome, or a copy of the error that `failed` its batch."""
    if failed is not None:
        logger.warning("batch of %d frames failed: %s", len(batch), failed, exc_info=_traceback_of(failed))
    for i, job in enumerate(batch):
        if job.cancelled:
            continue
        outcome = _copy_error(failed) if failed is not None else outcomes[i]
        if isinstance(outcome, Exception):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(BatchResult(outcome, queue_s[i], run_s, len(batch)))


def _copy_error(error: Exception) -> ServeError:
    """Copy an error for one caller: a shared exception collects the tracebacks of all of them."""
    if isinstance(error, ServeError):
        return type(error)(str(error))
    return BackendBroken("the batch failed with an internal error; see the gateway's log")


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _traceback_of(error: Exception) -> Exception | None:
    return None if isinstance(error, ServeError) else error
