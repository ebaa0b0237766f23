"""Fake device for the batcher: records its batches and answers on release."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from serve.gateway.batcher import Batcher, BatchReport, Job
from serve.protocol.batching import BatchLimits


class Device:
    """`run` of a batcher. While `held`, every batch waits for its own `release`."""

    def __init__(self, *, held: bool = False) -> None:
        self.held = held
        self.batches: list[list[Any]] = []
        self.waiting: list[asyncio.Future[Any]] = []
        self.reports: list[BatchReport] = []
        self.answer: Callable[[Sequence[Any]], Sequence[Any]] = lambda items: [
            f"answer to {item}" for item in items
        ]

    async def run(self, jobs: Sequence[Job[Any, Any]]) -> Sequence[Any]:
        items = [job.item for job in jobs]
        self.batches.append(items)
        if self.held:
            gate: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.waiting.append(gate)
            await gate
        return self.answer(items)

    async def release(self, count: int = 1) -> None:
        """Let the oldest batches go on, and everything that follows from it happen."""
        for _ in range(count):
            self.waiting.pop(0).set_result(None)
            await turns()

    def batcher(
        self,
        *,
        items: int = 4,
        cost: int = 100,
        nbytes: int = 1000,
        slots: int = 1,
        prefetch: int = 0,
        **more: Any,
    ) -> Batcher[Any, Any]:
        return Batcher(
            self.run,
            BatchLimits(items, cost, nbytes),
            slots=slots,
            prefetch=prefetch,
            observe=self.reports.append,
            **more,
        )


async def turns(count: int = 10) -> None:
    """Let the loop turn a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


def submit(batcher: Batcher[Any, Any], item: Any, cost: int = 1, **more: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(batcher.submit(item, cost=cost, **more))


async def submitted(
    batcher: Batcher[Any, Any], *items: Any, cost: int = 1, **more: Any
) -> list[asyncio.Task[Any]]:
    """Submit items one after another, each on a loop turn of its own, and see that they are waiting or running."""
    tasks = []
    for item in items:
        tasks.append(submit(batcher, item, cost, **more))
        await turns()
    return tasks


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own; it must leave no task."""

    @functools.wraps(test)
    def run(*arguments: Any, **more: Any) -> None:
        async def inside() -> None:
            async with asyncio.timeout(20):
                await test(*arguments, **more)
            await turns()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left: {left}"

        asyncio.run(inside())

    return run
