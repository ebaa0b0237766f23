"""Early send: when the next batch may go although all slots are still busy.

A batch sent `lead_time_s` before a slot is free waits at the worker instead of being on its way. When that will be is
predicted from the cost of the batches in the slots (`serve.gateway.latency`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve.gateway.latency import LatencyModel

__all__ = ["EarlySend", "SentBatch"]


@dataclass(eq=False)
class SentBatch:
    """A batch that was sent.

    Attributes:
        began: time of sending, seconds of the batcher's clock.
        cost: its cost.
        slot_since: time since which it occupies a slot; None while it is prefetched.
        background: whether it is a background item.
    """

    began: float
    cost: int
    slot_since: float | None
    background: bool = False


class EarlySend:
    """Allows one batch at a time without a free slot; belongs to one event loop.

    Args:
        lead_time_s: seconds before a slot is expected to be free at which a batch is allowed; 0 turns this off. Applies
            only while the mean error of the predictions is below it.
        on_allowed: called when a batch is allowed.
        clock: returns seconds.
    """

    def __init__(
        self, lead_time_s: float, on_allowed: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self._lead_time_s = lead_time_s
        self._on_allowed = on_allowed
        self._clock = clock
        self._latency_model = LatencyModel()
        self._timer: asyncio.TimerHandle | None = None
        self._until = float("-inf")

    @property
    def is_allowed(self) -> bool:
        """Whether a batch may be sent without a free slot."""
        return self._until > self._clock()

    def observe(self, cost: int, seconds: float) -> None:
        """Learn from a batch of `cost` that occupied a slot for `seconds`."""
        self._latency_model.observe(cost, seconds)

    def schedule(self, sent: Sequence[SentBatch], slots: int) -> None:
        """Allow nothing until a slot is about to be free; to call when a batch begins or ends.

        Args:
            sent: batches that run; with as many as there are slots, all are busy and none is prefetched.
            slots: number of slots.
        """
        self._until = float("-inf")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lead_time_s or len(sent) != slots:
            return
        ends = []
        for batch in sent:
            seconds = self._latency_model.predict(batch.cost, max_error_s=self._lead_time_s)
            if seconds is None or batch.slot_since is None:
                return
            ends.append(batch.slot_since + seconds)
        delay_s = max(0.0, min(ends) - self._lead_time_s - self._clock())
        self._timer = asyncio.get_running_loop().call_later(
            delay_s, self._allow, min(ends) + self._lead_time_s
        )

    def _allow(self, until: float) -> None:
        """Allow one batch; after `until` the prediction was wrong, and batches wait again."""
        self._timer = None
        self._until = until
        self._on_allowed()
