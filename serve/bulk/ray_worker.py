"""What runs on the machines of a Ray cluster: actors that compute parts, and one that knows how far each has come.

A process that ends takes what it knew with it, so the `Board` holds what the next one has to know: Ray starts an actor
again elsewhere and hands it the same part, and the board then finds out what ended the former process.

Everything that Ray pickles here is a number, a text, bytes, or a dataclass of this package.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from serve import __version__, errors, storage
from serve.bulk.destination import Destination
from serve.bulk.parts import LOADING, Job, Part, compute_part
from serve.bulk.retry import on_server, repeat
from serve.errors import ServeError, SettingsError, SetupError
from serve.predict.models import Model
from serve.settings import Settings

__all__ = ["Board", "PartWorker", "Task", "error_of", "pack_lines"]

_REPORT_S = 0.5
_RUN = "bulk.json"


@dataclass(frozen=True)
class Task:
    """What every actor gets.

    Attributes:
        job: what every part needs; its archive may be at a URI.
        archive_sha256: hash of the archive.
        where: folder or bucket of the results.
        run_sha256: hash of the run's description there, which shows that every machine sees the same folder.
        device: ``cpu`` or ``cuda:0``, of those that Ray lends.
        threads: torch threads.
        version: of this package.
    """

    job: Job
    archive_sha256: str
    where: str
    run_sha256: str
    device: str
    threads: int
    version: str = __version__


def pack_lines(lines: Sequence[bytes]) -> bytes:
    """Compress the manifest's lines of a part: a tenth of them, as they differ by a number."""
    return zlib.compress(b"".join(lines), 1)


def _describe(error: Exception) -> str:
    if not isinstance(error, ServeError):
        reason = str(error).partition("\n")[0]  # Ray's go on with pages of logs
        error = SetupError(
            f"a part cannot be computed ({type(error).__name__}: {reason}); is there enough memory?"
        )
    return orjson.dumps([type(error).__name__, str(error)]).decode()


def error_of(text: str) -> ServeError:
    """Make the error again that ended a part on another machine."""
    name, message = orjson.loads(text)
    kind = getattr(errors, name, None)
    known = isinstance(kind, type) and issubclass(kind, ServeError)
    return kind(message) if known else SetupError(message)  # type: ignore[misc]


class Board:
    """The parts that are being computed, and how far; an actor of its own.

    Times and machines differ, so nothing here depends on a clock: a part that is taken while it is taken already has
    lost the process that had it.

    What ends processes may end this one too (Ray's memory monitor kills whatever runs), so all that decides is in a
    journal, from which the next process of the actor makes the same board.

    Args:
        journal: path of a file on the machine of this actor; need not exist.
    """

    def __init__(self, journal: str) -> None:
        self._parts: dict[int, Part] = {}
        self._attempts: dict[int, str] = {}
        self._begun: dict[int, int] = {}
        self._finished: dict[int, int] = {}
        self._errors: dict[int, str] = {}
        self._apply: dict[str, Callable[..., None]] = {
            "take": self._take,
            "begin": self._begin,
            "finish": self._finish,
        }
        self._journal = Path(journal)
        if self._journal.exists():
            for line in self._journal.read_bytes().splitlines():
                with suppress(orjson.JSONDecodeError):  # cut off by a full disk
                    name, *values = orjson.loads(line)
                    self._apply[name](*values)

    def take(self, number: int, attempt: str, place: str) -> tuple[bool, frozenset[int], str]:
        """Begin a part; returns `Part.cautious`, `Part.deadly` and the error that ends the run, or an empty text.

        Args:
            number: of the part.
            attempt: unique; Ray may call again with the same if this process has ended.
            place: device and machine of the process that takes it.
        """
        if self._attempts.get(number) != attempt:
            self._note("take", number, attempt, place)
        part = self._parts[number]
        return part.cautious, part.deadly, self._errors.get(number, "")

    def begin(self, number: int, attempt: str, begun: int) -> None:
        """Note how many frames of a part are begun; ignored of an attempt that was given up."""
        if self._attempts.get(number) != attempt:
            return
        if self._parts[number].cautious or self._begun[number] == LOADING:
            self._note("begin", number, begun)
        else:  # shown, and decides nothing
            self._begin(number, begun)

    def finish(self, number: int, frames: int) -> None:
        """Note that a part is finished; twice, if its machine is lost before the counts have left it."""
        self._note("finish", number, frames)

    def begun(self) -> int:
        """Count the frames that are begun or finished, of all parts."""
        return sum(self._finished.values()) + sum(max(0, begun) for begun in self._begun.values())

    def _note(self, name: str, *values: Any) -> None:
        with self._journal.open("ab") as file:
            file.write(b"\n" + orjson.dumps([name, *values]))  # one that was cut off harms no other
        self._apply[name](*values)

    def _take(self, number: int, attempt: str, place: str) -> None:
        part = self._parts.get(number)
        if part is None:
            self._parts[number] = Part(number, ())
        else:
            try:
                part.record_end(self._begun[number], place)
            except SetupError as error:
                self._errors[number] = _describe(error)
        self._begun[number], self._attempts[number] = LOADING, attempt

    def _begin(self, number: int, begun: int) -> None:
        self._begun[number] = begun

    def _finish(self, number: int, frames: int) -> None:
        for each in (self._parts, self._attempts, self._begun, self._errors):
            each.pop(number, None)
        self._finished[number] = frames


