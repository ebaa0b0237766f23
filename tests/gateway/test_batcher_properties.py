"""Properties of the batcher under any order of arrivals, cancellations, failures and slot changes."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import NotReady
from serve.gateway.batcher import Batcher, BatchResult
from serve.protocol.batching import BatchLimits, padded, ragged
from tests.gateway.device import in_a_loop, turns

LIMITS = BatchLimits(items=3, cost=10, nbytes=20)
ARRIVAL = st.tuples(st.just("submit"), st.integers(0, 14), st.integers(0, 20), st.sampled_from("wh"))
HANG_UP = st.tuples(st.just("hang up"), st.integers(0, 40))
END = st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from(["good", "one bad", "fails", "short"]))
SLOTS = st.tuples(st.just("slots"), st.integers(1, 3))
TURN = st.just(("turn",))
STEPS = st.lists(st.one_of(ARRIVAL, ARRIVAL, ARRIVAL, HANG_UP, END, END, SLOTS, TURN), max_size=60)
Item = tuple[int, int, int, str]  # number, cost, bytes, key


class Watched:
    """Runs batches until they are ended, and checks the guarantees at the start of each."""

    def __init__(self, batch_cost: Any, slots: int, prefetch: int) -> None:
        self.cost_of, self.slots, self.prefetch = batch_cost, slots, prefetch
        self.running: list[tuple[list[Item], asyncio.Future[str]]] = []
        self.last_of: dict[str, int] = {}
        self.ran: set[int] = set()
        self.given_up: set[int] = set()
        self.wrong: list[AssertionError] = []
        self.batcher: Batcher[Item, int] = Batcher(
            self.run, LIMITS, batch_cost=batch_cost, slots=slots, prefetch=prefetch
        )

    async def run(self, jobs: Any) -> Any:
        batch = [job.item for job in jobs]
        try:
            self.check(batch)
        except AssertionError as error:  # the batcher would take it for a failure of the device
            self.wrong.append(error)
        return await self.answers(batch)

    def check(self, batch: Any) -> None:
        costs, sizes = [item[1] for item in batch], [item[2] for item in batch]
        assert len(self.running) < self.slots + self.prefetch
        assert 1 <= len(batch) <= LIMITS.items
        assert len({item[3] for item in batch}) == 1
        if len(batch) > 1:
            assert (
                self.cost_of(len(costs), sum(costs), max(costs)) <= LIMITS.cost
                and sum(sizes) <= LIMITS.nbytes
            )
        for number, _, _, key in batch:
            assert number > self.last_of.get(key, -1), "overtaken"
            assert number not in self.ran and number not in self.given_up
            self.last_of[key] = number
            self.ran.add(number)

    async def answers(self, batch: Any) -> Any:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running.append((batch, end))
        how = await end
        self.running = [entry for entry in self.running if entry[1] is not end]
        if how == "fails":
            raise NotReady("the device is gone")
        answers: list[Any] = [item[0] for item in batch]
        if how == "one bad":
            answers[0] = ValueError(batch[0][0])
        return answers[:-1] if how == "short" else answers


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS, cost=st.sampled_from([ragged, padded]), slots=st.integers(1, 3), prefetch=st.integers(0, 2)
)
@in_a_loop
async def test_every_item_gets_its_own_answer_once_within_all_limits(steps, cost, slots, prefetch):
    watched = Watched(cost, slots, prefetch)
    tasks: list[asyncio.Task[BatchResult[int]]] = []
    broken: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
    for step in [*steps, ("turn",)]:
        if step[0] == "submit":
            item = (len(tasks), *step[1:])
            tasks.append(
                asyncio.create_task(watched.batcher.submit(item, cost=step[1], nbytes=step[2], key=step[3]))
            )
        elif step[0] == "hang up" and step[1] < len(tasks):
            if step[1] not in watched.ran and not tasks[step[1]].done():
                watched.given_up.add(step[1])
            tasks[step[1]].cancel()
        elif step[0] == "end" and step[1] < len(watched.running) and not watched.running[step[1]][1].done():
            watched.running[step[1]][1].set_result(step[2])
        elif step[0] == "slots":
            watched.slots = step[1]
            watched.batcher.set_slots(step[1])
        else:
            await turns(4)
            # Work-conserving: nothing waits beside a free slot.
            assert not watched.batcher.waiting or len(watched.running) >= watched.slots
    while watched.running:
        watched.running[0][1].set_result("good")
        await turns(4)
    for number, task in enumerate(tasks):
        assert task.done(), f"{number} was never settled"
        if not task.cancelled() and task.exception() is None:
            assert task.result().value == number
        elif not task.cancelled():
            assert type(task.exception()).__name__ in ("ValueError", "NotReady", "BackendBroken")
    assert (watched.batcher.waiting, watched.batcher.running, len(watched.batcher._queue)) == (0, 0, 0)
    assert not broken and not watched.wrong
