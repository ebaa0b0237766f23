"""A run over many frames: its plan, what of it is finished, and its end."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from serve.bulk.conversion import Conversions
from serve.bulk.destination import SUMMARY, Destination
from serve.bulk.formats import COCO, PART_FORMATS, Outputs, write_coco
from serve.bulk.lock import hold_destination
from serve.bulk.parts import Counts, Engine, Job, Part, manifest_line
from serve.errors import BadRequest, SettingsError, StorageError, quote
from serve.predict.sources import Source
from serve.storage.cache import map_disk_errors
from serve.storage.unnamed_file import unnamed_file

__all__ = ["BulkRun", "Plan", "Summary", "execute", "plan_run"]

_RUN, _MANIFEST = "bulk.json", "manifest.jsonl"
_FIELDS = {"run", "frames", "part_frames", "manifest_sha256"}
_READERS = 16  # of a bucket


@dataclass(frozen=True)
class BulkRun:
    """What to do.

    Attributes:
        job: what every part needs.
        identity: what results depend on: model, source and options.
        part_frames: frames per part.
        outputs: formats of the results.
        converters: processes that write them, at most.
    """

    job: Job
    identity: dict[str, Any]
    part_frames: int
    outputs: Outputs = field(default_factory=Outputs)
    converters: int = 1


def _nothing() -> None:
    return


@dataclass(frozen=True)
class Plan:
    """The manifest of a run, on this machine, and what of the run is finished.

    Attributes:
        manifest: its path.
        frames: number of frames.
        part_frames: frames per part.
        finished: numbers of the parts that have results.
        check: raises if another run has taken over the destination.
    """

    manifest: Path
    frames: int
    part_frames: int
    finished: frozenset[int]
    check: Callable[[], None] = _nothing

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.frames // self.part_frames)

    @property
    def frames_finished(self) -> int:
        """Number of frames in finished parts."""
        last = self.frames - (self.parts - 1) * self.part_frames
        return len(self.finished) * self.part_frames - (self.part_frames - last) * (
            self.parts - 1 in self.finished
        )

    def missing(self) -> Iterator[Part]:
        """Read the parts that are not finished, one after the other."""
        with self.manifest.open("rb") as file:
            for number in range(self.parts):
                lines = [line for _, line in zip(range(self.part_frames), file, strict=False)]
                if number not in self.finished:
                    yield Part(number, lines)


@dataclass(frozen=True)
class Summary:
    """Counts of a run and what it took.

    Attributes:
        counts: of all parts.
        computed: frames that were computed now; the others were finished before.
        seconds: time that they took.
        unwritten: answered frames that a format lacks, by format and code of the error.
        partial: formats of former runs that were not asked for now, with the number of parts that have them.
    """

    counts: Counts
    computed: int
    seconds: float
    unwritten: dict[str, Counter[str]] = field(default_factory=dict)
    partial: dict[str, int] = field(default_factory=dict)


def plan_run(
    run: BulkRun,
    destination: Destination,
    open_frames: Callable[[], Source],
    stack: ExitStack,
    *,
    overwrite: bool,
    retry_failed: bool = False,
) -> Plan:
    """Begin a run, or go on with it: the manifest is written when it is begun and holds from then on.

    Args:
        run: what to do.
        destination: takes the results.
        open_frames: lists the frames; not called if the run goes on.
        stack: keeps the lock of the destination, and a copy of a bucket's manifest.
        overwrite: forget another run, and begin this one anew.
        retry_failed: forget the parts that have failed frames, so that they are computed again.

    Raises:
        BadRequest: the destination has the results of another run, or of one that is not known.
        SettingsError: the frames are those of a video, camera or stream.
    """
    lock = hold_destination(destination, stack)
    check = _nothing if lock is None else lock.check
    return replace(_plan(run, destination, open_frames, stack, overwrite, retry_failed, check), check=check)


def _plan(
    run: BulkRun,
    destination: Destination,
    open_frames: Callable[[], Source],
    stack: ExitStack,
    overwrite: bool,
    retry_failed: bool,
    check: Callable[[], None],
) -> Plan:
    if overwrite:
        destination.clear()
    destination.sweep()
    known = destination.read(_RUN)
    if known is None:
        return _begin(run, destination, open_frames(), stack, check)
    described = _parse(known, destination)
    if (other := described["run"]) != run.identity:
        raise BadRequest(
            f"{destination.where} has the results of another run: {_differences(other, run.identity)}; choose another "
            "--out, or --overwrite"
        )
    manifest = _local_manifest(destination, stack)
    if _digest(manifest) != described["manifest_sha256"]:
        raise BadRequest(f"{destination.uri(_MANIFEST)} was altered; --overwrite begins the run anew")
    finished = frozenset(destination.finished())
    if retry_failed:
        finished -= _forget_failed(finished, destination)
    return Plan(manifest, described["frames"], described["part_frames"], finished)


def _parse(known: bytes, destination: Destination) -> dict[str, Any]:
    try:
        described: dict[str, Any] = orjson.loads(known)
        if described.keys() >= _FIELDS and isinstance(described["run"], dict):
            return described
    except (orjson.JSONDecodeError, AttributeError):
        pass
    raise BadRequest(f"{destination.uri(_RUN)} does not describe a run; choose another --out, or --overwrite")


def _differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in sorted({*there, *now}) if there.get(name) != now.get(name)]
    return ", ".join(
        f"{name} is {quote(there.get(name))} there, {quote(now.get(name))} now" for name in names
    )


def _begin(
    run: BulkRun, destination: Destination, source: Source, stack: ExitStack, check: Callable[[], None]
) -> Plan:
    if destination.finished():
        raise BadRequest(
            f"{destination.where} has results, and no {_RUN} says of which run; choose another --out, or --overwrite"
        )
    count = 0
    with destination.writing(_MANIFEST) as file:
        for frame in source:
            if frame.origin is None:
                raise SettingsError(f"{source.what} is a video, camera or stream; `predict` reads those")
            file.write(manifest_line(frame))
            count += 1
        check()  # a listing may take minutes, and the lock be lost meanwhile
    manifest = _local_manifest(destination, stack)
    described = {
        "run": run.identity,
        "frames": count,
        "part_frames": run.part_frames,
        "manifest_sha256": _digest(manifest),
    }
    destination.write(_RUN, orjson.dumps(described, option=orjson.OPT_INDENT_2))
    return Plan(manifest, count, run.part_frames, frozenset())


def _local_manifest(destination: Destination, stack: ExitStack) -> Path:
    if destination.is_local:
        return destination.folder / _MANIFEST
    with map_disk_errors(tempfile.gettempdir()):
        file, path = stack.enter_context(unnamed_file())
        destination.download(_MANIFEST, file)
        file.flush()
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def execute(
    run: BulkRun,
    plan: Plan,
    destination: Destination,
    engine: Engine,
    advance: Callable[[int], None] = lambda frames: None,
) -> Summary:
    """Compute what is missing and write the summary, which is not there meanwhile.

    Args:
        run: what to do.
        plan: what `plan_run` returned.
        destination: takes the results.
        engine: computes the parts.
        advance: as of `Engine.compute`.

    Raises:
        ServeError: the model cannot be loaded, or the destination not be written.
    """
    try:
        return _execute(run, plan, destination, engine, advance)
    finally:
        destination.sweep()


def _execute(
    run: BulkRun, plan: Plan, destination: Destination, engine: Engine, advance: Callable[[int], None]
) -> Summary:
    destination.remove(SUMMARY)
    counts = _counts_of(plan.finished, destination)
    kept, started = counts.frames, time.monotonic()
    with Conversions(
        destination, run.outputs, plan.manifest, plan.part_frames, run.converters
    ) as conversions:
        conversions.begin(plan.finished, is_whole=len(plan.finished) == plan.parts)

        lock = threading.Lock()

        def begun(frames: int) -> None:
            with lock:
                plan.check()
                advance(frames)
                conversions.advance()

        for number, found in engine.compute(plan.missing(), run.job, destination, begun):
            with lock:
                counts.merge(found)
                conversions.add(number)
        seconds = time.monotonic() - started
        plan.check()
        if counts.frames != plan.frames:
            raise StorageError(
                f"{destination.where} has results of {counts.frames:,} frames, and {plan.frames:,} are listed; the "
                "same command goes on if parts are missing, else --overwrite begins anew"
            )
        unwritten = conversions.finish()
    if "coco" in run.outputs.formats and not destination.exists(COCO):
        write_coco(destination, run.outputs, plan.manifest, plan.parts)
    plan.check()
    summary = Summary(
        counts, counts.frames - kept, seconds, unwritten, _partial_formats(run, plan, destination)
    )
    figures = {
        **counts.figures(),
        "unwritten": {name: dict(codes) for name, codes in unwritten.items() if codes},
    }
    destination.write(SUMMARY, orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    return summary


def _forget_failed(finished: Iterable[int], destination: Destination) -> frozenset[int]:
    """Remove the parts that have failed frames; returns their numbers."""
    failed = frozenset(number for number, counts in _read_counts(finished, destination) if counts.failed)
    if failed:
        destination.remove(SUMMARY)
    for number in failed:
        destination.remove(destination.part_name(number))
        destination.remove(destination.counts_name(number))
        for name, suffix in PART_FORMATS.items():
            destination.remove(destination.format_name(name, number, suffix))
    return failed


def _counts_of(parts: Iterable[int], destination: Destination) -> Counts:
    """Add up the counts of finished parts."""
    counts = Counts()
    for _, found in _read_counts(parts, destination):
        counts.merge(found)
    return counts


def _read_counts(parts: Iterable[int], destination: Destination) -> Iterator[tuple[int, Counts]]:
    """Read the counts of finished parts: twenty thousand small files for ten million frames."""

    def read(number: int) -> tuple[int, Counts]:
        name = destination.counts_name(number)
        data = destination.read(name)
        if data is None:
            raise BadRequest(f"{destination.uri(name)} is missing; --overwrite begins anew")
        return number, Counts.of(orjson.loads(data))

    with ThreadPoolExecutor(1 if destination.is_local else _READERS) as pool:
        yield from pool.map(read, sorted(parts))


def _partial_formats(run: BulkRun, plan: Plan, destination: Destination) -> dict[str, int]:
    others = {name: suffix for name, suffix in PART_FORMATS.items() if name not in run.outputs.formats}
    found = {name: len(destination.finished(name, suffix)) for name, suffix in others.items()}
    return {name: count for name, count in found.items() if 0 < count < plan.parts}
