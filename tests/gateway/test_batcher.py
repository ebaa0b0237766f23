"""The batcher alone: greedy, FIFO, within its budget, one outcome per item, and no resident task."""

from __future__ import annotations

import asyncio

import pytest

from serve.errors import BackendBroken, FrameTooLarge, NotReady, OutOfMemory, Overloaded, SettingsError
from serve.protocol.batching import BatchLimits, padded, ragged
from tests.gateway.device import Device, in_a_loop, submit, submitted, turns


@in_a_loop
async def test_single_item_is_sent_on_the_next_loop_turn():
    device = Device()
    task = submit(device.batcher(), "a")
    await asyncio.sleep(0)  # the submitter runs and starts a worker
    assert device.batches == []
    await asyncio.sleep(0)  # the worker runs
    assert device.batches == [["a"]]
    assert (await task).value == "answer to a"


@in_a_loop
async def test_items_submitted_in_one_loop_turn_share_a_batch():
    device = Device()
    batcher = device.batcher()
    answers = await asyncio.gather(*(batcher.submit(item, cost=1) for item in "abc"))
    assert device.batches == [["a", "b", "c"]]
    assert [answer.value for answer in answers] == ["answer to a", "answer to b", "answer to c"]
    assert {answer.batch_items for answer in answers} == {3}


@in_a_loop
async def test_next_batch_grows_while_one_runs():
    device = Device(held=True)
    batcher = device.batcher()
    tasks = await submitted(batcher, "a", "b", "c", "d", "e", "f")
    assert device.batches == [["a"]] and batcher.waiting == 5 and batcher.running == 1
    await device.release()
    assert device.batches == [
        ["a"],
        ["b", "c", "d", "e"],
    ]  # four at most, and no earlier than a slot was free
    await device.release(2)
    assert [task.result().value[-1] for task in tasks] == [*"abcdef"]
    assert [task.result().batch_items for task in tasks] == [1, 4, 4, 4, 4, 1]


@in_a_loop
async def test_batch_ends_before_first_item_over_budget_in_fifo_order():
    device = Device(held=True)
    batcher = device.batcher(cost=10)
    first = await submitted(batcher, "first")
    costs = {"a": 4, "b": 4, "c": 7, "d": 1}
    tasks = [(await submitted(batcher, item, cost=cost))[0] for item, cost in costs.items()]
    await device.release(3)
    assert device.batches[1:] == [["a", "b"], ["c", "d"]]  # d would have fitted beside a and b
    await asyncio.gather(*first, *tasks)


@in_a_loop
async def test_padded_items_each_cost_as_much_as_the_largest():
    device = Device(held=True)
    batcher = device.batcher(cost=10, batch_cost=padded)
    tasks = await submitted(batcher, "first")
    for item, cost in {"a": 2, "b": 3, "c": 4}.items():
        tasks += await submitted(batcher, item, cost=cost)
    await device.release(3)
    assert device.batches[1:] == [["a", "b"], ["c"]]  # 3 x 4 is over 10, 2 x 3 is not
    await asyncio.gather(*tasks)
    assert (ragged(3, 9, 4), padded(3, 9, 4)) == (9, 12)
    assert [report.cost for report in device.reports] == [1, 6, 4]


@in_a_loop
async def test_oversized_head_of_queue_is_sent_alone():
    device = Device(held=True)
    batcher = device.batcher(cost=10)
    tasks = await submitted(batcher, "first")
    tasks += await submitted(batcher, "giant", cost=1000)
    tasks += await submitted(batcher, "small")
    await device.release(3)
    assert device.batches == [["first"], ["giant"], ["small"]]
    await asyncio.gather(*tasks)


@in_a_loop
async def test_batch_respects_byte_limit_and_larger_item_is_rejected():
    device = Device(held=True)
    batcher = device.batcher(nbytes=10)
    tasks = await submitted(batcher, "first")
    tasks += await submitted(batcher, "a", "b", "c", nbytes=5)
    with pytest.raises(FrameTooLarge, match="11 bytes"):
        await batcher.submit("d", cost=1, nbytes=11)
    await device.release(3)
    assert device.batches == [["first"], ["a", "b"], ["c"]]
    await asyncio.gather(*tasks)


@in_a_loop
async def test_items_of_different_keys_never_share_a_batch_and_keep_their_order():
    device = Device(held=True)
    batcher = device.batcher()
    tasks = await submitted(batcher, "first")
    for item in ("w1", "h1", "w2", "h2", "w3"):
        tasks += await submitted(batcher, item, key=item[0])
    await device.release(3)
    assert device.batches == [["first"], ["w1", "w2", "w3"], ["h1", "h2"]]
    await asyncio.gather(*tasks)


@in_a_loop
async def test_stream_of_one_key_does_not_starve_another():
    device = Device(held=True)
    batcher = device.batcher(items=2)
    tasks = await submitted(batcher, "w0", key="w")
    tasks += await submitted(batcher, "h1", key="h")
    for i in range(1, 5):
        tasks += await submitted(batcher, f"w{i}", key="w")
    await device.release(4)
    assert device.batches[1] == ["h1"]
    await asyncio.gather(*tasks)


