"""Requests to batches: greedy, late-binding, within a cost budget, one outcome per item.

A free slot takes what is waiting, at once; while a batch runs the next one grows. There is no resident loop:
a worker task lives only while there is work, so nothing can die and leave callers hanging, and nobody ever
waits for a timer: the one there is (`early_s`) lets a batch go sooner.
Knows nothing about HTTP, models, frames or TorchServe: an item has a cost, a size and a key, and `run`
answers a list of them.

Policy, per `Batcher`:

* First in, first out among items of one key; the head of the queue always goes, alone if need be, so
  nothing starves and a lone giant cannot block the line.
* A batch ends before the first item that would take it over the budget.
* Deadline, hang-up and shutdown all end as a settled future: such an item is skipped and never run. What
  runs is not interrupted and keeps its slot, because the device is still busy with it.
* When all slots are busy, a batch that is already full has nothing to wait for: up to `ahead` of those are
  sent on, to hide the transport.
* A batch that is not full is sent on `early_s` before a slot is expected to be free, where batches take as
  long as forecast (`serve.gateway.latency`); it is then there when the slot is, instead of on its way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.errors import BackendBroken, FrameTooLarge, ServeError, SettingsError
from serve.gateway.latency import Forecast

__all__ = ["BatchLimits", "BatchReport", "Batcher", "Settled", "padded", "ragged"]

In = TypeVar("In")
Out = TypeVar("Out")
BatchCost = Callable[[int, int, int], int]

logger = logging.getLogger(__name__)


def ragged(items: int, total: int, largest: int) -> int:
    """Cost of a batch whose items are concatenated (clouds): the sum of their costs."""
    return total


def padded(items: int, total: int, largest: int) -> int:
    """Cost of a batch whose items are padded to the largest (images): n times the largest."""
    return items * largest


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one batch.

    Attributes:
        items: most items.
        cost: most cost, in the unit of the items' costs; an item that alone costs more goes alone.
        nbytes: most bytes of bodies; an item that alone has more is refused.
    """

    items: int = 16
    cost: int = 4_000_000
    nbytes: int = 48 << 20

    def __post_init__(self) -> None:
        for name in ("items", "cost", "nbytes"):
            if getattr(self, name) < 1:
                raise SettingsError(
                    f"a batch's limit of {name} must be at least 1, not {getattr(self, name)}"
                )


@dataclass(frozen=True)
class BatchReport:
    """One batch that was run: how many items, their cost, how long each waited, how long it took, and if it failed."""

    items: int
    cost: int
    queue_s: tuple[float, ...]
    run_s: float
    failed: bool


@dataclass(frozen=True)
class Settled(Generic[Out]):
    """An item's answer, how long it waited, and the batch it was in."""

    value: Out
    queue_s: float
    run_s: float
    batch_items: int


@dataclass(eq=False)
class _Job(Generic[In, Out]):
    item: In
    cost: int
    nbytes: int
    key: Hashable
    queued_at: float
    answer: asyncio.Future[Settled[Out]] = field(repr=False)


@dataclass(eq=False)
class _Running:
    """A batch that was sent: when, at what cost, and since when it has had a slot (None: it was sent ahead)."""

    began: float
    cost: int
    slot_since: float | None


