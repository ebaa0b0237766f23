"""Requests to batches: greedy, late-binding, within a cost budget, one outcome per item.

A free slot takes what is waiting, at once; while a batch runs the next one grows. There is no timer and no
resident loop: a worker task lives only while there is work, so nothing can die and leave callers hanging.
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
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.errors import BackendBroken, FrameTooLarge, Overloaded, ServeError, SettingsError

__all__ = ["Admission", "BatchLimits", "BatchReport", "Batcher", "Permit", "Settled", "padded", "ragged"]

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


class Admission:
    """Bounds what is being worked on: requests, and bytes held for them. The one owner of both counts."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        """Allow `max_items` frames and `max_bytes` bytes of bodies at a time."""
        self.max_items, self.max_bytes = max_items, max_bytes
        self.items = 0
        self.bytes = 0

    @contextmanager
    def permit(self) -> Iterator[Permit]:
        """Held by a request from before its body is read until it is answered; given back on every way out."""
        permit = Permit(self)
        try:
            yield permit
        finally:
            permit.give_back()


@dataclass
class Permit:
    """What one request holds of an `Admission`; it grows as the request turns out larger."""

    admission: Admission
    items: int = 0
    bytes: int = 0

    def grow(self, *, items: int = 0, nbytes: int = 0) -> None:
        """Take more.

        Raises:
            Overloaded: that would be over a bound; nothing more is taken.
        """
        self.expect(items=items, nbytes=nbytes)
        self.items += items
        self.bytes += nbytes
        self.admission.items += items
        self.admission.bytes += nbytes

    def expect(self, *, items: int = 0, nbytes: int = 0) -> None:
        """See whether there is room for so much more; takes nothing.

        Raises:
            Overloaded: there is none now.
        """
        owner = self.admission
        if items and owner.items + items > owner.max_items:
            raise Overloaded(
                f"{owner.items} frames are waiting or running, the limit is {owner.max_items}; retry later"
            )
        if nbytes and owner.bytes + nbytes > owner.max_bytes:
            raise Overloaded(
                f"requests being served hold {owner.bytes} bytes and this one needs {nbytes} more, the limit is "
                f"{owner.max_bytes}; retry later"
            )

    def move(self) -> Permit:
        """Hand all of it to a permit of its own, for an answer that outlives the function that was permitted."""
        moved = Permit(self.admission, self.items, self.bytes)
        self.items = self.bytes = 0
        return moved

    def give_back(self) -> None:
        """Return everything; harmless the second time."""
        self.admission.items -= self.items
        self.admission.bytes -= self.bytes
        self.items = self.bytes = 0


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


class Batcher(Generic[In, Out]):
    """Collects items into batches for `run`. Belongs to one event loop.

    Args:
        run: answers a batch with one outcome per item, in order: a value or an exception. What it raises
            fails the whole batch.
        limits: bounds of one batch.
        batch_cost: cost of a batch from its item count, total cost and largest cost.
        slots: batches that may run at a time.
        ahead: full batches that may be sent on while all slots are busy.
        observe: told of every batch after it ran.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out | Exception]]],
        limits: BatchLimits,
        *,
        batch_cost: BatchCost = ragged,
        slots: int = 1,
        ahead: int = 1,
        observe: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self._run = run
        self._limits = limits
        self._batch_cost = batch_cost
        self._slots = slots
        self._ahead = ahead
        self._observe = observe
        self._queue: deque[_Job[In, Out]] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._started_at: dict[int, float] = {}  # of the batches that run, by a number of their own
        self._batches = 0

    @property
    def waiting(self) -> int:
        """Items in the queue, settled ones not counted."""
        return sum(not job.answer.done() for job in self._queue)

    @property
    def running(self) -> int:
        """Batches that run now."""
        return len(self._started_at)

    def stalled_s(self) -> float:
        """How long the oldest running batch has been at it, seconds; 0 when none runs."""
        now = asyncio.get_running_loop().time()
        return max((now - began for began in self._started_at.values()), default=0.0)

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
        job: _Job[In, Out] = _Job(item, cost, nbytes, key, loop.time(), loop.create_future())
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
        if len(self._workers) >= self._slots and len(self._queue) >= self._limits.items:
            wanted = self._slots + self._ahead
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
        """What may run beside what runs: anything in a free slot, a full batch ahead, else nothing."""
        if self.running < self._slots:
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
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._batches += 1
        number = self._batches
        self._started_at[number] = began
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
            del self._started_at[number]
        run_s = loop.time() - began
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
        costs = [job.cost for job in batch]
        cost = self._batch_cost(len(batch), sum(costs), max(costs))
        self._observe(BatchReport(len(batch), cost, queue_s, run_s, failed is not None))


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