@in_a_loop
async def test_only_full_batches_are_prefetched_up_to_the_limit():
    device = Device(held=True)
    batcher = device.batcher(items=2, prefetch=1)
    tasks = await submitted(batcher, "a", "b")
    assert device.batches == [["a"]]  # b alone is no full batch
    tasks += await submitted(batcher, "c")
    assert device.batches == [["a"], ["b", "c"]]
    tasks += await submitted(batcher, "d", "e", "f")
    assert device.batches == [["a"], ["b", "c"]]  # one prefetch, not two
    await device.release()
    assert device.batches == [["a"], ["b", "c"], ["d", "e"]]
    await device.release()
    assert device.batches[3:] == []  # f waits: the slot is busy and f alone is not full
    await device.release(2)
    assert device.batches[3:] == [["f"]]
    await asyncio.gather(*tasks)


@in_a_loop
async def test_changed_number_of_slots_applies_at_once():
    device = Device(held=True)
    batcher = device.batcher(items=2, prefetch=0)
    tasks = await submitted(batcher, *"abcdefgh")
    assert device.batches == [["a"]]
    batcher.set_slots(3)
    await turns()
    assert device.batches == [["a"], ["b", "c"], ["d", "e"]]
    batcher.set_slots(1)
    await device.release()
    await device.release()
    assert batcher.running == 1 and len(device.batches) == 3
    await device.release(3)
    assert device.batches[3:] == [["f", "g"], ["h"]]
    await asyncio.gather(*tasks)


@in_a_loop
async def test_reduced_slots_apply_under_full_load_with_prefetch():
    device = Device(held=True)
    batcher = device.batcher(items=2, prefetch=1, slots=3)
    tasks = await submitted(batcher, *range(30))
    assert batcher.running == 4
    batcher.set_slots(1)
    for _ in range(2):
        await device.release()
    assert batcher.running == 2
    while device.waiting:
        await device.release()
        assert batcher.running <= 2
    await asyncio.gather(*tasks)


@in_a_loop
async def test_cancelled_item_is_never_run_and_releases_its_memory():
    device = Device(held=True)
    batcher = device.batcher()
    tasks = await submitted(batcher, "a")
    given_up, kept = await submitted(batcher, "b", "c")
    given_up.cancel()
    await turns()
    assert batcher.waiting == 1 and [job.item for job in batcher._queue] == ["c"]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await batcher.submit("expired", cost=1)
    await device.release(2)
    assert device.batches == [["a"], ["c"]]
    await asyncio.gather(*tasks, kept)
    assert given_up.cancelled()


@in_a_loop
async def test_item_cancelled_in_its_first_loop_turn_is_never_run():
    device = Device()
    batcher = device.batcher()
    task = submit(batcher, "a")
    await asyncio.sleep(0)
    task.cancel()
    await turns()
    assert task.cancelled() and device.batches == []


@in_a_loop
async def test_running_batch_is_not_interrupted_and_keeps_its_slot():
    device = Device(held=True)
    batcher = device.batcher()
    hung_up, neighbour = submit(batcher, "a"), submit(batcher, "b")
    await turns()
    hung_up.cancel()
    (later,) = await submitted(batcher, "c")
    assert device.batches == [["a", "b"]] and batcher.running == 1
    await device.release(2)
    assert (await neighbour).value == "answer to b"
    assert device.batches == [["a", "b"], ["c"]]
    await later


