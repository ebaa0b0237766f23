"""The local engine: processes of this machine that compute parts."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from serve.bulk.destination import Destination
from serve.bulk.parts import LOADING, Counts, Job, Part, compute_part
from serve.predict.models import Model

__all__ = ["LocalEngine"]

_CONTEXT = get_context("spawn")
_SHOW_S = 0.5


class _Slot:
    """A place for one process, its part, and the number of the part's frames that it has begun."""

    def __init__(self, job: Job, device: str, threads: int, where: str) -> None:
        self.device = device
        self.begun: Any = _CONTEXT.Value("q", LOADING)
        self.part: Part | None = None
        self.future: Future[dict[str, Any]] | None = None
        self.shown = 0
        self._arguments = (job, device, threads, where, self.begun)
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, part: Part) -> None:
        if self._pool is None:
            self.begun.value = LOADING
            self._pool = ProcessPoolExecutor(
                1, _CONTEXT, initializer=_prepare_process, initargs=self._arguments
            )
        self.part, self.shown = part, 0
        self.future = self._pool.submit(_compute, part.number, part.lines, part.cautious, part.deadly)

    def close(self) -> None:
        """End the process at once."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):  # no public way ends a process that computes
            with suppress(ProcessLookupError):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


class LocalEngine:
    """One process per place of this machine.

    Args:
        devices: a process each.
        threads: torch threads of a process.
    """

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        self._devices, self._threads = devices, threads

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        """See `Engine.compute`."""
        slots = [_Slot(job, device, self._threads, destination.where) for device in self._devices]
        again: deque[Part] = deque()
        try:
            while True:
                for slot in slots:
                    if (
                        slot.part is None
                        and (part := again.popleft() if again else next(parts, None)) is not None
                    ):
                        slot.submit(part)
                futures = [slot.future for slot in slots if slot.future is not None]
                if not futures:
                    return
                done, _ = wait(futures, timeout=_SHOW_S, return_when=FIRST_COMPLETED)
                for slot in slots:
                    if slot.part is None or slot.future is None:
                        continue
                    reached = max(0, slot.begun.value)
                    if slot.future not in done:
                        advance(reached - slot.shown)
                        slot.shown = reached
                        continue
                    future, part, shown = slot.future, slot.part, slot.shown
                    slot.part = slot.future = None
                    try:
                        counts = Counts.of(future.result())
                    except BrokenProcessPool:
                        advance(-shown)
                        part.record_end(slot.begun.value, slot.device)
                        slot.close()
                        again.append(part)
                        continue
                    advance(counts.frames - shown)
                    yield part.number, counts
        finally:
            for slot in slots:
                slot.close()


_process: tuple[Job, str, int, Destination, Any] | None = None
_model: Model | None = None


def _prepare_process(job: Job, device: str, threads: int, where: str, begun: Any) -> None:
    global _process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process = (job, device, threads, Destination(where), begun)


def _end_with_parent() -> None:
    """End when the process that waits for this one was killed: nothing else would end this one."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compute(number: int, lines: Sequence[bytes], cautious: bool, deadly: frozenset[int]) -> dict[str, Any]:
    """Predict a part and put its results into the destination; returns its counts."""
    assert _process is not None
    job, device, threads, destination, begun = _process
    model = _load(job, device, threads)
    begun.value = 0

    def begin(count: int) -> None:
        begun.value = count

    return compute_part(model, job, destination, number, lines, cautious, deadly, begin).figures()


def _load(job: Job, device: str, threads: int) -> Model:
    global _model
    if _model is None:
        _model = job.open_model(Path(job.archive), device, trust_code=job.trust_code, threads=threads)
    return _model