class Batcher(Generic[In, Out]):
    """Collects items into batches for `run`. Belongs to one event loop.

    Args:
        run: answers a batch with one outcome per item, in order: a value or an exception. What it raises
            fails the whole batch.
        limits: bounds of one batch.
        batch_cost: cost of a batch from its item count, total cost and largest cost.
        slots: batches that may run at a time.
        ahead: batches that may be sent on while all slots are busy.
        early_s: how long before a slot is expected to be free the next batch is sent, full or not, seconds;
            0: never. Only while forecasts are off by less than this on average.
        observe: told of every batch after it ran.
        clock: seconds; finer than a loop's own time, which uvloop counts in whole milliseconds.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out | Exception]]],
        limits: BatchLimits,
        *,
        batch_cost: BatchCost = ragged,
        slots: int = 1,
        ahead: int = 1,
        early_s: float = 0.0,
        observe: Callable[[BatchReport], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._limits = limits
        self._batch_cost = batch_cost
        self._slots = slots
        self._ahead = ahead
        self._early_s = early_s if ahead else 0.0
        self._observe = observe
        self._clock = clock
        self._queue: deque[_Job[In, Out]] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._sent: list[_Running] = []  # in the order they were sent
        self._forecast = Forecast()
        self._early: asyncio.TimerHandle | None = None
        self._early_until = float("-inf")  # until then a batch may go although no slot is free yet

    @property
    def waiting(self) -> int:
        """Items in the queue, settled ones not counted."""
        return sum(not job.answer.done() for job in self._queue)

    @property
    def running(self) -> int:
        """Batches that run now."""
        return len(self._sent)

    def stalled_s(self) -> float:
        """How long the oldest running batch has been at it, seconds; 0 when none runs."""
        now = self._clock()
        return max((now - batch.began for batch in self._sent), default=0.0)

    def set_slots(self, slots: int) -> None:
        """Follow the number of workers there are; more are used at once."""
        self._slots = slots
        self._wake()

    async def submit(self, item: In, *, cost: int, nbytes: int = 0, key: Hashable = None) -> Settled[Out]:
        """Wait for the outcome of one item; cancelling the wait takes it out of the queue.

        Raises:
            FrameTooLarge: it has more bytes than any batch may have.
            Exception: the item's own outcome, or a fresh copy of what failed its batch.
        """
        if nbytes > self._limits.nbytes:
            raise FrameTooLarge(f"the frame has {nbytes} bytes, a batch may have {self._limits.nbytes}")
        loop = asyncio.get_running_loop()
        job: _Job[In, Out] = _Job(item, cost, nbytes, key, self._clock(), loop.create_future())
        self._queue.append(job)
        self._wake()
        try:
            return await job.answer
        except asyncio.CancelledError:
            # Its bytes are no longer counted by anybody: they must not wait for a free slot to be let go.
            with suppress(ValueError):
                self._queue.remove(job)
            raise

    def _wake(self) -> None:
        """Start workers as far as there are free slots and something to take; one per waiting item at most."""
        wanted = min(self._slots, self.running + len(self._queue))
        if len(self._workers) >= self._slots:
            if len(self._queue) >= self._limits.items:
                wanted = self._slots + self._ahead
            elif self._queue and self._nearly_free():
                wanted = self._slots + 1
        while len(self._workers) < wanted:
            task = asyncio.create_task(self._work())
            self._workers.add(task)

    async def _work(self) -> None:
        # No await may come between the `_take` that finds nothing and the end: a submit in the gap would
        # count on this worker.
        task = asyncio.current_task()
        assert task is not None
        try:
            while batch := self._next():
                await self._answer(batch)
        except Exception:
            # A batch is lost, the queue is not.
            self._workers.discard(task)
            self._wake()
            raise
        finally:
            self._workers.discard(task)

    def _next(self) -> list[_Job[In, Out]]:
        """What may run beside what runs: anything in a slot that is free or about to be, a full batch ahead."""
        if self.running < self._slots or (self.running == self._slots and self._nearly_free()):
            return self._take(full_only=False)
        return self._take(full_only=True) if self.running < self._slots + self._ahead else []

    def _take(self, *, full_only: bool) -> list[_Job[In, Out]]:
        """The head of the queue and what goes with it, at the last moment."""
        batch: list[_Job[In, Out]] = []
        passed: list[_Job[In, Out]] = []
        total = largest = nbytes = 0
        full = False
        while self._queue and not full:
            job = self._queue.popleft()
            if job.answer.done():  # expired, hung up, or shut down
                continue
            if batch and job.key != batch[0].key:
                passed.append(job)
                continue
            cost = self._batch_cost(len(batch) + 1, total + job.cost, max(largest, job.cost))
            if batch and (cost > self._limits.cost or nbytes + job.nbytes > self._limits.nbytes):
                passed.append(job)
                full = True
                continue
            batch.append(job)
            total, largest, nbytes = total + job.cost, max(largest, job.cost), nbytes + job.nbytes
            full = len(batch) >= self._limits.items
        if full_only and not full:
            # Back where they were; order among keys need not be kept, first in first out within a key is.
            passed, batch = batch + passed, []
        self._queue.extendleft(reversed(passed))
        return batch

    async def _answer(self, batch: list[_Job[In, Out]]) -> None:
        began = self._clock()
        costs = [job.cost for job in batch]
        cost = self._batch_cost(len(batch), sum(costs), max(costs))
        running = self._begin(began, cost)
        queue_s = tuple(began - job.queued_at for job in batch)
        failed: Exception | None = None
        outcomes: Sequence[Out | Exception] = ()
        try:
            outcomes = await self._run([job.item for job in batch])
            if len(outcomes) != len(batch):
                failed = BackendBroken(f"the backend answered {len(outcomes)} of {len(batch)} frames")
        except Exception as error:
            failed = error
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and not _being_cancelled():
                failed = BackendBroken("the call for the batch was cancelled from within")
            else:  # the loop is being shut down: nobody may wait for what will not come
                for job in batch:
                    job.answer.cancel()
                raise
        finally:
            self._end(running, self._clock(), went_well=failed is None)
        run_s = self._clock() - began
        if failed is not None:
            logger.warning("a batch of %d failed: %s", len(batch), failed, exc_info=_unexpected(failed))
        for i, job in enumerate(batch):
            if job.answer.done():
                continue
            outcome = _fresh(failed) if failed is not None else outcomes[i]
            if isinstance(outcome, Exception):
                job.answer.set_exception(outcome)
            else:
                job.answer.set_result(Settled(outcome, queue_s[i], run_s, len(batch)))
        # After the next batch was sent, which a device may be waiting for.
        report = BatchReport(len(batch), cost, queue_s, run_s, failed is not None)
        asyncio.get_running_loop().call_soon(self._observe, report)

    def _begin(self, now: float, cost: int) -> _Running:
        batch = _Running(now, cost, now if self.running < self._slots else None)
        self._sent.append(batch)
        self._early_until = float("-inf")
        self._foresee()
        return batch

    def _end(self, batch: _Running, now: float, *, went_well: bool) -> None:
        self._sent.remove(batch)
        if batch.slot_since is not None:
            if went_well:
                self._forecast.tell(batch.cost, now - batch.slot_since)
            # What was sent ahead has its slot now.
            following = next((one for one in self._sent if one.slot_since is None), None)
            if following is not None:
                following.slot_since = now
        self._early_until = float("-inf")
        self._foresee()

    def _foresee(self) -> None:
        """Wake up `early_s` before the first slot is expected to be free, if all are taken and none is ahead."""
        if self._early is not None:
            self._early.cancel()
            self._early = None
        if not self._early_s or self.running != self._slots:
            return
        ends = []
        for batch in self._sent:
            seconds = self._forecast.seconds(batch.cost, within_s=self._early_s)
            if seconds is None or batch.slot_since is None:
                return
            ends.append(batch.slot_since + seconds)
        delay_s = max(0.0, min(ends) - self._early_s - self._clock())
        self._early = asyncio.get_running_loop().call_later(
            delay_s, self._open_early, min(ends) + self._early_s
        )

    def _open_early(self, until: float) -> None:
        """A slot is about to be free; if it is not by then, the forecast was wrong and waiting is right again."""
        self._early = None
        self._early_until = until
        self._wake()

    def _nearly_free(self) -> bool:
        return self._early_until > self._clock()


def _fresh(error: Exception) -> ServeError:
    """An exception of a caller's own: one that is shared collects every caller's traceback."""
    if isinstance(error, ServeError):
        return type(error)(str(error))
    return BackendBroken("the batch failed for a reason of ours; see the gateway's log")


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _unexpected(error: Exception) -> Exception | None:
    return None if isinstance(error, ServeError) else error
