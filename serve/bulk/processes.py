"""Processes of this machine that compute parts.

A process that ends by itself (out of memory, a fault of a library) takes its part with it. The part is computed again
one frame at a time; a frame with which a process ends twice more gets an error, and the rest of the part goes on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import orjson

from serve.bulk.destination import Destination
from serve.bulk.parts import Counts, Job, predict_part
from serve.errors import SetupError
from serve.predict.models import Model

__all__ = ["Part", "compute_parts"]

_CONTEXT = get_context("spawn")
_MOST_STARTS = 3
_MOST_ENDS = 2
_SHOW_S = 0.5
_LOADING = -1


@dataclass
class Part:
    """A part that is to be computed.

    Attributes:
        number: its number.
        lines: its lines of the manifest.
        cautious: one frame at a time, because a process has ended with it.
        suspects: how often a process ended while it computed a frame alone, by the frame's index.
    """

    number: int
    lines: Sequence[bytes]
    cautious: bool = False
    suspects: Counter[int] = field(default_factory=Counter)

    @property
    def deadly(self) -> frozenset[int]:
        """Frames that are given up: once may be chance, such as a kill of the system for another process's memory."""
        return frozenset(index for index, times in self.suspects.items() if times >= _MOST_ENDS)


class _Slot:
    """A place for one process, its part, and the number of the part's frames that it has begun."""

    def __init__(self, job: Job, device: str, threads: int, where: str) -> None:
        self.device = device
        self.begun: Any = _CONTEXT.Value("q", _LOADING)
        self.part: Part | None = None
        self.future: Future[dict[str, Any]] | None = None
        self.shown = 0
        self.starts = 0
        self._arguments = (job, device, threads, where, self.begun)
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, part: Part) -> None:
        if self._pool is None:
            self.begun.value = _LOADING
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


def compute_parts(
    parts: Iterator[Part],
    job: Job,
    destination: Destination,
    devices: Sequence[str],
    threads: int,
    advance: Callable[[int], None],
) -> Iterator[Counts]:
    """Compute parts side by side, and yield the counts of each when it is finished.

    Args:
        parts: the parts; taken when a process is free.
        job: what every part needs.
        destination: takes the results.
        devices: one process each.
        threads: torch threads of a process.
        advance: called with the number of frames that were begun since the last call; negative if a part begins anew.

    Raises:
        ServeError: the model cannot be loaded, or the destination not be written.
    """
    slots = [_Slot(job, device, threads, destination.where) for device in devices]
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
                    _blame(slot, part)
                    slot.close()
                    again.append(part)
                    continue
                slot.starts = 0
                advance(counts.frames - shown)
                yield counts
    finally:
        for slot in slots:
            slot.close()


def _blame(slot: _Slot, part: Part) -> None:
    """Find out what ended a process: the frame that it had, if it had one alone.

    Raises:
        SetupError: processes end before they have loaded the model.
    """
    if slot.begun.value == _LOADING:
        slot.starts += 1
        if slot.starts >= _MOST_STARTS:
            raise SetupError(
                f"{slot.starts} processes for {slot.device} ended before they had loaded the model; is there enough "
                "memory? try fewer --processes"
            )
        return
    if part.cautious and slot.begun.value > 0:
        part.suspects[slot.begun.value - 1] += 1
    part.cautious = True


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

    with destination.writing(destination.part_name(number)) as out:
        counts = predict_part(model, job, lines, out, cautious=cautious, deadly=deadly, begun=begin)
        # Before the part appears, so that every part that is there has its counts.
        destination.write(destination.counts_name(number), orjson.dumps(counts.figures()))
    return counts.figures()


def _load(job: Job, device: str, threads: int) -> Model:
    global _model
    if _model is None:
        _model = job.open_model(Path(job.archive), device, trust_code=job.trust_code, threads=threads)
    return _model