@in_a_loop
async def test_exception_of_one_item_does_not_affect_the_others():
    device = Device()
    device.answer = lambda items: [ValueError(item) if item == "bad" else item for item in items]
    batcher = device.batcher()
    outcomes = await asyncio.gather(
        *(batcher.submit(item, cost=1) for item in ("good", "bad", "fine")), return_exceptions=True
    )
    assert [outcomes[0].value, outcomes[2].value] == ["good", "fine"]
    assert isinstance(outcomes[1], ValueError)
    assert [report.failed for report in device.reports] == [False]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(NotReady("gone"), NotReady), (OutOfMemory("full"), OutOfMemory), (KeyError("secret"), BackendBroken)],
)
def test_failed_batch_raises_a_separate_exception_for_every_caller(raised, expected, caplog):
    @in_a_loop
    async def run():
        def fail(items):
            raise raised

        device = Device()
        device.answer = fail
        batcher = device.batcher()
        outcomes = await asyncio.gather(
            *(batcher.submit(item, cost=1) for item in "abc"), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [expected] * 3
        assert len({id(outcome) for outcome in [*outcomes, raised]}) == 4
        assert not any("secret" in str(outcome) for outcome in outcomes)
        assert [report.failed for report in device.reports] == [True]
        device.answer = lambda items: items
        assert (await batcher.submit("next", cost=1)).value == "next"

    run()
    assert "batch of 3 frames failed" in caplog.text
    assert ("Traceback" in caplog.text) == (expected is BackendBroken)


@pytest.mark.parametrize("answered", [[], ["one"], ["one", "two", "three"], None])
def test_wrong_number_of_outcomes_fails_the_batch(answered):
    @in_a_loop
    async def run():
        device = Device()
        device.answer = lambda items: answered
        batcher = device.batcher()
        outcomes = await asyncio.gather(
            *(batcher.submit(item, cost=1) for item in "ab"), return_exceptions=True
        )
        assert all(isinstance(outcome, BackendBroken) for outcome in outcomes)

    run()


@in_a_loop
async def test_internally_cancelled_call_fails_its_batch_without_cancelling_callers():
    device = Device()

    def cancel(items):
        raise asyncio.CancelledError

    device.answer = cancel
    batcher = device.batcher(items=1)
    outcomes = await asyncio.gather(*(batcher.submit(item, cost=1) for item in "ab"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendBroken] * 2


@in_a_loop
async def test_loop_shutdown_cancels_waiting_callers():
    device = Device(held=True)
    batcher = device.batcher()
    task = submit(batcher, "a")
    await turns()
    (worker,) = batcher._workers
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert batcher.running == 0


def test_observer_exception_does_not_affect_answers():
    async def run():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        device = Device()
        batcher = device.batcher(items=1)

        def fail(report):
            raise RuntimeError("observer")

        batcher._observe = fail
        answers = await asyncio.gather(*(batcher.submit(item, cost=1) for item in "abc"))
        assert [answer.value[-1] for answer in answers] == [*"abc"]
        assert batcher.running == 0

    asyncio.run(asyncio.wait_for(run(), 5))


@in_a_loop
async def test_stalled_s_returns_age_of_oldest_batch():
    device = Device(held=True)
    batcher = device.batcher()
    assert batcher.stalled_s() == 0.0
    (task,) = await submitted(batcher, "a")
    while batcher.stalled_s() == 0.0:
        await asyncio.sleep(0)
    await device.release()
    assert batcher.stalled_s() == 0.0
    await task


@in_a_loop
async def test_idle_batcher_has_no_task_or_timer():
    device = Device()
    batcher = device.batcher(slots=3, prefetch=2)
    await asyncio.gather(*(batcher.submit(item, cost=1) for item in range(50)))
    await turns()
    assert (batcher.waiting, batcher.running, len(batcher._workers)) == (0, 0, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_a_loop
async def test_report_has_size_cost_and_waiting_times():
    device = Device(held=True)
    batcher = device.batcher()
    tasks = await submitted(batcher, "a", "b")
    await device.release(2)
    first, second = device.reports
    assert (first.items, first.cost, first.failed, len(first.queue_s)) == (1, 1, False, 1)
    assert second.queue_s[0] > first.queue_s[0] >= 0 and second.run_s >= 0
    assert tasks[1].result().queue_s == second.queue_s[0]


@pytest.mark.parametrize("limit", ["items", "cost", "nbytes"])
def test_limit_below_one_is_rejected(limit):
    with pytest.raises(SettingsError, match=limit):
        BatchLimits(**{limit: 0})


# Background items


@in_a_loop
async def test_background_items_run_one_by_one_and_after_all_others():
    device = Device(held=True)
    batcher = device.batcher(prefetch=1)
    tasks = [asyncio.create_task(batcher.submit(item, cost=1, background_s=9.0)) for item in "xyz"]
    await turns()
    assert device.batches == [["x"]] and batcher.waiting == 0
    tasks += await submitted(batcher, "a", "b")
    assert batcher.waiting == 2
    await device.release()
    assert device.batches[1:] == [["a", "b"]]
    tasks += await submitted(batcher, "c")
    await device.release(4)
    assert device.batches[2:] == [["c"], ["y"], ["z"]]
    assert [report.background for report in device.reports] == [True, False, False, True, True]
    assert [task.result().value[-1] for task in tasks] == [*"xyzabc"]


@in_a_loop
async def test_a_background_item_without_a_slot_gives_up_and_one_that_runs_does_not():
    device = Device(held=True)
    batcher = device.batcher()
    runs = asyncio.create_task(batcher.submit("x", cost=1, background_s=0.001))
    await turns()
    with pytest.raises(Overloaded):
        await batcher.submit("y", cost=1, background_s=0.001)
    assert not runs.done()
    await device.release()
    assert (await runs).value == "answer to x" and device.batches == [["x"]]


@in_a_loop
async def test_a_background_item_that_hangs_is_no_stall_until_another_item_waits_for_it():
    device = Device(held=True)
    now = [0.0]
    batcher = device.batcher(clock=lambda: now[0])
    hangs = asyncio.create_task(batcher.submit("x", cost=1, background_s=9.0))
    await turns()
    now[0] = 100.0
    assert batcher.stalled_s() == 0
    (waits,) = await submitted(batcher, "a")
    assert batcher.stalled_s() == 100
    await device.release()
    await device.release()
    await asyncio.gather(hangs, waits)


@in_a_loop
async def test_a_cancelled_background_item_is_not_sent():
    device = Device(held=True)
    batcher = device.batcher()
    (task,) = await submitted(batcher, "a")
    gone = asyncio.create_task(batcher.submit("x", cost=1, background_s=9.0))
    await turns()
    gone.cancel()
    await device.release()
    await task
    assert device.batches == [["a"]] and not batcher.running
