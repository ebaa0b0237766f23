"""Processes of this machine that make files of finished parts (`serve.bulk.formats`) while others are computed."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson

from serve.bulk.destination import Destination
from serve.bulk.formats import (
    COCO,
    COCO_IDS,
    FORMATS_FILE,
    KITTI_ERRORS,
    PART_FORMATS,
    Outputs,
    convert_part,
    options_of,
)
from serve.bulk.processes import end_with_parent
from serve.errors import SetupError

__all__ = ["Conversions"]

_MOST_ENDS = 5
_Task = tuple[str, int]


class Conversions:
    """Conversions of parts to the formats of a run; a context manager, which ends its processes.

    Args:
        destination: has the records, takes the files.
        outputs: the formats.
        manifest: the frames.
        part_frames: frames per part.
        processes: at most so many at a time.
    """

    def __init__(
        self, destination: Destination, outputs: Outputs, manifest: Path, part_frames: int, processes: int
    ) -> None:
        self._destination, self._outputs, self._manifest = destination, outputs, manifest
        self._processes = processes
        self._names = [name for name in PART_FORMATS if name in outputs.formats]
        self._offsets = _offsets(manifest, part_frames) if self._names else array("q")
        self._waiting: deque[_Task] = deque()
        self._running: dict[Future[None], _Task] = {}
        self._ends = Counter[_Task]()
        self._pool: ProcessPoolExecutor | None = None
        self._scratch: str | None = None

    def __enter__(self) -> Self:
        """Convert within the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes; what they have not finished is missing, and is made by the next run."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def begin(self, finished: Iterable[int], *, is_whole: bool) -> None:
        """Convert the finished parts of former runs that lack a file, or have one that was made with other options.

        Args:
            finished: numbers of the parts that have a record.
            is_whole: whether these are all parts.
        """
        known = options_of(self._destination)
        chosen = [name for name in self._outputs.formats if name in (*PART_FORMATS, "coco")]
        options = {name: self._outputs.options(name) for name in chosen}
        stale = [name for name in chosen if known.get(name) != options[name]]
        if stale:
            # Forgotten before they are removed: what has no entry is removed when a kill comes between.
            kept = {name: known[name] for name in known if name not in stale}
            self._destination.write(FORMATS_FILE, orjson.dumps(kept))
            for name in stale:
                self._remove_files(name)
            self._destination.write(
                FORMATS_FILE, orjson.dumps({**kept, **{name: options[name] for name in stale}})
            )
        if not is_whole:
            self._remove_files("coco")  # it appears when all parts are there
        whole = set(finished)
        for name, suffix in PART_FORMATS.items():
            there = self._destination.finished(name, suffix)
            for number in sorted(there - whole):  # of records that were removed, to be computed again
                self._destination.remove(self._destination.format_name(name, number, suffix))
            there &= whole
            if name not in self._names:
                continue
            self._waiting.extend((name, number) for number in sorted(whole - there))
        self.advance()

    def add(self, number: int) -> None:
        """Convert a part that was finished now."""
        self._waiting.extend((name, number) for name in self._names)
        self.advance()

    def advance(self) -> None:
        """Take what is converted and go on, without waiting.

        Raises:
            ServeError: a part cannot be converted.
        """
        self._take({future for future in self._running if future.done()})
        while self._waiting and len(self._running) < 2 * self._processes:
            self._submit(self._waiting.popleft())

    def finish(self) -> dict[str, Counter[str]]:
        """Wait for all conversions; returns the number of frames that a format lacks, by format and code of the error.

        Raises:
            ServeError: a part cannot be converted.
        """
        self.advance()
        while self._running:
            wait(self._running, return_when=FIRST_COMPLETED)
            self.advance()
        return {"kitti": self._unwritten()} if "kitti" in self._names else {}

    def _unwritten(self) -> Counter[str]:
        found = Counter[str]()
        for number in sorted(self._destination.finished("kitti", KITTI_ERRORS)):
            errors = self._destination.read(self._destination.format_name("kitti", number, KITTI_ERRORS))
            found.update(each["error"]["code"] for each in orjson.loads(errors or b"[]"))
        return found

    def _remove_files(self, name: str) -> None:
        if name == "coco":
            for file in (COCO, COCO_IDS):
                self._destination.remove(file)
            return
        for suffix in (PART_FORMATS[name], *([KITTI_ERRORS] if name == "kitti" else [])):
            for number in sorted(self._destination.finished(name, suffix)):
                self._destination.remove(self._destination.format_name(name, number, suffix))

    def _submit(self, task: _Task) -> None:
        if self._scratch is None:
            self._scratch = tempfile.mkdtemp(prefix="mmdet3d-serve-bulk-")
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                get_context("spawn"),
                initializer=_prepare_process,
                initargs=(self._destination.where, self._outputs, self._manifest, self._scratch),
            )
        name, number = task
        ends = self._offsets[number], self._offsets[number + 1]
        self._running[self._pool.submit(_convert, name, number, ends)] = task

    def _take(self, done: set[Future[None]]) -> None:
        for future in done:
            task = self._running.pop(future)
            try:
                future.result()
            except BrokenProcessPool:
                self._restart(task)
                return

    def _restart(self, task: _Task) -> None:
        """Go on with new processes after one ended by itself."""
        broken = [task, *self._running.values()]
        wait(self._running, return_when=ALL_COMPLETED)
        self._running.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._ends.update(broken)
        for each in broken:
            if self._ends[each] >= _MOST_ENDS:
                raise SetupError(
                    f"processes ended {_MOST_ENDS} times while they wrote {each[0]} of part {each[1]}; is there enough "
                    "memory?"
                )
        self._waiting.extendleft(reversed(broken))


def _offsets(manifest: Path, part_frames: int) -> array[int]:
    """Where each part begins in the manifest, bytes, and where the last one ends."""
    offsets, at = array("q", [0]), 0
    with manifest.open("rb") as file:
        for index, line in enumerate(file, 1):
            at += len(line)
            if index % part_frames == 0:
                offsets.append(at)
    if offsets[-1] != at:
        offsets.append(at)
    return offsets


_process: tuple[Destination, Outputs, Path] | None = None


def _prepare_process(where: str, outputs: Outputs, manifest: Path, scratch: str) -> None:
    global _process
    tempfile.tempdir = scratch  # where a kill of this process leaves nothing for good
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    threading.Thread(target=end_with_parent, args=(scratch,), daemon=True).start()
    _process = (Destination(where), outputs, manifest)


def _convert(name: str, number: int, ends: tuple[int, int]) -> None:
    assert _process is not None
    destination, outputs, manifest = _process
    with manifest.open("rb") as file:
        file.seek(ends[0])
        lines = file.read(ends[1] - ends[0]).splitlines()
    convert_part(destination, outputs, name, number, lines)