class PartWorker:
    """Computes parts, one after the other, with one model; Ray Data makes an actor of it.

    Args:
        task: what to do.
        board: handle of the actor `Board`.
    """

    def __init__(self, task: Task, board: Any) -> None:
        self._task, self._board = task, board
        self._model: Model | None = None
        self._checked: Destination | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute the part of a row; returns its number and counts, or the error that ends the run."""
        import ray

        number, lines = int(row["number"]), zlib.decompress(row["lines"]).splitlines(keepends=True)
        board, attempt = self._board, secrets.token_hex(8)
        place = f"{self._task.device} of {socket.gethostname()}"
        try:
            cautious, deadly, error = ray.get(board.take.remote(number, attempt, place))
            if error:
                return {"number": number, "counts": "", "error": error}
            destination, model = self._check(lines), self._load()
            ray.get(board.begin.remote(number, attempt, 0))
            begin = _Reports(board, number, attempt, cautious)
            job = self._task.job
            counts = compute_part(model, job, destination, number, lines, cautious, deadly, begin)
            ray.get(board.finish.remote(number, counts.frames))
        except Exception as raised:
            return {"number": number, "counts": "", "error": _describe(raised)}
        return {"number": number, "counts": orjson.dumps(counts.figures()).decode(), "error": ""}

    def _check(self, lines: Sequence[bytes]) -> Destination:
        """Make sure that this machine has the same package, results and frames as the one that asks.

        Raises:
            SetupError: another version of this package.
            SettingsError: the folder of the results or of the frames is not shared.
        """
        if self._checked is not None:
            return self._checked
        host = socket.gethostname()
        if self._task.version != __version__:
            raise SetupError(
                f"{host} has mmdet3d-serve {__version__}, the machine that runs bulk {self._task.version}; "
                "use one image for all"
            )
        read = partial(storage.read_bytes, f"{self._task.where}/{_RUN}")
        try:
            found = repeat(read) if storage.is_remote(self._task.where) else read()
        except errors.ObjectNotFound:
            found = b""
        if hashlib.sha256(found).hexdigest() != self._task.run_sha256:
            raise SettingsError(
                f"{host} does not see the results in {self._task.where}; on a cluster --out is a bucket, or a folder "
                "that all machines share"
            )
        origin = orjson.loads(lines[0])["origin"]
        for path in (origin,) if isinstance(origin, str) else origin.values():
            is_packed = storage.is_remote(path)
            place = Path(storage.parse(path).path) if is_packed else Path(path).parent
            if not on_server(path) and not place.exists():
                raise SettingsError(
                    f"{host} does not see the frames in {place}; on a cluster they are in a bucket, or in a folder "
                    "that all machines share"
                )
        self._checked = Destination(self._task.where)
        return self._checked

    def _load(self) -> Model:
        """Fetch the archive, once for a machine, and load it, once for this process."""
        if self._model is None:
            task, settings = self._task, Settings.from_environment()
            cache = storage.Cache(settings.cache_dir, settings.cache_max_bytes)
            path = storage.local_path(task.job.archive, cache, sha256=task.archive_sha256, progress=False)
            self._task = replace(task, job=replace(task.job, archive=str(path)))
            self._model = task.job.open_model(
                path, task.device, trust_code=task.job.trust_code, threads=task.threads
            )
        return self._model


class _Reports:
    """Tells the board of the frames that are begun: of a cautious part before each, else now and then."""

    def __init__(self, board: Any, number: int, attempt: str, cautious: bool) -> None:
        self._board, self._number, self._attempt, self._cautious = board, number, attempt, cautious
        self._next = 0.0

    def __call__(self, count: int) -> None:
        if self._cautious:
            import ray

            ray.get(self._board.begin.remote(self._number, self._attempt, count))
        elif (now := time.monotonic()) >= self._next:
            self._next = now + _REPORT_S
            self._board.begin.remote(self._number, self._attempt, count)
