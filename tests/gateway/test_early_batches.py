"""Early send: a batch that is not full goes shortly before a slot is free, if durations are predictable."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from serve.errors import NotReady
from serve.gateway.batcher import Batcher
from serve.gateway.latency import LatencyModel
from serve.protocol.batching import BatchLimits
from tests.gateway.virtual_time import in_virtual_time

HANDOVER_S, FIXED_S, EACH_S = 0.003, 0.020, 0.002


class Worker:
    """One worker behind a transport: batches wait for their turn there, and each takes its time."""

    def __init__(self, lead_time_s: float, jitter_s: float = 0.0, workers: int = 1) -> None:
        self.sent: list[tuple[float, int]] = []
        self.began: list[float] = []
        self.ended: list[float] = []
        self.jitter_s = jitter_s
        self.dice = random.Random(0)
        self.turn = asyncio.Semaphore(workers)
        self.loop = asyncio.get_running_loop()
        self.batcher: Batcher[Any, Any] = Batcher(
            self.run,
            BatchLimits(items=16),
            slots=workers,
            prefetch=1,
            lead_time_s=lead_time_s,
            clock=self.loop.time,
        )

    async def run(self, jobs: Sequence[Any]) -> Sequence[Any]:
        items = [job.item for job in jobs]
        self.sent.append((self.loop.time(), len(items)))
        await asyncio.sleep(HANDOVER_S)
        async with self.turn:
            self.began.append(self.loop.time())
            late = self.jitter_s * self.dice.random()
            await asyncio.sleep(FIXED_S + EACH_S * len(items) + late)
            self.ended.append(self.loop.time())
        return [ValueError("broken") if item == "broken" else item for item in items]

    async def arrivals(self, count: int, gap_s: float) -> list[float]:
        """Latencies of so many items that arrive at random, one every `gap_s` on average (Poisson)."""
        gaps = random.Random(1)

        async def one() -> float:
            asked = self.loop.time()
            await self.batcher.submit("item", cost=1)
            return self.loop.time() - asked

        tasks = []
        for _ in range(count):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(gaps.expovariate(1 / gap_s))
        return list(await asyncio.gather(*tasks))

    def idle_s(self) -> list[float]:
        """How long the worker had nothing between two batches."""
        return [max(0.0, began - ended) for began, ended in zip(self.began[1:], self.ended[:-1], strict=True)]


@in_virtual_time
async def test_early_send_has_next_batch_ready_for_a_free_worker():
    late, early = Worker(lead_time_s=0.0), Worker(lead_time_s=HANDOVER_S)
    slow, fast = await late.arrivals(2000, 0.010), await early.arrivals(2000, 0.010)
    assert min(late.idle_s()) == pytest.approx(HANDOVER_S)
    assert statistics.median(early.idle_s()) < HANDOVER_S / 10
    # Fewer wait for the next batch but one, and none for the transport between two.
    assert statistics.median(slow) - statistics.median(fast) > HANDOVER_S / 2
    assert statistics.mean(slow) - statistics.mean(fast) > HANDOVER_S / 2
    assert early.batcher.running == early.batcher.waiting == 0


@in_virtual_time
async def test_item_arriving_shortly_before_a_slot_is_free_is_sent_at_once():
    worker = Worker(lead_time_s=0.004)
    for _ in range(10):  # it learns: 25 ms each, hand-over included
        await worker.batcher.submit("item", cost=1)
    start = worker.loop.time()
    first = asyncio.create_task(worker.batcher.submit("first", cost=1))
    await asyncio.sleep(0.023)
    second = asyncio.create_task(worker.batcher.submit("second", cost=1))
    await asyncio.gather(first, second)
    assert [round(at - start, 4) for at, _ in worker.sent[-2:]] == [0.0, 0.023]


@in_virtual_time
async def test_worker_slower_than_predicted_gets_one_early_batch_at_most():
    worker = Worker(lead_time_s=0.004)
    for _ in range(10):
        await worker.batcher.submit("item", cost=1)
    worker.jitter_s = 1.0  # a hiccup
    tasks = [asyncio.create_task(worker.batcher.submit("first", cost=1))]
    await asyncio.sleep(0.0)
    await asyncio.sleep(0.040)  # the window has been and gone: 21 to 29 ms
    before = len(worker.sent)
    for _ in range(5):
        tasks.append(asyncio.create_task(worker.batcher.submit("later", cost=1)))
        await asyncio.sleep(0.001)
    assert len(worker.sent) == before and worker.batcher.waiting == 5
    worker.jitter_s = 0.0
    answers = await asyncio.gather(*tasks)
    assert answers[-1].batch_items == 5


@in_virtual_time
async def test_batch_waits_for_slot_if_durations_are_unpredictable():
    worker = Worker(lead_time_s=0.004, jitter_s=0.040)
    await worker.arrivals(300, 0.010)
    first_idle = worker.idle_s()
    assert min(first_idle[20:]) == pytest.approx(HANDOVER_S)


@in_virtual_time
async def test_early_send_predicts_the_first_free_of_two_workers():
    worker = Worker(lead_time_s=0.004, workers=2)
    latencies = await worker.arrivals(600, 0.004)
    assert worker.batcher.running == worker.batcher.waiting == 0
    assert max(latencies[100:]) < 0.080


@in_virtual_time
async def test_latency_model_learns_from_failed_items_but_not_from_failed_batches():
    worker = Worker(lead_time_s=0.004)
    for _ in range(10):
        with pytest.raises(ValueError, match="broken"):
            await worker.batcher.submit("broken", cost=1)
    assert worker.batcher._early_send._latency_model.predict(1, max_error_s=0.001) == pytest.approx(0.025)

    async def gone(items: Sequence[Any]) -> Sequence[Any]:
        await asyncio.sleep(30)
        raise NotReady("gone")

    worker.batcher._run = gone
    with pytest.raises(NotReady):
        await worker.batcher.submit("lost", cost=1)
    assert worker.batcher._early_send._latency_model.predict(1, max_error_s=0.001) == pytest.approx(0.025)


def observed(pairs: Sequence[tuple[float, float]]) -> LatencyModel:
    latency = LatencyModel()
    for cost, seconds in pairs:
        latency.observe(cost, seconds)
    return latency


def test_prediction_is_linear_in_cost():
    latency = observed(
        [(cost, 0.02 + 1e-6 * cost) for cost in (20e3, 50e3, 120e3, 30e3, 70e3, 90e3, 20e3, 60e3)]
    )
    assert latency.predict(100e3, max_error_s=0.5) == pytest.approx(0.12)


def test_prediction_is_none_without_enough_or_accurate_observations():
    assert observed([(1, 0.1)] * 5).predict(1, max_error_s=1.0) is None
    steady = observed([(1, 0.1)] * 6)
    assert steady.predict(1, max_error_s=0.001) == pytest.approx(0.1)
    for _ in range(6):
        steady.observe(1, 2.0)
    assert steady.predict(1, max_error_s=0.01) is None
    for _ in range(80):
        steady.observe(1, 0.1)
    assert steady.predict(1, max_error_s=0.01) == pytest.approx(0.1, rel=0.05)


def test_single_outlier_does_not_suspend_predictions():
    steady = observed([(cost, 0.02 + 0.002 * cost) for cost in (1, 2, 3, 4)] * 5)
    steady.observe(2, 2.0)
    assert steady.predict(3, max_error_s=0.0015) == pytest.approx(0.026, abs=0.0005)


def test_lasting_change_is_learned():
    changed = observed([(1, 0.02)] * 40)
    for _ in range(60):
        changed.observe(1, 0.2)
    assert changed.predict(1, max_error_s=0.02) == pytest.approx(0.2, rel=0.1)


def test_prediction_never_decreases_with_cost():
    latency = observed([(10, 0.2), (20, 0.1)] * 5)
    assert latency.predict(1000, max_error_s=9) <= latency.predict(2000, max_error_s=9)
